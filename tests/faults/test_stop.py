"""Stopping in good order, and starting again: SEC-108, F-08, F-41 on one machine."""

import asyncio
import contextlib
import os
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest

from spiffe_core.errors import ErrorKind, PreconditionError
from spiffe_wire.exclusive import held, without_leftovers
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2, watch_pb2_grpc
from tests.faults.load import Load
from tests.faults.workloads import FreshClient, Tally, ids, until_end
from tests.support.forked import a_forked_server, a_forked_stack
from tests.support.node import Node, a_node
from tests.support.records import records
from tests.support.stack import Process, Stack, a_folder

STREAMS = 100
DRAIN_SECONDS = 10.0
ME = f"unix:uid:{os.getuid()}"


async def stopped(process: Process) -> float:
    """Stop *process* in good order; return how long that took."""
    started = time.monotonic()
    assert await asyncio.to_thread(process.stop) == 0
    return time.monotonic() - started


async def watch(node: Node, held_: asyncio.Semaphore) -> str:
    """Hold a watch stream, say so, and return the status it ends with."""
    call = watch_pb2_grpc.AgentWatchStub(node.dialer.channel).Watch(watch_pb2.WatchRequest())
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            held_.release()
    return str((await call.code()).name)


async def test_sec_108_a_server_stops_with_many_streams_open() -> None:
    """SEC-108, F-08: SIGTERM ends every stream with UNAVAILABLE, never OK, well within 10 s."""
    with a_folder() as folder:
        server = a_forked_server(folder)
        try:
            await server.start()
            async with a_node(folder / "n", server, await server.bundle_pem()) as node:
                await node.attest(await server.join_token())
                open_ = asyncio.Semaphore(0)
                streams = [asyncio.create_task(watch(node, open_)) for _ in range(STREAMS)]
                for _ in range(STREAMS):
                    await open_.acquire()
                assert await stopped(server.process) < DRAIN_SECONDS
                ends = Counter(await asyncio.gather(*streams))
            assert ends == {"UNAVAILABLE": STREAMS}
            assert not any(one.is_socket() for one in (folder / "run").rglob("*"))
            assert not list((folder / "run" / "inner").iterdir())
            records(folder / "server").check()
        finally:
            server.process.close()


async def test_sec_108_an_agent_stops_with_many_streams_open() -> None:
    """SEC-108, IOP-10: workloads' streams end with UNAVAILABLE, and the sockets are gone."""
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        async with FreshClient(stack.agent.endpoint) as client:
            streams = [asyncio.create_task(until_end(client)) for _ in range(STREAMS)]
            while (await stack.agent.status()).streams < STREAMS:
                await asyncio.sleep(0.02)
            assert await stopped(stack.agent.process) < DRAIN_SECONDS
            ends = Counter([one.kind for one in await asyncio.gather(*streams)])
        assert ends == {ErrorKind.NOT_READY: STREAMS}
        for folder in ("a", "w"):
            assert not any(one.is_socket() for one in (stack.folder / folder).rglob("*"))
        # And it comes back as who it was.
        await stack.agent.start()
        async with FreshClient(stack.agent.endpoint) as client:
            assert ids(await client.fetch_x509()) == {"/w"}
        found = records(stack.folder / "server")
        assert found.audited("agent.attest", stack.agent.agent_id) == 1


async def test_sec_108_rolling_restarts_under_load() -> None:
    """
    SEC-108: through restart after restart, of the server and of the agent, a client that
    tries again sees no refusal but UNAVAILABLE, and nothing that it was told is lost.
    """
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        load = Load(stack.server, stack.folder, await stack.server.bundle_pem())
        tally = Tally()
        working = [asyncio.create_task(load.run())]
        working += [asyncio.create_task(one) for one in tally.clients(stack.agent.endpoint)]
        load.up.set()
        for number in range(5):
            await asyncio.sleep(0.3)
            assert await stopped(stack.server.process) < DRAIN_SECONDS
            load.up.clear()
            await stack.server.start()
            records(stack.folder / "server").check()
            load.up.set()
            if number % 2:
                assert await stopped(stack.agent.process) < DRAIN_SECONDS
                await stack.agent.start(connected=False)
        await asyncio.sleep(0.3)
        for one in working:
            assert not one.done() or one.result()
            one.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        assert load.done and tally.served and tally.unavailable
        load.check(records(stack.folder / "server"))


async def test_sec_100_one_process_a_folder() -> None:
    """SEC-100: a second server or agent on the files of a running one is refused, and why."""
    async with a_forked_stack() as stack:
        for first, setting in ((stack.server, "data_dir"), (stack.agent, "data_dir")):
            second = type(first.process)(first.process._command, stack.folder / "second.log")
            second.start()
            assert await second.wait() == 1
            assert f"set `{setting}` to another folder" in second.log.read_text()
            second.close()
            second.log.unlink()
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        assert await serves(stack)


async def serves(stack: Stack) -> bool:
    """True when the agent still serves the workload ``/w``."""
    async with FreshClient(stack.agent.endpoint) as client:
        return ids(await client.fetch_x509()) == {"/w"}


def test_sec_100_a_folder_is_free_once_its_holder_is_gone(tmp_path: Path) -> None:
    """SEC-100: the kernel itself gives a held folder back, and leftovers in it are removed."""
    with held(tmp_path / "one", "data_dir"):
        with pytest.raises(PreconditionError, match="in use by another process"):
            with held(tmp_path / "one", "data_dir"):
                pass
    with held(tmp_path / "one", "data_dir"):
        (tmp_path / "one" / "left").touch()
    assert not without_leftovers(tmp_path / "one").exists()
    (tmp_path / "file").touch()
    with pytest.raises(PreconditionError, match="set `data_dir` to a folder"):
        with held(tmp_path / "file" / "below", "data_dir"):
            pass
