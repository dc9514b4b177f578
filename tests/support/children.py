"""Real child processes to attest: pinned by a pidfd, ended and waited for in any case."""

import asyncio
import contextlib
import gc
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer

SLEEP = Path(shutil.which("sleep") or "/bin/sleep").resolve()
SHELL = Path(shutil.which("sh") or "/bin/sh").resolve()


@dataclass
class Child:
    """A running process with pipes to it."""

    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self.process.pid

    def peer(self, **changes: Any) -> UnixPeer:
        """It, as a front door would have proved it; *changes* make the proof a false one."""
        facts = {"uid": os.geteuid(), "gid": os.getegid(), **changes}
        return UnixPeer(
            self.pid,
            facts["uid"],
            facts["gid"],
            PeerProof.PIDFD,
            PidFd(os.pidfd_open(self.pid)),
        )

    def runs(self) -> str:
        """The program it runs at this moment."""
        return os.readlink(f"/proc/{self.pid}/exe")

    def say(self, text: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = 10) -> str:
        """Read a line from it."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert readable, "the child says nothing"
        return self.process.stdout.readline().decode().rstrip("\n")

    def end(self) -> None:
        """End it, and wait for that."""
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def a_child(*command: "str | bytes | Path", **options: Any) -> Iterator[Child]:
    """A process; without *command* it sleeps."""
    process = subprocess.Popen(
        command or (SLEEP, "60"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        **options,
    )
    with process:
        try:
            yield Child(process)
        finally:
            process.kill()


def a_python(code: str, *arguments: str, **options: Any) -> Any:
    """A child that runs *code*, as a context manager."""
    return a_child(sys.executable, "-u", "-S", "-c", code, *arguments, **options)


def a_program(folder: Path, name: "str | bytes" = "program") -> Path:
    """A copy of `sleep` in *folder*: an executable of its own."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name))))
    shutil.copy(SLEEP, path)
    path.chmod(0o755)
    return path


def open_files() -> int:
    """How many descriptors this process holds, garbage not counted."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


CONNECTS = """
import array, os, socket, sys
path, channel = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
passed = array.array("i", [connection.fileno()])
channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
for line in sys.stdin:
    word, _, rest = line.rstrip("\\n").partition(" ")
    if word == "exec":
        os.execv(rest.split()[0], rest.split())
    elif word == "fork" and os.fork():
        os._exit(0)
    elif word == "setuid":
        os.setresuid(int(rest), int(rest), int(rest))
    elif word == "close":
        connection.close()
    print("done", flush=True)
"""
"""Connects, hands the connection to its parent, and then does what it is told."""


@contextlib.contextmanager
def a_connected_child(path: Path, **options: Any) -> Iterator["tuple[Child, socket.socket]"]:
    """A process that connected to *path*, and the connection, which it passed to us."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        a_python(
            CONNECTS, str(path), str(theirs.fileno()), pass_fds=[theirs.fileno()], **options
        ) as child,
    ):
        ours.settimeout(10)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=fds[0]) as connection:
            yield child, connection


@contextlib.asynccontextmanager
async def spoken_through(connection: socket.socket) -> AsyncIterator[str]:
    """An address that leads to *connection*, so that a gRPC client of ours can speak on it."""
    writers: list[asyncio.StreamWriter] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(sock=connection.dup())
        writers.extend((writer, far_writer))
        await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer))

    connection.setblocking(False)
    folder = tempfile.mkdtemp(prefix="si-")
    server = await asyncio.start_unix_server(join, f"{folder}/s")
    try:
        yield f"unix:{folder}/s"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await asyncio.sleep(0)
        shutil.rmtree(folder)
