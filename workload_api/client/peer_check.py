"""
Who is at the other end: proved at the handshake, and again for as long as it is used.

Source: SEC-10, SEC-11, SEC-16 to SEC-18.  The TLS library is a first sieve and never decides:
its store holds the authorities of every trust domain at once, so that it would let one of them
sign for another (T-09).
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

from cryptography import x509

from spiffe_core.bundle import Bundle
from spiffe_core.matching import Matcher
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.logs import event
from workload_api.client.material import X509Material

Now: TypeAlias = Callable[[], datetime]
"""A clock; tests have one of their own."""

SWEEP_INTERVAL: Final = timedelta(seconds=1)
"""How long after its SVID a connection may still be held open."""
_MAX_KNOWN: Final = 1024
_log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """Return the present instant."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Known:
    """A chain that was verified; nothing about it can change from *at* to *until*."""

    svid: X509Svid
    bundle: Bundle
    at: datetime
    until: datetime


class PeerVerifier:
    """
    Verifies the peers of one server or client; cheap for one that was verified before.

    *authorize* is asked every time, as what it goes by may change.
    """

    def __init__(
        self, material: X509Material, authorize: Matcher, now: Now | None = None
    ) -> None:
        self._material = material
        self._authorize = authorize
        self._now = now or utc_now
        self._known: dict[tuple[bytes, ...], _Known] = {}

    def verify(self, chain: Sequence[bytes]) -> X509Svid:
        """
        Return whose *chain* it is, leaf first, by its own trust domain's bundle of now.

        Raises:
            X509SvidError: it is not an X509-SVID, or not one to be trusted any more.
            ForbiddenError: it is, and *authorize* does not want it.
        """
        svid = self._verified(tuple(chain))
        self._authorize(svid.spiffe_id)
        return svid

    def has_expired(self, svid: X509Svid) -> bool:
        """Whether *svid* is past its last instant."""
        return self._now() > svid.validity.not_after

    def _verified(self, chain: tuple[bytes, ...]) -> X509Svid:
        now, bundles = self._now(), self._material.bundles
        known = self._known.get(chain)
        if (
            known is not None
            and known.at <= now <= known.until
            and bundles.get(known.svid.spiffe_id.trust_domain) is known.bundle
        ):
            return known.svid
        self._known.pop(chain, None)
        svid = verify_x509_svid(chain, bundles, at=now)
        bundle = bundles[svid.spiffe_id.trust_domain]
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[chain] = _Known(svid, bundle, now, _holds_until(chain, bundle, now))
        return svid


def _holds_until(chain: tuple[bytes, ...], bundle: Bundle, now: datetime) -> datetime:
    """The first instant at which something that the path may lean on ends."""
    ends = [x509.load_der_x509_certificate(der).not_valid_after_utc for der in chain]
    authorities = [one.validity.not_after for one in bundle.x509_authorities]
    return min([*ends, *(end for end in authorities if end >= now)])


@asynccontextmanager
async def sweeping(
    material: X509Material, sweep: Callable[[], None], every: timedelta = SWEEP_INTERVAL
) -> AsyncIterator[None]:
    """
    Call *sweep* while entered: at each change of *material*, and every so often (SEC-17).

    A connection that is held open asks nobody again; *sweep* ends those whose time is over.
    """
    changed = asyncio.Event()
    forget = material.on_change(changed.set)

    async def run() -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every.total_seconds()):
                    await changed.wait()
            changed.clear()
            try:
                sweep()
            except Exception as error:  # noqa: BLE001 the next one may do better
                event(_log, logging.ERROR, "sweep_failed", exc_info=error)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        forget()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
