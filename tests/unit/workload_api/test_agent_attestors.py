"""Which attestors an agent has, by its settings, and what it loads for them."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.k8s.credentials import CredentialsError
from spiffe_wire.settings import SettingsError
from tests.support.k8s.cluster import FakeCluster
from tests.support.stack import ROOT
from workload_api.agent.attestors import build_attestors
from workload_api.agent.config import AgentSettings, Docker, Kubernetes, PodSource

HTTP = {"httpcore", "anyio", "h11", "aiohttp", "spiffe_wire.k8s.client"}
DOCKER = Docker(workloads=True)


async def a_kubernetes(folder: Path, **changes: Any) -> Kubernetes:
    """Settings of a cluster that was there a moment ago."""
    async with FakeCluster() as cluster:
        path = cluster.kubeconfig(folder)
    return replace(
        Kubernetes(cluster="demo", workloads=True, node_name="n1", kubeconfig=path), **changes
    )


def a_settings(**changes: Any) -> AgentSettings:
    """Settings of an agent of which nothing is said."""
    return AgentSettings(trust_domain="example.org", **changes)


async def types_of(settings: AgentSettings) -> list[str]:
    """The attestors that settings ask for."""
    async with build_attestors(settings) as made:
        for one in made.all:
            one.close()
        return [one.type for one in made.all]


async def test_what_settings_ask_for(tmp_path: Path) -> None:
    """Local processes always; pods and containers where the settings say so."""
    kubernetes = await a_kubernetes(tmp_path)
    named = replace(kubernetes, workloads=False)
    assert await types_of(a_settings()) == ["unix"]
    assert await types_of(a_settings(kubernetes=named)) == ["unix"]
    assert await types_of(a_settings(kubernetes=kubernetes)) == ["unix", "k8s"]
    assert await types_of(a_settings(docker=DOCKER)) == ["unix", "docker"]
    both = a_settings(kubernetes=kubernetes, docker=DOCKER)
    assert await types_of(both) == ["unix", "k8s", "docker"]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ["pods", "namespaces", "serviceaccounts"]),
        ({"object_uids": False}, ["pods"]),
        ({"object_uids": False, "namespace_labels": True}, ["pods", "namespaces"]),
    ],
    ids=["all", "pods alone", "labels"],
)
async def test_what_is_watched_is_what_is_offered(
    tmp_path: Path, changes: dict[str, Any], kinds: list[str]
) -> None:
    """Namespaces and accounts are watched only for selectors that the settings offer."""
    async with FakeCluster() as cluster:
        made = Kubernetes(
            cluster="demo",
            workloads=True,
            node_name="n1",
            kubeconfig=cluster.kubeconfig(tmp_path),
        )
        async with build_attestors(a_settings(kubernetes=replace(made, **changes))) as built:
            await cluster.settled(count=len(kinds))
            async with asyncio.timeout(10):
                while built.problems:  # what was answered is still being taken over
                    await asyncio.sleep(0)
        assert sorted({one.plural for one in cluster.calls.made}) == sorted(kinds)


async def test_a_kubelets_node_is_its_name(tmp_path: Path) -> None:
    """Where nothing else is said, the kubelet is at the node's own name, and by the token."""
    kubernetes = await a_kubernetes(tmp_path, pods_from=PodSource.KUBELET)
    async with build_attestors(a_settings(kubernetes=kubernetes)) as made:
        assert made.source is not None
        assert made.source.name == "the kubelet"
        assert made.problems == ["not asked yet"]


# What keeps an agent from starting


async def test_no_way_to_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a kubeconfig nor a pod: it says what to set, before anything is served."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    nowhere = Kubernetes(cluster="demo", workloads=True, node_name="n1")
    for settings, why in [
        (nowhere, "set kubeconfig"),
        (replace(nowhere, kubeconfig=tmp_path / "none"), "cannot read"),
    ]:
        with pytest.raises(CredentialsError, match=why):
            await types_of(a_settings(kubernetes=settings))


@pytest.mark.parametrize("prefix", ["kubepods", "/kubepods/", "/a/../b", "/a/*", ""])
async def test_prefixes_that_match_nothing(tmp_path: Path, prefix: str) -> None:
    """A cgroup prefix that is none stops the agent, with the setting's name."""
    kubernetes = await a_kubernetes(tmp_path, cgroup_prefixes=(prefix,))
    with pytest.raises(SettingsError, match=r"^kubernetes\.cgroup_prefixes: "):
        await types_of(a_settings(kubernetes=kubernetes))
    with pytest.raises(SettingsError, match=r"^docker\.cgroup_prefixes: "):
        await types_of(a_settings(docker=replace(DOCKER, cgroup_prefixes=(prefix,))))


def test_a_kubelet_has_no_labels_of_namespaces() -> None:
    """SEC-35: what could never be known is refused at start, not silently absent."""
    with pytest.raises(
        SettingsError, match=r"^kubernetes\.namespace_labels: a kubelet knows no"
    ):
        a_settings(
            kubernetes=Kubernetes(
                cluster="demo",
                workloads=True,
                node_name="n1",
                pods_from=PodSource.KUBELET,
                namespace_labels=True,
            )
        )


# What is loaded

LOADED = """
import asyncio, sys
import workload_api.agent.app
from workload_api.agent.attestors import build_attestors
from workload_api.agent.config import AgentSettings, Docker

async def run(settings):
    async with build_attestors(settings) as made:
        for one in made.all:
            one.close()

docker = Docker(workloads=sys.argv[1] == "docker")
asyncio.run(run(AgentSettings(trust_domain="example.org", docker=docker)))
print(*sys.modules)
"""


def loaded(what: str) -> set[str]:
    """What an agent has imported of `HTTP` once its attestors are built."""
    found = subprocess.run(
        [sys.executable, "-c", LOADED, what],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return HTTP & set(found.stdout.split())


def test_an_agent_of_local_processes_has_no_http_client() -> None:
    """Who attests no pods and no containers loads nothing that speaks HTTP to anybody."""
    assert loaded("nothing") == set()
    assert "httpcore" in loaded("docker")  # or the question is the wrong one
