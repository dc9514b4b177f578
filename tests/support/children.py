"""Real child processes to attest: pinned by a pidfd, ended and waited for in any case."""

import contextlib
import gc
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
