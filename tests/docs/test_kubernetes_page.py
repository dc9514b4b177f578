"""
The tutorial for Kubernetes: its commands fit the manifests, the images and our own grammar.

A cluster with our images in it is not at hand in every run, so each command is held against
what it acts upon; what it acts upon is run by the suites of manifests, containers and pods.
"""

import re
import shlex
from collections.abc import Iterator

import pytest

from issuer.cli.grammar import parser
from tests.support.manifests import written
from tests.support.stack import ROOT

PAGE = ROOT / "docs" / "tutorial" / "kubernetes.md"
IN_SERVER = "kubectl -n spiffe-issuer exec spiffe-issuer-server-0 -- issuer "
KINDS = {"statefulset": "StatefulSet", "daemonset": "DaemonSet", "deployment": "Deployment"}


def commands() -> Iterator[str]:
    """The lines that a reader types."""
    for block in re.findall(r"^```console cluster\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        yield from (line[2:] for line in block.splitlines() if line.startswith("$ "))


def objects() -> set[tuple[str, str, str]]:
    """Kind, namespace and name of what base and example make."""
    return {
        (one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"])
        for folder in ("base", "example")
        for one in written(folder)
    }


def namespace_of(words: list[str]) -> str:
    """The namespace that a command names."""
    return words[words.index("-n") + 1] if "-n" in words else ""


def test_every_command_is_known() -> None:
    """The page types docker, kubectl and issuer, and enough of each."""
    typed = list(commands())
    assert {line.split()[0] for line in typed} == {"docker", "kubectl"}
    assert sum(line.startswith(IN_SERVER) for line in typed) >= 5


@pytest.mark.parametrize(
    "line", [one for one in commands() if one.startswith(IN_SERVER)], ids=lambda one: one[-30:]
)
def test_what_is_typed_in_the_server(line: str) -> None:
    """Each `issuer` command of the page is one, by the program's own grammar."""
    words = shlex.split(line.removeprefix(IN_SERVER).partition(" > ")[0])
    assert parser().parse_args(words).run


def test_what_kubectl_acts_upon_is_there() -> None:
    """Folders, workloads, pods and the ConfigMap of the page are those of the manifests."""
    known = objects()
    folders = set()
    for line in commands():
        words = shlex.split(line)
        if words[0] != "kubectl":
            continue
        if "-k" in words:
            folder = ROOT / words[words.index("-k") + 1]
            assert (folder / "kustomization.yaml").exists(), folder
            folders.add(folder.name)
        for word in words:
            kind, slash, name = word.partition("/")
            if slash and kind in KINDS:
                assert (KINDS[kind], namespace_of(words), name) in known, word
        if "configmap" in words:
            agent = next(one for one in written("base") if one["kind"] == "DaemonSet")
            volumes = agent["spec"]["template"]["spec"]["volumes"]
            names = {one["configMap"]["name"] for one in volumes if "configMap" in one}
            assert words[words.index("configmap") + 1] in names
    assert folders == {"base", "example"}
    assert ("StatefulSet", "spiffe-issuer", "spiffe-issuer-server") in known


def test_the_entries_are_for_what_the_manifests_run() -> None:
    """Namespace, account and cluster of the page's entries are the example's and the base's."""
    text = PAGE.read_text()
    accounts = {name for kind, _, name in objects() if kind == "ServiceAccount"}
    namespaces = {name for kind, _, name in objects() if kind == "Namespace"}
    assert set(re.findall(r"k8s:sa:(\S+)", text)) <= accounts
    assert set(re.findall(r"k8s:ns:(\S+)", text)) <= namespaces
    (settings,) = [
        one["data"]["server.yaml"]
        for one in written("base")
        if one["kind"] == "ConfigMap" and "server.yaml" in one["data"]
    ]
    (cluster,) = set(re.findall(r"k8s(?:_psat)?:cluster:(\S+)", text))
    assert f"name: {cluster}\n" in settings


def test_the_images_are_targets_of_the_dockerfile() -> None:
    """Each image that the page builds is a target, under the name that the manifests use."""
    dockerfile = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
    built = [shlex.split(line) for line in commands() if line.startswith("docker build")]
    assert built
    for words in built:
        target, image = words[words.index("--target") + 1], words[words.index("-t") + 1]
        assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.M)
        assert any(image in str(one) for one in written("base"))
