"""What we stand on: pinned, hashed, few, each with its reason; and what checks our own code."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETS = ("run", "dev")
MOST_DIRECT = 15


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0].lower()


def direct() -> set[str]:
    """The packages that a running server or agent is declared to need."""
    project = PROJECT["project"]
    return {
        name_of(one)
        for one in (*project["dependencies"], *project["optional-dependencies"]["server"])
    }


@pytest.mark.parametrize("name", SETS)
def test_sec_97_every_package_is_pinned_and_hashed(name: str) -> None:
    """SEC-97: each requirement has one version and its hashes, and names no address."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text.partition("\n")[2].strip())
    assert len(blocks) > 10
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+==[^ ]+ \\", block), block[:80]
        assert "--hash=sha256:" in block
    assert "://" not in text
    assert "--only-binary" in (ROOT / "tools" / "bootstrap.py").read_text()


def test_sec_97_few_and_each_with_a_reason() -> None:
    """SEC-97: 15 direct packages at most, and a line in the reference says why each."""
    page = (ROOT / "docs" / "reference" / "dependencies.md").read_text().lower()
    reasons = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")}
    assert len(direct()) <= MOST_DIRECT
    assert direct() - reasons == set()


def test_sec_97_the_pins_are_those_declared() -> None:
    """SEC-97: whatever is declared is pinned in the set that runs."""
    pinned = set(
        re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements/run.txt").read_text(), re.M)
    )
    assert direct() - pinned == set()


def test_sec_122_the_static_floor() -> None:
    """SEC-122: strict types, and every family of lint that the floor names."""
    ruff = PROJECT["tool"]["ruff"]["lint"]
    floor = {"S", "B", "ASYNC", "BLE", "DTZ", "LOG", "PLE", "RUF", "T20", "TID", "TRY"}
    assert floor <= set(ruff["select"])
    assert "S101" not in ruff["ignore"]
    assert PROJECT["tool"]["mypy"]["strict"] is True


def test_sec_122_no_silence_without_a_rule() -> None:
    """SEC-122: a suppressed finding names the rule that it suppresses."""
    bare = re.compile(r"# noqa(?!: [A-Z]+[0-9]+)|# type: ignore(?!\[)")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for package in ("spiffe_core", "spiffe_wire", "ca", "issuer", "workload_api", "demo")
        for path in (ROOT / package).rglob("*.py")
        if "pb" not in path.relative_to(ROOT).parts
        for match in bare.finditer(path.read_text())
    ]
    assert found == []
