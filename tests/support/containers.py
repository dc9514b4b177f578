"""
Real containers: an engine of our own, apart from any that runs on this machine.

It has a folder, a network and mounts of its own; what it mounts goes when it ends.  Its one
image is empty: the programs of this machine are mounted into each container, read-only, so
that the same Python runs inside and nothing is downloaded.  What is real about a container is
what an agent looks at: its namespaces, its cgroup (also a pod's), its processes.
"""

import asyncio
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "local/host-files:1"
PATIENCE = 30.0
"""Seconds after which an engine that does not answer has failed."""
INSIDE = Path("/run/spiffe")
"""Where a container finds the folder of the Workload API's socket."""
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_NEEDED = ("docker", "dockerd", "containerd", "runc", "setpriv", "unshare")
# Those of a kubelet of this machine are not ours to remove.
_TOPS = ("docker", "libpod_parent", "kubepods", "kubelet/kubepods")
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def why_not(*programs: str) -> str | None:
    """Why no engine can run here; None when it can."""
    if os.geteuid() != 0:
        return "needs root: it starts a container engine"
    if not _may_administrate():
        return "needs CAP_SYS_ADMIN, which this root has not: it starts a container engine"
    missing = [name for name in programs or _NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (`make test-docker` installs it by apt as root)"
    return None


class EngineError(Exception):
    """The engine did not do what it was asked; says what it said."""


@dataclass(frozen=True)
class Container:
    """A container, running or not."""

    engine: "Engine"
    id: str
    """64 hexadecimal digits."""

    async def start(self) -> Self:
        """Start it, and leave it to itself."""
        await self.engine.docker("start", self.id)
        return self

    async def inspect(self) -> Any:
        """All that the engine knows of it."""
        return json.loads(await self.engine.docker("inspect", "--type", "container", self.id))[
            0
        ]

    async def pid(self) -> int:
        """Its first process, as this machine numbers it; it must run."""
        pid = int((await self.inspect())["State"]["Pid"])
        assert pid, "the container does not run"
        return pid

    async def pids(self) -> list[int]:
        """All its processes, as this machine numbers them."""
        lines = (await self.engine.docker("top", self.id, "-o", "pid")).splitlines()
        return [int(line) for line in lines[1:]]

    async def address(self) -> str:
        """Its IP address in the engine's network."""
        return str((await self.inspect())["NetworkSettings"]["IPAddress"])

    async def run(self, *command: str, user: str = "0") -> str:
        """Run one more program in it to its end, and return what it printed."""
        return await self.engine.docker("exec", "--user", user, self.id, *command)

    async def kill(self) -> None:
        """End its processes; the engine still knows it."""
        await self.engine.docker("kill", self.id)
        await self.engine.docker("wait", self.id)

    async def remove(self) -> None:
        """End it and have the engine forget it."""
        await self.engine.docker("rm", "--force", "--volumes", self.id)

    def attached(self) -> tuple[str, ...]:
        """The command that starts it and is its standard input and output."""
        return (self.engine.program, "start", "--attach", "--interactive", self.id)


class Engine:
    """A Docker engine in a folder of its own, as a context manager."""

    program = shutil.which("docker", path=_PATH) or "docker"
    options: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="si-e"))
        self.socket = self.folder / "engine.sock"
        self._cgroups = {"docker", "libpod_parent"}
        self.environment = {
            "PATH": _PATH,
            "HOME": str(self.folder),
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(self.folder / "client"),
        }

    def daemon(self) -> Sequence[str]:
        """Its command."""
        settings = self.folder / "daemon.json"
        settings.write_text("{}")  # or it would read those of an engine of this machine
        return (
            "dockerd",
            *("--config-file", str(settings)),
            *("--data-root", str(self.folder / "data")),
            *("--exec-root", str(self.folder / "run")),
            *("--pidfile", str(self.folder / "pid")),
            *("--host", f"unix://{self.socket}"),
            # Nothing has to leave the engine's own network.
            *("--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),
        )

    def __enter__(self) -> Self:
        self._before = _standing(_TOPS)
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                # Started by the main thread: it must not outlive a test run that is killed.
                ("setpriv", "--pdeathsig", "TERM", "unshare", "--net", "--mount",
                 "--propagation", "slave", *self.daemon()),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_ready()
            subprocess.run(
                (self.program, "import", "-", IMAGE),
                env=self.environment,
                input=_image(),
                check=True,
                capture_output=True,
                timeout=PATIENCE,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            found = self._ask("ps", "--all", "--quiet", "--no-trunc").split()
            if found:
                self._ask("rm", "--force", "--volumes", *found)
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _remove_cgroups(_standing(self._cgroups) - self._before)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The daemon: whose network the containers with ``--network host`` have."""
        return self._process.pid

    def said(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    async def docker(self, *arguments: str) -> str:
        """
        Have its client do something, and return what that printed.

        Raises:
            EngineError: it could not; with what it said.
        """
        process = await asyncio.create_subprocess_exec(
            self.program,
            *arguments,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise EngineError(f"docker {arguments[0]}: {err.decode().strip()}")
        return out.decode().strip()

    async def create(
        self,
        *command: str,
        cgroup: str = "",
        sockets: Path | None = None,
        folders: Sequence[Path] = (),
        network: str = "none",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> Container:
        """
        Make a container that will run *command* with this machine's programs.

        *cgroup* is its parent, such as `pod_cgroup`; *sockets* the folder it finds as `INSIDE`;
        *folders* it may write to, and finds where they are here.
        """
        mounts = [(one, one) for one in host_files()]
        mounts += [(sockets, INSIDE)] if sockets else []
        words = ["--interactive", "--network", network, "--env", f"PYTHONPATH={ROOT}"]
        words += ["--env", "PYTHONDONTWRITEBYTECODE=1", "--workdir", "/"]
        if cgroup:
            self._cgroups.add(cgroup)
            words += ["--cgroup-parent", cgroup]
        for source, target in mounts:
            words += ["--mount", f"type=bind,src={source},dst={target},readonly"]
        for folder in folders:
            words += ["--mount", f"type=bind,src={folder},dst={folder}"]
        if sockets:
            words += ["--env", f"SPIFFE_ENDPOINT_SOCKET=unix://{INSIDE}/workload.sock"]
        for name, value in (environment or {}).items():
            words += ["--env", f"{name}={value}"]
        container = await self.docker(
            "create", *words, *self.options, *options, IMAGE, *command
        )
        return Container(self, container)

    def _ask(self, *arguments: str) -> str:
        return subprocess.run(
            (self.program, *arguments),
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        ).stdout

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            if self.socket.exists():
                with contextlib.suppress(subprocess.SubprocessError):
                    self._ask("version")
                    return
            time.sleep(0.02)
        raise EngineError(f"the engine does not start: {self.said()}")


class Podman(Engine):
    """Podman behind the same interface, as its service speaks it; it attaches to nothing."""

    # Its own defaults are above what a root without CAP_SYS_RESOURCE may set.
    options = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")

    def daemon(self) -> Sequence[str]:
        """Its command."""
        return (
            "podman",
            *("--root", str(self.folder / "data")),
            *("--runroot", str(self.folder / "run")),
            *("--tmpdir", str(self.folder / "tmp")),
            *("--runtime", "runc", "--cgroup-manager", "cgroupfs"),
            *("--events-backend", "none", "--log-level", "warn"),
            *("system", "service", "--time", "0", f"unix://{self.socket}"),
        )


def pod_cgroup(uid: str, quality: str = "besteffort", root: str = "/kubelet/kubepods") -> str:
    """
    Where a kubelet with the cgroupfs driver puts a pod's containers.

    *root* is that of a kubelet which is told so, as kind does: one that runs on this machine
    ends whatever it does not know below ``/kubepods``.
    """
    return f"{root}/pod{uid}" if quality == "guaranteed" else f"{root}/{quality}/pod{uid}"


def a_kubelet_runs() -> bool:
    """Whether ``/kubepods`` belongs to somebody."""
    return bool(_standing(["kubepods"]))


def python(*arguments: str) -> tuple[str, ...]:
    """A command that runs this Python, inside as outside."""
    return (sys.executable, "-u", *arguments)


def host_files() -> Iterator[Path]:
    """The folders that the programs of this machine need, none inside another."""
    kept: list[Path] = []
    links = [Path("/", name) for name in _LINKS]
    folders = [one for one in links if one.is_dir() and not one.is_symlink()]
    prefixes = (Path(one) for one in (sys.base_prefix, sys.prefix))
    for one in (Path("/usr"), *folders, ROOT, *prefixes):
        if not any(one.is_relative_to(other) for other in kept):
            kept.append(one)
    return iter(kept)


def _may_administrate() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return bool(effective >> 21 & 1)


def _image() -> bytes:
    """An image with places to mount on, and the links that stand beside ``/usr``."""
    made: dict[str, str | None] = {"tmp": None, str(INSIDE).strip("/"): None}
    for name in _LINKS:
        if Path("/", name).is_symlink():
            made[name] = os.readlink(f"/{name}")
    for folder in host_files():
        for one in (*reversed(folder.parents[:-1]), folder):
            made[str(one).strip("/")] = None
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, target in made.items():
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if target is None else tarfile.SYMTYPE
            entry.mode = 0o1777 if name == "tmp" else 0o755
            entry.linkname = target or ""
            tar.addfile(entry)
    return data.getvalue()


# What an engine leaves behind: cgroups


def hierarchies() -> list[Path]:
    """Where cgroups are, on any sort of machine."""
    with open("/proc/self/mounts") as mounts:
        lines = [line.split() for line in mounts]
    return [Path(line[1]) for line in lines if line[2] in ("cgroup", "cgroup2")]


def _standing(cgroups: Iterable[str]) -> set[Path]:
    """Those of *cgroups* that exist, in every hierarchy, and those above them."""
    found = set()
    for hierarchy in hierarchies():
        for cgroup in cgroups:
            path = hierarchy / cgroup.strip("/")
            found |= {
                one
                for one in (path, *path.parents)
                if one.is_dir() and one.is_relative_to(hierarchy) and one != hierarchy
            }
    return found


def _remove_cgroups(cgroups: Iterable[Path]) -> None:
    for one in sorted(cgroups, reverse=True):
        for inner in one.glob("*/"):
            with contextlib.suppress(OSError):
                inner.rmdir()
        with contextlib.suppress(OSError):  # somebody else's by now: it holds processes
            one.rmdir()
