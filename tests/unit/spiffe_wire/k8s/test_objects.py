"""Pods, nodes and accounts, parsed once: what is taken over, and what is no such object."""

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spiffe_wire.k8s.objects import Meta, ObjectError, Owner, meta_of, pod_of
from tests.support.k8s import objects
from tests.support.k8s.objects import Container

NOW = datetime(2026, 1, 1, tzinfo=UTC)
UID = "11111111-2222-4333-8444-555555555555"
APP, SETUP, DEBUG = (digit * 64 for digit in "abc")


def a_body() -> Any:
    """A running pod as an API server sends it: an init container that is done, and two more."""
    given: Any = {
        "uid": UID,
        "account": "web",
        "node_name": "n1",
        "labels": {"app": "web"},
        "containers": [
            Container("setup", "registry.example/setup:1", SETUP, "initContainers"),
            Container("app", "registry.example/app:1", APP),
            Container("late", "registry.example/late:1", waits=True),
            Container("debug", "registry.example/tools:1", DEBUG, "ephemeralContainers"),
        ],
        "owners": [objects.Owner(uid="owner-uid").body()],
        "host_address": "10.0.0.1",
        "now": NOW,
    }
    body = objects.pod("web-1", "shop", **given)
    objects.stop_container(body, "setup", 0, NOW)
    return json.loads(json.dumps(body))


def test_a_pod() -> None:
    """Everything that selectors are made of, and nothing else."""
    pod = pod_of(a_body())
    assert (pod.uid, pod.name, pod.namespace, pod.service_account) == (
        UID,
        "web-1",
        "shop",
        "web",
    )
    assert (pod.node_name, pod.host_ip, pod.labels) == ("n1", "10.0.0.1", {"app": "web"})
    assert pod.owners == (Owner("ReplicaSet", "web-5d9c7b8f6d", "owner-uid"),)
    assert (pod.is_over, pod.is_ending, pod.config_hash) == (False, False, "")
    assert pod.ephemeral_ids == {DEBUG}
    app, late, setup = pod.containers
    assert (app.name, app.ids, app.is_init, app.is_ended) == ("app", {APP}, False, False)
    assert app.image == "registry.example/app:1"
    assert app.image_id.startswith("registry.example/app@sha256:")
    assert (late.name, late.ids, late.image_id, late.is_ended) == ("late", set(), "", False)
    assert (setup.name, setup.ids, setup.is_init, setup.is_ended) == (
        "setup", {SETUP}, True, True,
    )  # fmt: skip
    assert pod.container_with(APP) is app
    assert pod.container_with(DEBUG) is None
    assert pod.cgroup_uids == {UID}


def test_a_container_without_a_status() -> None:
    """Before the kubelet has said a word a container is known by its spec."""
    body = a_body()
    del body["status"]["containerStatuses"]
    app = pod_of(body).containers[0]
    assert (app.name, app.image, app.has_status) == ("app", "registry.example/app:1", False)


def test_the_smallest_pod() -> None:
    """What a pod may do without: what is `null` as Go writes it, or not there."""
    pod = pod_of(
        {
            "metadata": {"uid": UID, "name": "a", "namespace": "b", "labels": None},
            "spec": {"containers": None},
        }
    )
    assert (pod.service_account, pod.node_name, pod.containers, pod.labels) == ("", "", (), {})


@pytest.mark.parametrize(
    ("phase", "is_over"),
    [("Pending", False), ("Running", False), ("Unknown", False), ("Failed", True),
     ("Succeeded", True), ("", False)],
)  # fmt: skip
def test_phases(phase: str, is_over: bool) -> None:
    """A pod is over when all its containers have ended for good."""
    body = a_body()
    body["status"]["phase"] = phase
    assert pod_of(body).is_over is is_over


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef"),
        (UID, ""),
        ("0123456789ABCDEF0123456789ABCDEF", ""),
        ("0123456789abcdef0123456789abcdef\n", ""),
        ("", ""),
        (7, ""),
    ],
    ids=["hash", "uid", "upper case", "newline", "empty", "number"],
)
def test_sec_33_a_files_hash_is_never_another_pods_uid(text: Any, wanted: str) -> None:
    """SEC-33: who makes a pod may write this annotation, and must not name another's pod."""
    body = a_body()
    body["metadata"]["annotations"] = {"kubernetes.io/config.hash": text}
    assert pod_of(body).config_hash == wanted


STATES: dict[str, tuple[Any, bool]] = {
    "runs": ({"running": {"startedAt": "x"}}, False),
    "has ended": ({"terminated": {"exitCode": 0, "containerID": f"containerd://{APP}"}}, True),
    "is to be started anew": ({"waiting": {"reason": "CrashLoopBackOff"}}, True),
    "says nothing": ({}, False),
}


@pytest.mark.parametrize("name", STATES)
def test_whether_a_container_runs(name: str) -> None:
    """The ID of the last run stays in the status; it is no live container's."""
    state, is_ended = STATES[name]
    body = a_body()
    body["status"]["containerStatuses"][0]["state"] = state
    app = pod_of(body).containers[0]
    assert (app.ids, app.is_ended) == ({APP}, is_ended)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (f"containerd://{APP}", {APP}),
        (f"cri-o://{APP}", {APP}),
        (f"docker://{APP}", {APP}),
        (APP, set()),
        ("containerd://", set()),
        (f"://{APP}", set()),
        (None, set()),
    ],
    ids=["containerd", "cri-o", "docker", "no scheme", "no id", "empty scheme", "null"],
)
def test_container_ids(text: Any, ids: set[str]) -> None:
    """An ID has its runtime before it; anything else is none."""
    body = a_body()
    body["status"]["containerStatuses"][0]["containerID"] = text
    assert pod_of(body).containers[0].ids == ids


def spoiled(*path: Any, by: Any) -> Callable[[Any], None]:
    """Put *by* in the place that *path* names; None takes it away."""

    def spoil(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        if by is None:
            del body[path[-1]]
        else:
            body[path[-1]] = by

    return spoil


BROKEN: dict[str, Callable[[Any], None]] = {
    "no uid": spoiled("metadata", "uid", by=None),
    "empty uid": spoiled("metadata", "uid", by=""),
    "uid is a number": spoiled("metadata", "uid", by=7),
    "no name": spoiled("metadata", "name", by=None),
    "no namespace": spoiled("metadata", "namespace", by=None),
    "metadata is a list": spoiled("metadata", by=[]),
    "metadata is text": spoiled("metadata", by="x"),
    "label is a number": spoiled("metadata", "labels", "app", by=7),
    "label is null": spoiled("metadata", "labels", by={"app": None}),
    "labels are a list": spoiled("metadata", "labels", by=["app"]),
    "owners are a map": spoiled("metadata", "ownerReferences", by={}),
    "owner without uid": spoiled("metadata", "ownerReferences", 0, "uid", by=None),
    "owner is text": spoiled("metadata", "ownerReferences", 0, by="x"),
    "account is a map": spoiled("spec", "serviceAccountName", by={}),
    "node is a number": spoiled("spec", "nodeName", by=1),
    "containers are a map": spoiled("spec", "containers", by={"app": {}}),
    "container is text": spoiled("spec", "containers", 0, by="app"),
    "container without name": spoiled("spec", "containers", 0, "name", by=None),
    "status is text": spoiled("status", by="x"),
    "statuses are a map": spoiled("status", "containerStatuses", by={}),
    "status of a container is null": spoiled("status", "containerStatuses", by=[None]),
    "phase is a map": spoiled("status", "phase", by={}),
    "state is text": spoiled("status", "containerStatuses", 0, "state", by="running"),
    "terminated is text": spoiled(
        "status", "containerStatuses", 0, "state", by={"terminated": "x"}
    ),
    "image is a number": spoiled("status", "containerStatuses", 0, "image", by=1),
    "id is a number": spoiled("status", "containerStatuses", 0, "containerID", by=1),
    "debugging containers are text": spoiled("status", "ephemeralContainerStatuses", by="x"),
    "annotations are text": spoiled("metadata", "annotations", by="x"),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_what_is_no_pod(spoil: Callable[[Any], None]) -> None:
    """One thing that is not as the API has it, and there is no pod."""
    body = a_body()
    spoil(body)
    with pytest.raises(ObjectError):
        pod_of(body)


@pytest.mark.parametrize("given", [None, 7, "pod", [], True, {}])
def test_what_is_no_object(given: Any) -> None:
    """Whatever JSON may bring."""
    for parse in (pod_of, meta_of):
        with pytest.raises(ObjectError):
            parse(given)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_anything_in_any_place(data: Any) -> None:
    """Any JSON in any place of a pod is a pod, or an error of ours; never another."""
    body = copy.deepcopy(BODY)
    place: Any = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    try:
        assert pod_of(body).uid
    except ObjectError:
        pass


BODY = a_body()


def test_metadata_of_anything() -> None:
    """Nodes, namespaces and accounts are known by metadata alone."""
    assert meta_of(
        {"metadata": {"uid": "u", "name": "n", "namespace": "s", "labels": {"a": "b"}}}
    ) == Meta("u", "n", "s", {"a": "b"})
    assert meta_of({"metadata": {"uid": "u", "name": "n"}}) == Meta("u", "n", "", {})
    for metadata in (
        {"name": "n"},
        {"uid": "u"},
        {"uid": "u", "name": "n", "labels": {"a": 1}},
    ):
        with pytest.raises(ObjectError):
            meta_of({"metadata": metadata})
