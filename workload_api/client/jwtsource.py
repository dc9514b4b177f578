"""
JWT-SVIDs of this workload, at hand when they are wanted.

Source: WAPI-32 to WAPI-37, WAPI-56, IOP-13, WEP-18 to WEP-23, SEC-107.  A JWT-SVID is asked
for once for all who want the same, renewed at half-life while it is in use, and handed out
until it ends when the agent is away.
"""

import asyncio
import contextlib
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Self, TypeAlias

from spiffe_core.errors import (
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    SpiffeError,
)
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.lifetime import Validity, renew_at
from spiffe_core.spiffeid import SpiffeId
from workload_api.client.client import WorkloadClient
from workload_api.client.watching import FINAL, TIMEOUT, Clock, Pauses, SystemClock

KEPT: Final = 1_000
"""Of audiences and identities; the one that was not used for longest goes first."""
MIN_LIFE: Final = timedelta(seconds=10)  # IOP-13
PATIENCE: Final = timedelta(seconds=1)
"""How long a JWT-SVID in its last seconds waits for the next before it is handed out."""
_SHORTEST: Final = timedelta(seconds=1)  # between renewals, whatever the agent sends
_LEFT: Final = "no JWT-SVID: the source is not entered, or was left"
_REFUSED: Final = (ForbiddenError, *FINAL)

_Key: TypeAlias = tuple[frozenset[str], SpiffeId | None]


@dataclass(slots=True, eq=False)
class _Held:
    svid: JwtSvid
    renew_at: datetime
    renewal: "asyncio.Task[None] | None" = field(default=None, repr=False)
    is_used: bool = False


class JwtSource:
    """
    JWT-SVIDs by audience, as an async context manager, of one event loop.

    Entering it opens the connection and asks nothing; the first answer is that of `fetch`.

    Raises:
        PreconditionError: no address given, and none in ``SPIFFE_ENDPOINT_SOCKET``.
        EndpointError: the address is not one.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: timedelta = TIMEOUT,
        clock: Clock | None = None,
    ) -> None:
        self._client = WorkloadClient(address)
        self._timeout = timeout
        self._clock = clock or SystemClock()
        self._held: OrderedDict[_Key, _Held] = OrderedDict()
        self._asked: dict[_Key, asyncio.Task[JwtSvid]] = {}
        self._is_open = False
        self.problem = ""
        """How the agent answered last, if not well; empty when it did."""

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        self._is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_open = False
        renewals = [one.renewal for one in self._held.values() if one.renewal is not None]
        tasks = [*self._asked.values(), *renewals]
        self._held.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.__aexit__()

    async def fetch(
        self, audience: str, *more: str, spiffe_id: SpiffeId | str | None = None
    ) -> JwtSvid:
        """
        Return a JWT-SVID for *audience* (and *more*) of our default identity or *spiffe_id*.

        Raises:
            NotReadyError: none is held, and none came in time; it says what the agent answered.
            ForbiddenError: the agent knows no such identity of ours.
            MalformedError: an audience is empty, or the agent does not take the request.
            UnsupportedError: the agent offers no JWT-SVIDs.
        """
        key = _key_of((audience, *more), spiffe_id)
        if not self._is_open:
            raise NotReadyError(_LEFT)
        held = self._held.get(key)
        now = self._clock.now()
        if held is None or now >= held.svid.expires_at:
            return await self._in_time(key)
        held.is_used = True
        self._held.move_to_end(key)
        if now < held.renew_at:
            return held.svid
        asked = self._ask(key)
        if now + MIN_LIFE < held.svid.expires_at:
            return held.svid
        return await self._next_or(held, asked)

    async def _next_or(self, held: _Held, asked: "asyncio.Task[JwtSvid]") -> JwtSvid:
        """Return the next one, or the one in its last seconds when that does not come soon."""
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                return await _answer_of(asked)
        except _REFUSED:
            raise
        except (SpiffeError, TimeoutError) as error:
            if self._clock.now() < held.svid.expires_at:
                return held.svid
            raise NotReadyError(f"no JWT-SVID: {self.problem}") from error

    async def _in_time(self, key: _Key) -> JwtSvid:
        """Ask until there is an answer or the time is up."""
        pauses = Pauses()
        try:
            async with asyncio.timeout(self._timeout.total_seconds()):
                while self._is_open:
                    try:
                        svid = await _answer_of(self._ask(key))
                    except _REFUSED:
                        raise
                    except SpiffeError as error:
                        await self._clock.sleep(pauses.after(error))
                        continue
                    if key in self._held:
                        self._held[key].is_used = True
                    return svid
                raise NotReadyError(_LEFT)
        except TimeoutError as error:
            raise NotReadyError(
                f"no JWT-SVID came from the Workload API at {self._client.address} in "
                f"{self._timeout.total_seconds():g} s: {self.problem or 'it has not answered'}"
            ) from error

    def _ask(self, key: _Key) -> "asyncio.Task[JwtSvid]":
        """Ask once for all who want the same; it goes on when a caller's patience ends."""
        task = self._asked.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(key))
            self._asked[key] = task
            task.add_done_callback(lambda done: self._answered(key, done))
        return task

    def _answered(self, key: _Key, task: "asyncio.Task[JwtSvid]") -> None:
        del self._asked[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; that nobody does is no mistake

    async def _fetch(self, key: _Key) -> JwtSvid:
        audience, spiffe_id = key
        try:
            svid = (await self._client.fetch_jwt(tuple(sorted(audience)), spiffe_id))[0]
            if svid.expires_at <= self._clock.now():
                raise InternalError("the agent sent a JWT-SVID that has expired")
        except SpiffeError as error:
            self.problem = str(error)
            if isinstance(error, _REFUSED):
                self._drop(key)  # WAPI-28: what is denied is used no longer
            raise
        self.problem = ""
        self._keep(key, svid)
        return svid

    def _keep(self, key: _Key, svid: JwtSvid) -> None:
        self._drop(key)
        now = self._clock.now()
        # From now and not from its issuance: of one that is old already, half of what is left.
        due = renew_at(Validity(now, svid.expires_at), random.SystemRandom().uniform(-1, 1))
        held = _Held(svid, max(due, now + _SHORTEST))
        self._held[key] = held
        held.renewal = asyncio.create_task(self._renew(key, held))
        while len(self._held) > KEPT:
            self._drop(next(iter(self._held)))

    def _drop(self, key: _Key) -> None:
        held = self._held.pop(key, None)
        if held is not None and held.renewal is not None:
            held.renewal.cancel()

    async def _renew(self, key: _Key, held: _Held) -> None:
        """Renew *held* at half-life if it is in use, and forget it when it ends."""
        await self._clock.sleep(held.renew_at - self._clock.now())
        pauses = Pauses()
        while held.is_used and self._clock.now() < held.svid.expires_at:
            # Cancelled by `_keep` or `_drop` when that has an answer.
            with contextlib.suppress(SpiffeError):
                await _answer_of(self._ask(key))
            await self._clock.sleep(pauses.after(NotReadyError(self.problem)))
        await self._clock.sleep(held.svid.expires_at - self._clock.now())
        self._held.pop(key, None)


async def _answer_of(asked: "asyncio.Task[JwtSvid]") -> JwtSvid:
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        if asked.cancelled():
            raise NotReadyError(_LEFT) from None
        raise


def _key_of(audience: tuple[str, ...], spiffe_id: SpiffeId | str | None) -> _Key:
    if not all(audience):
        raise MalformedError("an audience must not be empty")
    wanted = SpiffeId.parse(spiffe_id) if isinstance(spiffe_id, str) else spiffe_id
    return frozenset(audience), wanted
