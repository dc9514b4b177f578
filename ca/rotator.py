"""
Drives the authorities through their lives; the one loop of this package.

Source: architecture A7, SEC-60, SEC-66, SPIRE API 9.  Each step is on record before it acts,
and can be taken again after a crash at any point.
"""

import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from ca.active import ActiveJwt, ActiveX509
from ca.clock import Clock
from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState, JournalStore
from ca.keys.protocol import KeyManager, KeyPurpose
from ca.schedule import Spans, activate_at, may_sign_from, prepare_at, prune_at
from ca.x509 import self_signed
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import AbortedError, InternalError, NotReadyError, SpiffeError
from spiffe_core.keys import KeyKind
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import TrustDomain

_log = logging.getLogger(__name__)
STEP_INTERVAL: Final = timedelta(seconds=5)
_PURPOSE: Final = {
    AuthorityKind.X509: KeyPurpose.X509_CA,
    AuthorityKind.JWT: KeyPurpose.JWT,
}


@dataclass(frozen=True, slots=True)
class RotationSettings:
    """How long authorities live, on which keys, and how far ahead they are published."""

    x509_ttl: timedelta
    jwt_ttl: timedelta
    key_kind: KeyKind
    spans: Spans


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
            KeyStoreError: a key on record is missing or damaged; no new one is made for it.
        """
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
        """Do what is due now, for both kinds; idempotent."""
        records = await self._journal.load()
        for kind in AuthorityKind:
            await self._step(kind, [one for one in records if one.kind is kind])
        await self._drop_orphans()

    async def _step(self, kind: AuthorityKind, records: list[AuthorityRecord]) -> None:
        now = self._clock.now()
        by_state = {state: [r for r in records if r.state is state] for state in AuthorityState}
        active = next(iter(by_state[AuthorityState.ACTIVE]), None)
        prepared = next(iter(by_state[AuthorityState.PREPARED]), None)
        if active is None or active.validity.not_after <= now:
            # A new trust domain, or a server that slept through its authority's life: nobody
            # can be served meanwhile, so the next one signs once stored and read back.
            prepared = prepared or await self._prepare(kind, now)
            await self._activate(prepared, now)
            return
        if prepared is None and now >= prepare_at(active.validity):
            prepared = await self._prepare(kind, now)
        due = prepared is not None and now >= activate_at(active.validity)
        if due and now >= may_sign_from(prepared.prepared_at, self._settings.spans):  # type: ignore[union-attr]
            await self._activate(prepared, now)  # type: ignore[arg-type]
        else:
            await self._take_up(active)
        for old in by_state[AuthorityState.OLD]:
            retired_at = old.retired_at or now
            if now >= prune_at(old.validity, retired_at, self._settings.spans):
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
        # Before the switch is on record, so that a missing key stops it.
        await self._keys.load(record.key_id, _PURPOSE[record.kind])
        with contextlib.suppress(AbortedError):  # another step got there first
            await self._journal.activate(record.authority_id, at=now)
        crash_point("authority.activated")
        await self._take_up(record)
        self._on_change()

    async def _take_up(self, record: AuthorityRecord) -> None:
        if record.kind is AuthorityKind.X509:
            held = self._x509
            if held is None or held.authority.authority_id != record.authority_id:
                key = await self._keys.load(record.key_id, KeyPurpose.X509_CA)
                self._x509 = ActiveX509(X509Authority.parse(record.public), key)
        elif self._jwt is None or self._jwt.key_id != record.authority_id:
            key = await self._keys.load(record.key_id, KeyPurpose.JWT)
            self._jwt = ActiveJwt(record.authority_id, record.validity, key)

    async def _drop_orphans(self) -> None:
        """Remove keys that a crash left without a record."""
        known = {record.key_id for record in await self._journal.load()}
        for key_id in await self._keys.key_ids() - known:
            await self._keys.delete(key_id)


def _holds(bundle: Bundle, record: AuthorityRecord) -> bool:
    if record.kind is AuthorityKind.X509:
        return any(one.der == record.public for one in bundle.x509_authorities)
    return bundle.jwt_authority(record.authority_id) is not None
