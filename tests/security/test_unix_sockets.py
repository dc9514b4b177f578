"""
Where our sockets may lie, how they are made, and how their loss is noticed (SEC-37).

Layouts that need a second user run as root alone; `tests/root` has the callers.
"""

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spiffe_wire.frontdoor.door import WATCH_INTERVAL
from spiffe_wire.unixsocket import (
    MAX_PATH_BYTES,
    SocketFile,
    SocketPathError,
    bind_unix_socket,
    check_ancestors,
    check_socket_path,
)
from tests.support.door import ECHO, a_door, call, eventually, on_uvloop
from tests.support.stack import a_folder

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
FOREIGN = 12345


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of ours, 0700, below /tmp."""
    with a_folder() as folder:
        yield folder


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    """Run with another umask."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# The path itself.


def test_sec_37_the_longest_path(place: Path) -> None:
    """SEC-37: a path of 107 bytes is bound, one of 108 is refused before anything is made."""
    stem = place / "d"
    fits = stem / ("x" * (MAX_PATH_BYTES - len(str(stem)) - 1))
    assert len(str(fits)) == 107
    with bind_unix_socket(fits, 0o600), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(fits))
    with pytest.raises(SocketPathError, match="longer than 107 bytes"):
        bind_unix_socket(place / "new" / fits.with_name(fits.name + "xx").name, 0o600)
    assert not (place / "new").exists()


@pytest.mark.parametrize("byte", [chr(code) for code in (*range(1, 33), 127, 0x25, 0x3F, 0x23)])
def test_sec_37_no_path_that_a_uri_would_encode(byte: str) -> None:
    """SEC-37, WEP-13: a path with a control character, blank, %, ? or # is refused."""
    with pytest.raises(SocketPathError, match="plain ASCII"):
        check_socket_path(Path(f"/run/x{byte}y/s"))


@pytest.mark.parametrize("path", ["/run/ü/s", "/run/\udcff/s", "/run/\u2028/s"])
def test_sec_37_no_path_outside_ascii(path: str) -> None:
    """SEC-37: bytes above 127 are refused, valid UTF-8 or not."""
    with pytest.raises(SocketPathError, match="plain ASCII"):
        check_socket_path(Path(path))


@pytest.mark.parametrize("path", ["s", "run/s", "./s", "../s", "~/s", ""])
def test_sec_37_no_relative_path(path: str) -> None:
    """SEC-37: a relative path is refused: it would lie wherever we were started."""
    with pytest.raises(SocketPathError, match="absolute"):
        check_socket_path(Path(path))


# Hostile layouts.


def socket_at(path: Path) -> None:
    """A socket file that nobody serves any more."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))


def folder_of_mode(mode: int, below: str = "") -> Callable[[Path], Path]:
    """A folder of *mode*; the socket lies in it, or *below* it."""

    def make(place: Path) -> Path:
        folder = place / "f"
        (folder / below).mkdir(parents=True, mode=0o755)
        folder.chmod(mode)
        return folder / below / "s"

    return make


def linked_folder(place: Path) -> Path:
    """The folder is a symbolic link."""
    (place / "real").mkdir(mode=0o700)
    (place / "link").symlink_to(place / "real")
    return place / "link" / "s"


def linked_ancestor(place: Path) -> Path:
    """A folder further up is a symbolic link."""
    (place / "real" / "deep").mkdir(parents=True, mode=0o700)
    (place / "link").symlink_to(place / "real")
    return place / "link" / "deep" / "s"


def dangling_folder(place: Path) -> Path:
    """The folder is a link to nothing."""
    (place / "link").symlink_to(place / "nothing")
    return place / "link" / "s"


def linked_socket(place: Path) -> Path:
    """The path is a link to a socket."""
    socket_at(place / "real")
    (place / "s").symlink_to(place / "real")
    return place / "s"


def dangling_link(place: Path) -> Path:
    """The path is a link to nothing."""
    (place / "s").symlink_to(place / "nothing")
    return place / "s"


def a_file(place: Path) -> Path:
    """The path is a file with somebody's data."""
    (place / "s").write_text("precious")
    return place / "s"


def a_directory(place: Path) -> Path:
    """The path is a folder."""
    (place / "s").mkdir()
    return place / "s"


def a_fifo(place: Path) -> Path:
    """The path is a named pipe."""
    os.mkfifo(place / "s")
    return place / "s"


def a_file_above(place: Path) -> Path:
    """A folder on the way is a file."""
    (place / "f").write_text("x")
    return place / "f" / "s"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder writable by all": (folder_of_mode(0o777), "writable by others"),
    "folder writable by its group": (folder_of_mode(0o770), "writable by others"),
    "sticky folder": (folder_of_mode(0o1777), "writable by others"),
    "ancestor writable by all": (folder_of_mode(0o777, "a/b"), "writable by others"),
    "ancestor writable by its group": (folder_of_mode(0o775, "a"), "writable by others"),
    "sticky ancestor above a readable folder": (folder_of_mode(0o1777, "a"), "writable by"),
    "folder is a link": (linked_folder, "symbolic link"),
    "ancestor is a link": (linked_ancestor, "symbolic link"),
    "folder is a link to nothing": (dangling_folder, "symbolic link"),
    "ancestor is a file": (a_file_above, "cannot make"),
    "link to a socket": (linked_socket, "no socket"),
    "link to nothing": (dangling_link, "no socket"),
    "a file": (a_file, "no socket"),
    "a folder": (a_directory, "no socket"),
    "a named pipe": (a_fifo, "no socket"),
}


@pytest.mark.parametrize("layout", HOSTILE)
def test_sec_37_hostile_layouts(layout: str, place: Path) -> None:
    """SEC-37: each layout is refused with its reason, and what was there is there still."""
    make, why = HOSTILE[layout]
    path = make(place)
    before = everything_below(place)
    with pytest.raises(SocketPathError, match=why):
        bind_unix_socket(path, 0o600)
    assert everything_below(place) == before


@NEEDS_ROOT
@pytest.mark.parametrize("which", ["folder", "ancestor", "socket"])
def test_sec_37_what_belongs_to_another(which: str, place: Path) -> None:
    """SEC-37: a folder, an ancestor or a socket of another user is refused."""
    (place / "a" / "b").mkdir(parents=True, mode=0o755)
    path = place / "a" / "b" / "s"
    socket_at(path)
    os.chown(
        {"folder": path.parent, "ancestor": place / "a", "socket": path}[which], FOREIGN, 0
    )
    with pytest.raises(SocketPathError, match=f"uid {FOREIGN}"):
        bind_unix_socket(path, 0o600)
    assert path.is_socket()


def everything_below(place: Path) -> list[tuple[str, int]]:
    """Names and kinds of files."""
    return sorted((str(one), one.lstat().st_mode) for one in place.rglob("*"))


def test_sec_37_sticky_tmp_above_a_private_folder(place: Path) -> None:
    """SEC-37: /tmp is accepted above a folder of mode 0700 of ours, and only there."""
    assert stat.S_IMODE(Path("/tmp").stat().st_mode) == 0o1777
    check_ancestors(place)
    (place / "inner").mkdir(mode=0o755)
    check_ancestors(place / "inner")
    with pytest.raises(SocketPathError, match="/tmp is writable by others"):
        check_ancestors(Path("/tmp"))
    place.chmod(0o755)
    with pytest.raises(SocketPathError, match="/tmp is writable by others"):
        check_ancestors(place)


# Making it.


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_sec_37_the_mode_is_exact(mask: int, mode: int, place: Path) -> None:
    """SEC-37: whatever the umask, the socket and the folders we make have their modes."""
    path = place / "a" / "b" / "s"
    with umask(mask), bind_unix_socket(path, mode):
        assert stat.S_IMODE(path.lstat().st_mode) == mode
        expected = 0o700 if mode == 0o600 else 0o755
        for folder in (path.parent, path.parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == expected
        assert sorted(path.parent.iterdir()) == [path]


def test_sec_37_a_watcher_sees_no_other_mode(place: Path) -> None:
    """SEC-37: with umask 000 nobody ever sees the path with another mode, or without a file."""
    path = place / "s"
    seen: set[int] = set()
    done = threading.Event()
    bind_unix_socket(path, 0o640).close()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.add(stat.S_IMODE(os.lstat(path).st_mode))
            except FileNotFoundError:
                seen.add(-1)

    watcher = threading.Thread(target=watch)
    with umask(0):
        watcher.start()
        try:
            for _ in range(200):
                bind_unix_socket(path, 0o640).close()
        finally:
            done.set()
            watcher.join()
    assert seen == {0o640}


def test_sec_37_a_stale_socket_is_replaced(place: Path) -> None:
    """SEC-37: a socket that a killed process left is replaced in one step."""
    path = place / "s"
    socket_at(path)
    old = path.lstat().st_ino
    with bind_unix_socket(path, 0o600), socket.socket(socket.AF_UNIX) as client:
        assert path.lstat().st_ino != old
        client.connect(str(path))


def test_sec_37_a_socket_in_use_is_refused(place: Path) -> None:
    """SEC-37: a socket that is served is not taken from its process, full backlog or not."""
    path = place / "s"
    with bind_unix_socket(path, 0o600), contextlib.ExitStack() as stack:
        with pytest.raises(SocketPathError, match="in use"):
            bind_unix_socket(path, 0o600)
        other = place / "full"
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(other))
        full.listen(0)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(other))
        with pytest.raises(SocketPathError, match="in use"):
            bind_unix_socket(other, 0o600)
    assert sorted(one.name for one in place.iterdir()) == ["full", "s"]


def test_sec_37_filesystem_sockets_only(place: Path) -> None:
    """SEC-37: no abstract name is bound on the way: they have no mode and no owner."""
    with open("/proc/net/unix") as file:
        before = {line.split()[-1] for line in file if line.split()[-1].startswith("@")}
    with bind_unix_socket(place / "s", 0o600), open("/proc/net/unix") as file:
        after = {line.split()[-1] for line in file if line.split()[-1].startswith("@")}
    ours = {name for name in after - before if str(place) in name}
    assert ours == set()


def test_sec_37_only_our_own_file_is_removed(place: Path) -> None:
    """SEC-37: at the end we remove the file we made, and never one that took its place."""
    path = place / "s"
    with bind_unix_socket(path, 0o600):
        file = SocketFile(path)
        assert file.is_ours()
        path.unlink()
        assert not file.is_ours()
        file.remove()
        path.write_text("somebody else's")
        assert not file.is_ours()
        file.remove()
        assert path.read_text() == "somebody else's"
        path.unlink()
    with bind_unix_socket(path, 0o600):
        SocketFile(path).remove()
        assert not path.exists()


def test_sec_37_a_folder_that_cannot_be_written(place: Path) -> None:
    """SEC-37: what the system refuses comes as an error of ours, and leaves nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SocketPathError, match="cannot make the socket"):
        bind_unix_socket(Path("/proc/nothing/s"), 0o600)
    with pytest.raises(SocketPathError, match="cannot make the socket"):
        bind_unix_socket(Path("/proc/s"), 0o600)
    assert len(os.listdir("/proc/self/fd")) == before


# Losing it.


@on_uvloop
async def test_sec_37_removal_and_replacement_are_noticed() -> None:
    """SEC-37: a removed or replaced socket serves again in 5 s, its old callers all along."""

    def replaced(path: Path) -> None:
        path.unlink()
        socket_at(path)

    def blocked(path: Path) -> None:
        path.unlink()
        path.write_text("in the way")

    async def lose(how: Callable[[Path], None]) -> None:
        async with a_door() as door, door.channel() as open_channel:
            await call(open_channel, ECHO)
            how(door.path)
            loop = asyncio.get_running_loop()
            lost_at = loop.time()
            if how is blocked:
                await asyncio.sleep(WATCH_INTERVAL.total_seconds() + 0.5)
                assert door.path.read_text() == "in the way"
                door.path.unlink()
                lost_at = loop.time()
            await eventually(door.path.is_socket)
            await eventually(lambda: stat.S_IMODE(door.path.lstat().st_mode) == 0o600)
            while True:
                with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                    _, writer = await asyncio.open_unix_connection(str(door.path))
                    writer.close()
                    break
                await asyncio.sleep(0.05)
            assert loop.time() - lost_at <= 5
            await door.neighbour()
            assert await call(open_channel, ECHO, b"x") == b"x"
            assert len(door.door._acceptors) == 1

    await asyncio.gather(lose(Path.unlink), lose(replaced), lose(blocked))
