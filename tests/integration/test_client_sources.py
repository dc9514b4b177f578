"""The sources of the client library, beside a real agent that rotates, dies and comes back."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from spiffe_core.errors import NotReadyError, SpiffeError
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import verify_x509_svid
from tests.support.ca import FakeCa
from tests.support.callers import eventually
from tests.support.forked import a_forked_stack
from tests.support.stack import Stack
from workload_api.client.bundlesource import BundleSource
from workload_api.client.client import X509Context
from workload_api.client.jwtsource import JwtSource
from workload_api.client.x509source import X509Source

pytestmark = pytest.mark.asyncio(loop_scope="module")

ME = f"unix:uid:{os.geteuid()}"
WEB, API = "spiffe://example.org/web", "spiffe://example.org/api"
OWN, PARTNER = TrustDomain("example.org"), TrustDomain("partner.test")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent; a process of this user is ``/web``."""
    async with a_forked_stack() as made:
        await made.server.set_bundle(FakeCa(PARTNER.name).bundle)
        await made.server.add_entry("/web", made.agent.agent_id, ME)
        await made.agent.until_svids(1)
        yield made


@contextlib.asynccontextmanager
async def watched(source: X509Source) -> AsyncIterator[list[X509Context]]:
    """Every update of *source*; while it is watched its identity is good at each moment."""
    seen: list[X509Context] = []

    async def watch() -> None:
        async for context in source.updates():
            seen.append(context)

    async def use() -> None:
        while True:
            svid = source.identity.svid
            verify_x509_svid(svid.chain, source.bundles, at=datetime.now(UTC))
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watch()), group.create_task(use())]
        await eventually(lambda: seen)
        yield seen
        for task in tasks:
            task.cancel()


def serials(context: X509Context) -> list[str]:
    """The serial numbers of all SVIDs."""
    return [one.svid.serial for one in context.identities]


async def test_rotations(stack: Stack) -> None:
    """WAPI-06, WAPI-09: no SVID of five rotations is missed, and each is in use at once."""
    async with X509Source(stack.agent.endpoint) as source, watched(source) as seen:
        assert source.identity.svid.spiffe_id.uri == WEB
        for number in range(2, 7):
            assert await stack.agent.renew() == 1
            await eventually(lambda n=number: len(seen) == n)
            assert serials(source.context) == serials(seen[-1])
        assert len({serials(one)[0] for one in seen}) == 6


async def test_iop_10_an_agent_that_is_killed_and_started_again(stack: Stack) -> None:
    """IOP-10, WAPI-07, WEP-20: all three sources live through kill -9, and then are fresh."""
    endpoint = stack.agent.endpoint
    async with (
        X509Source(endpoint) as x509,
        BundleSource(endpoint) as bundles,
        JwtSource(endpoint) as jwt,
        watched(x509) as seen,
    ):
        token = await jwt.fetch("db")
        for _ in range(2):
            before = len(seen)
            stack.agent.process.kill()
            await eventually(lambda: x509.problem and bundles.problem)
            assert x509.identity.svid.spiffe_id.uri == WEB and OWN in bundles.bundles
            assert await jwt.fetch("db") is token
            await stack.agent.start()
            await eventually(lambda: not x509.problem and not bundles.problem)
            await stack.agent.renew()
            await eventually(lambda n=before: len(seen) > n)
            assert len(await _all_serials(stack, x509)) == 1
        other = await jwt.fetch("other")
        verify_jwt_svid(other.token, bundles.bundles, audience="other", at=datetime.now(UTC))


async def _all_serials(stack: Stack, source: X509Source) -> set[str]:
    """The serials of *source* and of one that asks anew, once they agree."""

    async def agreed() -> set[str]:
        async with X509Source(stack.agent.endpoint) as fresh:
            both = {source.identity.svid.serial, fresh.identity.svid.serial}
        return both if len(both) == 1 else set()

    return set(await eventually(agreed))


async def test_entries_come_and_go(stack: Stack) -> None:
    """WAPI-08, WAPI-12, WAPI-31: a new entry is a new identity, and a partner a new bundle."""
    agent, server = stack.agent.agent_id, stack.server
    async with (
        X509Source(stack.agent.endpoint) as source,
        BundleSource(stack.agent.endpoint) as bundles,
        watched(source),
    ):
        web = source.identity
        entry = await server.add_entry("/api", agent, ME, federates_with=[PARTNER.name])
        await eventually(lambda: len(source.context.identities) == 2)
        assert source.identity is web and PARTNER in source.bundles
        await eventually(lambda: PARTNER in bundles.bundles)
        await server.delete_entries(entry)
        await eventually(lambda: len(source.context.identities) == 1)
        assert source.identity is web and set(source.bundles) == {OWN}
        await eventually(lambda: PARTNER not in bundles.bundles)


async def test_wapi_28_the_last_entry_goes(stack: Stack) -> None:
    """WAPI-28, WEP-22: without an entry no identity is used; with a new one there is one."""
    endpoint = stack.agent.endpoint
    async with X509Source(endpoint) as source, BundleSource(endpoint) as bundles:
        before = source.identity
        await stack.server.delete_entries(*await stack.server.entries("/web"))
        await eventually(lambda: _refused(source))
        await eventually(lambda: not bundles.bundles)
        late = asyncio.create_task(_entered(endpoint))
        await stack.server.add_entry("/web", stack.agent.agent_id, ME)
        await eventually(lambda: not _refused(source), 25)
        assert source.identity.svid.serial != before.svid.serial
        assert await late == WEB
        await eventually(lambda: OWN in bundles.bundles, 25)


def _refused(source: X509Source) -> bool:
    try:
        return not source.identity
    except NotReadyError:
        return True


async def _entered(endpoint: str) -> str:
    async with X509Source(endpoint) as source:
        return source.identity.svid.spiffe_id.uri


async def test_it_is_there_before_the_agent(stack: Stack) -> None:
    """WEP-20: a workload that starts before its agent is ready when that is."""
    assert stack.agent.process.stop() == 0
    entering = asyncio.create_task(_entered(stack.agent.endpoint))
    await asyncio.sleep(0)
    await stack.agent.start()
    assert await entering == WEB


async def test_jwt_svids_of_each_identity(stack: Stack) -> None:
    """WAPI-34, WAPI-56: the default identity's unless another of ours is asked for."""
    entry = await stack.server.add_entry("/api", stack.agent.agent_id, ME)
    async with JwtSource(stack.agent.endpoint) as source:
        await eventually(lambda: _subject(source, API))
        assert await _subject(source, None) == WEB
        assert await source.fetch("db") is await source.fetch("db")
    await stack.server.delete_entries(entry)


async def _subject(source: JwtSource, spiffe_id: str | None) -> str:
    try:
        return (await source.fetch("db", spiffe_id=spiffe_id)).spiffe_id.uri
    except SpiffeError:
        return ""
