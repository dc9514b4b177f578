"""The generated reference pages are current, and the same wherever they are made."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from issuer.cli.grammar import parser as issuer_parser
from issuer.config import ServerSettings
from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer
from spiffe_wire.k8s.objects import Container, Meta, Owner, Pod
from spiffe_wire.k8s.selectors import Surroundings, container_selectors, pod_selectors
from spiffe_wire.settings import rows
from tests.support.programs import environment
from tests.support.stack import ROOT
from workload_api.agent.config import AgentSettings
from workload_api.attestors.unix import UnixAttestor

REFERENCE = ROOT / "docs" / "reference"
PAGES = ("config.md", "cli.md", "metrics.md", "client.md")


def generate(
    *arguments: str, root: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess:
    """Run the tool, as `make docs` does."""
    return subprocess.run(
        [sys.executable, root / "tools" / "reference_docs.py", *arguments],
        capture_output=True, text=True, cwd="/", env={**environment(variables), **variables},
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tool reads, in a folder of another name, with no page in it yet."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("issuer", "workload_api", "spiffe_core", "spiffe_wire", "ca", "tools"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def test_the_pages_are_current() -> None:
    """What is committed is what the code says; `make docs` brings it up to date."""
    checked = generate("--check")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_same_everywhere(copy: Path) -> None:
    """Neither the terminal, nor the environment, nor the folder changes a page."""
    made = generate(
        root=copy, COLUMNS="40", SPIFFE_ISSUER_SOCKET="/elsewhere", NO_COLOR="1", LC_ALL="C",
        PYTHONPATH=str(copy),
    )  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")
    for name in PAGES:
        text = (copy / "docs" / "reference" / name).read_text()
        assert text == (REFERENCE / name).read_text()
        assert str(copy) not in text


def test_a_stale_page_is_named(copy: Path) -> None:
    """The check fails, says which page, and what to run; it changes nothing."""
    generate(root=copy, PYTHONPATH=str(copy))
    page = copy / "docs" / "reference" / "metrics.md"
    page.write_text(page.read_text() + "by hand\n")
    checked = generate("--check", root=copy, PYTHONPATH=str(copy))
    assert checked.returncode == 1
    assert checked.stderr == "docs/reference/metrics.md is stale: run `make docs`\n"
    assert page.read_text().endswith("by hand\n")


@pytest.mark.parametrize(
    ("kind", "role"), [(ServerSettings, "SERVER"), (AgentSettings, "AGENT")]
)
def test_every_setting_is_there(kind: type, role: str) -> None:
    """Every key stands in config.md with its environment variable."""
    page = (REFERENCE / "config.md").read_text()
    for row in rows(kind):
        variable = f"`SPIFFE_ISSUER_{role}_{row.path.upper().replace('.', '__')}`"
        if "[]" in row.path:
            variable = "file alone"
        (line,) = [
            one
            for one in page.splitlines()
            if one.startswith(f"| `{row.path}` |") and variable in one
        ]
        assert row.doc in line


def test_every_command_is_there() -> None:
    """Every command of the grammar is a heading of cli.md, which opens with the exit codes."""
    page = (REFERENCE / "cli.md").read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings[0] == "Exit codes"
    (commands,) = [one for one in issuer_parser()._actions if one.dest == "==SUPPRESS=="]
    for name in commands.choices or ():
        assert f"### issuer {name}" in page


async def test_sec_32_sec_35_every_selector_is_explained() -> None:
    """SEC-32, SEC-35: for each selector of a real process, who can set it, and its limits."""
    page = (REFERENCE / "selectors.md").read_text()
    explained = dict(re.findall(r"^\| `unix:(\w+):[A-Z]+` \|.*?\| (.*)\|$", page, re.MULTILINE))
    peer = UnixPeer(
        os.getpid(),
        os.geteuid(),
        os.getegid(),
        PeerProof.PIDFD,
        PidFd(os.pidfd_open(os.getpid())),
    )
    attestor = UnixAttestor()
    try:
        found = {one.value.partition(":")[0] for one in (await attestor.attest(peer)).selectors}
    finally:
        attestor.close()
    assert {"uid", "gid", "path", "sha256"} <= found
    assert found <= set(explained)
    for weak in ("path", "sha256"):
        who, limits = explained[weak].strip().split(" | ")
        assert who == "**any process of the same user**"
        assert "see below" in limits
    assert "always name `uid` beside them" in page
    assert "marked\npartial (SEC-35)" in page


def test_sec_35_every_selector_of_pods_is_explained() -> None:
    """SEC-35: each `k8s` selector the code can yield has a row that says who can set it."""
    page = (REFERENCE / "selectors.md").read_text()
    rows_ = dict(re.findall(r"^\| `k8s:([a-z-]+):[^`]+` \|.*?\|(.*)\|$", page, re.MULTILINE))
    meta = Meta("u", "n", "", {"a": "b"})
    around = Surroundings("prod", meta, meta, namespace_labels=True)
    containers = tuple(
        Container(one, "i:1", "sha256:x", is_init=one == "init", has_status=True)
        for one in ("web", "init")
    )
    pod = Pod(
        "u",
        "n",
        "shop",
        "web",
        "node",
        "10.0.0.1",
        {"app": "web"},
        (Owner("ReplicaSet", "web", "u"),),
        containers,
    )
    found = pod_selectors(pod, around) | container_selectors(containers[0])
    assert {one.value.partition(":")[0] for one in found} == set(rows_)
    assert all(len(row.split("|")) == 2 and all(row.split("|")) for row in rows_.values())
