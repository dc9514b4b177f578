"""
Servers and agents that start fast: real processes, forked from one that has the imports done.

They have the interface of `stack.Process`, and end by real signals and real exit codes.  What
is saved is half a second of imports for each start: tests that kill dozens of times need it.
"""

import asyncio
import contextlib
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self, TypeVar

from ca.clock import SystemClock
from tests.support.stack import AgentProcess, Process, ServerProcess, Stack, a_folder

CLOCK_OFFSET = "TEST_CLOCK_OFFSET"
"""Environment variable with the seconds by which a forked server's clock is ahead."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.forked_imports"])
_One = TypeVar("_One", ServerProcess, AgentProcess)


class ForkedProcess(Process):
    """A `Process` whose command is the ``main`` of one of our command lines, in a fork."""

    _forked: ForkServerProcess | None = None

    @property
    def pid(self) -> int:
        """Its process ID; it was started."""
        assert self._forked is not None and self._forked.pid is not None
        return self._forked.pid

    def start(self, **environment: str) -> Self:
        """Start it; the log is appended to."""
        self._forget()
        self.log.touch()
        self._forked = _CONTEXT.Process(
            target=_run,
            args=(self._command[2:], str(self.log), {**self._environment, **environment}),
            daemon=True,  # whatever happens to a test, it does not outlive the run
        )
        self._forked.start()
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._forked is not None
        # Looked at first: it is the fork server's child, and once that has reaped it, its
        # number may be another process's.
        if self._forked.exitcode is None:
            self._forked.kill()
        self._join(10)

    def stop(self, timeout: float = 15) -> int:
        """Ask it to end, and return its exit code."""
        assert self._forked is not None
        if self._forked.exitcode is None:
            self._forked.terminate()
        return self._join(timeout)

    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        assert self._forked is not None
        return self._forked.exitcode

    async def wait(self, timeout: float = 20) -> int:
        """Wait until it ends by itself, and return its exit code."""
        return await asyncio.to_thread(self._join, timeout)

    def close(self) -> None:
        """End it if it still runs."""
        self._forget()

    def _join(self, timeout: float) -> int:
        assert self._forked is not None
        self._forked.join(timeout)
        if self._forked.exitcode is None:
            raise AssertionError(f"{self._command} did not end in {timeout} s")
        return self._forked.exitcode

    def _forget(self) -> None:
        if self._forked is not None:
            if self._forked.exitcode is None:
                self.kill()
            self._forked.close()
            self._forked = None


def forked(one: _One) -> _One:
    """Let *one*, which was not started yet, start by forking."""
    one.process = ForkedProcess(one.process._command, one.process.log)
    return one


def a_forked_server(folder: Any, **changes: Any) -> ServerProcess:
    """A server in *folder* that starts by forking; not started yet."""
    return forked(ServerProcess(folder, changes))


@contextlib.asynccontextmanager
async def a_forked_stack(
    *,
    server_changes: Mapping[str, Any] | None = None,
    agent_changes: Mapping[str, Any] | None = None,
) -> AsyncIterator[Stack]:
    """A running server and an agent that joined it; both start fast again."""
    with a_folder() as folder:
        server = forked(ServerProcess(folder, server_changes or {}))
        agent = forked(AgentProcess(folder, server, agent_changes or {}))
        try:
            await server.start()
            await agent.join()
            yield Stack(folder, server, agent)
        finally:
            agent.process.close()
            server.process.close()


def _run(command: list[str], log: str, environment: Mapping[str, str]) -> None:
    """In the child: what ``python -m`` would do."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    module, *arguments = command
    offset = environment.get(CLOCK_OFFSET)
    if module != "issuer":
        from workload_api.agent.cli import main

        sys.exit(main(arguments))
    elif offset is None:
        from issuer.cli import main

        sys.exit(main(arguments))
    else:
        sys.exit(_run_ahead(arguments[-1], timedelta(seconds=float(offset))))


def _run_ahead(config: str, offset: timedelta) -> int:
    from issuer.config import ROLE, ServerSettings
    from issuer.lifecycle import run_server
    from spiffe_wire.settings import load

    class Ahead(SystemClock):
        def now(self) -> datetime:
            return super().now() + offset

    settings = load(ServerSettings, Path(config).read_text(), os.environ, ROLE)
    return run_server(settings, Ahead())
