"""
Keeps a table in step with a cluster: list once, then watch from there, for ever.

Source: Kubernetes API concepts, "Efficient detection of changes"; SEC-107.  Nothing is polled:
an event arrives when it happens.  A table keeps what it has while the API server is away.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, Protocol, TypeVar

from spiffe_core.errors import SpiffeError
from spiffe_wire.backoff import Backoff
from spiffe_wire.k8s.client import Client, ClusterError, GoneError
from spiffe_wire.k8s.objects import ObjectError
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
PAGE: Final = 500
FIRST_PAUSE: Final = timedelta(milliseconds=100)
LONGEST_PAUSE: Final = timedelta(seconds=10)
HURRIED_PAUSE: Final = timedelta(seconds=1)
"""A server that fails is asked no more often, however many are in a hurry."""
HURRIED_FOR: Final = timedelta(seconds=5)
"""So long is waited for a pod (security requirements, table 1)."""
WATCH_SECONDS: Final = (240, 300)
"""How long one watch is asked for, at random: agents must not all come back at once."""
SILENCE: Final = timedelta(seconds=WATCH_SECONDS[1] + 15)
BOOKMARKED_SILENCE: Final = timedelta(seconds=150)
"""Of a server that sends bookmarks: real ones do once a minute [recorded of 1.20.2]."""
SHORTEST: Final = 1.0
"""Seconds; a server that ends watches sooner is asked again as one that fails."""
NOT_ASKED: Final = "not asked yet"
AT_A_STRETCH: Final = 50
"""Objects parsed before others have a turn: about 2 ms."""
_T = TypeVar("_T")
_T_contra = TypeVar("_T_contra", contravariant=True)


class Sink(Protocol[_T_contra]):
    """Takes what a watch brings."""

    def replace(self, objects: Iterable[_T_contra]) -> None:
        """These are all there are."""
        ...

    def put(self, found: _T_contra) -> None:
        """This is new or changed."""
        ...

    def drop(self, found: _T_contra) -> None:
        """This is there no longer."""
        ...


@dataclass(frozen=True, slots=True)
class Kind(Generic[_T]):
    """What is watched."""

    path: str
    """Such as ``/api/v1/pods``."""
    parse: Callable[[Any], _T]
    field_selector: str = ""
    metadata_only: bool = False


class Watch(Generic[_T]):
    """One kind of one cluster, kept in *sink*; `run` goes on until it is cancelled."""

    def __init__(
        self, client: Client, kind: Kind[_T], sink: Sink[_T], *, cluster: str = ""
    ) -> None:
        self._client = client
        self._kind = kind
        self._sink = sink
        self._cluster = cluster
        self._version = ""
        self._listed_at = 0.0
        self._has_bookmarks = False
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._said = ""
        self._hurried = asyncio.Event()
        self._hurried_until = 0.0
        self.synced = asyncio.Event()
        """Set once the first list is in."""
        self.problem = NOT_ASKED
        """Why it is not in step now; empty when it is."""
        self.away_since: float | None = time.monotonic()
        """When it fell out of step, on the monotonic clock; None while it is in step."""

    @property
    def away(self) -> timedelta:
        """For how long the table has not been in step."""
        if self.away_since is None:
            return timedelta(0)
        return timedelta(seconds=time.monotonic() - self.away_since)

    async def run(self) -> None:
        """Stay in step until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                if await self._follow() > SHORTEST:
                    continue  # the server ends every watch after a while: nothing was missed
            except GoneError:
                self._version = ""
                if time.monotonic() - self._listed_at > LONGEST_PAUSE.total_seconds():
                    # It answers, and what is so old may well be gone: after it was away, what
                    # came meanwhile must not wait for the long pause that this has led to.
                    self._backoff.reset()
                self._out_of_step("the API server keeps no changes from so long ago")
            except SpiffeError as error:
                self._out_of_step(str(error))
            except Exception as error:  # noqa: BLE001 a mistake of ours, and no end of it
                self._version = ""
                event(
                    _log, logging.ERROR, "watch_crashed", of=self._kind.path,
                    cluster=self._cluster, exc_info=error,
                )  # fmt: skip
                self._out_of_step("the watch failed; the log says why")
            await self._pause()

    def hurry(self) -> None:
        """Somebody waits, for a while, for what may have come: make no long pauses."""
        self._hurried_until = time.monotonic() + HURRIED_FOR.total_seconds()
        self._hurried.set()

    async def _pause(self) -> None:
        seconds = self._backoff.next().total_seconds()
        least = min(seconds, HURRIED_PAUSE.total_seconds())
        await asyncio.sleep(least)
        if time.monotonic() >= self._hurried_until:
            self._hurried.clear()
            try:
                async with asyncio.timeout(seconds - least):
                    await self._hurried.wait()
            except TimeoutError:
                pass

    async def _list(self) -> None:
        found: list[_T] = []
        params = self._params(limit=str(PAGE))
        while True:
            page = await self._client.page(
                self._kind.path, params, metadata_only=self._kind.metadata_only
            )
            items = page.get("items") or []  # none is `null`, as Go writes it
            if not isinstance(items, list):
                raise ClusterError("the API server's list is not one")
            for number, item in enumerate(items, 1):
                parsed = self._parsed(item)
                if parsed is not None:
                    found.append(parsed)
                if number % AT_A_STRETCH == 0:
                    await asyncio.sleep(0)
            metadata = _metadata(page)
            if not metadata.get("continue"):
                break
            params["continue"] = str(metadata["continue"])
        version = str(metadata.get("resourceVersion", ""))
        if not version:
            raise ClusterError("the API server's list has no resourceVersion")
        self._sink.replace(found)
        self._version, self._listed_at = version, time.monotonic()
        self.synced.set()

    async def _follow(self) -> float:
        """Return for how many seconds it was watched until the server ended it."""
        seconds = random.randint(*WATCH_SECONDS)  # noqa: S311 spreads load only
        params = self._params(
            watch="1",
            allowWatchBookmarks="true",
            resourceVersion=self._version,
            timeoutSeconds=str(seconds),
        )
        async with self._client.watch(
            self._kind.path, params, silence=SILENCE, metadata_only=self._kind.metadata_only
        ) as events:
            started = time.monotonic()
            # Of this server: one that was started anew sends none of a kind until it has seen a
            # change of one [1.20.2].
            self._has_bookmarks = False
            self._in_step()
            async with asyncio.timeout(None) as limit:
                self._expect(limit)
                async for one in events:
                    self._take(one)
                    self._backoff.reset()
                    self._expect(limit)
        return time.monotonic() - started

    def _expect(self, limit: asyncio.Timeout) -> None:
        # A server that hangs looks as one to which nothing happens, unless it sends bookmarks.
        if self._has_bookmarks:
            now = asyncio.get_running_loop().time()
            limit.reschedule(now + BOOKMARKED_SILENCE.total_seconds())

    def _take(self, given: Any) -> None:
        what, item = given.get("type"), given.get("object")
        if what == "ERROR":
            code = item.get("code") if isinstance(item, dict) else None
            if code == 410:
                raise GoneError("the watch is too old", 410)
            raise ClusterError(f"the watch failed with {code}")
        if not isinstance(item, dict):
            raise ClusterError("an event of the watch holds no object")
        metadata = _metadata(item)
        version = metadata.get("resourceVersion")
        if what == "DELETED":
            parsed = self._parsed(item)
            if parsed is not None:
                self._sink.drop(parsed)
        elif what in ("ADDED", "MODIFIED"):
            parsed = self._parsed(item)
            if parsed is not None:
                self._sink.put(parsed)
        elif what == "BOOKMARK":
            self._has_bookmarks = True
        if version:  # a bookmark has nothing else
            self._version = str(version)

    def _parsed(self, item: Any) -> _T | None:
        try:
            return self._kind.parse(item)
        except ObjectError as error:
            # One that we cannot read must not keep us from the others.
            event(
                _log, logging.ERROR, "object_skipped", of=self._kind.path, why=str(error),
                cluster=self._cluster,
            )  # fmt: skip
            return None

    def _params(self, **given: str) -> dict[str, str]:
        if self._kind.field_selector:
            given["fieldSelector"] = self._kind.field_selector
        return given

    def _in_step(self) -> None:
        if self.problem:
            event(_log, logging.INFO, "watching", of=self._kind.path, cluster=self._cluster)
        self.problem, self.away_since, self._said = "", None, ""

    def _out_of_step(self, why: str) -> None:
        self.problem = why
        if self.away_since is None:
            self.away_since = time.monotonic()
        if why != self._said:
            self._said = why
            event(
                _log, logging.WARNING, "watch_failed", of=self._kind.path, why=why,
                cluster=self._cluster,
            )  # fmt: skip


def _metadata(given: Mapping[str, Any]) -> Mapping[str, Any]:
    found = given.get("metadata") or {}
    if not isinstance(found, dict):
        raise ClusterError("the metadata of an object is not a JSON object")
    return found
