"""
The agent's way out: a grpcio channel whose server is proved by SPIFFE ID before a byte.

Source: transport (agent as client), T-10, SEC-57, SEC-107.  grpcio's own TLS wants a host
name and can't compare a SPIFFE ID, so it dials a private Unix socket; for each of its
connections we dial the server, verify the chain, and only then join the two.  grpcio dials
again and again by itself; how often a server that is away is dialled is decided here.
"""

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

import grpc

from spiffe_core.errors import SpiffeError
from spiffe_wire import privatefolder
from spiffe_wire.backoff import Backoff
from spiffe_wire.frontdoor.names import Names
from spiffe_wire.frontdoor.splice import LINGER_SECONDS, Leg, join, notice_dead_peer
from spiffe_wire.frontdoor.tls import peer_chain
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
"""Seconds for the TCP connection and the handshake together."""
FIRST_PAUSE: Final = timedelta(milliseconds=200)
LONGEST_PAUSE: Final = timedelta(seconds=15)
"""SEC-106 wants agents back in 30 s; grpcio waits 20 s for a connection to be joined."""

# A call that meets a connection which has just ended, by `cut` or by the server's age limit,
# goes out again on the next one; a server that is away is another matter, for our own
# back-off.
_RETRIES: Final = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.02s",
                    "maxBackoff": "0.2s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS: Final[Mapping[str, Any]] = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.service_config": _RETRIES,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.max_receive_message_length": 4 * 1024 * 1024,
}

CheckServer = Callable[[tuple[bytes, ...]], None]
"""Verifies the server's chain and compares its SPIFFE ID, or raises."""


class Dialer:
    """
    A channel to *host*:*port*, as an async context manager.

    *context* and *check* are asked for every connection, so that a rotation needs only
    `cut`.  *options* are grpcio's, over ours; *interceptors* are made for this dialer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        context: Callable[[], ssl.SSLContext],
        check: CheckServer,
        runtime_dir: Path,
        options: Mapping[str, Any] | None = None,
        interceptors: Callable[["Dialer"], Sequence[Any]] = lambda _: (),
    ) -> None:
        self._address = (host, port)
        self._names = Names(host)
        self._context = context
        self._check = check
        self._runtime_dir = runtime_dir
        self._options = {**_OPTIONS, **(options or {})}
        self._interceptors = interceptors
        self._legs: set[Leg] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._not_before = 0.0
        self._hurried = asyncio.Event()
        self.problem = ""
        """Why the last connection failed; empty after one that did not."""

    async def __aenter__(self) -> Self:
        self._private = privatefolder.make(self._runtime_dir, "c")
        path = self._private / "s"
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(self._accept, str(path))
        self._channel = grpc.aio.insecure_channel(
            f"unix:{path}",
            options=list(self._options.items()),
            interceptors=self._interceptors(self),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        await self._channel.close()
        self._listener.close()
        open_ones = [leg.closed for leg in self._legs if leg.is_open]
        self.cut()
        if open_ones:
            await asyncio.wait(open_ones, timeout=LINGER_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        privatefolder.remove(self._private)

    @property
    def channel(self) -> Any:
        """The grpcio channel; it survives reconnections."""
        return self._channel

    def cut(self) -> None:
        """
        End every connection now; the next call dials anew, with the context of then.

        At once: what failed before may do with another certificate.
        """
        self._backoff.reset()
        self._not_before = 0.0
        for leg in list(self._legs):
            leg.close()

    def hurry(self) -> None:
        """Dial now whatever waits for its turn: what failed before may succeed."""
        self._backoff.reset()
        self._not_before = 0.0
        self._hurried.set()
        self._hurried = asyncio.Event()

    def cut_where(self, unwanted: Callable[[Any], bool]) -> None:
        """End the connections to the server whose TLS object is *unwanted*."""
        for near in list(self._legs):
            far = near.other
            if far is not None and unwanted(far.ssl_object):
                near.close()

    def _accept(self) -> Leg:
        near = Leg(lambda: self._legs.discard(near))
        if self._closing:
            near.close()  # grpcio dialled while we were leaving
            return near
        self._legs.add(near)
        task = asyncio.get_running_loop().create_task(self._dial(near))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return near

    async def _dial(self, near: Leg) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._not_before):
                await self._hurried.wait()
        if near.closed.done():
            return  # grpcio gave up on it meanwhile
        far = _Far(self._dismissed)
        host, port = self._address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._connect(far)
            notice_dead_peer(far.socket)
            self._check(peer_chain(far.ssl_object))
            if far.ssl_object.selected_alpn_protocol() != "h2":
                raise ssl.SSLError("the server does not speak HTTP/2")
        except Exception as error:  # noqa: BLE001 whatever it was, nothing may be sent
            if not isinstance(error, SpiffeError | OSError):
                event(_log, logging.ERROR, "dial_failed", exc_info=error)
            self.problem = f"{host}:{port}: {str(error) or type(error).__name__}"
            self._not_before = loop.time() + self._backoff.next().total_seconds()
            far.close()
            near.close()
            return
        self.problem = ""
        self._backoff.reset()
        far.joined = True
        join(near, far)

    async def _connect(self, far: Leg) -> None:
        """Connect *far* to the first of the addresses that answers, and shake hands."""
        host, port = self._address
        problem = OSError("it has no address")
        for address in await self._names.addresses():
            try:
                await asyncio.get_running_loop().create_connection(
                    lambda: far,
                    address,
                    port,
                    ssl=self._context(),
                    server_hostname=_sni(host),
                    ssl_shutdown_timeout=LINGER_SECONDS,
                )
            except ssl.SSLError:
                raise
            except OSError as error:
                problem = error
            else:
                return
        raise problem

    def _dismissed(self) -> None:
        host, port = self._address
        self.problem = f"{host}:{port}: it left without a word: it may not accept our SVID"


class _Far(Leg):
    """The leg to the server; *dismissed* is told when that ends it before it says anything."""

    def __init__(self, dismissed: Callable[[], None]) -> None:
        super().__init__()
        self.joined = False
        self._heard = False
        self._dismissed = dismissed

    def data_received(self, data: bytes) -> None:
        """Note that it speaks, and pass on."""
        self._heard = True
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """In TLS 1.3 a server learns who we are after our handshake is done."""
        we_left = self.other is None or not self.other.is_open
        if self.joined and not self._heard and not we_left:
            self._dismissed()
        super().connection_lost(exc)


def _sni(host: str) -> str:
    # asyncio wants a name when it does TLS; nobody routes or decides by it.
    with contextlib.suppress(ValueError):
        return host.encode("idna").decode()
    return "localhost"
