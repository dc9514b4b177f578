"""
What an agent may act for, as differences (architecture A2).

One `View` holds what an agent was told last; `step` returns what has changed since.  A cursor
names a view by content, so that an agent that comes back to the same state is told nothing,
and one that comes back to another state, or to another server, gets a snapshot.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from issuer.services.hub import Hub
from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.spiffeid import SpiffeId, TrustDomain


@dataclass(frozen=True, slots=True)
class Difference:
    """What to tell an agent; *snapshot* means that it is everything."""

    snapshot: bool
    entries: tuple[RegistrationEntry, ...] = ()
    removed: tuple[str, ...] = ()
    bundles: tuple[Bundle, ...] = ()
    removed_domains: tuple[TrustDomain, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to tell."""
        return not (
            self.snapshot
            or self.entries
            or self.removed
            or self.bundles
            or self.removed_domains
        )


@dataclass(slots=True)
class View:
    """What one agent was told last."""

    hub: Hub
    agent_id: SpiffeId
    entries: Mapping[str, RegistrationEntry] = field(default_factory=dict)
    bundles: Mapping[TrustDomain, Bundle] = field(default_factory=dict)

    def start(self, cursor: str, at: datetime) -> Difference:
        """Return everything, or nothing when *cursor* names the present state."""
        self.entries, self.bundles = self._now(at)
        if cursor and cursor == self.cursor():
            return Difference(snapshot=False)
        return Difference(True, tuple(self.entries.values()), (), tuple(self.bundles.values()))

    def step(self, at: datetime) -> Difference:
        """Return what has changed since the last call."""
        entries, bundles = self._now(at)
        difference = Difference(
            False,
            tuple(one for id_, one in entries.items() if self.entries.get(id_) != one),
            tuple(id_ for id_ in self.entries if id_ not in entries),
            tuple(one for name, one in bundles.items() if self.bundles.get(name) != one),
            tuple(name for name in self.bundles if name not in bundles),
        )
        self.entries, self.bundles = entries, bundles
        return difference

    def cursor(self) -> str:
        """Name this view by its content."""
        digest = hashlib.sha256(self.agent_id.uri.encode())
        for id_ in sorted(self.entries):
            entry = self.entries[id_]
            digest.update(f"{id_}:{entry.revision_number}:{entry.created_at};".encode())
        for name in sorted(self.bundles):
            digest.update(repr(self.bundles[name]).encode())
        return digest.hexdigest()

    def _now(
        self, at: datetime
    ) -> tuple[dict[str, RegistrationEntry], dict[TrustDomain, Bundle]]:
        entries = {one.id: one for one in self.hub.index.entries_of(self.agent_id, at)}
        bundles = {self.hub.trust_domain: self.hub.bundle}
        for entry in entries.values():
            for name in entry.federates_with:
                bundle = self.hub.foreign_bundle(name)
                if bundle is not None:
                    bundles[name] = bundle
        return entries, bundles
