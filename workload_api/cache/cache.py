"""
What this agent can serve: entries, SVIDs and bundles, and who waits for changes of them.

Source: architecture A2, A8, A14; SEC-47.  SVIDs are held as DER, not as objects.  A change
wakes those whom it concerns: on a node with a thousand streams the others do not even look.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.decision import Decision, decide
from spiffe_core.entry import RegistrationEntry
from spiffe_core.lifetime import Validity
from spiffe_core.selector import SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.logs import event
from workload_api.cache.index import SelectorIndex

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldSvid:
    """An X509-SVID and its key, for one revision of one entry."""

    spiffe_id: SpiffeId
    revision_number: int
    chain: tuple[bytes, ...] = field(repr=False)
    key: bytes = field(repr=False)
    """PKCS#8 DER."""
    validity: Validity
    serial_number: int
    authority_id: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An entry that a process matches, with the SVID that is good now."""

    entry: RegistrationEntry
    svid: HeldSvid


@dataclass(frozen=True, slots=True)
class View:
    """What one process gets at one moment."""

    decision: Decision
    identities: tuple[Identity, ...]
    missing: tuple[RegistrationEntry, ...]
    """Matched, and not signed yet."""
    bundles: BundleSet
    """Our own, and those that the matched entries federate with."""

    @property
    def identity_key(self) -> tuple[object, ...]:
        """Equal for views whose identities are the same."""
        return tuple(
            (one.entry.id, one.svid.serial_number, one.entry.hint) for one in self.identities
        )

    @property
    def bundle_key(self) -> tuple[object, ...]:
        """Equal for views whose bundles are the same, for as long as one of them lives."""
        return tuple((name, id(bundle)) for name, bundle in self.bundles.items())

    @property
    def ends_at(self) -> datetime | None:
        """When the next of the matched entries expires; None for never."""
        ends = [one.expires_at for one in self.decision.matched if one.expires_at is not None]
        return min(ends, default=None)


@dataclass(frozen=True, slots=True)
class Change:
    """Whom a change concerns: processes that match one of *entries*, or everybody."""

    entries: tuple[RegistrationEntry, ...] = ()
    """As they are now, and as they were before."""
    everybody: bool = False

    def __bool__(self) -> bool:
        return self.everybody or bool(self.entries)


EVERYBODY: Final = Change(everybody=True)
MAX_COMPARISONS: Final = 20_000
"""Entries times waiters; beyond it, looking who is concerned costs more than waking all."""


@dataclass(eq=False, slots=True)
class Waiter:
    """Latest-only: however much changed, one who is slow looks once."""

    selectors: SelectorSet | None = None
    """What was learnt of who waits; None: not known yet, so that everything concerns it."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _committed_at_micros: int = 0

    def wake(self, committed_at_micros: int = 0) -> None:
        """Something changed; the oldest commit that is not taken yet counts."""
        if not self._changed.is_set():
            self._committed_at_micros = committed_at_micros
            self._changed.set()

    async def wait(self) -> int:
        """Return when the change was committed, Unix microseconds, 0 when unknown."""
        await self._changed.wait()
        self._changed.clear()
        return self._committed_at_micros

    def is_concerned(self, entries: Iterable[RegistrationEntry]) -> bool:
        """True when who waits matches one of *entries*."""
        known = self.selectors
        return known is None or any(entry.selectors <= known for entry in entries)


class WorkloadCache:
    """For one event loop, not for threads."""

    def __init__(self, trust_domain: TrustDomain) -> None:
        self.trust_domain = trust_domain
        self.index = SelectorIndex()
        self.bundles: dict[TrustDomain, Bundle] = {}
        self.svids: dict[str, HeldSvid] = {}
        self.ready = False
        """True once there is something to serve from: a sync, or a file of an earlier life."""
        self._waiters: set[Waiter] = set()

    def view(self, selectors: SelectorSet, partial: Mapping[str, str], at: datetime) -> View:
        """Return what a process with *selectors* gets at the instant *at*."""
        decision = decide(selectors, self.index.candidates(selectors), at=at, partial=partial)
        identities, missing = [], []
        for entry in decision.matched:
            svid = self.svids.get(entry.id)
            # An SVID of an earlier revision serves until the next one is signed, but never
            # under another name, and never beyond its end (SEC-106).
            if svid and svid.spiffe_id == entry.spiffe_id and at <= svid.validity.not_after:
                identities.append(Identity(entry, svid))
            else:
                missing.append(entry)
        names = [self.trust_domain]
        for entry in decision.matched:
            names += sorted(entry.federates_with)
        bundles = {name: self.bundles[name] for name in names if name in self.bundles}
        return View(decision, tuple(identities), tuple(missing), BundleSet(bundles))

    def explain(
        self, selectors: SelectorSet, partial: Mapping[str, str], at: datetime
    ) -> Decision:
        """Decide over every entry, so that near misses are found too."""
        return decide(selectors, self.index.all(), at=at, partial=partial)

    def apply(
        self,
        *,
        snapshot: bool,
        entries: Iterable[RegistrationEntry] = (),
        removed: Iterable[str] = (),
        bundles: Iterable[Bundle] = (),
        removed_domains: Iterable[TrustDomain] = (),
        unread_domains: Iterable[TrustDomain] = (),
    ) -> Change:
        """
        Take over what the server said, and return whom it concerns; nobody is woken yet.

        *unread_domains* are those whose bundle came and broke a rule: the last good one is
        kept (IOP-26).
        """
        if snapshot:
            entries, bundles = list(entries), list(bundles)
            keep = {entry.id for entry in entries}
            removed = [entry.id for entry in self.index.all() if entry.id not in keep]
            names = {bundle.trust_domain for bundle in bundles} | set(unread_domains)
            removed_domains = [name for name in self.bundles if name not in names]
        concerned: list[RegistrationEntry] = []
        for entry in entries:
            concerned += self._put(entry)
        for entry_id in list(removed):
            concerned += self._drop(entry_id)
        everybody = False
        for bundle in bundles:
            everybody |= self._put_bundle(bundle)
        for name in list(removed_domains):
            if name != self.trust_domain:  # without it the server could not be known again
                everybody |= self.bundles.pop(name, None) is not None
        self.ready = self.ready or snapshot
        return Change(tuple(concerned), everybody)

    def _put(self, entry: RegistrationEntry) -> list[RegistrationEntry]:
        before = self.index.get(entry.id)
        if before == entry:
            return []
        if before is not None and before.created_at != entry.created_at:
            # Another entry under the same ID: what was signed for the old one is not its own.
            self.svids.pop(entry.id, None)
        self.index.put(entry)
        return [entry] if before is None else [before, entry]

    def _drop(self, entry_id: str) -> list[RegistrationEntry]:
        before = self.index.get(entry_id)
        self.index.drop(entry_id)
        self.svids.pop(entry_id, None)
        return [] if before is None else [before]

    def _put_bundle(self, bundle: Bundle) -> bool:
        before = self.bundles.get(bundle.trust_domain)
        if before == bundle:
            return False
        if bundle.trust_domain == self.trust_domain and not bundle.x509_authorities:
            event(_log, logging.ERROR, "own_bundle_empty", kept=before is not None)
            if before is not None:  # nobody could be known by an empty one, the server least
                return False
        self.bundles[bundle.trust_domain] = bundle
        return True

    def own_bundles(self) -> BundleSet:
        """Our own trust domain's bundle alone: what the server is verified with."""
        own = self.bundles.get(self.trust_domain)
        return BundleSet.of([own] if own else [])

    def wipe(self) -> None:
        """Forget everything: this agent was banned."""
        self.index.clear()
        self.svids.clear()
        self.bundles.clear()
        self.ready = False
        self.wake(EVERYBODY)

    def wake(self, change: Change, committed_at_micros: int = 0) -> None:
        """Tell those whom *change* concerns to look again."""
        if not change:
            return
        everybody = (
            change.everybody or len(change.entries) * len(self._waiters) > MAX_COMPARISONS
        )
        for waiter in self._waiters:
            if everybody or waiter.is_concerned(change.entries):
                waiter.wake(committed_at_micros)

    @contextmanager
    def waiter(self) -> Iterator[Waiter]:
        """Be woken while entered by every change that concerns the waiter."""
        waiter = Waiter()
        self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            self._waiters.discard(waiter)

    @property
    def streams(self) -> int:
        """How many streams wait for changes."""
        return len(self._waiters)
