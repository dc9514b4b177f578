"""What was acknowledged is in the files (SEC-101); tests/root traces the sync itself."""

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy import text

from issuer.store.engine import make_engine
from spiffe_core.jwtsvid import JwtSvid
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import spiffeid_pb2
from tests.support.forked import a_forked_server
from tests.support.node import a_node
from tests.support.records import Records, records
from tests.support.stack import ServerProcess, a_folder

PARENT = "/spire/agent/join_token/a"


async def frozen(server: ServerProcess, ask: Callable[[], Awaitable[Any]]) -> Records:
    """
    Ask, and look at a copy of the files as they are when the answer comes.

    The process is stopped before it can do anything more, and the copy is opened elsewhere:
    the main file and its log, not what the process remembers.
    """
    asked = asyncio.ensure_future(ask())
    asked.add_done_callback(lambda _: os.kill(server.process.pid, signal.SIGSTOP))
    await asked
    copy = server.folder / "copy"
    shutil.copytree(server.folder / "server", copy)
    os.kill(server.process.pid, signal.SIGCONT)
    (copy / "issuer.db-shm").unlink()
    try:
        return records(copy)
    finally:
        shutil.rmtree(copy)


async def test_sec_101_acknowledged_is_in_the_files() -> None:
    """SEC-101: a change of any kind is in the database's files before its answer is given."""
    with a_folder() as folder:
        server = a_forked_server(folder)
        try:
            await server.start()
            await every_kind(server)
        finally:
            server.process.close()


async def every_kind(server: ServerProcess) -> None:
    async def create() -> None:
        await server.add_entry("/w", PARENT, "unix:uid:1", id="e")

    async def delete() -> None:
        async with server.channel() as channel:
            await entry_pb2_grpc.EntryStub(channel).BatchDeleteEntry(
                entry_pb2.BatchDeleteEntryRequest(ids=["e"])
            )

    found = await frozen(server, create)
    assert found.entries["e"].spiffe_id.path == "/w"
    found = await frozen(server, delete)
    assert "e" not in found.entries and found.audited("entry.delete", "e") == 1

    async with a_node(server.folder / "n", server, await server.bundle_pem()) as node:
        token = await server.join_token()
        found = await frozen(server, lambda: node.attest(token))
        assert node.identity.svid is not None
        assert found.agents[node.agent_id].serial == node.identity.svid.serial

        await server.add_entry("/v", node.agent_id, "unix:uid:1", id="v")
        made: list[str] = []

        async def sign() -> None:
            made.append(await node.sign_jwt("v", "somebody"))

        found = await frozen(server, sign)
        assert JwtSvid.parse_unverified(made[0]).claims["jti"] in found.issued

        async def ban() -> None:
            path = node.agent_id.removeprefix("spiffe://example.org")
            request = agent_pb2.BanAgentRequest(
                id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path)
            )
            async with server.channel() as channel:
                await agent_pb2_grpc.AgentStub(channel).BanAgent(request)

        found = await frozen(server, ban)
        assert found.agents[node.agent_id].banned
    found.check()


def test_sec_101_sec_62_the_writer_syncs_every_commit(tmp_path: Path) -> None:
    """SEC-101, SEC-62: the writer's connection is in WAL mode and syncs at each commit."""
    tmp_path.chmod(0o700)
    engine = make_engine(tmp_path / "issuer.db")
    try:
        with engine.connect() as connection:
            for pragma, wanted in (
                ("synchronous", 2),  # FULL
                ("journal_mode", "wal"),
                ("foreign_keys", 1),
                ("query_only", 0),
            ):
                assert connection.execute(text(f"PRAGMA {pragma}")).scalar() == wanted
    finally:
        engine.dispose()
