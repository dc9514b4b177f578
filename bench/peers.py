"""
What the check of a SPIFFE ID costs a Python program: a handshake, and a request.

Handshakes are done in memory, without sockets: our contexts against `ssl`'s own with the same
certificates, which verify a chain and compare no ID.  Requests go over one kept connection of
aiohttp with mutual TLS, where ours verifies both ends before each.
"""

import contextlib
import ssl
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import uvloop
from aiohttp import web

from bench._harness import Result, alternate
from spiffe_core.bundle import BundleSet
from spiffe_core.matching import exactly
from spiffe_wire.frontdoor.tls import harden, load
from workload_api.client.http_peers import serving, session
from workload_api.client.material import X509Material
from workload_api.client.ssl_context import client_context, server_context
from workload_api.client.testing import FakeAuthority, FixedMaterial

REQUESTS = 200
ROUNDS = 9


def _materials() -> tuple[X509Material, X509Material]:
    """Of a server and of its client."""
    authority = FakeAuthority("example.org")
    bundles = BundleSet.of([authority.bundle])
    api, web_ = (FixedMaterial(authority.mint_x509(one), bundles) for one in ("/api", "/web"))
    return api, web_


def _plain(material: X509Material, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    harden(context, [one.der for b in material.bundles.values() for one in b.x509_authorities])
    load(context, material.identity.svid.chain, material.identity.key)
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """To its end on both sides, each writing into the other's memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = [server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)]
    while left:
        for one in list(left):
            with contextlib.suppress(ssl.SSLWantReadError):
                one.do_handshake()
                left.remove(one)


def _handshakes() -> dict[str, float]:
    api, web_ = _materials()
    plain = _plain(api, ssl.PROTOCOL_TLS_SERVER), _plain(web_, ssl.PROTOCOL_TLS_CLIENT)
    ours = (
        server_context(api, authorize=exactly(web_.identity.svid.spiffe_id)),
        client_context(web_, authorize=exactly(api.identity.svid.spiffe_id)),
    )

    def stranger() -> None:
        for one in ours:
            one._verifier._known.clear()  # as one who was never here before
        _handshake(*ours)

    return alternate(
        {
            "plain": lambda: _handshake(*plain),
            "known": lambda: _handshake(*ours),
            "stranger": stranger,
        },
        rounds=15,
        repeat=40,
        clock=time.thread_time,
    )


async def _hello(_: web.Request) -> web.Response:
    return web.Response(text="hello")


def _app() -> web.Application:
    app = web.Application()
    app.router.add_get("/", _hello)
    return app


@asynccontextmanager
async def _plain_peers(api: X509Material, web_: X509Material) -> AsyncIterator[Callable]:
    runner = web.AppRunner(_app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=_plain(api, ssl.PROTOCOL_TLS_SERVER))
    await site.start()
    connector = aiohttp.TCPConnector(ssl=_plain(web_, ssl.PROTOCOL_TLS_CLIENT))
    try:
        async with aiohttp.ClientSession(connector=connector) as http:
            url = f"https://127.0.0.1:{runner.addresses[0][1]}/"
            yield lambda: http.get(url)
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _our_peers(api: X509Material, web_: X509Material) -> AsyncIterator[Callable]:
    async with serving(_app(), api, authorize=exactly(web_.identity.svid.spiffe_id)) as port:
        wanted = exactly(api.identity.svid.spiffe_id)
        async with session(web_, authorize=wanted) as http:
            yield lambda: http.get(f"https://127.0.0.1:{port}/")


async def _requests() -> dict[str, float]:
    api, web_ = _materials()
    taken: dict[str, list[float]] = {"plain": [], "ours": []}
    async with _plain_peers(api, web_) as plain, _our_peers(api, web_) as ours:
        for _ in range(ROUNDS):
            for name, ask in (("plain", plain), ("ours", ours)):
                started = time.perf_counter()
                for _ in range(REQUESTS):
                    async with ask() as answer:
                        assert await answer.text() == "hello"
                taken[name].append((time.perf_counter() - started) / REQUESTS)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> list[Result]:
    """Compare with what checks no ID."""
    shaken, asked = _handshakes(), uvloop.run(_requests())
    return [
        Result(
            "handshake with a peer verified before / plain ssl, CPU of both ends",
            shaken["known"] / shaken["plain"],
            note=f"{shaken['known'] * 1e6:.0f} against {shaken['plain'] * 1e6:.0f} us",
        ),
        Result(
            "handshake with a peer never seen / plain ssl, CPU of both ends",
            shaken["stranger"] / shaken["plain"],
            note=f"{shaken['stranger'] * 1e6:.0f} us",
        ),
        Result(
            "request on a kept connection, both ends verified anew / plain aiohttp",
            asked["ours"] / asked["plain"],
            note=f"{asked['ours'] * 1e6:.0f} against {asked['plain'] * 1e6:.0f} us",
        ),
    ]
