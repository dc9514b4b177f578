"""What tests of the store and the index begin with: correct values, and a store on a file."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ca.clock import SystemClock
from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from issuer.store.authorities import IssuedRow
from issuer.store.store import Store
from spiffe_core.agent import AttestedAgent, agent_id
from spiffe_core.entry import RegistrationEntry
from spiffe_core.lifetime import Validity
from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain

TD = TrustDomain("example.org")
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


class StoppedClock(SystemClock):
    """Stands still until it is set."""

    def __init__(self, now: datetime = NOW) -> None:
        self.at = now

    def now(self) -> datetime:
        """Return where it stands."""
        return self.at

    def advance(self, span: timedelta) -> None:
        """Move on by *span*."""
        self.at += span


def an_id(path: str) -> SpiffeId:
    """An ID in the trust domain of the tests."""
    return SpiffeId(TD, path)


def node_id(name: str) -> SpiffeId:
    """An agent's ID, as a join token gives it."""
    return agent_id(TD, "join_token", name)


def some(*texts: str) -> SelectorSet:
    """Selectors from their texts."""
    return frozenset(Selector.parse(text) for text in texts)


def an_entry(path: str = "/web", **changes: Any) -> RegistrationEntry:
    """A correct entry below the agent ``a``."""
    made = RegistrationEntry(an_id(path), node_id("a"), some("unix:uid:1000"))
    return replace(made, **changes)


def an_agent(name: str = "a", **changes: Any) -> AttestedAgent:
    """A correct agent, good for an hour."""
    made = AttestedAgent(node_id(name), "join_token", "1001", NOW + timedelta(hours=1))
    return replace(made, **changes)


def an_authority(
    authority_id: str = "first", public: bytes = b"", **changes: Any
) -> AuthorityRecord:
    """A prepared JWT authority; *public* must be a real key where a bundle is read."""
    made = AuthorityRecord(
        authority_id,
        AuthorityKind.JWT,
        AuthorityState.PREPARED,
        f"key-{authority_id}",
        public,
        Validity(NOW, NOW + timedelta(days=1)),
        NOW,
    )
    return replace(made, **changes)


def an_issued(serial: str = "1", authority_id: str = "first", **changes: Any) -> IssuedRow:
    """A token on record, good for an hour."""
    made = IssuedRow(
        AuthorityKind.JWT, serial, "spiffe://example.org/web", "entry", authority_id, "caller",
        NOW, NOW + timedelta(hours=1),
    )  # fmt: skip
    return replace(made, **changes)


@asynccontextmanager
async def a_store(folder: Path, clock: StoppedClock | None = None) -> AsyncIterator[Store]:
    """A store on a new or existing file in *folder*."""
    store = await Store.open(folder / "store" / "issuer.db", TD, clock or StoppedClock())
    try:
        yield store
    finally:
        await store.close()
