"""Our own command: started once the files are there, told of changes, and our end with its."""

import asyncio
import signal
from collections.abc import Mapping, Sequence
from typing import Final

from workload_api.sidecar.children import Child, Children, ProgramError, program_of

STOP_PATIENCE: Final = 10.0
"""Seconds from TERM to KILL at a restart, as container engines have it."""
ENDING: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL))
"""Signals that are meant to end a program, whether it handles them or not."""


class Program:
    """
    The command of a sidecar, or of ``run-with``.

    Raises:
        ProgramError: there is no such program.
    """

    def __init__(
        self, children: Children, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        program_of(arguments[0])  # before anything is waited for
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit code, below zero for a signal, unless it ended by our restart."""
        self._children = children
        self._arguments = arguments
        self._environment = environment
        self._child: Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self._told_to_end = False

    def start(self) -> None:
        """
        Start it.

        Raises:
            ProgramError: it cannot be.
        """
        self._child = self._children.start(self._arguments, self._environment)
        self._watching = asyncio.create_task(self._watch(self._child))

    def send(self, number: int) -> None:
        """Pass a signal on to it, if it runs."""
        self._told_to_end = self._told_to_end or number in ENDING
        if self._child is not None:
            self._child.send(number)

    async def tell(self, number: int, patience: float) -> bool:
        """
        Send it a signal that it handles, and return whether it does within *patience* seconds.

        A program that has just begun has not set up its handlers yet, and would end.
        """
        if self._child is None or self._child.ended.done():
            return True
        end = asyncio.get_running_loop().time() + patience
        while number not in ENDING and not _handles(self._child.pid, number):
            if self._child.ended.done() or asyncio.get_running_loop().time() > end:
                return self._child.ended.done()
            await asyncio.sleep(0.05)
        self._child.send(number)
        return True

    async def restart(self) -> None:
        """
        End it, and start it again; unless it has ended by itself, or is told to end meanwhile.

        Raises:
            ProgramError: it cannot be started again; it has ended, then.
        """
        child, watching = self._child, self._watching
        if child is None or watching is None or child.ended.done():
            return
        self._told_to_end = False
        watching.cancel()
        code = await self._children.stop(child, STOP_PATIENCE)
        try:
            if not self._told_to_end:
                self.start()
        except ProgramError as error:
            code = error.code
            raise
        finally:
            if self._child is child and not self.ended.done():
                self.ended.set_result(code)

    async def close(self) -> None:
        """End it if it still runs."""
        if self._watching is not None:
            self._watching.cancel()
        if self._child is not None and not self._child.ended.done():
            await self._children.stop(self._child, STOP_PATIENCE)

    async def _watch(self, child: Child) -> None:
        code = await asyncio.shield(child.ended)
        if not self.ended.done():
            self.ended.set_result(code)


def _handles(pid: int, number: int) -> bool:
    """True when the process catches or ignores the signal, as the kernel tells."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file if line.startswith("Sig"))
        masks = [int(fields[name], 16) for name in ("SigCgt", "SigIgn")]
    except (OSError, KeyError, ValueError):
        return True  # it cannot be told here: send it as anybody would
    return any(mask >> (number - 1) & 1 for mask in masks)
