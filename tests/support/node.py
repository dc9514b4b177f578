"""An agent's conversation with a server, call by call: real TLS, a real identity, no loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc

from spiffe_core.errors import NotReadyError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.support.stack import TRUST_DOMAIN, ServerProcess
from workload_api.cache.cache import WorkloadCache
from workload_api.keys import make_csr, make_key
from workload_api.node.identity import NodeIdentity, read_trust_bundle
from workload_api.node.join_token import JoinTokenProof
from workload_api.storage import AgentStorage

_T = TypeVar("_T")


@dataclass
class Node:
    """An agent without its loop; it keeps its identity in a folder."""

    identity: NodeIdentity
    dialer: Dialer

    @property
    def agent_id(self) -> str:
        """Its SPIFFE ID."""
        assert self.identity.svid is not None
        return self.identity.svid.spiffe_id.uri

    async def attest(self, token: str) -> None:
        """Attest; asked again after a failure it uses the same key."""
        await self.identity.attest(self.dialer.channel, JoinTokenProof(token))
        self.dialer.cut()

    async def renew(self) -> None:
        """Get the next SVID, and use it from here on."""
        await self.identity.renew(self.dialer.channel)
        self.dialer.cut()

    async def sign(self, *entry_ids: str) -> list[Any]:
        """Ask for one X509-SVID for each of *entry_ids*; return the results."""
        request = svid_pb2.BatchNewX509SVIDRequest(
            params=[
                svid_pb2.NewX509SVIDParams(entry_id=one, csr=make_csr(make_key()))
                for one in entry_ids
            ]
        )
        answer = await svid_pb2_grpc.SVIDStub(self.dialer.channel).BatchNewX509SVID(
            request, timeout=10
        )
        return list(answer.results)

    async def sign_jwt(self, entry_id: str, audience: str) -> str:
        """Ask for a JWT-SVID; return it."""
        answer = await svid_pb2_grpc.SVIDStub(self.dialer.channel).NewJWTSVID(
            svid_pb2.NewJWTSVIDRequest(entry_id=entry_id, audience=[audience]), timeout=10
        )
        return str(answer.svid.token)


async def at_last(ask: Callable[[], Awaitable[_T]], seconds: float = 20) -> _T:
    """What *ask* answers, asked again while the server is away."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await ask()
            except NotReadyError:
                pass
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def a_node(folder: Path, server: ServerProcess, bundle_pem: str) -> AsyncIterator[Node]:
    """
    A node in *folder* that knows *server* by *bundle_pem*; it is who it was there before.

    Entered anew it dials at once: it waits out no back-off.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    trusted = folder / "bundle.pem"
    trusted.write_text(bundle_pem)
    trust_domain = TrustDomain(TRUST_DOMAIN)
    cache = WorkloadCache(trust_domain)
    cache.bundles[trust_domain] = read_trust_bundle(trusted, trust_domain)
    storage = AgentStorage(folder / "data", folder / "run")
    identity = NodeIdentity(trust_domain, storage, cache, lambda: datetime.now(UTC))
    await identity.load()
    async with Dialer(
        "127.0.0.1",
        server.port,
        context=identity.context,
        check=identity.check_server,
        runtime_dir=folder / "run" / "inner",
    ) as dialer:
        yield Node(identity, dialer)
