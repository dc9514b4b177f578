"""A sidecar beside a TLS server, with a real agent and server: renewals, restarts, outages."""

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from cryptography import x509

from tests.support.programs import environment, openssl_verifies
from tests.support.stack import ROOT, Process, Stack, a_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")
ME = f"unix:uid:{os.geteuid()}"
SERVES = """
import os, signal, socket, ssl, sys, threading

def loaded():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1] + "/svid.pem", sys.argv[1] + "/svid.key")
    return context

def reload(*_):
    global context
    context = loaded()

context = loaded()
signal.signal(signal.SIGHUP, reload)
listener = socket.create_server(("127.0.0.1", 0))
with open(sys.argv[1] + "/../port.new", "w") as file:
    file.write(str(listener.getsockname()[1]))
os.rename(sys.argv[1] + "/../port.new", sys.argv[1] + "/../port")
while True:
    connection, _ = listener.accept()
    with context.wrap_socket(connection, server_side=True) as tls:
        tls.sendall(b"hello")
"""
"""Serves TLS as nginx does: files by name at the start, and again at HUP; a misfit ends it."""


@dataclass
class Served:
    """A sidecar with its TLS server."""

    folder: Path
    process: Process
    serials: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def serial(self) -> int:
        """Connect, check the chain against the bundle's file, and return the serial number."""
        context = ssl.create_default_context(
            cafile=self.folder / "svids/bundle.example.org.pem"
        )
        context.check_hostname = False  # an SVID has no host name
        port = int((self.folder / "port").read_text())
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            assert await reader.readexactly(5) == b"hello"
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(der).serial_number
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def until_another(self, than: int) -> int:
        """Wait until the server shows another certificate."""

        async def another() -> int:
            found = await self.serial()
            return found if found != than else 0

        found: int = await self.process.until(another)
        return found

    @contextlib.asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Connect without a pause; every failure fails the test."""
        over = asyncio.Event()

        async def connect() -> None:
            while not over.is_set():
                self.serials.append(await self.serial())
                await asyncio.sleep(0.01)

        task = asyncio.create_task(connect())
        try:
            yield
        finally:
            over.set()
            await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent for which this user's processes are ``/web``."""
    async with a_stack() as running:
        await running.server.add_entry("/web", running.agent.agent_id, ME)
        await running.agent.until_svids(1)
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def served(stack: Stack, tmp_path: Path) -> AsyncIterator[Served]:
    """A sidecar that runs a TLS server on its files, and tells it to load them anew."""
    settings = {
        "dir": f"{tmp_path}/svids",
        "endpoint": stack.agent.endpoint,
        "x509": [{}],
        "command": [sys.executable, "-c", SERVES, f"{tmp_path}/svids"],
        "on_change": [{"signal": "HUP"}],
    }
    (tmp_path / "sidecar.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "workload_api.agent", "sidecar", "-c"]
    process = Process([*command, str(tmp_path / "sidecar.yaml")], tmp_path / "log").start()
    try:
        await process.until(lambda: (tmp_path / "port").exists())
        yield Served(tmp_path, process)
        assert process.stop() == 128 + signal.SIGTERM, process.log.read_text()
        assert "Traceback" not in process.log.read_text()
    finally:
        process.close()


async def test_renewals_under_traffic(stack: Stack, served: Served) -> None:
    """A TLS server that loads its files by name is renewed again and again; no client fails."""
    serial = await served.serial()
    seen = {serial}
    async with served.traffic():
        for _ in range(3):
            await stack.agent.renew()
            serial = await served.until_another(serial)
            seen.add(serial)
    assert len(seen) == 4
    assert set(served.serials) <= seen
    openssl_verifies(
        served.folder / "svids/bundle.example.org.pem", served.folder / "svids/svid.pem"
    )


async def test_the_agent_is_killed(stack: Stack, served: Served) -> None:
    """While the agent is gone clients are served; once it is back, renewals go on."""
    serial = await served.serial()
    async with served.traffic():
        stack.agent.process.kill()
        await served.process.until(
            lambda: [one for one in served.process.events() if "stream" in one]
        )
        assert await served.serial() == serial
        await stack.agent.start()
        await stack.agent.renew()
        await served.until_another(serial)


async def test_the_server_is_away(stack: Stack, served: Served) -> None:
    """A server that is away is not even noticed; once it is back, renewals go on."""
    serial = await served.serial()
    async with served.traffic():
        stack.server.process.kill()
        assert await served.serial() == serial
        await stack.server.start()

        async def connected() -> Any:
            status = await stack.agent.status()
            return status is not None and status.connected

        await stack.agent.process.until(connected)
        await stack.agent.renew()
        await served.until_another(serial)


async def test_fetch_beside_a_sidecar(stack: Stack, served: Served) -> None:
    """``fetch --write`` into the folder of a sidecar is refused, and changes nothing there."""
    before = (served.folder / "svids/svid.pem").read_text()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workload_api.agent", "fetch", "x509", "--write",
        f"{served.folder}/svids", "--endpoint", stack.agent.endpoint,
        stderr=asyncio.subprocess.PIPE, env=environment(), cwd=ROOT,
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"is in use by another process" in said
    assert (served.folder / "svids/svid.pem").read_text() == before
