"""
The change feed: every change writes its event in its own transaction (architecture A2).

Also the audit trail, which is written in the same place for the same reason (SEC-91).
"""

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from issuer.store.rows import PAGE, PRUNE_ROWS, StoredValueError, micros
from issuer.store.tables import audit, events
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import AbortedError


class EventKind(enum.Enum):
    """What changed; the event's key says which."""

    ENTRY = "entry"
    AGENT = "agent"
    BUNDLE = "bundle"
    """Key: a trust domain's name; our own when authorities changed."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change; *seq* grows by one, with no hole: SQLite has one writer."""

    seq: int
    kind: EventKind
    key: str
    committed_at_micros: int


class FeedGapError(AbortedError):
    """Events behind a cursor are gone, or it is from another past: read everything again."""


class EventRepository:
    """The feed, within one transaction; what is added is written when the work is done."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self._pending: dict[tuple[str, str], None] = {}
        self.wrote = False

    def add(self, kind: EventKind, key: str) -> None:
        """Append one event; the same one twice in a transaction counts once."""
        self._pending[kind.value, key] = None

    def flush(self) -> None:
        """Write what was added; the store does it before each commit."""
        if self._pending:
            at = micros(self._now)
            rows = [{"kind": k, "key": key, "committed_at": at} for k, key in self._pending]
            self._connection.execute(_ADD_EVENT, rows)
            crash_point("event.appended")
            self._pending.clear()
            self.wrote = True

    def since(self, seq: int, limit: int = 1000) -> Sequence[Event]:
        """
        Return up to *limit* events after *seq*, in order, none left out.

        Raises:
            FeedGapError: some of them were pruned, or *seq* is ahead of the feed.
        """
        self.flush()
        rows = self._connection.execute(_SINCE, {"after": seq, "most": limit}).all()
        # One writer draws the numbers and rolls them back with the rows: they have no holes.
        if rows[0].seq != seq + 1 if rows else seq > self.last():
            raise FeedGapError("the change feed does not reach back that far")
        return [_event_of(row) for row in rows]

    def last(self) -> int:
        """Return the newest sequence number, 0 when there is none."""
        self.flush()
        return self._connection.execute(_LAST_EVENT).scalar() or 0

    def first(self) -> int:
        """Return the oldest sequence number kept, 0 when there is none."""
        return self._connection.execute(select(func.min(events.c.seq))).scalar() or 0

    def prune(self, before: datetime) -> int:
        """Drop the oldest events before *before*, not the newest; return how many, of 5,000."""
        # By number, so that no hole is left where a clock was set back.
        keep_from = self._connection.execute(
            select(events.c.seq)
            .where(events.c.committed_at >= micros(before))
            .order_by(events.c.seq)
            .limit(1)
        ).scalar()
        until = min(self.last() if keep_from is None else keep_from, self.first() + PRUNE_ROWS)
        done = self._connection.execute(delete(events).where(events.c.seq < until))
        return done.rowcount


def _event_of(row: Any) -> Event:
    try:
        return Event(row.seq, EventKind(row.kind), row.key, row.committed_at)
    except ValueError as error:
        raise StoredValueError("a stored event is damaged: restore the database") from error


_ADD_EVENT = insert(events)
_SINCE = (
    select(events)
    .where(events.c.seq > bindparam("after"))
    .order_by(events.c.seq)
    .limit(bindparam("most"))
)
_LAST_EVENT = select(func.max(events.c.seq))


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Who did what to what, and how it ended."""

    seq: int
    at_micros: int
    actor: str
    action: str
    target: str
    outcome: str


class AuditRepository:
    """The audit trail, within one transaction; rows are chained by hash (SEC-63)."""

    def __init__(self, connection: Connection, now: datetime, actor: str) -> None:
        self._connection = connection
        self._now = now
        self._actor = actor
        self._pending: list[tuple[str, str, str]] = []

    def add(self, action: str, target: str, outcome: str = "done") -> None:
        """Append one row; it is written when the work is done."""
        self._pending.append((action, target, outcome))

    def flush(self) -> None:
        """Write what was added; the store does it before each commit."""
        if not self._pending:
            return
        chain = self._connection.execute(_HEAD).scalar() or b""
        at = micros(self._now)
        rows = []
        for facts in self._pending:
            chain = _link(chain, at, self._actor, *facts)
            action, target, outcome = facts
            rows.append(
                {
                    "at": at,
                    "actor": self._actor,
                    "action": action,
                    "target": target,
                    "outcome": outcome,
                    "chain": chain,
                }
            )
        crash_point("audit.before_append")
        self._connection.execute(_ADD_AUDIT, rows)
        crash_point("audit.appended")
        self._pending.clear()

    def rows(self, after: int = 0, limit: int = 1000) -> Sequence[AuditRow]:
        """Return up to *limit* rows after *after*, in order."""
        self.flush()
        found = self._connection.execute(
            select(audit)
            .where(audit.c.seq > after)
            .order_by(audit.c.seq)
            .limit(min(limit, PAGE))
        )
        return [AuditRow(r.seq, r.at, r.actor, r.action, r.target, r.outcome) for r in found]

    def broken_at(self) -> int | None:
        """Return the sequence number of the first row that does not fit its chain."""
        chain, after = b"", 0
        while True:
            rows = self._connection.execute(
                select(audit).where(audit.c.seq > after).order_by(audit.c.seq).limit(PAGE)
            ).all()
            if not rows:
                return None
            for row in rows:
                wanted = _link(chain, row.at, row.actor, row.action, row.target, row.outcome)
                if row.seq != after + 1 or row.chain != wanted:
                    return int(row.seq)
                chain, after = wanted, row.seq


_ADD_AUDIT = insert(audit)
_HEAD = select(audit.c.chain).order_by(audit.c.seq.desc()).limit(1)


def _link(previous: bytes, *facts: object) -> bytes:
    return hashlib.sha256(previous + json.dumps(facts).encode()).digest()
