"""Runs every attestor on a process, and believes them only if it lived throughout (SEC-31)."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from spiffe_core.errors import NotReadyError
from spiffe_core.selector import SelectorSet
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.logs import event
from workload_api.attestors.protocol import (
    AT_ONCE,
    PER_UID,
    AttestationError,
    Attested,
    WorkloadAttestor,
)
from workload_api.attestors.slots import Slots

_log = logging.getLogger(__name__)
TIMEOUT: Final = timedelta(seconds=5)  # security requirements, table 1


class Attestation:
    """All attestors of this agent."""

    def __init__(
        self, attestors: Sequence[WorkloadAttestor], *, timeout: timedelta = TIMEOUT
    ) -> None:
        self._attestors = attestors
        self._timeout = timeout.total_seconds()
        self.slots = Slots(AT_ONCE, PER_UID)

    async def attest(self, peer: UnixPeer) -> Attested:
        """
        Return what is learnt of *peer*, which was alive before and after.

        Raises:
            PeerGoneError: it has ended; nothing that was read is used.
            NotReadyError: no attestor could vouch, or too many are being attested.
        """
        ends_at = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(ends_at) as limit, self.slots.slot(peer.uid):
                limit.reschedule(None)  # from here on each attestor has its own
                found = await asyncio.gather(
                    *(self._one(one, peer, ends_at) for one in self._attestors)
                )
        except TimeoutError as error:
            raise NotReadyError("too many processes are being attested; try again") from error
        # Everything was read from /proc by number: only now is it known whose it is.
        peer.check_alive()
        selectors: SelectorSet = frozenset()
        partial: dict[str, str] = {}
        for attestor, answer in zip(self._attestors, found, strict=True):
            if isinstance(answer, str):
                partial[attestor.type] = answer
            else:
                selectors |= answer
        if len(partial) == len(self._attestors):
            reasons = "; ".join(f"{name}: {why}" for name, why in partial.items())
            raise NotReadyError(f"workload attestation failed: {reasons}")
        return Attested(selectors, partial)

    def close(self) -> None:
        """The agent ends."""
        for attestor in self._attestors:
            attestor.close()

    async def _one(
        self, attestor: WorkloadAttestor, peer: UnixPeer, ends_at: float
    ) -> SelectorSet | str:
        try:
            async with asyncio.timeout_at(ends_at):
                return await attestor.attest(peer)
        except AttestationError as error:
            return str(error)
        except TimeoutError:
            return "took too long"
        except Exception as error:  # noqa: BLE001 a plug-in's, of any kind
            # A plug-in's mistake costs its own selectors, not those of the others (SEC-35).
            event(_log, logging.ERROR, "attestor_failed", type=attestor.type, exc_info=error)
            return "failed; the log says why"
