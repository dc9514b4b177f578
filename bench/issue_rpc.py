"""
Targets 3 and 4: what an X509-SVID costs the server when an agent asks over the wire.

A real server process (front door, mutual TLS, access table, durable record of each SVID) and
the certificate of an agent that attested.  Figures are CPU time of the whole server process,
so the wait for the disk does not count, and neither does the client.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from bench._crypto import sign_and_verify
from bench._echo import METHOD, echo_server, write_identities
from bench._harness import Result, alternate
from bench._processes import AgentConnection, an_agent, cpu_seconds
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.support.stack import ServerProcess, a_folder, a_server, entry_message
from workload_api.node.keys import make_csr, make_key

BATCH = 50
ROUNDS = 9
SINGLES = 80
BATCHES = 12
"""Calls in each round."""


async def add_entries(server: ServerProcess, parent: str, count: int) -> list[str]:
    """Add *count* entries below *parent*, and return their ids."""
    made = [entry_message(f"/w/{n}", parent, f"unix:uid:{n}") for n in range(count)]
    async with server.channel() as channel:
        answer = await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=made)
        )
    assert all(one.status.code == 0 for one in answer.results)
    return [one.entry.id for one in answer.results]


class _Asker:
    """Asks for SVIDs as an agent does, with fresh keys made beforehand."""

    def __init__(self, agent: AgentConnection, entry_ids: list[str]) -> None:
        self._stub = svid_pb2_grpc.SVIDStub(agent.channel)
        self._params = [
            svid_pb2.NewX509SVIDParams(entry_id=one, csr=make_csr(make_key()))
            for one in entry_ids
        ]

    async def batch(self) -> int:
        """Ask for all of them in one call."""
        return await self._ask(self._params)

    async def single(self) -> int:
        """Ask for one."""
        return await self._ask(self._params[:1])

    async def _ask(self, params: list[Any]) -> int:
        answer = await self._stub.BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(params=params)
        )
        assert all(one.status.code == 0 for one in answer.results), answer.results[0].status
        return len(answer.results)


async def _cost(pid: int, call: Callable[[], Awaitable[int]], calls: int) -> tuple[float, float]:
    """Return CPU seconds of *pid* an item, and items a second."""
    before, started = cpu_seconds(pid), time.perf_counter()
    items = 0
    for _ in range(calls):
        items += await call()
    return (cpu_seconds(pid) - before) / items, items / (time.perf_counter() - started)


async def _measure() -> dict[str, tuple[float, float]]:
    taken: dict[str, list[tuple[float, float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(a_folder())
        write_identities(folder)
        echo_process = stack.enter_context(echo_server("tls", folder))
        echo_channel = await stack.enter_async_context(echo_process.channel())
        server = await stack.enter_async_context(a_server())
        agent = await stack.enter_async_context(an_agent(server))
        asker = _Asker(agent, await add_entries(server, agent.agent_id, BATCH))
        csr = make_csr(make_key())

        async def echo() -> int:
            await echo_channel.unary_unary(METHOD)(csr)
            return 1

        for call in (echo, asker.single, asker.batch):  # warm
            await call()
        pid = server.process.pid
        floor = sign_and_verify()
        for _ in range(ROUNDS):
            bare = alternate({"S+V": floor}, rounds=3, repeat=100, clock=time.thread_time)
            taken.setdefault("S+V", []).append((bare["S+V"], 0.0))
            for name, one in (
                ("echo", _cost(echo_process.pid, echo, 4 * SINGLES)),
                ("single", _cost(pid, asker.single, SINGLES)),
                ("batch", _cost(pid, asker.batch, BATCHES)),
            ):
                taken.setdefault(name, []).append(await one)
        limited = await stack.enter_async_context(
            a_server(rate_limits={"attestation": False, "signing": True})
        )
        agent = await stack.enter_async_context(an_agent(limited))
        asker = _Asker(agent, await add_entries(limited, agent.agent_id, BATCH))
        await asyncio.sleep(1)
        taken["limited"] = [await _cost(limited.process.pid, asker.batch, 40)]
    return {
        name: tuple(statistics.median(column) for column in zip(*rounds, strict=True))
        for name, rounds in taken.items()
    }


def main() -> list[Result]:
    """Compare single calls, batches and the floor."""
    took = uvloop.run(_measure())
    (floor, _), (echo, _), (single, _) = took["S+V"], took["echo"], took["single"]
    batch, rate = took["batch"]
    limited, limited_rate = took["limited"]
    return [
        Result(
            "server CPU per SVID, batch of 50 / S+V",
            batch / floor,
            at_most=2.2,
            note=f"{batch * 1e6:.0f} us, record on disk included; S+V {floor * 1e6:.0f} us; "
            f"{rate:.0f} a second from one agent, no rate limit",
        ),
        Result(
            "server CPU per SVID, batch of 50 / single",
            batch / single,
            at_most=0.4,
            note=f"single {single * 1e6:.0f} us, each with a transaction of its own",
        ),
        Result("single SVID / echo of grpcio alone, server CPU", single / echo),
        Result(
            "the same batch under the rate limit / S+V",
            limited / floor,
            note=f"{limited_rate:.0f} a second: 500 an agent, and a second's worth at once",
        ),
    ]
