"""
The SPIFFE Workload API (WAPI-01 to WAPI-59, WEP-15 to WEP-24, SEC-35, SEC-36).

Order of checks on every call: header (an interceptor) → method → agent ready → request
fields → caller attested and entitled → serve.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import grpc

from spiffe_core.errors import (
    ErrorKind,
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid, JwtSvidError, verify_jwt_svid
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.frontdoor.peer import PeerGoneError, UnixPeer, unix_peer_of
from spiffe_wire.logs import event
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from workload_api.agent.metrics import AgentMetrics
from workload_api.attestors.registry import Attestation
from workload_api.cache.cache import View, Waiter, WorkloadCache
from workload_api.endpoint.responses import Responses
from workload_api.sync.tokens import TokenCache

_log = logging.getLogger(__name__)
REATTEST_SECONDS: Final = 30.0  # SEC-36
FIRST_SVID_SECONDS: Final = 5.0
"""How long a call waits for an SVID that is being signed."""
HELD_PER_UID: Final = 100  # callers without an identity that are held back at once
MAX_AUDIENCES: Final = 16  # SEC-26
MAX_AUDIENCE_BYTES: Final = 255

_NO_IDENTITY: Final = (
    "no identity issued: no registration entry matches this process; the operator can ask why "
    "with `issuer explain --pid {pid}`"
)


class NoIdentityError(ForbiddenError):
    """The caller matches no entry; says nothing of anybody else's (architecture A3)."""


@dataclass
class WorkloadServicer(workloadapi_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Serves whoever is proved, attested and matched."""

    cache: WorkloadCache
    attestation: Attestation
    tokens: TokenCache
    responses: Responses
    metrics: AgentMetrics
    now: Callable[[], datetime]
    no_identity_grace: timedelta
    stopping: asyncio.Event
    _held: Counter[int] = field(default_factory=Counter)

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in self._stream(context, self.responses.x509_svids, hold=True):
            yield message

    async def FetchX509Bundles(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in self._stream(context, self.responses.x509_bundles):
            yield message

    async def FetchJWTBundles(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in self._stream(context, self.responses.jwt_bundles):
            yield message

    async def FetchJWTSVID(self, request: Any, context: Any) -> Any:
        peer = self._ready(context)
        audience = _audience_of(request.audience)
        wanted = _id_of(request.spiffe_id) if request.spiffe_id else None
        view = await self._view(peer)
        entries = [one for one in view.decision.matched if wanted in (None, one.spiffe_id)]
        if not entries:
            self.metrics.denials.inc()
            raise NoIdentityError(_NO_IDENTITY.format(pid=peer.pid))
        response = workloadapi_pb2.JWTSVIDResponse()
        for entry in entries:
            svid = await self.tokens.get(entry, audience)
            response.svids.add(spiffe_id=svid.spiffe_id.uri, svid=svid.token, hint=entry.hint)
        peer.check_alive()
        return response

    async def ValidateJWTSVID(self, request: Any, context: Any) -> Any:
        peer = self._ready(context)
        if not request.audience:
            raise MalformedError("audience must be specified")
        if not request.svid:
            raise MalformedError("svid must be specified")
        view = await self._view(peer)
        if not view.decision.matched:
            self.metrics.denials.inc()
            raise NoIdentityError(_NO_IDENTITY.format(pid=peer.pid))
        svid = verify_jwt_svid(
            request.svid, view.bundles, audience=request.audience, at=self.now()
        )
        response = workloadapi_pb2.ValidateJWTSVIDResponse(spiffe_id=svid.spiffe_id.uri)
        try:
            response.claims.update(self._claims_of(svid))
        except (TypeError, ValueError) as error:
            raise JwtSvidError("the token's claims cannot be passed on") from error
        return response

    async def FetchWITSVID(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        raise UnsupportedError("WIT-SVIDs are not offered")
        yield

    async def FetchWITBundles(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        raise UnsupportedError("WIT-SVIDs are not offered")
        yield

    def _claims_of(self, svid: JwtSvid) -> dict[str, Any]:
        claims = dict(svid.claims)
        claims["aud"] = list(svid.audience)  # always a list (IOP-23)
        if svid.spiffe_id.trust_domain != self.cache.trust_domain:
            # What another trust domain asserts beyond the standard counts for nothing here.
            claims = {name: claims[name] for name in ("sub", "aud", "exp")}
        return claims

    def _ready(self, context: Any) -> UnixPeer:
        if self.stopping.is_set():
            raise NotReadyError("the agent is stopping")
        if not self.cache.ready:
            raise NotReadyError("the agent has not heard from its server yet")
        return unix_peer_of(context)

    async def _view(self, peer: UnixPeer) -> View:
        attested = await self.attestation.attest(peer)
        return self.cache.view(attested.selectors, attested.partial, self.now())

    async def _stream(
        self, context: Any, build: Callable[[View], bytes], *, hold: bool = False
    ) -> AsyncIterator[bytes]:
        """The full state at once, and again whenever it changes (WAPI-08 to WAPI-10)."""
        peer = self._ready(context)
        with self.cache.waiter() as waiter:
            view = await self._first_view(peer, waiter, hold=hold)
            last = b""
            committed_at = 0
            while True:
                message = self._built(build, view, last)
                if message != last:
                    peer.check_alive()
                    self.metrics.on_delivered(committed_at)
                    yield message
                    last = message
                committed_at = await self._next(peer, waiter)
                try:
                    view = await self._view(peer)
                except SpiffeError as error:
                    if (
                        isinstance(error, PeerGoneError)
                        or error.kind is not ErrorKind.NOT_READY
                    ):
                        raise
                    raise NotReadyError(str(error)) from error
                if not view.decision.matched:
                    self.metrics.denials.inc()
                    raise NoIdentityError(_NO_IDENTITY.format(pid=peer.pid))

    async def _first_view(self, peer: UnixPeer, waiter: Waiter, *, hold: bool) -> View:
        """
        The first view with an identity in it.

        A caller that matches nothing is held back for a moment on FetchX509SVID alone, so
        that one who comes shortly before its entry need not wait out its own back-off; it
        holds no attestation slot meanwhile.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        grace = self.no_identity_grace.total_seconds() if hold else 0.0
        held = self._held[peer.uid] < HELD_PER_UID
        self._held[peer.uid] += 1
        try:
            while True:
                view = await self._view(peer)
                if view.identities and not (view.missing and loop.time() - started < 1.0):
                    return view
                limit = FIRST_SVID_SECONDS if view.decision.matched else grace * held
                left = started + limit - loop.time()
                if left <= 0:
                    break
                try:
                    async with asyncio.timeout(left):
                        await self._next(peer, waiter)
                except TimeoutError:
                    continue
        finally:
            self._held[peer.uid] -= 1
            if not self._held[peer.uid]:
                del self._held[peer.uid]
        if view.identities:
            return view
        if view.decision.matched:
            raise NotReadyError("the identity is being signed; try again")
        self.metrics.denials.inc()
        event(_log, logging.INFO, "no_identity", pid=peer.pid, uid=peer.uid)
        raise NoIdentityError(_NO_IDENTITY.format(pid=peer.pid))

    def _built(self, build: Callable[[View], bytes], view: View, last: bytes) -> bytes:
        try:
            return build(view) if view.identities else last
        except InternalError as error:
            if not last:
                raise NotReadyError("the answer is not ready; try again") from error
            # T-13: a client keeps its state when nothing comes, and loses it on a bad message.
            event(_log, logging.ERROR, "response_withheld", exc_info=error)
            return last

    async def _next(self, peer: UnixPeer, waiter: Waiter) -> int:
        """Wait for a change, half a minute, the end of the process, or our own."""
        change = asyncio.ensure_future(waiter.wait())
        stop = asyncio.ensure_future(self.stopping.wait())
        waited: set[asyncio.Future[Any]] = {change, stop, peer.exited()}
        try:
            await asyncio.wait(
                waited,
                timeout=REATTEST_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            peer.check_alive()
            if self.stopping.is_set():
                raise NotReadyError("the agent is stopping")  # IOP-10: never OK
            return change.result() if change.done() else 0
        finally:
            change.cancel()
            stop.cancel()


def register(servicer: WorkloadServicer, server: Any) -> None:
    """Add the Workload API to a grpcio server; stream messages are bytes already."""
    streams = {"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"}

    class Raw:
        """Passes handlers through, with the serialisers of streams taken out."""

        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            (generic,) = handlers
            made = {}
            for path, handler in generic._method_handlers.items():
                name = path.rpartition("/")[2]
                made[name] = (
                    grpc.unary_stream_rpc_method_handler(
                        handler.unary_stream,
                        request_deserializer=handler.request_deserializer,
                    )
                    if name in streams
                    else handler
                )
            service = workloadapi_pb2_grpc.SPIFFEWORKLOADAPI_SERVICE
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, made),)
            )

    workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(servicer, Raw())


def _audience_of(given: Any) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(value for value in given if value))  # C-23
    if not values:
        raise MalformedError("audience must be specified")
    if len(values) > MAX_AUDIENCES:
        raise MalformedError(f"more than {MAX_AUDIENCES} audiences")
    if any(len(value.encode()) > MAX_AUDIENCE_BYTES for value in values):
        raise MalformedError(f"an audience is longer than {MAX_AUDIENCE_BYTES} bytes")
    return values


def _id_of(text: str) -> SpiffeId:
    try:
        return SpiffeId.parse(text)
    except MalformedError as error:
        raise MalformedError(f"spiffe_id is not a SPIFFE ID: {error}") from error
