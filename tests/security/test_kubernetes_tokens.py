"""
Nodes that prove themselves again and again: who owns one, and what a token gives away.

Source: SEC-51 to SEC-54, SEC-90; SPIRE API 2.3, 5.2, 8.5, 9.  The server is real, API servers
are stand-ins; an agent of SPIRE's is played message by message.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.attestation.protocol import AttestedNode
from spiffe_core.permission import DenialReason
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import attestation_pb2
from tests.support.callers import (
    Code,
    Holder,
    Running,
    a_running_server,
    an_id,
    attest,
    below,
    csr_params,
    id_message,
    reason_of,
    refused,
)
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.psat import (
    ACCOUNT,
    NAMESPACE,
    a_cluster,
    agent_pod,
    join,
    logged,
    node_uid,
    payload_of,
    sent,
    settings_of,
    stored,
)
from tests.support.stack import a_folder
from tests.support.store import some
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Tofu:
    """An attestor of the trust-on-first-use sort: what proved a node can be told by others."""

    type = "tofu"

    async def attest(self, payload: bytes, **_: Any) -> AttestedNode:
        """Believe it."""
        node = an_id(f"/spire/agent/tofu/{payload.decode()}")
        return AttestedNode(node, some("tofu:a"), can_reattest=False)


@dataclass
class Place:
    """A server and one of its clusters."""

    running: Running
    cluster: FakeCluster

    async def join(self, pod: Pod, key: bytes = b"") -> Holder:
        """The agent of *pod*, attested, or attested again."""
        return await join(self.running, self.cluster, pod, key=key)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    """See `Place`."""
    async with a_cluster() as cluster:
        with a_folder() as folder:
            async with a_running_server(clusters=(settings_of(cluster, folder),)) as running:
                running.server.agents.attestors[Tofu.type] = Tofu()  # type: ignore[index]
                yield Place(running, cluster)


async def ask(node: Holder) -> None:
    """A call of agents alone."""
    await node.calls.entry.GetAuthorizedEntries(entry_pb2.GetAuthorizedEntriesRequest())


async def superseded(node: Holder) -> None:
    """See that *node* is nobody any more."""
    async with refused(Code.PERMISSION_DENIED) as seen:
        await ask(node)
    assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ACTIVE


async def serial_of(running: Running, path: str) -> str:
    """The serial number that counts."""
    request = agent_pb2.GetAgentRequest(id=id_message(path))
    return str((await running.local.agent.GetAgent(request)).x509svid_serial_number)


# Attesting again


async def test_sec_54_the_old_serial_is_worth_nothing_at_once(place: Place) -> None:
    """SEC-54: who attests again invalidates what the node had; its use is an alarm."""
    pod = agent_pod(place.cluster)
    old = await place.join(pod)
    await ask(old)
    new = await place.join(pod)
    assert new.id == old.id and new.svid.serial != old.svid.serial
    rows = await place.running.audited(lambda: superseded(old))
    assert [(action, outcome) for action, _, outcome in rows] == [
        ("agent.superseded", "refused")
    ]
    await ask(new)
    assert await serial_of(place.running, new.id.path) == new.svid.serial


async def test_sec_54_a_held_stream_ends(place: Place) -> None:
    """SEC-54: the stream that the old certificate holds ends when the node attests again."""
    pod = agent_pod(place.cluster)
    old = await place.join(pod)
    stream = old.calls.watch.Watch(watch_pb2.WatchRequest())
    await stream.read()

    async def again() -> None:
        await place.join(pod)
        async with refused(Code.PERMISSION_DENIED) as seen:
            await stream.read()
        assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ACTIVE

    # That is the agent's own doing, every half-life: no alarm.
    assert [action for action, _, _ in await place.running.audited(again)] == ["agent.attest"]


async def test_sec_54_who_can_attest_again_does_not_renew(place: Place) -> None:
    """SEC-54, SPIRE API 5.2: RenewAgent is refused: AGENT_MUST_REATTEST."""
    node = await place.join(agent_pod(place.cluster))
    async with refused(Code.PERMISSION_DENIED, "reattest instead of renew") as seen:
        await node.renew()
    assert reason_of(seen[0]) is DenialReason.AGENT_MUST_REATTEST
    await ask(node)


async def test_sec_54_many_attestations_at_once(place: Place) -> None:
    """SEC-54: of eight at once for one node all are answered, and exactly one counts."""
    pod = agent_pod(place.cluster)
    found = await asyncio.gather(*(place.join(pod) for _ in range(8)))
    assert len({one.id for one in found}) == 1
    serial = await serial_of(place.running, found[0].id.path)
    for one in found:
        await (ask(one) if one.svid.serial == serial else superseded(one))
    assert Counter(one.svid.serial == serial for one in found) == {False: 7, True: 1}


async def test_what_was_learnt_is_learnt_anew(place: Place) -> None:
    """SPIRE API 5.2: each attestation replaces the node's selectors; the version stays."""
    pod = agent_pod(place.cluster)
    first = await place.join(pod)
    await first.calls.agent.PostStatus(agent_pb2.PostStatusRequest(agent_version="1.2.3"))
    again = place.cluster.recreate_pod(pod)
    second = await place.join(again)
    request = agent_pb2.GetAgentRequest(id=id_message(second.id.path))
    agent = await place.running.local.agent.GetAgent(request)
    values = {one.value for one in agent.selectors}
    assert f"agent_pod_uid:{again.uid}" in values and f"agent_pod_uid:{pod.uid}" not in values
    assert agent.agent_version == "1.2.3" and first.id == second.id


async def test_sec_52_a_ban_wins(place: Place) -> None:
    """SEC-52: a banned node is not attested again, however good its token; evicted it is."""
    pod = agent_pod(place.cluster)
    node = await place.join(pod)
    message = id_message(node.id.path)
    await place.running.local.agent.BanAgent(agent_pb2.BanAgentRequest(id=message))
    kept = await stored(place.running)
    for _ in range(2):
        async with refused(Code.PERMISSION_DENIED, "agent is banned") as seen:
            await place.join(pod)
        assert reason_of(seen[0]) is DenialReason.AGENT_BANNED
    assert await stored(place.running) == kept
    await place.running.local.agent.DeleteAgent(agent_pb2.DeleteAgentRequest(id=message))
    await ask(await place.join(pod))
    async with refused(Code.PERMISSION_DENIED):
        await ask(node)


async def test_sec_20_a_key_of_another_node(place: Place) -> None:
    """SEC-20: no node is attested on the key of another one; on its own again it is."""
    key = make_key()
    pod = agent_pod(place.cluster)
    await place.join(pod, key)
    async with refused(Code.INVALID_ARGUMENT):
        await place.join(agent_pod(place.cluster), key)
    await ask(await place.join(pod, key))


async def test_sec_54_trust_on_first_use(place: Place) -> None:
    """SEC-54: where the proof is no secret the first one has the node, until it is evicted."""
    calls, path = place.running.anonymous.calls, "/spire/agent/tofu/n1"

    async def come() -> Any:
        return await attest(calls, "n1", make_csr(make_key()), "tofu")

    assert not (await come()).result.reattestable
    serial, kept = await serial_of(place.running, path), await stored(place.running)
    async with refused(Code.PERMISSION_DENIED, "already been used to attest an agent"):
        await come()
    assert await stored(place.running) == kept
    assert await serial_of(place.running, path) == serial
    local = place.running.local.agent
    await local.BanAgent(agent_pb2.BanAgentRequest(id=id_message(path)))
    async with refused(Code.PERMISSION_DENIED, "agent is banned") as seen:
        await come()
    assert reason_of(seen[0]) is DenialReason.AGENT_BANNED
    await local.DeleteAgent(agent_pb2.DeleteAgentRequest(id=id_message(path)))
    assert (await come()).result.svid.cert_chain


async def test_sec_54_first_uses_at_once(place: Place) -> None:
    """SEC-54: of ten who come first at once exactly one is attested."""
    calls = place.running.anonymous.calls
    found = await asyncio.gather(
        *(attest(calls, "race", make_csr(make_key()), "tofu") for _ in range(10)),
        return_exceptions=True,
    )
    refusals = [one for one in found if isinstance(one, grpc.aio.AioRpcError)]
    assert [one.code() for one in refusals] == [Code.PERMISSION_DENIED] * 9


# SPIRE's agent, message by message


async def test_as_spires_agent_does_it(place: Place) -> None:
    """SPIRE API 8.5, 9: params as Go encodes them, no challenge, then GetBundle, one line."""
    pod = agent_pod(place.cluster)
    token = place.cluster.projected_token(pod)
    agent = place.running.anonymous.calls.agent
    call = agent.AttestAgent()  # it sets no deadline
    params = agent_pb2.AttestAgentRequest.Params(
        data=attestation_pb2.AttestationData(
            type="k8s_psat", payload=f'{{"cluster":"prod","token":"{token}"}}'.encode()
        ),
        params=csr_params(make_csr(make_key())),
    )
    await call.write(agent_pb2.AttestAgentRequest(params=params))
    answer = await call.read()
    assert answer.WhichOneof("step") == "result" and answer.result.reattestable
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF and await call.code() is Code.OK
    bundle = await place.running.anonymous.calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())
    assert bundle.x509_authorities
    uid = node_uid(place.cluster, pod.node)
    assert answer.result.svid.id.path == f"/spire/agent/k8s_psat/prod/{uid}"


# What a token gives away


async def test_sec_90_the_token_is_nowhere(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-51, SEC-90: no part of a token is in log, audit trail, database or backup of it."""
    caplog.set_level(logging.DEBUG)
    await place.running.server.refusals.end_window()  # the first of a window is logged
    good = place.cluster.projected_token(agent_pod(place.cluster))
    bad = place.cluster.projected_token(agent_pod(place.cluster), "vault")
    calls = place.running.anonymous.calls
    await sent(calls, payload_of("prod", good))
    async with refused(Code.PERMISSION_DENIED):
        await sent(calls, payload_of("prod", bad))
    async with refused(Code.INVALID_ARGUMENT):
        await sent(calls, payload_of("nowhere", good))
    with place.cluster.faults.garbage(plural="pods"):
        async with refused(Code.INTERNAL):
            await sent(calls, payload_of("prod", good))
    assert "attestation_refused" in caplog.text and "call_failed" in caplog.text
    kept = b"".join(
        path.read_bytes() for path in place.running.folder.rglob("*") if path.is_file()
    )
    rows = repr(await place.running.audit())
    assert "agent.attest" in rows
    for token in (good, bad):
        for secret in token.split(".")[1:]:
            assert secret not in logged(caplog) and secret not in rows
            assert secret.encode() not in kept


# Many clusters

CLUSTERS = 55


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def many() -> AsyncIterator[tuple[Running, list[FakeCluster], list[Pod]]]:
    """A server of 55 clusters that are alike in all but their keys and UIDs."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(a_folder())
        clusters = [a_cluster(f"c{number}") for number in range(CLUSTERS)]
        for one in clusters:
            await stack.enter_async_context(one)
        running = await stack.enter_async_context(
            a_running_server(clusters=tuple(settings_of(one, folder) for one in clusters))
        )
        pods = [agent_pod(one, "node-1", name="agent-0") for one in clusters]
        yield running, clusters, pods


Many = tuple[Running, list[FakeCluster], list[Pod]]


async def test_sec_53_clusters_that_are_alike(many: Many) -> None:
    """SEC-53: 55 clusters with equal names in them yield 55 agents and 55 workload IDs."""
    running, clusters, pods = many
    nodes = [await join(running, *one) for one in zip(clusters, pods, strict=True)]
    assert len({one.id for one in nodes}) == CLUSTERS
    ours = (f"k8s:ns:{NAMESPACE}", "k8s:sa:web")
    await running.add(
        *(
            entry
            for one in clusters
            for entry in (
                below(an_id("/spire/server"), f"/{one.name}", f"k8s_psat:cluster:{one.name}"),
                below(an_id(f"/{one.name}"), f"/{one.name}/web", *ours),
            )
        )
    )
    seen = []
    for node in nodes:
        answer = await node.calls.entry.GetAuthorizedEntries(
            entry_pb2.GetAuthorizedEntriesRequest()
        )
        seen.append([one.spiffe_id.path for one in answer.entries])
    assert seen == [[f"/{one.name}/web"] for one in clusters]


async def test_sec_53_a_token_for_another_cluster(many: Many) -> None:
    """SEC-53: a token of one cluster proves nothing in the other, whoever is asked."""
    running, clusters, pods = many
    (first, second), (one, two) = clusters[:2], pods[:2]
    for name, cluster, pod in ((second.name, first, one), (first.name, second, two)):
        kept = await stored(running)
        async with refused(Code.PERMISSION_DENIED, "not authenticated"):
            payload = payload_of(name, cluster.projected_token(pod))
            await sent(running.anonymous.calls, payload)
        assert await stored(running) == kept


async def test_the_list_of_one_cluster_is_not_the_others(tmp_path: Any) -> None:
    """SEC-53: an account that one cluster lists joins there, and not where it is not listed."""
    async with a_cluster("a") as first, a_cluster("b") as second:
        settings = (
            settings_of(first, tmp_path, service_account_allow_list=(ACCOUNT,)),
            settings_of(second, tmp_path, service_account_allow_list=()),
        )
        async with a_running_server(clusters=settings) as running:
            await join(running, first, agent_pod(first))
            async with refused(Code.PERMISSION_DENIED, "is not an allowed service account"):
                await join(running, second, agent_pod(second))
