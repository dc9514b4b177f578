"""
An agent that proves its node by its pod's token, through its life: processes for real.

The API server is a stand-in in this loop; server and agents are processes that know it by a
kubeconfig.  SVIDs of agents live for ten seconds here, the least that a server allows.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml

from issuer.config import Svids
from spiffe_core import crashpoints
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.endpoint import ending, fetch, read
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.psat import (
    ACCOUNT,
    NAMESPACE,
    SERVER,
    a_cluster,
    agent_pod,
    node_uid,
    settings_of,
)
from tests.support.stack import (
    ROOT,
    AgentProcess,
    ServerCalls,
    ServerProcess,
    a_folder,
    serving,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
ME = f"unix:uid:{os.geteuid()}"
LIFE = 10.0
"""Seconds that an agent's SVID lives."""


@dataclass
class Node:
    """One agent, its pod and its token."""

    cluster: FakeCluster
    pod: Pod
    agent: AgentProcess

    @property
    def id(self) -> str:
        """The SPIFFE ID of the node as it is now."""
        uid = node_uid(self.cluster, self.pod.node)
        return f"spiffe://example.org/spire/agent/k8s_psat/{self.cluster.name}/{uid}"

    def project(self) -> None:
        """Put a fresh token where the agent finds it, as the kubelet does."""
        self.token_path.write_text(self.cluster.projected_token(self.pod))

    @property
    def token_path(self) -> Path:
        """Where that is."""
        return self.agent.folder / "spire-agent"

    def logged(self, name: str) -> list[dict[str, Any]]:
        """Events of the agent's log."""
        return [one for one in self.agent.process.events() if one.get("event") == name]

    async def attested(self, times: int) -> None:
        """Wait until it has attested that often; SEC-106 gives agents 30 s to be back."""
        await self.agent.process.until(
            lambda: len(self.logged("node_attested")) >= times, timeout=30
        )

    async def in_step(self) -> Any:
        """Wait until it follows its server; returns its status."""

        async def look() -> Any:
            status = await self.agent.status()
            return status if status is not None and status.connected else None

        return await self.agent.process.until(look)

    @asynccontextmanager
    async def workload(self) -> AsyncIterator[Any]:
        """The Workload API, over a connection of its own."""
        async with self.agent.workload() as channel:
            yield workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


@dataclass
class Place:
    """A cluster, a server of it, and the agents that tests start."""

    folder: Path
    cluster: FakeCluster
    server: ServerProcess
    stack: AsyncExitStack

    async def prepared(self, **changes: Any) -> Node:
        """A node whose agent is configured and not started."""
        folder = self.stack.enter_context(a_folder())
        agent = AgentProcess(folder, self.server, {
            "node_attestor": "k8s_psat",
            "join_token_file": None,
            "kubernetes": {
                "cluster": self.cluster.name, "token_path": str(folder / "spire-agent"),
            },
            "workloads": {"no_identity_grace": "0s"},
            **changes,
        })  # fmt: skip
        self.stack.callback(agent.process.close)
        node = Node(self.cluster, agent_pod(self.cluster), agent)
        node.project()
        await agent.configure()
        return node

    async def node(self, path: str = "") -> Node:
        """A node whose agent is in step, with an entry for this user at *path*."""
        node = await self.prepared()
        await node.agent.start()
        if path:
            await self.server.add_entry(path, node.id, ME)
            await node.agent.until_svids(1)
        return node

    def alarms(self) -> list[str]:
        """Names of the server's events; a refusal that is put on record is one."""
        return [one.get("event", "") for one in self.server.process.events()]

    async def agent_ids(self) -> set[str]:
        """The SPIFFE IDs of all agents."""
        async with self.server.channel() as channel:
            answer = await agent_pb2_grpc.AgentStub(channel).ListAgents(
                agent_pb2.ListAgentsRequest()
            )
        return {f"spiffe://example.org{one.id.path}" for one in answer.agents}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    """See `Place`."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(a_cluster())
        folder = stack.enter_context(a_folder())
        token = cluster.account_token(NAMESPACE, SERVER)
        server = ServerProcess(folder, {
            "svids": {"agent_ttl": f"{LIFE:g}s"},
            "clusters": [{
                "name": cluster.name,
                "kubeconfig": str(cluster.kubeconfig(folder, token=token)),
                "service_account_allow_list": [ACCOUNT],
                "verify_pods": False,
            }],
        })  # fmt: skip
        stack.callback(server.process.close)
        await server.start()
        yield Place(folder, cluster, server, stack)


async def jwt(stub: Any, audience: str) -> str:
    """A JWT-SVID."""
    request = pb.JWTSVIDRequest(audience=[audience])
    answer = await stub.FetchJWTSVID(request, metadata=METADATA, timeout=10)
    return str(answer.svids[0].svid)


async def test_it_joins_and_restarts(place: Place) -> None:
    """SEC-53, SPIRE API 9 (1): it joins by its token; started again it is who it was."""
    node = await place.node("/web")
    assert node.agent.agent_id == node.id
    before = len(place.cluster.calls.of(plural="tokenreviews"))
    node.agent.process.kill()
    node.token_path.unlink()
    await node.agent.start()
    assert node.agent.agent_id == node.id
    assert len(node.logged("node_attested")) == 1
    assert len(place.cluster.calls.of(plural="tokenreviews")) == before
    node.agent.process.stop()


async def test_an_agent_that_proves_itself_otherwise_now(place: Place) -> None:
    """An agent of a join token whose settings name k8s_psat is who its pod's token says."""
    node = await place.prepared(node_attestor="join_token")
    settings = yaml.safe_load(node.agent.config.read_text())
    token = node.agent.folder / "join-token"
    token.write_text(await place.server.join_token())
    node.agent.config.write_text(yaml.safe_dump(settings | {"join_token_file": str(token)}))
    await node.agent.start()
    assert "/join_token/" in node.agent.agent_id
    node.agent.process.stop()
    settings["node_attestor"] = "k8s_psat"
    node.agent.config.write_text(yaml.safe_dump(settings))
    await node.agent.start()
    assert node.agent.agent_id == node.id
    node.agent.process.stop()
    await node.agent.start()
    assert node.agent.agent_id == node.id
    assert len(node.logged("node_attested")) == 2
    node.agent.process.stop()


async def test_sec_54_it_attests_again_before_its_svid_ends(place: Place) -> None:
    """
    SEC-54, SPIRE API 9 (8): at half-life it attests again, by the token of now.

    A restarted agent knows that it has to.  Streams and calls of workloads go on meanwhile,
    and nobody sees the old serial again: that would be an alarm.
    """
    node = await place.node("/web")
    node.agent.process.kill()
    await node.agent.start()
    old = node.token_path.read_text()
    node.pod = place.cluster.recreate_pod(node.pod)  # the old token is good for nothing
    node.project()
    assert node.token_path.read_text() != old
    serial = await place.server.serial_of(node.id)
    async with node.workload() as stub:
        call = fetch(stub)
        await read(call)
        number, deadline = 0, time.monotonic() + 20
        while await place.server.serial_of(node.id) == serial:
            assert time.monotonic() < deadline
            number += 1
            assert await jwt(stub, f"audience {number}")
        for _ in range(20):
            number += 1
            assert await jwt(stub, f"audience {number}")
        await place.server.add_entry("/more", node.id, ME)  # nothing was said before this
        assert len((await read(call)).svids) == 2
    names = {one.get("event") for one in node.agent.process.events()}
    wrong = {"agent_denied", "sync_failed", "attesting_again", "renewal_failed"}
    assert "node_attested" in names and not names & wrong
    assert "superseded_serial_used" not in place.alarms()
    node.agent.process.stop()


async def test_sec_106_it_comes_back_when_its_svid_has_ended(place: Place) -> None:
    """SEC-106: after an outage longer than its SVID's life, up or down, it attests again."""
    up, down = await place.node("/up"), await place.node("/down")
    ends_down = (await down.agent.status()).svid_expires_at
    down.agent.process.kill()
    place.server.process.kill()
    async with up.workload() as stub:
        call = fetch(stub)
        await read(call)
        ends = max(ends_down, (await up.agent.status()).svid_expires_at)
        while time.time() <= ends + 1:
            await asyncio.sleep(0.05)
        await asyncio.gather(place.server.start(), down.agent.start(connected=False))
        started = time.monotonic()
        await asyncio.gather(up.attested(2), down.attested(2))
        assert time.monotonic() - started < 30
        await asyncio.gather(up.in_step(), down.in_step())
        await place.server.add_entry("/again", up.id, ME)  # what was held was good meanwhile
        assert len((await read(call)).svids) == 2
    assert not up.logged("agent_denied") and not down.logged("agent_denied")
    assert down.logged("own_svid_expired")
    up.agent.process.stop()
    down.agent.process.stop()


async def test_sec_52_evicted_it_comes_back(place: Place) -> None:
    """SEC-52, SPIRE API 2.3: an evicted node that can prove itself is back by itself."""
    node = await place.node("/web")
    async with node.workload() as stub:
        call = fetch(stub)
        await read(call)
        await place.server.evict(node.id)
        await node.attested(2)
        await node.in_step()
        assert node.id in await place.agent_ids()
        await place.server.add_entry("/more", node.id, ME)
        assert len((await read(call)).svids) == 2
    assert [one["reason"] for one in node.logged("attesting_again")] == ["AGENT_NOT_ATTESTED"]
    node.agent.process.stop()


async def test_a_node_that_was_made_anew_is_another(place: Place) -> None:
    """SEC-53: attesting again as another node, it serves that node's entries and no others."""
    node = await place.node("/old")
    old = node.id
    place.cluster.recreate("nodes", node.pod.node)
    node.pod = place.cluster.recreate_pod(node.pod)
    node.project()
    await place.server.add_entry("/new", node.id, ME)
    async with node.workload() as stub:
        call = fetch(stub)
        await read(call)
        await place.server.evict(old)
        message = await read(call)
        while [one.spiffe_id for one in message.svids] != ["spiffe://example.org/new"]:
            message = await read(call)
    assert (await node.in_step()).agent_id.path == node.id.removeprefix("spiffe://example.org")
    node.agent.process.stop()


async def test_sec_52_evicted_with_nobody_to_ask(place: Place) -> None:
    """SEC-52: evicted while its cluster cannot vouch, it serves nobody until that can."""
    node = await place.node("/web")
    async with node.workload() as stub:
        call = fetch(stub)
        await read(call)
        with place.cluster.faults.fail(plural="tokenreviews"):
            await place.server.evict(node.id)
            assert (await ending(call))[0] is Code.PERMISSION_DENIED
            assert (await ending(fetch(stub)))[0] is Code.UNAVAILABLE
            assert node.agent.process.ended() is None
        await node.attested(2)
        await node.agent.until_svids(1)
        assert len((await read(fetch(stub))).svids) == 1
    node.agent.process.stop()


@pytest.mark.parametrize("way", ["banned", "no longer allowed"])
async def test_sec_52_not_wanted_any_more(place: Place, way: str) -> None:
    """SEC-52: banned, or evicted and refused, it ends: streams, keys, process, the next too."""
    node = await place.node("/web")
    async with node.workload() as stub:
        call = fetch(stub)
        await read(call)
        if way == "banned":
            await place.server.ban(node.id)
        else:
            place.cluster.delete_pod(node.pod)
            await place.server.evict(node.id)
        assert (await ending(call))[0] is Code.PERMISSION_DENIED
    assert await node.agent.process.wait() == 1
    assert not list((node.agent.folder / "agent").iterdir())
    assert not (node.agent.folder / "a" / "seal.key").exists()
    node.agent.process.start()
    assert await node.agent.process.wait() == 1
    text = node.agent.process.log.read_text()
    assert ("agent is banned" if way == "banned" else "is gone") in text
    assert "Traceback" not in text and node.token_path.read_text() not in text


async def test_sec_52_banned_while_it_was_stopped(place: Place) -> None:
    """SEC-52: an agent that was banned while it was down serves nobody, and forgets."""
    node = await place.node("/web")
    node.agent.process.stop()
    await place.server.ban(node.id)
    node.agent.process.start()
    assert await node.agent.process.wait() == 1
    assert [one["reason"] for one in node.logged("agent_denied")] == ["AGENT_BANNED"]
    assert not list((node.agent.folder / "agent").iterdir())


async def test_sec_54_superseded_it_comes_back(place: Place) -> None:
    """SEC-54: when another one attests as its node it notices, and takes the node back."""
    node = await place.node("/web")
    thief = await place.prepared()
    thief.pod = node.pod
    thief.project()
    await thief.agent.start(connected=False)
    await node.attested(2)
    await node.in_step()
    assert {one["reason"] for one in node.logged("attesting_again")} == {"AGENT_NOT_ACTIVE"}
    thief.agent.process.kill()
    node.agent.process.stop()


POINTS = {
    "agent.csr_sent": "the server may have attested it, or not",
    "agent.reply_got": "the old serial is worth nothing, the new one is lost",
    "agent.identity_saved": "the new one is on disk",
}


async def test_sec_54_killed_while_it_attests_again(place: Place) -> None:
    """SEC-54, SEC-103: killed at any moment of it, the next life is the same node, in step."""

    async def story(node: Node, point: str) -> None:
        node.agent.process.stop()
        await node.agent.start(**{crashpoints.VARIABLE: point})
        assert await node.agent.process.wait() == 137
        back = len(node.logged("attesting_again"))
        await node.agent.start()
        await node.in_step()
        await node.agent.until_svids(1)
        assert node.agent.agent_id == node.id
        returned = len(node.logged("attesting_again")) - back
        if point == "agent.reply_got":
            assert returned == 1
        elif point == "agent.identity_saved":
            assert returned == 0
        node.agent.process.stop()

    nodes = [await place.node(f"/killed-{number}") for number in range(len(POINTS))]
    async with asyncio.TaskGroup() as tasks:
        for node, point in zip(nodes, POINTS, strict=True):
            tasks.create_task(story(node, point), name=point)


# A server without our watch, as SPIRE's


class InThisLoop(ServerCalls):
    """A server in this loop, with the calls of one that is a process."""

    def __init__(self, folder: Path, port: int) -> None:
        self.admin_socket = folder / "run" / "admin.sock"
        self.port = port


class LongLine:
    """Listens on a port, and passes on what comes to another; its answers come late."""

    def __init__(self, port: int, seconds: float) -> None:
        self._behind, self._late = port, seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._ends:
            one.close()
            with contextlib.suppress(OSError):
                await one.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection("127.0.0.1", self._behind)
        self._ends += [writer, away]
        for one in (self._pass_on(reader, away, 0), self._pass_on(there, writer, self._late)):
            self._tasks.add(asyncio.create_task(one))

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, late: float
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                loop.call_later(late, sink.write, data)
        loop.call_later(late, sink.close)


async def test_sec_54_no_call_meets_the_exchange(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    SEC-54: however much an agent asks, nothing goes out with a serial that is superseded.

    The server's answers are late, so that it has forgotten the old serial long before the
    agent knows of the new one; the agent polls and asks for JWT-SVIDs all the while.
    """
    monkeypatch.setattr(watch_pb2_grpc, "add_AgentWatchServicer_to_server", lambda *_: None)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(a_folder())
        changes = {
            "svids": Svids(agent_ttl=timedelta(seconds=LIFE)),
            "clusters": (settings_of(place.cluster, folder),),
        }
        server = await stack.enter_async_context(serving(folder, **changes))
        port = await stack.enter_async_context(LongLine(server.port, 0.1))
        here = InThisLoop(folder, server.port)
        bundle = folder / "server.pem"
        bundle.write_text(await here.bundle_pem())
        polling = Place(folder, place.cluster, here, stack)  # type: ignore[arg-type]
        node = await polling.prepared(
            server={
                "address": "127.0.0.1", "port": port, "trust_bundle": str(bundle),
                "sync_interval": "10ms",
            },
        )  # fmt: skip
        await node.agent.start()
        await here.add_entry("/web", node.id, ME)
        await node.agent.until_svids(1)
        assert (await node.in_step()).sync_mode == "poll"
        numbers = itertools.count()

        async def busy(stub: Any) -> None:
            while True:
                assert await jwt(stub, f"audience {next(numbers)}")

        async with node.workload() as stub:
            working = [asyncio.create_task(busy(stub)) for _ in range(4)]
            await node.attested(2)
            await node.in_step()
            for one in working:
                one.cancel()
            ended = await asyncio.gather(*working, return_exceptions=True)
        assert {type(one) for one in ended} == {asyncio.CancelledError}
        rows = await server.store.read(lambda repos: repos.audit.rows(0))
        assert not {row.action for row in rows} & {"agent.superseded", "call.refuse"}
        assert not node.logged("sync_failed") and not node.logged("attesting_again")
        node.agent.process.stop()


# What an operator is told


async def test_a_join_token_is_not_for_it(place: Place) -> None:
    """``--join-token-file`` where the settings say k8s_psat is wrong usage."""
    node = await place.prepared()
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workload_api.agent", "run", "-c", str(node.agent.config),
        "--join-token-file", "token",
        cwd=ROOT, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    _, said = await made.communicate()
    assert made.returncode == 2
    assert b"--join-token-file: node_attestor in" in said and b"k8s_psat" in said


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ("no token", ("cannot read", "mount a projected volume")),
        ("another cluster's name", ('not configured for cluster "elsewhere"', "allow_list")),
        ("another audience", ("not authenticated", "for its audience?")),
        ("another account", ("is not an allowed service account",)),
    ],
)
async def test_why_it_does_not_join(place: Place, change: str, texts: tuple[str, ...]) -> None:
    """SEC-53: an agent that is refused ends, and says what the server said and what to do."""
    elsewhere = {"kubernetes": {"cluster": "elsewhere", "token_path": ""}}
    node = await place.prepared()
    if change == "no token":
        node.token_path.unlink()
    elif change == "another cluster's name":
        elsewhere["kubernetes"]["token_path"] = str(node.token_path)
        node.agent.changes = {**node.agent.changes, **elsewhere}
        await node.agent.configure()
    elif change == "another audience":
        node.token_path.write_text(place.cluster.projected_token(node.pod, "vault"))
    else:
        pod = agent_pod(place.cluster, service_account="web")
        node.token_path.write_text(place.cluster.projected_token(pod))
    node.agent.process.start()
    assert await node.agent.process.wait() == 1
    log = node.agent.process.log.read_text()
    assert all(text in log for text in texts), log
    assert "Traceback" not in log
