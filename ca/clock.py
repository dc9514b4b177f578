"""The one source of the present instant, so that tests can hold it still."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Tells the instant, and sleeps."""

    def now(self) -> datetime:
        """Return the present instant, aware UTC."""
        ...

    async def sleep(self, span: timedelta) -> None:
        """Return after *span*."""
        ...


class SystemClock:
    """The machine's own."""

    def now(self) -> datetime:
        """Return the present instant, aware UTC."""
        return datetime.now(UTC)

    async def sleep(self, span: timedelta) -> None:
        """Return after *span*, on the monotonic clock."""
        await asyncio.sleep(span.total_seconds())
