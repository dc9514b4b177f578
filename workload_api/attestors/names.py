"""Names of users and groups, from a directory service that may be slow or hang."""

import asyncio
import grp
import pwd
import time
from collections.abc import Callable
from typing import Final

from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.workers import Workers

FRESH_SECONDS: Final = 60.0
PATIENCE: Final = 1.0
"""Seconds that an attestation waits for a name; a stale one then serves."""
KEPT: Final = 10_000
_OWNER: Final = -1  # no user's: threads that hang here count against the directory


class Names:
    """
    Looks each number up once a minute; a name that was known serves while the directory hangs.

    *look_up* blocks and returns None for a number without a name.
    """

    def __init__(self, look_up: Callable[[int], str | None], workers: Workers) -> None:
        self._look_up = look_up
        self._workers = workers
        self._known: dict[int, tuple[float, str | None]] = {}
        self._asked: dict[int, asyncio.Task[str | None]] = {}

    async def of(self, number: int) -> str | None:
        """
        Return the name of *number*, or None when it has none.

        Raises:
            AttestationError: the directory does not answer, and never did for *number*.
        """
        known = self._known.get(number)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        task = self._asked.get(number)
        if task is None:
            task = asyncio.ensure_future(self._ask(number))
            self._asked[number] = task
            task.add_done_callback(lambda done: self._answered(number, done))
        try:
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(task)
        except (TimeoutError, AttestationError) as error:
            if known is None:
                raise AttestationError("the directory of users does not answer") from error
            return known[1]

    async def _ask(self, number: int) -> str | None:
        name = await self._workers.run(_OWNER, self._look_up, number)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[number] = time.monotonic() + FRESH_SECONDS, name
        return name

    def _answered(self, number: int, task: "asyncio.Task[str | None]") -> None:
        del self._asked[number]
        if not task.cancelled():
            task.exception()  # whoever waited was told; nobody may have

    def close(self) -> None:
        """Forget who was asked."""
        for task in self._asked.values():
            task.cancel()


def user_name(uid: int) -> str | None:
    """Return the name of a user, or None."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def group_name(gid: int) -> str | None:
    """Return the name of a group, or None."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
