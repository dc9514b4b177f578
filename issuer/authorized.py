"""
Which entries each agent may act for, kept in memory from the events.

Source: architecture A12, SPIRE API 5.1.1.  Folding a change costs what the change is big;
asking costs what the answer is big.
"""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

from spiffe_core.agent import AttestedAgent
from spiffe_core.decision import age
from spiffe_core.entry import RegistrationEntry
from spiffe_core.spiffeid import SpiffeId, TrustDomain


class AuthorizedIndex:
    """Entries by id and by parent, and agents; for one event loop, not for threads."""

    def __init__(self, trust_domain: TrustDomain) -> None:
        self._trust_domain = trust_domain
        self._server_id = trust_domain.server_id
        self._entries: dict[str, RegistrationEntry] = {}
        self._by_parent: defaultdict[SpiffeId, dict[str, RegistrationEntry]] = defaultdict(dict)
        self._agents: dict[SpiffeId, AttestedAgent] = {}

    def put_entry(self, entry: RegistrationEntry) -> None:
        """Add or replace an entry."""
        self.drop_entry(entry.id)
        self._entries[entry.id] = entry
        self._by_parent[entry.parent_id][entry.id] = entry

    def drop_entry(self, entry_id: str) -> None:
        """Remove an entry; one that is not there is fine."""
        before = self._entries.pop(entry_id, None)
        if before is not None:
            siblings = self._by_parent[before.parent_id]
            del siblings[entry_id]
            if not siblings:
                del self._by_parent[before.parent_id]

    def put_agent(self, agent: AttestedAgent) -> None:
        """Add or replace an agent."""
        self._agents[agent.id] = agent

    def drop_agent(self, agent_id: SpiffeId) -> None:
        """Remove an agent; one that is not there is fine."""
        self._agents.pop(agent_id, None)

    def agent(self, agent_id: SpiffeId) -> AttestedAgent | None:
        """Return an agent, or None."""
        return self._agents.get(agent_id)

    def agents(self) -> Iterable[AttestedAgent]:
        """Return every agent."""
        return self._agents.values()

    def entry(self, entry_id: str) -> RegistrationEntry | None:
        """Return an entry, or None."""
        return self._entries.get(entry_id)

    def entries(self) -> Iterable[RegistrationEntry]:
        """Return every entry."""
        return self._entries.values()

    def __len__(self) -> int:
        return len(self._entries)

    def entries_of(self, agent_id: SpiffeId, at: datetime) -> list[RegistrationEntry]:
        """
        Return what an agent may act for at the instant *at*, oldest first.

        Alias entries widen what it reaches and are not returned; parents may form cycles;
        expired entries and foreign names count for nothing.
        """
        found: dict[str, RegistrationEntry] = {}
        reached = {agent_id}
        waiting = [agent_id]
        agent = self._agents.get(agent_id)
        if agent is not None:
            for alias in self._by_parent.get(self._server_id, {}).values():
                if alias.selectors <= agent.selectors and not alias.is_expired(at):
                    waiting.append(alias.spiffe_id)
                    reached.add(alias.spiffe_id)
        while waiting:
            for entry in self._by_parent.get(waiting.pop(), {}).values():
                if entry.is_expired(at) or entry.spiffe_id.trust_domain != self._trust_domain:
                    continue
                found[entry.id] = entry
                if entry.spiffe_id not in reached:
                    reached.add(entry.spiffe_id)
                    waiting.append(entry.spiffe_id)
        return sorted(found.values(), key=age)

    def entry_for(
        self, agent_id: SpiffeId, entry_id: str, at: datetime
    ) -> RegistrationEntry | None:
        """
        Return the entry if the agent may act for it, else None (SEC-21).

        Walks up from the entry, which is cheap, instead of down from the agent.
        """
        entry = self._entries.get(entry_id)
        if entry is None or entry.is_node_alias or entry.is_expired(at):
            return None
        agent = self._agents.get(agent_id)
        aliases = {
            one.spiffe_id
            for one in self._by_parent.get(self._server_id, {}).values()
            if agent is not None and one.selectors <= agent.selectors and not one.is_expired(at)
        }
        roots = {agent_id} | aliases
        if entry.parent_id in roots:
            return entry
        return entry if entry in self.entries_of(agent_id, at) else None

    def is_admin(self, spiffe_id: SpiffeId, at: datetime) -> bool:
        """True when any entry makes *spiffe_id* an admin (SPIRE API 2.1)."""
        return any(
            one.admin and one.spiffe_id == spiffe_id and not one.is_expired(at)
            for one in self._entries.values()
            if one.admin
        )
