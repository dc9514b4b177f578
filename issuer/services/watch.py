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
from typing import Final

from issuer.authorized import AgentView
from issuer.services.hub import HeldBundle, Hub
from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.spiffeid import SpiffeId, TrustDomain

_MODULUS: Final = 1 << 256


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


_NOTHING: Final = Difference(snapshot=False)


@dataclass(slots=True)
class View:
    """What one agent was told last."""

    hub: Hub
    agent_id: SpiffeId
    entries: Mapping[str, RegistrationEntry] = field(default_factory=dict)
    bundles: Mapping[TrustDomain, HeldBundle] = field(default_factory=dict)
    _seen: tuple[AgentView | None, int] = (None, -1)
    _sum: int = 0
    """Of what names each entry, so that a change costs what it is big."""

    def start(self, cursor: str, at: datetime) -> Difference:
        """Return everything, or nothing when *cursor* names the present state."""
        everything = self.step(at)
        if cursor and cursor == self.cursor():
            return _NOTHING
        return Difference(True, everything.entries, (), everything.bundles)

    def step(self, at: datetime) -> Difference:
        """Return what has changed since the last call."""
        view = self.hub.index.view_of(self.agent_id, at)
        version = self.hub.bundles_version
        if view is self._seen[0] and version == self._seen[1]:
            return _NOTHING
        entries = {one.id: one for one in view.entries}
        bundles = self._bundles_for(view)
        changed = [
            one
            for id_, one in entries.items()
            if (before := self.entries.get(id_)) is not one and before != one
        ]
        difference = Difference(
            False,
            tuple(changed),
            tuple(id_ for id_ in self.entries if id_ not in entries),
            tuple(
                one.bundle
                for name, one in bundles.items()
                if name not in self.bundles or self.bundles[name].mark != one.mark
            ),
            tuple(name for name in self.bundles if name not in bundles),
        )
        for one in changed:
            if one.id in self.entries:
                self._sum -= _number(self.entries[one.id])
            self._sum += _number(one)
        for id_ in difference.removed:
            self._sum -= _number(self.entries[id_])
        self.entries, self.bundles, self._seen = entries, bundles, (view, version)
        return difference

    def cursor(self) -> str:
        """Name this view by its content."""
        digest = hashlib.sha256(self.agent_id.uri.encode())
        digest.update((self._sum % _MODULUS).to_bytes(32, "big"))
        for name in sorted(self.bundles):
            digest.update(self.bundles[name].mark)
        return digest.hexdigest()

    def _bundles_for(self, view: AgentView) -> dict[TrustDomain, HeldBundle]:
        wanted = {self.hub.trust_domain}
        for entry in view.entries:
            wanted |= entry.federates_with
        found = {name: self.hub.held_bundle(name) for name in sorted(wanted)}
        return {name: held for name, held in found.items() if held is not None}


def _number(entry: RegistrationEntry) -> int:
    """Names one state of one entry: no id comes back with the same revision (SEC-47)."""
    text = f"{entry.id}:{entry.revision_number}:{entry.created_at}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
