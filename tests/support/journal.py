"""A journal of authorities in memory, with its history, and a fuse to end the process by."""

from dataclasses import dataclass, field, replace
from datetime import datetime

from ca.clock import Clock
from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from ca.keys.memory import MemoryKeyManager
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.rotation import Step, after
from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.errors import AbortedError
from spiffe_core.keys import KeyKind
from spiffe_core.spiffeid import TrustDomain

TRUSTED = {
    AuthorityState.PREPARED, AuthorityState.ACTIVE, AuthorityState.OLD, AuthorityState.TAINTED,
}  # fmt: skip


class KilledError(Exception):
    """The process ended here; no error of ours, so that nothing catches it."""


@dataclass
class Fuse:
    """Counts the places it is led past, and burns at one of them."""

    burns_at: int = 0
    passed: list[str] = field(default_factory=list)

    def reach(self, place: str) -> None:
        """Go past *place*, or end there."""
        self.passed.append(place)
        if len(self.passed) == self.burns_at:
            raise KilledError(place)


@dataclass(frozen=True)
class Happened:
    """One change or look that the journal saw."""

    what: str
    authority_id: str
    at: datetime


class MemoryJournal:
    """A `JournalStore`; each method is whole or did not happen."""

    def __init__(self, clock: Clock, trust_domain: TrustDomain) -> None:
        self.clock = clock
        self.trust_domain = trust_domain
        self.records: dict[str, AuthorityRecord] = {}
        self.log: list[Happened] = []
        self.fuse = Fuse()
        self.sequence = 1

    async def load(self) -> tuple[AuthorityRecord, ...]:
        """Return every record."""
        self.fuse.reach("before load")
        return tuple(self.records.values())

    async def add_prepared(self, record: AuthorityRecord) -> None:
        """Add one; it is in the bundle at once."""
        self.fuse.reach("before add")
        assert record.authority_id not in self.records
        assert record.state is AuthorityState.PREPARED
        self.records[record.authority_id] = record
        self._note("publish", record.authority_id)
        self.fuse.reach("after add")

    async def published(self) -> Bundle:
        """Return the bundle, and note that it was read back."""
        self.fuse.reach("before read back")
        for one in self.records:
            self._note("read back", one)
        return self.bundle()

    async def activate(self, authority_id: str, *, at: datetime) -> None:
        """PREPARED to ACTIVE, by the table."""
        self.fuse.reach("before activate")
        record = self.records[authority_id]
        if record.state is not AuthorityState.PREPARED:
            raise AbortedError("the authority is no longer prepared")
        for other in self.of(record.kind, AuthorityState.ACTIVE):
            self._put(other, Step.RETIRE, retired_at=at)
        self._put(record, Step.ACTIVATE, activated_at=at)
        self._note("activate", authority_id)
        self.fuse.reach("after activate")

    async def prune(self, authority_id: str) -> None:
        """OLD to gone, by the table."""
        self.fuse.reach("before prune")
        record = self.records[authority_id]
        assert after(record.state, Step.PRUNE) is AuthorityState.REVOKED
        del self.records[authority_id]
        self._note("prune", authority_id)
        self.fuse.reach("after prune")

    def _put(self, record: AuthorityRecord, step: Step, **changes: datetime) -> None:
        state = after(record.state, step)
        self.records[record.authority_id] = replace(record, state=state, **changes)  # type: ignore[arg-type]

    def _note(self, what: str, authority_id: str) -> None:
        self.log.append(Happened(what, authority_id, self.clock.now()))

    def of(self, kind: AuthorityKind, state: AuthorityState) -> list[AuthorityRecord]:
        """The records of one kind in one state."""
        found = self.records.values()
        return [one for one in found if one.kind is kind and one.state is state]

    def bundle(self) -> Bundle:
        """What is trusted now."""
        trusted = [one for one in self.records.values() if one.state in TRUSTED]
        return Bundle(
            self.trust_domain,
            tuple(
                X509Authority.parse(one.public)
                for one in trusted
                if one.kind is AuthorityKind.X509
            ),
            tuple(
                JwtAuthority(one.authority_id, one.public, one.validity.not_after)
                for one in trusted
                if one.kind is AuthorityKind.JWT
            ),
        )


class FusedKeys(MemoryKeyManager):
    """Keys in memory that outlive the rotator, led past the journal's fuse."""

    def __init__(self, journal: MemoryJournal) -> None:
        super().__init__()
        self.journal = journal

    async def generate(self, key_id: str, kind: KeyKind, purpose: KeyPurpose) -> SigningKey:
        """Make one."""
        self.journal.fuse.reach("before key")
        made = await super().generate(key_id, kind, purpose)
        self.journal.fuse.reach("after key")
        return made

    async def load(self, key_id: str, purpose: KeyPurpose) -> SigningKey:
        """Return one."""
        self.journal.fuse.reach("before key load")
        return await super().load(key_id, purpose)

    async def delete(self, key_id: str) -> None:
        """Forget one."""
        self.journal.fuse.reach("before key delete")
        await super().delete(key_id)
        self.journal.fuse.reach("after key delete")
