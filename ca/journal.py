"""
What is on record of authorities, and the store that keeps the record.

Source: architecture A7, SEC-66, SEC-68.  `ca` says what must be kept; the server keeps it.
"""

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from spiffe_core.bundle import Bundle
from spiffe_core.lifetime import Validity


class AuthorityKind(enum.Enum):
    """What an authority signs."""

    X509 = "x509"
    JWT = "jwt"


class AuthorityState(enum.Enum):
    """Where an authority is in its life; see `ca.rotation`."""

    PREPARED = "prepared"
    ACTIVE = "active"
    OLD = "old"
    TAINTED = "tainted"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class AuthorityRecord:
    """One authority; *public* is its certificate (X509) or SubjectPublicKeyInfo (JWT), DER."""

    authority_id: str
    kind: AuthorityKind
    state: AuthorityState
    key_id: str
    public: bytes = field(repr=False)
    validity: Validity
    prepared_at: datetime
    activated_at: datetime | None = None
    retired_at: datetime | None = None


class JournalStore(Protocol):
    """Keeps authority records; each method is one transaction, durable when it returns."""

    async def load(self) -> tuple[AuthorityRecord, ...]:
        """Return every record that was not pruned."""
        ...

    async def add_prepared(self, record: AuthorityRecord) -> None:
        """Add a PREPARED record and put its public half into the bundle."""
        ...

    async def published(self) -> Bundle:
        """Read the bundle back from where it is durable."""
        ...

    async def activate(self, authority_id: str, *, at: datetime) -> None:
        """
        PREPARED to ACTIVE, and the one that was ACTIVE to OLD, together.

        Raises:
            AbortedError: the record is no longer PREPARED.
        """
        ...

    async def prune(self, authority_id: str) -> None:
        """Drop an OLD record and take its public half out of the bundle."""
        ...
