"""Authorities, our bundle made of them, foreign bundles, and what was issued."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from issuer.store.events import EventKind, EventRepository
from issuer.store.rows import (
    BAD_VALUE,
    PAGE,
    PRUNE_ROWS,
    StoredValueError,
    instant,
    instant_of_micros,
    micros,
    seconds,
)
from issuer.store.tables import authorities, bundles, issued, meta
from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import AbortedError, NotFoundError, NotReadyError
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import TrustDomain

_TRUSTED: Final = (AuthorityState.PREPARED, AuthorityState.ACTIVE, AuthorityState.OLD,
                   AuthorityState.TAINTED)  # fmt: skip


class AuthorityRepository:
    """Authority records and the bundle they make up, within one transaction."""

    def __init__(self, connection: Connection, events: EventRepository) -> None:
        self._connection = connection
        self._events = events

    def all(self) -> tuple[AuthorityRecord, ...]:
        """Return every record, oldest first."""
        rows = self._connection.execute(select(authorities).order_by(authorities.c.row))
        return tuple(_record_of(row) for row in rows.mappings())

    def add_prepared(self, record: AuthorityRecord) -> None:
        """Add a record; its public half is in the bundle with it."""
        self._connection.execute(insert(authorities).values(_row_of(record)))
        self._bundle_changed()

    def activate(self, authority_id: str, at: datetime) -> None:
        """
        PREPARED to ACTIVE, and the one that was ACTIVE to OLD.

        Raises:
            AbortedError: the record is not PREPARED.
        """
        records = self.all()
        wanted = next((one for one in records if one.authority_id == authority_id), None)
        if wanted is None or wanted.state is not AuthorityState.PREPARED:
            raise AbortedError("the authority is no longer prepared")
        for one in records:
            if one.kind is wanted.kind and one.state is AuthorityState.ACTIVE:
                self._change(replace(one, state=AuthorityState.OLD, retired_at=at))
        crash_point("authority.marked_old")
        self._change(replace(wanted, state=AuthorityState.ACTIVE, activated_at=at))
        # What is trusted stays the same, and so does the sequence number (BUNDLE-08).
        self._bundle_event()

    def prune(self, authority_id: str) -> None:
        """Drop an OLD record and its public half from the bundle; twice does no harm."""
        gone = self._connection.execute(
            delete(authorities).where(
                authorities.c.authority_id == authority_id,
                authorities.c.state == AuthorityState.OLD.value,
            )
        )
        if gone.rowcount:
            self._bundle_changed()

    def touch(self) -> None:
        """Write a row as it is."""
        self._connection.execute(update(meta).values(refresh_hint=meta.c.refresh_hint))

    def bundle(self) -> Bundle:
        """Return our own trust domain's bundle."""
        about = self._connection.execute(select(meta)).one()
        records = [one for one in self.all() if one.state in _TRUSTED]
        try:
            return Bundle(
                TrustDomain(about.trust_domain),
                tuple(
                    X509Authority.parse(one.public, tainted=one.state is AuthorityState.TAINTED)
                    for one in records
                    if one.kind is AuthorityKind.X509
                ),
                tuple(
                    JwtAuthority(
                        one.authority_id,
                        one.public,
                        one.validity.not_after,
                        one.state is AuthorityState.TAINTED,
                    )
                    for one in records
                    if one.kind is AuthorityKind.JWT
                ),
                about.bundle_sequence,
                timedelta(seconds=about.refresh_hint) if about.refresh_hint else None,
            )
        except BAD_VALUE as error:
            raise StoredValueError("a stored authority is damaged: restore it") from error

    def _change(self, record: AuthorityRecord) -> None:
        self._connection.execute(
            update(authorities)
            .where(authorities.c.authority_id == record.authority_id)
            .values(_row_of(record))
        )

    def _bundle_changed(self) -> None:
        self._connection.execute(
            update(meta).values(bundle_sequence=meta.c.bundle_sequence + 1)
        )
        self._bundle_event()

    def _bundle_event(self) -> None:
        name = self._connection.execute(select(meta.c.trust_domain)).scalar_one()
        self._events.add(EventKind.BUNDLE, name)


class BundleRepository:
    """Foreign bundles, each under its own trust domain's name (BUNDLE-01)."""

    def __init__(self, connection: Connection, events: EventRepository) -> None:
        self._connection = connection
        self._events = events

    def find(self, trust_domain: TrustDomain) -> Bundle | None:
        """Return one, or None."""
        row = self._connection.execute(
            select(bundles.c.document).where(bundles.c.trust_domain == trust_domain.name)
        ).scalar()
        return None if row is None else _bundle_of(trust_domain, row)

    def set(self, bundle: Bundle) -> None:
        """Add or replace one."""
        document = _document_of(bundle)
        name = bundle.trust_domain.name
        changed = self._connection.execute(
            update(bundles).where(bundles.c.trust_domain == name).values(document=document)
        )
        if not changed.rowcount:
            self._connection.execute(
                insert(bundles).values(trust_domain=name, document=document)
            )
        crash_point("bundle.stored")
        self._events.add(EventKind.BUNDLE, name)

    def delete(self, trust_domain: TrustDomain) -> None:
        """
        Remove one; entries that federate with it are the caller's business.

        Raises:
            NotFoundError: there is none.
        """
        gone = self._connection.execute(
            delete(bundles).where(bundles.c.trust_domain == trust_domain.name)
        )
        if not gone.rowcount:
            raise NotFoundError("bundle not found")
        self._events.add(EventKind.BUNDLE, trust_domain.name)

    def page(self, after: int, limit: int) -> Sequence[tuple[int, Bundle]]:
        """Return up to *limit* bundles behind row *after*, with their rows."""
        rows = self._connection.execute(
            select(bundles)
            .where(bundles.c.row > after)
            .order_by(bundles.c.row)
            .limit(min(limit, PAGE))
        )
        return [
            (row.row, _bundle_of(TrustDomain(row.trust_domain), row.document)) for row in rows
        ]

    def all(self) -> Iterator[Bundle]:
        """Yield every foreign bundle."""
        after = 0
        while found := self.page(after, PAGE):
            after = found[-1][0]
            yield from (bundle for _, bundle in found)

    def count(self) -> int:
        """Return how many there are."""
        return self._connection.execute(select(func.count()).select_from(bundles)).scalar_one()


@dataclass(frozen=True, slots=True)
class IssuedRow:
    """One SVID on record: *serial* is the serial number, or the token's ``jti``."""

    kind: AuthorityKind
    serial: str
    spiffe_id: str
    entry_id: str
    authority_id: str
    caller: str
    issued_at: datetime
    expires_at: datetime
    pod_uid: str = ""
    """The pod that was verified to be behind it; empty when none was."""


class IssuedRepository:
    """What was signed, within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def record(self, rows: Sequence[IssuedRow]) -> None:
        """
        Put a batch on record, if every authority in it still signs (SEC-24, architecture A6).

        Raises:
            NotReadyError: an authority was superseded meanwhile; nothing may be handed out.
        """
        active = set(self._connection.execute(_SIGNING).scalars())
        if not {row.authority_id for row in rows} <= active:
            raise NotReadyError("the authority was superseded while it signed; ask again")
        self._connection.execute(
            _ISSUE,
            [
                {
                    "kind": row.kind.value,
                    "serial": row.serial,
                    "spiffe_id": row.spiffe_id,
                    "entry_id": row.entry_id,
                    "authority_id": row.authority_id,
                    "caller": row.caller,
                    "issued_at": seconds(row.issued_at),
                    "expires_at": seconds(row.expires_at),
                    "pod_uid": row.pod_uid,
                }
                for row in rows
            ],
        )

    def page(self, after: int, limit: int) -> Sequence[tuple[int, IssuedRow]]:
        """Return up to *limit* rows behind row *after*."""
        rows = self._connection.execute(
            select(issued)
            .where(issued.c.row > after)
            .order_by(issued.c.row)
            .limit(min(limit, PAGE))
        )
        return [
            (
                r.row,
                IssuedRow(
                    AuthorityKind(r.kind), r.serial, r.spiffe_id, r.entry_id, r.authority_id,
                    r.caller, instant(r.issued_at) or _NEVER, instant(r.expires_at) or _NEVER,
                    r.pod_uid,
                ),
            )
            for r in rows
        ]  # fmt: skip

    def count(self) -> int:
        """Return how many there are."""
        return self._connection.execute(select(func.count()).select_from(issued)).scalar_one()

    def prune(self, before: datetime) -> int:
        """Drop what expired before *before*; return how many, 5,000 at most."""
        expired = select(issued.c.row).where(issued.c.expires_at < seconds(before))
        gone = delete(issued).where(issued.c.row.in_(expired.limit(PRUNE_ROWS)))
        return self._connection.execute(gone).rowcount


# Made once: to put a statement together costs as much as a row.
_SIGNING: Final = select(authorities.c.authority_id).where(
    authorities.c.state == AuthorityState.ACTIVE.value
)
_ISSUE: Final = insert(issued)
_NEVER: Final = datetime.fromtimestamp(0, UTC)


def _row_of(record: AuthorityRecord) -> dict[str, Any]:
    row = {
        "authority_id": record.authority_id,
        "kind": record.kind.value,
        "state": record.state.value,
        "key_id": record.key_id,
        "public": record.public,
        "not_before": micros(record.validity.not_before),
        "not_after": micros(record.validity.not_after),
        "prepared_at": micros(record.prepared_at),
        "activated_at": micros(record.activated_at),
        "retired_at": micros(record.retired_at),
    }
    return {**row, "checksum": _checksum(row)}


def _checksum(row: Mapping[str, Any] | RowMapping) -> bytes:
    facts = [row[one.name] for one in authorities.c if one.name not in ("row", "checksum")]
    return hashlib.sha256(repr(facts).encode()).digest()[:16]


def _record_of(row: RowMapping) -> AuthorityRecord:
    try:
        if row["checksum"] != _checksum(row):
            raise ValueError("checksum")
        return AuthorityRecord(
            row["authority_id"],
            AuthorityKind(row["kind"]),
            AuthorityState(row["state"]),
            row["key_id"],
            row["public"],
            Validity(_instant(row["not_before"]), _instant(row["not_after"])),
            _instant(row["prepared_at"]),
            instant_of_micros(row["activated_at"]),
            instant_of_micros(row["retired_at"]),
        )
    except BAD_VALUE as error:
        raise StoredValueError("a stored authority is damaged: restore the database") from error


def _instant(value: int) -> datetime:
    found = instant_of_micros(value)
    if found is None:
        raise ValueError("no instant")
    return found


def _document_of(bundle: Bundle) -> bytes:
    """A bundle with everything the wire gave us, expiries too, as the JWKS has no room."""
    hint = bundle.refresh_hint
    return json.dumps(
        {
            "x509": [[_text(one.der), one.tainted] for one in bundle.x509_authorities],
            "jwt": [
                [one.key_id, _text(one.public_key), seconds(one.expires_at), one.tainted]
                for one in bundle.jwt_authorities
            ],
            "sequence": bundle.sequence_number,
            "hint": 0 if hint is None else int(hint.total_seconds()),
        }
    ).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bundle_of(trust_domain: TrustDomain, document: bytes) -> Bundle:
    try:
        made: dict[str, Any] = json.loads(document)
        return Bundle(
            trust_domain,
            tuple(
                replace(X509Authority.parse(base64.b64decode(der)), tainted=tainted)
                for der, tainted in made["x509"]
            ),
            tuple(
                JwtAuthority(key_id, base64.b64decode(key), instant(expires), tainted)
                for key_id, key, expires, tainted in made["jwt"]
            ),
            made["sequence"],
            timedelta(seconds=made["hint"]) if made["hint"] else None,
        )
    except BAD_VALUE as error:
        raise StoredValueError("a stored bundle is damaged: set it again") from error
