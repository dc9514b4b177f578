"""
Which entries each agent may act for, kept in memory from the events.

Source: architecture A12, SPIRE API 5.1.1, performance 5.  Folding a change costs what the
change is big; asking costs what the answer is big, and nothing when nothing changed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from spiffe_core.agent import AttestedAgent
from spiffe_core.decision import age
from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain

_K = TypeVar("_K")


@dataclass(frozen=True, slots=True)
class AgentView:
    """What one agent may act for, until an event or the instant *until* changes it."""

    entries: tuple[RegistrationEntry, ...]
    """Oldest first."""
    until: datetime | None
    """When the next of its entries expires; None for never."""

    def holds_at(self, at: datetime) -> bool:
        """True while no entry has expired since."""
        return self.until is None or at < self.until


class AuthorizedIndex:
    """
    Entries by id, parent and SPIFFE ID, and agents; for one event loop, not for threads.

    What changes an entry or agent returns the attested agents it concerns: theirs are the
    only answers that may be different now.
    """

    def __init__(self, trust_domain: TrustDomain) -> None:
        self._trust_domain = trust_domain
        self._server_id = trust_domain.server_id
        self._entries: dict[str, RegistrationEntry] = {}
        self._by_parent: _Groups[SpiffeId] = _Groups()
        self._by_spiffe_id: _Groups[SpiffeId] = _Groups()
        self._privileged: _Groups[SpiffeId] = _Groups()
        self._aliases = _SelectorIndex()
        self._agents: dict[SpiffeId, AttestedAgent] = {}
        self._agents_by_selector: dict[Selector, set[SpiffeId]] = {}
        self._agents_by_key: dict[bytes, SpiffeId] = {}
        self._views: dict[SpiffeId, AgentView] = {}

    # Changes

    def put_entry(self, entry: RegistrationEntry) -> set[SpiffeId]:
        """Add or replace an entry; return the agents concerned."""
        concerned = self.drop_entry(entry.id)
        self._entries[entry.id] = entry
        if entry.admin or entry.downstream:
            self._privileged.add(entry.spiffe_id, entry)
        if self._counts(entry):
            if entry.parent_id == self._server_id:
                self._aliases.add(entry)
            else:
                self._by_parent.add(entry.parent_id, entry)
            self._by_spiffe_id.add(entry.spiffe_id, entry)
            concerned |= self._changed(self.agents_of(entry))
        return concerned

    def drop_entry(self, entry_id: str) -> set[SpiffeId]:
        """Remove an entry, if it is there; return the agents concerned."""
        entry = self._entries.get(entry_id)
        if entry is None:
            return set()
        # Asked while it is still there: an entry can be its own ancestor.
        concerned = self._changed(self.agents_of(entry))
        del self._entries[entry_id]
        if entry.admin or entry.downstream:
            self._privileged.discard(entry.spiffe_id, entry)
        if self._counts(entry):
            if entry.parent_id == self._server_id:
                self._aliases.discard(entry)
            else:
                self._by_parent.discard(entry.parent_id, entry)
            self._by_spiffe_id.discard(entry.spiffe_id, entry)
        return concerned

    def put_agent(self, agent: AttestedAgent) -> set[SpiffeId]:
        """Add or replace an agent; return it as concerned."""
        before = self._agents.get(agent.id)
        if before is None or before.selectors != agent.selectors:
            self._unfile(before)
            for selector in agent.selectors:
                self._agents_by_selector.setdefault(selector, set()).add(agent.id)
        self._forget_keys(before)
        for key_hash in filter(None, (agent.key_hash, agent.new_key_hash)):
            self._agents_by_key[key_hash] = agent.id
        self._agents[agent.id] = agent
        return self._changed({agent.id})

    def drop_agent(self, agent_id: SpiffeId) -> set[SpiffeId]:
        """Remove an agent, if it is there; return it as concerned."""
        before = self._agents.pop(agent_id, None)
        if before is None:
            return set()
        self._unfile(before)
        self._forget_keys(before)
        return self._changed({agent_id})

    # Questions

    def agent(self, agent_id: SpiffeId) -> AttestedAgent | None:
        """Return an agent, or None."""
        return self._agents.get(agent_id)

    def holder_of(self, key_hash: bytes, at: datetime) -> SpiffeId | None:
        """Return the live agent whose own SVID is on that key, or None (SEC-20)."""
        agent_id = self._agents_by_key.get(key_hash)
        return agent_id if agent_id and self._agents[agent_id].is_live(at) else None

    def agents(self) -> Iterable[AttestedAgent]:
        """Return every agent."""
        return self._agents.values()

    @property
    def agent_count(self) -> int:
        """How many agents there are."""
        return len(self._agents)

    def entry(self, entry_id: str) -> RegistrationEntry | None:
        """Return an entry, or None."""
        return self._entries.get(entry_id)

    def entries(self) -> Iterable[RegistrationEntry]:
        """Return every entry."""
        return self._entries.values()

    def __len__(self) -> int:
        return len(self._entries)

    def view_of(self, agent_id: SpiffeId, at: datetime) -> AgentView:
        """
        Return what an agent may act for at the instant *at*.

        Alias entries widen what it reaches and are not returned; parents may form cycles;
        expired entries and foreign names count for nothing.  The same object is returned
        until something changed.
        """
        held = self._views.get(agent_id)
        if held is not None and held.holds_at(at):
            return held
        made = self._walk(agent_id, at)
        if agent_id in self._agents:  # what agents are told of by events; no stranger's
            self._views[agent_id] = made
        return made

    def entries_of(self, agent_id: SpiffeId, at: datetime) -> list[RegistrationEntry]:
        """Return what an agent may act for at the instant *at*, oldest first."""
        return list(self.view_of(agent_id, at).entries)

    def entry_for(
        self, agent_id: SpiffeId, entry_id: str, at: datetime
    ) -> RegistrationEntry | None:
        """
        Return the entry if the agent may act for it, else None (SEC-21).

        Walks up from the entry, which is cheap, instead of down from the agent.
        """
        entry = self._entries.get(entry_id)
        if entry is None or not self._counts(entry) or entry.is_expired(at):
            return None
        if entry.parent_id == self._server_id:
            return None
        selectors = self._selectors_of(agent_id, at)
        seen = {entry.parent_id}
        waiting = [entry.parent_id]
        while waiting:
            parent_id = waiting.pop()
            if parent_id == agent_id:
                return entry
            for above in self._by_spiffe_id.of(parent_id):
                if above.is_expired(at):
                    continue
                if above.parent_id == self._server_id:
                    if above.selectors <= selectors:
                        return entry
                elif above.parent_id not in seen:
                    seen.add(above.parent_id)
                    waiting.append(above.parent_id)
        return None

    def agents_of(self, entry: RegistrationEntry) -> set[SpiffeId]:
        """
        Return the attested agents whose answer an entry may change, by being there or not.

        Expiry is left aside: who is concerned only when an entry above has not expired is
        concerned.
        """
        if not self._counts(entry):
            return set()
        if entry.parent_id == self._server_id:
            return self._agents_with(entry.selectors)
        found: set[SpiffeId] = set()
        seen = {entry.parent_id}
        waiting = [entry.parent_id]
        while waiting:
            parent_id = waiting.pop()
            if parent_id in self._agents:
                found.add(parent_id)
            for above in self._by_spiffe_id.of(parent_id):
                if above.parent_id == self._server_id:
                    found |= self._agents_with(above.selectors)
                elif above.parent_id not in seen:
                    seen.add(above.parent_id)
                    waiting.append(above.parent_id)
        return found

    def is_admin(self, spiffe_id: SpiffeId, at: datetime) -> bool:
        """True when any entry makes *spiffe_id* an admin (SPIRE API 2.1)."""
        return any(
            one.admin and not one.is_expired(at) for one in self._privileged.of(spiffe_id)
        )

    def is_downstream(self, spiffe_id: SpiffeId, at: datetime) -> bool:
        """True when any entry lets *spiffe_id* have a CA of its own (SPIRE API 2.1)."""
        return any(
            one.downstream and not one.is_expired(at) for one in self._privileged.of(spiffe_id)
        )

    # How

    def _counts(self, entry: RegistrationEntry) -> bool:
        """True unless a name of it lies in another trust domain."""
        return (
            entry.spiffe_id.trust_domain == self._trust_domain
            and entry.parent_id.trust_domain == self._trust_domain
        )

    def _selectors_of(self, agent_id: SpiffeId, at: datetime) -> SelectorSet:
        """What was learnt of the node; nothing once its certificates are over (5.1.1)."""
        agent = self._agents.get(agent_id)
        if agent is None or agent.banned:
            return frozenset()
        over = max(agent.expires_at, agent.new_expires_at or agent.expires_at)
        return agent.selectors if at <= over else frozenset()

    def _walk(self, agent_id: SpiffeId, at: datetime) -> AgentView:
        found: dict[str, RegistrationEntry] = {}
        until: datetime | None = None
        reached = {agent_id}
        waiting = [agent_id]
        selectors = self._selectors_of(agent_id, at)
        if selectors:
            agent = self._agents[agent_id]
            until = max(agent.expires_at, agent.new_expires_at or agent.expires_at)
        for alias in self._aliases.within(selectors):
            if alias.is_expired(at):
                continue
            until = _sooner(until, alias.expires_at)
            if alias.spiffe_id not in reached:
                reached.add(alias.spiffe_id)
                waiting.append(alias.spiffe_id)
        while waiting:
            for entry in self._by_parent.of(waiting.pop()):
                if entry.is_expired(at):
                    continue
                until = _sooner(until, entry.expires_at)
                found[entry.id] = entry
                if entry.spiffe_id not in reached:
                    reached.add(entry.spiffe_id)
                    waiting.append(entry.spiffe_id)
        return AgentView(tuple(sorted(found.values(), key=age)), until)

    def _agents_with(self, selectors: SelectorSet) -> set[SpiffeId]:
        """The agents that have all of *selectors*; the rarest one is looked at."""
        rarest: set[SpiffeId] | None = None
        for selector in selectors:
            having = self._agents_by_selector.get(selector)
            if having is None:
                return set()
            if rarest is None or len(having) < len(rarest):
                rarest = having
        return {one for one in rarest or () if selectors <= self._agents[one].selectors}

    def _changed(self, concerned: set[SpiffeId]) -> set[SpiffeId]:
        for agent_id in concerned:
            self._views.pop(agent_id, None)
        return concerned

    def _forget_keys(self, agent: AttestedAgent | None) -> None:
        for key_hash in (agent.key_hash, agent.new_key_hash) if agent is not None else ():
            if self._agents_by_key.get(key_hash) == agent.id:  # type: ignore[union-attr]
                del self._agents_by_key[key_hash]

    def _unfile(self, agent: AttestedAgent | None) -> None:
        for selector in agent.selectors if agent is not None else ():
            having = self._agents_by_selector[selector]
            having.discard(agent.id)  # type: ignore[union-attr]  # of None there are none
            if not having:
                del self._agents_by_selector[selector]


class _Groups(Generic[_K]):
    """
    Entries by a key that most of them have to themselves.

    A group of one is the entry itself: a dict for each would cost more than all the rest.
    """

    def __init__(self) -> None:
        self._groups: dict[_K, RegistrationEntry | dict[str, RegistrationEntry]] = {}

    def add(self, key: _K, entry: RegistrationEntry) -> None:
        held = self._groups.get(key)
        if held is None:
            self._groups[key] = entry
        elif isinstance(held, dict):
            held[entry.id] = entry
        else:
            self._groups[key] = {held.id: held, entry.id: entry}

    def discard(self, key: _K, entry: RegistrationEntry) -> None:
        held = self._groups[key]
        if isinstance(held, dict) and len(held) > 1:
            del held[entry.id]
        else:
            del self._groups[key]

    def of(self, key: _K) -> Iterable[RegistrationEntry]:
        held = self._groups.get(key)
        if held is None:
            return ()
        return held.values() if isinstance(held, dict) else (held,)


class _SelectorIndex:
    """
    Finds the entries whose selectors are all among some given ones.

    One posting for each distinct set, filed under the selector that is the rarest when the
    set comes: looking up costs the selectors given and little more (performance 5).
    """

    def __init__(self) -> None:
        self._groups: _Groups[SelectorSet] = _Groups()
        self._sizes: Counter[SelectorSet] = Counter()
        self._rarity: Counter[Selector] = Counter()
        self._home: dict[SelectorSet, Selector] = {}
        self._postings: dict[Selector, set[SelectorSet]] = {}

    def add(self, entry: RegistrationEntry) -> None:
        wanted = entry.selectors
        self._groups.add(wanted, entry)
        self._sizes[wanted] += 1
        if self._sizes[wanted] == 1:
            home = min(wanted, key=lambda one: (self._rarity[one], one))
            self._rarity.update(wanted)
            self._home[wanted] = home
            self._postings.setdefault(home, set()).add(wanted)

    def discard(self, entry: RegistrationEntry) -> None:
        wanted = entry.selectors
        self._groups.discard(wanted, entry)
        self._sizes[wanted] -= 1
        if not self._sizes[wanted]:
            del self._sizes[wanted]
            for selector in wanted:
                self._rarity[selector] -= 1
                if not self._rarity[selector]:
                    del self._rarity[selector]
            home = self._home.pop(wanted)
            self._postings[home].discard(wanted)
            if not self._postings[home]:
                del self._postings[home]

    def within(self, given: SelectorSet) -> Iterator[RegistrationEntry]:
        for selector in given:
            for wanted in self._postings.get(selector, ()):
                if wanted <= given:
                    yield from self._groups.of(wanted)


def _sooner(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return one or other
    return min(one, other)
