"""What benches of processes share: the CPU time of one, and a client that is an agent."""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.support.stack import TRUST_DOMAIN, ServerCalls, a_folder, entry_message
from workload_api.cache.cache import WorkloadCache
from workload_api.keys import make_csr, make_key
from workload_api.node.identity import NodeIdentity, read_trust_bundle
from workload_api.node.join_token import JoinTokenProof
from workload_api.storage import AgentStorage


def cpu_seconds(pid: int) -> float:
    """CPU time of every thread of a process, user and system, to the nanosecond."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def memory(pid: int) -> dict[str, float]:
    """Resident memory of a process in MB: ``Rss`` all of it, ``Anonymous`` its own."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) / 1024
    return found


@dataclass
class ServerAt(ServerCalls):
    """A running server that somebody else started."""

    admin_socket: Path
    port: int = 0


async def add_entries(
    server: ServerCalls, parent: str, count: int, first: int = 0
) -> list[str]:
    """Add *count* entries below *parent* in one call, and return their ids."""
    made = [
        entry_message(f"/w/{n}", parent, f"unix:uid:{n}") for n in range(first, first + count)
    ]
    async with server.channel() as channel:
        answer = await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=made)
        )
    assert all(one.status.code == 0 for one in answer.results), answer.results[0].status
    return [one.entry.id for one in answer.results]


@dataclass(frozen=True)
class AgentConnection:
    """A channel with an attested agent's certificate, as the agent itself makes it."""

    channel: Any
    agent_id: str

    async def have_signed(self, params: list[Any]) -> int:
        """Have SVIDs signed in one call, and return how many."""
        answer = await svid_pb2_grpc.SVIDStub(self.channel).BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(params=params)
        )
        assert all(one.status.code == 0 for one in answer.results), answer.results[0].status
        return len(answer.results)


def requests_for(entry_ids: list[str]) -> list[Any]:
    """What `AgentConnection.have_signed` takes, with a fresh key for each entry."""
    return [
        svid_pb2.NewX509SVIDParams(entry_id=one, csr=make_csr(make_key())) for one in entry_ids
    ]


@contextlib.asynccontextmanager
async def an_agent(server: ServerCalls) -> AsyncIterator[AgentConnection]:
    """Attest with a join token, and connect over mutual TLS."""
    trust_domain = TrustDomain(TRUST_DOMAIN)
    with a_folder() as folder:
        bundle = folder / "bundle.pem"
        bundle.write_text(await server.bundle_pem())
        cache = WorkloadCache(trust_domain)
        cache.bundles[trust_domain] = read_trust_bundle(bundle, trust_domain)
        storage = AgentStorage(folder / "data", folder / "run")
        node = NodeIdentity(trust_domain, storage, cache, lambda: datetime.now(UTC))
        async with Dialer(
            "127.0.0.1",
            server.port,
            context=node.context,
            check=node.check_server,
            runtime_dir=folder / "run",
        ) as dialer:
            await node.attest(dialer.channel, JoinTokenProof(await server.join_token()))
            dialer.cut()
            assert node.svid is not None
            yield AgentConnection(dialer.channel, node.svid.spiffe_id.uri)
