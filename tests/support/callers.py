"""
Everyone who can call a server, each with a real connection of its own.

`a_running_server` runs one in the test's loop.  Its `local` calls come over the admin
socket; `anonymous`, `node` and `holder` dial the TLS port: without a certificate, as an
attested agent, and as the holder of any SVID.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from issuer.app import Server
from issuer.store.events import AuditRow
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.tls import client_context
from spiffe_wire.pb.grpc.health.v1 import health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import explain_pb2_grpc, watch_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.pb.spire.api.types import attestation_pb2, spiffeid_pb2
from spiffe_wire.status import error_of
from tests.support.stack import TRUST_DOMAIN, a_folder, channel_to, entry_message, serving
from workload_api.keys import make_csr, make_key

Code = grpc.StatusCode
NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: OpenSSL knows no driven clock; both ends look again by theirs."""
PATIENCE = 10.0


@dataclass(frozen=True)
class Calls:
    """The services of a server over one channel."""

    channel: Any

    @cached_property
    def entry(self) -> Any:
        return entry_pb2_grpc.EntryStub(self.channel)

    @cached_property
    def agent(self) -> Any:
        return agent_pb2_grpc.AgentStub(self.channel)

    @cached_property
    def svid(self) -> Any:
        return svid_pb2_grpc.SVIDStub(self.channel)

    @cached_property
    def bundle(self) -> Any:
        return bundle_pb2_grpc.BundleStub(self.channel)

    @cached_property
    def watch(self) -> Any:
        return watch_pb2_grpc.AgentWatchStub(self.channel)

    @cached_property
    def explain(self) -> Any:
        return explain_pb2_grpc.ExplainStub(self.channel)

    @cached_property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)


@dataclass
class Holder:
    """One who dials with an SVID, or with none."""

    calls: Calls
    dialer: Dialer
    chain: tuple[bytes, ...] = ()
    key: bytes = field(default=b"", repr=False)

    @property
    def svid(self) -> X509Svid:
        """What it presents."""
        return X509Svid.from_chain(self.chain)

    @property
    def id(self) -> SpiffeId:
        """Who it is."""
        return self.svid.spiffe_id

    async def renew(self) -> tuple[tuple[bytes, ...], bytes]:
        """Renew as an agent does; return the new chain and key, which are not used yet."""
        key = make_key()
        answer = await self.calls.agent.RenewAgent(
            agent_pb2.RenewAgentRequest(params=csr_params(make_csr(key)))
        )
        return tuple(answer.svid.cert_chain), key

    def use(self, chain: tuple[bytes, ...], key: bytes) -> None:
        """Present another SVID from the next call on, over a new connection."""
        self.chain, self.key = chain, key
        self.dialer.cut()


@dataclass
class Running:
    """A server in this loop, and the ways in."""

    server: Server
    folder: Path
    local: Calls
    anonymous: Holder
    stack: contextlib.AsyncExitStack

    async def dial(self, chain: tuple[bytes, ...] = (), key: bytes = b"") -> Holder:
        """Dial the TLS port, with an SVID or without; it stays until the server ends."""
        return await self.stack.enter_async_context(dialing(self.server, chain, key))

    async def token(self, **fields: Any) -> str:
        """A fresh join token."""
        made = await self.local.agent.CreateJoinToken(
            agent_pb2.CreateJoinTokenRequest(**{"ttl": 600, **fields})
        )
        return str(made.value)

    async def node(self, token: str = "", key: bytes = b"") -> Holder:
        """An agent that attested with *token*, or with a fresh one."""
        key = key or make_key()
        answer = await attest(self.anonymous.calls, token or await self.token(), make_csr(key))
        return await self.dial(tuple(answer.result.svid.cert_chain), key)

    async def holder(self, path: str) -> Holder:
        """The holder of a minted SVID."""
        key = make_key()
        minted = await self.local.svid.MintX509SVID(
            svid_pb2.MintX509SVIDRequest(csr=make_csr(key, an_id(path)))
        )
        return await self.dial(tuple(minted.svid.cert_chain), key)

    async def add(self, *entries: Any) -> list[Any]:
        """Create entries and return them as stored, once the server acts upon them."""
        answer = await self.local.entry.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=entries)
        )
        for result in answer.results:
            assert result.status.code == 0, result.status.message
        await self.settled()
        return [result.entry for result in answer.results]

    async def advance(self, span: timedelta) -> None:
        """Move a driven clock on, and return once the server presents a good SVID again."""
        own = self.server.own
        own.clock.advance(span)  # type: ignore[attr-defined]
        await eventually(lambda: own.svid and own.svid.validity.covers(own.clock.now()))

    async def settled(self) -> None:
        """Return once every change so far is folded into memory."""
        seq = await self.server.store.read(lambda repos: repos.events.last())
        await self.server.hub.caught_up(seq)

    async def audit(self, after: int = 0) -> list[AuditRow]:
        """The audit trail behind row *after*."""
        return list(await self.server.store.read(lambda repos: repos.audit.rows(after)))

    async def audited(self, during: Callable[[], Awaitable[Any]]) -> list[tuple[str, str, str]]:
        """Action, target and outcome of the rows that *during* wrote."""
        before = [row.seq for row in await self.audit()]
        await during()
        rows = await self.audit(before[-1] if before else 0)
        return [(row.action, row.target, row.outcome) for row in rows]


@contextlib.asynccontextmanager
async def a_running_server(clock: Any = None, **changes: Any) -> AsyncIterator[Running]:
    """A server in this loop, in a folder of its own."""
    with a_folder() as folder:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving(folder, clock, **changes))
            socket = server.settings.admin_socket_path
            local = Calls(await stack.enter_async_context(channel_to(socket)))
            anonymous = await stack.enter_async_context(dialing(server))
            yield Running(server, folder, local, anonymous, stack)


@contextlib.asynccontextmanager
async def dialing(
    server: Server, chain: tuple[bytes, ...] = (), key: bytes = b""
) -> AsyncIterator[Holder]:
    """Dial the server's TLS port, and see that it is the server before a byte is sent."""

    def context() -> ssl.SSLContext:
        roots = [one.der for one in server.hub.bundle.x509_authorities]
        made = client_context(roots, holder.chain, holder.key)
        made.verify_flags |= NO_CHECK_TIME
        server.own.context().verify_flags |= NO_CHECK_TIME
        return made

    def check(presented: tuple[bytes, ...]) -> None:
        at = server.own.clock.now()
        found = verify_x509_svid(presented, server.hub.own_roots(), at=at)
        assert found.spiffe_id == server.hub.trust_domain.server_id

    dialer = Dialer(
        "127.0.0.1",
        server.port,
        context=context,
        check=check,
        runtime_dir=server.settings.runtime_dir / "test",
    )
    async with dialer:
        holder = Holder(Calls(dialer.channel), dialer, chain, key)
        yield holder


async def attest(calls: Calls, token: str, csr: bytes, type_: str = "join_token") -> Any:
    """Attest over *calls* and return the answer."""
    call = calls.agent.AttestAgent(timeout=PATIENCE)
    await call.write(
        agent_pb2.AttestAgentRequest(
            params=agent_pb2.AttestAgentRequest.Params(
                data=attestation_pb2.AttestationData(type=type_, payload=token.encode()),
                params=csr_params(csr),
            )
        )
    )
    answer = await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return answer


def csr_params(csr: bytes) -> Any:
    """A CSR as an agent sends it."""
    return agent_pb2.AgentX509SVIDParams(csr=csr)


def an_id(path: str) -> SpiffeId:
    """An ID of the server's trust domain."""
    return SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}{path}")


def id_message(path: str, trust_domain: str = TRUST_DOMAIN) -> Any:
    """An ID as a message, right or wrong."""
    return spiffeid_pb2.SPIFFEID(trust_domain=trust_domain, path=path)


def below(parent: Holder | SpiffeId | str, path: str, *selectors: str, **fields: Any) -> Any:
    """An entry message below *parent*; one selector if none is given."""
    over = parent.id if isinstance(parent, Holder) else parent
    return entry_message(path, str(over), *(selectors or ("unix:uid:1000",)), **fields)


def mask(kind: Any, *names: str) -> Any:
    """A mask message with these bits."""
    return kind(**dict.fromkeys(names, True))


def csr_with(
    key: bytes, *names: x509.GeneralName, extensions: Iterable[x509.ExtensionType] = ()
) -> bytes:
    """A CSR that asks for more than a key."""
    private = serialization.load_der_private_key(key, password=None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    for one in extensions:
        builder = builder.add_extension(one, critical=True)
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, text: str = "") -> AsyncIterator[list[Any]]:
    """The call inside is refused with *code*, and *text* is part of what it is told."""
    seen: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield seen
    seen.append(caught.value)
    assert caught.value.code() is code, caught.value.details()
    assert text in (caught.value.details() or "")


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """How a call ended."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


def reason_of(error: grpc.aio.AioRpcError) -> DenialReason | None:
    """The typed reason of a denial."""
    found = error_of(error)
    return found.reason if isinstance(found, AgentDeniedError) else None


async def eventually(
    condition: Callable[[], Any], timeout: float = PATIENCE, pause: float = 0.01
) -> Any:
    """Return what *condition* yields once that is true."""
    async with asyncio.timeout(timeout):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(pause)


def codes(results: Sequence[Any]) -> list[int]:
    """The status codes of a batch; each result must have a status of its own."""
    assert all(one.HasField("status") for one in results)
    return [one.status.code for one in results]
