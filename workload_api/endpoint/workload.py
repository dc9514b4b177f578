"""
The SPIFFE Workload API (WAPI-01 to WAPI-59, WEP-15 to WEP-24, SEC-35, SEC-36).

Order of checks on every call: header (an interceptor) → method → agent ready → request
fields → caller attested and entitled → serve.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import grpc

from spiffe_core.errors import (
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid, JwtSvidError, verify_jwt_svid
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.logs import event
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from workload_api.cache.cache import View
from workload_api.endpoint.following import Callers, Followed
from workload_api.endpoint.responses import Responses
from workload_api.metrics import AgentMetrics
from workload_api.sync.tokens import TokenCache

_log = logging.getLogger(__name__)
FIRST_SVID_SECONDS: Final = 5.0
"""How long a call waits for its first SVID, which is being signed."""
WHOLE_SECONDS: Final = 0.5
"""How long a first message waits for the other SVIDs, when one is there."""
LATE: Final = 15
"""Times as long is one held of whose container the platform has yet to tell: a kubelet that
started 15 pods at once told of the last one 14 s after it ran (1.20, measured)."""
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

    callers: Callers
    tokens: TokenCache
    responses: Responses
    metrics: AgentMetrics
    no_identity_grace: timedelta
    _held: Counter[int] = field(default_factory=Counter)

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in self._stream(context, self.responses.x509_svids, svids=True):
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
        view = await self.callers.view(peer)
        entries = [one for one in view.decision.matched if wanted in (None, one.spiffe_id)]
        if not entries:
            raise self._denied(peer)
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
        view = await self.callers.view(peer)
        if not view.decision.matched:
            raise self._denied(peer)
        svid = verify_jwt_svid(
            request.svid, view.bundles, audience=request.audience, at=self.callers.now()
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
        if svid.spiffe_id.trust_domain != self.callers.cache.trust_domain:
            # What another trust domain asserts beyond the standard counts for nothing here.
            claims = {name: claims[name] for name in ("sub", "aud", "exp")}
        return claims

    def _ready(self, context: Any) -> UnixPeer:
        peer = self.callers.peer_of(context)
        self.callers.check_ready()
        return peer

    async def _stream(
        self, context: Any, build: Callable[[View], bytes], *, svids: bool = False
    ) -> AsyncIterator[bytes]:
        """The full state at once, and again whenever it changes (WAPI-08 to WAPI-10)."""
        peer = self._ready(context)
        with self.callers.follow(peer) as process:
            stream = _Stream(process, build, svids=svids)
            await self._begin(stream)
            while True:
                message = self._built(stream)
                if message != stream.last:
                    peer.check_alive()
                    self.metrics.on_delivered(process.committed_at)
                    stream.last = message
                    yield message
                await self._changed(stream)

    async def _begin(self, stream: "_Stream") -> None:
        """
        Come to a first view with something to send.

        A caller that matches nothing is held back for a moment on FetchX509SVID alone, so
        that one who comes shortly before its entry need not wait out its own back-off; it
        holds no attestation slot meanwhile.
        """
        process = stream.process
        peer, started = process.peer, asyncio.get_running_loop().time()
        with contextlib.ExitStack() as holding:
            while True:
                await process.attest()
                if not process.view.decision.matched:
                    if not stream.held and not (stream.svids and self._may_hold(peer)):
                        break
                    if not stream.held:
                        stream.held = True
                        holding.enter_context(self._holding(peer.uid))
                    limit = self.no_identity_grace.total_seconds()
                    if process.attested.is_late:
                        limit *= LATE
                elif not stream.svids or not process.view.missing:
                    return
                else:
                    limit = WHOLE_SECONDS if process.view.identities else FIRST_SVID_SECONDS
                if not await process.woken(started + limit):
                    break
        if not process.view.decision.matched:
            event(_log, logging.INFO, "no_identity", pid=peer.pid, uid=peer.uid)
            raise self._denied(peer)
        if not process.view.identities:
            raise NotReadyError("the identity is being signed; try again")

    def _may_hold(self, peer: UnixPeer) -> bool:
        return bool(self.no_identity_grace) and self._held[peer.uid] < HELD_PER_UID

    @contextlib.contextmanager
    def _holding(self, uid: int) -> Iterator[None]:
        self._held[uid] += 1
        try:
            yield
        finally:
            self._held[uid] -= 1
            if not self._held[uid]:
                del self._held[uid]

    async def _changed(self, stream: "_Stream") -> None:
        """Return when there may be something to send, attested anew (SEC-36)."""
        process = stream.process

        def would_send() -> bool:
            return not process.view.decision.matched or self._built(stream) != stream.last

        await process.until_due(would_send)
        await process.attest()
        if not process.view.decision.matched:
            raise self._denied(process.peer)

    def _built(self, stream: "_Stream") -> bytes:
        """The message for the present view, or the last one when that cannot be built."""
        if stream.svids and not stream.process.view.identities:
            return stream.last
        try:
            return stream.build(stream.process.view)
        except InternalError as error:
            if not stream.last:
                raise NotReadyError("the answer is not ready; try again") from error
            # T-13: a client keeps its state when nothing comes, and loses it on a bad message.
            event(_log, logging.ERROR, "response_withheld", exc_info=error)
            return stream.last

    def _denied(self, peer: UnixPeer) -> NoIdentityError:
        self.metrics.denials.inc()
        return NoIdentityError(_NO_IDENTITY.format(pid=peer.pid))


@dataclass(slots=True)
class _Stream:
    """One stream: whose it is, and what it was sent."""

    process: Followed
    build: Callable[[View], bytes]
    svids: bool
    """It carries X509-SVIDs, and so has nothing to say without one."""
    last: bytes = b""
    held: bool = False


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
