"""
Who plays: how the demo's processes differ, and how strong that difference is.

As root they run under uids of their own, which the kernel keeps apart.  As an ordinary user
they are copies of the interpreter at different paths, which only tells programs apart that
do not mean to deceive (SEC-32).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Unused on any machine we know; nothing is owned by them, no account is needed.
FIRST_UID = 61_000
# What the demo's program imports; copied where other uids cannot read the originals.
LIBRARIES = (
    "spiffe",
    "grpc",
    "google",
    "cryptography",
    "jwt",
    "cffi",
    "_cffi_backend*",
    "pycparser",
    "typing_extensions*",
    "pem",
    "pyasn1",
    "pyasn1_modules",
    "*_pb2*",
)
# A copy must not pick up what the distribution keeps beside its interpreter.
NO_SITE = ("-S",)
OURS = ("spiffe_core", "demo")


@dataclass(frozen=True, slots=True)
class Role:
    """One process to be: how to start it, and the selectors that will be attested."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    uid: int | None
    selectors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """Every role, how they are told apart, and how strong that is."""

    roles: Mapping[str, Role]
    told_apart_by: str
    strength: str


def cast(names: Sequence[str], folder: Path) -> Cast:
    """
    Give every name a process of its own identity; what has to be copied goes to *folder*.

    *folder* must be one that other uids can enter when this user is root.
    """
    root = Path(__file__).resolve().parent.parent
    if os.geteuid() == 0:
        command, environment = _for_other_uids(root, folder)
        if command is not None:
            return Cast(
                {
                    name: Role(name, command, environment, uid, (f"unix:uid:{uid}",))
                    for uid, name in enumerate(names, FIRST_UID)
                },
                "uid",
                "strong: the kernel keeps users apart",
            )
    return Cast(
        {name: _by_executable(name, root, folder) for name in names},
        "executable",
        "weak: one user's programs can imitate each other; as root the demo uses uids",
    )


def _for_other_uids(root: Path, folder: Path) -> tuple[Sequence[str] | None, Mapping[str, str]]:
    """A command that any uid can run, copying the runtime only when it must."""
    plain = (sys.executable, "-m", "demo.workload")
    environment = {"PYTHONPATH": str(root)}
    if _runs(plain[0], environment):
        return plain, environment
    runtime = folder / "runtime"
    home = _copy_interpreter(runtime)
    site = runtime / "site"
    site.mkdir()
    origin = Path(sysconfig.get_path("platlib"))
    for pattern in LIBRARIES:
        for found in origin.glob(pattern):
            _copy(found, site / found.name)
    for package in OURS:
        _copy(root / package, site / package)
    for path in [runtime, *runtime.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    environment = {**home, "PYTHONPATH": str(site)}
    command = (str(runtime / "bin" / "python"), *NO_SITE, "-m", "demo.workload")
    return (command, environment) if _runs(command[0], environment) else (None, {})


def _by_executable(name: str, root: Path, folder: Path) -> Role:
    """A copy of the interpreter under a path of its own; libraries stay where they are."""
    place = folder / "programs" / name
    home = _copy_interpreter(place, library=False)
    environment = {
        **home,
        "PYTHONPATH": os.pathsep.join([str(root), sysconfig.get_path("platlib")]),
    }
    program = place / "bin" / "python"
    uid = os.geteuid()
    return Role(
        name,
        (str(program), *NO_SITE, "-m", "demo.workload"),
        environment,
        None,
        (f"unix:uid:{uid}", f"unix:path:{program}"),
    )


def _copy_interpreter(place: Path, *, library: bool = True) -> Mapping[str, str]:
    """Copy the interpreter, and its library if asked; return what it needs to find it."""
    (place / "bin").mkdir(parents=True)
    base = Path(sys.base_prefix)
    shutil.copy2(Path(sys.executable).resolve(), place / "bin" / "python")
    environment = {"PYTHONHOME": str(base), "LD_LIBRARY_PATH": str(base / "lib")}
    if not library:
        return environment
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(
        base / "lib" / name,
        place / "lib" / name,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            "site-packages", "test", "tests", "idlelib", "__pycache__", "config-*"
        ),
    )
    for shared in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, place / "lib" / shared.name, follow_symlinks=False)
    return {"PYTHONHOME": str(place), "LD_LIBRARY_PATH": str(place / "lib")}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    else:
        shutil.copy2(source, target)


def _runs(program: str, environment: Mapping[str, str]) -> bool:
    """True when another uid can start *program* and import what the workload imports."""
    try:
        tried = subprocess.run(
            [program, "-c", "import demo.workload"],
            env={**environment, "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            user=FIRST_UID,
            group=FIRST_UID,
            extra_groups=[],
            capture_output=True,
            check=False,
            timeout=30,
        )
    except OSError:  # a folder above it is closed to others, or setuid() is not for us
        return False
    return tried.returncode == 0
