"""
What stands in the pages about nginx and haproxy, before those who try to get past it.

The configuration and the application are the pages' own.  The proxy is given the roots of a
second trust domain too, as in a federation done wrong, and the application is what is left.
"""

import asyncio
import contextlib
import socket
import ssl
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio

from spiffe_core.pem import certificates_to_pem
from spiffe_core.spiffeid import TrustDomain
from tests.support.pages import blocks_of, file_of
from tests.support.papers import Paper, Papers, write
from tests.support.proxies import a_place, accepting, needs, program, running, started
from tests.support.stack import ROOT
from workload_api.client.client import X509Identity
from workload_api.client.fake_authority import FakeAuthority
from workload_api.client.testing import FakeIdentity, FakeWorkloadApi

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADER = "X-Client-Certificate"
LISTENS = {
    "nginx": ("listen 127.0.0.1:18210 ssl", "listen unix:{}/tls.sock ssl"),
    "haproxy": ("bind 127.0.0.1:18220 ssl", "bind unix@{}/tls.sock ssl"),
}
HOW = {
    "nginx": ("-e", "stderr", "-g", "daemon off;", "-p", ".", "-c", "nginx.conf"),
    "haproxy": ("-db", "-f", "haproxy.cfg"),
}


@dataclass(frozen=True)
class Front:
    """A proxy with the page's configuration and the page's application behind it."""

    kind: str
    folder: Path

    def header(self, paper: Paper) -> str:
        """How this proxy tells the application of a client's certificate."""
        leaf = paper.chain[0]
        if self.kind == "nginx":
            return quote(certificates_to_pem([leaf]), safe="")
        return b64encode(leaf).decode()

    async def ask(self, name: str, **options: Any) -> str:
        """Ask as the holder of one SVID; return the status, or why there is none."""
        return (await self.exchange(name, **options))[0]

    async def exchange(
        self, name: str, *, claims: str = "", session: Any = None
    ) -> tuple[str, Any, bool]:
        """Ask; return the status, the TLS session to resume, and whether one was resumed."""
        papers = Papers(self.folder)
        context = ssl.create_default_context(cafile=papers.bundle)
        context.check_hostname = False
        context.load_cert_chain(papers[name].cert, papers[name].key)
        extra = f"{HEADER}: {self.header(papers[claims])}\r\n" if claims else ""
        request = f"GET / HTTP/1.0\r\nHost: localhost\r\n{extra}\r\n".encode()
        return await asyncio.to_thread(self._exchange, context, request, session)

    def _exchange(
        self, context: ssl.SSLContext, request: bytes, session: Any
    ) -> tuple[str, Any, bool]:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as plain:
            plain.settimeout(20)
            plain.connect(str(self.folder / "tls.sock"))
            if session is not None:
                context = session[0]
            try:
                with context.wrap_socket(
                    plain, server_hostname="localhost", session=session and session[1]
                ) as tls:
                    tls.sendall(request)
                    answer = b""
                    while data := tls.recv(65536):
                        answer += data
                    resumed = bool(tls.session_reused)
                    return answer.split(b" ")[1].decode(), (context, tls.session), resumed
            except (ssl.SSLError, OSError) as error:
                return str(error), None, False


def identities(fake: FakeWorkloadApi) -> dict[str, X509Identity]:
    """Who comes: one is welcome."""
    stranger = FakeAuthority("example.org")
    partner = fake.federate("partner.example")
    # It has a root that everybody here trusts, for its own names.
    partner.trust_domain = TrustDomain("example.org")
    forged = partner.mint_x509("/shop")
    partner.trust_domain = TrustDomain("partner.example")
    return {
        "shop": fake.mint_x509("/shop"),
        "guest": fake.mint_x509("/guest"),
        "expired": fake.mint_x509("/shop", expired=True),
        "stranger": stranger.mint_x509("/shop"),
        "partner": partner.mint_x509("/shop"),
        "forged": forged,
    }


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(kind, marks=needs(kind)) for kind in LISTENS],
)
async def front(request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    """The proxy of one page, whose store holds the roots of both trust domains."""
    kind = request.param
    with a_place() as folder, FakeWorkloadApi(FakeIdentity("/web")) as fake:
        papers = Papers(folder)
        for name, one in {**identities(fake), "web": fake.identities[0]}.items():
            write(papers[name], one.svid.chain, one.key)
        domains = {name.name: one for name, one in fake.bundles.items()}
        roots = {
            name: certificates_to_pem([each.der for each in one.x509_authorities])
            for name, one in domains.items()
        }
        papers.bundle.write_text(roots["example.org"])
        as_on_the_page(kind, folder, papers["web"], "".join(roots.values()))
        application = (sys.executable, "app.py", str(folder / "app.sock"))
        with started(folder, *application, PYTHONPATH=str(ROOT), **fake.environment) as app:
            await accepting(folder / "app.sock", *app)
            (folder / "app.sock").chmod(0o777)
            command = (program(kind), *HOW[kind])
            async with running(folder, *command, until=folder / "tls.sock"):
                yield Front(kind, folder)


def as_on_the_page(kind: str, folder: Path, web: Paper, roots: str) -> None:
    """Write the page's files, and what the sidecar would; it listens on a Unix socket."""
    for block, _, body in blocks_of(f"docs/howto/{kind}.md", folder):
        if name := file_of(block, body):
            before, after = LISTENS[kind]
            text = body.replace(before, after.format(folder))
            assert name != HOW[kind][-1] or text != body
            if name == "nginx.conf":
                text = text.replace("ssl_verify_client on", f"ssl_verify_client {ANY}")
            (folder / name).write_text(text)
    (folder / "web").mkdir()
    pem, key = web.cert.read_text(), web.key.read_text()
    made = {"svid.pem": pem, "svid.key": key, "svid.combined.pem": key + pem}
    for name, text in {**made, "bundle.example.org.pem": roots}.items():
        (folder / "web" / name).write_text(text)


STOPPED = {"nginx": {"expired"}, "haproxy": {"expired", "stranger"}}
"""Whom the proxy itself refuses: by "400", or by an alert."""
ANY = "optional_no_ca"
"""What the page names for several trust domains: nginx asks for no root."""


async def test_who_is_welcome(front: Front) -> None:
    """The one ID that the application wants is served."""
    assert await front.ask("shop") == "200"


@pytest.mark.parametrize("name", ["guest", "expired", "stranger", "partner", "forged"])
async def test_sec_11_who_is_not(front: Front, name: str) -> None:
    """SEC-11: refused, also a partner's authority that signs for our ID and is in the store."""
    answer = await front.ask(name)
    # "403" is the application's: the proxy has let it through.
    assert (answer == "403") == (name not in STOPPED[front.kind]), answer
    assert answer != "200"


async def test_nobody_brings_the_header_along(front: Front) -> None:
    """A client that sends the header itself is who its certificate says, not who it claims."""
    assert await front.ask("guest", claims="shop") == "403"
    assert await front.ask("shop", claims="guest") == "200"


async def test_no_session_outlives_its_svid(front: Front) -> None:
    """SEC-17: the pages turn resumption off, so that each connection verifies anew."""
    status, session, _ = await front.exchange("shop")
    assert status == "200"
    status, _, resumed = await front.exchange("shop", session=session)
    assert (status, resumed) == ("200", False)
