"""
SVIDs that a real server of ours signed, as the files that other people's programs read.

`issued` has a server whose clock is two hours slow sign them, so that some have ended by now
and others have not.  A second server, with keys of its own, claims the same trust domain.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.authorities import a_key
from tests.support.ca import FakeCa
from tests.support.ca import name as distinguished
from tests.support.callers import Running, a_running_server, csr_with
from tests.support.clock import DrivenClock
from workload_api.keys import make_key

SLOW = timedelta(hours=2)
LONG, SHORT = timedelta(hours=6), timedelta(hours=1)
CLIENT = "spiffe://example.org/client"
SERVER = "spiffe://example.org/server"
OTHER = "spiffe://example.org/other"
_DER = serialization.Encoding.DER
_PKCS8, _PLAIN = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@dataclass(frozen=True)
class Paper:
    """One SVID in a file and its key in another; the key's name is the file's and ``.key``."""

    cert: Path

    @property
    def key(self) -> Path:
        """The private key, PKCS#8."""
        return self.cert.with_name(f"{self.cert.name}.key")

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The certificates, DER."""
        found = x509.load_pem_x509_certificates(self.cert.read_bytes())
        return tuple(one.public_bytes(_DER) for one in found)


@dataclass(frozen=True)
class Papers:
    """
    Those of one folder, by name.

    ``server`` and ``client`` name a SPIFFE ID alone, ``server-named`` also ``localhost``; so
    do ``other``, whom nobody expects, and ``…-expired`` and ``…-foreign``, which ended an hour
    ago or come from the second server.
    """

    folder: Path

    def __getitem__(self, name: str) -> Paper:
        return Paper(self.folder / f"{name}.pem")

    @property
    def bundle(self) -> Path:
        """The roots of example.org."""
        return self.folder / "bundle.example.org.pem"

    @property
    def foreign_bundle(self) -> Path:
        """The root of the second server."""
        return self.folder / "bundle.foreign.pem"


async def issued(folder: Path) -> Papers:
    """Have both servers sign, and write everything into *folder*."""
    papers = Papers(folder)
    folder.mkdir(exist_ok=True)
    clock = DrivenClock(datetime.now(UTC) - SLOW)
    async with a_running_server(clock) as ours, a_running_server(clock) as theirs:
        papers.bundle.write_text(roots_of(ours))
        papers.foreign_bundle.write_text(roots_of(theirs))
        for role, spiffe_id in (("server", SERVER), ("client", CLIENT)):
            await sign(ours, papers[role], spiffe_id)
            await sign(ours, papers[f"{role}-named"], spiffe_id, "localhost")
            await sign(ours, papers[f"{role}-expired"], spiffe_id, "localhost", ttl=SHORT)
            await sign(theirs, papers[f"{role}-foreign"], spiffe_id, "localhost")
        await sign(ours, papers["other"], OTHER, "localhost")
    return papers


def roots_of(running: Running) -> str:
    """The bundle of a server, PEM."""
    return certificates_to_pem([one.der for one in running.server.hub.bundle.x509_authorities])


async def sign(
    running: Running, paper: Paper, spiffe_id: str, *dns: str, ttl: timedelta = LONG
) -> None:
    """Have a server sign one SVID, and write it."""
    key = make_key()
    names = [x509.UniformResourceIdentifier(spiffe_id), *map(x509.DNSName, dns)]
    request = svid_pb2.MintX509SVIDRequest(
        csr=csr_with(key, *names), ttl=int(ttl.total_seconds())
    )
    minted = (await running.local.svid.MintX509SVID(request)).svid
    write(paper, tuple(minted.cert_chain), key)


def write(paper: Paper, chain: tuple[bytes, ...], key: bytes) -> None:
    """Write an SVID and its key."""
    paper.cert.write_text(certificates_to_pem(chain))
    paper.key.touch(0o600)
    paper.key.write_text(private_key_to_pem(key))


def forge(
    papers: Papers, name: str, spiffe_id: str, trust_domain: str, common_name: str = ""
) -> tuple[Paper, Path]:
    """
    Have an authority that is *trust_domain*'s, and not ours, sign for *spiffe_id*.

    None of ours does that for another's ID.  Returns the SVID and the authority's root.
    """
    now = datetime.now(UTC)
    lives = {"not_before": now - SLOW, "not_after": now + SLOW}
    authority = FakeCa(trust_domain, **lives)
    assert SpiffeId.parse(spiffe_id).trust_domain != authority.trust_domain
    root = papers.folder / f"bundle.{trust_domain}.pem"
    root.write_text(certificates_to_pem([authority.cert.der]))
    key = a_key("p256", "workload").private_bytes(_DER, _PKCS8, _PLAIN)
    subject = distinguished(*filter(None, [common_name]))
    write(
        papers[name], authority.chain(authority.leaf(spiffe_id, subject=subject, **lives)), key
    )
    return papers[name], root
