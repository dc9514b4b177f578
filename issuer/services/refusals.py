"""
Refused calls on record (SEC-91), without a caller being able to fill the record with them.

The first refusal of a caller and method is written at once; those that follow within the
minute are counted, and the count is written at its end.  However many ask, a minute has a
bounded number of rows: who holds any SVID of ours could else write as fast as it can call.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from issuer.store.store import Repositories, Store
from spiffe_core.errors import SpiffeError
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
WINDOW_SECONDS: Final = 60.0
MAX_ROWS: Final = 256  # a window, for all callers together
EVERYBODY: Final = "(many)"
EVENTS: Final = {"call.refuse": "call_refused", "agent.superseded": "superseded_serial_used"}
"""What is logged for each action that is put on record."""


@dataclass
class RefusalLog:
    """One for the process; `run` ends each window."""

    store: Store
    _counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """Refusals since the row that was written."""
    _uncounted: int = 0

    async def note(self, caller: str, method: str, why: str, *, action: str) -> None:
        """Put one refusal on record; a store that fails changes nothing for the caller."""
        key = (caller, method, action)
        if key in self._counts:
            self._counts[key] += 1
            return
        if len(self._counts) >= MAX_ROWS:
            self._uncounted += 1
            return
        self._counts[key] = 0
        event(_log, logging.WARNING, EVENTS[action], method=method, caller=caller, why=why)
        await self._write(caller, method, action, "refused")

    async def run(self) -> None:
        """End a window every minute until cancelled, and one more then."""
        try:
            while True:
                await asyncio.sleep(WINDOW_SECONDS)
                await self.end_window()
        finally:
            await self.end_window()

    async def end_window(self) -> None:
        """Write how often each was refused again, and begin anew."""
        counts, self._counts = self._counts, {}
        uncounted, self._uncounted = self._uncounted, 0
        for (caller, method, action), count in counts.items():
            if count:
                await self._write(caller, method, action, f"refused {count} times more")
        if uncounted:
            more = f"refused {uncounted} times more"
            await self._write(EVERYBODY, "", "call.refuse", more)

    async def _write(self, caller: str, method: str, action: str, outcome: str) -> None:
        def work(repos: Repositories) -> None:
            repos.audit.add(action, method, outcome)

        try:
            await self.store.write(work, actor=caller)
        except SpiffeError as error:
            # The caller is refused in any case; the log has what the record lacks.
            event(_log, logging.ERROR, "refusal_not_recorded", caller=caller, exc_info=error)
