"""
What this agent can serve: entries, SVIDs and bundles, and who waits for changes of them.

Source: architecture A8, A14.  SVIDs are held as DER, not as objects.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.decision import Decision, decide
from spiffe_core.entry import RegistrationEntry
from spiffe_core.lifetime import Validity
from spiffe_core.selector import SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from workload_api.cache.index import SelectorIndex


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
    def key(self) -> tuple[object, ...]:
        """Equal for views that make equal responses."""
        return (
            tuple(
                (one.entry.id, one.svid.serial_number, one.entry.hint)
                for one in self.identities
            ),
            tuple((name, id(bundle)) for name, bundle in self.bundles.items()),
        )


@dataclass(eq=False, slots=True)
class Waiter:
    """Latest-only: however much changed, one who is slow looks once."""

    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _committed_at_micros: int = 0

    def wake(self, committed_at_micros: int) -> None:
        """Something changed; the oldest commit that is not taken yet counts."""
        if not self._changed.is_set():
            self._committed_at_micros = committed_at_micros
            self._changed.set()

    async def wait(self) -> int:
        """Return when the change was committed, Unix microseconds, 0 when unknown."""
        await self._changed.wait()
        self._changed.clear()
        return self._committed_at_micros


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
    ) -> None:
        """Take over what the server said; nobody is woken yet."""
        if snapshot:
            entries, bundles = list(entries), list(bundles)
            keep = {entry.id for entry in entries}
            removed = [entry.id for entry in self.index.all() if entry.id not in keep]
            names = {bundle.trust_domain for bundle in bundles}
            removed_domains = [name for name in self.bundles if name not in names]
        for entry in entries:
            self.index.put(entry)
        for entry_id in list(removed):
            self.index.drop(entry_id)
            self.svids.pop(entry_id, None)
        for bundle in bundles:
            if self.bundles.get(bundle.trust_domain) != bundle:
                self.bundles[bundle.trust_domain] = bundle
        for name in list(removed_domains):
            self.bundles.pop(name, None)
        self.ready = self.ready or snapshot

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
        self.wake(0)

    def wake(self, committed_at_micros: int) -> None:
        """Tell everybody who waits to look again."""
        for waiter in self._waiters:
            waiter.wake(committed_at_micros)

    @contextmanager
    def waiter(self) -> Iterator[Waiter]:
        """Be woken by every change while entered."""
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
