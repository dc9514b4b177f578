"""Registration entries in SQL (SPIRE API 5.1)."""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update

from issuer.store.events import EventKind, EventRepository
from issuer.store.rows import entry_of, entry_row
from issuer.store.tables import entries
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import AlreadyExistsError, NotFoundError

PAGE: Final = 1000  # rows a statement (SEC-62)


class SimilarEntryError(AlreadyExistsError):
    """An entry with the same SPIFFE ID, parent and selectors is there; *existing* is it."""

    def __init__(self, existing: RegistrationEntry) -> None:
        super().__init__("similar entry already exists")
        self.existing = existing


class EntryRepository:
    """
    Registration entries, domain values in and out.

    Lives for one transaction and never commits: `Store.write` does, so that a change and its
    event are kept or lost together.
    """

    def __init__(self, connection: Connection, events: EventRepository, now: datetime) -> None:
        self._connection = connection
        self._events = events
        self._now = now

    def get(self, entry_id: str) -> RegistrationEntry:
        """
        Return one entry.

        Raises:
            NotFoundError: no such entry.
        """
        found = self.find(entry_id)
        if found is None:
            raise NotFoundError("entry not found")
        return found

    def find(self, entry_id: str) -> RegistrationEntry | None:
        """Return one entry, or None."""
        row = self._connection.execute(
            select(entries).where(entries.c.id == entry_id)
        ).mappings()
        found = row.one_or_none()
        return None if found is None else entry_of(found)

    def create(self, entry: RegistrationEntry) -> RegistrationEntry:
        """
        Store a new entry and return it with its id, creation and revision 0.

        Raises:
            SimilarEntryError: SPIFFE ID, parent and selectors are taken.
            AlreadyExistsError: the id is taken.
        """
        similar = self._similar(entry)
        if similar is not None:
            raise SimilarEntryError(similar)
        made = replace(
            entry,
            id=entry.id or uuid7(),
            revision_number=0,
            created_at=self._now.replace(microsecond=0),
        )
        if self.find(made.id) is not None:
            raise AlreadyExistsError(f"an entry with the ID {made.id} exists already")
        self._connection.execute(insert(entries).values(entry_row(made)))
        self._events.add(EventKind.ENTRY, made.id)
        return made

    def update(self, entry: RegistrationEntry) -> RegistrationEntry:
        """
        Replace the entry with the same id; the revision grows whatever changed.

        Raises:
            NotFoundError: no such entry.
            SimilarEntryError: it would become similar to another.
        """
        before = self.get(entry.id)
        similar = self._similar(entry)
        if similar is not None and similar.id != entry.id:
            raise SimilarEntryError(similar)
        made = replace(
            entry, revision_number=before.revision_number + 1, created_at=before.created_at
        )
        self._connection.execute(
            update(entries).where(entries.c.id == made.id).values(entry_row(made))
        )
        self._events.add(EventKind.ENTRY, made.id)
        return made

    def delete(self, entry_id: str) -> None:
        """
        Remove one entry.

        Raises:
            NotFoundError: no such entry.
        """
        if not self._connection.execute(
            delete(entries).where(entries.c.id == entry_id)
        ).rowcount:
            raise NotFoundError("entry not found")
        self._events.add(EventKind.ENTRY, entry_id)

    def page(self, after: int, limit: int) -> Sequence[tuple[int, RegistrationEntry]]:
        """Return up to *limit* entries behind row *after*, with their rows, oldest first."""
        rows = self._connection.execute(
            select(entries)
            .where(entries.c.row > after)
            .order_by(entries.c.row)
            .limit(min(limit, PAGE))
        ).mappings()
        return [(row["row"], entry_of(row)) for row in rows]

    def all(self) -> Iterator[RegistrationEntry]:
        """Yield every entry, oldest first, a page at a time."""
        after = 0
        while found := self.page(after, PAGE):
            after = found[-1][0]
            yield from (entry for _, entry in found)

    def count(self) -> int:
        """Return how many there are."""
        return self._connection.execute(select(func.count()).select_from(entries)).scalar_one()

    def federating_with(self, trust_domain: str) -> list[RegistrationEntry]:
        """Return the entries that federate with *trust_domain*."""
        return [
            entry
            for entry in self.all()
            if any(one.name == trust_domain for one in entry.federates_with)
        ]

    def _similar(self, entry: RegistrationEntry) -> RegistrationEntry | None:
        row = self._connection.execute(
            select(entries).where(entries.c.fingerprint == entry.fingerprint)
        ).mappings()
        found = row.one_or_none()
        return None if found is None else entry_of(found)


def uuid7() -> str:
    """A version 7 UUID: sortable by time, which keeps the index dense."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(uuid.UUID(int=value))
