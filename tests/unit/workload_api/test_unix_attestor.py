"""The ``unix`` attestor on real processes."""

import asyncio
import grp
import hashlib
import os
import pwd
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.children import SHELL, SLEEP, Child, a_child, a_program, open_files
from workload_api.attestors import executable, unix
from workload_api.attestors.executable import FileIdentity, digest_of, executable_of
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.unix import UnixAttestor


@pytest.fixture
def attestor() -> Iterator[UnixAttestor]:
    """One as the agent has it."""
    attestor = UnixAttestor()
    yield attestor
    attestor.close()


async def values(attestor: UnixAttestor, child: Child) -> set[str]:
    """What is learnt of *child*, without the type."""
    found = (await attestor.attest(child.peer())).selectors
    assert {one.type for one in found} == {"unix"}
    return {one.value for one in found}


async def test_everything_that_is_learnt(attestor: UnixAttestor) -> None:
    """All eight kinds of selector describe a real process, and nothing else is said of it."""
    with a_child() as child:
        found = await values(attestor, child)
    expected = {
        f"uid:{os.geteuid()}",
        f"gid:{os.getegid()}",
        f"path:{SLEEP}",
        f"sha256:{hashlib.sha256(SLEEP.read_bytes()).hexdigest()}",
    }
    users = {one.pw_uid: one.pw_name for one in pwd.getpwall()}
    groups = {one.gr_gid: one.gr_name for one in grp.getgrall()}
    if os.geteuid() in users:
        expected.add(f"user:{users[os.geteuid()]}")
    if os.getegid() in groups:
        expected.add(f"group:{groups[os.getegid()]}")
    for gid in os.getgroups():
        expected.add(f"supplementary_gid:{gid}")
        if gid in groups:
            expected.add(f"supplementary_group:{groups[gid]}")
    assert found == expected


async def test_hashing_can_be_turned_off() -> None:
    """Without `unix:sha256` the path is still there, and no file is read."""
    attestor = UnixAttestor(hash_executables=False, digest=lambda *_: pytest.fail("read"))
    with a_child() as child:
        found = await values(attestor, child)
    attestor.close()
    assert f"path:{SLEEP}" in found
    assert not any(one.startswith("sha256:") for one in found)


@pytest.mark.parametrize("changes", [{"uid": 4_000_000}, {"gid": 4_000_000}])
async def test_a_process_that_changed_its_user(
    attestor: UnixAttestor, changes: dict[str, int]
) -> None:
    """SEC-31: what `/proc` says must equal what the kernel said when it connected."""
    with a_child() as child:
        with pytest.raises(AttestationError, match="changed its user or group"):
            await attestor.attest(child.peer(**changes))


async def test_a_process_that_changes_its_user_meanwhile(
    attestor: UnixAttestor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-32: a program that changes its user as it starts lends its path to nobody."""
    status = unix.read_status(os.getpid())
    answers = [status, replace(status, uid=0 if status.uid else 1)]
    monkeypatch.setattr(unix, "read_status", lambda _: answers.pop(0))
    with a_child() as child:
        with pytest.raises(AttestationError, match="meanwhile"):
            await attestor.attest(child.peer())


async def test_a_process_that_ended(attestor: UnixAttestor) -> None:
    """SEC-31: of a process that is gone, or only not waited for yet, nothing is learnt."""
    with a_child() as child:
        peer = child.peer()
        child.process.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(AttestationError):
            await attestor.attest(peer)
        child.process.wait(10)
        with pytest.raises(AttestationError):
            await attestor.attest(peer)


async def test_sec_32_a_swap_under_the_hash(tmp_path: Path) -> None:
    """SEC-32: a process that becomes another program while its file is hashed is refused."""
    with a_child(SHELL, "-c", f"read line; exec {SLEEP} 60") as child:

        def swapped(pid: int, identity: FileIdentity) -> str:
            child.say("go")
            while child.runs() == str(SHELL):
                pass
            return digest_of(pid, identity)

        attestor = UnixAttestor(digest=swapped)
        with pytest.raises(AttestationError, match="changed its executable"):
            await attestor.attest(child.peer())
        attestor.close()


async def test_sec_32_a_file_that_is_not_the_one_it_was() -> None:
    """SEC-32: device, inode, size and times must be those that were seen, before and after."""
    with a_child() as child:
        seen = executable_of(child.pid).identity
        assert digest_of(child.pid, seen) == hashlib.sha256(SLEEP.read_bytes()).hexdigest()
        for changes in ("device", "inode", "modified_ns", "changed_ns", "size"):
            other = replace(seen, **{changes: getattr(seen, changes) + 1})
            with pytest.raises(AttestationError, match="changed its executable"):
                digest_of(child.pid, other)


async def test_sec_32_a_file_too_large_to_hash(attestor: UnixAttestor, tmp_path: Path) -> None:
    """SEC-32: an executable over 512 MiB is refused, unread; one of exactly that is not."""
    program = a_program(tmp_path)
    os.truncate(program, executable.MAX_EXECUTABLE_BYTES + 1)  # sparse: no block is written
    with a_child(program, "60") as child:
        with pytest.raises(AttestationError, match="too large"):
            await attestor.attest(child.peer())
        identity = executable_of(child.pid).identity
        at_the_limit = replace(identity, size=executable.MAX_EXECUTABLE_BYTES)
        with pytest.raises(AttestationError, match="changed its executable"):
            digest_of(child.pid, at_the_limit)  # judged by its identity, so it was opened


async def test_a_deleted_executable_has_no_path(attestor: UnixAttestor, tmp_path: Path) -> None:
    """SEC-32: what ran from a deleted file does not pass for a file called `… (deleted)`."""
    program = a_program(tmp_path, "app")
    with a_child(program, "60") as child:
        program.unlink()
        a_program(tmp_path, "app (deleted)")
        assert child.runs() == f"{program} (deleted)"
        found = await values(attestor, child)
    assert not any(one.startswith("path:") for one in found)
    assert f"sha256:{hashlib.sha256(SLEEP.read_bytes()).hexdigest()}" in found


async def test_a_replaced_executable_has_no_path(
    attestor: UnixAttestor, tmp_path: Path
) -> None:
    """SEC-32: after an upgrade the old program does not pass for the new one of its name."""
    program = a_program(tmp_path, "app")
    with a_child(program, "60") as child:
        os.replace(a_program(tmp_path, "new"), program)
        found = await values(attestor, child)
    assert not any(one.startswith("path:") for one in found)


async def test_a_file_that_is_called_deleted(attestor: UnixAttestor, tmp_path: Path) -> None:
    """A program whose file really is called `app (deleted)` keeps its path."""
    program = a_program(tmp_path, "app (deleted)")
    with a_child(program, "60") as child:
        assert f"path:{program}" in await values(attestor, child)


async def test_a_path_of_any_bytes(attestor: UnixAttestor, tmp_path: Path) -> None:
    """A path that is no UTF-8 is left out: no entry can name it, no answer could hold it."""
    program = a_program(tmp_path, b"caf\xe9")
    with a_child(program, "60") as child:
        found = await values(attestor, child)
    assert not any(one.startswith("path:") for one in found)
    assert any(one.startswith("sha256:") for one in found)


async def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    """Many processes of one program, at once and later, are hashed once; another file anew."""
    hashed = []

    def counted(pid: int, identity: FileIdentity) -> str:
        hashed.append(identity)
        return digest_of(pid, identity)

    attestor = UnixAttestor(digest=counted)
    program = a_program(tmp_path)
    with a_child(program, "60") as one, a_child(program, "60") as two:
        await asyncio.gather(*(attestor.attest(child.peer()) for child in (one, two) * 5))
        assert len(hashed) == 1
        other = shutil.copy(program, tmp_path / "other")
        with a_child(other, "60") as three:
            await attestor.attest(three.peer())
        assert len(hashed) == 2
    attestor.close()


async def test_a_long_hash_is_not_lost(tmp_path: Path) -> None:
    """A file that takes longer than the caller may wait is found hashed at his next try."""
    go = threading.Event()

    def slow(pid: int, identity: FileIdentity) -> str:
        assert go.wait(10)
        return digest_of(pid, identity)

    attestor = UnixAttestor(digest=slow)
    with a_child() as child:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await attestor.attest(child.peer())
        go.set()
        assert await values(attestor, child)
    attestor.close()


async def test_a_hash_that_fails_for_one_is_made_for_another(tmp_path: Path) -> None:
    """One whose process ends while it is hashed does not fail those of the same program."""
    program = a_program(tmp_path)
    with a_child(program, "60") as one, a_child(program, "60") as two:
        started, go = threading.Event(), threading.Event()

        def slow(pid: int, identity: FileIdentity) -> str:
            started.set()
            assert go.wait(10)
            return digest_of(pid, identity)

        attestor = UnixAttestor(digest=slow)
        first = asyncio.create_task(attestor.attest(one.peer()))
        assert await asyncio.to_thread(started.wait, 10)
        second = asyncio.create_task(values(attestor, two))
        await asyncio.sleep(0.05)
        one.end()
        go.set()
        with pytest.raises(AttestationError):
            await first
        assert f"path:{program}" in await second
        attestor.close()


async def test_sec_31_descriptors_stay_flat(attestor: UnixAttestor) -> None:
    """SEC-31: two thousand failed attestations leave no descriptor open."""
    with a_child() as child:
        await attestor.attest(child.peer())
        peer = child.peer(uid=4_000_000)
        gone = child.peer()
        before = open_files()
        for _ in range(1000):
            with pytest.raises(AttestationError):
                await attestor.attest(peer)
        child.end()
        for _ in range(1000):
            with pytest.raises(AttestationError):
                await attestor.attest(gone)
        assert open_files() == before
