"""
aiohttp services that talk by SPIFFE ID: kept connections, rotations, expiry, authorization.

Each test names its rule.  Who gets not a byte stands in
tests/security/test_python_peers.py.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import NotReadyError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.matching import any_id, exactly, member_of, one_of
from spiffe_core.spiffeid import SpiffeId
from tests.support.authorities import NOW
from tests.support.clock import DrivenClock
from tests.support.door import on_both_loops, on_uvloop
from tests.support.peers import ALICE, BOB, CAROL, World, raw_context, without_key
from tests.support.stack import ROOT
from tests.support.tokens import a_bundle, a_token
from workload_api.client import http_peers
from workload_api.client.http_peers import JWT_SVID, PEER, bearer, jwt_svids, peers, require
from workload_api.client.jwt_auth import JwtVerifier
from workload_api.client.ssl_context import peer_of

NEVER = timedelta(hours=1)
"""For a sweep that is to have no part in a test."""
W = SpiffeId.parse("spiffe://example.org/w")


class Bundles:
    """As `BundleSource`."""

    def __init__(self, bundles: BundleSet) -> None:
        self.bundles = bundles


class Members(web.View):
    """A class of views with one method for members of a domain."""

    @require(member_of(CAROL.trust_domain))
    async def get(self) -> web.Response:
        """For partners."""
        return web.Response(text="partner")


class Two:
    """Bob's application and alice's session to it."""

    def __init__(self) -> None:
        self.world = World()
        self.alice, self.bob = self.world.material(ALICE), self.world.material(BOB)
        self.clock = DrivenClock()
        self.served: list[str] = []
        self.connections: list[Any] = []
        self.url = ""
        self.session: Any = None
        self.app = web.Application()
        self.app.router.add_get("/", self.who)
        self.app.router.add_get("/carol", require(exactly(CAROL))(self.who))
        self.app.router.add_get("/method", self.method)
        self.app.router.add_get("/odd", require(_breaks)(self.who))
        self.app.router.add_view("/partners", Members)
        self.app.router.add_get("/socket", self.socket)
        self.app.router.add_get("/jwt", self.jwt)

    async def who(self, request: web.Request) -> web.Response:
        """Who calls, with which SVID."""
        self.served.append(request.path)
        self.connections.append(request.transport)
        peer = request[PEER]
        return web.json_response({"id": peer.spiffe_id.uri, "serial": peer.serial})

    @require(exactly(CAROL))
    async def method(self, request: web.Request) -> web.Response:
        """For carol."""
        return await self.who(request)

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        """Hold a web socket."""
        made = web.WebSocketResponse()
        await made.prepare(request)
        async for message in made:
            await made.send_str(message.data)
        return made

    async def jwt(self, request: web.Request) -> web.Response:
        """Whose JWT-SVID came along."""
        self.served.append(request.path)
        return web.Response(text=request[JWT_SVID].spiffe_id.uri)

    async def get(self, path: str = "/", **options: Any) -> Any:
        """Status, and what was said."""
        async with self.session.get(self.url + path, **options) as answer:
            said = await answer.text()
            return answer.status, said

    async def serial(self) -> int:
        """The serial number of the SVID that bob saw."""
        async with self.session.get(self.url + "/") as answer:
            return int((await answer.json())["serial"])

    @property
    def dialled(self) -> int:
        """How many connections alice used."""
        return len({id(one) for one in self.connections})


def _breaks(_: SpiffeId) -> None:
    raise LookupError("a list of ours is broken")


@asynccontextmanager
async def two(
    server: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    middlewares: list[Any] | None = None,
) -> AsyncIterator[Two]:
    """Both up; *server* and *client* are what a test changes at either."""
    made = Two()
    made.app.middlewares.extend(middlewares or [])
    serves = {"authorize": one_of((ALICE, CAROL)), "now": made.clock.now, **(server or {})}
    asks = {"authorize": exactly(BOB), "now": made.clock.now, **(client or {})}
    async with http_peers.serving(made.app, made.bob, **serves) as port:
        made.url = f"https://127.0.0.1:{port}"
        async with http_peers.session(made.alice, **asks) as made.session:
            yield made


@asynccontextmanager
async def over_http(app: web.Application) -> AsyncIterator[str]:
    """*app* without TLS."""
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@on_both_loops
async def test_a_request_knows_its_peer() -> None:
    """The caller's X509-SVID stands in the request, and a connection serves many of them."""
    async with two() as both:
        for _ in range(3):
            status, said = await both.get()
            assert status == 200 and f'"{ALICE}"' in said
        assert both.dialled == 1
        async with both.session.ws_connect(both.url + "/socket") as held:
            assert peer_of(held).spiffe_id == BOB


@on_both_loops
async def test_federation() -> None:
    """FED-43: a caller of a federated trust domain is served, by its own domain's bundle."""
    async with two() as both:
        carol = both.world.material(CAROL)
        async with http_peers.session(carol, authorize=exactly(BOB)) as session:
            for path, expected in (
                ("/", CAROL.uri),
                ("/carol", CAROL.uri),
                ("/method", CAROL.uri),
                ("/partners", "partner"),
            ):
                async with session.get(both.url + path) as answer:
                    assert (answer.status, expected in await answer.text()) == (200, True)


@pytest.mark.parametrize("path", ["/carol", "/method", "/partners", "/odd"])
@on_uvloop
async def test_routes_ask_more(path: str) -> None:
    """A handler, or a view's method, asks for more; a check that breaks is a refusal."""
    async with two() as both:
        assert await both.get(path) == (403, '{"error": "forbidden"}')
        assert both.served == []
        assert (await both.get())[0] == 200


@on_uvloop
async def test_an_application_asks_more() -> None:
    """A middleware asks for more than the TLS context does."""
    async with two(middlewares=[peers(authorize=exactly(CAROL))]) as both:
        assert await both.get() == (403, '{"error": "forbidden"}')
        assert both.served == []


@on_uvloop
async def test_without_spiffe_tls_nobody_is_a_peer() -> None:
    """SEC-17: middleware and `require` refuse everybody where the site has no SPIFFE TLS."""
    made = Two()
    made.app.middlewares.append(peers())
    bare = web.Application()
    bare.router.add_get("/", require(any_id())(made.who))
    for app in (made.app, bare):
        async with over_http(app) as url, aiohttp.ClientSession() as session:
            async with session.get(url) as answer:
                assert (answer.status, await answer.json()) == (403, {"error": "forbidden"})
    assert made.served == []


# An SVID that ends while the connection is open.


@on_uvloop
async def test_a_rotation_cuts_nothing() -> None:
    """After a rotation the open connection serves on; a new one presents the new SVID."""
    async with two() as both:
        assert await both.serial() == 0x1001
        both.alice.give(both.world.identity(ALICE, serial=0x7777))
        assert await both.serial() == 0x1001
        assert both.dialled == 1
        async with http_peers.session(both.alice, authorize=exactly(BOB)) as session:
            async with session.get(both.url + "/") as answer:
                assert int((await answer.json())["serial"]) == 0x7777


@on_uvloop
async def test_sec_17_connections_age() -> None:
    """SEC-17: a connection ends with an answer at its age, so that new SVIDs are used."""
    async with two(server={"max_age": timedelta(0)}) as both:
        assert await both.serial() == 0x1001
        both.alice.give(both.world.identity(ALICE, serial=0x7777))
        assert await both.serial() == 0x7777
        assert both.dialled == 2


@on_uvloop
async def test_sec_17_a_caller_that_expires_is_refused_at_its_next_request() -> None:
    """SEC-17: on every request of an open connection the caller's expiry is looked at."""
    async with two(server={"sweep_every": NEVER}, client={"now": None}) as both:
        assert (await both.get())[0] == 200
        both.clock.advance(timedelta(hours=2))
        async with both.session.get(both.url + "/") as answer:
            assert (answer.status, await answer.json()) == (403, {"error": "forbidden"})
            assert answer.headers["Connection"] == "close"
        assert both.served == ["/"]


@pytest.mark.parametrize("why", ["expired", "not vouched for"])
@on_both_loops
async def test_sec_17_a_held_connection_is_cut(why: str) -> None:
    """SEC-17: a web socket does not outlive the caller's SVID, nor the caller's authority."""
    every = timedelta(seconds=0.05) if why == "expired" else NEVER
    async with two(server={"sweep_every": every}, client={"now": None}) as both:
        async with both.session.ws_connect(both.url + "/socket") as held:
            await held.send_str("hello")
            assert await held.receive_str() == "hello"
            if why == "expired":
                both.clock.advance(timedelta(hours=2))
            else:
                both.bob.give(both.bob.svid, without_key(both.bob.bundles, "example.org"))
            ended = await held.receive(timeout=10)
            assert ended.type in (
                aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSE,
            )  # fmt: skip


LATER: dict[str, Callable[[Two], None]] = {
    "the server's SVID expired": lambda both: both.clock.advance(timedelta(hours=2)),
    "its authority is gone": lambda both: both.alice.give(
        both.alice.svid, without_key(both.alice.bundles, "example.org")
    ),
    "our own SVID is gone": lambda both: both.alice.give(None),
}


@pytest.mark.parametrize("what", LATER)
@on_uvloop
async def test_sec_17_a_kept_connection_is_not_used_again(what: str) -> None:
    """SEC-17: a connection in the pool whose peer is not good any more gets no request."""
    async with two(server={"now": None, "sweep_every": NEVER}) as both:
        assert (await both.get())[0] == 200
        LATER[what](both)
        if what == "our own SVID is gone":
            # It still proves us where it was presented, for as long as it has not expired.
            assert (await both.get())[0] == 200
            both.clock.advance(timedelta(hours=2))
        requests = len(both.served)
        with pytest.raises(aiohttp.ClientError):
            await both.get()
        assert len(both.served) == requests


@on_uvloop
async def test_sec_17_the_renewed_is_dialled() -> None:
    """SEC-17: once both SVIDs are renewed the same session dials anew and goes on."""
    async with two() as both:
        assert (await both.get())[0] == 200
        longer = {"not_after": both.clock.now().replace(microsecond=0) + timedelta(hours=3)}
        both.bob.give(both.world.identity(BOB, **longer))
        both.alice.give(both.world.identity(ALICE, **longer))
        both.clock.advance(timedelta(hours=2))
        assert (await both.get())[0] == 200
        assert both.dialled == 2


@on_both_loops
async def test_a_caller_that_leaves_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A connection that the caller drops while a request is served leaves no error behind."""
    async with two() as both:
        made = web.Application()
        inside, gone, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slow(_: web.Request) -> web.Response:
            inside.set()
            await gone.wait()
            over.set()
            return web.Response()

        made.router.add_get("/", slow)
        async with http_peers.serving(made, both.bob, authorize=exactly(ALICE)) as port:
            async with http_peers.session(both.alice, authorize=exactly(BOB)) as session:
                asking = asyncio.ensure_future(session.get(f"https://127.0.0.1:{port}/"))
                await inside.wait()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await asyncio.sleep(0.05)  # for the connection to be lost, which nobody tells
            gone.set()
            await asyncio.wait_for(over.wait(), 10)
        assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == []


# A session speaks to SPIFFE peers, and to nobody else.


@on_uvloop
async def test_a_session_asks_nobody_over_http() -> None:
    """A request over http is refused before it is sent."""
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    async with two() as both, over_http(app) as url:
        with pytest.raises(aiohttp.ClientError, match="https alone"):
            await both.session.get(url)
    assert asked == []


@on_uvloop
async def test_a_request_cannot_bring_its_own_tls() -> None:
    """A request with an ``ssl=`` of its own is refused, even if its server is the right one."""
    async with two() as both:
        own = raw_context(both.world, both.world.chain(ALICE), server=False)
        with pytest.raises(aiohttp.ClientError, match="its own TLS context"):
            await both.session.get(both.url, ssl=own)
        assert both.served == []


@on_uvloop
async def test_a_server_that_cannot_listen_says_so() -> None:
    """A port that is taken is an OSError, and nothing stays behind."""
    async with two() as both:
        port = int(both.url.rpartition(":")[2])
        with pytest.raises(OSError, match="address already in use"):
            async with http_peers.serving(
                web.Application(), both.bob, authorize=any_id(), port=port
            ):
                pass
        assert both.bob.told and len(both.bob.told) == 1


def test_without_aiohttp_the_error_names_the_extra() -> None:
    """Where aiohttp is not installed the import says which extra brings it."""
    program = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "import workload_api.client.grpc_peers, workload_api.client.ssl_context\n"
        "try:\n import workload_api.client.http_peers\n"
        "except ImportError as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "install that, or spiffe-issuer[client]" in ran.stdout


# JWT-SVIDs.


def verifier(audience: str = "db") -> JwtVerifier:
    """Wants a JWT-SVID of w for db, at the instant for which tests' tokens are made."""
    return JwtVerifier(
        Bundles(BundleSet.of([a_bundle()])), audience, exactly(W), now=lambda: NOW
    )


class Source:
    """As `JwtSource`."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def fetch(self, audience: str, *, spiffe_id: SpiffeId | None = None) -> JwtSvid:
        """A JWT-SVID for *audience*."""
        self.asked.append(audience)
        if audience == "nobody":
            raise NotReadyError("none")
        return JwtSvid.parse_unverified(a_token(aud=[audience]))


@on_both_loops
async def test_jwt_22_a_session_sends_its_jwt_svid() -> None:
    """JWT-22: a client's middleware sends ``Authorization: Bearer``, a server's takes it."""
    async with two(middlewares=[jwt_svids(verifier())]) as both:
        source = Source()
        sends = bearer(source, audience="db", origin=both.url)
        assert await both.get("/jwt", middlewares=(sends,)) == (200, W.uri)
        assert source.asked == ["db"]


BEARER: dict[str, tuple[list[str], int, str | None]] = {
    "none": ([], 401, "Bearer"),
    "two": ([f"Bearer {a_token()}", f"Bearer {a_token()}"], 401, "Bearer"),
    "basic": (["Basic dTpw"], 401, "Bearer"),
    "empty": (["Bearer "], 401, "Bearer"),
    "garbage": (["Bearer x.y.z"], 401, 'Bearer error="invalid_token"'),
    "another audience": (
        [f"Bearer {a_token(aud=['web'])}"],
        401,
        'Bearer error="invalid_token"',
    ),
    "expired": ([f"Bearer {a_token(exp=1)}"], 401, 'Bearer error="invalid_token"'),
    "another subject": ([f"Bearer {a_token(sub='spiffe://example.org/x')}"], 403, None),
    "a good one": ([f"Bearer {a_token()}"], 200, None),
    "a good one, lower case": ([f"bearer {a_token()}"], 200, None),
}


@pytest.mark.parametrize("what", BEARER)
@on_uvloop
async def test_jwt_22_exactly_one_good_jwt_svid(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """JWT-22: 401 without exactly one good JWT-SVID for us; 403 if it is unwanted."""
    values, status, challenge = BEARER[what]
    caplog.set_level("DEBUG")
    async with two(middlewares=[jwt_svids(verifier())]) as both:
        headers = [("Authorization", value) for value in values]
        async with both.session.get(both.url + "/jwt", headers=headers) as answer:
            said = await answer.text()
        assert answer.status == status
        assert answer.headers.get("WWW-Authenticate") == challenge
        assert both.served == (["/jwt"] if status == 200 else [])
        for value in values:
            token = value.partition(" ")[2]
            assert not token or (token not in said and token not in caplog.text)


@on_uvloop
async def test_a_jwt_svid_goes_to_its_origin_alone() -> None:
    """Whoever we are redirected to, or any other host, is not handed the JWT-SVID."""
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.Response()

    async def away(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        raise web.HTTPFound(request.query["to"])

    elsewhere = web.Application()
    elsewhere.router.add_get("/", handler)
    here = web.Application()
    here.router.add_get("/", away)
    world = World()
    async with (
        http_peers.serving(elsewhere, world.material(BOB), authorize=any_id()) as there,
        http_peers.serving(here, world.material(BOB), authorize=any_id()) as port,
    ):
        origin = f"https://127.0.0.1:{port}"
        sends = bearer(Source(), audience="db", origin=origin)
        async with http_peers.session(
            world.material(ALICE), authorize=exactly(BOB), middlewares=(sends,)
        ) as session:
            target = f"https://127.0.0.1:{there}/"
            async with session.get(f"{origin}/", params={"to": target}) as answer:
                assert answer.status == 200
    assert seen[0] is not None and seen[0].startswith("Bearer ey")
    assert seen[1:] == [None]


@pytest.mark.parametrize("origin", ["http://x", "ftp://x"])
def test_a_jwt_svid_goes_over_tls_alone(origin: str) -> None:
    """A client cannot be made to send JWT-SVIDs without TLS."""
    with pytest.raises(ValueError, match="https alone"):
        bearer(Source(), audience="db", origin=origin)


async def test_a_loop_without_sweeps_survives_a_broken_one() -> None:
    """A sweep that fails is logged, and the next one is done all the same."""
    from workload_api.client.peer_check import sweeping

    material, done = World().material(), asyncio.Event()
    times = 0

    def sweep() -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise ValueError("odd")
        done.set()

    async with sweeping(material, sweep, timedelta(seconds=0.01)):
        await asyncio.wait_for(done.wait(), 10)
    assert material.told == []
