"""PostgreSQL with TLS, as an ordinary user, in a folder of the test's own."""

import asyncio
import contextlib
import glob
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ordinary import needs_ordinary_user, prefix
from tests.support.programs import Ran, ran
from tests.support.proxies import PATH, PATIENCE, accepting

# Debian keeps the server's programs out of PATH, a folder for each version.
_FOLDERS = [*PATH.split(":"), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]


def program(name: str) -> str:
    """Where one of its programs is, or the bare name."""
    return shutil.which(name, path=":".join(_FOLDERS)) or name


def needs_postgres() -> list[pytest.MarkDecorator]:
    """The marks of tests with it: from apt, as the wheel of PyPI is built without TLS."""
    missing = not Path(program("initdb")).is_absolute()
    why = "PostgreSQL is not installed here; `make test-root` says what it can do"
    return [pytest.mark.apt, pytest.mark.skipif(missing, reason=why), needs_ordinary_user()]


@dataclass(frozen=True)
class Postgres:
    """A running one, and how to reach it."""

    folder: Path
    port: int
    pid: int

    def reload(self) -> None:
        """Have it read its files again."""
        os.kill(self.pid, signal.SIGHUP)

    async def admin(self, *statements: str) -> str:
        """Run statements as the superuser, over the Unix socket; return what they yield."""
        target = f"host={self.folder} port={self.port} dbname=postgres user=postgres"
        done = await psql(target, *statements)
        assert done.code == 0, done.err
        return done.out.strip()


async def psql(target: str, *statements: str) -> Ran:
    """Run statements by psql."""
    commands = [part for one in statements for part in ("-c", one)]
    return await ran(program("psql"), "-X", "-A", "-t", "-w", target, *commands)


@contextlib.asynccontextmanager
async def a_postgres(
    folder: Path, *, hba: str, ident: str, port: int, **settings: str | Path
) -> AsyncIterator[Postgres]:
    """Make a cluster in *folder* and run it on a loopback *port* until the block ends."""
    data, log = folder / "data", folder / "postgres.log"
    made = await ran(
        *prefix(), program("initdb"), "-D", data, "-A", "trust", "-U", "postgres",
        "--no-sync", "--no-instructions", "--locale=C", "-E", "UTF8", cwd=folder,
    )  # fmt: skip
    assert made.code == 0, made.err
    asked = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": folder,
        "fsync": "off",
        **settings,
    }
    lines = (f"{name} = '{value}'\n" for name, value in asked.items())
    (data / "postgresql.auto.conf").write_text("".join(lines))
    (data / "pg_hba.conf").write_text(f"local all all trust\n{hba}\n")
    (data / "pg_ident.conf").write_text(ident)
    command = [*prefix(), program("postgres"), "-D", str(data), "-p", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    try:
        await accepting(folder / f".s.PGSQL.{port}", process, log)
        # `unshare` replaces itself by it, so this is its number.
        running = Postgres(folder, port, process.pid)
        async with asyncio.timeout(PATIENCE):
            while (await psql(f"host={folder} port={port} dbname=postgres user=postgres")).code:
                await asyncio.sleep(0.05)
        yield running
    finally:
        process.send_signal(signal.SIGINT)  # its fast way to end
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
