"""
SVIDs that our server signed, before programs that know nothing of SPIFFE.

Each program must accept a good peer and refuse another authority's, an expired one and (where
it serves) one without an SVID.  What it cannot check is asserted too: most know no URI, and
those with one store for all roots believe any of these authorities about any trust domain.
"""

import asyncio
import contextlib
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.pem import certificates_from_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509SvidError, verify_x509_svid
from tests.support import papers as made_by
from tests.support.papers import CLIENT, SERVER, Paper, Papers, forge
from tests.support.programs import openssl_verifies, ran
from tests.support.proxies import a_place, haproxy, needs, nginx, started

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEERS = Path(__file__).with_name("peers")
REQUEST = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"
PRESENTED = ("server", "server-named", "other", "server-expired", "server-foreign")
"""What a server shows to the clients under test, in the order of their columns."""
ASKING = ("client", "other", "client-expired", "client-foreign", "")
"""With what the clients come to the servers under test; the last has no SVID."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def papers() -> AsyncIterator[Papers]:
    """What both servers signed."""
    with a_place() as folder:
        yield await made_by.issued(folder)


# Clients


@dataclass
class Servers:
    """A plain TLS server for each SVID presented, and the bytes that each was sent."""

    ports: dict[str, int] = field(default_factory=dict)
    heard: dict[str, bytes] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def serving(papers: Papers) -> AsyncIterator[Servers]:
    """Serve every one of `PRESENTED` on a port of its own."""
    servers = Servers()
    async with contextlib.AsyncExitStack() as stack:
        for name in PRESENTED:
            servers.ports[name] = await stack.enter_async_context(
                a_server(papers[name], servers.heard, name)
            )
        yield servers


@contextlib.asynccontextmanager
async def a_server(paper: Paper, heard: dict[str, bytes], name: str) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paper.cert, paper.key)
    heard[name] = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            heard[name] += await reader.read(4096)
            if heard[name]:
                writer.write(ANSWER)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


Said = Mapping[str, str]
"""For each name of `PRESENTED`: ``accepted``, or ``refused`` and why."""


async def openssl_connects(papers: Papers, servers: Servers) -> Said:
    said = {}
    for name, port in servers.ports.items():
        done = await ran(
            "openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", papers.bundle,
            "-cert", papers["client"].cert, "-key", papers["client"].key,
            "-verify_return_error", "-x509_strict", "-purpose", "sslserver", "-quiet",
            stdin=REQUEST.decode(),
        )  # fmt: skip
        accepted = done.code == 0 and "hello" in done.out
        said[name] = "accepted" if accepted else f"refused {done.err}"
    return said


async def curl_connects(papers: Papers, servers: Servers) -> Said:
    said = {}
    for name, port in servers.ports.items():
        done = await ran(
            "curl", "-sS", "--ipv4", "--cacert", papers.bundle, "--cert", papers["client"].cert,
            "--key", papers["client"].key, "--noproxy", "*", f"https://localhost:{port}/",
        )  # fmt: skip
        accepted = (done.code, done.out) == (0, "hello")
        said[name] = "accepted" if accepted else f"refused {done.code} {done.err}"
    return said


async def node_connects(papers: Papers, servers: Servers, want: str = "name") -> Said:
    return await connects(papers, servers, want, "node", PEERS / "verify.mjs")


async def node_with_id_connects(papers: Papers, servers: Servers) -> Said:
    return await node_connects(papers, servers, SERVER)


async def jdk_connects(papers: Papers, servers: Servers) -> Said:
    return await connects(papers, servers, SERVER, *JAVA, PEERS / "Verify.java")


JAVA = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


async def connects(
    papers: Papers, servers: Servers, want: str, *command: str | Path
) -> Mapping[str, str]:
    client, ports = papers["client"], {str(port): name for name, port in servers.ports.items()}
    done = await ran(
        *command, "connect", papers.bundle, client.cert, client.key, want, *ports, timeout=45
    )
    lines = (line.split(" ", 1) for line in done.out.splitlines())
    return {ports[port]: answer for port, answer in lines}


async def nginx_connects(papers: Papers, servers: Servers) -> Said:
    client, folder = papers["client"], papers.folder
    places = "\n".join(
        f"location /{name} {{ proxy_pass https://127.0.0.1:{port}/; }}"
        for name, port in servers.ports.items()
    )
    config = f"""
    proxy_ssl_verify on; proxy_ssl_trusted_certificate {papers.bundle};
    proxy_ssl_name localhost; proxy_ssl_server_name on;
    proxy_ssl_certificate {client.cert}; proxy_ssl_certificate_key {client.key};
    server {{ listen unix:{folder}/up.sock; {places} }}"""
    async with nginx(folder, config, "up.sock"):
        found = {name: await told(folder / "up.sock", f"/{name}") for name in servers.ports}
    log = (folder / "nginx.log").read_text()
    assert "certificate does not match" in log  # that is why a URI alone is refused
    return {name: in_words(answer, b"502") for name, answer in found.items()}


async def haproxy_connects(papers: Papers, servers: Servers, sni: str = "") -> Said:
    client, folder = papers["client"], papers.folder
    rules = "\n".join(f"  use_backend {name} if {{ path /{name} }}" for name in servers.ports)
    backends = "\n".join(
        f"backend {name}\n  server s 127.0.0.1:{port} ssl verify required "
        f"ca-file {papers.bundle} crt {client.cert} {sni}"
        for name, port in servers.ports.items()
    )
    config = f"frontend up\n  bind unix@{folder}/up.sock\n{rules}\n{backends}"
    async with haproxy(folder, config, "up.sock"):
        found = {name: await told(folder / "up.sock", f"/{name}") for name in servers.ports}
    return {name: in_words(answer, b"503") for name, answer in found.items()}


async def haproxy_with_sni_connects(papers: Papers, servers: Servers) -> Said:
    return await haproxy_connects(papers, servers, "sni str(localhost)")


async def told(path: Path, target: str) -> bytes:
    """What is answered to one request over a plain Unix socket."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    await writer.wait_closed()
    return answer


def in_words(answer: bytes, refusal: bytes) -> str:
    status = answer.split(b" ", 2)[1]
    if status == b"200" and answer.endswith(b"hello"):
        return "accepted"
    assert status == refusal, answer
    return f"refused {status.decode()}"


@dataclass(frozen=True)
class Client:
    """One program that connects, and what it can tell apart."""

    connects: Callable[[Papers, Servers], Awaitable[Said]]
    accepts: tuple[str, ...]
    says: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


ALL_OF_OURS = ("server", "server-named", "other")
NAMED = ("server-named", "other")
CLIENTS = {
    "openssl": Client(
        openssl_connects,
        ALL_OF_OURS,
        {
            "server-expired": "certificate has expired",
            "server-foreign": "unable to get local issuer certificate",
        },
        ("openssl",),
    ),
    "curl": Client(
        curl_connects,
        NAMED,
        {"server": "refused 60 .*(common|subject) name", "server-expired": "60 .*has expired",
         "server-foreign": "60 .*unable to get local issuer"},
        ("curl",),
    ),
    "node": Client(
        node_connects,
        NAMED,
        {"server": "ERR_TLS_CERT_ALTNAME_INVALID", "server-expired": "CERT_HAS_EXPIRED",
         "server-foreign": "UNABLE_TO_(VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT)"},
        ("node",),
    ),
    "node-checkServerIdentity": Client(
        node_with_id_connects,
        ("server", "server-named"),
        {"other": f"refused not {SERVER}", "server-expired": "CERT_HAS_EXPIRED"},
        ("node",),
    ),
    "jdk-trust-manager": Client(
        jdk_connects,
        ("server", "server-named"),
        {"other": f"not {SERVER}", "server-foreign": "(?i)signature|path|certif"},
        ("javac",),
    ),
    "nginx-proxy_ssl_verify": Client(nginx_connects, NAMED, needs=("nginx",)),
    "haproxy-verify-required": Client(haproxy_connects, ALL_OF_OURS, needs=("haproxy",)),
    "haproxy-sni": Client(haproxy_with_sni_connects, NAMED, needs=("haproxy",)),
}  # fmt: skip


def cases(table: Mapping[str, "Client | Server"]) -> list[object]:
    return [pytest.param(one, id=name, marks=needs(*one.needs)) for name, one in table.items()]


@pytest.mark.parametrize("client", cases(CLIENTS))
async def test_a_client_verifies_our_servers(client: Client, papers: Papers) -> None:
    """Foreign and expired are refused before a byte of the request, by whoever connects."""
    async with serving(papers) as servers:
        said = await client.connects(papers, servers)
    accepted = {name for name, word in said.items() if word == "accepted"}
    assert set(said) == set(PRESENTED)
    assert accepted == set(client.accepts), said
    for name, pattern in client.says.items():
        assert re.search(pattern, said[name], re.DOTALL), said[name]
    assert {name for name, heard in servers.heard.items() if heard} == accepted


# Servers


@contextlib.asynccontextmanager
async def openssl_serves(papers: Papers) -> AsyncIterator[int | Path]:
    server = papers["server"]
    async with a_listener(
        papers, r"ACCEPT \S*:(\d+)", "openssl", "s_server", "-accept", "127.0.0.1:0",
        "-cert", server.cert, "-key", server.key, "-CAfile", papers.bundle, "-Verify", "3",
        "-verify_return_error", "-x509_strict", "-purpose", "sslclient", "-WWW",
    ) as port:  # fmt: skip
        yield port


@contextlib.asynccontextmanager
async def node_serves(papers: Papers) -> AsyncIterator[int | Path]:
    async with own_listener(papers, "node", PEERS / "verify.mjs") as port:
        yield port


@contextlib.asynccontextmanager
async def jdk_serves(papers: Papers) -> AsyncIterator[int | Path]:
    async with own_listener(papers, *JAVA, PEERS / "Verify.java") as port:
        yield port


def own_listener(
    papers: Papers, *command: str | Path
) -> contextlib.AbstractAsyncContextManager[int]:
    server = papers["server"]
    given = ("serve", papers.bundle, server.cert, server.key, CLIENT)
    return a_listener(papers, r"listening (\d+)", *command, *given)


@contextlib.asynccontextmanager
async def a_listener(papers: Papers, says: str, *command: str | Path) -> AsyncIterator[int]:
    """Run a server until it says its port; *papers*' folder holds what it serves."""
    (papers.folder / "page").write_text("hello")
    with started(papers.folder, *map(str, command)) as (process, log):
        async with asyncio.timeout(45):
            while (found := re.search(says, log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.01)
        yield int(found[1])


@contextlib.asynccontextmanager
async def nginx_serves(
    papers: Papers, roots: Path | None = None, verify: str = "on"
) -> AsyncIterator[int | Path]:
    server, folder = papers["server"], papers.folder
    config = f"""
    server {{
        listen unix:{folder}/tls.sock ssl;
        ssl_certificate {server.cert}; ssl_certificate_key {server.key};
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_client_certificate {roots or papers.bundle}; ssl_verify_client {verify};
        location / {{ return 200 hello; }}
    }}"""
    async with nginx(folder, config, "tls.sock"):
        yield folder / "tls.sock"


@contextlib.asynccontextmanager
async def haproxy_serves(
    papers: Papers, roots: Path | None = None
) -> AsyncIterator[int | Path]:
    server, folder = papers["server"], papers.folder
    config = (
        f"frontend tls\n  bind unix@{folder}/tls.sock ssl crt {server.cert} verify required "
        f"ca-file {roots or papers.bundle}\n"
        '  http-request return status 200 content-type text/plain string "hello"'
    )
    async with haproxy(folder, config, "tls.sock"):
        yield folder / "tls.sock"


async def asked(papers: Papers, where: int | Path, name: str) -> str:
    """How a server answers the holder of an SVID: ``accepted``, or ``refused`` and how."""
    context = ssl.create_default_context(cafile=papers.bundle)
    context.check_hostname = False
    if name:
        context.load_cert_chain(papers[name].cert, papers[name].key)
    dialled = (
        asyncio.open_connection("127.0.0.1", where, ssl=context)
        if isinstance(where, int)
        else asyncio.open_unix_connection(where, ssl=context, server_hostname="localhost")
    )
    try:
        reader, writer = await dialled
    except (ssl.SSLError, OSError) as error:
        return f"refused {error}"
    answer, problem = b"", ""
    try:
        writer.write(REQUEST.replace(b"/ ", b"/page ", 1))
        answer = await asyncio.wait_for(reader.read(), 20)
    except (ssl.SSLError, OSError) as error:
        problem = str(error)
    finally:
        writer.close()
        with contextlib.suppress(ssl.SSLError, OSError):
            await writer.wait_closed()
    if b" 200 " in answer.split(b"\r\n")[0] and b"hello" in answer:
        return "accepted"
    assert b"hello" not in answer
    return f"refused {problem or answer!r}"


@dataclass(frozen=True)
class Server:
    """One program that serves, and whom it lets in."""

    serves: Callable[[Papers], contextlib.AbstractAsyncContextManager[int | Path]]
    accepts: tuple[str, ...]
    needs: tuple[str, ...] = ()


SERVERS = {
    "openssl": Server(openssl_serves, ("client", "other"), ("openssl",)),
    "node": Server(node_serves, ("client",), ("node",)),
    "jdk": Server(jdk_serves, ("client",), ("javac",)),
    "nginx": Server(nginx_serves, ("client", "other"), ("nginx",)),
    "haproxy": Server(haproxy_serves, ("client", "other"), ("haproxy",)),
}


@pytest.mark.parametrize("server", cases(SERVERS))
async def test_a_server_verifies_our_clients(server: Server, papers: Papers) -> None:
    """Foreign, expired and absent SVIDs are refused with no answer, by whoever serves."""
    async with server.serves(papers) as where:
        said = {name: await asked(papers, where, name) for name in ASKING}
    assert {name for name, word in said.items() if word == "accepted"} == set(server.accepts), (
        said
    )


# What one store for all roots means


@pytest.mark.parametrize(
    "serves",
    [
        pytest.param(nginx_serves, id="nginx", marks=needs("nginx")),
        pytest.param(haproxy_serves, id="haproxy", marks=needs("haproxy")),
    ],
)
async def test_a_merged_store_believes_a_partner_about_our_names(
    serves: Callable[..., contextlib.AbstractAsyncContextManager[int | Path]], papers: Papers
) -> None:
    """A partner's authority may sign for our ID, where its root is in the same file as ours."""
    _, partner = forge(papers, "forged", CLIENT, "partner.example")
    merged = papers.folder / "merged.pem"
    merged.write_text(papers.bundle.read_text() + partner.read_text())
    async with serves(papers, merged) as where:
        assert await asked(papers, where, "forged") == "accepted"
    async with serves(papers) as where:
        assert (await asked(papers, where, "forged")).startswith("refused")


async def test_sec_11_ours_asks_the_domain_in_the_name(papers: Papers) -> None:
    """SEC-11: of the same two bundles ours takes that of the domain in the ID: refused."""
    forged, partner = forge(papers, "forged", CLIENT, "partner.example")
    bundles = bundles_of(papers.bundle, partner)
    good = verify_x509_svid(papers["client"].chain, bundles, at=datetime.now(UTC))
    assert good.spiffe_id.uri == CLIENT
    with pytest.raises(X509SvidError):
        verify_x509_svid(forged.chain, bundles, at=datetime.now(UTC))


# Not over TLS


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl program here")
@pytest.mark.parametrize("name", PRESENTED)
async def test_openssl_and_we_agree(papers: Papers, name: str) -> None:
    """X509-45: `openssl verify -x509_strict` builds the path where ours does."""
    paper, good = papers[name], name in ALL_OF_OURS
    with contextlib.nullcontext() if good else pytest.raises(subprocess.CalledProcessError):
        openssl_verifies(papers.bundle, paper.cert)
    with contextlib.nullcontext() if good else pytest.raises(X509SvidError):
        verify_x509_svid(paper.chain, bundles_of(papers.bundle), at=datetime.now(UTC))


def bundles_of(*files: Path) -> BundleSet:
    """The bundles in ``bundle.<trust domain>.pem``."""
    return BundleSet.of(
        Bundle(
            TrustDomain(file.name.removeprefix("bundle.").removesuffix(".pem")),
            tuple(map(X509Authority.parse, certificates_from_pem(file.read_text()))),
        )
        for file in files
    )
