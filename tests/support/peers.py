"""
The two ends of a TLS connection between workloads, for tests: who is right, and who is not.

`World` has two trust domains that know each other.  `WRONG` are the peers that must be refused
whichever end they are at; each differs from the right one in a single thing.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import NotReadyError
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor.tls import harden, load
from tests.support.ca import FakeCa, uri_san
from tests.support.door import current, current_ca, wall_clock, workload_key
from workload_api.client.client import X509Identity

ALICE = SpiffeId.parse("spiffe://example.org/alice")
BOB = SpiffeId.parse("spiffe://example.org/bob")
CAROL = SpiffeId.parse("spiffe://partner.test/carol")
SECRET = b"the application's bytes"

Chain = tuple[bytes, ...]


@dataclass
class Material:
    """What a source holds; a test gives it something else and it tells whoever asked."""

    svid: X509Identity | None
    bundles: BundleSet
    told: list[Callable[[], None]] = field(default_factory=list)

    @property
    def identity(self) -> X509Identity:
        """The SVID, if there is one."""
        if self.svid is None:
            raise NotReadyError("no SVID yet")
        return self.svid

    def on_change(self, told: Callable[[], None]) -> Callable[[], None]:
        """Remember *told*."""
        self.told.append(told)
        return lambda: self.told.remove(told)

    def give(self, svid: X509Identity | None, bundles: BundleSet | None = None) -> None:
        """Change, and say so."""
        self.svid = svid
        if bundles is not None:
            self.bundles = bundles
        for told in list(self.told):
            told()


@dataclass
class World:
    """The trust domain example.org, and partner.test with which it is federated."""

    ca: FakeCa = field(default_factory=lambda: current_ca())
    partner: FakeCa = field(default_factory=lambda: current_ca("partner.test"))

    @property
    def bundles(self) -> BundleSet:
        """What a workload of either domain holds."""
        return BundleSet.of([self.ca.bundle, self.partner.bundle])

    def chain(self, who: SpiffeId, ca: FakeCa | None = None, **changes: Any) -> Chain:
        """A chain for *who*, signed by *ca*, or by the CA of its own domain."""
        own = self.partner if who.trust_domain == self.partner.trust_domain else self.ca
        signer = ca or own
        return signer.chain(current(signer.leaf(who.uri)).but(**changes))

    def identity(self, who: SpiffeId, **changes: Any) -> X509Identity:
        """An SVID with its key."""
        chain = self.chain(who, **changes)
        return X509Identity(X509Svid.from_chain(chain), workload_key())

    def material(self, who: SpiffeId = ALICE, **changes: Any) -> Material:
        """What *who* holds."""
        return Material(self.identity(who, **changes), self.bundles)


def past(**span: float) -> Any:
    """An instant before now."""
    return wall_clock() - timedelta(**span)


def intermediate(ca: FakeCa, **changes: Any) -> FakeCa:
    """A CA under *ca*, valid by the real clock."""
    until = wall_clock() + timedelta(days=1)
    return ca.child(**{"not_before": past(days=1), "not_after": until, **changes})


def _not_a_workload(world: World) -> Chain:
    return world.ca.chain(current(world.ca.leaf(ALICE.uri)).having(uri_san(critical=True)))


def _two_ids(world: World) -> Chain:
    both = uri_san(ALICE.uri, BOB.uri, critical=True)
    return world.ca.chain(current(world.ca.leaf(ALICE.uri)).having(both))


WRONG: dict[str, tuple[Callable[[World], Chain], str]] = {
    "the wrong ID": (lambda world: world.chain(BOB), "not the expected identity"),
    "the right path in another domain": (
        lambda world: world.chain(SpiffeId.parse("spiffe://partner.test/alice")),
        "not the expected identity",
    ),
    "a foreign CA that claims our domain": (
        lambda world: world.chain(ALICE, world.partner),
        "no valid path",
    ),
    "our CA that claims a foreign domain": (
        lambda world: world.chain(CAROL, world.ca),
        "no valid path",
    ),
    "an evil CA of the same name": (
        lambda world: world.chain(ALICE, current_ca(which="evil")),
        "verify failed",
    ),
    "a domain that nobody knows": (
        lambda world: world.chain(
            SpiffeId.parse("spiffe://stranger.test/alice"), current_ca("stranger.test")
        ),
        "verify failed",
    ),
    "a domain that nobody knows, under our CA": (
        lambda world: world.chain(SpiffeId.parse("spiffe://stranger.test/alice"), world.ca),
        "no X.509 authority is known",
    ),
    "expired": (lambda world: world.chain(ALICE, not_after=past(seconds=2)), "verify failed"),
    "not valid yet": (
        lambda world: world.chain(ALICE, not_before=past(minutes=-5)),
        "verify failed",
    ),
    "under an expired intermediate": (
        lambda world: world.chain(ALICE, intermediate(world.ca, not_after=past(hours=1))),
        "verify failed",
    ),
    "without its intermediate": (
        lambda world: world.chain(ALICE, intermediate(world.ca))[:1],
        "verify failed",
    ),
    "no URI SAN": (_not_a_workload, "exactly one URI SAN"),
    "two URI SANs": (_two_ids, "exactly one URI SAN"),
}
"""By name: the chain that is presented, and what the refusal says."""

RIGHT: dict[str, tuple[SpiffeId, Callable[[World], Chain]]] = {
    "our own domain": (ALICE, lambda world: world.chain(ALICE)),
    "under an intermediate": (
        ALICE,
        lambda world: world.chain(ALICE, intermediate(world.ca)),
    ),
    "a federated domain": (CAROL, lambda world: world.chain(CAROL)),
}


def raw_context(
    world: World,
    chain: Chain,
    *,
    server: bool,
    alpn: tuple[str, ...] = (),
    version: ssl.TLSVersion | None = None,
) -> ssl.SSLContext:
    """Plain `ssl` with *chain*, which takes any peer that a CA of either domain signed."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    harden(made, [world.ca.root.cert.der, world.partner.root.cert.der])
    if chain:
        load(made, chain, workload_key())
    if alpn:
        made.set_alpn_protocols(list(alpn))
    if version is not None:
        made.minimum_version = made.maximum_version = version
    return made


class RawServer:
    """A server that records every byte it decrypts, and says *greeting* to who comes."""

    def __init__(self, context: ssl.SSLContext | None, greeting: bytes = b"") -> None:
        self._context = context
        self._greeting = greeting
        self.decrypted = b""
        self.accepted = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            with contextlib.suppress(OSError), plain:
                plain.settimeout(5)
                if self._context is None:
                    self._serve(plain)
                    continue
                with self._context.wrap_socket(plain, server_side=True) as tls:
                    self._serve(tls)

    def _serve(self, connection: socket.socket) -> None:
        if self._greeting:
            connection.sendall(self._greeting)
        while data := connection.recv(65536):
            self.decrypted += data

    def close(self) -> None:
        """Stop."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@contextlib.contextmanager
def a_raw_server(context: ssl.SSLContext | None, greeting: bytes = b"") -> Iterator[RawServer]:
    """A `RawServer` while entered."""
    server = RawServer(context, greeting)
    try:
        yield server
    finally:
        server.close()


def raw_talk(context: ssl.SSLContext | None, port: int, said: bytes = SECRET) -> bytes:
    """Connect, say *said*, and return every byte that could be decrypted until the end."""
    got = b""
    with contextlib.suppress(OSError):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            connection = plain if context is None else context.wrap_socket(plain)
            with connection:
                connection.sendall(said)
                while data := connection.recv(65536):
                    got += data
    return got


class Recorder(asyncio.Protocol):
    """A server's protocol: greets who was let in, and keeps what they said."""

    def __init__(self, seen: "Seen") -> None:
        self._seen = seen

    def connection_made(self, transport: Any) -> None:
        """Somebody was let in."""
        self._seen.transports.append(transport)
        transport.write(SECRET)

    def data_received(self, data: bytes) -> None:
        """Keep it, and let them go."""
        self._seen.bytes += data
        self._seen.transports[-1].close()


@dataclass
class Seen:
    """What a server on a loop saw."""

    port: int = 0
    bytes: bytes = b""
    transports: list[Any] = field(default_factory=list)


@asynccontextmanager
async def recording(context: ssl.SSLContext) -> AsyncIterator[Seen]:
    """A server on this loop with *context*."""
    seen = Seen()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Recorder(seen), "127.0.0.1", 0, ssl=context)
    async with server:
        seen.port = server.sockets[0].getsockname()[1]
        yield seen
        for transport in seen.transports:
            transport.abort()


def without_key(bundles: BundleSet, name: str) -> BundleSet:
    """The same bundles, with nothing left to trust in the domain *name*."""
    kept = [one for one in bundles.values() if one.trust_domain.name != name]
    gone = [one.trust_domain for one in bundles.values() if one.trust_domain.name == name]
    return BundleSet.of([*kept, *(Bundle(one) for one in gone)])
