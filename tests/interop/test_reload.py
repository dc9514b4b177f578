"""
nginx and haproxy take a new SVID from the same files, and no request notices.

The files are swapped and the program is told by signal, as the sidecar does; requests come in
all the while, each over a connection of its own, and one takes longer than the reloads.
"""

import asyncio
import contextlib
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509

from tests.support.papers import Papers, issued
from tests.support.proxies import a_place, needs, nginx, program, running

RELOADS = 6
CALLERS = 3


@contextlib.asynccontextmanager
async def an_application(path: Path) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Answers at once; ``/slow`` sets the first event, and is answered after the second."""
    arrived, release = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/slow" in await reader.readline():
            arrived.set()
            await release.wait()
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(answer, path):
        path.chmod(0o777)
        yield arrived, release


@dataclass
class Caller:
    """Calls over and over, and remembers which certificates it was shown."""

    socket: Path
    papers: Papers
    calls: int = 0
    enough: bool = False
    serials: list[int] = field(default_factory=list)

    async def call(self, target: str = "/") -> int:
        """Make one call on a new connection; return the serial number presented."""
        context = ssl.create_default_context(cafile=self.papers.bundle)
        context.check_hostname = False
        context.load_cert_chain(self.papers["client"].cert, self.papers["client"].key)
        reader, writer = await asyncio.open_unix_connection(
            self.socket, ssl=context, server_hostname="localhost"
        )
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.write(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        with contextlib.suppress(ssl.SSLError, OSError):
            await writer.wait_closed()
        assert b" 200 " in answer.split(b"\r\n")[0], answer
        assert answer.endswith(b"hello")
        self.calls += 1
        return x509.load_der_x509_certificate(shown).serial_number

    async def go_on(self) -> None:
        """Call until it is enough; a call that fails ends it."""
        while not self.enough:
            serial = await self.call()
            if not self.serials or self.serials[-1] != serial:
                self.serials.append(serial)


def install(papers: Papers, name: str, folder: Path) -> int:
    """Make *name* the SVID in *folder*, certificate, key and both in one; return its serial."""
    paper = papers[name]
    pem, key = paper.cert.read_text(), paper.key.read_text()
    for file, text in (("svid.pem", pem), ("svid.key", key), ("svid.combined.pem", key + pem)):
        (folder / f".{file}").write_text(text)
        os.replace(folder / f".{file}", folder / file)
    return x509.load_der_x509_certificate(paper.chain[0]).serial_number


@contextlib.asynccontextmanager
async def reloading_nginx(folder: Path, papers: Papers) -> AsyncIterator[Callable[[], None]]:
    config = f"""
    server {{
        listen unix:{folder}/tls.sock ssl;
        ssl_certificate {folder}/svid.pem; ssl_certificate_key {folder}/svid.key;
        ssl_client_certificate {papers.bundle}; ssl_verify_client on;
        location / {{ proxy_pass http://unix:{folder}/app.sock; }}
    }}"""
    async with nginx(folder, config, "tls.sock"):
        pid = int((folder / "nginx.pid").read_text())
        yield lambda: os.kill(pid, signal.SIGHUP)


@contextlib.asynccontextmanager
async def reloading_haproxy(folder: Path, papers: Papers) -> AsyncIterator[Callable[[], None]]:
    (folder / "haproxy.cfg").write_text(f"""
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend tls
  bind unix@{folder}/tls.sock ssl crt {folder}/svid.combined.pem ca-file {papers.bundle} verify required
  default_backend app
backend app
  server app unix@{folder}/app.sock
""")  # noqa: E501 - haproxy has no continuation lines
    command = (program("haproxy"), "-W", "-f", "haproxy.cfg")
    async with running(folder, *command, until=folder / "tls.sock") as master:
        yield lambda: os.kill(master.pid, signal.SIGUSR2)


@pytest.mark.parametrize(
    "reloading",
    [
        pytest.param(reloading_nginx, id="nginx-HUP", marks=needs("nginx")),
        pytest.param(reloading_haproxy, id="haproxy-USR2", marks=needs("haproxy")),
    ],
)
async def test_a_new_svid_costs_no_request(
    reloading: Callable[
        [Path, Papers], contextlib.AbstractAsyncContextManager[Callable[[], None]]
    ],
) -> None:
    """Every SVID is presented in its turn, every request is answered, a slow one too."""
    with a_place() as folder:
        papers = await issued(folder / "papers")
        expected = [install(papers, "server", folder)]
        async with (
            an_application(folder / "app.sock") as (arrived, release),
            reloading(folder, papers) as reload,
        ):
            slow = Caller(folder / "tls.sock", papers)
            callers = [Caller(folder / "tls.sock", papers) for _ in range(CALLERS)]
            assert await callers[0].call() == expected[0]
            tasks = [asyncio.create_task(one.go_on()) for one in callers]
            pending = asyncio.create_task(slow.call("/slow"))
            await asyncio.wait_for(arrived.wait(), 20)
            for number in range(RELOADS):
                name = "server" if number % 2 else "server-named"
                expected.append(install(papers, name, folder))
                await taken_over(reload, expected[-1], callers, tasks)
            assert not pending.done()
            release.set()
            assert await asyncio.wait_for(pending, 20) == expected[0]
            for one in callers:
                one.enough = True
            await asyncio.gather(*tasks)
        # A worker that is about to end may still accept: the old one can show up once more.
        assert all(set(one.serials) == set(expected) for one in callers)
        assert all(one.calls > RELOADS for one in callers)


async def taken_over(
    reload: Callable[[], None],
    serial: int,
    callers: list[Caller],
    tasks: list[asyncio.Task[None]],
) -> None:
    """
    Reload until every caller is shown *serial*.

    Once more if it must be: haproxy's master takes no notice of a USR2 that comes while it
    still carries out the one before, which goes on for a moment after its workers serve.
    """
    for _ in range(5):
        reload()
        with contextlib.suppress(TimeoutError):
            await all_see(serial, callers, tasks)
            return
    raise AssertionError("the new SVID was never taken")


async def all_see(serial: int, callers: list[Caller], tasks: list[asyncio.Task[None]]) -> None:
    """Wait until every caller is shown *serial*, or one of them has failed."""
    async with asyncio.timeout(4):
        while not all(one.serials and one.serials[-1] == serial for one in callers):
            for task in tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.01)
