"""
An agent's life beside a server's: outages, restarts, renewals, bans, and strangers.

Servers and agents are real processes; where the server has to be one without a watch, it runs
in this loop.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import base64
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from cryptography.x509 import load_der_x509_certificate

from issuer.api.agent import AgentServicer
from spiffe_core.der import split_certificates
from spiffe_core.errors import ForbiddenError
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.ca import FakeCa
from tests.support.endpoint import ending, fetch, read, says_nothing
from tests.support.stack import (
    AgentProcess,
    ServerCalls,
    ServerProcess,
    Stack,
    a_folder,
    a_stack,
    serving,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

Code = grpc.StatusCode
ME = f"unix:uid:{os.geteuid()}"
WEB = "spiffe://example.org/web"
QUICK = {"workloads": {"no_identity_grace": "0s"}}


@asynccontextmanager
async def asking(agent: AgentProcess) -> AsyncIterator[Any]:
    """The Workload API over a connection of its own."""
    async with agent.workload() as channel:
        yield workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


async def serial(agent: AgentProcess) -> int:
    """The serial number of the SVID that is served now."""
    async with asking(agent) as stub:
        return serial_of(await read(fetch(stub)))


def serial_of(message: Any) -> int:
    """The serial number of the first SVID of a message."""
    return load_der_x509_certificate(
        split_certificates(message.svids[0].x509_svid)[0]
    ).serial_number


async def jwt(agent: AgentProcess, *audience: str) -> str:
    """A JWT-SVID."""
    async with asking(agent) as stub:
        request = pb.JWTSVIDRequest(audience=audience or ("db",))
        answer = await stub.FetchJWTSVID(request, metadata=METADATA, timeout=10)
    return str(answer.svids[0].svid)


async def connected(agent: AgentProcess, wanted: bool = True) -> Any:
    """Wait until it is, or is not, in step with its server; return its status."""

    async def look() -> Any:
        status = await agent.status()
        return status if status is not None and status.connected == wanted else None

    return await agent.process.until(look)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """One server and agent, killed and started by the tests here; one identity, ``/web``."""
    async with a_stack(agent_changes=QUICK) as made:
        await made.server.add_entry("/web", made.agent.agent_id, ME)
        await made.agent.until_svids(1)
        yield made


# Outages


async def test_sec_106_a_server_that_is_away(stack: Stack) -> None:
    """SEC-106: what is held is served while the server is down; then the agent catches up."""
    server, agent = stack.server, stack.agent
    async with asking(agent) as stub:
        call = fetch(stub)
        before = serial_of(await read(call))
        token = await jwt(agent)
        server.process.kill()
        status = await connected(agent, False)
        await agent.process.until(lambda: _says(agent, str(server.port)))
        assert status.ready
        assert await serial(agent) == before and await jwt(agent) == token
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # one that is not held
            await jwt(agent, "another")
        assert caught.value.code() is Code.UNAVAILABLE
        await server.start()
        started = time.monotonic()
        await connected(agent)
        assert time.monotonic() - started < 30
        entry = await server.add_entry("/late", agent.agent_id, ME)
        assert [one.spiffe_id for one in (await read(call)).svids] == [
            WEB, "spiffe://example.org/late",
        ]  # fmt: skip
        assert await jwt(agent, "another")
    await server.delete_entries(entry)


async def _says(agent: AgentProcess, text: str) -> bool:
    status = await agent.status()
    return status is not None and text in status.problem


async def test_sec_106_what_was_changed_meanwhile(stack: Stack) -> None:
    """SEC-106: entries that were removed while the agent was down are not served again."""
    server, agent = stack.server, stack.agent
    entry = await server.add_entry("/gone", agent.agent_id, ME)
    async with asking(agent) as stub:
        call = fetch(stub)
        while len((await read(call)).svids) < 2:
            pass
        agent.process.kill()
        await server.delete_entries(entry)
        await agent.start()
    async with asking(agent) as stub:
        assert [one.spiffe_id for one in (await read(fetch(stub))).svids] == [WEB]


async def test_sec_106_an_agent_that_restarts_without_its_server(stack: Stack) -> None:
    """SEC-106: killed and started while the server is down it serves the SVID it had."""
    server, agent = stack.server, stack.agent
    before = await serial(agent)
    await _saved(agent)
    server.process.kill()
    agent.process.kill()
    await agent.start(connected=False)
    assert await serial(agent) == before
    await server.start()
    await connected(agent)
    assert await serial(agent) == before


@asynccontextmanager
async def another_agent(stack: Stack) -> AsyncIterator[AgentProcess]:
    """A second agent of the same server, in a folder of its own."""
    with a_folder() as folder:
        agent = AgentProcess(folder, stack.server, QUICK)
        try:
            yield await agent.join()
        finally:
            agent.process.close()


async def _saved(agent: AgentProcess) -> None:
    """Wait until what is served is on disk."""
    file = agent.folder / "agent" / "cache.json"
    held = await serial(agent)

    def there() -> bool:
        if not file.exists():
            return False
        text = file.read_bytes().partition(b"\n")[2]
        chains = [one["chain"][0] for one in json.loads(text)["svids"].values()]
        found = [load_der_x509_certificate(base64.b64decode(one)) for one in chains]
        return held in [one.serial_number for one in found]

    await agent.process.until(there)


async def test_sec_61_a_reboot(stack: Stack) -> None:
    """SEC-61: with the runtime folder gone the old keys are unreadable: new SVIDs, no token."""
    server, agent = stack.server, stack.agent
    before = await serial(agent)
    await _saved(agent)
    agent.process.kill()
    shutil.rmtree(stack.folder / "a")
    server.process.kill()
    await agent.start(connected=False)
    async with asking(agent) as stub:  # entries and bundles are there, the keys are not
        assert (await read(fetch(stub, "FetchX509Bundles"))).bundles
        assert await says_nothing(fetch(stub))
    await server.start()
    await agent.until_svids(1)
    assert await serial(agent) != before


async def test_sec_103_a_damaged_cache(stack: Stack) -> None:
    """SEC-103: an agent with a damaged cache starts, says so, and syncs anew."""
    agent = stack.agent
    await _saved(agent)
    agent.process.kill()
    file = stack.folder / "agent" / "cache.json"
    file.write_bytes(file.read_bytes()[:-100])
    await agent.start()
    await agent.until_svids(1)
    events = [one for one in agent.process.events() if one["event"] == "cache_damaged"]
    assert "checksum" in events[-1]["error"] and events[-1]["file"] == str(file)
    assert file.with_suffix(".damaged").exists()
    assert await serial(agent)


async def test_iop_10_a_graceful_stop(stack: Stack) -> None:
    """IOP-10, SEC-108: told to stop it ends its streams with UNAVAILABLE, and exits with 0."""
    agent = stack.agent
    async with asking(agent) as stub:
        calls = [fetch(stub, name) for name in ("FetchX509SVID", "FetchJWTBundles")]
        for call in calls:
            await read(call)
        started = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(agent.process.stop))
        for call in calls:
            assert (await ending(call))[0] is Code.UNAVAILABLE
        assert time.monotonic() - started < 2.5  # told, and not cut when the grace is over
        assert await stopping == 0
        assert time.monotonic() - started < 10
    assert not agent.workload_socket.exists() and not agent.admin_socket.exists()
    await agent.start()


async def test_no_token_is_needed_again(stack: Stack) -> None:
    """SEC-50: the token is spent and gone; the identity on disk is what counts from then on."""
    agent = stack.agent
    (stack.folder / "token").unlink(missing_ok=True)
    before = agent.agent_id
    agent.process.kill()
    await agent.start()
    assert agent.agent_id == before


async def test_sec_106_renewed_before_it_ends(stack: Stack) -> None:
    """SEC-106: an SVID of a few seconds is replaced on the open stream before it ends."""
    entry = await stack.server.add_entry(
        "/short", stack.agent.agent_id, ME, x509_svid_ttl=6, hint="short"
    )
    async with asking(stack.agent) as stub:
        call = fetch(stub)
        seen: list[Any] = []
        while len(seen) < 3:
            message = await read(call, within=8)
            found = {one.hint: one for one in message.svids}
            if "short" not in found:
                continue
            leaf = load_der_x509_certificate(split_certificates(found["short"].x509_svid)[0])
            left = leaf.not_valid_after_utc.timestamp() - time.time()
            assert left > 3  # nothing is sent that is about to end
            seen.append(leaf.serial_number)
        assert len(set(seen)) == 3
    await stack.server.delete_entries(entry)


async def test_sec_106_nothing_expired_is_handed_out(stack: Stack) -> None:
    """SEC-106: with the server away a short SVID is served to its end; then nobody gets it."""
    server, agent = stack.server, stack.agent
    entry = await server.add_entry("/brief", agent.agent_id, ME, x509_svid_ttl=3, hint="brief")
    await agent.until_svids(2)
    async with asking(agent) as stub:
        call = fetch(stub)
        message = await read(call)
        (brief,) = (one for one in message.svids if one.hint == "brief")
        ends = load_der_x509_certificate(
            split_certificates(brief.x509_svid)[0]
        ).not_valid_after_utc.timestamp()
        server.process.kill()
        while time.time() <= ends + 1:
            await asyncio.sleep(0.05)
        message = await read(fetch(stub))
        assert [one.spiffe_id for one in message.svids] == [WEB]
    await server.start()
    await connected(agent)
    await server.delete_entries(entry)


# Its own SVID


async def test_sec_54_its_own_renewal_interrupts_nothing() -> None:
    """SEC-54: the agent renews its own SVID under open streams and calls: none is broken."""
    changes = {"svids": {"agent_ttl": "10s"}}
    async with a_stack(server_changes=changes, agent_changes=QUICK) as stack:
        server, agent = stack.server, stack.agent
        await server.add_entry("/web", agent.agent_id, ME)
        await agent.until_svids(1)
        async with asking(agent) as stub:
            call = fetch(stub)
            await read(call)
            serial_before = await server.serial_of(agent.agent_id)
            ends, renewals, number = (await agent.status()).svid_expires_at, 0, 0
            deadline = time.monotonic() + 30
            while renewals < 1:
                assert time.monotonic() < deadline
                number += 1
                request = pb.JWTSVIDRequest(audience=[f"audience {number}"])
                answer = await stub.FetchJWTSVID(request, metadata=METADATA, timeout=10)
                assert answer.svids
                now = (await agent.status()).svid_expires_at
                renewals, ends = renewals + (now != ends), now
            assert await says_nothing(call)
        await server.add_entry("/more", agent.agent_id, ME)
        await agent.until_svids(2)
        assert await server.serial_of(agent.agent_id) != serial_before  # the new one is in use
        events = {one["event"] for one in agent.process.events()}
        assert "own_svid_renewed" in events and not {"agent_denied", "sync_failed"} & events


# The end


@pytest.mark.parametrize("way", ["ban", "evict"])
async def test_sec_52_told_to_go(stack: Stack, way: str) -> None:
    """SEC-52: a banned or evicted agent ends its streams, forgets every key, and says why."""
    server = stack.server
    async with another_agent(stack) as agent:
        await server.add_entry("/web", agent.agent_id, ME)
        await agent.until_svids(1)
        await _saved(agent)
        async with asking(agent) as stub:
            call = fetch(stub)
            await read(call)
            started = time.monotonic()
            await (server.ban if way == "ban" else server.evict)(agent.agent_id)
            code, _ = await ending(call)
            assert code is Code.PERMISSION_DENIED and time.monotonic() - started < 5
        assert await agent.process.wait() == 1
        assert not list((agent.folder / "agent").iterdir())
        assert not (agent.folder / "a" / "seal.key").exists()
        denied = [one for one in agent.process.events() if one["event"] == "agent_denied"]
        assert denied[-1]["reason"] in ("AGENT_BANNED", "AGENT_NOT_ATTESTED")
        agent.process.start()
        assert await agent.process.wait() == 1
        assert "Traceback" not in agent.process.log.read_text()


# Strangers


async def test_sec_57_another_server_in_its_place(stack: Stack) -> None:
    """SEC-57: a server of another CA at the same address is refused; the agent serves on."""
    server, agent = stack.server, stack.agent
    before = await serial(agent)
    server.process.kill()
    with a_folder() as folder:
        stranger = ServerProcess(folder, port=server.port)
        await stranger.start()
        try:
            await agent.process.until(lambda: _says(agent, "certificate verify failed"))
            assert not (await agent.status()).connected
            assert await serial(agent) == before
        finally:
            stranger.process.close()
    agent.process.kill()  # it would not dial again at once
    await server.start()
    await agent.start()


@pytest.mark.parametrize("token", ["wrong", "", None])
async def test_no_way_to_attest(stack: Stack, token: str | None) -> None:
    """SEC-50: without an identity, and without a token that is good, it ends and says so."""
    with a_folder() as folder:
        agent = AgentProcess(folder, stack.server)
        (folder / "bundle.pem").write_text(await stack.server.bundle_pem())
        if token is not None:
            (folder / "token").write_text(token)
        agent.config.write_text(yaml.safe_dump({
            "trust_domain": "example.org", "data_dir": str(folder / "agent"),
            "runtime_dir": str(folder / "a"), "workload_socket": str(agent.workload_socket),
            "admin_socket": str(agent.admin_socket), "join_token_file": str(folder / "token"),
            "server": {"address": "127.0.0.1", "port": stack.server.port,
                       "trust_bundle": str(folder / "bundle.pem")},
            "status": {"port": 0},
        }))  # fmt: skip
        agent.process.start()
        try:
            assert await agent.process.wait() == 1
            said = agent.process.log.read_text()
            assert "Traceback" not in said
            assert "token" in said
            assert not (folder / "agent" / "cache.json").exists()
        finally:
            agent.process.close()


async def test_sec_103_its_own_damaged_identity(stack: Stack) -> None:
    """SEC-103: a damaged identity is no silent reset: it does not start, and says why."""
    file = stack.folder / "agent" / "node.json"
    good = file.read_bytes()
    stack.agent.process.kill()
    file.write_bytes(good.replace(b'"', b"'", 1))
    stack.agent.process.start()
    assert await stack.agent.process.wait() == 1
    assert "restore it, or remove it and start with a new join token" in (
        stack.agent.process.log.read_text()
    )
    file.write_bytes(good)
    await stack.agent.start()


# A server that cannot push


class InThisLoop(ServerCalls):
    """A server in this loop, with the calls of one that is a process."""

    def __init__(self, folder: Path, port: int) -> None:
        self.admin_socket = folder / "run" / "admin.sock"
        self.port = port


@pytest.fixture
def no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this loop have no watch, and take no status, as SPIRE 1.13's."""

    async def denied(*_: Any) -> None:
        raise ForbiddenError("authorization denied for method …/PostStatus")

    monkeypatch.setattr(watch_pb2_grpc, "add_AgentWatchServicer_to_server", lambda *_: None)
    monkeypatch.setattr(AgentServicer, "PostStatus", denied)


@pytest.mark.usefixtures("no_watch")
async def test_polling() -> None:
    """SPIRE API 9: without a watch entries, bundles and bans are polled for."""
    changes = {"server": {"sync_interval": "100ms"}, **QUICK}
    with a_folder() as folder:
        async with serving(folder) as running:
            server = InThisLoop(folder, running.port)
            agent = AgentProcess(folder, server, _with_server(folder, running.port, changes))
            await agent.join()
            try:
                await _polled(server, agent)
                await _polled_bundles(server, agent)
            except BaseException:
                agent.process.close()
                raise
        try:
            await connected(agent, False)
            before = await serial(agent)
            async with serving(folder, bind_port=running.port):
                await connected(agent)
                assert await serial(agent) == before
                entry = await server.add_entry("/again", agent.agent_id, ME)
                await agent.until_svids(2)
                await server.delete_entries(entry)
                await server.ban(agent.agent_id)
                assert await agent.process.wait() == 1
        finally:
            agent.process.close()


def _with_server(folder: Path, port: int, changes: Any) -> Any:
    return {
        **changes,
        "server": {
            "address": "127.0.0.1", "port": port, "trust_bundle": str(folder / "bundle.pem"),
            **changes["server"],
        },
    }  # fmt: skip


async def _polled(server: ServerCalls, agent: AgentProcess) -> None:
    status = await connected(agent)
    assert status.sync_mode == "poll"
    await server.add_entry("/web", agent.agent_id, ME)
    await agent.until_svids(1)
    async with asking(agent) as stub:
        call = fetch(stub)
        first = await read(call)
        assert await says_nothing(call, 0.5)  # polling alone is no change
        call = fetch(stub)
        assert await read(call) == first
        entry = await server.add_entry("/more", agent.agent_id, ME)
        assert len((await read(call)).svids) == 2
        await server.delete_entries(entry)
        assert len((await read(call)).svids) == 1


async def _polled_bundles(server: ServerCalls, agent: AgentProcess) -> None:
    partner = FakeCa("partner.test")
    await server.set_bundle(partner.bundle)
    (entry,) = await server.entries("/web")
    old = await serial(agent)
    entry.federates_with.append("partner.test")
    await server.update_entry(entry)
    async with asking(agent) as stub:
        call = fetch(stub, "FetchX509Bundles")
        message = await read(call)
        while "spiffe://partner.test" not in message.bundles:
            message = await read(call)
        assert message.bundles["spiffe://partner.test"] == partner.authority.der
    while await serial(agent) == old:  # another revision is signed anew
        await asyncio.sleep(0.01)
