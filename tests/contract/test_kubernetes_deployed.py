"""
The manifests on a real cluster: from a pod's `connect()` to its SVID, all of it real.

Runs where KUBECONFIG names a cluster to which `deploy/kubernetes/base` was applied, with the
images of this version.  Its pods, namespace and entries are its own, and removed.
"""

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support import manifests
from tests.support.manifests import Manifest

NAMESPACE = "spiffe-issuer"
SERVER, AGENT = "spiffe-issuer-server", "spiffe-issuer-agent"
PATIENCE = 60
EXAMPLE = manifests.pod(manifests.written("example"), "web")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "KUBECONFIG" not in os.environ or shutil.which("kubectl") is None,
        reason="KUBECONFIG is not set, or kubectl is not here: nothing is deployed to",
    ),
]


def kubectl(*words: str, given: Any = None) -> str:
    """What `kubectl` prints; it must succeed."""
    text = None if given is None else json.dumps(given)
    done = subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(look: Callable[[], Any]) -> Any:
    """What *look* returns, once it is something; nothing outside tells when."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.2)
    return found


@dataclass
class Place:
    """A namespace of ours on a cluster where we are deployed."""

    name: str
    trust_domain: str
    cluster: str
    nodes: str
    """The alias of all nodes of the cluster."""
    entries: list[str] = field(default_factory=list)

    def issuer(self, *words: str) -> Any:
        """Ask the server as an operator does."""
        pod = f"{SERVER}-0"
        said = kubectl("-n", NAMESPACE, "exec", pod, "--", "issuer", *words, "-o", "json")
        return json.loads(said)

    def id_of(self, name: str) -> str:
        """A SPIFFE ID of this test."""
        return f"spiffe://{self.trust_domain}/{self.name}/{name}"

    def entry(self, name: str, *selectors: str) -> str:
        """Let what has these selectors, in our namespace, be *name*; returns the ID."""
        words = ["--parent-id", self.nodes, "--spiffe-id", self.id_of(name)]
        for one in (f"ns:{self.name}", *selectors):
            words += ["--selector", f"k8s:{one}"]
        self.note(self.issuer("entry", "create", *words))
        return self.id_of(name)

    def note(self, created: Any) -> None:
        """Remember entries, to delete them."""
        self.entries += [one["entry"]["id"] for one in created["results"]]

    def account(self, name: str) -> str:
        """A service account."""
        self.kubectl("create", "serviceaccount", name)
        return name

    def kubectl(self, *words: str, given: Any = None) -> str:
        """`kubectl` in our namespace."""
        return kubectl("-n", self.name, *words, given=given)

    def pod(
        self, name: str, account: str, *, containers: tuple[str, ...] = ("web",), **labels: str
    ) -> "Running":
        """A pod like the example's, once its containers run."""
        (given,) = EXAMPLE["containers"]
        box = {key: value for key, value in given.items() if key != "startupProbe"}
        args = ["-c", "until issuer-agent watch -o json; do sleep 0.2; done"]
        spec = EXAMPLE | {
            "serviceAccountName": account,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                box | {"name": one, "command": ["sh"], "args": args} for one in containers
            ],
        }
        metadata = {"name": name, "labels": labels}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        self.kubectl("apply", "-f", "-", given=body)
        running = Running(self, name)
        until(lambda: running.is_running)
        return running


@dataclass
class Running:
    """A pod that runs."""

    place: Place
    name: str

    @property
    def body(self) -> Manifest:
        """The object as it is."""
        return dict(json.loads(self.place.kubectl("get", "pod", self.name, "-o", "json")))

    @property
    def is_running(self) -> bool:
        """Every container of it runs."""
        states = self.body["status"].get("containerStatuses", [])
        return bool(states) and all("running" in one["state"] for one in states)

    def updates(self, container: str = "web") -> list[list[str]]:
        """The SPIFFE IDs of each update on its stream, from the first."""
        said = self.place.kubectl("logs", self.name, "-c", container)
        lines = [json.loads(one) for one in said.splitlines() if one.startswith("{")]
        return [sorted(one["spiffe_id"] for one in line["svids"]) for line in lines]

    def is_now(self, *ids: str, container: str = "web") -> None:
        """Wait until its stream says that it has these identities."""
        until(lambda: self.updates(container)[-1:] == [sorted(ids)])

    def whoami(self, container: str = "web") -> Any:
        """What is learnt of a process that is started in it."""
        words = (
            "exec",
            self.name,
            "-c",
            container,
            "--",
            "issuer-agent",
            "whoami",
            "-o",
            "json",
        )
        return json.loads(self.place.kubectl(*words))

    def delete(self) -> None:
        """Delete it."""
        self.place.kubectl("delete", "pod", self.name, "--wait=true")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A namespace, and an alias of the nodes."""
    asked = subprocess.run(
        ["kubectl", "-n", NAMESPACE, "get", "configmap", "-o", "json"],
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(asked.stdout)["items"] if asked.returncode == 0 else []
    if SERVER not in {one["metadata"]["name"] for one in found}:
        pytest.skip("deploy/kubernetes/base is not applied to the cluster of KUBECONFIG")
    base = manifests.written("base")
    settings = manifests.server_settings([*found, manifests.one(base, "StatefulSet", SERVER)])
    name = f"spiffe-issuer-{secrets.token_hex(4)}"
    (cluster,) = settings.clusters
    made = Place(name, settings.trust_domain, cluster.name, "")
    made.nodes = made.id_of("nodes")
    selector = f"k8s_psat:cluster:{cluster.name}"
    kubectl("create", "namespace", name)
    try:
        made.note(
            made.issuer(
                "entry", "create", "--node", "--spiffe-id", made.nodes, "--selector", selector
            )
        )
        yield made
    finally:
        kubectl("delete", "namespace", name, "--wait=false")
        if made.entries:
            made.issuer("entry", "delete", *made.entries)


def test_agents_have_attested_by_their_pods_tokens(place: Place) -> None:
    """Every node with a ready agent is known to the server, by its own UID."""
    pods = json.loads(kubectl("-n", NAMESPACE, "get", "pods", "-o", "json",
                              "-l", f"app.kubernetes.io/name={AGENT}"))  # fmt: skip
    names = {one["spec"]["nodeName"] for one in pods["items"]}
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    uids = {one["metadata"]["uid"] for one in nodes if one["metadata"]["name"] in names}
    known = {one["id"]["path"] for one in place.issuer("agent", "list")["agents"]}
    assert uids and {f"/spire/agent/k8s_psat/{place.cluster}/{uid}" for uid in uids} <= known


def test_a_process_is_who_its_pod_is(place: Place) -> None:
    """Selectors are the API server's facts; another account of the namespace is nobody."""
    web = place.entry("web", f"sa:{place.account('web')}")
    pod, other = (
        place.pod("who", "web", app="shop"),
        place.pod("nobody", place.account("other")),
    )
    pod.is_now(web)
    body, learnt = pod.body, pod.whoami()
    account = json.loads(place.kubectl("get", "serviceaccount", "web", "-o", "json"))
    space = json.loads(kubectl("get", "namespace", place.name, "-o", "json"))
    (status,) = body["status"]["containerStatuses"]
    assert {
        f"k8s:cluster:{place.cluster}",
        f"k8s:ns:{place.name}",
        f"k8s:ns-uid:{space['metadata']['uid']}",
        "k8s:sa:web",
        f"k8s:sa-uid:{account['metadata']['uid']}",
        f"k8s:node-name:{body['spec']['nodeName']}",
        "k8s:pod-name:who",
        f"k8s:pod-uid:{body['metadata']['uid']}",
        "k8s:pod-label:app:shop",
        "k8s:container-name:web",
        f"k8s:container-image:{status['image']}",
        "unix:uid:65532",
    } <= set(learnt["selectors"])
    assert not learnt["partial"]
    assert other.whoami()["spiffe_ids"] == [] and other.updates() == []


def test_a_label_gives_and_takes_an_identity(place: Place) -> None:
    """On a stream that stays open, when a pod is labelled and when it no longer is."""
    account = place.account("labelled")
    base = place.entry("labelled", f"sa:{account}")
    edge = place.entry("edge", f"sa:{account}", "pod-label:tier:edge")
    pod = place.pod("labelled", account)
    pod.is_now(base)
    place.kubectl("label", "pod", "labelled", "tier=edge")
    pod.is_now(base, edge)
    place.kubectl("label", "pod", "labelled", "tier-")
    pod.is_now(base)
    assert pod.updates() == [[base], sorted([base, edge]), [base]]


def test_containers_of_a_pod_are_told_apart(place: Place) -> None:
    """Each container of a pod can have an identity that the other has not."""
    account = place.account("two")
    ids = {
        one: place.entry(f"two/{one}", f"sa:{account}", f"container-name:{one}") for one in "ab"
    }
    pod = place.pod("two", account, containers=("a", "b"))
    for name, its in ids.items():
        pod.is_now(its, container=name)


def test_a_pod_made_anew_is_another(place: Place) -> None:
    """What was given to a pod's UID is not given to a pod of its name that follows it."""
    account = place.account("anew")
    first = place.pod("anew", account)
    uid = first.body["metadata"]["uid"]
    mine = place.entry("by-uid", f"sa:{account}", f"pod-uid:{uid}")
    first.is_now(mine)
    first.delete()
    second = place.pod("anew", account)
    named = place.entry("by-name", f"sa:{account}", "pod-name:anew")
    second.is_now(named)
    assert second.body["metadata"]["uid"] != uid
    assert not any(mine in one for one in second.updates())


def test_nothing_was_refused_by_rbac() -> None:
    """Neither the server nor an agent has asked a cluster for what it may not."""
    for name in (f"statefulset/{SERVER}", f"daemonset/{AGENT}"):
        said = kubectl("-n", NAMESPACE, "logs", name, "--tail=-1")
        assert "grant it by RBAC" not in said
