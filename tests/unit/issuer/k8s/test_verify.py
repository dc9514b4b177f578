"""
What is verified before an entry for pods is signed for, by the server's own watch (A5).

Each case is right but for one thing.  The API server is the stand-in of the tests; the watch is
the server's.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from issuer.config import WithoutPod
from issuer.k8s.verify import PodError, PodNotReadyError, PodRefusedError, PodVerifier
from spiffe_core.agent import AttestedAgent
from spiffe_core.entry import RegistrationEntry
from tests.support.callers import eventually
from tests.support.k8s.cluster import Container, FakeCluster, Owner, Pod
from tests.support.psat import a_cluster, node_uid
from tests.support.store import an_agent, an_entry, some
from tests.support.verifying import WATCHES, a_watch, an_agent_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
RIGHT = ("k8s:ns:shop", "k8s:sa:web")
DEPLOYMENT = Owner("ReplicaSet", "web-7d4b9")


@dataclass
class World:
    """A cluster with a few pods, and the server's watch of it."""

    cluster: FakeCluster
    verifier: PodVerifier
    pods: dict[str, Pod]

    def why(
        self,
        *selectors: str,
        pod: str = "web",
        agent: AttestedAgent | None = None,
        verifier: PodVerifier | None = None,
        **how: Any,
    ) -> str:
        """Why an entry is refused; nothing when it is not."""
        uid = self.pods[pod].uid if pod in self.pods else pod
        try:
            found = (verifier or self.verifier).check(
                agent or an_agent_of(self.cluster), an_entry_for(*selectors), uid, **how
            )
        except PodError as error:
            return error.why
        assert found in ("", uid)
        return ""


def an_entry_for(*selectors: str) -> RegistrationEntry:
    """An entry with these selectors."""
    return replace(an_entry(), selectors=some(*selectors))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Pods on two nodes, all known."""
    async with a_cluster() as cluster:
        waits = Container("late", waits=True)
        cluster.namespace("shop", labels={"team": "a"})
        pods = {
            "web": cluster.pod(
                "web-1",
                labels={"app": "web"},
                containers=["app", Container("side", "registry.example/side:1")],
                owner=DEPLOYMENT,
            ),
            "there": cluster.pod("web-2", node="n2", labels={"app": "web"}),
            "billing": cluster.pod("bill-1", "billing", "bill"),
            "starting": cluster.pod("web-3", containers=[waits]),
            "unscheduled": cluster.pod("web-4", node=""),
            "over": cluster.pod("web-5"),
            "ending": cluster.pod("web-6"),
            "static": cluster.pod("static-n1", "kube-system", "default", static=True),
        }
        cluster.stop_container(pods["over"])
        body = pods["over"].body | {"status": pods["over"].body["status"] | {"phase": "Failed"}}
        cluster.put_pod(body)
        cluster.terminate_pod(pods["ending"])
        async with a_watch(cluster, tmp_path_factory.mktemp("k")) as verifier:
            watch = verifier.clusters["prod"]
            await eventually(lambda: not watch.problem)
            yield World(cluster, verifier, pods)


VERIFIED = {
    "account": RIGHT,
    "no account": ("k8s:ns:shop",),
    "cluster": (*RIGHT, "k8s:cluster:prod"),
    "label": (*RIGHT, "k8s:pod-label:app:web"),
    "name": ("k8s:pod-name:web-1",),
    "node": ("k8s:node-name:n1",),
    "owner": ("k8s:pod-owner:ReplicaSet:web-7d4b9",),
    "count": (*RIGHT, "k8s:pod-image-count:2"),
    "image of the pod": ("k8s:pod-image:registry.example/side:1",),
    "container": (*RIGHT, "k8s:container-name:side"),
    "container and image": (
        "k8s:container-name:side",
        "k8s:container-image:registry.example/side:1",
    ),
    "other types beside": (*RIGHT, "unix:uid:1000", "docker:label:a:b"),
}


@pytest.mark.parametrize("case", VERIFIED)
async def test_sec_21_a_pod_of_the_node_is_signed_for(world: World, case: str) -> None:
    """SEC-21: an entry is signed for when one container of the pod has all it asks for."""
    assert world.why(*VERIFIED[case]) == ""


REFUSED = {
    "namespace": (("k8s:ns:billing", "k8s:sa:web"), "web", "pod-differs"),
    "account": (("k8s:ns:shop", "k8s:sa:bill"), "web", "pod-differs"),
    "label": ((*RIGHT, "k8s:pod-label:app:db"), "web", "pod-differs"),
    "name": (("k8s:pod-name:web-2",), "web", "pod-differs"),
    "node": ((*RIGHT, "k8s:node-name:n2"), "web", "pod-differs"),
    "owner": (("k8s:pod-owner:DaemonSet:web-7d4b9",), "web", "pod-differs"),
    "uid of another": (("k8s:pod-uid:11111111-1111-1111-1111-111111111111",), "web",
                       "pod-differs"),
    "account uid": ((*RIGHT, "k8s:sa-uid:11111111"), "web", "pod-differs"),
    "namespace uid": ((*RIGHT, "k8s:ns-uid:11111111"), "web", "pod-differs"),
    "container": ((*RIGHT, "k8s:container-name:no"), "web", "pod-differs"),
    "two containers": (
        ("k8s:container-name:app", "k8s:container-image:registry.example/side:1"),
        "web", "pod-differs",
    ),
    "what nobody verifies": ((*RIGHT, "k8s:image-signature:verified"), "web", "pod-differs"),
    "namespace label, off": ((*RIGHT, "k8s:ns-label:team:a"), "web", "pod-differs"),
    "another node": (RIGHT, "there", "other-node"),
    "another node, and not for it": (("k8s:ns:billing",), "there", "other-node"),
    "over": (RIGHT, "over", "pod-over"),
    "another cluster": ((*RIGHT, "k8s:cluster:test"), "web", "other-cluster"),
    "two clusters": ((*RIGHT, "k8s:cluster:prod", "k8s:cluster:test"), "web", "other-cluster"),
    "unknown": (RIGHT, "11111111-1111-1111-1111-111111111111", "pod-unknown"),
    "unscheduled": (RIGHT, "unscheduled", "pod-unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_sec_21_one_thing_wrong_is_enough(world: World, case: str) -> None:
    """SEC-21: nothing is signed for a pod that is elsewhere, over, or not what is asked for."""
    selectors, pod, why = REFUSED[case]
    assert world.why(*selectors, pod=pod) == why


async def test_sec_21_the_uids_of_account_and_namespace_are_looked_up(world: World) -> None:
    """SEC-21: what is not in the pod is taken from the server's other watches."""
    account = world.cluster.find("serviceaccounts", "web", "shop")["metadata"]["uid"]
    namespace = world.cluster.find("namespaces", "shop")["metadata"]["uid"]
    assert world.why(*RIGHT, f"k8s:sa-uid:{account}", f"k8s:ns-uid:{namespace}") == ""
    assert world.why(*RIGHT, f"k8s:sa-uid:{namespace}") == "pod-differs"


@pytest.mark.parametrize("pod", ["starting", "ending"])
async def test_a_pod_on_its_way_in_or_out_is_one(world: World, pod: str) -> None:
    """A pod that starts is signed for ahead, and one that is being deleted serves on."""
    assert world.why(*RIGHT, pod=pod) == ""


async def test_a_static_pod_goes_by_its_kubelets_name_too(world: World) -> None:
    """A kubelet knows a static pod by its hash; on record stands the API server's UID."""
    notes = world.pods["static"].body["metadata"]["annotations"]
    found = world.verifier.check(
        an_agent_of(world.cluster),
        an_entry_for("k8s:ns:kube-system"),
        notes["kubernetes.io/config.hash"],
    )
    assert found == world.pods["static"].uid


UNCHECKED = {
    "no pods": (("unix:uid:1000",), {}, ""),
    "other attestor": (RIGHT, {"attestation_type": "join_token"}, ""),
    "other attestor, cluster unknown": (
        (*RIGHT, "k8s:cluster:else"), {"attestation_type": "join_token"}, "",
    ),
    "other attestor, our cluster": (
        (*RIGHT, "k8s:cluster:prod"), {"attestation_type": "join_token"}, "other-cluster",
    ),
    "other attestor with our selectors": (
        (*RIGHT, "k8s:cluster:prod"),
        {"attestation_type": "x509pop"},
        "other-cluster",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCHECKED)
async def test_only_agents_of_a_cluster_speak_for_its_pods(world: World, case: str) -> None:
    """Who did not prove to be in a cluster gets nothing that names it."""
    selectors, changes, why = UNCHECKED[case]
    agent = replace(an_agent_of(world.cluster), **changes)
    assert world.why(*selectors, agent=agent, pod="there") == why


async def test_an_agent_of_another_cluster_is_no_agent_of_this_one(world: World) -> None:
    """Equal names of nodes in two clusters mean nothing: the agent's own cluster counts."""
    agent = an_agent_of(world.cluster, cluster="test")
    assert world.why(*RIGHT, "k8s:cluster:prod", agent=agent) == "other-cluster"
    assert world.why(*RIGHT, "k8s:cluster:test", agent=agent) == ""  # it is not watched


NODES = {
    "what it says of its name": ({"agent_node_name": "n2"}, ""),
    "another node's uid": ({"agent_node_uid": "n2"}, "other-node"),
    "made anew": ({"agent_node_uid": "gone"}, "node-replaced"),
    "gone": ({"agent_node_uid": "gone", "agent_node_name": "gone"}, "node-unknown"),
    "no node": ({"agent_node_uid": "", "agent_node_name": ""}, "node-unknown"),
}


@pytest.mark.parametrize("case", NODES)
async def test_sec_21_the_node_is_the_one_that_was_attested(world: World, case: str) -> None:
    """SEC-21: an agent's node is known by the UID that its attestation proved, not its name."""
    changes, why = NODES[case]
    if changes.get("agent_node_uid") == "n2":
        changes = changes | {"agent_node_uid": node_uid(world.cluster, "n2")}
    assert world.why(*RIGHT, agent=an_agent_of(world.cluster, **changes)) == why


WITHOUT = {
    ("any-pod-of-node", "here"): "",
    ("any-pod-of-node", "elsewhere"): "no-such-pod",
    ("any-pod-of-node", "over"): "no-such-pod",
    ("refuse", "here"): "no-pod-named",
    ("refuse", "elsewhere"): "no-pod-named",
    ("allow", "here"): "",
    ("allow", "elsewhere"): "",
}


@pytest.mark.parametrize(("setting", "where"), WITHOUT, ids=str)
async def test_an_agent_that_names_no_pod(world: World, setting: str, where: str) -> None:
    """SPIRE's agents get what the setting says: by any pod of the node, nothing, or all."""
    selectors = {
        "here": (*RIGHT, "k8s:pod-label:app:web"),
        "elsewhere": ("k8s:pod-name:web-2",),
        "over": ("k8s:pod-name:web-5",),
    }[where]
    assert (
        world.why(*selectors, pod="", verifier=with_(world, setting)) == WITHOUT[setting, where]
    )


def with_(world: World, without_pod: str) -> PodVerifier:
    """The same watch under another setting."""
    watch = world.verifier.clusters["prod"]
    settings = replace(watch.settings, agents_without_pod=WithoutPod(without_pod))
    other = object.__new__(type(watch))
    other.__dict__ = watch.__dict__ | {"settings": settings}
    return replace(world.verifier, clusters={"prod": other})


async def test_only_a_pod_of_another_node_or_for_long_another_pod_is_a_violation(
    world: World,
) -> None:
    """What an agent's watch can be ahead of, or behind, for moments is no attack."""
    agent, entry = an_agent_of(world.cluster), an_entry_for("k8s:ns:billing")
    namespace = an_entry_for(*RIGHT, "k8s:ns-label:team:a")
    settled = replace(world.verifier, settled=0.0)
    found = {}
    for name, verifier, wanted, pod in (
        ("there", world.verifier, an_entry_for(*RIGHT), "there"),
        ("just changed", world.verifier, entry, "web"),
        ("for long", settled, entry, "web"),
        ("namespace", settled, namespace, "web"),
        ("over", settled, an_entry_for(*RIGHT), "over"),
    ):
        with pytest.raises(PodRefusedError) as caught:
            verifier.check(agent, wanted, world.pods[pod].uid)
        found[name] = caught.value.is_violation
    assert found == {
        "there": True, "just changed": False, "for long": True, "namespace": False,
        "over": False,
    }  # fmt: skip


async def test_the_peer_is_not_told_what_runs_elsewhere(world: World) -> None:
    """The agent learns that a pod is not its own; where it runs stands in our log alone."""
    with pytest.raises(PodRefusedError) as caught:
        world.verifier.check(
            an_agent_of(world.cluster), an_entry_for(*RIGHT), world.pods["there"].uid
        )
    assert "n2" not in str(caught.value) and "n2" in caught.value.detail


async def test_what_is_asked_for_says_what_to_do(world: World) -> None:
    """A setting that keeps an entry from being signed for is named."""
    for selectors, verifier, text in (
        ((*RIGHT, "k8s:ns-label:team:a"), world.verifier, "namespace_labels of cluster prod"),
        (RIGHT, with_(world, "refuse"), "agents_without_pod of cluster prod"),
    ):
        pod = world.pods["web"].uid if verifier is world.verifier else ""
        with pytest.raises(PodRefusedError, match=text):
            verifier.check(an_agent_of(world.cluster), an_entry_for(*selectors), pod)


async def test_outcomes_are_counted(world: World) -> None:
    """What was verified, and what was not, is told apart."""
    seen: list[tuple[str, str]] = []
    counting = replace(world.verifier, on_checked=lambda *one: seen.append(one))
    allowing = replace(with_(world, "allow"), on_checked=lambda *one: seen.append(one))
    agent, entry = an_agent_of(world.cluster), an_entry_for(*RIGHT)
    counting.check(agent, entry, world.pods["web"].uid)
    counting.check(agent, entry, "")
    allowing.check(agent, entry, "")
    counting.check(an_agent(), entry, "")
    counting.check(agent, an_entry(), "")
    assert seen == [
        ("prod", "verified"), ("prod", "any-pod"), ("prod", "allowed"), ("", "unchecked"),
    ]  # fmt: skip


# A watch of its own


async def test_changes_count_as_they_come(tmp_path: Path) -> None:
    """A relabelled pod, a deleted one and another of its name are what they are now."""
    async with a_cluster() as cluster, a_watch(cluster, tmp_path) as verifier:
        pod = cluster.pod(labels={"app": "web"})
        world = World(cluster, verifier, {"web": pod})
        wanted = (*RIGHT, "k8s:pod-label:app:web")
        await eventually(lambda: world.why(*wanted) == "")
        cluster.relabel(pod, {"app": "db"})
        await eventually(lambda: world.why(*wanted) == "pod-differs")
        cluster.relabel(pod, {"app": "web"})
        await eventually(lambda: world.why(*wanted) == "")
        world.pods["again"] = cluster.recreate_pod(pod)
        await eventually(lambda: world.why(*wanted, pod="again") == "")
        assert world.why(*wanted) == "pod-unknown"


async def test_namespace_labels_by_setting(tmp_path: Path) -> None:
    """With namespace_labels on, they are verified, and followed."""
    async with (
        a_cluster() as cluster,
        a_watch(cluster, tmp_path, namespace_labels=True) as verifier,
    ):
        cluster.namespace("shop", labels={"team": "a"})
        world = World(cluster, verifier, {"web": cluster.pod()})
        await eventually(lambda: world.why(*RIGHT, "k8s:ns-label:team:a") == "")
        assert world.why(*RIGHT, "k8s:ns-label:team:b") == "pod-differs"


async def test_sec_21_a_node_made_anew_is_another_node(tmp_path: Path) -> None:
    """SEC-21: the agent of a node that was replaced is refused; the new node's is not."""
    async with a_cluster() as cluster, a_watch(cluster, tmp_path) as verifier:
        world = World(cluster, verifier, {"web": cluster.pod()})
        before = an_agent_of(cluster)
        await eventually(lambda: world.why(*RIGHT, agent=before) == "")
        cluster.recreate("nodes", "n1")
        await eventually(lambda: world.why(*RIGHT, agent=before) == "node-replaced")
        assert world.why(*RIGHT) == ""


async def test_nothing_is_known_before_the_first_list(tmp_path: Path) -> None:
    """Until the API server has answered once, all that is said is that it is not known yet."""
    cluster = a_cluster()
    async with cluster:
        await cluster.stop()
        async with a_watch(cluster, tmp_path) as verifier:
            world = World(cluster, verifier, {"web": cluster.pod()})
            agent, entry = an_agent_of(cluster), an_entry_for(*RIGHT)
            await eventually(lambda: "cannot be reached" in verifier.clusters["prod"].problem)
            for pod in (world.pods["web"].uid, ""):
                with pytest.raises(PodNotReadyError, match="cannot be reached") as caught:
                    verifier.check(agent, entry, pod)
                assert caught.value.why == "not-synced"
            await cluster.start()
            await eventually(lambda: world.why(*RIGHT) == "")


async def test_what_is_known_is_good_while_the_api_server_is_away(tmp_path: Path) -> None:
    """Known pods are signed for from memory; the limit, when there is one, ends that."""
    limit = timedelta(milliseconds=300)
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(a_cluster())
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        ever = await stack.enter_async_context(a_watch(cluster, tmp_path / "a"))
        bounded = await stack.enter_async_context(
            a_watch(cluster, tmp_path / "b", stale_limit=limit)
        )
        world = World(cluster, ever, {"web": cluster.pod()})
        for verifier in (ever, bounded):
            await eventually(lambda one=verifier: world.why(*RIGHT, verifier=one) == "")
        await cluster.settled(count=2 * WATCHES)
        await cluster.stop()
        await eventually(lambda: ever.clusters["prod"].problem)
        with pytest.raises(PodRefusedError) as caught:  # it may be another pod by now
            replace(ever, settled=0.0).check(
                an_agent_of(cluster), an_entry_for("k8s:ns:bill"), world.pods["web"].uid
            )
        assert not caught.value.is_violation
        assert world.why(*RIGHT, verifier=bounded) == ""
        await eventually(lambda: world.why(*RIGHT, verifier=bounded) == "stale")
        assert world.why(*RIGHT) == ""
        later = cluster.pod("web-9")
        assert world.why(*RIGHT, pod=later.uid) == "pod-unknown"
        await cluster.start()
        await eventually(lambda: world.why(*RIGHT, pod=later.uid, verifier=bounded) == "")


async def test_only_what_an_entry_needs_must_be_known(tmp_path: Path) -> None:
    """Accounts that we may not watch keep nothing back but entries that ask for their UIDs."""
    async with a_cluster() as cluster, a_watch(cluster, tmp_path) as verifier:
        cluster.faults.fail(403, plural="serviceaccounts")
        world = World(cluster, verifier, {"web": cluster.pod()})
        await eventually(lambda: world.why(*RIGHT) == "")
        assert world.why(*RIGHT, "k8s:sa-uid:1") == "not-synced"
        assert verifier.clusters["prod"].problem
        cluster.faults.clear()
        await eventually(lambda: world.why(*RIGHT, "k8s:sa-uid:1") == "pod-differs", 15)
