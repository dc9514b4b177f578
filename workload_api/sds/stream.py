"""
Envoy's secret discovery service (SDS-01 to SDS-10, SEC-38, SEC-85).

A stream is held, not refused, while what it asks for is not there: a refused Envoy backs off
for up to half a minute, one that is held goes on in the millisecond in which it is (ADR 7).
Callers are proved and attested exactly as for the Workload API.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import grpc

from spiffe_core.errors import (
    InternalError,
    MalformedError,
    NotReadyError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_wire.frontdoor.limits import Places
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.logs import event
from spiffe_wire.pb.envoy.service.secret.v3 import sds_pb2_grpc
from workload_api.endpoint.following import Callers, Followed
from workload_api.endpoint.workload import FIRST_SVID_SECONDS, WHOLE_SECONDS
from workload_api.metrics import AgentMetrics
from workload_api.sds.exchange import Exchange, Exchanges
from workload_api.sds.request import MAX_REQUEST_BYTES, Node, legible, read_request
from workload_api.sds.resources import Answer, Answers, Found, Terms, find

_log = logging.getLogger(__name__)
SERVICE: Final = sds_pb2_grpc.SECRETDISCOVERYSERVICE_SERVICE
HELD_PER_UID: Final = 2000
"""Streams of one user that are held without an identity; each costs about 50 KB."""
RETRY_SECONDS: Final = 5.0
"""Until a process that could not be attested is attested again."""
LINES_PER_SECOND: Final = 20  # about streams; a process that refuses all day floods no log
_MAX_QUOTED: Final = 3
_MAX_QUOTED_CHARACTERS: Final = 200


class UnknownNamesError(MalformedError):
    """The caller has no such names; whether anybody has them is not said (SEC-85)."""

    def __init__(self, names: tuple[str, ...], pid: int) -> None:
        said = ", ".join(ascii(one[:_MAX_QUOTED_CHARACTERS]) for one in names[:_MAX_QUOTED])
        more = f" and {len(names) - _MAX_QUOTED} more" if len(names) > _MAX_QUOTED else ""
        what = f"this process may not have {said}{more}" if names else "no identity issued"
        super().__init__(f"{what}; the operator can ask why with `issuer explain --pid {pid}`")


class _OverError(Exception):
    """The client closed its side before it asked for anything: the stream ends well."""


@dataclass
class SdsServicer:
    """Serves Envoys, and whatever else speaks SDS."""

    methods: ClassVar[frozenset[str]] = frozenset(
        f"/{SERVICE}/{name}" for name in ("StreamSecrets", "FetchSecrets", "DeltaSecrets")
    )
    max_request_bytes: ClassVar[int] = MAX_REQUEST_BYTES

    callers: Callers
    metrics: AgentMetrics
    terms: Terms = field(default_factory=Terms)
    refuse_unknown_names: bool = False
    """SPIRE's answer instead of none."""
    exchanges: Exchanges = field(default_factory=Exchanges)
    answers: Answers = field(default_factory=Answers)
    _held: Places = field(
        default_factory=lambda: Places("streams without an identity of this user", HELD_PER_UID)
    )
    _second: float = 0.0
    _lines: int = 0

    def register(self, server: Any) -> None:
        """Add SDS to a grpcio server: bytes in, so that a bad request is ours to answer."""
        stream = grpc.stream_stream_rpc_method_handler
        made = {
            "StreamSecrets": stream(self.StreamSecrets),
            "DeltaSecrets": stream(self.DeltaSecrets),
            "FetchSecrets": grpc.unary_unary_rpc_method_handler(self.FetchSecrets),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, made),))

    async def StreamSecrets(  # noqa: N802 Envoy's name
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Answer when everything that is asked for is there, and again when it changes."""
        peer, now = self.callers.peer_of(context), self.callers.now
        if self.refuse_unknown_names:
            self.callers.check_ready()  # else what is not known yet would pass for unknown
        with (
            self.callers.follow(peer) as process,
            self.exchanges.opened(peer, self.terms, now()) as exchange,
            contextlib.ExitStack() as place,
            contextlib.suppress(_OverError),
        ):
            place.callback(self._held.take(peer.uid))
            stream = _Stream(process, exchange, place)
            reading = asyncio.create_task(self._read(context, stream))
            try:
                while True:
                    answer = await self._next(stream)
                    peer.check_alive()
                    self.metrics.on_delivered(process.committed_at)
                    yield exchange.send(answer, now())
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def FetchSecrets(self, data: bytes, context: Any) -> bytes:  # noqa: N802
        """Answer once; what is being signed is waited for, and nothing else."""
        peer = self.callers.peer_of(context)
        self.callers.check_ready()
        request = read_request(data)
        is_plain = self.terms.plain_for(request.node or Node())
        self.terms.check(request.names, is_plain=is_plain)
        with self.callers.follow(peer) as process:
            until = asyncio.get_running_loop().time() + FIRST_SVID_SECONDS
            await process.attest()
            while not (found := self._find(process, request.names, is_plain)).is_whole:
                self._check_known(found, peer)
                if not await process.woken(until):
                    raise NotReadyError("the identity is being signed; try again")
                await process.attest()
            peer.check_alive()
            try:
                return self.answers.of(found).body
            except InternalError as error:
                raise NotReadyError("the answer is not ready; try again") from error

    async def DeltaSecrets(  # noqa: N802
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Not offered: `StreamSecrets` is what Envoy is set to by ``api_type: GRPC``."""
        raise UnsupportedError("DeltaSecrets is not offered; set api_type to GRPC")
        yield

    async def _read(self, context: Any, stream: "_Stream") -> None:
        """
        Hear whatever the client says, for as long as the stream is open.

        By `context`: grpcio's iterator keeps each request, 61 KB of an Envoy, until the next.
        """
        exchange, waiter = stream.exchange, stream.process.waiter
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                request = read_request(data)
                del data  # so that neither do we
                heard = exchange.hear(request, self.callers.now())
                if heard.is_refusal:
                    self._on_refusal(exchange)
                if heard.is_question:
                    waiter.wake()
        except SpiffeError as error:
            exchange.failure = error
        else:
            exchange.is_over = True
        waiter.wake()

    def _on_refusal(self, exchange: Exchange) -> None:
        self.metrics.sds_refusals.inc()
        self._log(logging.WARNING, "sds_refused_by_envoy", exchange, exchange.refusal)

    def _log(self, level: int, name: str, exchange: Exchange, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._second >= 1:
            self._second, self._lines = now, 0
        self._lines += 1
        if self._lines > LINES_PER_SECOND:
            return
        event(
            _log,
            level,
            name,
            pid=exchange.peer.pid,
            uid=exchange.peer.uid,
            names=legible(" ".join(exchange.names or ())) or "everything",
            version=exchange.version,
            reason=reason,
        )

    async def _next(self, stream: "_Stream") -> Answer:
        """Return what is to be sent next once there is something, attested just before."""
        process, exchange = stream.process, stream.exchange
        while exchange.names is None:
            await process.woken(None)
            stream.check()
        while True:
            if process.is_attested:
                await process.until_due(lambda: self._is_worth_it(stream))
                stream.check()
            await self._attest(stream)
            if not exchange.version:
                await self._whole(stream)
            if self.refuse_unknown_names:
                self._check_known(self._found(stream), process.peer)
            answer = self._answer(stream)
            if answer is not None and exchange.wants(answer):
                return answer

    def _is_worth_it(self, stream: "_Stream") -> bool:
        if stream.exchange.failure is not None:
            return True
        if self.refuse_unknown_names and not self._found(stream).is_possible:
            return True
        answer = self._answer(stream)
        return answer is not None and stream.exchange.wants(answer)

    async def _attest(self, stream: "_Stream") -> None:
        """Attest; one who cannot be attested now is held, too."""
        process, loop = stream.process, asyncio.get_running_loop()
        while True:
            try:
                await process.attest()
            except NotReadyError as error:
                if self.callers.stopping or self.refuse_unknown_names:
                    raise
                self._hold(stream, str(error))
            else:
                if process.view.decision.matched:
                    stream.place.close()
                return
            retry_at = loop.time() + RETRY_SECONDS
            while await process.woken(retry_at):
                stream.check()

    async def _whole(self, stream: "_Stream") -> None:
        """Wait a moment for SVIDs that are being signed and would be in the first answer."""
        until = asyncio.get_running_loop().time() + WHOLE_SECONDS
        while self._found(stream).is_early and await stream.process.woken(until):
            stream.check()
            await self._attest(stream)

    def _answer(self, stream: "_Stream") -> Answer | None:
        """The answer to what is asked for, or None while there is none."""
        found = self._found(stream)
        if not found.is_whole:
            why = self._why(found, stream.process)
            if self._hold(stream, why) and not found.is_possible:
                self._log(logging.INFO, "sds_awaited", stream.exchange, why)
            return None
        try:
            answer = self.answers.of(found)
        except InternalError as error:
            # T-13: Envoy keeps its secrets when nothing comes.
            if self._hold(stream, str(error)):
                event(_log, logging.ERROR, "response_withheld", exc_info=error)
            return None
        stream.exchange.go_on(self.callers.now())
        return answer

    def _found(self, stream: "_Stream") -> Found:
        exchange = stream.exchange
        return self._find(stream.process, exchange.names or (), exchange.is_plain)

    def _find(self, process: Followed, names: tuple[str, ...], is_plain: bool) -> Found:
        own = self.callers.cache.trust_domain
        return find(process.view, own, names, self.terms, is_plain=is_plain)

    def _check_known(self, found: Found, peer: UnixPeer) -> None:
        """
        Refuse what nothing is on its way for.

        Raises:
            UnknownNamesError: names that are not the caller's, or no identity at all.
        """
        if not found.is_possible:
            self.metrics.denials.inc()
            raise UnknownNamesError(found.unknown, peer.pid)

    def _hold(self, stream: "_Stream", why: str) -> bool:
        return stream.exchange.hold(why, self.callers.now())

    def _why(self, found: Found, process: Followed) -> str:
        """Why there is no answer, for operators."""
        if not self.callers.cache.ready:
            return "the agent has not heard from its server yet"
        if not process.view.decision.matched:
            return "no registration entry matches this process"
        if not found.unknown:
            return legible(f"being signed: {', '.join(found.pending)}")
        federated = {
            name for one in process.view.decision.matched for name in one.federates_with
        }
        awaited = {name.id.uri for name in federated} & set(found.unknown)
        if awaited:
            return legible(f"no bundle is known of {', '.join(sorted(awaited))}")
        return legible(f"no entry of this process gives it {', '.join(found.unknown)}")


@dataclass(slots=True)
class _Stream:
    """What belongs to one stream."""

    process: Followed
    exchange: Exchange
    place: contextlib.ExitStack
    """Its place among those without an identity, until it has one."""

    def check(self) -> None:
        """
        See that there is somebody to go on for.

        Raises:
            SpiffeError: the client asked for what cannot be.
            _OverError: it has asked for nothing, and never will.
        """
        failure, self.exchange.failure = self.exchange.failure, None
        if failure is not None:
            raise failure  # kept by nothing here: its frames hold the peer's pidfd
        if self.exchange.is_over and self.exchange.names is None:
            raise _OverError
