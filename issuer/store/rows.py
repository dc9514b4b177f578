"""Rows to domain values and back: instants, selectors, lists."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import RowMapping

from spiffe_core.agent import AttestedAgent
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain

PAGE: Final = 1000  # rows a statement (SEC-62)
PRUNE_ROWS: Final = 5000
"""Rows that one pruning drops at most: a statement has five seconds, and writers wait."""
_KEPT: Final = 65_536
"""Values read again and again, such as the selectors of pods, are kept once: a third of
the memory and half the time of hydrating (performance 5)."""

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
BAD_VALUE: Final = (
    MalformedError, ValueError, TypeError, KeyError, AttributeError, OverflowError
)  # fmt: skip
"""What a damaged row makes of our parsers."""


class StoredValueError(InternalError):
    """A stored row breaks a rule: never the caller's fault, so never told as one."""


def seconds(at: datetime | None) -> int:
    """Unix seconds; 0 for None."""
    return 0 if at is None else int(at.timestamp())


def instant(value: int) -> datetime | None:
    """The instant, or None for 0."""
    return _EPOCH + timedelta(seconds=value) if value else None


def micros(at: datetime | None) -> int:
    """Unix microseconds; 0 for None."""
    return 0 if at is None else round(at.timestamp() * 1_000_000)


def instant_of_micros(value: int) -> datetime | None:
    """The instant, or None for 0."""
    return _EPOCH + timedelta(microseconds=value) if value else None


def selectors_text(selectors: SelectorSet) -> str:
    """Canonical JSON: sorted pairs; commas and colons in values stay theirs (SEC-03)."""
    return json.dumps(
        [[one.type, one.value] for one in sorted(selectors)], separators=(",", ":")
    )


@lru_cache(_KEPT)
def selectors_of(text: str) -> SelectorSet:
    """The set that `selectors_text` wrote."""
    return frozenset(_selector(type_, value) for type_, value in json.loads(text))


@lru_cache(_KEPT)
def _selector(type_: str, value: str) -> Selector:
    return Selector(type_, value)


@lru_cache(_KEPT)
def _parent_of(text: str) -> SpiffeId:
    return SpiffeId.parse(text)


@lru_cache(_KEPT)
def _domains_of(text: str) -> frozenset[TrustDomain]:
    return frozenset(TrustDomain(name) for name in json.loads(text))


@lru_cache(_KEPT)
def _span_of(seconds_: int) -> timedelta:
    return timedelta(seconds=seconds_)


def entry_row(entry: RegistrationEntry) -> dict[str, Any]:
    """The columns of an entry, without `row`."""
    return {
        "id": entry.id,
        "spiffe_id": entry.spiffe_id.uri,
        "parent_id": entry.parent_id.uri,
        "selectors": selectors_text(entry.selectors),
        "fingerprint": entry.fingerprint,
        "x509_svid_ttl": int(entry.x509_svid_ttl.total_seconds()),
        "jwt_svid_ttl": int(entry.jwt_svid_ttl.total_seconds()),
        "federates_with": json.dumps(sorted(one.name for one in entry.federates_with)),
        "admin": entry.admin,
        "downstream": entry.downstream,
        "expires_at": seconds(entry.expires_at),
        "dns_names": json.dumps(list(entry.dns_names)),
        "hint": entry.hint,
        "store_svid": entry.store_svid,
        "disable_x509_svid_prefetch": entry.disable_x509_svid_prefetch,
        "jwt_svid_include_jti": entry.jwt_svid_include_jti,
        "revision_number": entry.revision_number,
        "created_at": seconds(entry.created_at),
    }


def _fingerprint_of(spiffe_id: str, parent_id: str, selectors: str) -> bytes:
    """`RegistrationEntry.fingerprint`, from the texts as they are stored."""
    text = f'["{spiffe_id}","{parent_id}",{selectors}]'
    return hashlib.sha256(text.encode()).digest()[:16]


def entry_of(row: RowMapping) -> RegistrationEntry:
    """
    The entry of a row.

    Raises:
        StoredValueError: the row breaks a rule, or is not what was stored: a flipped bit in a
            selector would give an identity to another process.
    """
    try:
        if row["fingerprint"] != _fingerprint_of(
            row["spiffe_id"], row["parent_id"], row["selectors"]
        ):
            raise ValueError("fingerprint")
        return RegistrationEntry(
            id=row["id"],
            spiffe_id=SpiffeId.parse(row["spiffe_id"]),
            parent_id=_parent_of(row["parent_id"]),
            selectors=selectors_of(row["selectors"]),
            x509_svid_ttl=_span_of(row["x509_svid_ttl"]),
            jwt_svid_ttl=_span_of(row["jwt_svid_ttl"]),
            federates_with=_domains_of(row["federates_with"]),
            admin=row["admin"],
            downstream=row["downstream"],
            expires_at=instant(row["expires_at"]),
            dns_names=() if row["dns_names"] == "[]" else tuple(json.loads(row["dns_names"])),
            hint=row["hint"],
            store_svid=row["store_svid"],
            disable_x509_svid_prefetch=row["disable_x509_svid_prefetch"],
            jwt_svid_include_jti=row["jwt_svid_include_jti"],
            revision_number=row["revision_number"],
            created_at=instant(row["created_at"]),
        )
    except BAD_VALUE as error:
        raise StoredValueError("a stored entry is damaged: restore the database") from error


def agent_of(row: RowMapping) -> AttestedAgent:
    """
    The agent of a row.

    Raises:
        StoredValueError: the row breaks a rule.
    """
    try:
        return AttestedAgent(
            id=SpiffeId.parse(row["id"]),
            attestation_type=row["attestation_type"],
            serial=row["serial"],
            expires_at=_EPOCH + timedelta(seconds=row["expires_at"]),
            selectors=selectors_of(row["selectors"]),
            new_serial=row["new_serial"],
            new_expires_at=instant(row["new_expires_at"]),
            banned=row["banned"],
            can_reattest=row["can_reattest"],
            agent_version=row["agent_version"],
            key_hash=row["key_hash"],
            new_key_hash=row["new_key_hash"],
        )
    except BAD_VALUE as error:
        raise StoredValueError("a stored agent is damaged: restore the database") from error
