"""
A unary call through the front door against plain grpcio: on a Unix socket, and over TLS.

Servers run in processes of their own; the client is this process.  Our TLS road is the
agent's: `Dialer` on one side, front door on the other, against grpcio's own TLS with client
certificates.  Calls of 200 bytes, one after the other (c=1) and eight at once (c=8).
"""

import asyncio
import contextlib
import statistics
import time
from typing import Any

import uvloop

from bench._echo import KINDS, METHOD, EchoServer, echo_server, write_identities
from bench._harness import Result
from bench._processes import cpu_seconds
from tests.support.stack import a_folder

PAYLOAD = b"p" * 200
ROUNDS = 7
SECONDS = 0.5
"""Of calls in each round, for each kind of server and each number of callers."""


async def _calls(channel: Any, server: EchoServer, callers: int) -> tuple[float, float]:
    """Return calls a second, and CPU seconds of the server for each."""
    echo = channel.unary_unary(METHOD)
    done = 0
    cpu, started = cpu_seconds(server.pid), time.perf_counter()
    end = started + SECONDS

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await echo(PAYLOAD)
            done += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    took = time.perf_counter() - started
    return done / took, (cpu_seconds(server.pid) - cpu) / done


async def _measure() -> dict[tuple[str, int], tuple[float, float]]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(a_folder())
        write_identities(folder)
        channels = {}
        for kind in KINDS:
            server = stack.enter_context(echo_server(kind, folder))
            channel = await stack.enter_async_context(server.channel())
            await channel.unary_unary(METHOD)(PAYLOAD, timeout=10, wait_for_ready=True)
            channels[server] = channel
        for _ in range(ROUNDS):
            for callers in (1, 8):
                for server, channel in channels.items():
                    taken = await _calls(channel, server, callers)
                    found.setdefault((server.kind, callers), []).append(taken)
    return {
        key: (
            statistics.median(rate for rate, _ in taken),
            statistics.median(cpu for _, cpu in taken),
        )
        for key, taken in found.items()
    }


def main() -> list[Result]:
    """Compare the two pairs."""
    took = uvloop.run(_measure())
    results = []
    for plain, ours, name in (
        ("unix", "door-unix", "Unix socket"),
        ("tls", "door-tls", "mutual TLS"),
    ):
        for callers in (1, 8):
            rate, cpu = took[plain, callers]
            our_rate, our_cpu = took[ours, callers]
            results += [
                Result(
                    f"{name}, c={callers}: calls a second / plain grpcio",
                    our_rate / rate,
                    # The front door's claim for what it costs under concurrency (ADR 1).
                    at_least=0.73 if (plain, callers) == ("unix", 8) else None,
                    note=f"{our_rate:.0f} against {rate:.0f} a second",
                ),
                Result(
                    f"{name}, c={callers}: server CPU / plain grpcio",
                    our_cpu / cpu,
                    note=f"{our_cpu * 1e6:.0f} against {cpu * 1e6:.0f} us",
                ),
            ]
    return results
