"""
Target 18: what a node pays for its agent.

A real agent with 100 entries, each with its SVID signed ahead, and 50 streams that workloads
in processes of their own hold open.  Its import log shows what it loaded.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import uvloop

from bench._harness import Result
from bench._processes import add_entries, memory
from bench._stream import streams
from tests.support.stack import AgentProcess, Process, a_folder, a_server

ENTRIES = 100
STREAMS = 50
UNWELCOME = {"sqlalchemy", "aiohttp", "alembic", "issuer", "ca"}
"""Top-level packages that have no business on a node."""


def imported(log: Path) -> set[str]:
    """The top-level packages in a log that ``-X importtime`` wrote."""
    lines = log.read_text(errors="replace").splitlines()
    names = [one.rpartition("|")[2].strip() for one in lines if one.startswith("import time:")]
    return {one.partition(".")[0] for one in names}


async def _measure() -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(a_server())
        folder = stack.enter_context(a_folder())
        agent = AgentProcess(folder, server)
        agent.process = Process(
            [sys.executable, "-m", "workload_api.agent", "run", "-c", str(agent.config)],
            folder / "agent.log",
            {"PYTHONPROFILEIMPORTTIME": "1"},
        )
        stack.callback(agent.process.close)
        await agent.join()
        idle = memory(agent.process.pid)
        # One of them for this user, whose processes hold the streams.
        await server.add_entry("/mine", agent.agent_id, f"unix:uid:{os.getuid()}")
        await add_entries(server, agent.agent_id, ENTRIES - 1, 100_000)
        await agent.until_svids(ENTRIES)
        for _ in range(2):
            held = await stack.enter_async_context(
                streams(str(agent.workload_socket), STREAMS // 2)
            )
            await held.until("/mine")
        await asyncio.sleep(1.5)  # the cache goes to disk half a second after a change
        status = await agent.status()
        assert (status.x509_svids, status.streams) == (ENTRIES, STREAMS), status
        return {
            "idle": idle,
            "loaded": memory(agent.process.pid),
            "imported": imported(agent.process.log),
        }


def main() -> list[Result]:
    """Report resident and anonymous memory, and what was imported that should not be."""
    found = uvloop.run(_measure())
    idle, loaded = found["idle"], found["loaded"]
    unwelcome = sorted(UNWELCOME & found["imported"])
    what = f"{ENTRIES} entries and {STREAMS} streams"
    return [
        Result(
            f"agent with {what}, resident",
            loaded["Rss"],
            at_most=60,
            unit="MB",
            note=f"{idle['Rss']:.1f} with none of them; proportional {loaded['Pss']:.1f}",
        ),
        Result(
            f"agent with {what}, anonymous",
            loaded["Anonymous"],
            at_most=30,
            unit="MB",
            note=f"{idle['Anonymous']:.1f} with none of them",
        ),
        Result(
            "packages of the server's in the agent",
            len(unwelcome),
            at_most=0,
            unit="",
            note=", ".join(unwelcome) or f"{len(found['imported'])} packages in all",
        ),
    ]
