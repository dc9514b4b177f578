"""
Many open streams, held by processes of their own, that say when each round of messages came.

Usage: ``python -m bench._holders workload|sds|bare SOCKET COUNT``.  One JSON line a round: the
monotonic instant at which the last of COUNT streams had its next message, and which message.
Messages stay bytes, so that the holders cost the same for every kind.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import uvloop

from spiffe_wire.security_header import METADATA
from tests.support.stack import ROOT

PER_CHANNEL = 25
PROCESSES = 10
PATIENCE = 60.0
HOLD = "/bench.Echo/Hold"
"""Of `bench._echo`: sends what it was asked with, and what it is pushed."""


async def _requests() -> AsyncIterator[bytes]:
    """What Envoy would ask, once; then the stream stays open."""
    from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2

    yield discovery_pb2.DiscoveryRequest(
        type_url="type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        resource_names=["default"],
    ).SerializeToString()
    await asyncio.Event().wait()


def _call(channel: grpc.aio.Channel, kind: str) -> Any:
    if kind == "workload":
        method = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
        return method(b"", metadata=METADATA)
    if kind == "sds":
        name = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
        return channel.stream_stream(name)(_requests())
    return channel.unary_stream(HOLD)(b"m" * 1500)


async def _run(kind: str, socket: str, count: int) -> None:
    rounds: Counter[int] = Counter()

    async def hold(channel: grpc.aio.Channel) -> None:
        number = 0
        async for _ in _call(channel, kind):
            rounds[number] += 1
            if rounds[number] == count:
                print(json.dumps([time.monotonic(), number]), flush=True)
            number += 1

    async with contextlib.AsyncExitStack() as stack:
        held = []
        for start in range(0, count, PER_CHANNEL):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            held += [hold(channel) for _ in range(min(PER_CHANNEL, count - start))]
        await asyncio.gather(*held)


@dataclass
class Holders:
    """Those processes."""

    processes: list[asyncio.subprocess.Process]

    async def next_round(self) -> float:
        """Wait until every stream has had one more message; return the last instant."""
        async with asyncio.timeout(PATIENCE):
            said = await asyncio.gather(*(one.stdout.readline() for one in self.processes))  # type: ignore[union-attr]
        assert all(said), "a holder ended before its time"
        return float(max(json.loads(one)[0] for one in said))


@contextlib.asynccontextmanager
async def holders(kind: str, socket: str, count: int) -> AsyncIterator[Holders]:
    """Open *count* streams of *kind*; the first message has come on none of them yet."""
    processes = []
    try:
        for _ in range(PROCESSES):
            processes.append(
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "bench._holders",
                    kind,
                    socket,
                    str(count // PROCESSES),
                    cwd=ROOT,
                    stdout=asyncio.subprocess.PIPE,
                )
            )
        yield Holders(processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
