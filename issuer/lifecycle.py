"""Running the server as a process: signals, the loop, the last words."""

import asyncio
import logging
import os
import signal

import uvloop

from ca.clock import Clock
from issuer.app import serve
from issuer.config import ServerSettings
from spiffe_core import crashpoints
from spiffe_core.errors import SpiffeError
from spiffe_wire import descriptors, logs
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)


def run_server(settings: ServerSettings, clock: Clock | None = None) -> int:
    """
    Serve until SIGTERM or SIGINT; return 0 after an orderly stop.

    Raises:
        SpiffeError: says what keeps it from starting, and what to do.
    """
    logs.set_up(settings.log_style.value, settings.log_level)
    descriptors.raise_limit()
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""), lambda: os._exit(137))

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop.set)
        async with serve(settings, clock):
            await stop.wait()

    try:
        uvloop.run(run())
    except SpiffeError as error:
        # With its causes, which the last words on standard error leave out.
        event(_log, logging.CRITICAL, "server_failed", exc_info=error)
        raise
    return 0
