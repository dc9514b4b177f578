"""What a tier of tests lacks is installed where that is possible, and named where it is not."""

from pathlib import Path

import pytest

from tools import tiers


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine, whose apt knows the package ``tool`` and puts down what it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(tiers, "POLICY", tmp_path / "policy-rc.d")
    program(
        folder / "apt-get",
        f'echo "$@" >> {tmp_path}/asked',
        f"test -x {tmp_path}/policy-rc.d && echo held >> {tmp_path}/services",
        f'case "$*" in *" install "*tool*) echo > {folder}/made-up-tool;'
        f" /bin/chmod +x {folder}/made-up-tool;; esac",
    )
    return tmp_path


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def asked(machine: Path) -> list[str]:
    """The packages that apt was told to install."""
    lines = (machine / "asked").read_text().splitlines()
    (install,) = [line for line in lines if " install " in line]
    return install.rpartition("--no-install-recommends ")[2].split()


def test_only_what_is_missing_is_installed(machine: Path) -> None:
    """What is there is left alone; what apt does not have is missing still."""
    program(machine / "bin" / "made-up-present")
    names = ("made-up-present", "made-up-tool", "made-up-other")
    packages = dict(zip(names, ("present", "tool", "other"), strict=True))
    assert tiers.install(packages) == ["made-up-other"]
    assert asked(machine) == ["other", "tool"]


def test_nothing_is_asked_of_apt_where_all_is_there(machine: Path) -> None:
    """A machine that has everything is not touched."""
    program(machine / "bin" / "made-up-present")
    assert tiers.install({"made-up-present": "present"}) == []
    assert not (machine / "asked").exists()


def test_no_service_is_started(machine: Path) -> None:
    """While apt installs, a policy forbids every start; afterwards it is gone."""
    tiers.install({"made-up-tool": "tool"})
    assert (machine / "services").read_text().split() == ["held", "held"]
    assert not (machine / "policy-rc.d").exists()


def test_a_policy_of_the_machine_stays(machine: Path) -> None:
    """Where the machine has a policy of its own, that decides, and it is kept."""
    program(machine / "policy-rc.d", "exit 0")
    before = (machine / "policy-rc.d").read_text()
    tiers.install({"made-up-tool": "tool"})
    assert (machine / "policy-rc.d").read_text() == before


def test_the_plain_tier_names_what_is_not_here(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each program that tests would use is named once, with what to do, and nothing is done."""
    monkeypatch.setattr(tiers, "absent", list)
    assert tiers.main([]) == 0
    said = capsys.readouterr().err.splitlines()
    for name in (*tiers.PEERS, "javac"):
        assert sum(f"left out: tests with {name}:" in line for line in said) == 1, name
    assert not (machine / "asked").exists()
