"""What SPIRE lacks: the held watch stream; and gRPC health."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from ca.clock import Clock
from issuer.api.callers import Caller, Callers, caller
from issuer.services.hub import Hub, Waiter
from issuer.services.watch import Difference, View
from spiffe_core.errors import MalformedError, SpiffeError, UnsupportedError
from spiffe_wire.convert.bundle import bundle_to_wire
from spiffe_wire.convert.entry import entry_to_wire
from spiffe_wire.frontdoor.peer import Peer, peer_of
from spiffe_wire.logs import event
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2, watch_pb2_grpc

_log = logging.getLogger(__name__)
RECHECK_SECONDS: Final = 2.0
"""A held stream checks its caller at least this often, and at every change (SEC-17)."""
STALL_SECONDS: Final = 30.0  # SEC-83: without progress
CHUNK: Final = 500  # things a message
CHUNK_BYTES: Final = 1024 * 1024  # one large thing may stand alone, below 4 MiB


@dataclass
class AgentWatchServicer(watch_pb2_grpc.AgentWatchServicer):
    """Pushes to each agent what it may act for."""

    hub: Hub
    callers: Callers
    clock: Clock
    cut: Callable[[Peer], object]

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        me, peer = caller(), peer_of(context)
        agent_id = me.require_agent().id
        view = View(self.hub, agent_id)
        with self.hub.waiter(agent_id) as waiter:
            committed_at = 0
            difference = view.start(request.cursor, self.clock.now())
            first = True
            while True:
                self.hub.check_running()
                # Said even when nothing changed: the agent then knows that it is up to date.
                if first or not difference.is_empty:
                    for message in _messages(difference, view.cursor(), committed_at):
                        with self._cut_when_stuck(me, peer):
                            yield message
                        self.callers.check_still(me)
                first = False
                committed_at = await _next_change(waiter)
                self.callers.check_still(me)
                difference = view.step(self.clock.now())

    @contextmanager
    def _cut_when_stuck(self, me: Caller, peer: Peer) -> Iterator[None]:
        """
        Cut the connection of a reader that reads nothing while we wait for it (SEC-83).

        Nobody looks at the caller meanwhile, so that is done here too: a banned agent must
        not keep a stream by not reading it (SEC-52).  Nothing less ends a call whose
        message waits for room.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + STALL_SECONDS
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            timer = loop.call_later(RECHECK_SECONDS, look)
            try:
                self.callers.check_still(me)
                is_good = loop.time() < ends
            except SpiffeError:
                is_good = False
            if not is_good:
                event(_log, logging.WARNING, "watch_stream_cut", agent=me.name)
                self.cut(peer)

        timer = loop.call_later(RECHECK_SECONDS, look)
        try:
            yield
        finally:
            timer.cancel()


async def _next_change(waiter: Waiter) -> int:
    try:
        async with asyncio.timeout(RECHECK_SECONDS):
            return await waiter.wait()
    except TimeoutError:
        return 0


def _messages(difference: Difference, cursor: str, committed_at: int) -> Iterator[Any]:
    """The difference in messages below the limit; the last one carries the cursor."""
    message = watch_pb2.WatchResponse(
        snapshot=difference.snapshot, more=True, committed_at_micros=committed_at
    )
    count = size = 0
    for field, item in _items(difference):
        weight = len(item) if isinstance(item, str) else item.ByteSize()
        if count and (count == CHUNK or size + weight > CHUNK_BYTES):
            yield message
            message = watch_pb2.WatchResponse(more=True, committed_at_micros=committed_at)
            count = size = 0
        getattr(message, field).append(item)
        count, size = count + 1, size + weight
    message.more = False
    message.cursor = cursor
    yield message


def _items(difference: Difference) -> Iterator[tuple[str, Any]]:
    yield from (("entries", entry_to_wire(one)) for one in difference.entries)
    yield from (("removed_entry_ids", one) for one in difference.removed)
    yield from (("bundles", bundle_to_wire(one)) for one in difference.bundles)
    yield from (("removed_trust_domains", one.name) for one in difference.removed_domains)


@dataclass
class HealthServicer(health_pb2_grpc.HealthServicer):
    """gRPC health for the socket's own operators (SPIRE API 5.9)."""

    is_ready: Callable[[], bool]

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service:
            raise MalformedError("per-service health is not supported")
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        serving = statuses.Value("SERVING" if self.is_ready() else "NOT_SERVING")
        return health_pb2.HealthCheckResponse(status=serving)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise UnsupportedError("health is asked with Check")
        yield
