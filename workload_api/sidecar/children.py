"""
Starts programs by their argument vectors, never by a shell (SEC-96), and sees them end.

As the first process of a container we inherit every orphan there is, so that reaping is done
here and not by asyncio, which waits for its own children alone.
"""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Mapping, Sequence
from typing import Self

from spiffe_core.errors import PreconditionError
from spiffe_wire.running import NO_COMMAND, NO_PROGRAM


class ProgramError(PreconditionError):
    """A program cannot be started; *code* is what a shell would end with."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Child:
    """A program that was started; *ended* has its exit code, below zero for a signal."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.pid = process.pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        # Until it is reaped, which is here, its number is its own.
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def over(self, status: int) -> None:
        """It was reaped."""
        # So that its object does not ask for a child that is no more.
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if not self.ended.done():
            self.ended.set_result(self._process.returncode)


class Children:
    """The programs of this process, in one event loop's main thread, while entered."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}
        self._first = os.getpid() == 1

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        """
        Start a program.

        Raises:
            ProgramError: it cannot be.
        """
        program = program_of(arguments[0])
        try:
            process = subprocess.Popen(arguments, executable=program, env=dict(environment))
        except OSError as error:
            raise ProgramError(f"{arguments[0]}: {error.strerror}", NO_PROGRAM) from error
        child = Child(process)
        self._children[child.pid] = child
        return child

    async def stop(self, child: Child, patience: float) -> int:
        """End *child* with TERM, after *patience* seconds with KILL; return its exit code."""
        child.send(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(child.ended), patience)
        except TimeoutError:
            child.send(signal.SIGKILL)
            return await child.ended

    def _reap(self) -> None:
        # One signal may stand for several ends.
        for pid in [-1] if self._first else list(self._children):
            with contextlib.suppress(ChildProcessError):
                while True:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if not found:
                        break
                    child = self._children.pop(found, None)
                    if child is not None:
                        child.over(status)


def program_of(name: str) -> str:
    """
    Find a program as a shell does.

    Raises:
        ProgramError: with a shell's exit code, 127 or 126.
    """
    places = [""] if "/" in name else os.get_exec_path()
    code = NO_COMMAND
    for place in places:
        path = os.path.join(place, name)
        with contextlib.suppress(OSError):
            mode = os.stat(path).st_mode
            # By its mode, as access(2) knows no capabilities; the kernel has the last word.
            if stat.S_ISREG(mode) and mode & 0o111:
                return path
            code = NO_PROGRAM
    if code == NO_PROGRAM:
        raise ProgramError(f"{name}: is not a program that can be run", NO_PROGRAM)
    raise ProgramError(f"{name}: no such command", NO_COMMAND)
