"""
Make the project's own ``.venv`` and install what is pinned, once.

Usage: ``python3 tools/bootstrap.py run|dev``.  Standard library only, because nothing
is installed yet.  Works without root, without an active virtual environment, and where
Debian's ``python3-venv`` is missing (then pip from outside installs into the folder).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST = (3, 11)
SETS = {"run": ("run",), "dev": ("run", "dev")}


def main(arguments: list[str]) -> int:
    """Install the named set; return 0, or 1 with a line that says what to do."""
    if len(arguments) != 1 or arguments[0] not in SETS:
        print(__doc__, file=sys.stderr)
        return 2
    wanted = arguments[0]
    # Two `make` in two terminals must not install over each other.
    with (ROOT / ".bootstrap.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return install(wanted)
        except Refused as refusal:
            print(f"cannot set up: {refusal}", file=sys.stderr)
            return 1


class Refused(Exception):
    """Why the set-up cannot go on, and what to do next."""


def install(wanted: str) -> int:
    """Create the environment and install *wanted*, unless that is done already."""
    stamp = VENV / f".installed-{wanted}"
    mark = fingerprint(wanted)
    if stamp.exists() and stamp.read_text() == mark and works():
        return 0
    started = time.monotonic()
    print(
        f"setting up .venv for `{wanted}`, once: pinned and hashed packages …", file=sys.stderr
    )
    make_venv()
    pip = pip_command()
    requirements = ROOT / "requirements" / f"{wanted}.txt"
    run(
        [
            *pip,
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "-r",
            str(requirements),
        ]
    )
    # The project itself, in place: its build backend is among the hashed packages.
    run(
        [
            *pip,
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            "--no-build-isolation",
            "--editable",
            str(ROOT),
        ]
    )
    for name in SETS[wanted]:
        (VENV / f".installed-{name}").write_text(fingerprint(name))
    print(f"set up in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


def fingerprint(name: str) -> str:
    """What the installed set depends on; a change of any of it installs again."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "requirements" / f"{name}.txt", ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at this folder
    return digest.hexdigest()


def works() -> bool:
    """True when the environment's interpreter still runs."""
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0


def make_venv() -> None:
    """Create ``.venv``, with pip if this machine can, else without."""
    if works():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    interpreter = find_python()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([interpreter, "-m", "venv", VENV], check=False, **quiet).returncode == 0:
        return
    # Debian without python3-venv: ensurepip is missing and the folder is half made.
    shutil.rmtree(VENV, ignore_errors=True)
    run([interpreter, "-m", "venv", "--without-pip", str(VENV)])


def find_python() -> str:
    """The interpreter to build on: this one if new enough, else a newer one on the PATH."""
    if sys.version_info >= OLDEST:
        # Never the interpreter of somebody's active environment: its base.
        return getattr(sys, "_base_executable", None) or sys.executable
    for minor in (14, 13, 12, 11):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise Refused("Python 3.11 or newer is needed; install it and run again")


def pip_command() -> list[str]:
    """How to call pip for ``.venv``: its own, or one from outside pointed at it."""
    own = [str(PYTHON), "-m", "pip"]
    if subprocess.run([*own, "--version"], check=False, capture_output=True).returncode == 0:
        return own
    for outside in ([find_python(), "-m", "pip"], ["pip3"], ["pip"]):
        if not shutil.which(outside[0]):
            continue
        asked = subprocess.run(
            [*outside, "--python", str(PYTHON), "--version"], check=False, capture_output=True
        )
        if asked.returncode == 0:
            return [*outside, "--python", str(PYTHON)]
    raise Refused("no pip of version 22.3 or newer found; install python3-venv or a newer pip")


def run(command: list[str]) -> None:
    """Run one step; its own output says what went wrong."""
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    if subprocess.run(command, check=False, env=environment).returncode != 0:
        raise Refused("the step above failed: " + " ".join(command[:4]) + " …")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
