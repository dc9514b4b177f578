"""
aiohttp servers and clients whose peers are SPIFFE IDs.

Source: SEC-11, SEC-17, T-09, JWT-22.  The peer is proved in the handshake (`ssl_context`), and
again before each request.  This module needs aiohttp, the extra ``client``.
"""

import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final, Protocol, TypeAlias

try:
    import aiohttp
    from aiohttp import web
    from yarl import URL
except ImportError as error:  # pragma: no cover - proved in a process of its own
    raise ImportError(
        "workload_api.client.http_peers needs aiohttp: install that, or spiffe-issuer[client]"
    ) from error

from spiffe_core.errors import UnauthenticatedError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.matching import Matcher
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid
from workload_api.client.jwt_auth import JwtRefusedError, JwtVerifier, NoJwtSvidError, header_of
from workload_api.client.material import X509Material
from workload_api.client.peer_check import SWEEP_INTERVAL, Now, sweeping
from workload_api.client.ssl_context import (
    PeerRefusedError,
    SpiffeContext,
    client_context,
    proof_of,
    recheck,
    server_context,
)

PEER: Final = web.RequestKey("spiffe_peer", X509Svid)
"""``request[PEER]`` is the caller's X509-SVID, ``request[PEER].spiffe_id`` its ID."""
JWT_SVID: Final = web.RequestKey("spiffe_jwt_svid", JwtSvid)
"""``request[JWT_SVID]`` is the JWT-SVID that came with the request."""
MAX_AGE: Final = timedelta(minutes=3)  # SEC-17, with 10 % of jitter

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class JwtFetcher(Protocol):
    """`JwtSource`, or a stand-in."""

    async def fetch(self, audience: str, *, spiffe_id: SpiffeId | None = None) -> JwtSvid:
        """Return a JWT-SVID for *audience* that has not expired."""
        ...


@asynccontextmanager
async def serving(
    app: web.Application,
    material: X509Material,
    *,
    authorize: Matcher,
    host: str = "127.0.0.1",
    port: int = 0,
    max_age: timedelta = MAX_AGE,
    sweep_every: timedelta = SWEEP_INTERVAL,
    now: Now | None = None,
    **runner_options: Any,
) -> AsyncIterator[int]:
    """
    Serve *app* on *host*:*port* (0 picks one) while entered, and give the port.

    Callers are proved before the first byte, and `peers` goes before every middleware of *app*.
    Connections end gracefully at *max_age*, and at once when the caller is not good any more.

    Raises:
        OSError: the address cannot be listened on.
    """
    context = server_context(material, authorize=authorize, now=now)
    context.set_alpn_protocols(["http/1.1"])
    app.middlewares.insert(0, peers(max_age=max_age))
    runner = web.AppRunner(app, **runner_options)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()

        def sweep() -> None:
            for connection in runner.server.connections if runner.server else ():
                transport = connection.transport
                if transport is not None and not _is_good(transport):
                    transport.abort()

        async with sweeping(material, sweep, sweep_every):
            yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def peers(*, authorize: Matcher | None = None, max_age: timedelta = MAX_AGE) -> Any:
    """
    Return a middleware that verifies the caller before each request and fills in ``PEER``.

    *authorize* comes on top of what the TLS context asked.  For applications that make their
    own site with `server_context`; `serving` brings it along.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            peer = recheck(request.transport)
            since = proof_of(request.transport).since
        except Exception:  # noqa: BLE001 whatever it was: nobody we serve
            refusal = _refusal(403)
            refusal.force_close()
            return refusal
        if authorize is not None and not _welcomes(authorize, peer):
            return _refusal(403)
        request[PEER] = peer
        response = await handler(request)
        # So that not all of those who came together come again together.
        oldest = max_age.total_seconds() * random.uniform(0.9, 1.1)  # noqa: S311
        if time.monotonic() - since > oldest:
            response.force_close()
        return response

    return check


def require(authorize: Matcher) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Return a decorator for one handler, a function or a method: *authorize* on top.

    It looks at the connection itself, and so refuses everybody where there is no SPIFFE TLS.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        async def check(*arguments: Any) -> web.StreamResponse:
            # A function has the request alone, a method itself before it, a view itself alone.
            place = arguments[-1]
            request = place.request if isinstance(place, web.View) else place
            try:
                authorize(recheck(request.transport).spiffe_id)
            except Exception:  # noqa: BLE001 whatever it was: nobody we serve
                return _refusal(403)
            return await handler(*arguments)

        return check

    return decorate


def jwt_svids(verifier: JwtVerifier) -> Any:
    """
    Return a middleware that asks each request for a JWT-SVID and fills in ``JWT_SVID``.

    401 without a good one, with ``WWW-Authenticate``; 403 for a subject that is not welcome.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            svid = verifier.authenticate(request.headers.getall("Authorization", []))
        except NoJwtSvidError:
            return _refusal(401, {"WWW-Authenticate": "Bearer"})
        except JwtRefusedError:
            return _refusal(401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        except Exception:  # noqa: BLE001 whatever it was: nobody we serve
            return _refusal(403)
        request[JWT_SVID] = svid
        return await handler(request)

    return check


def session(
    material: X509Material, *, authorize: Matcher, now: Now | None = None, **options: Any
) -> aiohttp.ClientSession:
    """
    Return a session whose servers must all prove an ID that *authorize* accepts.

    *options* are `aiohttp.ClientSession`'s.  Use it as an async context manager.
    """
    made = connector(material, authorize=authorize, now=now)
    return aiohttp.ClientSession(connector=made, **options)


def connector(
    material: X509Material, *, authorize: Matcher, now: Now | None = None, **options: Any
) -> aiohttp.TCPConnector:
    """Return what `session` is made with; *options* are `aiohttp.TCPConnector`'s."""
    context = client_context(material, authorize=authorize, now=now)
    context.set_alpn_protocols(["http/1.1"])
    return _Connector(context, **options)


def bearer(
    source: JwtFetcher, *, audience: str, origin: str, spiffe_id: SpiffeId | None = None
) -> Any:
    """
    Return a client middleware that sends a JWT-SVID for *audience* with each request.

    To *origin* alone, such as ``https://reports.internal:8443``: whoever is redirected to
    would be handed the secret otherwise.  For ``ClientSession(middlewares=…)``.

    Raises:
        ValueError: *origin* is not https.
    """
    target = URL(origin).origin()
    if target.scheme != "https":
        raise ValueError("a JWT-SVID is sent over https alone")

    async def attach(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if request.url.origin() == target:
            svid = await source.fetch(audience, spiffe_id=spiffe_id)
            request.headers.update(header_of(svid))
        return await handler(request)

    return attach


class _Connector(aiohttp.TCPConnector):
    """Gives out connections whose peer is good at that moment, and no others."""

    def __init__(self, context: SpiffeContext, **options: Any) -> None:
        super().__init__(ssl=context, **options)
        self._context = context

    async def connect(
        self, req: Any, traces: Sequence[Any], timeout: Any
    ) -> aiohttp.connector.Connection:
        """
        Return a connection from the pool, or a new one.

        Raises:
            PeerRefusedError: it would not be one of our context: http, or an ``ssl=`` of the
                request's own.
        """
        asked = time.monotonic()
        while True:
            connection = await super().connect(req, list(traces), timeout)
            try:
                proof = proof_of(connection.transport)
            except UnauthenticatedError as error:
                connection.close()
                raise PeerRefusedError(
                    "this session speaks https alone, with its own TLS context"
                ) from error
            if proof.since >= asked or _is_good(connection.transport):
                return connection
            connection.close()

    async def _create_connection(self, *arguments: Any) -> Any:
        # aiohttp over uvloop loses the socket of a handshake that fails before it begins.
        self._context.require_ready()
        return await super()._create_connection(*arguments)


def _is_good(transport: Any) -> bool:
    try:
        recheck(transport)
    except Exception:  # noqa: BLE001 whatever it was
        return False
    return True


def _welcomes(authorize: Matcher, peer: X509Svid) -> bool:
    try:
        authorize(peer.spiffe_id)
    except Exception:  # noqa: BLE001 a check that breaks is a refusal
        return False
    return True


def _refusal(status: int, headers: dict[str, str] | None = None) -> web.Response:
    """An answer that says nothing to whoever probes."""
    said = {401: "unauthenticated", 403: "forbidden"}[status]
    return web.json_response({"error": said}, status=status, headers=headers)
