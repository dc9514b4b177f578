"""
An agent with 1,000 open streams, of the Workload API and of Envoy's SDS, against plain grpcio.

Ten processes hold a hundred streams each.  All SVIDs are renewed, which pushes to every stream
at once; for each the agent looks again who holds it (SEC-36).  Beside it, in the same run, a
server of grpcio alone pushes as many bytes to as many streams of the same processes' kind.
JWT-SVIDs are fetched eight at a time, against an echo of grpcio alone.
"""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvloop

from bench._echo import METHOD, echo_server, write_identities
from bench._harness import Result
from bench._holders import holders
from bench._processes import cpu_seconds, memory
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.stack import Stack, a_stack

STREAMS = 1000
PUSHES = 7
SETTLE = 1.0
"""Seconds for what is left to do after the last message; it counts as CPU, not as wall."""
CALLERS = 8
CALL_SECONDS = 2.0
CALL_ROUNDS = 3
PUSH = "/bench.Echo/Push"


@dataclass(frozen=True)
class Pushed:
    """Medians over the pushes to all streams."""

    wall: float
    cpu: float
    kib: float
    """Resident memory of the server for each open stream."""


async def _pushes(
    kind: str, socket: str, pid: int, push: Callable[[], Awaitable[object]]
) -> Pushed:
    before = memory(pid)["Rss"]
    walls, cpus = [], []
    async with holders(kind, socket, STREAMS) as held:
        await held.next_round()
        await asyncio.sleep(SETTLE)
        kib = (memory(pid)["Rss"] - before) * 1024 / STREAMS
        for _ in range(PUSHES):
            cpu, started = cpu_seconds(pid), time.monotonic()
            pushing = asyncio.ensure_future(push())
            walls.append(await held.next_round() - started)
            await pushing
            await asyncio.sleep(SETTLE)
            cpus.append(cpu_seconds(pid) - cpu)
    return Pushed(statistics.median(walls), statistics.median(cpus), kib)


async def _bare(stack: Stack) -> Pushed:
    with echo_server("unix", stack.folder) as server:
        async with server.channel() as channel:

            async def push() -> None:
                await channel.unary_unary(PUSH)(b"m" * 1500)

            return await _pushes("bare", f"{server.folder}/unix.sock", server.pid, push)


async def _rate(call: Callable[[], Awaitable[object]]) -> float:
    done = 0
    started = time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < started + CALL_SECONDS:
            await call()
            done += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.perf_counter() - started)


async def _jwt(stack: Stack) -> tuple[float, float]:
    """JWT-SVIDs a second, and echoes of grpcio alone of the same size."""
    request = workloadapi_pb2.JWTSVIDRequest(audience=["someone"])
    ours, bare = [], []
    with echo_server("unix", stack.folder) as server:
        async with server.channel() as plain, stack.agent.workload() as channel:
            stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)
            size = (await stub.FetchJWTSVID(request, metadata=METADATA)).ByteSize()
            echo = plain.unary_unary(METHOD)
            for _ in range(CALL_ROUNDS):
                ours.append(await _rate(lambda: stub.FetchJWTSVID(request, metadata=METADATA)))
                bare.append(await _rate(lambda: echo(b"x" * size)))
    return statistics.median(ours), statistics.median(bare)


@contextlib.asynccontextmanager
async def _an_agent() -> AsyncIterator[Stack]:
    """A server and an agent with an SVID for this user's processes."""
    async with a_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, f"unix:uid:{os.getuid()}")
        await stack.agent.until_svids(1)
        write_identities(stack.folder)
        yield stack


async def _measure() -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with _an_agent() as stack:
        found["jwt"] = await _jwt(stack)
        found["bare"] = await _bare(stack)
    for kind in ("workload", "sds"):
        # A fresh one for each: memory that was given back would not be seen to be taken.
        async with _an_agent() as stack:
            agent = stack.agent
            socket = agent.workload_socket if kind == "workload" else agent.sds_socket
            found[kind] = await _pushes(kind, str(socket), agent.process.pid, agent.renew)
    return found


def main() -> list[Result]:
    """Compare each kind of stream with the bare one."""
    found = uvloop.run(_measure())
    bare: Pushed = found["bare"]
    results = []
    for kind, name in (("workload", "Workload API"), ("sds", "SDS")):
        ours: Pushed = found[kind]
        what = f"push to {STREAMS} {name} streams"
        results += [
            Result(
                f"{what}: CPU / plain grpcio",
                ours.cpu / bare.cpu,
                note=f"{ours.cpu * 1e3:.0f} against {bare.cpu * 1e3:.0f} ms",
            ),
            Result(
                f"{what}: until the last has it / plain grpcio",
                ours.wall / bare.wall,
                note=f"{ours.wall * 1e3:.0f} against {bare.wall * 1e3:.0f} ms",
            ),
            Result(
                f"memory for each idle {name} stream / plain grpcio",
                ours.kib / bare.kib,
                note=f"{ours.kib:.0f} against {bare.kib:.0f} KiB",
            ),
        ]
    rate, echoes = found["jwt"]
    results.append(
        Result(
            f"JWT-SVIDs fetched a second, c={CALLERS} / echo of grpcio alone",
            rate / echoes,
            note=f"{rate:.0f} against {echoes:.0f}",
        )
    )
    return results
