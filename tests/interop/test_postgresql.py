"""
SVIDs before PostgreSQL and libpq: who becomes which role, and what neither can check.

PostgreSQL ties a role to the common name of a certificate; ours holds the first DNS name of the
registration entry there, and nothing where the entry has none.
"""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509

from tests.support.ordinary import a_home
from tests.support.papers import CLIENT, Papers, forge, issued
from tests.support.postgres import Postgres, a_postgres, needs_postgres, program, psql
from tests.support.programs import Ran, environment

pytestmark = [*needs_postgres(), pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Database:
    """PostgreSQL with the SVID in ``svid``, which a test may replace, and the callers'."""

    postgres: Postgres
    papers: Papers
    svid: Path

    def target(self, name: str, role: str, mode: str = "verify-full", **changes: str) -> str:
        """Where to connect, as whom, and with which SVID."""
        facts = {
            "host": "localhost",
            "hostaddr": "127.0.0.1",
            "port": self.postgres.port,
            "dbname": "postgres",
            "user": role,
            "sslmode": mode,
            "sslrootcert": self.papers.bundle,
            "sslcert": self.papers[name].cert if name else "none",
            "sslkey": self.papers[name].key if name else "none",
            **changes,
        }
        return " ".join(f"{key}={value}" for key, value in facts.items())

    async def ask(self, name: str, role: str = "billing", mode: str = "verify-full") -> Ran:
        """Connect, and say which role we are."""
        return await psql(self.target(name, role, mode), "SELECT current_user")

    def install(self, name: str) -> int:
        """Make *name* the server's SVID, without telling it; return its serial number."""
        for source, target in ((self.papers[name].cert, "pem"), (self.papers[name].key, "key")):
            new = self.svid / f".svid.{target}"
            shutil.copy(source, new)
            os.replace(new, self.svid / f"svid.{target}")
        return x509.load_der_x509_certificate(self.papers[name].chain[0]).serial_number

    async def use(self, name: str) -> None:
        """Have it present *name*, and return once it does."""
        serial = self.install(name)
        self.postgres.reload()
        async with asyncio.timeout(20):
            while await self.presented() != serial:
                await asyncio.sleep(0.02)

    async def presented(self) -> int:
        """The serial number of what it presents to a new connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.postgres.port)
        writer.write(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")  # SSLRequest
        assert await reader.readexactly(1) == b"S"
        context = ssl.create_default_context(cafile=self.papers.bundle)
        context.check_hostname, context.verify_mode = (
            False,
            ssl.CERT_NONE,
        )  # to look, not to trust
        await writer.start_tls(context, server_hostname="localhost")
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(shown).serial_number


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def database() -> AsyncIterator[Database]:
    """One for all of these tests; each leaves it as it was."""
    with a_home() as folder:
        papers = await issued(folder / "papers")
        svid = folder / "svid"
        svid.mkdir()
        roots = svid / "bundle.pem"
        shutil.copy(papers.bundle, roots)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        made = Database(Postgres(folder, port, 0), papers, svid)
        made.install("server-named")
        async with a_postgres(
            folder,
            hba="hostssl all all 127.0.0.1/32 cert map=spiffe",
            ident="spiffe localhost billing\n",
            port=port,
            ssl="on",
            ssl_cert_file=svid / "svid.pem",
            ssl_key_file=svid / "svid.key",
            ssl_ca_file=roots,
            ssl_min_protocol_version="TLSv1.3",
        ) as postgres:
            await postgres.admin("CREATE ROLE billing LOGIN", "CREATE EXTENSION sslinfo")
            yield Database(postgres, papers, svid)


async def test_a_role_by_the_name_in_the_certificate(database: Database) -> None:
    """The name in the subject is a role by way of a map, and of no other role."""
    assert (await database.ask("client-named")).out == "billing\n"
    refused = await database.ask("client-named", "postgres")
    assert 'certificate authentication failed for user "postgres"' in refused.err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("client", "certificate authentication failed"),
        ("client-expired", "certificate expired"),
        ("client-foreign", "unknown ca"),
        ("", "connection requires a valid client certificate"),
    ],
    ids=["no-dns-name", "expired", "foreign", "none"],
)
async def test_who_is_refused(database: Database, name: str, why: str) -> None:
    """No name, an SVID that ended, another authority's, or none at all: no role."""
    refused = await database.ask(name)
    assert (refused.code, refused.out) == (2, "")
    assert why in refused.err


async def test_the_id_is_not_what_decides(database: Database) -> None:
    """Another SPIFFE ID with the same DNS name is the same role: PostgreSQL sees no URI."""
    assert (await database.ask("other")).out == "billing\n"


async def test_sql_can_see_the_id(database: Database) -> None:
    """The sslinfo extension shows a session its SPIFFE ID, so that SQL can tell them apart."""
    ask = "SELECT value FROM ssl_extension_info() WHERE name = 'subjectAltName'"
    for name, path in (("client-named", "client"), ("other", "other")):
        shown = await psql(database.target(name, "billing"), ask)
        assert shown.out == f"URI:spiffe://example.org/{path}, DNS:localhost\n"


async def test_a_merged_file_believes_a_partner(database: Database) -> None:
    """A partner's authority may sign for our names, where its root is in the same file."""
    forged, partner = forge(database.papers, "forged", CLIENT, "partner.example", "localhost")
    assert "unknown ca" in (await database.ask("forged")).err
    roots = database.svid / "bundle.pem"
    before = roots.read_text()
    roots.write_text(before + partner.read_text())
    database.postgres.reload()
    try:
        async with asyncio.timeout(20):
            while (answer := await database.ask("forged")).code:
                assert "unknown ca" in answer.err  # it has not read the file yet
        assert answer.out == "billing\n"
    finally:
        roots.write_text(before)
        database.postgres.reload()
    assert forged.cert.exists()


@pytest.mark.parametrize(
    ("name", "mode", "why"),
    [
        ("server-named", "verify-full", ""),
        ("server", "verify-full", "host name"),
        ("server", "verify-ca", ""),
        ("other", "verify-full", ""),
        ("server-expired", "verify-ca", "certificate verify failed"),
        ("server-foreign", "verify-ca", "certificate verify failed"),
    ],
    ids=[
        "named", "id-alone", "id-alone-without-the-name", "another-id-with-the-name",
        "expired", "foreign",
    ],
)  # fmt: skip
async def test_what_a_client_sees_of_the_server(
    database: Database, name: str, mode: str, why: str
) -> None:
    """libpq compares the DNS name under verify-full, and never the SPIFFE ID."""
    await database.use(name)
    try:
        answer = await database.ask("client-named", mode=mode)
    finally:
        await database.use("server-named")
    assert (answer.out == "billing\n") == (not why), answer
    assert why in answer.err


async def test_a_session_outlives_its_svid(database: Database) -> None:
    """A reload changes what new connections see; a session goes on as it began."""
    process = subprocess.Popen(
        [program("psql"), "-X", "-A", "-t", "-w", database.target("client-named", "billing")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def ask(text: str) -> str:
        process.stdin.write(f"{text};\n")
        process.stdin.flush()
        return (await asyncio.to_thread(process.stdout.readline)).strip()

    try:
        session = await ask("SELECT pg_backend_pid()")
        await database.use("server")
        assert await ask("SELECT pg_backend_pid()") == session
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
        await database.use("server-named")
    assert (await database.ask("client-named")).out == "billing\n"
