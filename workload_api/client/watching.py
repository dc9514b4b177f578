"""
What every source does: follow streams of the Workload API for as long as a program runs.

Source: WEP-18, WEP-20, WEP-22, WEP-23 (what is retried, and what never), WAPI-06, WAPI-07,
WAPI-28, WAPI-31 (what is denied is used no longer), SEC-107, T-12 (however a stream ends, it
is opened again), T-13 (an update that breaks a rule replaces nothing).
"""

import asyncio
import contextlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from spiffe_core.errors import (
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_wire.backoff import Backoff
from spiffe_wire.logs import event
from workload_api.client.client import Broken, WorkloadClient

TIMEOUT: Final = timedelta(seconds=30)
FIRST_PAUSE: Final = timedelta(milliseconds=100)
LONGEST_PAUSE: Final = timedelta(seconds=5)
# An agent that knows no identity for us is well; an entry is made by a person or a deployment.
FIRST_DENIED_PAUSE: Final = timedelta(seconds=1)
LONGEST_DENIED_PAUSE: Final = timedelta(seconds=15)
LASTING: Final = timedelta(seconds=10)
"""A stream that lived this long went well: the pauses begin anew."""
FINAL: Final = (MalformedError, UnsupportedError)
"""WEP-18, WEP-23: answers after which nobody asks again."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Clock(Protocol):
    """The time, and a way to wait for it."""

    def now(self) -> datetime:
        """The present instant, aware UTC."""
        ...

    async def sleep(self, span: timedelta) -> None:
        """Return after *span*."""
        ...


class SystemClock:
    """This machine's."""

    def now(self) -> datetime:
        """See `Clock`."""
        return datetime.now(UTC)

    async def sleep(self, span: timedelta) -> None:
        """See `Clock`."""
        await asyncio.sleep(span.total_seconds())


class Pauses:
    """How long to wait after each kind of error."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._usual = Backoff(FIRST_PAUSE, LONGEST_PAUSE, rng)
        self._denied = Backoff(FIRST_DENIED_PAUSE, LONGEST_DENIED_PAUSE, rng)

    def after(self, error: SpiffeError) -> timedelta:
        """Return the next pause."""
        return (self._denied if isinstance(error, ForbiddenError) else self._usual).next()

    def reset(self) -> None:
        """A try went well."""
        self._usual.reset()
        self._denied.reset()


class Follower(Generic[_T]):
    """One stream: *watch* opens it, *take* is given what it says, None when we have nothing."""

    def __init__(
        self,
        name: str,
        watch: Callable[[Broken], AsyncGenerator[_T, None]],
        take: Callable[[_T | None], None],
        clock: Clock,
    ) -> None:
        self.name = name
        self.problem = ""
        """What is wrong with it now; empty when nothing is."""
        self.final: SpiffeError | None = None
        """The answer after which it was not opened again."""
        self._watch = watch
        self._take = take
        self._clock = clock
        self._said = ""

    async def run(self, told: Callable[[], None]) -> None:
        """Follow until cancelled, or until told never to ask again; *told* of each news."""
        pauses = Pauses()
        while True:
            began = self._clock.now()
            error = await self._once(told)
            if isinstance(error, (ForbiddenError, UnsupportedError)):
                self._take(None)
            if isinstance(error, FINAL):
                self.final = error
            self._fail(str(error))
            told()
            if self.final is not None:
                return
            if self._clock.now() - began >= LASTING:
                pauses.reset()
            await self._clock.sleep(pauses.after(error))

    async def _once(self, told: Callable[[], None]) -> SpiffeError:
        """Follow one stream to its end, and return how it ended."""

        def broken(error: InternalError) -> None:
            self._fail(str(error))
            told()

        try:
            async with contextlib.aclosing(self._watch(broken)) as news:
                async for one in news:
                    self.problem = self._said = ""
                    self._take(one)
                    told()
        except SpiffeError as error:
            return error
        except Exception as error:  # noqa: BLE001 a program must not lose its identity by a bug here
            event(_log, logging.ERROR, "source_not_fresh", stream=self.name, exc_info=error)
            return InternalError(f"{type(error).__name__} while following the stream")
        return NotReadyError("the agent ended the stream")

    def _fail(self, why: str) -> None:
        if why != self._said:  # once for an outage, however long
            level = logging.WARNING if self.final is None else logging.ERROR
            event(_log, level, "source_not_fresh", stream=self.name, why=why)
        self.problem = self._said = why


class Source(ABC, Generic[_T]):
    """
    State that stays fresh by itself while the source is entered; see `X509Source`.

    Of one event loop, and for it alone.  Entering it waits for the first state.

    Raises:
        PreconditionError: no address given, and none in ``SPIFFE_ENDPOINT_SOCKET``.
        EndpointError: the address is not one.
    """

    def __init__(self, address: str | None, timeout: timedelta, clock: Clock | None) -> None:
        self._client = WorkloadClient(address)
        self._timeout = timeout
        self._clock = clock or SystemClock()
        self._followers = self._streams(self._client)
        self._state: _T | None = None
        self._listeners: dict[object, Callable[[], None]] = {}
        self._news = asyncio.Event()
        self._version = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """What keeps this from being fresh, in a sentence; empty when nothing does."""
        problems = dict.fromkeys(one.problem for one in self._followers if one.problem)
        return "; ".join(problems)

    def on_change(self, told: Callable[[], None]) -> Callable[[], None]:
        """Have *told* called in the event loop after every change; return what ends that."""
        key = object()
        self._listeners[key] = told

        def end() -> None:
            self._listeners.pop(key, None)

        return end

    async def updates(self) -> AsyncIterator[_T]:
        """
        Yield the present state, and each later one, until the source is left.

        Who is slow misses what came between, and always has the latest.  A denial yields
        nothing.
        """
        seen = -1
        while self._task is not None:
            if self._version != seen and self._state is not None:
                seen = self._version
                yield self._state
            else:
                await self._news.wait()

    async def __aenter__(self) -> Self:
        """
        Wait for the first state.

        Raises:
            NotReadyError: none came in time; it says what the agent answered.
            MalformedError: the agent's answer, after which none must ask again.
            UnsupportedError: the agent does not offer it.
        """
        await self._client.__aenter__()
        self._task = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(self._timeout.total_seconds()):
                while not self._is_ready():
                    self._raise_if_final()
                    await self._news.wait()
        except TimeoutError as error:
            await self.__aexit__()
            why = self._missing() or self.problem or "it has not answered"
            raise NotReadyError(
                f"nothing came from the Workload API at {self._client.address} in "
                f"{self._timeout.total_seconds():g} s: {why}"
            ) from error
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        self._tell()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._client.__aexit__()

    @abstractmethod
    def _streams(self, client: WorkloadClient) -> Sequence[Follower[Any]]:
        """What this source follows."""

    def _is_ready(self) -> bool:
        return self._state is not None

    def _missing(self) -> str:
        """Why a state that is there will not do; empty when it is not that."""
        return ""

    def _raise_if_final(self) -> None:
        """Raise when no state will ever come."""
        for one in self._followers:
            if one.final is not None:
                raise one.final

    def _set(self, state: _T | None) -> None:
        """Have another state, unless it says the same: equal updates wake nobody."""
        if state == self._state:
            return
        self._state = state
        self._version += 1
        loop = asyncio.get_running_loop()
        for told in self._listeners.values():
            # Each in a turn of its own: one that fails stops neither us nor another.
            loop.call_soon(told)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            for one in self._followers:
                group.create_task(one.run(self._tell))
