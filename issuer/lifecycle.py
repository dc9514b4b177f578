"""Running the server as a process: signals, the loop, the last words."""

import asyncio
import os
import signal

import uvloop

from ca.clock import Clock
from issuer.app import serve
from issuer.config import ServerSettings
from spiffe_core import crashpoints
from spiffe_wire import logs


def run_server(settings: ServerSettings, clock: Clock | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return 0 after an orderly stop."""
    logs.set_up(settings.log_style.value, settings.log_level)
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""), lambda: os._exit(137))

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop.set)
        async with serve(settings, clock):
            await stop.wait()

    uvloop.run(run())
    return 0
