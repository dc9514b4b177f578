"""
A Workload API in the test's own loop: the real servicer behind a real front door, on a cache
that the test fills by hand, with an attestor that learns of every caller what it was told.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import grpc

from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import NotFoundError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.selector import Selector
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA, SecurityHeaderInterceptor
from tests.support.authorities import NOW, a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder
from workload_api.attestors.protocol import Finding, WorkloadAttestor
from workload_api.attestors.registry import Attestation
from workload_api.cache.cache import Change, HeldSvid, WorkloadCache
from workload_api.endpoint.following import Callers
from workload_api.endpoint.responses import Responses
from workload_api.endpoint.workload import WorkloadServicer, register
from workload_api.metrics import AgentMetrics
from workload_api.sync.tokens import TokenCache

SELECTOR = "unix:uid:1000"
_SERIALS = itertools.count(1)


class Told:
    """An attestor that learns *selectors* of everybody, and counts how often it was asked."""

    type: ClassVar[str] = "unix"

    def __init__(self, *texts: str) -> None:
        self.selectors = frozenset(Selector.parse(text) for text in texts)
        self.calls = 0
        self.error: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def attest(self, _: UnixPeer) -> Finding:
        """See `WorkloadAttestor`."""
        self.calls += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return Finding(self.selectors)

    def close(self) -> None:
        """Nothing is under way."""


def a_held(ca: FakeCa, entry: RegistrationEntry, **changes: Any) -> HeldSvid:
    """An SVID for *entry*, as the agent holds it; *changes* go into the certificate."""
    made = ca.leaf(entry.spiffe_id.uri, serial=next(_SERIALS), **changes)
    svid = X509Svid.from_chain(ca.chain(made))
    return HeldSvid(
        svid.spiffe_id,
        entry.revision_number,
        svid.chain,
        pkcs8_of(a_key("p256", "workload")),
        svid.validity,
        svid.serial_number,
        ca.authority.authority_id,
    )


@dataclass
class Endpoint:
    """A running Workload API, and everything behind it."""

    folder: Path
    socket: Path
    cache: WorkloadCache
    callers: Callers
    servicer: WorkloadServicer
    told: Told
    door: FrontDoor
    ca: FakeCa = field(default_factory=FakeCa)
    clock: DrivenClock = field(default_factory=lambda: DrivenClock(NOW))

    def put(self, *entries: RegistrationEntry, signed: bool = True, **changes: Any) -> None:
        """The server added or changed *entries*; they are signed for, and streams are told."""
        change = self.cache.apply(snapshot=False, entries=entries)
        for entry in entries if signed else ():
            self.cache.svids[entry.id] = a_held(self.ca, entry, **changes)
        self.cache.wake(Change((*change.entries, *entries), change.everybody))

    def drop(self, *entries: RegistrationEntry) -> None:
        """The server took *entries* away."""
        self.cache.wake(self.cache.apply(snapshot=False, removed=[one.id for one in entries]))

    def renew(self, entry: RegistrationEntry, **changes: Any) -> None:
        """*entry* was signed for anew."""
        self.cache.svids[entry.id] = a_held(self.ca, entry, **changes)
        self.cache.wake(Change((entry,)))

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        """The Workload API over a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{self.socket}", options) as channel:
            yield workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


def fetch(stub: Any, method: str = "FetchX509SVID") -> Any:
    """An open stream of *method*."""
    request = {
        "FetchX509SVID": workloadapi_pb2.X509SVIDRequest,
        "FetchX509Bundles": workloadapi_pb2.X509BundlesRequest,
        "FetchJWTBundles": workloadapi_pb2.JWTBundlesRequest,
    }[method]()
    return getattr(stub, method)(request, metadata=METADATA)


async def read(call: Any, within: float = 5) -> Any:
    """The next message of a stream."""
    async with asyncio.timeout(within):
        message = await call.read()
    assert message is not grpc.aio.EOF, f"the stream ended: {await call.code()}"
    return message


async def says_nothing(call: Any, for_: float = 0.15) -> bool:
    """True when no message comes for a moment."""
    reading = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait([reading], timeout=for_)
    if not done:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return not done


async def ending(call: Any, within: float = 5) -> tuple[grpc.StatusCode, str]:
    """How a stream ends, whatever it says before."""
    async with asyncio.timeout(within):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return await call.code(), await call.details()


@asynccontextmanager
async def an_endpoint(
    *selectors: str,
    attestors: list[WorkloadAttestor] | None = None,
    attestation_timeout: timedelta = timedelta(seconds=5),
    fetch_token: Any = None,
    grace: timedelta = timedelta(0),
    **changes: Any,
) -> AsyncIterator[Endpoint]:
    """
    A Workload API of example.org that is in step with its server, and has no entry yet.

    Callers have `SELECTOR`, or *selectors*; *changes* are fields of `Callers`.
    """
    told = Told(*(selectors or (SELECTOR,)))
    clock, ca = DrivenClock(NOW), FakeCa()
    cache = WorkloadCache(ca.trust_domain)
    cache.apply(snapshot=True, bundles=[ca.bundle])

    async def no_token(entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        raise NotFoundError("no such entry")

    attestation = Attestation(
        attestors if attestors is not None else [told], timeout=attestation_timeout
    )
    tokens = TokenCache(cache, fetch_token or no_token, clock.now)
    callers = replace(Callers(cache, attestation, clock.now), **changes)
    responses = Responses(cache.trust_domain)
    servicer = WorkloadServicer(callers, tokens, responses, AgentMetrics(), grace)
    with a_folder() as folder:
        async with FrontDoor(
            lambda server: register(servicer, server),
            runtime_dir=folder / "i",
            interceptors=[SecurityHeaderInterceptor(), ErrorInterceptor()],
        ) as door:
            await door.listen_unix(folder / "s", mode=0o600)
            made = Endpoint(
                folder, folder / "s", cache, callers, servicer, told, door, ca, clock
            )
            try:
                yield made
            finally:
                callers.stop()
                tokens.clear()
                await asyncio.sleep(0)
                attestation.close()
