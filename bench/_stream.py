"""
A workload in a process of its own, that holds streams open and says what comes, and when.

Usage: ``python -m bench._stream SOCKET COUNT``.  One JSON line a message: the monotonic
instant (the same clock for all processes of a machine), the number of the stream, and the
SPIFFE IDs in it, or the status when it ended.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import uvloop

from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.stack import ROOT

PER_CHANNEL = 25
PATIENCE = 20.0


def _say(number: int, what: object) -> None:
    print(json.dumps([time.monotonic(), number, what]), flush=True)


async def _hold(channel: grpc.aio.Channel, number: int) -> None:
    stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)
    call = stub.FetchX509SVID(workloadapi_pb2.X509SVIDRequest(), metadata=METADATA)
    try:
        async for message in call:
            _say(number, [one.spiffe_id for one in message.svids])
    except grpc.aio.AioRpcError as error:
        _say(number, error.code().name)


async def _run(socket: str, count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        held = []
        for start in range(0, count, PER_CHANNEL):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            held += [_hold(channel, n) for n in range(start, min(start + PER_CHANNEL, count))]
        await asyncio.gather(*held)


@dataclass
class Streams:
    """The lines of such a process, as they come."""

    process: asyncio.subprocess.Process
    holds: dict[int, object] = field(default_factory=dict)
    """What each stream was told last."""

    async def until(self, path: str, *, gone: bool = False) -> float:
        """Wait until every stream holds the SPIFFE ID that ends so; return the last instant."""
        return await self._until(
            lambda what: (
                isinstance(what, list) and any(one.endswith(path) for one in what) is not gone
            )
        )

    async def ended(self) -> float:
        """Wait until every stream has ended; return the last instant."""
        return await self._until(lambda what: isinstance(what, str))

    async def _until(self, good: "object") -> float:
        assert self.process.stdout is not None and callable(good)
        last = 0.0
        async with asyncio.timeout(PATIENCE):
            while not all(good(what) for what in self.holds.values()) or not last:
                line = await self.process.stdout.readline()
                assert line, "the workload ended before its time"
                last, number, what = json.loads(line)
                self.holds[number] = what
        return last


@contextlib.asynccontextmanager
async def streams(socket: str, count: int = 1) -> AsyncIterator[Streams]:
    """Run a workload with *count* streams; nothing has come on them yet."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench._stream",
        socket,
        str(count),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    try:
        yield Streams(process, dict.fromkeys(range(count)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1], int(sys.argv[2])))
