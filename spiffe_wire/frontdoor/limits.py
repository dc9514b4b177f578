"""
Limits that apply before anything is attested, and refusals that stay cheap.

Source: SEC-80, SEC-81, table 1.  A place is taken at accept and given back at close,
whatever happens between.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address, ip_network
from typing import Final

from spiffe_core.errors import ExhaustedError
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
_QUIET_SECONDS: Final = 1.0
STALL: Final = timedelta(seconds=30)  # SEC-83


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """How much one front door holds (table 1)."""

    connections: int = 4096
    per_uid: int = 1500
    per_pid: int = 20
    unopened_per_uid: int = 200
    """Connections of one user that have not begun HTTP/2 yet."""
    unproven_per_address: int = 1000
    """Connections of one IPv4 address or IPv6 /64 that presented no SVID (yet)."""
    opening: timedelta = timedelta(seconds=5)
    """For the handshake, preface and SETTINGS together."""
    first_request: timedelta = timedelta(seconds=10)
    stall: timedelta = STALL
    """How long a client may read nothing while something waits for it."""
    handshakes: int = 64
    streams: int = 128


class Places:
    """At most *most* at once for each key."""

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._taken: Counter[Hashable] = Counter()

    def take(self, key: Hashable) -> Callable[[], None]:
        """
        Take one place and return what gives it back; call that once.

        Raises:
            ExhaustedError: all of *key*'s places are taken.
        """
        if self._taken[key] >= self._most:
            raise ExhaustedError(f"too many {self._what}: {self._most} are open")
        self._taken[key] += 1
        return lambda: self._give_back(key)

    def __len__(self) -> int:
        return self._taken.total()

    def _give_back(self, key: Hashable) -> None:
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]


class Turns:
    """
    At most *most* at once, and a quarter of them for one key; the others wait.

    A quarter: one address whose handshakes never end cannot hold up everybody else.
    """

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._share = max(1, most // 4)
        self._mine: dict[Hashable, asyncio.Semaphore] = {}
        self._waiting: Counter[Hashable] = Counter()

    @asynccontextmanager
    async def turn(self, key: Hashable) -> AsyncIterator[None]:
        """Wait for a turn, and hold it while entered."""
        mine = self._mine.setdefault(key, asyncio.Semaphore(self._share))
        self._waiting[key] += 1
        try:
            async with mine, self._all:
                yield
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key], self._mine[key]


class Refusals:
    """Counts refusals by reason, and logs each reason once a second at most."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}

    def note(self, reason: str, error: BaseException | None = None) -> None:
        """One more for *reason*; a flood of refusals must not become a flood of lines."""
        self.counts[reason] += 1
        now = time.monotonic()
        at, so_far = self._logged.get(reason, (-_QUIET_SECONDS, 0))
        if now - at < _QUIET_SECONDS:
            return
        count = self.counts[reason] - so_far
        self._logged[reason] = (now, self.counts[reason])
        # The text alone: a record that somebody keeps must not keep the caller's pidfd.
        why = "" if error is None else str(error)
        event(_log, logging.INFO, "connection_refused", reason=reason, why=why, count=count)


def address_key(address: str) -> str:
    """Return what one network customer shares: an IPv4 address, or an IPv6 /64."""
    found = ip_address(address.partition("%")[0])
    if found.version == 6 and found.ipv4_mapped is None:
        return str(ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)
