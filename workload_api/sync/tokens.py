"""
JWT-SVIDs that were fetched already (SEC-47, IOP-13).

Kept by entry, revision and audience; renewed at half-life; handed out when the server is slow
or away, until shortly before they end.  Many who want the same at once are one question.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import NotFoundError, NotReadyError, SpiffeError
from spiffe_core.jwtsvid import JwtSvid
from workload_api.cache.cache import WorkloadCache

MIN_LIFE: Final = timedelta(seconds=10)  # IOP-13
PATIENCE: Final = 1.0  # SEC-47: seconds before a good cached token is handed out instead
KEPT: Final = 10_000

Fetch = Callable[[RegistrationEntry, tuple[str, ...]], Coroutine[Any, Any, JwtSvid]]
_Key: TypeAlias = tuple[str, int, datetime | None, tuple[str, ...]]


class TokenCache:
    """For one event loop."""

    def __init__(self, cache: WorkloadCache, fetch: Fetch, now: Callable[[], datetime]) -> None:
        self._cache = cache
        self._fetch = fetch
        self._now = now
        self._held: OrderedDict[_Key, JwtSvid] = OrderedDict()
        self._asked: dict[_Key, asyncio.Task[JwtSvid]] = {}

    async def get(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        """
        Return a token for *entry* and exactly *audience* that lives for a while yet.

        Raises:
            SpiffeError: none is held, and the server's answer.
        """
        if entry.jwt_svid_include_jti:  # each is to be another one
            with _retried_when_unknown():
                return await self._fetch(entry, audience)
        key = (entry.id, entry.revision_number, entry.created_at, tuple(sorted(audience)))
        held, now = self._held.get(key), self._now()
        if held is not None and not self._is_trusted(held):
            held = None
        if held is not None and now < _half_life(held):
            self._held.move_to_end(key)
            return held
        spare = held if held is not None and now + MIN_LIFE < held.expires_at else None
        try:
            async with asyncio.timeout(PATIENCE if spare is not None else None):
                with _retried_when_unknown():
                    return await self._fetched(key, entry, audience)
        except (SpiffeError, TimeoutError):
            if spare is not None:
                return spare
            raise

    def clear(self) -> None:
        """Forget every token, and those that are asked for."""
        self._held.clear()
        for task in self._asked.values():
            task.cancel()

    async def _fetched(
        self, key: _Key, entry: RegistrationEntry, audience: tuple[str, ...]
    ) -> JwtSvid:
        """Ask once for all who want the same; it goes on when a caller's patience ends."""
        task = self._asked.get(key)
        if task is None:
            task = asyncio.ensure_future(self._fetch(entry, audience))
            self._asked[key] = task
            task.add_done_callback(lambda done: self._answered(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise NotReadyError("the agent has forgotten its tokens") from None
            raise

    def _answered(self, key: _Key, task: "asyncio.Task[JwtSvid]") -> None:
        del self._asked[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._held[key] = task.result()
        while len(self._held) > KEPT:
            self._held.popitem(last=False)

    def _is_trusted(self, held: JwtSvid) -> bool:
        own = self._cache.bundles.get(self._cache.trust_domain)
        authority = own.jwt_authority(held.key_id) if own else None
        return authority is not None and not authority.tainted


def _half_life(svid: JwtSvid) -> datetime:
    begin = svid.issued_at or svid.expires_at
    return begin + (svid.expires_at - begin) / 2


@contextlib.contextmanager
def _retried_when_unknown() -> Iterator[None]:
    """A retry may help where the entry is on its way to the server's replica."""
    try:
        yield
    except NotFoundError as error:
        raise NotReadyError("the entry is not known to the server yet") from error
