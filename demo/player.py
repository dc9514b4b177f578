"""One running workload of the demo: orders go in, what it saw comes out."""

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any, Self

from demo.casting import Role

Event = dict[str, Any]
PATIENCE = 20.0
"""Seconds after which a step of the demo counts as failed."""


class PlayerError(Exception):
    """A workload did not do what the story needs; the message says what it did."""


class Player:
    """
    A process of *role*, as an async context manager.

    Ends the process it started, and only that one, when left.
    """

    def __init__(self, role: Role, endpoint: str) -> None:
        self.role = role
        self.seen: list[Event] = []
        self._endpoint = endpoint
        self._arrived = asyncio.Condition()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 closed in __aexit__

    async def __aenter__(self) -> Self:
        identity: dict[str, Any] = (
            {}
            if self.role.uid is None
            else {
                "user": self.role.uid,
                "group": self.role.uid,
                "extra_groups": [],
            }
        )
        self._process = await asyncio.create_subprocess_exec(
            *self.role.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._words,
            cwd="/",
            env={
                "PATH": os.defpath,
                "PYTHONDONTWRITEBYTECODE": "1",
                **self.role.environment,
                "SPIFFE_ENDPOINT_SOCKET": self._endpoint,
            },
            **identity,
        )
        self._reading = asyncio.create_task(self._read())
        await self.expect("started")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading
        self._words.close()

    @property
    def pid(self) -> int:
        """The process ID, as this machine numbers it."""
        return self._process.pid

    async def do(self, order: str, **how: object) -> None:
        """Give one order; what comes of it is read with `expect`."""
        assert self._process.stdin is not None  # noqa: S101 it was asked for above
        self._process.stdin.write(json.dumps({"do": order, **how}).encode() + b"\n")
        await self._process.stdin.drain()

    async def expect(
        self, event: str, matches: Callable[[Event], bool] = lambda _: True, *, since: int = 0
    ) -> Event:
        """
        Return the first *event* that *matches*, among those after the first *since*.

        Raises:
            PlayerError: it failed, ended, or took longer than `PATIENCE`.
        """
        try:
            async with asyncio.timeout(PATIENCE), self._arrived:
                while True:
                    for one in self.seen[since:]:
                        if one["event"] == event and matches(one):
                            return one
                        if one["event"] in ("failed", "watch_failed", "ended"):
                            raise PlayerError(
                                f"{self.role.name}: {one.get('error') or self._last_words()}"
                            )
                    await self._arrived.wait()
        except TimeoutError:
            raise PlayerError(
                f"{self.role.name}: no {event!r} in {PATIENCE:g} s; seen: {self.seen[-3:]}"
            ) from None

    def _last_words(self) -> str:
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip().splitlines()
        return f"it ended: {said[-1]}" if said else "it ended and said nothing"

    async def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 it was asked for above
        async for line in self._process.stdout:
            await self._note(json.loads(line))
        await self._note({"event": "ended"})

    async def _note(self, event: Event) -> None:
        async with self._arrived:
            self.seen.append(event)
            self._arrived.notify_all()
