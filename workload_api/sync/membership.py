"""
Staying one of the server's agents: renew, attest again, or end.

Source: SPIRE API 2.3, 9 (8); SEC-52, SEC-54, SEC-106, SEC-111.  An agent whose proof can be
repeated gets its next SVID by attesting again, on a connection of its own without a
certificate; and so it comes back by itself after it was evicted, or expired while its server
was away.  A ban is the end in any case: a server refuses to attest a banned node.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import ErrorKind, NotReadyError, SpiffeError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_wire.backoff import Backoff
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.logs import event
from workload_api.node.identity import NodeIdentity
from workload_api.sync.gate import CallGate

_log = logging.getLogger(__name__)
TICK: Final = 1.0
LONGEST_PAUSE: Final = timedelta(seconds=60)  # SEC-107
LONGEST_PAUSE_WITHOUT: Final = timedelta(seconds=10)
"""While nothing goes without a new SVID: SEC-106 wants agents back in 30 s."""
FIRST_PAUSE: Final = timedelta(milliseconds=200)
# What a server may answer to an attestation that can yet succeed (SPIRE API 2.3).
PASSING: Final = frozenset(
    {
        ErrorKind.NOT_READY, ErrorKind.EXHAUSTED, ErrorKind.INTERNAL, ErrorKind.DEADLINE,
        ErrorKind.ABORTED,
    }
)  # fmt: skip
_COMES_BACK: Final = frozenset(
    {
        DenialReason.AGENT_EXPIRED, DenialReason.AGENT_NOT_ATTESTED,
        DenialReason.AGENT_NOT_ACTIVE, DenialReason.AGENT_MUST_REATTEST,
    }
)  # fmt: skip


@dataclass(slots=True)
class SyncState:
    """How the syncing goes, for health and operators."""

    mode: str = "none"
    connected: bool = False
    last_sync_at: datetime | None = None
    problem: str = ""
    denied: SpiffeError | None = None


@dataclass
class Membership:
    """One for an agent, on its event loop."""

    node: NodeIdentity
    dialer: Dialer
    state: SyncState
    hold_signing: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    forget_workloads: Callable[[], None]
    """Removes every workload's keys, and ends their streams."""
    failed: Callable[[str, SpiffeError], object]
    """Told of what went wrong, and is tried again."""
    attest_anew: Callable[[], Awaitable[None]] | None = None
    """Attests on a connection of its own; None when this node's proof was good once."""
    calls: CallGate = field(default_factory=CallGate)
    switched: int = 0
    """How often our connections were cut because we had a new SVID ourselves."""

    def __post_init__(self) -> None:
        self._turn = asyncio.Lock()
        self._switching = asyncio.Event()
        # Reset at half-life alone: two agents of one node would supersede each other at once.
        self._returns = Backoff(FIRST_PAUSE, LONGEST_PAUSE)

    async def keep(self) -> None:
        """
        Have the next SVID before this one ends, until cancelled.

        Raises:
            SpiffeError: see `denied`.
        """
        backoff = Backoff(timedelta(seconds=TICK), LONGEST_PAUSE)
        while True:
            await asyncio.sleep(TICK)
            since = self.switched
            if not self.node.renew_due():
                continue
            try:
                await self._exchange(self._next_svid, since)
                if not self.node.renew_due():
                    backoff.reset()
                    self._returns.reset()
                    continue
                why = "the new SVID is due for renewal: compare the clocks"
                self.failed("renewal_failed", NotReadyError(why))
            except AgentDeniedError as error:
                await self.denied(error, since)
            except SpiffeError as error:
                if error.kind not in PASSING and not self.node.is_good():
                    await self.end(error)
                self.failed("renewal_failed", error)
            await self._pause(backoff)

    async def pause(self, seconds: float, since: int) -> None:
        """
        Return after *seconds*, or as soon as we have another SVID than when `switched` was
        *since*: what was refused to the one before may be granted to this one.
        """
        if self.switched == since:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._switching.wait()

    async def denied(self, error: AgentDeniedError, since: int) -> None:
        """
        The server denied a call that began when `switched` was *since*: come back, or end.

        Raises:
            SpiffeError: this agent is not wanted any more; every key is gone by then.
        """
        async with self._turn:
            pass  # an exchange that is under way may be why
        if since != self.switched:
            return  # it was about the certificate before this one
        self.state.problem = str(error)
        if error.reason in _COMES_BACK and self.attest_anew is not None:
            await self._come_back(error.reason, self.attest_anew, since)
            return
        # SPIRE API 2.3: a join token can't be used again, so every other reason is the end.
        if error.reason in (DenialReason.UNKNOWN, DenialReason.AGENT_MUST_REATTEST):
            return
        if error.reason is DenialReason.AGENT_EXPIRED and self.node.is_good():
            # SEC-111: a wrong clock is put right one day; what is good is kept until then.
            self.state.problem = "the server takes our SVID for expired: compare the clocks"
            return
        await self.end(error)

    async def end(self, error: SpiffeError) -> None:
        """
        Forget everything, and raise *error*.

        Raises:
            SpiffeError: always.
        """
        why = error.reason.name if isinstance(error, AgentDeniedError) else error.kind.name
        event(_log, logging.ERROR, "agent_denied", reason=why)
        self.state.connected = False
        self.state.denied = error
        self.forget_workloads()
        await self.node.forget()
        raise error

    async def _come_back(
        self, reason: DenialReason, attest: Callable[[], Awaitable[None]], since: int
    ) -> None:
        event(_log, logging.WARNING, "attesting_again", reason=reason.name)
        self.state.connected = False
        while self.switched == since:
            await self._pause(self._returns)
            try:
                await self._exchange(attest, since)
            except SpiffeError as refused:
                if refused.kind not in PASSING:
                    await self.end(refused)
                self.failed("attestation_failed", refused)
                # An operator took it away: nobody is served by what it had (SEC-52).
                if reason is DenialReason.AGENT_NOT_ATTESTED:
                    self.forget_workloads()

    async def _next_svid(self) -> None:
        if self.node.reattestable and self.attest_anew is not None:
            await self.attest_anew()
        else:
            await self.node.renew(self.dialer.channel)

    async def _exchange(self, work: Callable[[], Awaitable[None]], since: int) -> None:
        """Get another SVID by *work*, unless somebody else did after *since*."""
        async with self._turn:
            if self.switched != since:
                return
            # Nothing is asked meanwhile, and nothing over the old connections after: a server
            # forgets the old serial, at the latest once it has seen the new one.
            async with self.hold_signing(), self.calls.shut():
                await work()
                self.switched += 1
                self.dialer.cut()
                self._switching.set()
                self._switching = asyncio.Event()
        crash_point("agent.switched_over")

    async def _pause(self, backoff: Backoff) -> None:
        pause = backoff.next()
        if not self.state.connected:
            pause = min(pause, LONGEST_PAUSE_WITHOUT)
        await asyncio.sleep(pause.total_seconds())
