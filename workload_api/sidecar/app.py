"""
Puts a sidecar together, and runs it until it is told to stop or its command ends.

``run-with`` is one too: a folder of its own, a command, and settings made of its options.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Final

from spiffe_core.errors import PreconditionError
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from spiffe_wire.logs import event
from spiffe_wire.running import heard_already
from workload_api.client.client import WorkloadClient
from workload_api.client.watching import SystemClock
from workload_api.sidecar.actions import Actions
from workload_api.sidecar.children import Children
from workload_api.sidecar.config import Kind, SidecarSettings
from workload_api.sidecar.delivery import Delivery
from workload_api.sidecar.files import SvidFolder
from workload_api.sidecar.program import Program

_log = logging.getLogger(__name__)
STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
PASSED_ON: Final = (
    *STOPPING, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
    signal.SIGCONT,
)  # fmt: skip


async def serve(
    settings: SidecarSettings,
    environment: Mapping[str, str],
    *,
    once: bool = False,
    setting: str = "dir",
) -> int:
    """
    Run a sidecar; return its exit code, which is that of its command if it has one.

    *environment* is for the programs that it starts; *setting* is what the folder is called
    in a refusal.  With *once* it ends when everything was written.

    Raises:
        SpiffeError: it cannot be, or the agent's last word came before any identity.
    """
    address = settings.endpoint or os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not address:
        raise PreconditionError(
            f"name the Workload API: set {ENVIRONMENT_VARIABLE}=unix:///path/to/socket, or "
            "`endpoint`"
        )
    _warn_of_unsafe(settings)
    files = settings.files
    async with contextlib.AsyncExitStack() as stack:
        has_program = bool(settings.command) and not once
        signals = stack.enter_context(_signals(PASSED_ON if has_program else STOPPING))
        children = stack.enter_context(Children())
        folder = stack.enter_context(
            SvidFolder(
                settings.dir, setting, owner=files.owner_ids(), mode=int(files.dir_mode, 8)
            )
        )
        client = await stack.enter_async_context(WorkloadClient(address))
        program = None
        if has_program:
            program = Program(children, settings.command, environment)
            stack.push_async_callback(program.close)
        sidecar = Sidecar(settings, client, folder, children, program, environment)
        if settings.status.port:
            from workload_api.sidecar.status import serving

            await stack.enter_async_context(
                serving(settings.status, sidecar.delivery, sidecar.actions)
            )
        return await sidecar.run(signals, once=once)


class Sidecar:
    """What runs: the files, what is done when they change, and the command."""

    def __init__(
        self,
        settings: SidecarSettings,
        client: WorkloadClient,
        folder: SvidFolder,
        children: Children,
        program: Program | None,
        environment: Mapping[str, str],
    ) -> None:
        clock = SystemClock()
        self.actions = Actions(settings.on_change, children, program, environment, clock)
        self.delivery = Delivery(settings, client, folder, self._told, clock)
        self._program = program
        self._started = False

    async def run(self, signals: "asyncio.Queue[int]", *, once: bool) -> int:
        """Run until a signal, the end of the command or, with *once*, until all is written."""
        delivering = asyncio.create_task(self.delivery.run(once=once))
        stopping = asyncio.create_task(self._obey(signals, once=once))
        waited: set[asyncio.Future[Any]] = {delivering, stopping}
        if self._program is not None:
            waited.add(self._program.ended)
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._program is not None and self._program.ended.done():
                code = self._program.ended.result()
                return 128 - code if code < 0 else code
            if delivering.done():
                delivering.result()
                return 0
            return stopping.result()
        finally:
            for task in (delivering, stopping):
                task.cancel()
            await asyncio.gather(delivering, stopping, return_exceptions=True)

    async def _told(self, changed: frozenset[Kind]) -> None:
        if self._program is not None and not self._started:
            # It reads the files as it starts: there is nothing to tell it.
            self._program.start()
            self._started = True
            return
        await self.actions.after(changed)

    async def _obey(self, signals: "asyncio.Queue[int]", *, once: bool) -> int:
        """Pass signals on to the command; without one, return the exit code at the first."""
        while True:
            number = await signals.get()
            if self._program is None:
                # An init container that is told to end has not done its work.
                return 128 + number if once else 0
            if not self._started:
                if number in (*STOPPING, signal.SIGHUP, signal.SIGQUIT):
                    return 128 + number
            elif not heard_already(number):
                self._program.send(number)


@contextlib.contextmanager
def _signals(wanted: tuple[signal.Signals, ...]) -> Iterator["asyncio.Queue[int]"]:
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for one in wanted:
        loop.add_signal_handler(one, signals.put_nowait, one)
    try:
        yield signals
    finally:
        for one in wanted:
            loop.remove_signal_handler(one)


def _warn_of_unsafe(settings: SidecarSettings) -> None:
    if settings.bundles.unsafe_merged_file:
        event(
            _log, logging.WARNING, "unsafe_setting", setting="bundles.unsafe_merged_file",
            why="each trust domain in the merged file can speak for every other",
        )  # fmt: skip
    for number, one in enumerate(settings.on_change):
        if one.unsafe_remote_url:
            event(
                _log, logging.WARNING, "unsafe_setting",
                setting=f"on_change[{number}].unsafe_remote_url",
                why="the call leaves this machine in the clear",
            )  # fmt: skip
