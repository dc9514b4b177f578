"""Registration entries in SQL (SPIRE API 5.1)."""

import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from issuer.store.events import EventKind, EventRepository
from issuer.store.rows import PAGE, PRUNE_ROWS, entry_of, entry_row, seconds
from issuer.store.tables import entries, gone_entries
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import AlreadyExistsError, NotFoundError
from spiffe_core.spiffeid import SpiffeId, TrustDomain


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
        row = self._connection.execute(_BY_ID, {"wanted": entry_id}).mappings().one_or_none()
        return None if row is None else entry_of(row)

    def create(self, entry: RegistrationEntry) -> RegistrationEntry:
        """
        Store a new entry and return it with its id, creation and revision.

        The revision is 0, unless an entry of this id was here before.

        Raises:
            SimilarEntryError: SPIFFE ID, parent and selectors are taken.
            AlreadyExistsError: the id is taken.
        """
        revision = self._gone_at(entry.id) + 1 if entry.id else 0
        made = replace(
            entry,
            id=entry.id or uuid7(),
            revision_number=revision,
            created_at=self._now.replace(microsecond=0),
        )
        row = entry_row(made)
        # The UNIQUE indexes decide, so that no race makes doubles as it does in SPIRE.
        if not self._connection.execute(_CREATE, row).rowcount:
            similar = self._similar(row["fingerprint"])
            if similar is not None:
                raise SimilarEntryError(similar)
            raise AlreadyExistsError(f"an entry with the ID {made.id} exists already")
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
        made = replace(
            entry, revision_number=before.revision_number + 1, created_at=before.created_at
        )
        row = entry_row(made)
        similar = self._similar(row["fingerprint"])
        if similar is not None and similar.id != entry.id:
            raise SimilarEntryError(similar)
        self._connection.execute(update(entries).where(entries.c.id == made.id).values(row))
        self._events.add(EventKind.ENTRY, made.id)
        return made

    def delete(self, entry_id: str) -> None:
        """
        Remove one entry.

        Raises:
            NotFoundError: no such entry.
        """
        revision = self._connection.execute(
            delete(entries).where(entries.c.id == entry_id).returning(entries.c.revision_number)
        ).scalar()
        if revision is None:
            raise NotFoundError("entry not found")
        went = {"revision_number": revision, "gone_at": seconds(self._now)}
        self._connection.execute(
            insert(gone_entries)
            .values(id=entry_id, **went)
            .on_conflict_do_update(index_elements=["id"], set_=went)
        )
        self._events.add(EventKind.ENTRY, entry_id)

    def page(
        self,
        after: int,
        limit: int,
        *,
        spiffe_id: SpiffeId | None = None,
        parent_id: SpiffeId | None = None,
    ) -> Sequence[tuple[int, RegistrationEntry]]:
        """Return up to *limit* entries behind row *after*, with their rows, oldest first."""
        wanted = select(entries).where(entries.c.row > after)
        if spiffe_id is not None:
            wanted = wanted.where(entries.c.spiffe_id == spiffe_id.uri)
        if parent_id is not None:
            wanted = wanted.where(entries.c.parent_id == parent_id.uri)
        rows = self._connection.execute(
            wanted.order_by(entries.c.row).limit(min(limit, PAGE))
        ).mappings()
        return [(row["row"], entry_of(row)) for row in rows]

    def below(self, parent_id: SpiffeId) -> list[RegistrationEntry]:
        """Return the entries whose parent is *parent_id*, oldest first."""
        found: list[RegistrationEntry] = []
        after = 0
        while page := self.page(after, PAGE, parent_id=parent_id):
            after = page[-1][0]
            found += (entry for _, entry in page)
        return found

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
        # A name holds no quote, so its quoted form is found where the name is an item of
        # the list and nowhere else; SQL narrows, the set decides (SEC-03).
        domain = TrustDomain(trust_domain)
        named = entries.c.federates_with.contains(f'"{domain}"', autoescape=True)
        found: list[RegistrationEntry] = []
        after = 0
        while rows := (
            self._connection.execute(
                select(entries)
                .where(entries.c.row > after, named)
                .order_by(entries.c.row)
                .limit(PAGE)
            )
            .mappings()
            .all()
        ):
            after = rows[-1]["row"]
            found += (entry_of(row) for row in rows)
        return [entry for entry in found if domain in entry.federates_with]

    def expired(self, before: datetime) -> list[str]:
        """Return the ids of entries that expired before *before*, a page of them."""
        old = entries.c.expires_at.between(1, seconds(before) - 1)  # 0 never expires
        return list(self._connection.scalars(select(entries.c.id).where(old).limit(PAGE)))

    def forget_gone(self, before: datetime) -> int:
        """Drop the memory of ids that went before *before*; return how many, of 5,000."""
        old = select(gone_entries.c.id).where(gone_entries.c.gone_at < seconds(before))
        done = delete(gone_entries).where(gone_entries.c.id.in_(old.limit(PRUNE_ROWS)))
        return self._connection.execute(done).rowcount

    def _gone_at(self, entry_id: str) -> int:
        """The last revision of an entry that had this id and is gone; -1 for none."""
        revision = self._connection.execute(
            select(gone_entries.c.revision_number).where(gone_entries.c.id == entry_id)
        ).scalar()
        return -1 if revision is None else revision

    def _similar(self, fingerprint: bytes) -> RegistrationEntry | None:
        found = self._connection.execute(_SIMILAR, {"wanted": fingerprint})
        row = found.mappings().one_or_none()
        return None if row is None else entry_of(row)


_BY_ID = select(entries).where(entries.c.id == bindparam("wanted"))
_SIMILAR = select(entries).where(entries.c.fingerprint == bindparam("wanted"))
# What breaks a UNIQUE rule is not inserted; PostgreSQL has the same words.
_CREATE = insert(entries).on_conflict_do_nothing()


def uuid7() -> str:
    """
    A version 7 UUID (RFC 9562 5.7): sortable by time, which keeps the index dense.

    Those of one process grow, within a millisecond too (6.2): the older of two entries is
    the default identity of whoever has both (WAPI-56).  For the writer's thread alone.
    """
    global _last
    value = (time.time_ns() // 1_000_000) << 74 | secrets.randbits(74)
    _last = max(value, _last + 1 + secrets.randbits(32))
    high, low = _last >> 62, _last & (1 << 62) - 1
    at, more = high >> 12, high & 0xFFF
    return str(uuid.UUID(int=at << 80 | 7 << 76 | more << 64 | 2 << 62 | low))


_last = 0
