"""
Refusals on record (SEC-91), without anybody being able to fill the record with them.

The first of a caller, of one thing, is written at once; those that follow within the minute
are counted, and the count is written at its end.  However many ask, a minute has a bounded
number of rows of each sort: strangers could else write as fast as they can call.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from issuer.store.store import Repositories, Store
from spiffe_core.errors import SpiffeError
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
WINDOW_SECONDS: Final = 60.0
MAX_ROWS: Final = 256  # a window and action, for all callers together
EVERYBODY: Final = "(many)"
EVENTS: Final = {
    "call.refuse": "call_refused",
    "agent.superseded": "superseded_serial_used",
    "agent.attest": "attestation_refused",
    "svid.pod_refused": "svid_of_foreign_pod_refused",
}
"""What is logged for each action that is put on record."""


@dataclass
class RefusalLog:
    """One for the process; `run` ends each window."""

    store: Store
    _counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """For each caller, target and action: refusals since the row that was written."""
    _rows: Counter[str] = field(default_factory=Counter)
    _uncounted: Counter[str] = field(default_factory=Counter)

    async def note(self, caller: str, target: str, why: str, *, action: str) -> None:
        """Put one refusal on record; a store that fails changes nothing for the caller."""
        key = (caller, target, action)
        if key in self._counts:
            self._counts[key] += 1
            return
        if self._rows[action] >= MAX_ROWS:
            self._uncounted[action] += 1
            return
        self._rows[action] += 1
        self._counts[key] = 0
        event(_log, logging.WARNING, EVENTS[action], target=target, caller=caller, why=why)
        await self._write(caller, target, action, "refused")

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
        uncounted, self._uncounted = self._uncounted, Counter()
        self._rows.clear()
        for (caller, target, action), count in counts.items():
            if count:
                await self._write(caller, target, action, f"refused {count} times more")
        for action, count in uncounted.items():
            await self._write(EVERYBODY, "", action, f"refused {count} times more")

    async def _write(self, caller: str, target: str, action: str, outcome: str) -> None:
        def work(repos: Repositories) -> None:
            repos.audit.add(action, target, outcome)

        try:
            await self.store.write(work, actor=caller)
        except SpiffeError as error:
            # The caller is refused in any case; the log has what the record lacks.
            event(_log, logging.ERROR, "refusal_not_recorded", caller=caller, exc_info=error)
