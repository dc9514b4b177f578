"""
Python peers on real sources: SVIDs and authorities rotate under load, and no call fails.

The Workload API is the fake of `workload_api.client.testing`, on a
real socket; sources, contexts and connections are the real ones.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from spiffe_core.matching import exactly, member_of
from spiffe_core.spiffeid import SpiffeId
from tests.support.door import call, on_both_loops
from workload_api.client import grpc_peers, http_peers
from workload_api.client.http_peers import PEER
from workload_api.client.testing import FakeWorkloadApi, FixedMaterial
from workload_api.client.x509source import X509Source, by_id

ALICE = SpiffeId.parse("spiffe://example.org/alice")
BOB = SpiffeId.parse("spiffe://example.org/bob")
SHORT = timedelta(seconds=0.1)
"""The age of connections, so that many are made in a test."""
# A request that is on its way while a server ends the connection is lost in any gRPC, now and
# then: which calls may be repeated is for their owner to say.
RETRIES = {
    "grpc.service_config": json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{"service": "x.Y", "method": "Serial"}],
                    "retryPolicy": {
                        "maxAttempts": 3,
                        "initialBackoff": "0.05s",
                        "maxBackoff": "0.5s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ]
        }
    )
}
Ask = Callable[[], Awaitable[str]]


@asynccontextmanager
async def by_http(alice: Any, bob: Any, wanted: Any) -> AsyncIterator[Ask]:
    """An application of bob's that says with which SVID it is asked."""

    async def serial(request: web.Request) -> web.Response:
        return web.Response(text=request[PEER].serial)

    app = web.Application()
    app.router.add_get("/", serial)
    async with (
        http_peers.serving(app, bob, authorize=wanted, max_age=SHORT) as port,
        http_peers.session(alice, authorize=exactly(BOB)) as session,
    ):

        async def ask() -> str:
            async with session.get(f"https://127.0.0.1:{port}/") as answer:
                assert answer.status == 200
                return str(await answer.text())

        yield ask


@asynccontextmanager
async def by_grpc(alice: Any, bob: Any, wanted: Any) -> AsyncIterator[Ask]:
    """A servicer of bob's that says with which SVID it is called."""

    async def serial(_: bytes, context: Any) -> bytes:
        return grpc_peers.caller_svid_of(context).serial.encode()

    def register(server: Any) -> None:
        handlers = {"Serial": grpc.unary_unary_rpc_method_handler(serial)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("x.Y", handlers),)
        )

    async with (
        grpc_peers.serving(bob, register, authorize=wanted, max_age=SHORT) as port,
        grpc_peers.channel(
            alice, "127.0.0.1", port, authorize=exactly(BOB), options=RETRIES
        ) as channel,
    ):

        async def ask() -> str:
            return (await call(channel, "/x.Y/Serial")).decode()

        yield ask


PEERS = {"aiohttp": by_http, "grpcio": by_grpc}


class Load:
    """Four callers that never stop, and what they heard."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.heard: list[str] = []
        self._more = asyncio.Event()

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            self.heard.append(await self._ask())
            self._more.set()

    async def until(self, serial: str) -> None:
        """Wait until *serial* was heard."""
        while serial not in self.heard:
            self._more.clear()
            await self._more.wait()


async def under_load(ask: Ask, change: Callable[[Load], Awaitable[None]]) -> Load:
    """Have *change* done while four callers ask; a call that fails fails the test."""
    load = Load(ask)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        callers = [group.create_task(load.run()) for _ in range(4)]
        await change(load)
        for caller in callers:
            caller.cancel()
    return load


@pytest.mark.parametrize("by", PEERS)
@on_both_loops
async def test_a_rotation_fails_no_call(by: str) -> None:
    """While both SVIDs rotate again and again every call is answered, soon with the newest."""
    with FakeWorkloadApi("/alice", "/bob") as fake:
        async with (
            X509Source(fake.address, pick=by_id(ALICE)) as alice,
            X509Source(fake.address, pick=by_id(BOB)) as bob,
            PEERS[by](alice, bob, exactly(ALICE)) as ask,
        ):

            async def rotate(load: Load) -> None:
                for _ in range(5):
                    fake.rotate()
                    await load.until(fake.identities[0].svid.serial)

            load = await under_load(ask, rotate)
            assert len(set(load.heard)) >= 5
            assert len(load.heard) > 20


@pytest.mark.parametrize("by", PEERS)
@on_both_loops
async def test_federation_ends(by: str) -> None:
    """FED-43: a peer of another trust domain is known while its bundle is given out."""
    with FakeWorkloadApi("/bob") as fake:
        partner = fake.federate("partner.test")
        carol = FixedMaterial(partner.mint_x509("/carol"), fake.bundles)
        wanted = member_of(partner.bundle.trust_domain)
        async with X509Source(fake.address) as bob, PEERS[by](carol, bob, wanted) as ask:
            assert await ask() == carol.identity.svid.serial
            changed = asyncio.Event()
            forget = bob.on_change(changed.set)
            fake.unfederate("partner.test")
            await asyncio.wait_for(changed.wait(), 10)
            forget()
            with pytest.raises((aiohttp.ClientError, grpc.aio.AioRpcError)):
                await ask()
