"""
Images for an engine that reaches no registry, made of this machine's programs.

`base_image` is to our Dockerfiles what a slim image with Python is: the interpreter with its
standard library, a shell, the few programs that RUN lines call, the libraries of all these, and
a package index in a folder, so that pip there finds exactly what is pinned.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.support.stack import ROOT

INDEX = Path("/wheels")
"""Where the base image has its package index."""
WHEELS = ROOT / ".cache" / "wheels"
"""Kept from one run of the tests to the next."""
_PROGRAMS = ("sh", "rm", "mkdir", "chown")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "idlelib", "tkinter", "turtledemo",
             "lib2to3"}  # fmt: skip
_DEBIANS_PIP = Path("/usr/share/python-wheels")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


class Layer:
    """The files of an image, all of them root's and in true folders."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._data, mode="w")  # noqa: SIM115 see tar()
        self._there: set[str] = set()

    def folder(self, path: Path, mode: int = 0o755) -> None:
        """Make a folder, and those above it."""
        name = str(path).strip("/")
        if not name or name in self._there:
            return
        self.folder(path.parent)
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self._tar.addfile(entry)
        self._there.add(name)

    def write(self, path: Path, content: bytes, mode: int = 0o644) -> None:
        """Make a file, once."""
        name = str(path).strip("/")
        if name not in self._there:
            self.folder(path.parent)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            self._tar.addfile(entry, io.BytesIO(content))
            self._there.add(name)

    def copy(self, source: Path, path: Path | None = None) -> None:
        """Have a file of this machine in it, at the same *path* if no other is said."""
        mode = 0o755 if os.access(source, os.X_OK) else 0o644
        self.write(path or source, source.read_bytes(), mode)

    def programs(self, files: Iterable[Path]) -> None:
        """The libraries of these files."""
        for one in libraries(files):
            self.copy(one)

    def link(self, path: Path, target: Path) -> None:
        """Make a symbolic link."""
        self.folder(path.parent)
        entry = tarfile.TarInfo(str(path).strip("/"))
        entry.type, entry.linkname = tarfile.SYMTYPE, str(target)
        self._tar.addfile(entry)

    def tar(self) -> bytes:
        """The whole, for ``docker import``."""
        self._tar.close()
        return self._data.getvalue()


def libraries(files: Iterable[Path]) -> set[Path]:
    """The shared libraries that *files* need, and the loader, where the loader finds them."""
    listed = subprocess.run(("ldd", *files), capture_output=True, text=True, check=True)
    return {Path(one) for one in _LIBRARY.findall(listed.stdout)}


def why_no_base() -> str | None:
    """Why `base_image` cannot be made here; None when it can."""
    bundled = Path(_standard_library(), "ensurepip", "_bundled")
    if not (any(bundled.glob("pip-*.whl")) or any(_DEBIANS_PIP.glob("pip-*.whl"))):
        return "needs ensurepip for the images' Python (Debian: python3-venv)"
    return None


def _standard_library() -> Path:
    return Path(os.__file__).parent


def base_image() -> bytes:
    """What the base of the Dockerfiles needs to have; with ENV PIP_INDEX_URL=file:///wheels."""
    layer = Layer()
    layer.folder(Path("/tmp"), 0o1777)
    python = Path(sys.executable).resolve()
    library = _standard_library()
    extensions = []
    for folder, folders, files in os.walk(library):
        folders[:] = [
            one for one in folders if one not in _LEFT_OUT and not one.startswith("config-")
        ]
        for file in (Path(folder, one) for one in files):
            layer.copy(file)
            extensions += [file] if file.suffix == ".so" else []
    for file in _DEBIANS_PIP.glob("*.whl"):
        layer.copy(file)
    layer.copy(python)
    layer.link(Path("/usr/local/bin/python3"), python)
    programs = [_program(name) for name in _PROGRAMS]
    for file in programs:
        layer.copy(file, Path("/bin", file.name))
    # Packages bring libraries along, save those that each slim image has.
    packages = Path(sys.prefix).rglob("*.so")
    layer.programs([python, *extensions, *programs, *_of_packages(packages)])
    _index(layer)
    return layer.tar()


def _program(name: str) -> Path:
    for folder in ("/bin", "/usr/bin"):
        if (file := Path(folder, name)).exists():
            return file
    raise FileNotFoundError(name)


def _of_packages(files: Iterable[Path]) -> list[Path]:
    wanted = ("cygrpc", "_rust", "_greenlet", "loop")
    return [file for file in files if file.name.startswith(wanted)]


def _index(layer: Layer) -> None:
    """The pinned packages, as pip finds them by ``PIP_INDEX_URL=file:///wheels``."""
    pinned = ROOT / "requirements" / "run.txt"
    WHEELS.mkdir(parents=True, exist_ok=True)
    if not _download(pinned, "--no-index", "--find-links", str(WHEELS)):
        assert _download(pinned), "pip cannot download what requirements/run.txt names"
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+) ", pinned.read_text(), re.M):
        name = re.sub(r"[-_.]+", "-", name).lower()
        (wheel,) = WHEELS.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        layer.copy(wheel, INDEX / name / wheel.name)
        page = f'<a href="{wheel.name}">{wheel.name}</a>'
        layer.write(INDEX / name / "index.html", page.encode())


def _download(pinned: Path, *options: str) -> bool:
    """Have every wheel of *pinned* in WHEELS, with the hash that is named there."""
    done = subprocess.run(
        (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", WHEELS,
         "--requirement", pinned, *options),
        capture_output=True,
        timeout=120,
    )  # fmt: skip
    return done.returncode == 0


def one_program(source: Path, path: Path) -> bytes:
    """An image with one program and its libraries, and nothing else."""
    layer = Layer()
    layer.folder(Path("/tmp"), 0o1777)
    layer.copy(source, path)
    layer.programs([source])
    return layer.tar()
