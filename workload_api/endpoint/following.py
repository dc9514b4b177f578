"""
One calling process over time: what is learnt of it, and what it gets (SEC-35, SEC-36).

Whatever is streamed to workloads follows its caller in this way.  A change of what the server
said costs a look with what was learnt before; only what a message would come of is worth an
attestation.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from spiffe_core.errors import NotReadyError
from spiffe_wire.frontdoor.peer import UnixPeer, unix_peer_of
from workload_api.attestors.protocol import Attested
from workload_api.attestors.registry import Attestation
from workload_api.cache.cache import EVERYBODY, View, Waiter, WorkloadCache

REATTEST_INTERVAL: Final = timedelta(seconds=30)  # SEC-36


@dataclass
class Callers:
    """Whoever calls this agent; one for all of its public servicers."""

    cache: WorkloadCache
    attestation: Attestation
    now: Callable[[], datetime]
    reattest_interval: timedelta = REATTEST_INTERVAL
    stopping: bool = False

    def peer_of(self, context: Any) -> UnixPeer:
        """
        Return who calls.

        Raises:
            NotReadyError: the agent stops.
            PeerGoneError: the process has ended.
        """
        if self.stopping:
            raise NotReadyError("the agent is stopping")
        return unix_peer_of(context)

    def check_ready(self) -> None:
        """
        See that there is something to answer from.

        Raises:
            NotReadyError: the server was not heard, in this life or an earlier one.
        """
        if not self.cache.ready:
            raise NotReadyError("the agent has not heard from its server yet")

    def stop(self) -> None:
        """End every stream with UNAVAILABLE, so that clients come back (IOP-10)."""
        self.stopping = True
        self.cache.wake(EVERYBODY)

    async def view(self, peer: UnixPeer) -> View:
        """Attest *peer* once, and return what it gets."""
        return self.look(await self.attestation.attest(peer))

    def look(self, attested: Attested) -> View:
        """Return what a process of which this was learnt gets now."""
        return self.cache.view(attested.selectors, attested.partial, self.now())

    @contextlib.contextmanager
    def follow(self, peer: UnixPeer) -> Iterator["Followed"]:
        """Follow *peer* while entered; `Followed.waiter` is woken when it ends."""
        with self.cache.waiter() as waiter, _told_of_the_end(peer, waiter):
            followed = Followed(peer, waiter, self)
            with contextlib.closing(followed):
                yield followed


@dataclass(slots=True)
class Followed:
    """A process, what was learnt of it last, and when to look again."""

    peer: UnixPeer
    waiter: Waiter
    _callers: Callers = field(repr=False)
    committed_at: int = 0
    """When the change that woke us was committed, Unix microseconds; 0 for none."""
    attested: Attested = field(init=False)
    view: View = field(init=False)
    _attest_at: float = 0.0
    _changed: tuple["asyncio.Future[None]", ...] = ()

    @property
    def is_attested(self) -> bool:
        """True once anything was learnt; what comes later wakes us by itself."""
        return bool(self._attest_at)

    async def attest(self) -> None:
        """
        Learn of the process anew, and look.

        The first time, one whose container the platform has yet to tell of is waited for.

        Raises:
            NotReadyError: nothing could be learnt.
            PeerGoneError: it has ended.
        """
        attested = await self._callers.attestation.attest(
            self.peer, patient=not self.is_attested
        )
        self.close()
        self.attested, self._changed = attested, attested.changed
        for one in self._changed:
            one.add_done_callback(self._wake)
        # From here to the look nothing is awaited: a change is seen, or wakes the waiter.
        self.waiter.selectors = attested.selectors
        self.look()
        interval = self._callers.reattest_interval.total_seconds()
        self._attest_at = asyncio.get_running_loop().time() + interval

    def look(self) -> None:
        """See what it gets now, by what was learnt of it last."""
        self.view = self._callers.look(self.attested)

    async def until_due(self, is_worth_it: Callable[[], bool]) -> None:
        """
        Return when the process is to be attested anew.

        That is so when the interval is over, when the platform says that something changed,
        and when a look has shown what *is_worth_it*.

        Raises:
            NotReadyError, PeerGoneError: see `woken`.
        """
        loop = asyncio.get_running_loop()
        while loop.time() < self._attest_at:
            if any(one.done() for one in self._changed):
                return
            await self.woken(self._look_at())
            self.look()
            if is_worth_it():
                return

    async def woken(self, until: float | None) -> bool:
        """
        Wait for a change until *until* on the loop's clock; return whether one came.

        Raises:
            PeerGoneError: the process has ended.
            NotReadyError: the agent stops.
        """
        woken = True
        try:
            async with asyncio.timeout_at(until):
                self.committed_at = await self.waiter.wait()
        except TimeoutError:
            self.committed_at, woken = 0, False
        self.peer.check_alive()
        if self._callers.stopping:
            raise NotReadyError("the agent is stopping")
        return woken

    def close(self) -> None:
        """Be woken no more by what was learnt."""
        for one in self._changed:
            one.remove_done_callback(self._wake)
        self._changed = ()

    def _look_at(self) -> float:
        """When to look though nothing woke us: to attest, or when an entry expires."""
        if self.view.ends_at is None:
            return self._attest_at
        left = (self.view.ends_at - self._callers.now()).total_seconds()
        return min(self._attest_at, asyncio.get_running_loop().time() + max(left, 0.01))

    def _wake(self, _: "asyncio.Future[None]") -> None:
        self.waiter.wake()


@contextlib.contextmanager
def _told_of_the_end(peer: UnixPeer, waiter: Waiter) -> Iterator[None]:
    """Wake *waiter* when the process ends; when its connection does, grpcio ends the call."""

    def wake(_: "asyncio.Future[None]") -> None:
        waiter.wake()

    exited = peer.exited()
    exited.add_done_callback(wake)
    try:
        yield
    finally:
        exited.remove_done_callback(wake)
