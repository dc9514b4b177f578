"""A clock that a test drives: nothing sleeps longer than the test says."""

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta


class DrivenClock:
    """Stands still until `advance`, which wakes whoever slept until then."""

    def __init__(self, now: datetime | None = None) -> None:
        self._now = now or datetime.now(UTC)
        self._sleeping: list[tuple[datetime, int, asyncio.Event]] = []
        self._order = itertools.count()

    def now(self) -> datetime:
        """Where it stands."""
        return self._now

    async def sleep(self, span: timedelta) -> None:
        """Return once it was advanced by *span*."""
        if span <= timedelta(0):
            await asyncio.sleep(0)
            return
        woken = asyncio.Event()
        heapq.heappush(self._sleeping, (self._now + span, next(self._order), woken))
        await woken.wait()

    def advance(self, span: timedelta) -> None:
        """Move on by *span*."""
        self._now += span
        while self._sleeping and self._sleeping[0][0] <= self._now:
            heapq.heappop(self._sleeping)[2].set()

    async def run_on(self, span: timedelta) -> None:
        """Move on by *span*, and return once everybody who was woken sleeps again."""
        asleep = len(self._sleeping)
        self.advance(span)
        while len(self._sleeping) < asleep:
            await asyncio.sleep(0.0005)
