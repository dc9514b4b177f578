"""What `deploy/kubernetes` says, parsed: objects, pods, settings, and RBAC rules."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from issuer import config as server_config
from spiffe_wire import settings
from spiffe_wire.k8s.rbac import Rules
from workload_api.agent import config as agent_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
FIELDS = {"spec.nodeName": "node-1", "status.podIP": "10.0.0.7", "status.hostIP": "10.0.0.1"}
"""What the kubelet puts in place of a fieldRef, in these tests."""

Manifest: TypeAlias = dict[str, Any]
Manifests: TypeAlias = list[Manifest]


@cache
def written(folder: str) -> Manifests:
    """The objects that the files of *folder* hold, as a person wrote them."""
    return [
        one
        for path in sorted((FOLDER / folder).glob("*.yaml"))
        for one in yaml.safe_load_all(path.read_text())
        if one and one["kind"] not in ("Kustomization", "Component")
    ]


def rendered(folder: Path) -> Manifests:
    """What `kubectl apply -k` would apply; skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here: nothing renders the manifests")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(objects: Manifests, kind: str, name: str) -> Manifest:
    """The one object of that kind and name."""
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pods(objects: Manifests) -> Iterator[tuple[str, Manifest]]:
    """Name and pod spec of everything that makes pods."""
    for each in objects:
        if "template" in each.get("spec", {}):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


def pod(objects: Manifests, name: str) -> Manifest:
    """The pod spec of one of them."""
    return dict(pods(objects))[name]


def container(objects: Manifests, name: str) -> Manifest:
    """The one container of a pod."""
    (found,) = pod(objects, name)["containers"]
    return found


def environment(container: Manifest) -> dict[str, str]:
    """The environment that the kubelet gives a container."""
    return {
        each["name"]: each["value"]
        if "value" in each
        else FIELDS[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container.get("env", ())
    }


def server_settings(objects: Manifests) -> server_config.ServerSettings:
    """The settings that a server of these manifests runs with."""
    text = one(objects, "ConfigMap", "spiffe-issuer-server")["data"]["server.yaml"]
    given = environment(container(objects, "spiffe-issuer-server"))
    return settings.load(server_config.ServerSettings, text, _known(given), server_config.ROLE)


def agent_settings(objects: Manifests) -> agent_config.AgentSettings:
    """The settings that an agent of these manifests runs with."""
    text = one(objects, "ConfigMap", "spiffe-issuer-agent")["data"]["agent.yaml"]
    given = environment(container(objects, "spiffe-issuer-agent"))
    return settings.load(agent_config.AgentSettings, text, _known(given), agent_config.ROLE)


def _known(given: Mapping[str, str]) -> Mapping[str, str]:
    assert all(name.startswith(settings.PREFIX) for name in given), "a misspelt setting"
    return given


def rules(objects: Manifests, account: str) -> Rules:
    """All that RBAC grants an account, in the whole cluster."""
    granted = set()
    for binding in objects:
        subjects = [each["name"] for each in binding.get("subjects", ())]
        if account in subjects:
            assert binding["kind"] == "ClusterRoleBinding"
            role = one(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])
            granted |= {
                (group, resource, frozenset(rule["verbs"]))
                for rule in role["rules"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
            }
    return frozenset(granted)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page for people, and every manifest, for the comments in it."""
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *FOLDER.rglob("*.yaml")):
        # One command a line, also where a page or a comment breaks it.
        yield path, re.sub(r" *\\\n#? *", " ", path.read_text())
