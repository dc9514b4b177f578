"""
From a change to the workloads it concerns, through a server, an agent and workloads that are
processes of their own.

The clock starts when the API has acknowledged an added entry (it is durable then), and stops
when a workload with an open FetchX509SVID stream holds its SVID.  In between lie a push to
the agent, a new key, a signature, the durable record of it, and a push to the workload.  As
a floor the same run takes what cannot be spared: one bare fsynced commit, one bare signature
and verification, and three bare gRPC round trips.
"""

import asyncio
import contextlib
import os
import sqlite3
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from bench._crypto import sign_and_verify
from bench._echo import METHOD, echo_server, write_identities
from bench._harness import Result
from bench._stream import streams
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from tests.support.stack import Stack, a_stack, entry_message

CHANGES = 200
FAN_OUT = 100
FAN_OUT_CHANGES = 15
ENDS = 15
PAUSE = 0.01
"""Seconds between two changes, so that each is measured alone."""
GOAL_MS = 100.0


class _Operator:
    """Adds and removes entries for this user's processes, over one kept connection."""

    def __init__(self, stack: Stack, channel: Any) -> None:
        self._stub = entry_pb2_grpc.EntryStub(channel)
        self._agent_id = stack.agent.agent_id

    async def add(self, path: str) -> tuple[str, float]:
        """Return the entry's id, and when its being added was acknowledged."""
        made = entry_message(path, self._agent_id, f"unix:uid:{os.getuid()}")
        answer = await self._stub.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=[made])
        )
        at = time.monotonic()
        assert answer.results[0].status.code == 0, answer.results[0].status
        return answer.results[0].entry.id, at

    async def remove(self, entry_id: str) -> float:
        """Return when its being removed was acknowledged."""
        await self._stub.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[entry_id]))
        return time.monotonic()


async def _changes(stack: Stack, operator: _Operator, count: int, times: int) -> dict[str, Any]:
    """Add and remove, with *count* streams open; milliseconds until the last one knew."""
    added, removed = [], []
    base, _ = await operator.add("/base")
    async with streams(str(stack.agent.workload_socket), count) as held:
        await held.until("/base")
        for number in range(times):
            path = f"/n/{number}"
            entry_id, acknowledged = await operator.add(path)
            added.append((await held.until(path) - acknowledged) * 1000)
            await asyncio.sleep(PAUSE)
            acknowledged = await operator.remove(entry_id)
            removed.append((await held.until(path, gone=True) - acknowledged) * 1000)
            await asyncio.sleep(PAUSE)
        await operator.remove(base)
        await held.ended()
    return {"added": added, "removed": removed}


async def _ends(stack: Stack, operator: _Operator) -> list[float]:
    """From the removal of a workload's only entry to the end of its stream."""
    took = []
    for number in range(ENDS):
        path = f"/e/{number}"
        entry_id, _ = await operator.add(path)
        async with streams(str(stack.agent.workload_socket)) as held:
            await held.until(path)
            acknowledged = await operator.remove(entry_id)
            took.append((await held.ended() - acknowledged) * 1000)
    return took


def _median_ms(run: Callable[[], object], times: int = 200) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


async def _floor(folder: Path) -> float:
    """One durable commit, one signature and verification, three round trips; in ms."""
    with contextlib.closing(sqlite3.connect(folder / "floor.db", isolation_level=None)) as db:
        for statement in ("journal_mode=WAL", "synchronous=FULL"):
            db.execute(f"PRAGMA {statement}")
        db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
        commit = _median_ms(lambda: db.execute("INSERT INTO t (b) VALUES (?)", (b"x" * 200,)))
    write_identities(folder)
    with echo_server("unix", folder) as server:
        async with server.channel() as channel:
            echo = channel.unary_unary(METHOD)
            taken = []
            for _ in range(200):
                started = time.perf_counter()
                await echo(b"x" * 400)
                taken.append((time.perf_counter() - started) * 1000)
    return commit + _median_ms(sign_and_verify()) + 3 * statistics.median(taken)


async def _measure() -> dict[str, Any]:
    async with a_stack() as stack:
        async with stack.server.channel() as channel:
            operator = _Operator(stack, channel)
            found = await _changes(stack, operator, 1, CHANGES)
            wide = await _changes(stack, operator, FAN_OUT, FAN_OUT_CHANGES)
            found["wide"] = wide["added"]
            found["ends"] = await _ends(stack, operator)
        found["floor"] = await _floor(stack.folder)
    return found


def main() -> list[Result]:
    """Report medians, worst cases, and the ratio to the floor."""
    found = uvloop.run(_measure())
    added, floor = found["added"], found["floor"]
    median, p99 = statistics.median(added), statistics.quantiles(added, n=100)[98]
    return [
        Result(
            "entry acknowledged to SVID on an open stream, p99",
            p99,
            at_most=GOAL_MS,
            unit="ms",
            note=f"median {median:.1f}, worst {max(added):.1f}, n={len(added)}",
        ),
        Result(
            "the median of it / commit + S+V + three bare round trips",
            median / floor,
            note=f"floor {floor:.2f} ms",
        ),
        Result(
            f"the same for the last of {FAN_OUT} open streams, median",
            statistics.median(found["wide"]),
            unit="ms",
            note=f"worst {max(found['wide']):.1f}, n={len(found['wide'])}",
        ),
        Result(
            "entry removed to SVID gone from an open stream, p99",
            statistics.quantiles(found["removed"], n=100)[98],
            at_most=GOAL_MS,
            unit="ms",
            note=f"median {statistics.median(found['removed']):.1f}",
        ),
        Result(
            "only entry removed to end of the stream, worst",
            max(found["ends"]),
            at_most=GOAL_MS,
            unit="ms",
            note=f"median {statistics.median(found['ends']):.1f}, n={len(found['ends'])}",
        ),
    ]
