"""From pods to selectors: SPIRE's, byte for byte, and ours."""

from dataclasses import replace

import pytest

from spiffe_wire.k8s.objects import Container, Meta, Owner
from spiffe_wire.k8s.selectors import Surroundings, container_selectors, pod_selectors
from tests.support.pods import a_pod, a_uid, values

APP = Container("app", "r.example/app:1", "r.example/app@sha256:aa", has_status=True)
SIDE = Container("side", "r.example/side:1", "sha256:bb", has_status=True)
SETUP = Container("setup", "r.example/setup:1", "sha256:cc", is_init=True, has_status=True)
LATE = Container("late", "r.example/late:1")
POD = a_pod(
    7,
    labels={"app": "web", "a.example/b": "c:d", "empty": ""},
    owners=(Owner("ReplicaSet", "web-5d", "o-1"), Owner("Job", "j", "o-2")),
    containers=(APP, SIDE, SETUP, LATE),
)


def test_spire_api_10() -> None:
    """SPIRE's selectors of a pod: its names, its order of parts, tag and digest of images."""
    assert values(pod_selectors(POD, Surroundings())) == {
        "ns:shop",
        "sa:web",
        f"pod-uid:{a_uid(7)}",
        "pod-name:web-7",
        "node-name:n1",
        "pod-label:app:web",
        "pod-label:a.example/b:c:d",
        "pod-label:empty:",
        "pod-owner:ReplicaSet:web-5d",
        "pod-owner-uid:ReplicaSet:o-1",
        "pod-owner:Job:j",
        "pod-owner-uid:Job:o-2",
        "pod-image-count:2",
        "pod-image:r.example/app:1",
        "pod-image:r.example/app@sha256:aa",
        "pod-image:r.example/side:1",
        "pod-image:sha256:bb",
        "pod-init-image-count:1",
        "pod-init-image:r.example/setup:1",
        "pod-init-image:sha256:cc",
    }


@pytest.mark.parametrize(
    ("container", "wanted"),
    [
        (APP, {"container-name:app", "container-image:r.example/app:1",
               "container-image:r.example/app@sha256:aa"}),
        (SETUP, {"container-name:setup", "container-image:r.example/setup:1",
                 "container-image:sha256:cc"}),
        (LATE, {"container-name:late", "container-image:r.example/late:1"}),
        (replace(APP, image="", image_id=""), {"container-name:app"}),
    ],
    ids=["app", "init", "not started", "no image"],
)  # fmt: skip
def test_a_container(container: Container, wanted: set[str]) -> None:
    """Name, and image by tag and digest; no digest before it has started."""
    assert values(container_selectors(container)) == wanted


def test_what_surrounds_a_pod() -> None:
    """Ours: the cluster, and the UIDs of namespace and account; each only when it is known."""
    bare = pod_selectors(POD, Surroundings())
    namespace = Meta("n-uid", "shop", "", {"team": "a", "x": "y:z"})
    account = Meta("s-uid", "web", "shop", {"no": "selector"})
    for around, wanted in [
        (Surroundings("demo"), {"cluster:demo"}),
        (Surroundings(namespace=namespace), {"ns-uid:n-uid"}),
        (Surroundings(account=account), {"sa-uid:s-uid"}),
        (
            Surroundings("demo", namespace, account, namespace_labels=True),
            {"cluster:demo", "ns-uid:n-uid", "sa-uid:s-uid", "ns-label:team:a",
             "ns-label:x:y:z"},
        ),
        (Surroundings(namespace_labels=True), set()),
    ]:  # fmt: skip
        assert values(pod_selectors(POD, around) - bare) == wanted


def test_a_pod_without_account_and_node() -> None:
    """SPIRE says ``sa:`` of a static pod, which is nobody's "default"."""
    found = values(
        pod_selectors(replace(POD, service_account="", node_name=""), Surroundings())
    )
    assert "sa:" in found
    assert not [one for one in found if one.startswith(("sa:d", "node-name"))]


def test_what_is_not_utf_8_is_left_out() -> None:
    """Half a surrogate pair, which JSON can bring, makes no selector and no failure."""
    found = values(
        pod_selectors(replace(POD, labels={"a": "\ud800", "b": "ü"}), Surroundings())
    )
    assert {one for one in found if one.startswith("pod-label")} == {"pod-label:b:ü"}
