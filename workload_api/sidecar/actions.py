"""
What is done when files have changed: a signal, a restart, a command, an HTTP call.

Source: SEC-96 (argument vectors, never a shell).  One that fails is tried again and
logged; it never stops the files from being renewed.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from spiffe_core.errors import NotReadyError, SpiffeError
from spiffe_wire.backoff import Backoff
from spiffe_wire.logs import event
from workload_api.client.watching import Clock
from workload_api.sidecar.children import Children
from workload_api.sidecar.config import Action, Kind, signal_number
from workload_api.sidecar.program import Program

_log = logging.getLogger(__name__)
MAX_PID_BYTES: Final = 32
SHORTEST_PAUSE: Final = timedelta(milliseconds=500)
LONGEST_PAUSE: Final = timedelta(seconds=10)


class ActionError(NotReadyError):
    """Who was to be told was not; the text says why."""


class NobodyError(ActionError):
    """There is nobody to tell, who will find the files when it starts."""


class Actions:
    """Does what the settings ask for after a change; *program* is our own command, if any."""

    def __init__(
        self,
        actions: tuple[Action, ...],
        children: Children,
        program: Program | None,
        environment: Mapping[str, str],
        clock: Clock,
    ) -> None:
        self.done = 0
        self.failures = 0
        self._actions = actions
        self._children = children
        self._program = program
        self._environment = environment
        self._clock = clock

    async def after(self, changed: frozenset[Kind]) -> None:
        """Do them, in the order of the settings; return when all is done or given up."""
        for one in self._actions:
            if one.kinds & changed:
                await self._try(one)

    async def _try(self, one: Action) -> None:
        what, act = self._act_of(one)
        pauses = Backoff(SHORTEST_PAUSE, LONGEST_PAUSE)
        for number in range(1, one.tries + 1):
            try:
                await act()
            except NobodyError as error:
                event(_log, logging.INFO, "nobody_to_tell", action=what, why=error)
                return
            except SpiffeError as error:
                left = one.tries - number
                level = logging.WARNING if left else logging.ERROR
                event(_log, level, "on_change_failed", action=what, why=error, tries_left=left)
                if left:
                    await self._clock.sleep(pauses.next())
            else:
                self.done += 1
                event(_log, logging.INFO, "on_change_done", action=what)
                return
        self.failures += 1

    def _act_of(self, one: Action) -> tuple[str, Callable[[], Awaitable[None]]]:
        """What to call it in the log, and how to do it."""
        if one.signal:
            return f"signal {one.signal}", lambda: self._signal(one)
        if one.restart:
            return "restart", self._restart
        if one.command:
            return f"command {one.command[0]}", lambda: self._command(one)
        return f"{one.method} of url", lambda: self._call(one)

    async def _signal(self, one: Action) -> None:
        number = signal_number(one.signal)
        if one.pid_file is None:
            program = self._program
            if program and not await program.tell(number, one.timeout.total_seconds()):
                raise ActionError(f"our command does not handle {one.signal}, and would end")
            return
        pid = _pid_of(one.pid_file)
        try:
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise NobodyError(f"{one.pid_file} names a process that has ended") from error
        except OSError as error:
            raise ActionError(f"process {pid} cannot be signalled: {error.strerror}") from error

    async def _restart(self) -> None:
        if self._program is not None:
            await self._program.restart()

    async def _command(self, one: Action) -> None:
        child = self._children.start(one.command, self._environment)
        try:
            code = await asyncio.wait_for(
                asyncio.shield(child.ended), one.timeout.total_seconds()
            )
        except TimeoutError as error:
            raise ActionError(
                f"it runs longer than {one.timeout.total_seconds():g} s"
            ) from error
        finally:
            if not child.ended.done():
                await self._children.stop(child, 1)
        if code:
            raise ActionError(f"it ended with {code}")

    async def _call(self, one: Action) -> None:
        # Here, because only who asks for it should pay for it.
        import httpcore

        seconds = one.timeout.total_seconds()
        limits = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        try:
            async with asyncio.timeout(seconds), httpcore.AsyncConnectionPool() as pool:
                answer = await pool.request(one.method, one.url, extensions={"timeout": limits})
        except (
            OSError, TimeoutError, httpcore.NetworkError, httpcore.TimeoutException,
            httpcore.ProtocolError, httpcore.UnsupportedProtocol,
        ) as error:  # fmt: skip
            raise ActionError(f"no answer: {type(error).__name__} {error}".strip()) from error
        if not 200 <= answer.status < 300:
            raise ActionError(f"the answer is {answer.status}")


def _pid_of(path: Path) -> int:
    try:
        with path.open("rb") as file:
            # The first line: PostgreSQL's own file goes on after it.
            text = file.readline(MAX_PID_BYTES).strip()
    except FileNotFoundError as error:
        raise NobodyError(f"there is no {path}") from error
    except OSError as error:
        raise ActionError(f"cannot read {path}: {error.strerror}") from error
    # 0 is our own group, and 1 in a container that shares no processes is ourselves.
    if not text.isdigit() or not 1 < int(text) < 2**31 or int(text) == os.getpid():
        raise ActionError(f"{path} does not hold the number of another process")
    return int(text)
