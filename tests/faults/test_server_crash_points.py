"""
The server ended at each of its crash points, as a power cut would (SEC-100; F-02 to F-06).

Every test begins on files of a server that ran, arms a point, and looks at what the next
server finds and does.
"""

import ast
import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from ca.journal import AuthorityState
from spiffe_core.crashpoints import VARIABLE
from spiffe_core.errors import SpiffeError
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.faults import points
from tests.support.forked import CLOCK_OFFSET, a_forked_server
from tests.support.node import Node, a_node
from tests.support.records import Records, records
from tests.support.stack import ROOT, ServerProcess, a_folder, entry_message

CRASHED = 137
MONTH = {"authority": {"x509_ttl": "720h", "jwt_ttl": "720h"}}
PACKAGES = ("spiffe_core", "spiffe_wire", "ca", "issuer", "workload_api")


@pytest.fixture
def folder() -> Iterator[Path]:
    with a_folder() as made:
        yield made


async def crash_at_start(server: ServerProcess, point: str, **environment: str) -> None:
    """Start *server*; it must end at *point*."""
    server.process.start(**{VARIABLE: point}, **environment)
    assert await server.process.wait() == CRASHED, server.process.log.read_text()[-2000:]


@contextlib.asynccontextmanager
async def armed(server: ServerProcess, point: str) -> AsyncIterator[None]:
    """A running server that ends at *point*, which the body must have it pass."""
    await server.start(**{VARIABLE: point})
    yield
    assert await server.process.wait() == CRASHED, server.process.log.read_text()[-2000:]


async def unanswered(call: Awaitable[Any]) -> None:
    """The server ends while it is asked."""
    with pytest.raises((grpc.aio.AioRpcError, SpiffeError)):
        await call


@contextlib.asynccontextmanager
async def running(server: ServerProcess) -> AsyncIterator[None]:
    """The server that comes after a crash; it must be whole."""
    try:
        yield await server.start()
    finally:
        server.process.close()


def test_sec_100_every_crash_point_is_armed_here() -> None:
    """SEC-100: there is no crash point in the product that no test arms."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash_point":
                    found |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    armed = points.SERVER | points.AGENT | set(points.SVID_FILES)
    assert found == {one for one in armed if not one.startswith("reply")}


@pytest.mark.parametrize("point", points.FIRST_START)
async def test_sec_100_first_start(folder: Path, point: str) -> None:
    """SEC-100, F-03: a first start that is cut leaves what the next one makes whole."""
    server = a_forked_server(folder)
    await crash_at_start(server, point)
    async with running(server):
        found = records(folder / "server")
        found.check()
        assert len(found.authorities) == 2


async def test_sec_100_many_cut_starts_leave_no_orphan_key(folder: Path) -> None:
    """F-03: after any number of starts that are cut there is a key for each record, no more."""
    server = a_forked_server(folder)
    for point in (*points.FILE, "authority.key_made", points.FILE[1]):
        await crash_at_start(server, point)
    async with running(server):
        records(folder / "server").check()


class Rotation:
    """A server's files as they are before a step of rotation is due, and after it."""

    def __init__(self, folder: Path, template: Path, days: float) -> None:
        shutil.copytree(template, folder / "server")
        self.server = a_forked_server(folder, **MONTH)
        self.data = folder / "server"
        self.clock = {CLOCK_OFFSET: str(timedelta(days=days).total_seconds())}
        self.before = records(self.data)

    async def crash(self, point: str) -> Records:
        """Cut the step at *point*; return what it left, which is before or after, no third."""
        await crash_at_start(self.server, point, **self.clock)
        return records(self.data)

    async def finish(self) -> Records:
        """Let the next server take the step; return what there is then."""
        await self.server.start(**self.clock)
        try:
            found = records(self.data)
            self.server.process.kill()
        finally:
            self.server.process.close()
        found.check()
        return found


@pytest.fixture(scope="module")
def templates() -> Iterator[dict[int, Path]]:
    """Files of a server whose authorities live a month, by the day it was stopped on."""

    async def run(folder: Path) -> dict[int, Path]:
        made = {}
        server = a_forked_server(folder, **MONTH)
        for day in (0, 16, 26):
            await server.start(**{CLOCK_OFFSET: str(day * 86400)})
            server.process.kill()
            made[day] = folder / f"day-{day}"
            shutil.copytree(folder / "server", made[day])
        server.process.close()
        return made

    with a_folder() as folder:
        yield asyncio.run(run(folder))


def states(found: Records) -> list[str]:
    """The states of all authorities, in order."""
    return sorted(one.state.value for one in found.authorities)


@pytest.mark.parametrize("point", points.PREPARE)
async def test_sec_66_cut_while_preparing(
    folder: Path, templates: dict[int, Path], point: str
) -> None:
    """SEC-66, SEC-100: preparing an authority, cut anywhere, is finished by the next server."""
    rotation = Rotation(folder, templates[0], days=16)
    cut = await rotation.crash(point)
    assert {one.authority_id for one in rotation.before.authorities} <= {
        one.authority_id for one in cut.authorities
    }
    done = await rotation.finish()
    assert states(done) == ["active", "active", "prepared", "prepared"]
    assert {one.authority_id for one in cut.authorities} <= {
        one.authority_id for one in done.authorities
    }, "what was published stays"


@pytest.mark.parametrize("point", points.ACTIVATE)
async def test_sec_66_cut_while_activating(
    folder: Path, templates: dict[int, Path], point: str
) -> None:
    """SEC-66, F-04, F-05: publish to activate, cut anywhere, has one that signs at any time."""
    rotation = Rotation(folder, templates[16], days=26)
    cut = await rotation.crash(point)
    for kind in {one.kind for one in cut.authorities}:
        of_kind = [one.state for one in cut.authorities if one.kind is kind]
        assert of_kind.count(AuthorityState.ACTIVE) == 1
    done = await rotation.finish()
    assert states(done) == ["active", "active", "old", "old"]
    assert {one.authority_id for one in done.authorities} == {
        one.authority_id for one in rotation.before.authorities
    }


@pytest.mark.parametrize("point", points.PRUNE)
async def test_sec_66_cut_while_pruning(
    folder: Path, templates: dict[int, Path], point: str
) -> None:
    """SEC-66, SEC-100: an old authority goes with its key, whenever the server is cut."""
    # It ended on day 30, and whatever it had signed before.
    rotation = Rotation(folder, templates[26], days=30.5)
    assert "old" in states(rotation.before)
    await rotation.crash(point)
    assert states(await rotation.finish()) == ["active", "active"]


async def test_sec_100_sec_50_cut_while_attesting(folder: Path) -> None:
    """
    SEC-100, SEC-50: an attestation that is cut has used the token and made the node, or
    neither; asked again with the same key it is answered, and another key is refused.
    """
    server = a_forked_server(folder)
    data = folder / "server"
    await server.start()
    bundle = await server.bundle_pem()
    token = ""
    for number, (point, stored) in enumerate(points.ATTEST.items()):
        token = await server.join_token()
        agent_id = f"spiffe://example.org/spire/agent/join_token/{token.partition('.')[0]}"
        server.process.kill()
        place = folder / f"n{number}"
        async with armed(server, point), a_node(place, server, bundle) as node:
            await unanswered(node.attest(token))
        assert (agent_id in records(data).agents) is stored, point
        await server.start()
        records(data).check()
        async with a_node(place, server, bundle) as node:
            await node.attest(token)
            assert node.agent_id == agent_id
            assert node.identity.svid is not None
            assert records(data).agents[agent_id].serial == node.identity.svid.serial
    async with a_node(folder / "thief", server, bundle) as thief:
        with pytest.raises(SpiffeError, match="already been used"):
            await thief.attest(token)
    server.process.close()


async def test_sec_100_sec_54_cut_while_renewing(folder: Path) -> None:
    """SEC-100, SEC-54, F-32: a renewal that is cut leaves the agent's old certificate good."""
    server = a_forked_server(folder)
    data = folder / "server"
    await server.start()
    bundle = await server.bundle_pem()
    async with a_node(folder / "node", server, bundle) as node:
        await node.attest(await server.join_token())
    for point, stored in points.RENEW.items():
        server.process.kill()
        async with armed(server, point), a_node(folder / "node", server, bundle) as node:
            await unanswered(node.renew())
        agent = records(data).agents[node.agent_id]
        assert node.identity.svid is not None
        assert agent.serial == node.identity.svid.serial
        assert bool(agent.new_serial) is stored, point
        await server.start()
        records(data).check()
        async with a_node(folder / "node", server, bundle) as node:
            await node.renew()
            await used(node)
            assert node.identity.svid is not None
            assert records(data).agents[node.agent_id].serial == node.identity.svid.serial

    # And the switch to the new one, which its first use makes.
    server.process.kill()
    async with (
        armed(server, "node.activated"),
        a_node(folder / "node", server, bundle) as node,
    ):
        await node.renew()
        await unanswered(used(node))
    await server.start()
    async with a_node(folder / "node", server, bundle) as node:
        await used(node)
        assert node.identity.svid is not None
        assert records(data).agents[node.agent_id].serial == node.identity.svid.serial
    server.process.close()


async def used(node: Node) -> None:
    """Make a call with the node's present certificate."""
    await entry_pb2_grpc.EntryStub(node.dialer.channel).GetAuthorizedEntries(
        entry_pb2.GetAuthorizedEntriesRequest(), timeout=10
    )


def creating(hint: str) -> tuple[str, Any]:
    made = entry_message("/web", "/spire/agent/join_token/a", "unix:uid:1", id="e", hint=hint)
    return "BatchCreateEntry", entry_pb2.BatchCreateEntryRequest(entries=[made])


def updating(hint: str) -> tuple[str, Any]:
    made = entry_message("/web", "/spire/agent/join_token/a", "unix:uid:1", id="e", hint=hint)
    return "BatchUpdateEntry", entry_pb2.BatchUpdateEntryRequest(entries=[made])


def deleting(_: str) -> tuple[str, Any]:
    return "BatchDeleteEntry", entry_pb2.BatchDeleteEntryRequest(ids=["e"])


@pytest.mark.parametrize("change", [creating, updating, deleting])
async def test_sec_100_cut_while_an_entry_changes(
    folder: Path, change: Callable[[str], tuple[str, Any]]
) -> None:
    """SEC-100, SEC-101: a change of an entry that is cut is there whole, or not at all."""
    server = a_forked_server(folder)
    data = folder / "server"
    await server.start()
    if change is not creating:
        await server.add_entry(
            "/web", "/spire/agent/join_token/a", "unix:uid:1", id="e", hint="0"
        )
    # Where it is cut inside the transaction makes no difference to what the change is.
    chosen = list(points.CHANGE.items())[0 if change is creating else -3 :]
    for number, (point, stored) in enumerate(chosen, 1):
        server.process.kill()
        before = records(data).entries.get("e")
        method, request = change(str(number))
        async with armed(server, f"reply.{method}" if point == "reply" else point):
            async with server.channel() as channel:
                stub = entry_pb2_grpc.EntryStub(channel)
                await unanswered(getattr(stub, method)(request, timeout=10))
        after = records(data).entries.get("e")
        assert (after != before) is stored, point
        await server.start()
        records(data).check()
        if stored and change is creating:
            async with server.channel() as channel:
                await entry_pb2_grpc.EntryStub(channel).BatchDeleteEntry(deleting("")[1])
        if stored and change is deleting:
            async with server.channel() as channel:
                await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(creating("")[1])
    server.process.close()


@pytest.mark.parametrize("method", ["BatchNewX509SVID", "NewJWTSVID", "MintJWTSVID"])
async def test_sec_100_sec_24_cut_while_signing(folder: Path, method: str) -> None:
    """SEC-100, SEC-24: nothing that was signed can reach a caller before it is on record."""
    server = a_forked_server(folder)
    data = folder / "server"
    await server.start()
    bundle = await server.bundle_pem()
    async with a_node(folder / "node", server, bundle) as node:
        await node.attest(await server.join_token())
        await server.add_entry("/web", node.agent_id, "unix:uid:1", id="e")
    server.process.kill()
    for point, stored in points.SIGN.items():
        before = records(data)
        async with (
            armed(server, f"reply.{method}" if point == "reply" else point),
            a_node(folder / "node", server, bundle) as node,
        ):
            await unanswered(sign(server, node, method))
        own = 1  # the server's own SVID, at its start
        assert len(records(data).issued - before.issued) == own + stored, point
    await server.start()
    async with a_node(folder / "node", server, bundle) as node:
        assert await sign(server, node, method)
    records(data).check()
    server.process.close()


async def sign(server: ServerProcess, node: Node, method: str) -> Any:
    """Have something signed in one of three ways."""
    if method == "BatchNewX509SVID":
        return await node.sign("e")
    if method == "NewJWTSVID":
        return await node.sign_jwt("e", "a")
    jwt = svid_pb2.MintJWTSVIDRequest(audience=["a"], ttl=60)
    jwt.id.trust_domain, jwt.id.path = "example.org", "/minted"
    async with server.channel() as channel:
        return await svid_pb2_grpc.SVIDStub(channel).MintJWTSVID(jwt)


async def test_sec_100_cut_while_a_foreign_bundle_is_stored(folder: Path) -> None:
    """SEC-100: a foreign bundle is stored whole, or not at all."""
    server = a_forked_server(folder)
    await server.start()
    async with server.channel() as channel:
        bundle = await bundle_pb2_grpc.BundleStub(channel).GetBundle(
            bundle_pb2.GetBundleRequest()
        )
    bundle.trust_domain = "other.org"
    request = bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle])
    server.process.kill()
    async with armed(server, "bundle.stored"):
        async with server.channel() as channel:
            await unanswered(
                bundle_pb2_grpc.BundleStub(channel).BatchSetFederatedBundle(request)
            )
    async with running(server):
        async with server.channel() as channel:
            stub = bundle_pb2_grpc.BundleStub(channel)
            found = await stub.ListFederatedBundles(bundle_pb2.ListFederatedBundlesRequest())
            assert not found.bundles
            await stub.BatchSetFederatedBundle(request)
            found = await stub.ListFederatedBundles(bundle_pb2.ListFederatedBundlesRequest())
            assert [one.trust_domain for one in found.bundles] == ["other.org"]
        records(folder / "server").check()
