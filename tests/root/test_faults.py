"""
Full and read-only disks, clocks that are stepped, and the order of system calls.

Source: F-11, F-14 to F-16; SEC-101, SEC-102, SEC-111.  A disk of a few megabytes is a tmpfs;
a clock is libfaketime's, with the monotonic one left real.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from tests.faults.pages import Pages, a_free_port
from tests.faults.workloads import FreshClient, ids, saved
from tests.support.forked import a_forked_server, forked
from tests.support.records import records
from tests.support.stack import AgentProcess, Process, ServerProcess, Stack, a_folder

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount disks and trace"),
    pytest.mark.timeout(120),
]
ME = f"unix:uid:{os.getuid()}"
PARENT = "/spire/agent/join_token/a"
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
STRACE = shutil.which("strace")
HOURS = 7200


def mount(*arguments: str) -> None:
    """Mount, or skip where a container may not."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextlib.contextmanager
def a_small_disk(place: Path, size: str = "8m") -> Iterator[Path]:
    """A disk of *size* at *place*."""
    place.mkdir(mode=0o700)
    mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def no_room(disk: Path) -> Iterator[None]:
    """Nothing more fits on *disk* while entered."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


async def refusal(server: ServerProcess, path: str) -> tuple[int, str]:
    """Code and text that a new entry is refused with; the code is 0 when it is not."""
    made = entry_pb2.BatchCreateEntryRequest()
    made.entries.add(hint=path)
    entry = made.entries[0]
    entry.spiffe_id.trust_domain = entry.parent_id.trust_domain = "example.org"
    entry.spiffe_id.path, entry.parent_id.path = path, PARENT
    entry.selectors.add(type="unix", value=f"user:{path}")
    async with server.channel() as channel:
        answer = await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(made)
    status = answer.results[0].status
    return status.code, status.message


@contextlib.asynccontextmanager
async def both(
    folder: Path, server_changes: dict[str, Any], **agent_changes: Any
) -> AsyncIterator[Stack]:
    """A server and an agent that serves ``/w``."""
    server = a_forked_server(folder, **server_changes)
    agent = forked(AgentProcess(folder, server, agent_changes))
    try:
        await server.start()
        await agent.join()
        await server.add_entry("/w", agent.agent_id, ME)
        await agent.until_svids(1)
        await saved(agent, 1)
        yield Stack(folder, server, agent)
    finally:
        agent.process.close()
        server.process.close()


async def test_sec_102_a_servers_full_disk() -> None:
    """
    SEC-102, F-14: on a full disk every change is refused with UNAVAILABLE and the reason;
    what was there is read and served, health says so, and with room again all goes on in the
    same process.
    """
    with a_folder() as folder, a_small_disk(folder / "server") as disk:
        pages = Pages(a_free_port())
        async with both(folder, {"status": {"port": pages.port}}) as stack:
            server, agent, pid = stack.server, stack.agent, stack.server.process.pid
            with no_room(disk):
                code, text = await refusal(server, "/x")
                assert code == grpc.StatusCode.UNAVAILABLE.value[0] and "disk is full" in text
                facts = await pages.until(lambda status, _: status == 503)
                assert "disk is full" in facts["problems"][0] and await pages.is_live()
                async with server.channel() as channel:
                    found = await entry_pb2_grpc.EntryStub(channel).ListEntries(
                        entry_pb2.ListEntriesRequest()
                    )
                assert [one.spiffe_id.path for one in found.entries] == ["/w"]
                # SEC-24: what cannot be put on record is not handed out.
                async with FreshClient(agent.endpoint) as client:
                    assert ids(await client.fetch_x509()) == {"/w"}
                    with pytest.raises(SpiffeError) as refused:
                        await client.fetch_jwt(("somebody",))
                    assert refused.value.kind is ErrorKind.NOT_READY
                assert await asyncio.to_thread(agent.process.stop) == 0
                await agent.start()
                records(disk).check()
            await pages.until(lambda status, _: status == 200)
            assert (await refusal(server, "/x"))[0] == 0
            async with FreshClient(agent.endpoint) as client:
                assert await client.fetch_jwt(("somebody",))
            assert server.process.pid == pid and server.process.ended() is None
            records(disk).check()


async def test_sec_102_a_start_on_a_full_disk() -> None:
    """SEC-102: a server that cannot begin for want of room says so; with room it begins."""
    with a_folder() as folder, a_small_disk(folder / "server") as disk:
        server = a_forked_server(folder)
        with no_room(disk):
            await refused_to_start(server, "full")
        await server.start()
        await server.add_entry("/w", PARENT, "unix:uid:1")
        server.process.kill()
        with no_room(disk):
            await refused_to_start(server, "full")
        await server.start()
        records(disk).check()
        assert len(records(disk).entries) == 1
        server.process.close()


async def refused_to_start(server: ServerProcess, why: str) -> None:
    server.process.log.unlink(missing_ok=True)
    server.process.start()
    assert await server.process.wait() == 1
    text = server.process.log.read_text()
    assert why in text and "Traceback" not in text, text


async def test_sec_102_a_read_only_disk() -> None:
    """SEC-102: on a disk that is mounted read-only nothing is changed, and it is named."""
    with a_folder() as folder, a_small_disk(folder / "server") as disk:
        server = a_forked_server(folder)
        await server.start()
        await server.add_entry("/w", PARENT, "unix:uid:1")
        assert server.process.stop() == 0
        before = {one: one.read_bytes() for one in disk.rglob("*") if one.is_file()}
        mount("-o", "remount,ro", str(disk))
        await refused_to_start(server, "Read-only file system")
        mount("-o", "remount,rw", str(disk))
        assert {one: one.read_bytes() for one in disk.rglob("*") if one.is_file()} == before
        await server.start()
        assert len(records(disk).entries) == 1
        server.process.close()


async def test_sec_102_an_agents_full_disk() -> None:
    """
    SEC-102, SEC-54, SEC-106: an agent that can write nothing serves changes all the same,
    keeps its old SVID in place of one that it could not keep, and catches up with room again.
    """
    with a_folder() as folder, a_small_disk(folder / "agent", "1m") as disk:
        async with both(folder, {"svids": {"agent_ttl": "16s"}}) as stack:
            server, agent, data = stack.server, stack.agent, folder / "server"
            before = records(data).agents[agent.agent_id].serial
            with no_room(disk):
                await server.add_entry("/v", agent.agent_id, ME)
                await agent.until_svids(2)
                async with FreshClient(agent.endpoint) as client:
                    assert ids(await client.fetch_x509()) == {"/v", "/w"}

                async def renewal_failed() -> bool:
                    return "No space left" in (await agent.status()).problem

                await agent.process.until(renewal_failed)
                assert records(data).agents[agent.agent_id].serial == before
                assert (await agent.status()).ready

            async def renewed() -> bool:
                return records(data).agents[agent.agent_id].serial != before

            await agent.process.until(renewed)
            await saved(agent, 2)
            assert records(data).audited("agent.attest", agent.agent_id) == 1


@contextlib.contextmanager
def a_clock(folder: Path, process: Process) -> Iterator[Path]:
    """The file that says by how much the clock of *process*, not started yet, is ahead."""
    if FAKETIME is None:
        pytest.skip("there is no libfaketime: apt-get install faketime")
    step = folder / "step"
    step.write_text("+0")
    process._environment.update(
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(step),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
    )
    yield step


@pytest.mark.parametrize("offset", [HOURS, -HOURS])
async def test_sec_111_a_servers_clock_is_stepped(offset: int) -> None:
    """
    SEC-111, F-11: under a running server whose clock is stepped by two hours nothing is
    thrown away: agents serve what they have, and are in step again when it is stepped back.
    """
    with a_folder() as folder:
        server, agent = (
            ServerProcess(folder),
            forked(AgentProcess(folder, ServerProcess(folder))),
        )
        agent.server = server
        with a_clock(folder, server.process) as step:
            try:
                await server.start()
                await agent.join()
                await server.add_entry("/w", agent.agent_id, ME)
                await agent.until_svids(1)
                async with FreshClient(agent.endpoint) as client:
                    before = await client.fetch_x509()
                    step.write_text(f"{offset:+d}")

                    async def says_so() -> bool:
                        status = await agent.status()
                        return bool(status.problem) and not status.connected

                    await agent.process.until(says_so)
                    await asyncio.sleep(2)
                    assert (await client.fetch_x509()).identities == before.identities
                    step.write_text("+0")
                    await server.add_entry("/v", agent.agent_id, ME)
                    await agent.until_svids(2)
                    assert ids(await client.fetch_x509()) == {"/v", "/w"}
                found = records(folder / "server")
                found.check()
                assert found.audited("agent.attest", agent.agent_id) == 1
            finally:
                agent.process.close()
                server.process.close()


async def test_sec_111_an_agents_clock_is_stepped() -> None:
    """
    SEC-111: an agent whose clock runs ahead hands nothing out that has ended by it, does not
    storm its server for renewals, and serves again when the clock is right.
    """
    with a_folder() as folder:
        server = a_forked_server(folder)
        agent = AgentProcess(folder, server)
        with a_clock(folder, agent.process) as step:
            try:
                await server.start()
                await agent.join()
                await server.add_entry("/w", agent.agent_id, ME)
                await agent.until_svids(1)
                step.write_text(f"+{HOURS}")
                async with FreshClient(agent.endpoint) as client:
                    with pytest.raises(SpiffeError) as refused:
                        await client.fetch_x509()
                    assert refused.value.kind is ErrorKind.NOT_READY
                await asyncio.sleep(3)
                step.write_text("+0")
                async with FreshClient(agent.endpoint) as client:
                    (one,) = (await client.fetch_x509()).identities
                assert one.svid.validity.covers(datetime.now(UTC))
                found = records(folder / "server")
                assert found.audited("agent.attest", agent.agent_id) == 1
                assert found.audited("agent.renew", agent.agent_id) < 8
            finally:
                agent.process.close()
                server.process.close()


@pytest.mark.skipif(STRACE is None, reason="there is no strace: apt-get install strace")
async def test_sec_101_synced_before_it_is_said() -> None:
    """SEC-101: between a change's write to the log and its answer lies a sync of the log."""
    with a_folder() as folder:
        server = ServerProcess(folder)
        trace = folder / "trace"
        try:
            await server.start()
            tracer = subprocess.Popen(
                [STRACE, "-f", "-y", "-s", "4096", "-e",
                 "trace=pwrite64,fsync,fdatasync,sendmsg,sendto,write", "-o", str(trace),
                 "-p", str(server.process.pid)],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while not trace.exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            await server.add_entry("/w", PARENT, "unix:uid:1", id="the-entry-we-follow")
            await asyncio.sleep(0.5)
            tracer.send_signal(signal.SIGINT)
            tracer.wait(10)
        finally:
            server.process.close()
        calls = calls_of(trace.read_text(errors="replace"))
    written = [
        n
        for n, (name, file, data) in enumerate(calls)
        if name == "pwrite64" and "issuer.db-wal" in file and "the-entry-we" in data
    ]
    said = [n for n, (name, file, data) in enumerate(calls)
            if name in ("sendmsg", "sendto", "write") and "the-entry-we" in data
            and "issuer.db" not in file]  # fmt: skip
    synced = [
        n
        for n, (name, file, _) in enumerate(calls)
        if name in ("fsync", "fdatasync") and "issuer.db-wal" in file
    ]
    assert written and said, calls
    assert any(max(written) < sync < min(n for n in said if n > max(written))
               for sync in synced), (written, synced, said)  # fmt: skip


@pytest.mark.skipif(STRACE is None, reason="there is no strace: apt-get install strace")
async def test_sec_101_a_sync_that_fails() -> None:
    """
    SEC-101, F-16: after a sync that failed nobody knows what is on the disk: nothing is
    acknowledged, the process ends, and the next one goes on from what there is.
    """
    with a_folder() as folder:
        server = ServerProcess(folder)
        try:
            await server.start()
            await server.add_entry("/before", PARENT, "unix:uid:1")
            tracer = subprocess.Popen(
                [STRACE, "-f", "-e", "trace=fsync,fdatasync",
                 "-e", "inject=fsync,fdatasync:error=EIO", "-o", str(folder / "trace"),
                 "-p", str(server.process.pid)],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while not (folder / "trace").exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            with contextlib.suppress(grpc.aio.AioRpcError):  # the process may be faster
                code, text = await refusal(server, "/x")
                assert code == grpc.StatusCode.INTERNAL.value[0] and "start again" in text
            assert await server.process.wait() == 1
            tracer.wait(10)
            await server.start()
            found = records(folder / "server")
            found.check()
            assert "/before" in {one.spiffe_id.path for one in found.entries.values()}
        finally:
            server.process.close()


def calls_of(trace: str) -> list[tuple[str, str, str]]:
    """System calls in the order of their ends: name, file, everything."""
    started: dict[str, str] = {}
    found = []
    for line in trace.splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            started[pid] = rest
            continue
        if rest.startswith("<..."):
            rest = started.pop(pid, "") + rest
        match = re.match(r"(\w+)\(\d+<([^>]*)>", rest)
        if match:
            found.append((match[1], match[2], rest))
    return found
