"""What a server has on its disk, read straight from the database and the key folder."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ca.journal import AuthorityRecord, AuthorityState
from issuer.store.agents import AgentRepository
from issuer.store.authorities import AuthorityRepository
from issuer.store.engine import make_engine
from issuer.store.entries import EntryRepository
from issuer.store.events import AuditRepository, AuditRow, EventRepository
from spiffe_core.agent import AttestedAgent
from spiffe_core.entry import RegistrationEntry


@dataclass(frozen=True)
class Records:
    """Everything durable, at one moment."""

    entries: dict[str, RegistrationEntry]
    agents: dict[str, AttestedAgent]
    authorities: tuple[AuthorityRecord, ...]
    audit: list[AuditRow]
    audit_broken_at: int | None
    events: list[tuple[int, str, str]]
    issued: frozenset[str]
    """Serial numbers and ``jti``."""
    damage: str
    """SQLite's own verdict, ``ok`` when there is none."""
    keys: frozenset[str]
    """Names of the files in the key folder, hidden ones too."""

    def audited(self, action: str, target: str) -> int:
        """How many audit rows say that *action* was done to *target*."""
        return sum(
            (row.action, row.target, row.outcome) == (action, target, "done")
            for row in self.audit
        )

    def check(self) -> None:
        """Assert what holds whenever the process is killed: nothing is half done."""
        assert self.damage == "ok"
        assert self.audit_broken_at is None, "SEC-91: the audit chain is whole"
        numbers = [seq for seq, _, _ in self.events]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else 1
        self._check_entries()
        self._check_authorities()
        for agent in self.agents.values():
            assert self.audited("agent.attest", agent.id.uri), agent

    def _check_entries(self) -> None:
        """The table, the trail and the feed tell of the same changes."""
        there: set[str] = set()
        changes: dict[str, int] = {}
        for row in self.audit:
            if row.action.startswith("entry.") and row.outcome == "done":
                changes[row.target] = changes.get(row.target, 0) + 1
                (there.discard if row.action == "entry.delete" else there.add)(row.target)
        assert there == set(self.entries)
        fed: dict[str, int] = {}
        for _, kind, key in self.events:
            if kind == "entry":
                fed[key] = fed.get(key, 0) + 1
        assert fed == changes

    def _check_authorities(self) -> None:
        wanted = {one.key_id for one in self.authorities}
        assert {name.split(".")[0] for name in self.keys} == wanted, "no key without a record"
        active = [one.kind for one in self.authorities if one.state is AuthorityState.ACTIVE]
        assert len(active) == len(set(active)) == 2


def records(data_dir: Path) -> Records:
    """Read what the server at *data_dir*, which may run, has made durable."""
    database = data_dir / "issuer.db"
    now = datetime.now(UTC)
    engine = make_engine(database, readers=True)
    try:
        with engine.connect() as connection:
            events = EventRepository(connection, now)
            audit = AuditRepository(connection, now, "test")
            return Records(
                {one.id: one for one in EntryRepository(connection, events, now).all()},
                {one.id.uri: one for one in AgentRepository(connection, events).all()},
                AuthorityRepository(connection, events).all(),
                _all(audit),
                audit.broken_at(),
                [
                    tuple(row)
                    for row in connection.exec_driver_sql(
                        "SELECT seq, kind, key FROM events ORDER BY seq"
                    )
                ],
                frozenset(connection.exec_driver_sql("SELECT serial FROM issued").scalars()),
                str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()),
                frozenset(one.name for one in (data_dir / "keys").iterdir()),
            )
    finally:
        engine.dispose()


def _all(audit: AuditRepository) -> list[AuditRow]:
    found: list[AuditRow] = []
    while rows := audit.rows(found[-1].seq if found else 0):
        found += rows
    return found


@contextlib.contextmanager
def raw(data_dir: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the database file itself; changes are committed at the end."""
    with contextlib.closing(sqlite3.connect(data_dir / "issuer.db")) as connection:
        yield connection
        connection.commit()
