"""Rules about the tree itself: sizes, places, words that must not appear."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spiffe_core", "spiffe_wire", "ca", "issuer", "workload_api")
MAX_LINES = 500

# Files that may be longer, each with its reason; this list only shrinks.
LONGER: dict[str, str] = {}


def product_files() -> list[Path]:
    """Every Python file of the product that a person wrote."""
    return [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "pb" not in path.relative_to(ROOT).parts
    ]


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    """A file over 500 lines has its reason in the list above."""
    if str(path.relative_to(ROOT)) not in LONGER:
        assert len(path.read_text().splitlines()) <= MAX_LINES


def test_sec_96_no_code_from_data() -> None:
    """SEC-96: no pickle, eval, unsafe YAML or shell in server and agent."""
    forbidden = re.compile(
        r"^\s*(import|from) (pickle|marshal|shelve)\b|(?<![\w.])eval\(|(?<![\w.])exec\("
        r"|yaml\.(load|full_load|unsafe_load)\(|shell=True|os\.system\(|os\.popen\(",
        re.MULTILINE,
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in product_files()
        for match in forbidden.finditer(path.read_text())
    ]
    assert found == []


def test_no_unfinished_place() -> None:
    """No stub and no note-to-self in code that a user can reach."""
    unfinished = re.compile(r"raise NotImplementedError|#\s*(TODO|FIXME|XXX)\b")
    found = [str(path) for path in product_files() if unfinished.search(path.read_text())]
    assert found == []


def test_the_repository_names_no_machine() -> None:
    """No path of one machine and no registry's host name in any tracked file."""
    # Joined here, so that this file does not find itself.
    words = [
        "/" + "work/",
        "files.python" + "hosted.org",
        "pypi." + "org",
        "registry.npm" + "js",
    ]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = [
        f"{name}: {word}"
        for name in tracked
        if (ROOT / name).is_file()
        for word in words
        if word in (ROOT / name).read_text(errors="replace")
    ]
    assert found == []


def test_sec_46_no_key_in_the_product() -> None:
    """SEC-46: no built-in, default or test key ships with the packages."""
    found = [
        str(path)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and b"PRIVATE KEY-----\nM" in path.read_bytes()
    ]
    assert found == []
