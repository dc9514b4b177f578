"""Registration entries: what operators and controllers ask (SPIRE API 5.1)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TypeAlias

from issuer.services.hub import Hub
from issuer.services.paging import Fetch, Page, collect, count
from issuer.store.rows import PAGE
from issuer.store.store import Repositories, Store
from spiffe_core.entry import RegistrationEntry, check_entry_id
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.selector import SelectorSet, SetMatch
from spiffe_core.spiffeid import SpiffeId, TrustDomain

Change: TypeAlias = Callable[[RegistrationEntry], RegistrationEntry]


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries; everything given must hold."""

    spiffe_id: SpiffeId | None = None
    parent_id: SpiffeId | None = None
    selectors: tuple[SelectorSet, SetMatch] | None = None
    federates_with: tuple[frozenset[TrustDomain], SetMatch] | None = None
    hint: str = ""
    downstream: bool = False
    """True filters; False filters nothing, as SPIRE's own tools expect."""

    def rows_of(self, repos: Repositories) -> Fetch[RegistrationEntry]:
        """Reads the rows that can be wanted: SQL narrows by name, `keeps` decides."""
        return partial(repos.entries.page, spiffe_id=self.spiffe_id, parent_id=self.parent_id)

    def keeps(self, entry: RegistrationEntry) -> bool:
        """True when *entry* is wanted."""
        return (
            (self.spiffe_id is None or entry.spiffe_id == self.spiffe_id)
            and (self.parent_id is None or entry.parent_id == self.parent_id)
            and (
                self.selectors is None
                or self.selectors[1].holds(entry.selectors, self.selectors[0])
            )
            and (
                self.federates_with is None
                or self.federates_with[1].holds(entry.federates_with, self.federates_with[0])
            )
            and (not self.hint or entry.hint == self.hint)
            and (not self.downstream or entry.downstream)
        )


@dataclass(frozen=True)
class EntryService:
    """Reads and changes entries.  One per process, safe to share."""

    store: Store
    hub: Hub
    trust_domain: TrustDomain

    async def get(self, entry_id: str) -> RegistrationEntry:
        """
        Return one entry.

        Raises:
            MalformedError: no ID given.
            NotFoundError: no such entry.
        """
        if not entry_id:
            raise MalformedError("missing ID")
        return await self.store.read(lambda repos: repos.entries.get(entry_id))

    async def page(
        self, wanted: EntryFilter, page_size: int, token: str
    ) -> Page[RegistrationEntry]:
        """
        Return one page of the *wanted* entries.

        Raises:
            MalformedError: the token is not one of ours.
        """
        return await self.store.read(
            lambda repos: collect(wanted.rows_of(repos), wanted.keeps, page_size, token)
        )

    async def count(self, wanted: EntryFilter) -> int:
        """Return how many entries are *wanted*."""
        if wanted == EntryFilter():
            return await self.store.read(lambda repos: repos.entries.count())
        return await self.store.read(lambda repos: count(wanted.rows_of(repos), wanted.keeps))

    async def create(self, entry: RegistrationEntry, *, actor: str) -> RegistrationEntry:
        """
        Store one entry, durable when this returns.

        Raises:
            EntryError: a name is not ours to give out.
            SimilarEntryError: there is a similar one; the error holds it.
            InternalError: it federates with a trust domain whose bundle is not here.
        """
        entry.check_names(self.trust_domain)

        def work(repos: Repositories) -> RegistrationEntry:
            _check_federation(repos, entry)
            made = repos.entries.create(entry)
            repos.audit.add("entry.create", made.id)
            return made

        return await self.store.write(work, actor=actor)

    async def update(self, entry_id: str, change: Change, *, actor: str) -> RegistrationEntry:
        """
        Replace one entry by what *change* makes of it, durable when this returns.

        *change* runs inside the transaction, so that two who change different fields of one
        entry both get their way.

        Raises:
            EntryError: a name is not ours to give out.
            NotFoundError: no such entry.
            SimilarEntryError: it would become similar to another.
        """
        check_entry_id(entry_id)

        def work(repos: Repositories) -> RegistrationEntry:
            entry = replace(change(repos.entries.get(entry_id)), id=entry_id)
            entry.check_names(self.trust_domain)
            _check_federation(repos, entry)
            made = repos.entries.update(entry)
            repos.audit.add("entry.update", made.id)
            return made

        return await self.store.write(work, actor=actor)

    async def delete(self, entry_id: str, *, actor: str) -> None:
        """
        Remove one entry, durable when this returns.

        Raises:
            MalformedError: no ID given.
            NotFoundError: no such entry.
        """
        if not entry_id:
            raise MalformedError("missing entry ID")

        def work(repos: Repositories) -> None:
            repos.entries.delete(entry_id)
            repos.audit.add("entry.delete", entry_id)

        await self.store.write(work, actor=actor)

    def forget_expired(self, repos: Repositories, before: datetime) -> bool:
        """Remove entries that expired before *before*; True when there may be more."""
        found = repos.entries.expired(before)
        for entry_id in found:
            repos.entries.delete(entry_id)
            repos.audit.add("entry.expire", entry_id)
        return len(found) == PAGE


def _check_federation(repos: Repositories, entry: RegistrationEntry) -> None:
    for domain in sorted(entry.federates_with):
        if repos.bundles.find(domain) is None:
            raise InternalError(
                f'unable to find federated bundle "{domain.id}": '
                "set it first with `issuer bundle set`"
            )
