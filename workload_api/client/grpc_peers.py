"""
grpcio servers and clients whose peers are SPIFFE IDs.

Source: transport, SEC-11, SEC-17, SEC-57, T-09, T-10, JWT-23.  grpcio's own TLS compares host
names and pools roots; so the server stands behind the front door, the channel behind the
dialer, and both use the contexts of `ssl_context`.  Servicers and stubs are anybody's, as
``protoc`` makes them; servicers are async.
"""

import shutil
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from spiffe_core.errors import (
    ForbiddenError,
    PreconditionError,
    SpiffeError,
    UnauthenticatedError,
)
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.matching import Matcher
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor import peer as door_peer
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.door import DoorLimits, FrontDoor
from spiffe_wire.frontdoor.peer import Peer, TlsPeer
from spiffe_wire.frontdoor.tls import ALPN
from spiffe_wire.interceptors import ErrorInterceptor, Handler, wrap_handler
from spiffe_wire.status import never_answered
from workload_api.client.jwt_auth import HEADER, JwtVerifier
from workload_api.client.material import X509Material
from workload_api.client.peer_check import SWEEP_INTERVAL, Now, PeerVerifier, sweeping
from workload_api.client.ssl_context import client_context, recheck, server_context

MAX_AGE: Final = timedelta(minutes=3)  # SEC-17; grpcio adds 10 % of jitter
GRACE: Final = timedelta(seconds=5)

_jwt_svid: ContextVar[JwtSvid] = ContextVar("jwt_svid")


@asynccontextmanager
async def serving(
    material: X509Material,
    register: Callable[[Any], None],
    *,
    authorize: Matcher,
    methods: Mapping[str, Matcher] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    interceptors: Sequence[Any] = (),
    limits: DoorLimits | None = None,
    max_message_bytes: int = 4 * 1024 * 1024,
    max_age: timedelta = MAX_AGE,
    grace: timedelta = GRACE,
    sweep_every: timedelta = SWEEP_INTERVAL,
    runtime_dir: Path | None = None,
    now: Now | None = None,
) -> AsyncIterator[int]:
    """
    Serve gRPC on *host*:*port* (0 picks one) while entered, and give the port.

    *register* adds the servicers to the server it is handed.  Every caller must prove an ID
    that *authorize* accepts; *methods* asks more of some, by service (``/pkg.Service``) or
    full name (``/pkg.Service/Method``).  The caller is verified at each call; connections end
    gracefully at *max_age*, and at once when the caller is not good any more.  At the end
    running calls have *grace*.

    Raises:
        InternalError: the address cannot be listened on.
        PreconditionError: *methods* names what no servicer has.
    """
    verifier = PeerVerifier(material, authorize, now)
    context = server_context(material, authorize=authorize, now=now)
    context.set_alpn_protocols(ALPN)
    wanted = methods or {}
    checks = [ErrorInterceptor(), _Callers(verifier, wanted), *interceptors]

    def register_all(server: Any) -> None:
        registrar = _Registrar(server)
        register(registrar)
        registrar.check(wanted)

    with _private_folder(runtime_dir) as folder:
        async with FrontDoor(
            register_all,
            runtime_dir=folder,
            interceptors=checks,
            limits=limits,
            max_message_bytes=max_message_bytes,
            max_age=max_age,
        ) as door:

            def sweep() -> None:
                door.disconnect(lambda peer: not _is_good(verifier, peer))

            async with sweeping(material, sweep, sweep_every):
                bound = await door.listen_tls(
                    host, port, context=lambda: context, identify=verifier.verify
                )
                try:
                    yield bound
                finally:
                    await door.close(grace)


def caller_of(context: Any) -> SpiffeId:
    """
    Return who called, for a servicer behind `serving`.

    Raises:
        UnauthenticatedError: it is not behind one.
    """
    return caller_svid_of(context).spiffe_id


def caller_svid_of(context: Any) -> X509Svid:
    """
    Return the X509-SVID of who called, for a servicer behind `serving`.

    Raises:
        UnauthenticatedError: it is not behind one.
    """
    return _svid_of(door_peer.peer_of(context))


@asynccontextmanager
async def channel(
    material: X509Material,
    host: str,
    port: int,
    *,
    authorize: Matcher,
    options: Mapping[str, Any] | None = None,
    sweep_every: timedelta = SWEEP_INTERVAL,
    runtime_dir: Path | None = None,
    now: Now | None = None,
) -> AsyncIterator[grpc.aio.Channel]:
    """
    Give a channel to *host*:*port*, whose server must prove an ID that *authorize* accepts.

    A call that finds no such server fails with UNAVAILABLE, and its details say why.
    A connection ends when either SVID expires or the server is not vouched for any more; after
    a rotation those that are open go on.  *options* are grpcio's channel arguments.
    """
    context = client_context(material, authorize=authorize, now=now)
    context.set_alpn_protocols(ALPN)

    def check(_: tuple[bytes, ...]) -> None:
        """Nothing is left to do: the handshake itself refuses the wrong server."""

    with _private_folder(runtime_dir) as folder:
        async with Dialer(
            host,
            port,
            context=lambda: context,
            check=check,
            runtime_dir=folder,
            # Whose calls may go out twice is not ours to say.
            options={"grpc.service_config": "{}", **(options or {})},
            interceptors=_explaining,
        ) as dialer:
            forget = material.on_change(dialer.hurry)
            try:
                async with sweeping(material, lambda: dialer.cut_where(_is_over), sweep_every):
                    yield dialer.channel
            finally:
                forget()


def jwt_svids(verifier: JwtVerifier) -> grpc.aio.ServerInterceptor:
    """
    Return an interceptor that asks each call for a JWT-SVID; see `jwt_svid_of`.

    UNAUTHENTICATED without a good one, PERMISSION_DENIED for a subject that is not welcome.
    For ``interceptors`` of `serving`.
    """
    return _JwtSvids(verifier)


def jwt_svid_of(_: Any) -> JwtSvid:
    """
    Return the JWT-SVID of the call that is being served.

    Raises:
        UnauthenticatedError: the server has no `jwt_svids`.
    """
    svid = _jwt_svid.get(None)
    if svid is None:
        raise UnauthenticatedError("no JWT-SVID was asked for")
    return svid


class _Callers(grpc.aio.ServerInterceptor):
    """Verifies the caller at each call, and asks more for some methods."""

    def __init__(self, verifier: PeerVerifier, methods: Mapping[str, Matcher]) -> None:
        self._verifier = verifier
        self._methods = methods

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the handler of a known method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        names = (method, method.rpartition("/")[0])
        wanted = [self._methods[name] for name in names if name in self._methods]
        return _checking(handler, lambda context: self._check(context, wanted))

    def _check(self, context: Any, wanted: Sequence[Matcher]) -> None:
        try:
            svid = self._verifier.verify(caller_svid_of(context).chain)
            for authorize in wanted:
                authorize(svid.spiffe_id)
        except (ForbiddenError, UnauthenticatedError):
            raise
        except SpiffeError as error:
            raise UnauthenticatedError("the caller's X509-SVID is refused") from error
        except Exception as error:
            raise ForbiddenError("the caller is not welcome") from error


class _Registrar:
    """A server that servicers are added to, and who they are."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._handlers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """As the server's own."""
        self._handlers.extend(handlers)
        self._server.add_generic_rpc_handlers(handlers)

    def check(self, names: Iterable[str]) -> None:
        """Refuse a name that nobody has: it would protect nothing, and look as if it did."""
        for name in names:
            if not any(_has(handler, name) for handler in self._handlers):
                raise PreconditionError(
                    f'methods: no servicer has "{name}"; write /package.Service/Method, or '
                    "/package.Service"
                )


class _Asked(NamedTuple):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


def _has(handler: Any, name: str) -> bool:
    if isinstance(handler, grpc.ServiceRpcHandler) and f"/{handler.service_name()}" == name:
        return True
    return handler.service(_Asked(name)) is not None


class _JwtSvids(grpc.aio.ServerInterceptor):
    def __init__(self, verifier: JwtVerifier) -> None:
        self._verifier = verifier

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the handler of a known method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata = handler_call_details.invocation_metadata or ()
        values = [value for key, value in metadata if key == HEADER]
        return _checking(handler, lambda _: _jwt_svid.set(self._verifier.authenticate(values)))


def _checking(handler: Any, check: Callable[[Any], object]) -> Any:
    """*handler*, with *check* before it; what that raises becomes the status."""

    def unary(inner: Handler) -> Handler:
        async def call(request: Any, context: Any) -> Any:
            check(context)
            return await inner(request, context)

        return call

    def stream(inner: Handler) -> Handler:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            check(context)
            async with aclosing(inner(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return call

    return wrap_handler(handler, unary, stream)


def _svid_of(peer: Peer) -> X509Svid:
    if not isinstance(peer, TlsPeer) or peer.svid is None:
        raise UnauthenticatedError("the caller presented no X509-SVID")
    return peer.svid


def _is_good(verifier: PeerVerifier, peer: Peer) -> bool:
    try:
        verifier.verify(_svid_of(peer).chain)
    except Exception:  # noqa: BLE001 whatever it was
        return False
    return True


def _is_over(connection: Any) -> bool:
    try:
        recheck(connection)
    except Exception:  # noqa: BLE001 whatever it was
        return True
    return False


@contextmanager
def _private_folder(given: Path | None) -> Iterator[Path]:
    """*given*, or a folder of our own that goes afterwards."""
    if given is not None:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="spiffe-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# A channel that cannot dial says "failed to connect to all addresses"; we know why.


def _explaining(dialer: Dialer) -> Sequence[Any]:
    return [one(dialer) for one in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]


class _Explains:
    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer

    async def unary(self, call: Any) -> Any:
        """Wait until the call is over, and return it, or raise with the reason."""
        try:
            code = await call.code()
        except BaseException:
            call.cancel()
            raise
        if code is not grpc.StatusCode.OK:
            await self.answer(call)
        return call

    async def answer(self, call: Any) -> Any:
        """Return the answer, or raise with the reason."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from error

    async def stream(self, call: Any) -> AsyncIterator[Any]:
        """Pass the answers on; an error with the reason."""
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from error
        finally:
            call.cancel()  # nothing, once it is over

    def _explained(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        # A deadline may have passed while nobody could be dialled.
        unanswered = never_answered(error) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if not unanswered or not self._dialer.problem:
            return error
        return grpc.aio.AioRpcError(
            error.code(),
            error.initial_metadata(),
            error.trailing_metadata(),
            f"{self._dialer.problem} ({error.details()})",
            error.debug_error_string(),
        )


class _Explained:
    """A call with another answer."""

    def __init__(self, call: Any, answer: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
        self._call = call
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer(self._call).__await__()


class _UnaryUnary(_Explains, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        """Call, and explain a failure."""
        return await self.unary(await continuation(client_call_details, request))


class _StreamUnary(_Explains, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Call, and explain a failure."""
        # Not to be waited for here: grpcio lets nobody write before this returns.
        call = await continuation(client_call_details, request_iterator)
        return _Explained(call, self.answer)


class _UnaryStream(_Explains, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        """Call, and explain a failure."""
        return self.stream(await continuation(client_call_details, request))


class _StreamStream(_Explains, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Call, and explain a failure."""
        return self.stream(await continuation(client_call_details, request_iterator))
