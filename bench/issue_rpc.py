"""
Targets 3 and 4: what an X509-SVID costs the server when an agent asks over the wire.

A real server process (front door, mutual TLS, access table, durable record of each SVID) and
the certificate of an agent that attested.  Figures are CPU time of the whole server process,
so the wait for the disk does not count, and neither does the client.
"""

import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from bench._crypto import sign_and_verify
from bench._echo import METHOD, echo_server, write_identities
from bench._harness import Result, alternate
from bench._processes import add_entries, an_agent, cpu_seconds, requests_for
from tests.support.stack import a_folder, a_server

BATCH = 50
ROUNDS = 9
SINGLES = 80
BATCHES = 12
"""Calls in each round."""


async def _cost(
    pid: int, call: Callable[[], Awaitable[int]], calls: int
) -> tuple[float, float]:
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
        params = requests_for(await add_entries(server, agent.agent_id, BATCH))
        csr = params[0].csr

        def single() -> Awaitable[int]:
            return agent.have_signed(params[:1])

        def batch() -> Awaitable[int]:
            return agent.have_signed(params)

        async def echo() -> int:
            await echo_channel.unary_unary(METHOD)(csr)
            return 1

        for call in (echo, single, batch):  # warm
            await call()
        pid = server.process.pid
        floor = sign_and_verify()
        for _ in range(ROUNDS):
            bare = alternate({"S+V": floor}, rounds=3, repeat=100, clock=time.thread_time)
            taken.setdefault("S+V", []).append((bare["S+V"], 0.0))
            for name, one in (
                ("echo", _cost(echo_process.pid, echo, 4 * SINGLES)),
                ("single", _cost(pid, single, SINGLES)),
                ("batch", _cost(pid, batch, BATCHES)),
            ):
                taken.setdefault(name, []).append(await one)
        limited = await stack.enter_async_context(
            a_server(rate_limits={"attestation": False, "signing": True})
        )
        other = await stack.enter_async_context(an_agent(limited))
        params = requests_for(await add_entries(limited, other.agent_id, BATCH))
        taken["limited"] = [
            await _cost(limited.process.pid, lambda: other.have_signed(params), 40)
        ]
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
