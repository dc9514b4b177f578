"""
What the server knows, in memory, kept right from the event feed (architecture A2).

Every change of state comes in here after its commit, is folded into the index, and wakes
those whom it may concern.
"""

import asyncio
import gc
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509

from issuer.authorized import AuthorizedIndex
from issuer.store.events import Event, EventKind, FeedGapError
from issuer.store.store import Repositories, Store
from spiffe_core.agent import AttestedAgent
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import DeadlineError, NotReadyError
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.logs import event as log_event

_log = logging.getLogger(__name__)
CATCH_UP_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 1.0


@dataclass(eq=False, slots=True)
class Waiter:
    """One who waits for changes: only that something changed, and since when."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    committed_at_micros: int = 0

    def wake(self, committed_at_micros: int) -> None:
        """Note a change; the oldest one not yet taken counts."""
        if not self.changed.is_set():
            self.committed_at_micros = committed_at_micros
            self.changed.set()

    async def wait(self) -> int:
        """Return when the oldest change since the last call was committed, microseconds."""
        await self.changed.wait()
        self.changed.clear()
        return self.committed_at_micros


@dataclass(frozen=True, slots=True)
class HeldBundle:
    """A bundle, and 32 bytes that name its content."""

    bundle: Bundle
    mark: bytes

    @classmethod
    def of(cls, bundle: Bundle) -> "HeldBundle":
        """Name *bundle* by everything that an agent is told of it."""
        facts = (
            bundle.trust_domain.name, bundle.sequence_number, bundle.refresh_hint,
            [(one.der, one.tainted) for one in bundle.x509_authorities],
            [(one.key_id, one.public_key, one.expires_at, one.tainted)
             for one in bundle.jwt_authorities],
        )  # fmt: skip
        return cls(bundle, hashlib.sha256(repr(facts).encode()).digest())


class Hub:
    """The index, the bundles, and those who wait; one for the process."""

    def __init__(self, store: Store, trust_domain: TrustDomain) -> None:
        self.index = AuthorizedIndex(trust_domain)
        self.trust_domain = trust_domain
        self.seq = 0
        self.bundles_version = 0
        """Grows with every change of any bundle."""
        self.authority_keys: frozenset[bytes] = frozenset()
        """SubjectPublicKeyInfo of every authority in our own bundle."""
        self.watchers = 0
        """How many wait for changes."""
        self.problem = ""
        """Why changes are not heard just now; empty when they are."""
        self._is_stopping = False
        self._store = store
        self._bundles: dict[TrustDomain, HeldBundle] = {}
        self._waiters: dict[SpiffeId, set[Waiter]] = {}
        self._folded = asyncio.Condition()

    @property
    def bundle(self) -> Bundle:
        """
        Our own trust domain's bundle.

        Raises:
            NotReadyError: not loaded yet.
        """
        held = self._bundles.get(self.trust_domain)
        if held is None:
            raise NotReadyError("the server is starting")
        return held.bundle

    def held_bundle(self, trust_domain: TrustDomain) -> HeldBundle | None:
        """Return our own or a foreign bundle with its mark, or None."""
        return self._bundles.get(trust_domain)

    def own_roots(self) -> BundleSet:
        """What callers are verified with: our own trust domain's bundle alone (SEC-11)."""
        return BundleSet.of([self.bundle])

    async def hydrate(self) -> None:
        """
        Load everything anew; the collector rests meanwhile, then forgets what it saw.

        Raises:
            NotReadyError: the store cannot be read just now; nothing was replaced.
        """

        def load(
            repos: Repositories,
        ) -> tuple[int, list[RegistrationEntry], list[AttestedAgent], list[Bundle]]:
            seq = repos.events.last()  # first: what comes later is folded again, harmlessly
            bundles = [repos.authorities.bundle(), *repos.bundles.all()]
            return seq, list(repos.entries.all()), list(repos.agents.all()), bundles

        index = AuthorizedIndex(self.trust_domain)
        gc.disable()
        try:
            seq, entries, agents, bundles = await self._store.read(load)
            for number, entry in enumerate(entries):
                index.put_entry(entry)
                if number % 100 == 99:
                    await asyncio.sleep(0)
            for agent in agents:
                index.put_agent(agent)
        finally:
            gc.enable()
            gc.collect()
            gc.freeze()
        self.index = index
        self._bundles = {}
        self._hold({bundle.trust_domain: bundle for bundle in bundles})
        await self._reached(seq)
        self._wake(self._waiters, 0)

    async def run(self) -> None:
        """
        Fold changes until cancelled; a store that is away is asked again.

        Raises:
            StoreError: the store failed for good, so bans would not be heard of any more.
        """
        has_gap = False
        while True:
            try:
                if has_gap:
                    await self.hydrate()
                    has_gap = False
                if self.problem:
                    await self._store.read(lambda repos: repos.events.last())
                    self.problem = ""
                async for events in self._store.changes(self.seq):
                    await self._fold(events)
            except FeedGapError as error:
                # Another process took the database back in time, or we slept for a day.
                has_gap = True
                log_event(_log, logging.WARNING, "change_feed_gap", exc_info=error)
            except (NotReadyError, DeadlineError) as error:
                self.problem = f"changes are not heard: {error}"
                log_event(_log, logging.ERROR, "change_feed_away", exc_info=error)
                await asyncio.sleep(RETRY_SECONDS)

    async def caught_up(self, seq: int) -> None:
        """
        Return once every event up to *seq* is folded in.

        Raises:
            NotReadyError: that takes too long; what was changed is stored all the same.
        """
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS), self._folded:
                await self._folded.wait_for(lambda: self.seq >= seq)
        except TimeoutError:
            raise NotReadyError("the server has not heard of its own change yet") from None

    @contextmanager
    def waiter(self, agent_id: SpiffeId) -> Iterator[Waiter]:
        """Be woken by every change that may concern *agent_id* while entered."""
        waiter = Waiter()
        waiters = self._waiters.setdefault(agent_id, set())
        waiters.add(waiter)
        self.watchers += 1
        try:
            yield waiter
        finally:
            self.watchers -= 1
            waiters.discard(waiter)
            if not waiters and self._waiters.get(agent_id) is waiters:
                del self._waiters[agent_id]

    def stop(self) -> None:
        """Have those who wait end their streams (SEC-108)."""
        self._is_stopping = True
        self._wake(self._waiters, 0)

    def check_running(self) -> None:
        """
        See that nobody begins to wait, or goes on, while the server stops.

        Raises:
            NotReadyError: it does; there may be another one, or the next.
        """
        if self._is_stopping:
            raise NotReadyError("the server is stopping")

    async def _fold(self, found: Sequence[Event]) -> None:
        entry_ids = {one.key for one in found if one.kind is EventKind.ENTRY}
        agent_ids = {SpiffeId.parse(one.key) for one in found if one.kind is EventKind.AGENT}
        domains = {TrustDomain(one.key) for one in found if one.kind is EventKind.BUNDLE}

        def load(
            repos: Repositories,
        ) -> tuple[
            dict[str, RegistrationEntry | None],
            dict[SpiffeId, AttestedAgent | None],
            dict[TrustDomain, Bundle | None],
        ]:
            return (
                {one: repos.entries.find(one) for one in entry_ids},
                {one: repos.agents.find(one) for one in agent_ids},
                {
                    one: repos.authorities.bundle()
                    if one == self.trust_domain
                    else repos.bundles.find(one)
                    for one in domains
                },
            )

        entries, agents, bundles = await self._store.read(load)
        concerned: set[SpiffeId] = set()
        for entry_id, entry in entries.items():
            if entry is None:
                concerned |= self.index.drop_entry(entry_id)
            else:
                concerned |= self.index.put_entry(entry)
        for agent_id, agent in agents.items():
            if agent is None:
                concerned |= self.index.drop_agent(agent_id)
            else:
                concerned |= self.index.put_agent(agent)
        self._hold(bundles)
        await self._reached(found[-1].seq)
        self._wake(self._waiters if bundles else concerned, found[0].committed_at_micros)
        log_event(_log, logging.DEBUG, "changes_folded", count=len(found), seq=self.seq)

    def _hold(self, bundles: Mapping[TrustDomain, Bundle | None]) -> None:
        for domain, bundle in bundles.items():
            self.bundles_version += 1
            if bundle is None:
                self._bundles.pop(domain, None)
            else:
                self._bundles[domain] = HeldBundle.of(bundle)
        if self.trust_domain in bundles:
            own = self.bundle
            self.authority_keys = frozenset(
                [one.public_key for one in own.jwt_authorities]
                + [
                    spki_of(x509.load_der_x509_certificate(one.der).public_key())
                    for one in own.x509_authorities
                ]
            )

    async def _reached(self, seq: int) -> None:
        async with self._folded:
            self.seq = seq
            self._folded.notify_all()

    def _wake(self, concerned: Iterable[SpiffeId], committed_at_micros: int) -> None:
        for agent_id in concerned:
            for waiter in self._waiters.get(agent_id, ()):
                waiter.wake(committed_at_micros)
