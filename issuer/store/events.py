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

from sqlalchemy import Connection, delete, func, insert, select

from issuer.store.rows import micros
from issuer.store.tables import audit, events


class EventKind(enum.Enum):
    """What changed; the event's key says which."""

    ENTRY = "entry"
    AGENT = "agent"
    BUNDLE = "bundle"
    """Key: a trust domain's name; our own when authorities changed."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change; *seq* grows without gaps that matter: SQLite has one writer."""

    seq: int
    kind: EventKind
    key: str
    committed_at_micros: int


class EventRepository:
    """The feed, within one transaction."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self.wrote = False

    def add(self, kind: EventKind, key: str) -> None:
        """Append one event."""
        self.wrote = True
        self._connection.execute(
            insert(events).values(kind=kind.value, key=key, committed_at=micros(self._now))
        )

    def since(self, seq: int, limit: int = 1000) -> Sequence[Event]:
        """Return up to *limit* events after *seq*, in order."""
        rows = self._connection.execute(
            select(events).where(events.c.seq > seq).order_by(events.c.seq).limit(limit)
        )
        return [Event(row.seq, EventKind(row.kind), row.key, row.committed_at) for row in rows]

    def last(self) -> int:
        """Return the newest sequence number, 0 when there is none."""
        return self._connection.execute(select(func.max(events.c.seq))).scalar() or 0

    def first(self) -> int:
        """Return the oldest sequence number kept, 0 when there is none."""
        return self._connection.execute(select(func.min(events.c.seq))).scalar() or 0

    def prune(self, before: datetime) -> int:
        """Drop events older than *before*, the newest excepted; return how many."""
        kept = self.last()
        done = self._connection.execute(
            delete(events).where(events.c.committed_at < micros(before), events.c.seq < kept)
        )
        return done.rowcount


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
    """The audit trail, within one transaction; rows are chained by hash."""

    def __init__(self, connection: Connection, now: datetime, actor: str) -> None:
        self._connection = connection
        self._now = now
        self._actor = actor

    def add(self, action: str, target: str, outcome: str = "done") -> None:
        """Append one row."""
        previous = self._connection.execute(
            select(audit.c.chain).order_by(audit.c.seq.desc()).limit(1)
        ).scalar()
        at = micros(self._now)
        self._connection.execute(
            insert(audit).values(
                at=at,
                actor=self._actor,
                action=action,
                target=target,
                outcome=outcome,
                chain=_link(previous or b"", at, self._actor, action, target, outcome),
            )
        )

    def rows(self, after: int = 0, limit: int = 1000) -> Sequence[AuditRow]:
        """Return up to *limit* rows after *after*, in order."""
        found = self._connection.execute(
            select(audit).where(audit.c.seq > after).order_by(audit.c.seq).limit(limit)
        )
        return [AuditRow(r.seq, r.at, r.actor, r.action, r.target, r.outcome) for r in found]

    def broken_at(self) -> int | None:
        """Return the sequence number of the first row that does not fit its chain."""
        previous = b""
        for row in self._connection.execute(select(audit).order_by(audit.c.seq)):
            wanted = _link(previous, row.at, row.actor, row.action, row.target, row.outcome)
            if row.chain != wanted:
                return int(row.seq)
            previous = row.chain
        return None


def _link(previous: bytes, *facts: object) -> bytes:
    return hashlib.sha256(previous + json.dumps(facts).encode()).digest()
