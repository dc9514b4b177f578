"""Token buckets: a rate, a bucket as large as a second of it, and a wait (SPIRE API 3.6)."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from spiffe_core.errors import ExhaustedError

MAX_KEYS: Final = 65_536
MAX_WAIT: Final = 5.0
"""Seconds that a call waits for its turn before it is refused."""


class RateLimit:
    """*rate* a second for each key, 0 for any; keys that were longest away are forgotten."""

    def __init__(
        self, what: str, rate: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._rate = rate
        self._now = now
        self._taken_until: OrderedDict[str, float] = OrderedDict()
        """For each key, the instant at which its bucket has what was taken so far."""

    async def take(self, key: str, count: int = 1) -> None:
        """
        Wait for *count* turns of *key*.

        Raises:
            ExhaustedError: more than a bucket at once, or the queue is too long.
        """
        wait = self.reserve(key, count)
        if wait > 0:
            await asyncio.sleep(wait)

    def reserve(self, key: str, count: int = 1) -> float:
        """
        Take *count* turns of *key*, and return how many seconds they are away.

        Nothing is awaited here, so two who race are served one after the other.

        Raises:
            ExhaustedError: more than a bucket at once, or too far away; nothing was taken.
        """
        if self._rate <= 0:
            return 0.0
        if count > max(self._rate, 1):
            raise ExhaustedError(
                f"rejecting request due to {self._what} rate limiting: "
                f"rate ({count}) exceeds burst size ({self._rate:g})"
            )
        now = self._now()
        # The bucket is full when nothing was taken for as long as it takes to fill it.
        full = now - max(1.0, 1 / self._rate)
        until = max(self._taken_until.get(key, full), full) + count / self._rate
        if until - now > MAX_WAIT:
            raise ExhaustedError(f"rejecting request due to {self._what} rate limiting")
        self._taken_until[key] = until
        self._taken_until.move_to_end(key)
        if len(self._taken_until) > MAX_KEYS:
            self._taken_until.popitem(last=False)
        return max(0.0, until - now)
