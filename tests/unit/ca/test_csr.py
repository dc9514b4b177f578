"""Hostile requests: the key is taken, and nothing else (SEC-20)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from hypothesis import given, settings
from hypothesis import strategies as st

from ca.csr import CsrError, MintRequest, mint_request_of, public_key_of
from ca.x509 import LintError, leaf_of, sign_x509
from spiffe_core.keys import CheckedSpki, KeyKind, key_of_spki, spki_of
from spiffe_core.spiffeid import SpiffeId
from tests.support import der
from tests.support.authorities import a_key, key_usage
from tests.support.ca import Ext, algorithm_of, ext, name, sign, uri_san
from tests.support.issuing import TD, an_active_x509, prepared
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.filterwarnings(
    "ignore::cryptography.utils.CryptographyDeprecationWarning"
)

UNKNOWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
EXTENSION_REQUEST = "1.2.840.113549.1.9.14"
CHALLENGE = "1.2.840.113549.1.9.7"
SIZES = {"p256": 256, "p384": 384, "p521": 521}
Oid = ExtensionOID


@dataclass(frozen=True)
class Csr:
    """A request to be; its default is the plain one of a workload."""

    kind: str = "p256"
    which: str = "csr"
    subject: bytes = name()
    extensions: tuple[Ext, ...] = ()
    attributes: tuple[bytes, ...] = ()
    version: int = 0
    spki: bytes = b""
    signer: Any = None
    digest: str = "sha256"
    algorithm: bytes = b""
    signature: bytes = b""
    trailer: bytes = b""

    def but(self, **changes: Any) -> "Csr":
        """The same with other fields."""
        return replace(self, **changes)

    @property
    def der(self) -> bytes:
        """The request."""
        key = a_key(self.kind, self.which)
        asked = list(self.attributes)
        if self.extensions:
            block = der.sequence(*(one.der() for one in self.extensions))
            asked.append(der.sequence(der.oid(EXTENSION_REQUEST), der.tlv(0x31, block)))
        info = der.sequence(
            der.integer(self.version), self.subject,
            self.spki or spki_of(key.public_key()), der.explicit(0, *asked),
        )  # fmt: skip
        signer = self.signer or key
        return (
            der.sequence(
                info,
                self.algorithm or algorithm_of(signer, self.digest),
                der.bits(self.signature or sign(signer, info, self.digest)),
            )
            + self.trailer
        )


PLAIN = Csr()
KEY = spki_of(a_key("p256", "csr").public_key())


def asking(*extensions: Ext) -> Csr:
    """A request with these extensions."""
    return PLAIN.but(extensions=extensions)


def san(*uris: str, others: tuple[x509.GeneralName, ...] = ()) -> Ext:
    """The subject alternative name of a request."""
    return uri_san(*uris, others=others, critical=False)


CA = ext(x509.BasicConstraints(True, None), critical=True)
# Wishes of every kind; of each the key alone is taken.
WISHES: dict[str, Csr] = {
    "nothing": PLAIN,
    "a subject": PLAIN.but(subject=name("root")),
    "a subject of many parts": PLAIN.but(subject=name(*"abcdefgh")),
    "its own ID": asking(san("spiffe://example.org/w")),
    "another ID": asking(san("spiffe://example.org/admin")),
    "the trust domain's ID": asking(san("spiffe://example.org")),
    "a foreign ID": asking(san("spiffe://partner.test/w")),
    "the server's ID": asking(san("spiffe://example.org/spire/server")),
    "two IDs": asking(san("spiffe://example.org/a", "spiffe://example.org/b")),
    "an ID that is none": asking(san("SPIFFE://example.org//")),
    "a web address": asking(san("https://example.org/")),
    "a DNS name": asking(san(others=(x509.DNSName("db.example.org"),))),
    "a wildcard": asking(san(others=(x509.DNSName("*.example.org"),))),
    "a mail address": asking(san(others=(x509.RFC822Name("root@example.org"),))),
    "a SAN twice": asking(san("spiffe://example.org/a"), san("spiffe://example.org/b")),
    "a SAN of junk": asking(Ext(Oid.SUBJECT_ALTERNATIVE_NAME, b"\x04\x00")),
    "to be a CA": asking(CA),
    "to be a CA with a path length": asking(ext(x509.BasicConstraints(True, 5), True)),
    "to sign certificates": asking(ext(key_usage("key_cert_sign", "crl_sign"), True)),
    "every usage": asking(ext(key_usage("digital_signature", "key_cert_sign",
                                        "key_agreement"), True)),
    "code signing": asking(ext(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]))),
    "any purpose": asking(ext(x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]))),
    "one purpose": asking(ext(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]))),
    "name constraints": asking(ext(x509.NameConstraints([x509.DNSName("a")], None), True)),
    "a key ID": asking(ext(x509.SubjectKeyIdentifier(b"\1" * 20))),
    "an issuer's key ID": asking(ext(x509.AuthorityKeyIdentifier(b"\1" * 20, None, None))),
    "an unknown extension": asking(Ext(UNKNOWN, der.NULL)),
    "an unknown critical extension": asking(Ext(UNKNOWN, der.NULL, True)),
    "policies": asking(ext(x509.CertificatePolicies([x509.PolicyInformation(UNKNOWN, None)]))),
    "no check of revocation": asking(ext(x509.OCSPNoCheck())),
    "must staple": asking(ext(x509.TLSFeature([x509.TLSFeatureType.status_request]))),
    "constraints of junk": asking(Ext(Oid.BASIC_CONSTRAINTS, b"junk")),
    "a challenge password": PLAIN.but(attributes=(
        der.sequence(der.oid(CHALLENGE), der.tlv(0x31, der.tlv(0x0C, b"secret"))),)),
    "an unknown attribute": PLAIN.but(attributes=(
        der.sequence(der.oid("1.2.3.4"), der.tlv(0x31, der.NULL)),)),
    "extensions twice": asking(CA).but(attributes=(
        der.sequence(der.oid(EXTENSION_REQUEST), der.tlv(0x31, der.sequence(CA.der()))),)),
    "everything at once": asking(
        CA, san("spiffe://partner.test/w"), ext(key_usage("key_cert_sign"), True),
        ext(x509.NameConstraints([x509.DNSName("a")], None), True),
        Ext(UNKNOWN, der.NULL, True),
    ).but(subject=name("root")),
}  # fmt: skip

# What is no request, or has no key to take.
BAD: dict[str, tuple[Csr, str]] = {
    "another key's signature": (PLAIN.but(signer=a_key("p256", "evil")), "invalid CSR sign"),
    "a signature of zeros": (PLAIN.but(signature=bytes(70)), "CSR"),
    "no signature": (PLAIN.but(signature=b"\0"), "CSR"),
    "SHA-1": (PLAIN.but(digest="sha1"), "hash"),
    "SHA-224": (PLAIN.but(digest="sha224"), "hash"),
    "RSA by MD5": (PLAIN.but(kind="rsa2048", digest="md5"), "hash"),
    "RSA by SHA-1": (PLAIN.but(kind="rsa2048", digest="sha1"), "hash"),
    "an unknown algorithm": (PLAIN.but(algorithm=der.sequence(der.oid("1.2.3"))), "CSR"),
    "another version": (PLAIN.but(version=1), "not a DER PKCS#10"),
    "a tail": (PLAIN.but(trailer=b"\0"), "not a DER"),
    "another behind": (PLAIN.but(trailer=PLAIN.der), "not a DER"),
    "key of junk": (PLAIN.but(spki=der.sequence(der.NULL)), "CSR"),
    "key that is no point": (PLAIN.but(spki=KEY[:-2] + b"\0\0"), "CSR"),
    "too long": (PLAIN.but(subject=name(*["n" * 60] * 300)), "longer than 16384"),
    **{
        f"key {kind}": (PLAIN.but(kind=kind), "CSR")
        for kind in ("p224", "k256", "brainpool", "rsa1024", "rsa-e3", "ed448", "dsa")
    },
}  # fmt: skip


def signed_for(csr: bytes, **refused: Any) -> tuple[Any, ...]:
    """All that a certificate for this request would hold, but serial number and key."""
    made = prepared(public_key=public_key_of(csr, **refused), dns_names=("db.example.org",))
    leaf = leaf_of(made)
    others = [
        (one.oid, one.critical, one.value.public_bytes())
        for one in leaf.extensions
        if one.oid != Oid.SUBJECT_KEY_IDENTIFIER
    ]
    return made.spiffe_id, made.validity, made.dns_names, leaf.subject, others, leaf.public


def test_sec_20_there_are_a_hundred() -> None:
    """SEC-20: with the kinds of key, over a hundred hostile requests are tried."""
    assert len(WISHES) * 3 + len(BAD) > 100


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa2048"])
@pytest.mark.parametrize("wish", WISHES)
def test_sec_20_wishes_are_not_heard(wish: str, kind: str) -> None:
    """SEC-20: whatever a request asks for, its certificate is the plain one's, key apart."""
    plain = PLAIN.but(kind=kind)
    hostile = WISHES[wish].but(kind=kind, which="hostile")
    *wanted, plain_key = signed_for(plain.der)
    *found, key = signed_for(hostile.der)
    assert found == wanted
    assert key == a_key(kind, "hostile").public_key() != plain_key


@pytest.mark.parametrize("what", BAD)
def test_sec_20_what_is_no_request(what: str) -> None:
    """SEC-20, SEC-15: a request with a wrong signature, key, hash or form is refused."""
    csr, text = BAD[what]
    assert public_key_of(PLAIN.der) == KEY
    with pytest.raises(CsrError, match=text):
        public_key_of(csr.der)


@pytest.mark.parametrize("csr", [b"", b"\0", b"\x30\x00", b"\x30\x80\0\0", b"x" * 100])
def test_bytes_that_are_no_request(csr: bytes) -> None:
    """SEC-20: bytes that are no request are refused; none at all is said to be missing."""
    with pytest.raises(CsrError, match="missing CSR" if not csr else "malformed CSR"):
        public_key_of(csr)


def test_a_pem_request() -> None:
    """SEC-20: PEM is not DER."""
    with pytest.raises(CsrError, match="not a DER"):
        public_key_of(b"-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n")


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048", "ed25519"])
def test_sec_20_keys_that_are_taken(kind: str) -> None:
    """SEC-20, IOP-07: the key that comes out is the one that signed the request."""
    csr = PLAIN.but(kind=kind).der
    assert public_key_of(csr) == spki_of(a_key(kind, "csr").public_key())


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048"])
def test_sec_20_every_signature_is_checked(kind: str, digest: str) -> None:
    """SEC-20, SEC-15: with each key and hash, a request counts with its own signature alone."""
    right = PLAIN.but(kind=kind, digest=digest)
    assert public_key_of(right.der) == spki_of(a_key(kind, "csr").public_key())
    others = right.but(subject=name("else"))
    for wrong in (
        right.but(signer=a_key(kind, "evil")),
        right.but(signature=bytes(sign(a_key(kind, "csr"), others.der, digest))),
        right.but(signature=b"\x30\x00"),
        right.but(signature=bytes(64)),
    ):
        with pytest.raises(CsrError, match="not signed by its own key"):
            public_key_of(wrong.der)


@pytest.mark.parametrize(
    ("kind", "other"),
    [("p256", "rsa2048"), ("rsa2048", "p256"), ("ed25519", "p256"), ("p256", "ed25519")],
)
def test_sec_20_an_algorithm_of_another_key(kind: str, other: str) -> None:
    """SEC-20: a signature that is said to be of another kind than the key is refused."""
    wrong = PLAIN.but(kind=kind, algorithm=algorithm_of(a_key(other, "csr"), "sha256"))
    with pytest.raises(CsrError):
        public_key_of(wrong.der)


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048", "ed25519"])
def test_sec_15_the_key_is_read_once(kind: str) -> None:
    """SEC-15: with its bytes comes the key that was checked, and they are one and the same."""
    spki = public_key_of(PLAIN.but(kind=kind).der)
    assert key_of_spki(spki) is key_of_spki(spki)
    assert key_of_spki(spki) == key_of_spki(bytes(spki)) == a_key(kind, "csr").public_key()


def test_sec_24_bytes_of_one_key_and_another() -> None:
    """SEC-24: were a key not the one that its bytes say, no certificate would leave."""
    mixed = CheckedSpki.of(KEY, a_key("p256", "evil").public_key())
    with pytest.raises(LintError, match="thrown away"):
        sign_x509(prepared(public_key=mixed))


@pytest.mark.parametrize(("size", "good"), [(16384, True), (16385, False)])
def test_sec_14_size(size: int, good: bool) -> None:
    """SEC-14: a request of 16 KiB is read, one byte more is refused unread."""
    short = size - len(PLAIN.der) - 80
    made = (
        asking(Ext(UNKNOWN, b"\x04" * (short + spare))).der
        for spare in range(80)
        for _ in "abcd"
    )
    csr = next(one for one in made if len(one) == size)
    if good:
        assert public_key_of(csr) == KEY
    else:
        with pytest.raises(CsrError, match="longer than 16384 bytes"):
            public_key_of(csr)


@pytest.mark.parametrize(
    "take", [public_key_of, lambda csr, **k: mint_request_of(csr, TD, **k)]
)
def test_sec_20_an_authority_s_key_gets_no_leaf(take: Callable[..., Any]) -> None:
    """SEC-20: a request on the key of an authority is refused, signed by that key as it is."""
    own = {an_active_x509().key.public_key, an_active_x509("p384").key.public_key}
    for kind in ("p256", "p384"):
        csr = asking(san("spiffe://example.org/w")).but(kind=kind, which="ca").der
        assert take(csr)
        with pytest.raises(CsrError, match="key is an authority's"):
            take(csr, refused=own)
    assert take(asking(san("spiffe://example.org/w")).der, refused=own)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sec_20_any_bytes(data: st.DataObject) -> None:
    """SEC-20: a request with bytes changed gives its own key or our error, and nothing else."""
    whole = bytearray(FIXED)
    for spot in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
        whole[spot] = data.draw(st.integers(0, 255))
    for take in (public_key_of, lambda csr: mint_request_of(csr, TD).public_key):
        try:
            assert take(bytes(whole)) == KEY
        except CsrError:
            continue


FIXED = asking(san("spiffe://example.org/w"), CA).der


# Minting: an operator's wishes are heard, as far as they are lawful.


def minted(*extensions: Ext) -> MintRequest:
    """What an operator asks for with these extensions."""
    return mint_request_of(asking(*extensions).der, TD)


def test_mint_request() -> None:
    """SEC-20: an operator's request gives one ID, the DNS names and the key; no more."""
    names = (x509.DNSName("db.example.org"), x509.DNSName("*.w.example.org"))
    found = minted(san("spiffe://example.org/w", others=names), CA)
    assert found == MintRequest(SpiffeId(TD, "/w"), KEY, ("db.example.org", "*.w.example.org"))


@pytest.mark.parametrize(
    ("extensions", "text"),
    [
        ((), "CSR URI SAN is required"),
        ((san(others=(x509.DNSName("a.example"),)),), "CSR URI SAN is required"),
        ((san("spiffe://example.org/a", "spiffe://example.org/b"),), "only one URI SAN"),
        ((san("spiffe://example.org/a", "spiffe://example.org/a"),), "only one URI SAN"),
        ((san("https://example.org/"),), "CSR URI SAN is invalid: "),
        ((san("spiffe://partner.test/w"),), "CSR URI SAN is invalid: .*not a workload"),
        ((san("spiffe://example.org"),), "CSR URI SAN is invalid: .*path is empty"),
        ((san("spiffe://example.org/spire/server"),), "CSR URI SAN is invalid: .*reserved"),
        ((san("spiffe://example.org/spire/agent/x"),), "CSR URI SAN is invalid: .*reserved"),
        ((san("spiffe://example.org/w\n"),), "CSR URI SAN is invalid: "),
        ((san("spiffe://example.org/w", others=(x509.DNSName("A.example"),)),),
         "CSR DNS name is invalid: "),
        ((san("spiffe://example.org/w", others=(x509.DNSName("a..b"),)),),
         "CSR DNS name is invalid: "),
        ((san("spiffe://example.org/w", others=(x509.DNSName("a.*.b"),)),),
         "CSR DNS name is invalid: "),
        ((san("spiffe://example.org/w",
              others=tuple(x509.DNSName(f"n{n}.example") for n in range(65))),),
         "CSR DNS name is invalid: more than 64"),
        ((san("spiffe://example.org/w",
              others=(x509.DNSName("*.example.org"), x509.DNSName("db.example.org"))),),
         "wildcard that covers another"),
        ((san("spiffe://example.org/a"), san("spiffe://example.org/b")), "cannot be read"),
        ((Ext(Oid.SUBJECT_ALTERNATIVE_NAME, b"\x04\x00"),), "cannot be read"),
        ((san("spiffe://example.org/a"), Ext(Oid.BASIC_CONSTRAINTS, b"junk")),
         "cannot be read"),
    ],
)  # fmt: skip
def test_sec_20_unlawful_wishes_of_operators(extensions: tuple[Ext, ...], text: str) -> None:
    """SEC-20, SEC-04: an operator gets one workload's ID of this trust domain, or our error."""
    with pytest.raises(CsrError, match=text):
        minted(*extensions)


def test_a_wildcard_beside_names_it_does_not_cover() -> None:
    """SEC-20: a wildcard covers one label, of its own parent alone."""
    names = ("*.example.org", "example.org", "a.b.example.org", "db.other.org")
    found = minted(san("spiffe://example.org/w", others=tuple(map(x509.DNSName, names))))
    assert found.dns_names == names


@pytest.mark.parametrize("what", BAD)
def test_mint_refuses_what_issue_refuses(what: str) -> None:
    """SEC-20: what is no request for an agent is none for an operator."""
    with pytest.raises(CsrError):
        mint_request_of(BAD[what][0].der, TD)


@pytest.mark.parametrize("kind", [KeyKind.EC_P256, KeyKind.EC_P384, KeyKind.RSA_2048])
def test_id_30_a_request_holds_no_private_key(kind: KeyKind) -> None:
    """ID-30: what a node sends to have signed holds nothing of its private key."""
    made = make_key(kind)
    private: Any = serialization.load_der_private_key(made, password=None)
    numbers = private.private_numbers()
    secrets = [numbers.private_value] if kind is not KeyKind.RSA_2048 else [
        numbers.d, numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp]  # fmt: skip
    csr = make_csr(made, SpiffeId(TD, "/w"))
    leaf = sign_x509(prepared(public_key=public_key_of(csr))).svid.leaf

    for secret in secrets:
        octets = secret.to_bytes((secret.bit_length() + 7) // 8, "big")
        assert octets in made
        assert octets not in csr
        assert octets not in leaf
