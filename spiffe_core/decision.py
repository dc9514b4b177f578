"""
The one decision: which entries does a process get, and why not the others.

Source: architecture A3; SEC-03, SEC-35, WAPI-25, WAPI-56, IOP-28.  Used by the agent, by
the server and by every explanation, so that all of them say the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector, SelectorSet

MAX_NEAR_MISSES: Final = 5


@dataclass(frozen=True, slots=True)
class NearMiss:
    """An entry that did not match, and what stood in its way."""

    entry: RegistrationEntry
    missing: tuple[Selector, ...]
    """Wanted by the entry and not attested."""
    have: tuple[Selector, ...]
    """Attested, of the same kind as something missing, with another value."""
    expired: bool
    unknown: tuple[Selector, ...] = ()
    """Those of *missing* that may be true: their attestor could not vouch (SEC-35)."""

    @property
    def difference(self) -> str:
        """The one fact that differs, as text."""
        differs = [one for one in self.missing if one not in self.unknown]
        wanted = ", ".join(map(str, differs))
        facts = []
        if len(differs) == 1 and len(self.have) == 1:
            facts.append(f"the entry wants {wanted}, the process has {self.have[0]}")
        elif differs:
            facts.append(f"the entry wants {wanted}, which the process does not have")
        if self.unknown:
            asked = ", ".join(map(str, self.unknown))
            facts.append(f"the entry wants {asked}, for which no attestor could vouch")
        if self.expired:
            facts.append("the entry has expired")
        return "; ".join(facts)


@dataclass(frozen=True, slots=True)
class Decision:
    """What *selectors* get out of *considered* entries, and the trace of it."""

    selectors: SelectorSet
    matched: tuple[RegistrationEntry, ...]
    """The oldest first, so that the default identity stays the same (WAPI-56)."""
    near_misses: tuple[NearMiss, ...]
    considered: int
    partial: Mapping[str, str] = field(default_factory=dict)
    """Attestors that could not vouch, and why: what they know is absent (SEC-35)."""
    dropped_hints: tuple[RegistrationEntry, ...] = ()
    """Matched, but an older entry has the same hint (IOP-28)."""

    @property
    def reason(self) -> str:
        """One word for programs: identity, no_entries, no_match or attestation_failed."""
        if self.matched:
            return "identity"
        if not self.selectors:
            return "attestation_failed"
        return "no_match" if self.considered else "no_entries"


def decide(
    selectors: SelectorSet,
    candidates: Iterable[RegistrationEntry],
    *,
    at: datetime,
    partial: Mapping[str, str] | None = None,
) -> Decision:
    """
    Decide which of *candidates* a process with *selectors* gets at the instant *at*.

    An entry matches when every selector it asks for was attested, and it has not expired.
    Node aliases name nodes, so no process gets one (SPIRE API 5.1.1); they don't count.
    """
    matched: list[RegistrationEntry] = []
    missed: list[NearMiss] = []
    partial = dict(partial or {})
    considered = 0
    for entry in candidates:
        if entry.is_node_alias:
            continue
        considered += 1
        missing = entry.selectors - selectors
        expired = entry.is_expired(at)
        if missing or expired:
            miss = _near_miss(entry, missing, selectors, expired=expired, partial=partial)
            missed.append(miss)
        else:
            matched.append(entry)
    matched.sort(key=age)
    kept, dropped = _one_of_each_hint(matched)
    missed.sort(key=lambda miss: (len(miss.missing), -len(miss.have), miss.entry.id))
    return Decision(
        selectors,
        kept,
        tuple(missed[:MAX_NEAR_MISSES]),
        considered,
        partial,
        dropped,
    )


def age(entry: RegistrationEntry) -> tuple[datetime, str]:
    """Sort key: the oldest entry first, then by id."""
    return entry.created_at or datetime.max.replace(tzinfo=UTC), entry.id


def _one_of_each_hint(
    entries: Iterable[RegistrationEntry],
) -> tuple[tuple[RegistrationEntry, ...], tuple[RegistrationEntry, ...]]:
    kept, dropped, hints = [], [], set()
    for entry in entries:
        if entry.hint and entry.hint in hints:
            dropped.append(entry)
            continue
        hints.add(entry.hint)
        kept.append(entry)
    return tuple(kept), tuple(dropped)


def _near_miss(
    entry: RegistrationEntry,
    missing: SelectorSet,
    attested: SelectorSet,
    *,
    expired: bool,
    partial: Mapping[str, str],
) -> NearMiss:
    kinds = {_kind(one) for one in missing}
    have = sorted(one for one in attested - entry.selectors if _kind(one) in kinds)
    wanted = sorted(missing)
    unknown = tuple(one for one in wanted if one.type in partial)
    return NearMiss(entry, tuple(wanted), tuple(have), expired, unknown)


_KEYED: Final = frozenset(
    {
        "pod-label", "ns-label", "label", "agent_node_label", "agent_pod_label",
        "pod-owner", "pod-owner-uid",
    }
)  # fmt: skip
"""Kinds that hold a key and a value: another label is not this one with another value."""


def _kind(selector: Selector) -> tuple[str, str]:
    # unix:uid:1000 and unix:uid:1001 are of one kind; a value without a colon is its own.
    name, _, rest = selector.value.partition(":")
    if name in _KEYED:
        name += ":" + rest.partition(":")[0]
    return selector.type, name
