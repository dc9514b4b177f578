"""``issuer doctor`` on clusters: there, known, and allowed to do what the server does."""

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from tests.support.k8s.cluster import FakeCluster
from tests.support.manifests import one, written
from tests.support.programs import Programs

RBAC = ("ClusterRole", "ClusterRoleBinding")
ACCOUNT = "system:serviceaccount:spiffe-issuer:spiffe-issuer-server"


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    """A cluster that has granted the server what the manifests grant."""
    async with FakeCluster("prod") as made:
        made.apply(*(each for each in written("base") if each["kind"] in RBAC))
        yield made


async def found(folder: Path, cluster: FakeCluster, **changes: Any) -> dict[str, str]:
    """What doctor says of the one cluster of its settings."""
    token = cluster.account_token("spiffe-issuer", "spiffe-issuer-server")
    settings = {
        "name": "prod",
        "kubeconfig": str(cluster.kubeconfig(folder, token=token)),
        "service_account_allow_list": ["spiffe-issuer:spiffe-issuer-agent"],
        **changes,
    }
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump({"trust_domain": "example.org", "clusters": [settings]}))
    said = await Programs().issuer("doctor", "-c", file, "-o", "json")
    (seen,) = [row for row in said.json["findings"] if row["what"] == "cluster prod"]
    return dict(seen)


async def test_what_the_manifests_grant_is_enough(tmp_path: Path, cluster: FakeCluster) -> None:
    """With the manifests' rights a cluster is good; asking is all that was done."""
    seen = await found(tmp_path, cluster)
    assert seen["verdict"] == "good" and str(cluster.port) in seen["seen"]
    assert {call.plural for call in cluster.calls.of(user=ACCOUNT)} == {
        "selfsubjectaccessreviews"
    }


async def test_a_right_that_is_missing(tmp_path: Path, cluster: FakeCluster) -> None:
    """Rights that are missing are named, those that are not needed left out."""
    role = copy.deepcopy(one(written("base"), "ClusterRole", "spiffe-issuer-server"))
    for rule in role["rules"]:
        rule["verbs"] = [verb for verb in rule["verbs"] if verb != "watch"]
    cluster.apply(role)
    seen = await found(tmp_path, cluster)
    assert seen["verdict"] == "bad"
    for what in ("namespaces", "nodes", "pods", "serviceaccounts"):
        assert f"watch {what}" in seen["seen"]
    assert "list" not in seen["seen"] and "server-rbac.yaml" in seen["advice"]
    assert (await found(tmp_path, cluster, verify_pods=False))["verdict"] == "good"


async def test_nobody_may_join(tmp_path: Path, cluster: FakeCluster) -> None:
    """An empty allow-list lets nobody in, and is said."""
    seen = await found(tmp_path, cluster, service_account_allow_list=[])
    assert seen["verdict"] == "warn" and "no agent may join" in seen["seen"]


@pytest.mark.parametrize("which", ["away", "stranger"])
async def test_a_cluster_that_cannot_be_asked(
    tmp_path: Path, cluster: FakeCluster, which: str
) -> None:
    """An API server that is away, or does not know us, is bad, with its reason."""
    if which == "away":
        await cluster.stop()
        seen = await found(tmp_path, cluster)
        assert "cannot be reached" in seen["seen"]
    else:
        path = cluster.kubeconfig(tmp_path, token="e30.e30.e30", name="other")
        seen = await found(tmp_path, cluster, kubeconfig=str(path))
        assert "not known" in seen["seen"]
    assert seen["verdict"] == "bad" and seen["advice"]
