"""
Several trust domains in one real Envoy: each is verified with its own bundle, both ways.

The peers are made by hand: of three trust domains, each with its own authority, every one
signs for every name.
"""

import asyncio
import contextlib
import datetime as dt
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from spiffe_core.pem import certificates_to_pem
from tests.support.authorities import a_key
from tests.support.ca import FakeCa
from tests.support.envoy import Envoy, Mesh, a_mesh, get, needs_envoy
from tests.support.envoyconfig import (
    bootstrap,
    plain_cluster,
    plain_listener,
    tls_cluster,
    tls_listener,
)

pytestmark = [needs_envoy, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]
DOMAINS = ("example.org", "blue.test", "green.test")
PAIRS = [(name, signer) for name in DOMAINS for signer in DOMAINS]
SOON = {"base_interval": "0.1s", "max_interval": "1s"}
HOUR = dt.timedelta(hours=1)


def life() -> dict[str, dt.datetime]:
    """Good from an hour ago to in an hour."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    return {"not_before": now - HOUR, "not_after": now + HOUR}


async def stolen(mesh: Mesh) -> FakeCa:
    """The authority of our own server, whose key the test takes from its disk."""
    pem = await mesh.stack.server.bundle_pem()
    (certificate,) = x509.load_pem_x509_certificates(pem.encode())
    made = FakeCa(DOMAINS[0])
    made.name = certificate.subject.public_bytes()
    made.key_id = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest
    for path in (mesh.stack.folder / "server" / "keys").iterdir():
        key = load_der_private_key(path.read_bytes(), None)
        if key.public_key() == certificate.public_key():
            made.key = key
            return made
    raise AssertionError("no key of the authority on disk")


@dataclass(frozen=True)
class Peers:
    """SVIDs of every name by every authority, as contexts to speak TLS with."""

    folder: Path
    authorities: dict[str, FakeCa]

    def context(self, name: str, signer: str, *, server: bool = False) -> ssl.SSLContext:
        """Presents ``spiffe://NAME/w``, signed by the authority of *signer*; checks nobody."""
        leaf = self.authorities[signer].leaf(f"spiffe://{name}/w", **life())
        file = self.folder / f"{name}-by-{signer}.pem"
        file.write_text(certificates_to_pem([leaf.der]) + key_to_pem(a_key("p256", "workload")))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # it is Envoy's check that is tried
        context.load_cert_chain(file)
        if server:
            context.num_tickets = 0  # or Envoy would resume, and see no certificate
        return context


def key_to_pem(key: Any) -> str:
    """A private key, PKCS#8."""
    pem, pkcs8, plain = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    return str(key.private_bytes(pem, pkcs8, plain).decode())


class Impostor:
    """A TLS server that presents whatever it is told to."""

    def __init__(self) -> None:
        self.context: ssl.SSLContext | None = None
        self.requests = 0

    @contextlib.asynccontextmanager
    async def serving(self, base: ssl.SSLContext) -> AsyncIterator[int]:
        """Serve; its port."""

        def pick(socket: ssl.SSLObject, _name: str | None, _base: ssl.SSLContext) -> None:
            assert self.context is not None
            socket.context = self.context

        base.sni_callback = pick
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=base)
        async with server:
            yield int(server.sockets[0].getsockname()[1])

    async def _answer(self, reader: StreamReader, writer: StreamWriter) -> None:
        async with closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()


@contextlib.asynccontextmanager
async def closing(writer: StreamWriter) -> AsyncIterator[None]:
    """Close it at the end, whatever the other side does."""
    cut = (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError)
    with contextlib.suppress(*cut):
        yield
    writer.close()
    with contextlib.suppress(*cut):
        await writer.wait_closed()


async def ask(port: int, context: ssl.SSLContext) -> int:
    """The status of one HTTP request over TLS, or 0 when the connection was cut."""
    status = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    async with closing(writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        if line := await reader.readline():
            status = int(line.split()[1])
    return status


@dataclass(frozen=True)
class Federated:
    """One Envoy with the bundles of all three, which listens, and calls the impostor."""

    mesh: Mesh
    peers: Peers
    impostor: Impostor
    envoy: Envoy
    listener: int
    caller: int


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def federated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Federated]:
    """It asks for ``ALL``, and its entry federates with the two foreign trust domains."""
    async with a_mesh() as mesh:
        foreign = {one: FakeCa(one, **life()) for one in DOMAINS[1:]}
        for authority in foreign.values():
            await mesh.stack.server.set_bundle(authority.bundle)
        authorities = {DOMAINS[0]: await stolen(mesh), **foreign}
        peers = Peers(tmp_path_factory.mktemp("peers"), authorities)
        impostor, envoy = Impostor(), mesh.envoy("federated")
        await mesh.entry(envoy, federates_with=DOMAINS[1:])
        base = peers.context(DOMAINS[0], DOMAINS[0], server=True)
        async with impostor.serving(base) as far:
            await mesh.start(
                envoy,
                [
                    tls_listener("in", "service", envoy.access_log, bundle="ALL"),
                    plain_listener("out", "far", envoy.access_log),
                ],
                [plain_cluster("service", mesh.service), tls_cluster("far", far, bundle="ALL")],
            )
            await envoy.ready()
            listener, caller = await envoy.port("in"), await envoy.port("out")
            yield Federated(mesh, peers, impostor, envoy, listener, caller)


@pytest.mark.parametrize(("name", "signer"), PAIRS, ids=[f"{n}-by-{s}" for n, s in PAIRS])
async def test_whose_clients_it_takes(federated: Federated, name: str, signer: str) -> None:
    """SEC-11, FED-43, SDS-06: a client is taken if its own domain's authority signed for it."""
    status = await ask(federated.listener, federated.peers.context(name, signer))
    assert status == (200 if name == signer else 0)


@pytest.mark.parametrize(("name", "signer"), PAIRS, ids=[f"{n}-by-{s}" for n, s in PAIRS])
async def test_whose_servers_it_takes(federated: Federated, name: str, signer: str) -> None:
    """SEC-11, FED-43, SDS-06: a server of another domain's authority gets no request."""
    impostor = federated.impostor
    impostor.context = federated.peers.context(name, signer, server=True)
    before, refused = impostor.requests, "cluster.far.ssl.fail_verify_error"
    failures = (await federated.envoy.stats(refused))[refused]
    answer = await get(federated.caller)
    if name == signer:
        assert (answer.status, impostor.requests) == (200, before + 1)
        assert answer.headers["x-server"] == f"spiffe://{name}/w"
    else:
        assert (answer.status, impostor.requests) == (503, before)
        assert await federated.envoy.stats(refused) == {refused: failures + 1}


async def test_a_domain_that_comes_and_goes(federated: Federated) -> None:
    """SDS-09: what an entry federates with is pushed to its Envoy, and taken from it again."""
    mesh, server = federated.mesh, federated.mesh.stack.server
    envoy = mesh.envoy("changing")
    entry = await mesh.entry(envoy)
    listener = tls_listener("in", "service", envoy.access_log, bundle="ALL")
    await mesh.start(envoy, [listener], [plain_cluster("service", mesh.service)])
    await envoy.ready()
    port = await envoy.port("in")
    own, blue = (federated.peers.context(one, one) for one in DOMAINS[:2])
    assert (await ask(port, own), await ask(port, blue)) == (200, 0)

    async def asked(status: int) -> None:
        async def seen() -> bool:
            return await ask(port, blue) == status

        await envoy.until(seen)
        assert await ask(port, own) == 200

    entry.federates_with.append(DOMAINS[1])
    entry = await server.update_entry(entry)
    await asked(200)
    entry.ClearField("federates_with")
    await server.update_entry(entry)
    await asked(0)
    assert await envoy.until_stat("sds.ALL.update_success", 3) == 3


async def test_plain_roots(federated: Federated) -> None:
    """SDS-06: an Envoy whose metadata turns the validator off gets one domain's roots alone."""
    mesh = federated.mesh
    envoy = mesh.envoy("plain")
    await mesh.entry(envoy, federates_with=DOMAINS[1:])
    bundles = ("ROOTCA", "spiffe://blue.test")
    config = bootstrap(
        envoy.name,
        mesh.socket,
        [tls_listener(one[-4:], "service", envoy.access_log, bundle=one) for one in bundles],
        [plain_cluster("service", mesh.service)],
    )
    config["node"]["metadata"] = {"disable_spiffe_cert_validation": True}
    await envoy.start(config)
    await envoy.ready()
    for bundle, domain in zip(bundles, DOMAINS, strict=False):
        port = await envoy.port(bundle[-4:])
        taken = {
            one for one in DOMAINS if await ask(port, federated.peers.context(one, one)) == 200
        }
        assert taken == {domain}


async def test_plain_roots_of_all(federated: Federated) -> None:
    """SDS-06: with the validator off, nobody gets a merged store of all domains' roots."""
    mesh = federated.mesh
    envoy = mesh.envoy("merged")
    await mesh.entry(envoy, federates_with=DOMAINS[1:])
    config = bootstrap(
        envoy.name,
        mesh.socket,
        [tls_listener("in", "service", envoy.access_log, bundle="ALL", retry=SOON)],
        [plain_cluster("service", mesh.service)],
    )
    config["node"]["metadata"] = {"disable_spiffe_cert_validation": "true"}
    await envoy.start(config)
    await envoy.until_stat("sds.default.update_success")
    await envoy.until_stat("sds.ALL.update_failure", 4)  # two may be Envoy's own
    assert (await envoy.stats("sds.ALL.update_success"))["sds.ALL.update_success"] == 0
    assert await envoy.waits()
