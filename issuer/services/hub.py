"""
What the server knows, in memory, kept right from the event feed (architecture A2).

Every change of state comes in here after its commit, is folded into the index, and wakes
those whom it may concern.
"""

import asyncio
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from issuer.authorized import AuthorizedIndex
from issuer.store.events import Event, EventKind
from issuer.store.store import Repositories, Store
from spiffe_core.agent import AttestedAgent
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import NotReadyError
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.logs import event as log_event

_log = logging.getLogger(__name__)


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


class Hub:
    """The index, the bundles, and those who wait; one for the process."""

    def __init__(self, store: Store, trust_domain: TrustDomain) -> None:
        self.index = AuthorizedIndex(trust_domain)
        self.trust_domain = trust_domain
        self.seq = 0
        self._store = store
        self._bundles: dict[TrustDomain, Bundle] = {}
        self._waiters: set[Waiter] = set()
        self._folded = asyncio.Condition()

    @property
    def bundle(self) -> Bundle:
        """
        Our own trust domain's bundle.

        Raises:
            NotReadyError: not loaded yet.
        """
        try:
            return self._bundles[self.trust_domain]
        except KeyError:
            raise NotReadyError("the server is starting") from None

    def foreign_bundle(self, trust_domain: TrustDomain) -> Bundle | None:
        """Return a foreign bundle, or None."""
        return None if trust_domain == self.trust_domain else self._bundles.get(trust_domain)

    def own_roots(self) -> BundleSet:
        """What callers are verified with: our own trust domain's bundle alone (SEC-11)."""
        return BundleSet.of([self.bundle])

    async def hydrate(self) -> None:
        """Load everything; the collector rests meanwhile, then forgets what it saw."""

        def load(
            repos: Repositories,
        ) -> tuple[int, list[RegistrationEntry], list[AttestedAgent], list[Bundle]]:
            seq = repos.events.last()  # first: what comes later is folded again, harmlessly
            bundles = [repos.authorities.bundle(), *repos.bundles.all()]
            return seq, list(repos.entries.all()), list(repos.agents.all()), bundles

        gc.disable()
        try:
            self.seq, entries, agents, bundles = await self._store.read(load)
            for number, entry in enumerate(entries):
                self.index.put_entry(entry)
                if number % 500 == 499:
                    await asyncio.sleep(0)
            for agent in agents:
                self.index.put_agent(agent)
            self._bundles = {bundle.trust_domain: bundle for bundle in bundles}
        finally:
            gc.enable()
            gc.collect()
            gc.freeze()

    async def run(self) -> None:
        """Fold changes until cancelled."""
        async for events in self._store.changes(self.seq):
            await self._fold(events)

    async def caught_up(self, seq: int) -> None:
        """Return once every event up to *seq* is folded in."""
        async with self._folded:
            await self._folded.wait_for(lambda: self.seq >= seq)

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
    def watchers(self) -> int:
        """How many wait for changes."""
        return len(self._waiters)

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
        for entry_id, entry in entries.items():
            if entry is None:
                self.index.drop_entry(entry_id)
            else:
                self.index.put_entry(entry)
        for agent_id, agent in agents.items():
            if agent is None:
                self.index.drop_agent(agent_id)
            else:
                self.index.put_agent(agent)
        for domain, bundle in bundles.items():
            if bundle is None:
                self._bundles.pop(domain, None)
            else:
                self._bundles[domain] = bundle
        async with self._folded:
            self.seq = found[-1].seq
            self._folded.notify_all()
        for waiter in self._waiters:
            waiter.wake(found[0].committed_at_micros)
        log_event(_log, logging.DEBUG, "changes_folded", count=len(found), seq=self.seq)
