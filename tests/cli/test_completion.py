"""Shell completion, in a real bash; and help, which must be cheap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import environment
from tests.support.stack import ROOT

SCRIPT = """
set -u
issuer() {{ {python} -m issuer "$@"; }}
issuer-agent() {{ {python} -m workload_api.agent "$@"; }}
source <({program} completion bash)
function_of() {{ local words; words=($(complete -p {program})); echo "${{words[-2]}}"; }}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMPREPLY=()
"$(function_of)" {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completions(line: str, cwd: Path = ROOT) -> set[str]:
    """What bash offers for the last word of *line*, which may be empty."""
    words = " ".join(f'"{word}"' for word in line.split(" "))
    script = SCRIPT.format(python=sys.executable, program=line.split(" ")[0], words=words)
    ran = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment(), cwd=cwd, capture_output=True,
        text=True, timeout=30,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("issuer e", {"entry", "explain"}, {"token"}),
        ("issuer entry ", {"create", "show", "delete", "count"}, {"mint"}),
        ("issuer entry create --sp", {"--spiffe-id"}, {"--parent-id"}),
        ("issuer entry create --spiffe-id x -o ", {"text", "json", "yaml"}, {"--hint"}),
        ("issuer bundle delete --mode d", {"delete", "dissociate"}, {"restrict"}),
        ("issuer-agent f", {"fetch"}, {"watch"}),
        ("issuer-agent fetch ", {"x509", "jwt", "bundles"}, {"watch"}),
        ("issuer-agent fetch x509 --w", {"--write"}, {"--audience"}),
    ],
)
def test_bash_completes(line: str, offered: set[str], not_offered: set[str]) -> None:
    """Sourced as the manual says, the script offers commands, options and values."""
    found = completions(line)
    assert offered <= found
    assert not not_offered & found


def test_bash_completes_files(tmp_path: Path) -> None:
    """Where a file or a folder is wanted, bash offers those that are there."""
    (tmp_path / "server.yaml").touch()
    (tmp_path / "some-folder").mkdir()
    assert completions("issuer server run -c s", tmp_path) == {"server.yaml", "some-folder"}
    assert completions("issuer dev --keep s", tmp_path) == {"some-folder"}


@pytest.mark.parametrize("module", ["issuer", "workload_api.agent"])
@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(module: str, shell: str) -> None:
    """There is a script for zsh and tcsh that names every command."""
    ran = subprocess.run(
        [sys.executable, "-m", module, "completion", shell],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = {"issuer": ("entry", "explain"), "workload_api.agent": ("fetch", "whoami")}[module]
    assert all(word in ran.stdout for word in words)
    assert ran.stderr == ""


def test_zsh_accepts_its_script() -> None:
    """Zsh itself parses the script, where there is a zsh."""
    ran = subprocess.run(
        ["bash", "-c", f"command -v zsh >/dev/null || exit 77; {sys.executable} -m issuer "
         "completion zsh | zsh -n"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode == 77:
        pytest.skip("there is no zsh on this machine")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [(["--help"], set()), (["--version"], {"argparse"}), (["entry", "create", "--help"],
                                                          {"argparse"})],
)  # fmt: skip
@pytest.mark.parametrize("module", ["issuer.cli", "workload_api.agent.cli"])
def test_help_is_cheap(module: str, arguments: list[str], allowed: set[str]) -> None:
    """The first page of help imports nothing that costs; the others import argparse alone."""
    if module != "issuer.cli" and arguments[0] == "entry":
        arguments = ["fetch", "x509", "--help"]
    code = (
        f"import sys; from {module} import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('\\n', *sorted(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    costly = {
        "argparse", "asyncio", "cryptography", "dataclasses", "google.protobuf", "grpc", "rich",
        "sqlalchemy", "typing", "yaml",
    }  # fmt: skip
    found = costly & set(ran.stdout.splitlines()[-1].split())
    # Where typing is there before we are (a start-up hook), it is nothing of ours.
    assert found - _at_start() <= allowed | ({"typing"} if allowed else set())


def _at_start() -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(ran.stdout.split())


def test_help_fits_the_terminal() -> None:
    """Help is as wide as COLUMNS says."""
    for columns in (60, 120):
        ran = subprocess.run(
            [sys.executable, "-m", "issuer", "entry", "create", "--help"],
            cwd=ROOT, env={**environment(), "COLUMNS": str(columns)}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        widest = max(map(len, ran.stdout.splitlines()))
        assert columns - 30 < widest <= columns
    assert os.environ.get("COLUMNS") != "60"
