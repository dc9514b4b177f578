"""
JWT-SVIDs that were fetched already (SEC-47, IOP-13).

Kept by entry, revision and audience; renewed at half-life; handed out when the server is slow
or away, until shortly before they end.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import NotFoundError, NotReadyError, SpiffeError
from spiffe_core.jwtsvid import JwtSvid
from workload_api.cache.cache import WorkloadCache

MIN_LIFE: Final = timedelta(seconds=10)  # IOP-13
PATIENCE: Final = 1.0  # SEC-47: seconds before a good cached token is handed out instead
KEPT: Final = 10_000

Fetch = Callable[[RegistrationEntry, tuple[str, ...]], Awaitable[JwtSvid]]


class TokenCache:
    """For one event loop."""

    def __init__(self, cache: WorkloadCache, fetch: Fetch, now: Callable[[], datetime]) -> None:
        self._cache = cache
        self._fetch = fetch
        self._now = now
        self._held: OrderedDict[tuple[object, ...], JwtSvid] = OrderedDict()

    async def get(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        """
        Return a token for *entry* and exactly *audience* that lives for a while yet.

        Raises:
            SpiffeError: none is held, and the server's answer.
        """
        key = (entry.id, entry.revision_number, entry.created_at, tuple(sorted(audience)))
        held = None if entry.jwt_svid_include_jti else self._held.get(key)
        now = self._now()
        if held is not None and not self._is_trusted(held):
            held = None
        if held is not None and now < _half_life(held):
            return held
        spare = held if held is not None and now + MIN_LIFE < held.expires_at else None
        try:
            async with asyncio.timeout(PATIENCE if spare is not None else None):
                fetched = await self._fetch(entry, audience)
        except (SpiffeError, TimeoutError) as error:
            if spare is not None:
                return spare
            # A retry may help where the entry is on its way to the server's replica.
            if isinstance(error, NotFoundError):
                raise NotReadyError("the entry is not known to the server yet") from error
            raise
        self._held[key] = fetched
        while len(self._held) > KEPT:
            self._held.popitem(last=False)
        return fetched

    def clear(self) -> None:
        """Forget every token."""
        self._held.clear()

    def _is_trusted(self, held: JwtSvid) -> bool:
        own = self._cache.bundles.get(self._cache.trust_domain)
        authority = own.jwt_authority(held.key_id) if own else None
        return authority is not None and not authority.tainted


def _half_life(svid: JwtSvid) -> datetime:
    begin = svid.issued_at or svid.expires_at
    return begin + (svid.expires_at - begin) / 2
