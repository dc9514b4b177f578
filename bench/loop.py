"""
Target 6: how late the server's event loop runs while heavy work is done.

A server runs in this process, on uvloop as always, with a heartbeat beside it that asks to be
woken every millisecond; how much later it was woken is what every other call would have felt.
Those who cause the load over the wire are processes of their own, so that their work is not
taken for the server's.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import uvloop

from bench._harness import Result
from ca.keys.disk import DiskKeyManager
from ca.keys.protocol import KeyPurpose
from issuer.services.hub import Hub
from issuer.store.store import Repositories, Store
from spiffe_core.agent import agent_id
from spiffe_core.entry import RegistrationEntry
from spiffe_core.keys import KeyKind
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.stack import ROOT, TRUST_DOMAIN, a_folder, serving

BEAT = 0.001
"""Seconds between two beats."""
LIMIT_MS = 5.0
HYDRATED = 30_000
CREATED = 3_000
BATCHES = 60
TD = TrustDomain(TRUST_DOMAIN)


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Beat while entered; the list holds how late each beat was, in ms."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            due = time.perf_counter() + BEAT
            await asyncio.sleep(BEAT)
            late.append(max(time.perf_counter() - due, 0.0) * 1000)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _as_process(*arguments: str) -> None:
    """Run `bench._load` and wait for it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench._load", *arguments, cwd=ROOT, env=dict(os.environ)
    )
    assert await process.wait() == 0, f"bench._load {arguments[0]} failed"


async def _filled(path: Path, clock: object) -> Store:
    """A database of many entries, apart from the server's."""
    store = await Store.open(path, TD, clock)  # type: ignore[arg-type]
    parent = agent_id(TD, "join_token", "bench")
    for start in range(0, HYDRATED, 1000):

        def work(repos: Repositories, start: int = start) -> None:
            for n in range(start, start + 1000):
                selectors = frozenset(
                    Selector.parse(one) for one in (f"unix:uid:{n}", "unix:gid:5", "k8s:ns:a")
                )
                repos.entries.create(
                    RegistrationEntry(SpiffeId(TD, f"/w/{n}"), parent, selectors)
                )

        await store.write(work)
    return store


async def _measure() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    async def during(name: str, work: Callable[[], Awaitable[object]]) -> None:
        async with heartbeat() as late:
            await work()
        found[name] = late

    with a_folder() as folder:
        async with serving(folder) as server:
            keys = DiskKeyManager(folder / "keys")
            admin = str(server.settings.admin_socket_path)

            async def load_keys() -> None:
                for _ in range(30):
                    await keys.load("rsa", KeyPurpose.X509_CA)

            await during("idle", lambda: asyncio.sleep(1))
            await during(
                "RSA-4096 generated",
                lambda: keys.generate("rsa", KeyKind.RSA_4096, KeyPurpose.X509_CA),
            )
            await during("RSA-4096 loaded, 30 times", load_keys)
            await during(
                f"{CREATED} entries created over the API",
                lambda: _as_process("create", admin, str(CREATED)),
            )
            await during(
                f"{BATCHES} batches of 50 signed over the API",
                lambda: _as_process("sign", admin, str(server.port), str(BATCHES)),
            )
        store = await _filled(folder / "many" / "issuer.db", server.own.clock)
        try:
            hub = Hub(store, TD)
            await during(f"{HYDRATED} entries hydrated", hub.hydrate)
            assert len(hub.index) == HYDRATED
        finally:
            await store.close()
    return found


def main() -> list[Result]:
    """Report the 99th percentile of lateness for each kind of work."""
    results = []
    for name, late in uvloop.run(_measure()).items():
        p99 = statistics.quantiles(late, n=100)[98]
        results.append(
            Result(
                f"loop late while {name}, p99",
                p99,
                at_most=None if name == "idle" else LIMIT_MS,
                unit="ms",
                note=f"median {statistics.median(late):.2f}, worst {max(late):.1f}, "
                f"{len(late)} beats",
            )
        )
    return results
