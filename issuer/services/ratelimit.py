"""Token buckets: a rate, a bucket as large as a second of it, and a wait (SPIRE API 3.6)."""

import asyncio
import time
from collections import OrderedDict

from spiffe_core.errors import ExhaustedError

MAX_KEYS = 65_536
MAX_WAIT = 5.0
"""Seconds that a call waits for its turn before it is refused."""


class RateLimit:
    """*rate* a second for each key; the oldest keys are forgotten."""

    def __init__(self, what: str, rate: float) -> None:
        self._what = what
        self._rate = rate
        self._ready_at: OrderedDict[str, float] = OrderedDict()

    async def take(self, key: str, count: int = 1) -> None:
        """
        Wait for *count* turns of *key*.

        Raises:
            ExhaustedError: more than a bucket at once, or the queue is too long.
        """
        if self._rate <= 0:
            return
        if count > max(self._rate, 1):
            raise ExhaustedError(
                f"rejecting request due to {self._what} rate limiting: "
                f"rate ({count}) exceeds burst size ({self._rate:g})"
            )
        now = time.monotonic()
        # The bucket is full when nothing was taken for a second.
        start = max(self._ready_at.pop(key, 0.0), now - max(1.0, 1 / self._rate))
        ready_at = start + count / self._rate
        wait = ready_at - now
        if wait > MAX_WAIT:
            self._ready_at[key] = start
            raise ExhaustedError(f"rejecting request due to {self._what} rate limiting")
        self._ready_at[key] = ready_at
        while len(self._ready_at) > MAX_KEYS:
            self._ready_at.popitem(last=False)
        if wait > 0:
            await asyncio.sleep(wait)
