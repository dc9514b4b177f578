"""
Asks an API server or a kubelet: six verbs over one pool of connections.

Source: SEC-34, SEC-80 (everything has a limit).  httpcore does HTTP and TLS; what is here is
what a cluster's answers mean.  Redirects are not followed.
"""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlencode

import httpcore

from spiffe_core.errors import NotReadyError
from spiffe_core.version import VERSION
from spiffe_wire.k8s.credentials import Access, CredentialsError
from spiffe_wire.k8s.network import Network

TIMEOUT: Final = timedelta(seconds=5)  # SEC-56: what hangs longer is a refusal
CONNECT_SECONDS: Final = 3.0
"""
Less than callers wait: a TLS handshake that they cancel leaves its socket to the collector,
one that times out by itself closes it.
"""
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""A page of 500 pods with full status; a kubelet's whole list."""
MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""etcd refuses objects beyond 1.5 MiB."""
# A connection whose other end is gone without a word is noticed within about ten seconds.
_SOCKET_OPTIONS: Final = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
]
_WHOLE: Final = "application/json"
_METADATA: Final = (
    "application/json;as=PartialObjectMetadata{list};g=meta.k8s.io;v=v1, application/json"
)


class ClusterError(NotReadyError):
    """
    The API server or kubelet cannot be asked, or said no.

    *status* is its HTTP status, 0 when it did not answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class GoneError(ClusterError):
    """What was asked from there on is no longer kept: list again."""


class MissingError(ClusterError):
    """There is no such object."""


class Client:
    """One API server; for one event loop.  `close` ends its connections."""

    def __init__(self, access: Access, *, timeout: timedelta = TIMEOUT) -> None:
        self._access = access
        self._timeout = timeout.total_seconds()
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._version: object = None
        self._retired: list[httpcore.AsyncConnectionPool] = []

    async def get(self, path: str, *, metadata_only: bool = False) -> Any:
        """
        Return an object, as JSON.

        Raises:
            MissingError: there is no such object.
            ClusterError: no answer, or another one.
        """
        return await self._ask("GET", path, accept=_accept("", metadata_only))

    async def page(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata_only: bool = False
    ) -> Any:
        """
        Return a page of a list, as JSON.

        Raises:
            GoneError: it was asked for too late.
            ClusterError: no answer, or another one.
        """
        return await self._ask("GET", path, params, accept=_accept("List", metadata_only))

    async def post(self, path: str, body: Any) -> Any:
        """
        Create an object, and return what the server made of it.

        Raises:
            ClusterError: no answer, or another one than that it was done.
        """
        return await self._ask("POST", path, body=json.dumps(body).encode())

    @asynccontextmanager
    async def watch(
        self,
        path: str,
        params: Mapping[str, str],
        *,
        silence: timedelta,
        metadata_only: bool = False,
    ) -> AsyncIterator[AsyncIterator[Any]]:
        """
        Hold a watch while entered: an iterator over its events, which ends when the server
        ends it.  *silence* is how long nothing may come.

        Raises:
            GoneError: the version it was to begin from is no longer kept.
            ClusterError: no answer, another one, or the connection failed.
        """
        timeout = {**self._timeouts(), "read": silence.total_seconds()}
        async with self._translated(), AsyncExitStack() as stack:
            # A server answers at once that it will tell; only then may it be silent.
            async with asyncio.timeout(self._timeout):
                response = await stack.enter_async_context(
                    self._stream("GET", path, params, b"", _accept("", metadata_only), timeout)
                )
            if response.status != 200:
                raise _refused(response.status, await _body(response))
            async with aclosing(_events(response)) as events:
                yield events

    async def close(self) -> None:
        """End every connection."""
        for pool in (*self._retired, *((self._pool,) if self._pool else ())):
            await pool.aclose()
        self._pool = None
        self._retired.clear()

    async def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes = b"",
        accept: str = _WHOLE,
    ) -> Any:
        async with self._translated():
            async with self._stream(
                method, path, params, body, accept, self._timeouts()
            ) as response:
                data = await _body(response)
        if response.status not in (200, 201):
            raise _refused(response.status, data)
        return _json(data)

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: bytes,
        accept: str,
        timeout: Mapping[str, float],
    ) -> AsyncIterator[httpcore.Response]:
        access = self._access
        headers = [
            ("Host", f"{_host(access.host)}:{access.port}"),
            ("Accept", accept),
            ("User-Agent", f"spiffe-issuer/{VERSION}"),
        ]
        if bearer := access.bearer():
            headers.append(("Authorization", f"Bearer {bearer}"))
        if body:
            headers += [("Content-Type", _WHOLE), ("Content-Length", str(len(body)))]
        target = access.path + path + (f"?{urlencode(params)}" if params else "")
        extensions: dict[str, Any] = {"timeout": dict(timeout)}
        if access.server_name:
            extensions["sni_hostname"] = access.server_name
        async with (await self._current()).stream(
            method,
            httpcore.URL(scheme=b"https", host=access.host, port=access.port, target=target),
            headers=headers,
            content=body or None,
            extensions=extensions,
        ) as response:
            yield response

    async def _current(self) -> httpcore.AsyncConnectionPool:
        """The pool; another one once a certificate of ours or of its CA was replaced."""
        version = self._access.version
        if self._pool is None or version != self._version:
            made = httpcore.AsyncConnectionPool(
                self._access.context(),
                max_connections=16,
                keepalive_expiry=60,
                socket_options=_SOCKET_OPTIONS,
                network_backend=Network(),
            )
            if self._pool is not None:
                self._retired.append(self._pool)  # streams of it go on until they end
            for pool in [one for one in self._retired if _is_unused(one)]:
                self._retired.remove(pool)
                await pool.aclose()
            self._pool, self._version = made, version
        return self._pool

    def _timeouts(self) -> dict[str, float]:
        limits = dict.fromkeys(("read", "write", "pool"), self._timeout)
        return {"connect": min(self._timeout, CONNECT_SECONDS), **limits}

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        where = f"{_host(self._access.host)}:{self._access.port}"
        try:
            yield
        except CredentialsError as error:
            raise ClusterError(str(error)) from error
        except (httpcore.TimeoutException, TimeoutError) as error:
            raise ClusterError(f"{where} did not answer in time") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            if isinstance(error.__cause__ or error, ssl.SSLError) or isinstance(
                error.__context__, ssl.SSLError
            ):
                raise ClusterError(
                    f"{where} is not who it should be, by the CAs of "
                    f"{self._access.described}: {error}"
                ) from error
            raise ClusterError(f"{where} cannot be reached: {error}") from error


def _is_unused(pool: httpcore.AsyncConnectionPool) -> bool:
    return all(one.is_idle() or one.is_closed() for one in pool.connections)


def _accept(form: str, metadata_only: bool) -> str:
    # The form must be that of what is asked for, or the answer is 406: "List" for a page.
    return _METADATA.format(list=form) if metadata_only else _WHOLE


async def _body(response: httpcore.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ClusterError("the answer is longer than 64 MiB", response.status)
        parts.append(part)
    return b"".join(parts)


async def _events(response: httpcore.Response) -> AsyncGenerator[Any, None]:
    rest = b""
    async for part in response.aiter_stream():
        *lines, rest = (rest + part).split(b"\n") if rest else part.split(b"\n")
        for line in lines:
            if line.strip():
                yield _json(line)
        if len(rest) > MAX_LINE_BYTES:
            raise ClusterError("an event of the watch is longer than 4 MiB")
    if rest.strip():
        raise ClusterError("the watch ended in the middle of an event")


def _json(data: bytes) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ClusterError("the answer is not JSON") from error
    if not isinstance(found, dict):
        raise ClusterError("the answer is not a JSON object")
    return found


def _refused(status: int, data: bytes) -> ClusterError:
    """What the server said, and what to do about it."""
    try:
        said = str(_json(data[:65536]).get("message", ""))
    except ClusterError:  # a kubelet writes plain text; what a gateway's page says is no help
        said = "" if data.lstrip().startswith(b"<") else data[:500].decode("utf-8", "replace")
    text = "".join(one for one in said if one.isprintable())[:500] or f"HTTP {status}"
    if status == 401:
        return ClusterError(f"we are not known to it ({text}): is the token good?", status)
    if status == 403:
        return ClusterError(f"it does not let us: {text}: grant it by RBAC", status)
    if status == 404:
        return MissingError(text, status)
    if status == 410:
        return GoneError(text, status)
    return ClusterError(f"it answered {status}: {text}", status)


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
