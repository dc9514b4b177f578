"""Runs every attestor on a process, and believes them only if it lived throughout (SEC-31)."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from spiffe_core.errors import NotReadyError
from spiffe_core.selector import SelectorSet
from spiffe_wire.frontdoor.peer import UnixPeer
from workload_api.attestors.protocol import AttestationError, Attested, WorkloadAttestor

TIMEOUT: Final = timedelta(seconds=5)  # security requirements, table 1
AT_ONCE: Final = 32


class Attestation:
    """All attestors of this agent."""

    def __init__(self, attestors: Sequence[WorkloadAttestor]) -> None:
        self._attestors = attestors
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def attest(self, peer: UnixPeer) -> Attested:
        """
        Return what is learnt of *peer*, which was alive before and after.

        Raises:
            PeerGoneError: it has ended; nothing that was read is used.
            NotReadyError: no attestor could vouch.
        """
        async with self._slots:
            found = await asyncio.gather(*(self._one(one, peer) for one in self._attestors))
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

    async def _one(self, attestor: WorkloadAttestor, peer: UnixPeer) -> SelectorSet | str:
        try:
            async with asyncio.timeout(TIMEOUT.total_seconds()):
                return await attestor.attest(peer)
        except AttestationError as error:
            return str(error)
        except TimeoutError:
            return "took too long"
