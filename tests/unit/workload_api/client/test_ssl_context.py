"""
TLS contexts by SPIFFE ID: what they present, whom they let in, and what can't be set on them.

Each test names its rule.  Refusals with their byte counts stand in
tests/security/test_python_peers.py.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import gc
import http.client
import http.server
import io
import os
import socket
import socketserver
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import UnauthenticatedError
from spiffe_core.matching import any_id, exactly, member_of
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509SvidError
from tests.support.ca import FakeCa, name
from tests.support.clock import DrivenClock
from tests.support.door import current_ca, on_both_loops
from tests.support.peers import (
    ALICE,
    BOB,
    CAROL,
    SECRET,
    Material,
    World,
    a_raw_server,
    raw_context,
    raw_talk,
    recording,
    without_key,
)
from workload_api.client.peer_check import PeerVerifier
from workload_api.client.ssl_context import (
    ContextError,
    NotNowError,
    PeerRefusedError,
    SpiffeContext,
    client_context,
    peer_of,
    recheck,
)


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[Any, Any]:
    """Shake hands without a socket, and return both ends."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, there, server_hostname="127.0.0.1"),
        server.wrap_bio(there, back, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends


def pair(
    client: Material | None = None, server: Material | None = None, **options: Any
) -> tuple[SpiffeContext, SpiffeContext]:
    """Contexts of alice, who calls, and of bob; each wants the other."""
    world = World()
    return (
        SpiffeContext(
            client or world.material(ALICE),
            server_side=False,
            authorize=exactly(BOB),
            **options,
        ),
        SpiffeContext(
            server or world.material(BOB), server_side=True, authorize=exactly(ALICE), **options
        ),
    )


def both(world: World) -> tuple[Material, Material]:
    """What alice and bob hold."""
    return world.material(ALICE), world.material(BOB)


def test_both_ends_know_the_other() -> None:
    """After the handshake each end says whose SVID the other proved, and bytes pass."""
    client, server = shake(*pair())
    assert (peer_of(client).spiffe_id, peer_of(server).spiffe_id) == (BOB, ALICE)
    client.write(SECRET)
    assert server.read() == SECRET


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_sec_17_versions(version: str) -> None:
    """SEC-17: TLS 1.2 and 1.3 are spoken."""
    client, server = pair()
    client.maximum_version = client.minimum_version = ssl.TLSVersion[version]
    assert shake(client, server)[1].version() == version.replace("_", ".")


def test_a_rotation_needs_nothing_done() -> None:
    """The next connection presents the new SVID, the old one goes on with the one it has."""
    world = World()
    alice, bob = both(world)
    contexts = pair(alice, bob)
    old = shake(*contexts)
    bob.give(world.identity(BOB, serial=0x7777))
    new = shake(*contexts)
    assert [peer_of(one).serial_number for one, _ in (old, new)] == [0x1001, 0x7777]
    old[0].write(SECRET)
    assert old[1].read() == SECRET


def test_nothing_is_made_twice() -> None:
    """While SVID and bundles are the same, connections share one inner context."""
    alice, bob = both(World())
    contexts = pair(alice, bob)
    first, second = shake(*contexts)[1], shake(*contexts)[1]
    assert first.context is second.context
    bob.give(bob.svid, BundleSet.of(bob.bundles.values()))
    assert shake(*contexts)[1].context is not first.context


def test_no_svid_is_said() -> None:
    """Without an SVID, or any authority, no connection begins, and the error says so."""
    world = World()
    alice = world.material(ALICE)
    context = client_context(alice, authorize=any_id())
    alice.give(None)
    with pytest.raises(NotNowError, match="no SVID"):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO()).do_handshake()
    alice.give(world.identity(ALICE), BundleSet())
    never = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
    for attempt in (never.do_handshake, never.read, lambda: never.write(SECRET)):
        with pytest.raises(NotNowError, match="no authority"):
            attempt()
    with socket.socket() as plain, pytest.raises(NotNowError):
        context.wrap_socket(plain)


@pytest.mark.parametrize(
    "error",
    [ValueError("odd"), KeyError("x"), RuntimeError()],
    ids=lambda one: type(one).__name__,
)
def test_a_check_that_breaks_is_a_refusal(error: Exception) -> None:
    """Whatever `authorize` raises, the peer is refused, by an error that TLS code catches."""

    def authorize(_: SpiffeId) -> None:
        raise error

    world = World()
    client = client_context(world.material(ALICE), authorize=authorize)
    server = pair(server=world.material(BOB))[1]
    with pytest.raises(PeerRefusedError) as refused:
        shake(client, server)
    assert isinstance(refused.value, ssl.SSLCertVerificationError)
    assert refused.value.verify_message == str(refused.value)


@pytest.mark.parametrize("method", ["read", "write"])
def test_sec_17_reading_first_does_not_skip_the_check(method: str) -> None:
    """SEC-17: OpenSSL shakes hands by itself at a read or write; the peer is proved too."""
    world = World()
    impostor = raw_context(world, world.chain(CAROL), server=True)
    client = client_context(world.material(ALICE), authorize=exactly(BOB))
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there, server_hostname="x")
    theirs = impostor.wrap_bio(there, back, server_side=True)
    arguments = () if method == "read" else (SECRET,)
    with pytest.raises(PeerRefusedError, match="not the expected identity"):
        for _ in range(4):
            with contextlib.suppress(ssl.SSLWantReadError):
                theirs.do_handshake()
            with contextlib.suppress(ssl.SSLWantReadError):
                getattr(ours, method)(*arguments)
    with pytest.raises(PeerRefusedError):
        getattr(ours, method)(*arguments)  # and once refused it stays so


@pytest.mark.parametrize("first", ["recv", "send", "sendall", "sendfile", "makefile"])
def test_sec_17_a_socket_without_handshake_is_checked_too(first: str) -> None:
    """SEC-17: a socket that has not shaken hands does at its first use, and is proved."""
    world = World()
    with a_raw_server(raw_context(world, world.chain(CAROL), server=True), SECRET) as impostor:
        context = client_context(world.material(ALICE), authorize=exactly(BOB))
        with socket.create_connection(("127.0.0.1", impostor.port), timeout=5) as plain:
            with context.wrap_socket(plain, do_handshake_on_connect=False) as tls:
                uses: dict[str, Callable[[], Any]] = {
                    "recv": lambda: tls.recv(1),
                    "send": lambda: tls.send(SECRET),
                    "sendall": lambda: tls.sendall(SECRET),
                    "sendfile": lambda: tls.sendfile(io.BytesIO(SECRET)),
                    "makefile": lambda: tls.makefile("rb", buffering=0).read(1),
                }
                with pytest.raises(PeerRefusedError):
                    uses[first]()
    assert impostor.decrypted == b""


def test_sec_17_no_session_is_resumed() -> None:
    """SEC-17: a client that offers its old session is refused, or gets a full handshake."""
    world = World()
    server = pair(server=world.material(BOB))[1]
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        stubborn = raw_context(world, world.chain(ALICE), server=False, version=version)
        stubborn.options &= ~ssl.OP_NO_TICKET
        ends = shake(stubborn, server)
        session = ends[0].session
        assert session is not None and not session.has_ticket
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = stubborn.wrap_bio(back, there, session=session)
        ours = server.wrap_bio(there, back, server_side=True)
        refused = False
        for _ in range(4):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            try:
                ours.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except PeerRefusedError:
                refused = True
        # In 1.3 there is no ticket to resume with; 1.2 remembers sessions on our side.
        assert refused == ours.session_reused == (version is ssl.TLSVersion.TLSv1_2)
        assert refused or peer_of(ours).spiffe_id == ALICE
    with pytest.raises(ContextError, match="SEC-17"):
        client_context(world.material(), authorize=any_id()).wrap_bio(
            ssl.MemoryBIO(), ssl.MemoryBIO(), session=session
        )


# What can be set, and what cannot.

REFUSED_CALLS: dict[str, tuple[Any, ...]] = {
    "load_cert_chain": ("x.pem",),
    "load_verify_locations": ("x.pem",),
    "load_default_certs": (),
    "set_default_verify_paths": (),
    "set_servername_callback": (None,),
    "set_npn_protocols": (["h2"],),
    "load_dh_params": ("x.pem",),
    "set_psk_client_callback": (None,),
    "set_psk_server_callback": (None,),
}
REFUSED_SETTINGS: dict[str, Any] = {
    "verify_mode": ssl.CERT_NONE,
    "check_hostname": True,
    "num_tickets": 2,
    "post_handshake_auth": True,
    "sni_callback": print,
    "keylog_filename": "/dev/null",
    "minimum_version": ssl.TLSVersion.TLSv1_1,
    "maximum_version": ssl.TLSVersion.TLSv1_1,
    "options": 0,
    "verify_flags": ssl.VERIFY_DEFAULT,
}
HARMLESS: dict[str, Any] = {
    "verify_mode": ssl.CERT_REQUIRED,
    "check_hostname": False,
    "num_tickets": 0,
    "keylog_filename": None,
    "minimum_version": ssl.TLSVersion.TLSv1_3,
    "maximum_version": ssl.TLSVersion.MAXIMUM_SUPPORTED,
}


@pytest.mark.parametrize("call", REFUSED_CALLS)
def test_what_decides_the_peer_cannot_be_loaded(call: str) -> None:
    """A call that would bring other keys, roots or callbacks is refused, with what to do."""
    for context in pair():
        with pytest.raises(ContextError, match=rf"{call}.*authorize="):
            getattr(context, call)(*REFUSED_CALLS[call])


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_sec_17_what_would_weaken_it_cannot_be_set(setting: str) -> None:
    """SEC-17: a setting that would weaken the context is refused, and changes nothing."""
    context = pair()[1]
    before = getattr(context, setting)
    with pytest.raises(ContextError, match=setting):
        setattr(context, setting, REFUSED_SETTINGS[setting])
    assert getattr(context, setting) == before


@pytest.mark.parametrize("setting", HARMLESS)
def test_what_does_not_weaken_it_can_be_set(setting: str) -> None:
    """What libraries set on every context without asking, and weakens nothing, is let."""
    client, server = pair()
    setattr(server, setting, HARMLESS[setting])
    assert peer_of(shake(client, server)[1]).spiffe_id == ALICE


def test_alpn_ciphers_and_versions_reach_the_connections() -> None:
    """ALPN, ciphers and versions set on a context are those of its connections, also later."""
    client, server = pair()
    shake(client, server)
    for context in (client, server):
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
        context.set_ecdh_curve("prime256v1")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    ends = shake(client, server)
    assert ends[0].selected_alpn_protocol() == "h2"
    assert ends[1].cipher()[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
    assert ends[1].version() == "TLSv1.2"


def test_no_key_touches_a_disk(tmp_path: Any) -> None:
    """Making a context leaves no descriptor open and no file behind."""
    contexts = pair()
    shake(*contexts)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    contexts = pair()
    ends = shake(*contexts)
    assert len(os.listdir("/proc/self/fd")) == before
    assert ends[0].cipher()


# Later on.


def test_sec_17_a_connection_is_checked_again() -> None:
    """SEC-17: `recheck` refuses an open connection when either SVID or the bundle is gone."""
    world, clock = World(), DrivenClock()
    alice, bob = both(world)
    client, server = shake(*pair(alice, bob, now=clock.now))
    assert recheck(server).spiffe_id == ALICE
    bob.give(bob.svid, without_key(bob.bundles, "example.org"))
    with pytest.raises(X509SvidError, match=r"no X\.509 authority"):
        recheck(server)
    assert recheck(client).spiffe_id == BOB  # alice's bundles are as they were
    bob.give(bob.svid, world.bundles)
    assert recheck(server).spiffe_id == ALICE
    clock.advance(timedelta(hours=2))
    for end in (client, server):
        with pytest.raises(UnauthenticatedError, match="our own SVID"):
            recheck(end)


def test_sec_17_a_peer_that_is_not_wanted_any_more() -> None:
    """SEC-17: `authorize` is asked again at each `recheck`."""
    world = World()
    welcome = {ALICE}

    def authorize(who: SpiffeId) -> None:
        exactly(ALICE)(who)
        assert who in welcome

    _, server = shake(
        pair(world.material(ALICE))[0],
        SpiffeContext(world.material(BOB), server_side=True, authorize=authorize),
    )
    assert recheck(server).spiffe_id == ALICE
    welcome.clear()
    with pytest.raises(AssertionError):
        recheck(server)


@pytest.mark.parametrize("which", ["a plain object", "a socket of ssl", "nothing"])
def test_peer_of_knows_its_own_alone(which: str) -> None:
    """A connection that no context of ours made has no peer, whatever it looks like."""
    world = World()
    plain = raw_context(world, world.chain(ALICE), server=False)
    others = {
        "a plain object": object(),
        "a socket of ssl": plain.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO()),
        "nothing": None,
    }
    with pytest.raises(UnauthenticatedError):
        peer_of(others[which])


def verifier(material: Material, clock: DrivenClock) -> PeerVerifier:
    """A verifier that welcomes everybody of example.org."""
    return PeerVerifier(material, member_of(ALICE.trust_domain), clock.now)


def test_sec_16_what_was_verified_is_not_verified_for_ever() -> None:
    """SEC-16, SEC-17: a chain that is known is refused once any part of it has ended."""
    world, clock = World(), DrivenClock()
    bob = world.material(BOB)
    until = clock.now().replace(microsecond=0) + timedelta(minutes=10)
    short = world.ca.child(not_before=clock.now() - timedelta(days=1), not_after=until)
    chain = world.chain(ALICE, short)
    checking = verifier(bob, clock)
    assert checking.verify(chain) is checking.verify(chain)
    clock.advance(until - clock.now())
    assert checking.verify(chain).spiffe_id == ALICE
    clock.advance(timedelta(seconds=1))
    with pytest.raises(X509SvidError):
        checking.verify(chain)


def test_sec_17_what_was_verified_hangs_on_its_bundle() -> None:
    """SEC-17: a chain that is known is verified again when its bundle changes, then alone."""
    world, clock = World(), DrivenClock()
    bob = world.material(BOB)
    checking = verifier(bob, clock)
    chain = world.chain(ALICE)
    first = checking.verify(chain)
    bob.give(bob.svid, BundleSet.of([bob.bundles[ALICE.trust_domain]]))  # partner.test has gone
    assert checking.verify(chain) is first
    next_ca: FakeCa = current_ca(which="next")
    bob.give(bob.svid, next_ca.bundles)
    with pytest.raises(X509SvidError, match="no valid path"):
        checking.verify(chain)


@pytest.mark.parametrize("who", [ALICE, CAROL], ids=str)
def test_sec_11_authorities_of_one_name(who: SpiffeId) -> None:
    """SEC-11: CAs of several domains that bear the same name, as SPIRE's do, are told apart."""
    world = World(_renamed(current_ca()), _renamed(current_ca("partner.test")))
    contexts = (
        client_context(world.material(who), authorize=exactly(BOB)),
        SpiffeContext(world.material(BOB), server_side=True, authorize=exactly(who)),
    )
    assert [peer_of(end).spiffe_id for end in shake(*contexts)] == [BOB, who]


def _renamed(ca: FakeCa) -> FakeCa:
    made = ca.changed(ca.cert.but(subject=name("SPIRE"), issuer=name("SPIRE")))
    made.name = name("SPIRE")
    return made


# With what people use.


@on_both_loops
async def test_streams() -> None:
    """asyncio's and uvloop's streams work on a context, and their writer leads to the peer."""
    client, server = pair()
    told: asyncio.Future[SpiffeId] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.set_result(peer_of(writer).spiffe_id)
        writer.write(await reader.readline())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server) as listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        assert (peer_of(writer).spiffe_id, await told) == (BOB, ALICE)
        writer.close()
        await writer.wait_closed()


@on_both_loops
async def test_start_tls() -> None:
    """A connection that began without TLS is upgraded with a context."""
    client, server = pair()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"go\n")
        await writer.start_tls(server)
        writer.write(str(peer_of(writer).spiffe_id).encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go\n"
        await writer.start_tls(client, server_hostname="bob")
        assert await reader.read() == ALICE.uri.encode()
        writer.close()
        await writer.wait_closed()


@on_both_loops
async def test_no_svid_ends_the_connection_attempt() -> None:
    """A server without an SVID closes who comes, and serves again once it has one."""
    world = World()
    alice, bob = both(world)
    _, server = pair(alice, bob)
    bob.give(None)
    async with recording(server) as seen:
        raw = raw_context(world, world.chain(ALICE), server=False)
        assert await asyncio.to_thread(raw_talk, raw, seen.port) == b""
        bob.give(world.identity(BOB))
        assert await asyncio.to_thread(raw_talk, raw, seen.port) == SECRET


class Handler(http.server.BaseHTTPRequestHandler):
    """Says who calls."""

    def do_GET(self) -> None:
        """Answer."""
        who = str(peer_of(self.connection).spiffe_id).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(who)))
        self.end_headers()
        self.wfile.write(who)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def served(server: socketserver.BaseServer) -> Iterator[None]:
    """Serve in a thread while entered."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


class HttpServer(http.server.ThreadingHTTPServer):
    """Keeps quiet about callers that are refused, and counts them."""

    refused = 0

    def get_request(self) -> Any:
        """Accept; a handshake that fails is an OSError, which the server skips."""
        try:
            return super().get_request()
        except ssl.SSLError:
            self.refused += 1
            raise


def test_http_client_and_server() -> None:
    """http.server, http.client and urllib work on contexts; a rotation reaches a listener."""
    world = World()
    alice, bob = both(world)
    client, server = pair(alice, bob)
    httpd = HttpServer(("127.0.0.1", 0), Handler)
    httpd.socket = server.wrap_socket(httpd.socket, server_side=True)
    port = httpd.server_address[1]
    with served(httpd):
        serials = []
        for serial in (0x1001, 0x7777):
            bob.give(world.identity(BOB, serial=serial))
            connection = http.client.HTTPSConnection(
                "127.0.0.1", port, context=client, timeout=5
            )
            with contextlib.closing(connection):
                connection.connect()
                serials.append(peer_of(connection.sock).serial_number)
                connection.request("GET", "/")
                assert connection.getresponse().read() == ALICE.uri.encode()
        assert serials == [0x1001, 0x7777]
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=client))
        with opener.open(f"https://127.0.0.1:{port}/", timeout=5) as answer:
            assert answer.read() == ALICE.uri.encode()
        stranger = client_context(world.material(CAROL), authorize=any_id())
        with pytest.raises(OSError):
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=stranger)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                connection.getresponse()
    assert httpd.refused == 1
