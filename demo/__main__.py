"""
``make demo``: ``python -m demo [--json]``.

Runs a trust domain as `issuer dev` does, plays the story, and ends; exit code 0 when every
step came out as promised.  ``--json`` prints the facts as one JSON object on the last line.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from demo.casting import cast
from demo.player import PlayerError
from demo.screen import TextScreen
from demo.story import Added, Facts, tell
from issuer.cli import dev
from issuer.cli.calls import CommandError
from spiffe_core.errors import SpiffeError
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.convert.entry import id_to_wire, selectors_to_wire
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2

TRUST_DOMAIN = "example.org"
ROLES = ("shop", "payments", "stranger", "latecomer")


class RunningDomain:
    """`demo.story.Domain` over the admin sockets of server and agent."""

    def __init__(
        self, running: dev.DevDomain, server: grpc.aio.Channel, agent: grpc.aio.Channel,
        started_at: float,
    ) -> None:  # fmt: skip
        self.trust_domain = running.trust_domain.name
        self.endpoint = running.endpoint
        self.started_at = started_at
        self._running = running
        self._entries = entry_pb2_grpc.EntryStub(server)
        self._agent = agentadmin_pb2_grpc.AgentAdminStub(agent)

    async def add_entry(self, path: str, selectors: tuple[str, ...]) -> Added:
        """Add an entry, over the admin socket as any client would."""
        entry = types_pb2.Entry(
            spiffe_id=id_to_wire(self._id(path)),
            parent_id=id_to_wire(self._running.agent_id),
            selectors=selectors_to_wire(map(Selector.parse, selectors)),
        )
        answer = await self._entries.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=[entry])
        )
        acknowledged = time.monotonic()
        (result,) = answer.results
        if result.status.code:
            raise CommandError(f"the entry {path} was refused: {result.status.message}")
        return Added(result.entry.id, acknowledged)

    async def remove_entry(self, entry_id: str) -> None:
        """Remove an entry."""
        await self._entries.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[entry_id]))

    async def explain(self, pid: int) -> tuple[str, str]:
        """Return the machine word and the text of the agent's explanation."""
        request = agentadmin_pb2.ExplainProcessRequest(pid=pid)
        answer = await self._agent.ExplainProcess(request)
        return answer.reason, answer.text

    async def renew(self, path: str) -> float:
        """Force a renewal; return the monotonic instant at which it was asked for."""
        request = agentadmin_pb2.RenewSvidsRequest(spiffe_id=id_to_wire(self._id(path)))
        asked = time.monotonic()
        await self._agent.RenewSvids(request)
        return asked

    def _id(self, path: str) -> SpiffeId:
        return SpiffeId(self._running.trust_domain, path)


@contextlib.contextmanager
def stage() -> Iterator[Path]:
    """A fresh folder that other uids can enter, for what has to be copied."""
    with tempfile.TemporaryDirectory(prefix="issuer-demo-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


async def play(screen: TextScreen) -> Facts:
    """Run the domain and tell the story in it."""
    screen.title("spiffe-issuer: identity for two workloads that share no secret")
    with stage() as folder, dev.folders(None) as (files, sockets):
        players = await asyncio.to_thread(cast, ROLES, folder)
        started_at = time.monotonic()
        async with (
            dev.domain(TRUST_DOMAIN, files, sockets) as running,
            grpc.aio.insecure_channel(f"unix:{running.admin_socket}") as server,
            grpc.aio.insecure_channel(f"unix:{running.agent_admin_socket}") as agent,
        ):
            screen.line(
                f"server and agent of trust domain {TRUST_DOMAIN} run; SQLite in {files}"
            )
            domain = RunningDomain(running, server, agent, started_at)
            return await tell(domain, players, screen)


def main() -> int:
    """Play, and say how it ended."""
    arguments = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    arguments.add_argument("--json", action="store_true", help="the facts, on the last line")
    as_json = arguments.parse_args().json
    screen = TextScreen()
    began = time.monotonic()
    try:
        facts = asyncio.run(play(screen))  # uvloop cannot start children as other users
    except (PlayerError, CommandError, SpiffeError, OSError) as error:
        screen.bad(f"the demo could not go on: {error}")
        screen.bad("`.venv/bin/issuer doctor` looks for what is wrong on this machine")
        return 1
    screen.good(f"Done in {time.monotonic() - began:.0f} s; everything it started has ended.")
    screen.line("next: .venv/bin/issuer dev   and docs/tutorial/first-svid.md")
    if as_json:
        print(json.dumps(dataclasses.asdict(facts)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
