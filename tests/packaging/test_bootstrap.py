"""The set-up works where Debian's python3-venv, or a new enough pip, is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_ENSUREPIP = """#!/bin/sh
case "$*" in
  *"-m venv --without-pip"*) exec {python} "$@" ;;
  *"-m venv"*) mkdir -p "$3/bin"; echo "ensurepip is not available" >&2; exit 1 ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/bootstrap.py, whose environment lies in a folder of the test."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    return module


def test_a_machine_without_ensurepip(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `python -m venv` fails for want of ensurepip, pip from outside fills the folder."""
    base = getattr(sys, "_base_executable", sys.executable)
    python = tmp_path / "python3"
    python.write_text(WITHOUT_ENSUREPIP.format(python=base))
    python.chmod(0o755)
    monkeypatch.setattr(bootstrap, "find_python", lambda: str(python))

    bootstrap.make_venv()

    assert bootstrap.works()
    pip = bootstrap.pip_command()
    assert pip[-2:] == ["--python", str(bootstrap.PYTHON)]
    listed = subprocess.run(
        [*pip, "list", "--disable-pip-version-check"], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert "cryptography" not in listed.stdout, "it looks into the new environment alone"


def test_no_pip_anywhere_says_what_to_do(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no pip at all the set-up names what to install."""
    monkeypatch.setattr(bootstrap, "find_python", lambda: str(tmp_path / "nothing"))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bootstrap.VENV], check=True)

    with pytest.raises(bootstrap.Refused, match="install python3-venv"):
        bootstrap.pip_command()


def test_an_old_python_says_what_to_do(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Python before 3.11 and no newer one on the PATH the set-up says so."""
    monkeypatch.setattr(bootstrap, "OLDEST", (99, 0))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
    with pytest.raises(bootstrap.Refused, match=r"Python 3\.11 or newer"):
        bootstrap.find_python()


def test_wrong_use_is_explained() -> None:
    """Anything but `run` or `dev` is wrong usage."""
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "bootstrap.py", "everything"],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath},
    )
    assert ran.returncode == 2
    assert "run|dev" in ran.stderr
