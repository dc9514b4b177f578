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
from tests.support.stack import TRUST_DOMAIN, ServerProcess
from workload_api.agent.storage import AgentStorage
from workload_api.cache.cache import WorkloadCache
from workload_api.node.identity import NodeIdentity, read_trust_bundle


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


@dataclass(frozen=True)
class AgentConnection:
    """A channel with an attested agent's certificate, as the agent itself makes it."""

    channel: Any
    agent_id: str


@contextlib.asynccontextmanager
async def an_agent(server: ServerProcess, name: str = "bench") -> AsyncIterator[AgentConnection]:
    """Attest with a join token, and connect over mutual TLS."""
    trust_domain = TrustDomain(TRUST_DOMAIN)
    folder = server.folder / name
    bundle = server.folder / f"{name}.pem"
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
        await node.attest(dialer.channel, await server.join_token())
        dialer.cut()
        assert node.svid is not None
        yield AgentConnection(dialer.channel, node.svid.spiffe_id.uri)
