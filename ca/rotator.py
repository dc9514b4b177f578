"""
Drives the authorities through their lives; the one loop of this package.

Source: architecture A7, SEC-60, SEC-66, SPIRE API 9.  Each step is on record before it acts,
and can be taken again after a crash at any point.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509

from ca.active import ActiveJwt, ActiveX509
from ca.clock import Clock
from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState, JournalStore
from ca.keys.protocol import KeyManager, KeyPurpose, KeyStoreError
from ca.schedule import activate_at, lead_of, prepare_at, prune_at
from ca.x509 import self_signed
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import (
    AbortedError,
    InternalError,
    MalformedError,
    NotReadyError,
    SpiffeError,
)
from spiffe_core.keys import KeyKind, spki_of
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import TrustDomain

_log = logging.getLogger(__name__)
STEP_INTERVAL: Final = timedelta(seconds=5)
MAX_TTL: Final = timedelta(days=36500)  # certificates have no form for dates after year 9999
_PURPOSE: Final = {
    AuthorityKind.X509: KeyPurpose.X509_CA,
    AuthorityKind.JWT: KeyPurpose.JWT,
}


@dataclass(frozen=True, slots=True)
class RotationSettings:
    """
    How long authorities live, on which keys, and how far ahead they are published.

    A key is published *publish_ahead* before it signs: one sync interval or more (SEC-66).
    """

    x509_ttl: timedelta
    jwt_ttl: timedelta
    key_kind: KeyKind
    publish_ahead: timedelta

    def __post_init__(self) -> None:
        for name, ttl in (("x509_ttl", self.x509_ttl), ("jwt_ttl", self.jwt_ttl)):
            if not timedelta(0) < ttl <= MAX_TTL:
                raise MalformedError(
                    f"authority.{name}: must be above 0, and 100 years at most"
                )
        lead = lead_of(min(self.x509_ttl, self.jwt_ttl)) - STEP_INTERVAL
        if not timedelta(0) < self.publish_ahead <= lead:
            raise MalformedError(
                "authority.publish_ahead: must be above 0, and below a third of an authority's "
                "life, or the next one could not take over in time"
            )


class Rotator:
    """Holds the authorities that sign now, and keeps there being some."""

    def __init__(
        self,
        journal: JournalStore,
        keys: KeyManager,
        settings: RotationSettings,
        clock: Clock,
        trust_domain: TrustDomain,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._keys = keys
        self._settings = settings
        self._clock = clock
        self._trust_domain = trust_domain
        self._on_change = on_change
        self._x509: ActiveX509 | None = None
        self._jwt: ActiveJwt | None = None
        self.problem = ""
        """Why the last step failed; empty after one that did not."""

    @property
    def x509(self) -> ActiveX509:
        """
        The X.509 authority that signs.

        Raises:
            NotReadyError: none is active yet.
        """
        if self._x509 is None:
            raise NotReadyError("no X.509 authority is active yet")
        return self._x509

    @property
    def jwt(self) -> ActiveJwt:
        """
        The JWT authority that signs.

        Raises:
            NotReadyError: none is active yet.
        """
        if self._jwt is None:
            raise NotReadyError("no JWT authority is active yet")
        return self._jwt

    async def start(self) -> None:
        """
        Load what is on record, or make the first authorities of a new trust domain.

        Raises:
            KeyStoreError: a key on record is missing, damaged or another one; or there are
                keys and no record of them.  No new one is made in their place (SEC-61).
        """
        if not await self._journal.load() and len(await self._keys.key_ids()) > 1:
            # One may be left of a first start that was cut short.
            raise KeyStoreError(
                "there are keys of authorities and no record of them: restore the database, or "
                "move the keys away to begin a new trust domain"
            )
        await self.step()
        if self._x509 is None or self._jwt is None:
            raise InternalError("an authority on record could not be taken up")

    async def run(self) -> None:
        """Take steps until cancelled; a failed one is logged, shown, and tried again."""
        while True:
            await self._clock.sleep(STEP_INTERVAL)
            try:
                await self.step()
                self.problem = ""
            except SpiffeError as error:
                self.problem = f"rotation: {error}"
                _log.exception("rotation_failed")

    async def step(self) -> None:
        """
        Do what is due now, for both kinds; idempotent.

        Raises:
            SpiffeError: something failed; what could be done for the other kind was done.
        """
        records = await self._journal.load()
        await self._drop_orphans(records)
        failed = []
        for kind in AuthorityKind:
            try:
                await self._step(kind, [one for one in records if one.kind is kind])
            except SpiffeError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    async def _step(self, kind: AuthorityKind, records: list[AuthorityRecord]) -> None:
        now = self._clock.now()
        active = _first(records, AuthorityState.ACTIVE)
        prepared = _first(records, AuthorityState.PREPARED)
        if active is None or active.validity.not_after <= now:
            await self._begin(kind, prepared, now)
        elif prepared is None:
            await self._take_up(active)
            if now >= prepare_at(active.validity):
                await self._prepare(kind, now)
        elif now >= max(
            activate_at(active.validity), prepared.prepared_at + self._settings.publish_ahead
        ):
            await self._activate(prepared, now)
        else:
            await self._take_up(active)
        for old in records:
            if old.state is AuthorityState.OLD and now >= prune_at(old.validity):
                await self._prune(old)

    async def _begin(
        self, kind: AuthorityKind, prepared: AuthorityRecord | None, now: datetime
    ) -> None:
        """
        Have an authority sign though none could be published ahead.

        The trust domain is new, or the server slept through its authority's life, and with it
        everything that it had signed: nobody can be served meanwhile, and whoever comes back
        gets the new bundle first.  So the next one signs once it is stored and read back.
        """
        if prepared is not None and prepared.validity.not_after <= now:
            # Slept through too: unused, it is retired and pruned as any other.
            await self._journal.activate(prepared.authority_id, at=now)
            prepared = None
        await self._activate(prepared or await self._prepare(kind, now), now)

    async def _prune(self, old: AuthorityRecord) -> None:
        crash_point("authority.before_prune")
        await self._journal.prune(old.authority_id)
        crash_point("authority.pruned")
        await self._keys.delete(old.key_id)
        self._on_change()

    async def _prepare(self, kind: AuthorityKind, now: datetime) -> AuthorityRecord:
        """Make a key and its public half, put both on record, publish."""
        key_id = f"{kind.value}-{secrets.token_hex(10)}"
        key = await self._keys.generate(key_id, self._settings.key_kind, _PURPOSE[kind])
        crash_point("authority.key_made")
        if kind is AuthorityKind.X509:
            root = self_signed(key, self._trust_domain, now=now, ttl=self._settings.x509_ttl)
            authority_id, public, validity = root.authority_id, root.der, root.validity
        else:
            authority_id, public = secrets.token_hex(16), key.public_key
            validity = Validity(now, now + self._settings.jwt_ttl)
        record = AuthorityRecord(
            authority_id, kind, AuthorityState.PREPARED, key_id, public, validity, now
        )
        await self._journal.add_prepared(record)
        crash_point("authority.published")
        self._on_change()
        return record

    async def _activate(self, record: AuthorityRecord, now: datetime) -> None:
        if not _holds(await self._journal.published(), record):
            raise InternalError("an authority is not in the bundle that was read back")
        crash_point("authority.read_back")
        # Before the switch is on record, so that a missing or wrong key stops it.
        made = await self._load(record)
        try:
            await self._journal.activate(record.authority_id, at=now)
        except AbortedError:
            return  # another server got there first; the next step takes up what it left
        crash_point("authority.activated")
        self._hold(made)
        self._on_change()

    async def _take_up(self, record: AuthorityRecord) -> None:
        held = self._x509 if record.kind is AuthorityKind.X509 else self._jwt
        if held is None or held.authority_id != record.authority_id:
            self._hold(await self._load(record))

    async def _load(self, record: AuthorityRecord) -> ActiveX509 | ActiveJwt:
        key = await self._keys.load(record.key_id, _PURPOSE[record.kind])
        if key.public_key != public_key_of(record):
            raise KeyStoreError(
                f"key {record.key_id} is not the one on record: restore it from a backup"
            )
        if record.kind is AuthorityKind.X509:
            return ActiveX509(X509Authority.parse(record.public), key)
        return ActiveJwt(record.authority_id, record.validity, key)

    def _hold(self, made: ActiveX509 | ActiveJwt) -> None:
        if isinstance(made, ActiveX509):
            self._x509 = made
        else:
            self._jwt = made

    async def _drop_orphans(self, records: Sequence[AuthorityRecord]) -> None:
        """Remove keys that a crash left without a record."""
        for key_id in await self._keys.key_ids() - {one.key_id for one in records}:
            await self._keys.delete(key_id)


def public_key_of(record: AuthorityRecord) -> bytes:
    """Return the public key of an authority on record, SPKI DER."""
    if record.kind is AuthorityKind.JWT:
        return record.public
    return spki_of(x509.load_der_x509_certificate(record.public).public_key())


def _first(records: Sequence[AuthorityRecord], state: AuthorityState) -> AuthorityRecord | None:
    return next((one for one in records if one.state is state), None)


def _holds(bundle: Bundle, record: AuthorityRecord) -> bool:
    if record.kind is AuthorityKind.X509:
        return any(one.der == record.public for one in bundle.x509_authorities)
    return bundle.jwt_authority(record.authority_id) is not None
