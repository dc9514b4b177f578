"""nginx and haproxy as a test starts them: own folder, own sockets, nobody's configuration."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""Where a program may lie: an ordinary user's shell does not look into ``sbin``."""
PATIENCE = 15.0


def program(name: str) -> str:
    """Where a program is, or its bare name."""
    return shutil.which(name, path=PATH) or name


def needs(*names: str) -> list[pytest.MarkDecorator]:
    """The marks of tests with programs that apt installs; they skip where one is missing."""
    missing = [name for name in names if shutil.which(name, path=PATH) is None]
    why = f"{' and '.join(missing)} not installed here; `make test-root` says what it can do"
    return [pytest.mark.apt, pytest.mark.skipif(bool(missing), reason=why)]


@contextlib.asynccontextmanager
async def running(folder: Path, *command: str, until: Path) -> AsyncIterator[subprocess.Popen]:
    """Run a program until its Unix socket accepts; it ends when the block does."""
    until.unlink(missing_ok=True)  # nginx leaves its sockets behind when it is stopped quickly
    with started(folder, *command) as (process, log):
        await accepting(until, process, log)
        yield process


@contextlib.contextmanager
def started(
    folder: Path, *command: str, **environment: str
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run a program with its output in a file; it ends when the block does."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=out
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def ending(pid_file: Path) -> Iterator[None]:
    """See that the daemon whose number is in *pid_file* does not outlive the block."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(pid_file.read_text().split()[0])
            for one in (signal.SIGTERM, signal.SIGKILL):
                os.kill(pid, one)
                end = time.monotonic() + 5
                while time.monotonic() < end:
                    os.kill(pid, 0)  # raises once it is gone
                    time.sleep(0.02)


async def accepting(path: Path, process: subprocess.Popen, log: Path) -> None:
    """Wait until somebody accepts on a Unix socket."""
    end = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
            else:
                return
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def a_place() -> Iterator[Path]:
    """A folder that nginx's workers may enter, which are not root when nginx is."""
    folder = Path(tempfile.mkdtemp(prefix="px-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def nginx(folder: Path, http: str, socket_name: str) -> AsyncIterator[subprocess.Popen]:
    """Run nginx in *folder* with what stands in its ``http`` block."""
    temporary = "".join(
        f"{kind}_temp_path {folder}/tmp-{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid;\n"
        f"error_log stderr info; events {{}}\nhttp {{ access_log off; {temporary}\n{http}\n}}\n"
    )
    command = (program("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr")
    async with running(folder, *command, until=folder / socket_name) as process:
        yield process


@contextlib.asynccontextmanager
async def haproxy(
    folder: Path, config: str, socket_name: str
) -> AsyncIterator[subprocess.Popen]:
    """Run haproxy in *folder*, with short timeouts."""
    (folder / "haproxy.cfg").write_text(
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 10s\n"
        f"  timeout server 10s\n  retries 0\n{config}\n"
    )
    command = (program("haproxy"), "-db", "-f", "haproxy.cfg")
    async with running(folder, *command, until=folder / socket_name) as process:
        yield process
