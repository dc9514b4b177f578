"""
Load on a server from a process of its own.

Usage: ``python -m bench._load create ADMIN_SOCKET COUNT`` adds entries, and ``python -m
bench._load sign ADMIN_SOCKET PORT BATCHES`` attests as an agent and has SVIDs signed.
"""

import sys
from pathlib import Path

import uvloop

from bench._processes import ServerAt, add_entries, an_agent, requests_for

PARENT = "spiffe://example.org/spire/agent/join_token/nobody"
CHUNK = 500


async def _create(admin: Path, count: int) -> None:
    for start in range(0, count, CHUNK):
        await add_entries(ServerAt(admin), PARENT, CHUNK, start)


async def _sign(admin: Path, port: int, batches: int) -> None:
    server = ServerAt(admin, port)
    async with an_agent(server) as agent:
        params = requests_for(await add_entries(server, agent.agent_id, 50, 1_000_000))
        for _ in range(batches):
            await agent.have_signed(params)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["create", admin, count]:
            uvloop.run(_create(Path(admin), int(count)))
        case ["sign", admin, port, batches]:
            uvloop.run(_sign(Path(admin), int(port), int(batches)))
        case _:
            sys.exit(__doc__)
