"""Runs every attestor on a process, and believes them only if it lived throughout (SEC-31)."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from spiffe_core.errors import NotReadyError
from spiffe_core.selector import SelectorSet
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.logs import event
from workload_api.attestors.protocol import (
    AT_ONCE,
    NOTHING_FOUND,
    PER_UID,
    AttestationError,
    Attested,
    Finding,
    NotYetError,
    WorkloadAttestor,
)
from workload_api.attestors.slots import Slots

_log = logging.getLogger(__name__)
TIMEOUT: Final = timedelta(seconds=5)  # security requirements, table 1
LAST_LOOK: Final = 0.2
"""Part of the time that is left for a last look at who waited in vain."""
PER_UID_LATE: Final = 100
"""Callers of one user that wait for the platform to tell of their container."""


_Found = Finding | AttestationError


@dataclass(eq=False, slots=True)
class _Look:
    """One look at a process, for every call on its connection that came before it began."""

    task: "asyncio.Task[list[_Found] | None]" = field(init=False)
    callers: int = 0


class Attestation:
    """All attestors of this agent."""

    def __init__(
        self, attestors: Sequence[WorkloadAttestor], *, timeout: timedelta = TIMEOUT
    ) -> None:
        self._attestors = attestors
        self._timeout = timeout.total_seconds()
        self.slots = Slots(AT_ONCE, PER_UID)
        self._waiting: Counter[int] = Counter()
        self._looks: dict[UnixPeer, _Look] = {}

    async def attest(self, peer: UnixPeer, *, patient: bool = True) -> Attested:
        """
        Return what is learnt of *peer*, which was alive before and after.

        A process whose container the platform has not told of yet is waited for until the
        time is up, and then attested without it; unless not *patient*.

        Raises:
            PeerGoneError: it has ended; nothing that was read is used.
            NotReadyError: no attestor could vouch, or too many are being attested.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._timeout
        waits_until = loop.time() + self._timeout * (1 - LAST_LOOK)
        while True:
            found = await self._all(peer, ends_at)
            arriving = [one.arrived for one in found if isinstance(one, NotYetError)]
            if (
                not (arriving and patient)
                or loop.time() >= waits_until
                or self._waiting[peer.uid] >= PER_UID_LATE
            ):
                return self._attested(found)
            with self._counted(peer.uid):
                await asyncio.wait(
                    [*arriving, peer.exited()],
                    timeout=waits_until - loop.time(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            peer.check_alive()

    async def _all(self, peer: UnixPeer, ends_at: float) -> list[_Found]:
        found = await self._shared(peer, ends_at)
        # A look that somebody else began waits for a slot no longer than he can.
        while found is None and asyncio.get_running_loop().time() < ends_at:
            found = await self._shared(peer, ends_at)
        if found is None:
            raise NotReadyError("too many processes are being attested; try again")
        # Everything was read from /proc by number: only now is it known whose it is.
        peer.check_alive()
        return found

    async def _shared(self, peer: UnixPeer, ends_at: float) -> list[_Found] | None:
        # A push wakes every stream of a process at once, and a busy one calls without a pause:
        # who comes before a look has begun gets what it saw, for it is as fresh as his own.
        look = self._looks.get(peer)
        if look is None:
            look = self._looks[peer] = _Look()
            look.task = asyncio.create_task(self._look(peer, look, ends_at))
        look.callers += 1
        try:
            return await asyncio.shield(look.task)
        finally:
            look.callers -= 1
            if not look.callers:
                self._close(peer, look)  # before it is given up: nobody may join it any more
                look.task.cancel()

    async def _look(self, peer: UnixPeer, look: _Look, ends_at: float) -> list[_Found] | None:
        """Return what each attestor found, or None if no slot came free in time."""
        try:
            async with asyncio.timeout_at(ends_at) as limit, self.slots.slot(peer.uid):
                limit.reschedule(None)  # from here on each attestor has its own
                self._close(peer, look)  # and whoever comes now has a look of his own
                if len(self._attestors) == 1:
                    return [await self._one(self._attestors[0], peer, ends_at)]
                return await asyncio.gather(
                    *(self._one(one, peer, ends_at) for one in self._attestors)
                )
        except TimeoutError:
            self._close(peer, look)
            return None

    def _close(self, peer: UnixPeer, look: _Look) -> None:
        """Have nobody join *look* from here on."""
        if self._looks.get(peer) is look:
            del self._looks[peer]

    def _attested(self, found: Sequence[_Found]) -> Attested:
        selectors: SelectorSet = frozenset()
        partial: dict[str, str] = {}
        changed = []
        for attestor, answer in zip(self._attestors, found, strict=True):
            known, reason = _known(answer)
            selectors |= known.selectors
            if reason:
                partial[attestor.type] = reason
            if isinstance(answer, NotYetError):
                changed.append(answer.arrived)
            if known.changed is not None:
                changed.append(known.changed)
        if not selectors and len(partial) == len(self._attestors):
            reasons = "; ".join(f"{name}: {why}" for name, why in partial.items())
            raise NotReadyError(f"workload attestation failed: {reasons}")
        is_late = any(isinstance(one, NotYetError) for one in found)
        return Attested(selectors, partial, tuple(changed), is_late)

    def close(self) -> None:
        """The agent ends."""
        for attestor in self._attestors:
            attestor.close()

    @contextmanager
    def _counted(self, uid: int) -> Iterator[None]:
        self._waiting[uid] += 1
        try:
            yield
        finally:
            self._waiting[uid] -= 1
            if not self._waiting[uid]:
                del self._waiting[uid]

    async def _one(self, attestor: WorkloadAttestor, peer: UnixPeer, ends_at: float) -> _Found:
        try:
            async with asyncio.timeout_at(ends_at):
                return await attestor.attest(peer)
        except AttestationError as error:
            return error
        except TimeoutError:
            return AttestationError("took too long")
        except Exception as error:  # noqa: BLE001 a plug-in's, of any kind
            # A plug-in's mistake costs its own selectors, not those of the others (SEC-35).
            event(_log, logging.ERROR, "attestor_failed", type=attestor.type, exc_info=error)
            return AttestationError("failed; the log says why")


def _known(answer: _Found) -> tuple[Finding, str]:
    """Return what holds of one attestor's answer, and why that is not all."""
    if isinstance(answer, Finding):
        return answer, answer.missing
    so_far = answer.so_far if isinstance(answer, NotYetError) else NOTHING_FOUND
    return so_far, str(answer)
