"""
Single defects: hundreds of certificates, each with one fault and a good twin (SEC-10).

Then what stands around the profile: anchors, sizes, keys, instants, and whether what we read
is what TLS and OpenSSL read.

Over 500 lines: the tables of one subject stay together.
"""

import random
import shutil
import ssl
import subprocess
import time
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffe_core.authority import AuthorityError, X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.keys import spki_of
from spiffe_core.pem import PemError, certificates_from_pem, certificates_to_pem
from spiffe_core.x509svid import X509Svid, X509SvidError, verify_x509_svid
from spiffe_wire.frontdoor.tls import client_context, peer_chain, server_context
from tests.support import der
from tests.support.authorities import DAY, NOW, a_key, key_usage, pkcs8_of
from tests.support.ca import BOTH, Cert, Ext, FakeCa, ext, name, uri_san
from tests.support.defects import (
    DEFECTS,
    UNKNOWN,
    Change,
    fields,
    key,
    lack,
    purposes,
    put,
    raw,
    usage,
)

# The library warns of what it reads now and will refuse in some later release; what it does
# today must be right without that.
pytestmark = pytest.mark.filterwarnings(
    "ignore::cryptography.utils.CryptographyDeprecationWarning"
)

Oid = ExtensionOID
OPENSSL = shutil.which("openssl")
SECOND = timedelta(seconds=1)


@cache
def bases() -> dict[str, tuple[FakeCa, Cert]]:
    """Good leaves of several kinds, each with the CA that signs it."""
    p256, p384, rsa_ = FakeCa(), FakeCa(kind="p384"), FakeCa(kind="rsa2048")
    deep = FakeCa().child()
    named = p256.leaf(subject=name("w")).having(
        uri_san("spiffe://example.org/w", others=(x509.DNSName("w.example"),), critical=False)
    )
    return {
        "p256": (p256, p256.leaf()),
        "p384": (p384, p384.leaf(kind="p384")),
        "rsa": (rsa_, rsa_.leaf(kind="rsa2048")),
        "below an intermediate": (deep, deep.leaf()),
        "with a subject and a DNS name": (p256, named),
    }


def verify(ca: FakeCa, leaf: Cert, at: datetime = NOW) -> X509Svid:
    """What the bundle of the CA's root proves of this leaf."""
    return verify_x509_svid(ca.chain(leaf), ca.bundles, at=at)


@pytest.mark.parametrize("base", bases())
@pytest.mark.parametrize("defect", DEFECTS)
def test_sec_10_single_defects(defect: str, base: str) -> None:
    """SEC-10: a certificate with one fault is refused for it, and its twin without is good."""
    good, bad, text = DEFECTS[defect]
    ca, leaf = bases()[base]

    assert verify(ca, good(leaf)).spiffe_id.uri == "spiffe://example.org/w"
    with pytest.raises(X509SvidError, match=text):
        verify(ca, bad(leaf))


def test_the_corpus_is_large() -> None:
    """SEC-10: at least 300 faulty certificates are tried."""
    assert len(DEFECTS) * len(bases()) >= 300


@pytest.mark.parametrize(
    "change",
    [
        lack(Oid.EXTENDED_KEY_USAGE), lack(Oid.BASIC_CONSTRAINTS),
        lack(Oid.SUBJECT_KEY_IDENTIFIER), purposes(*BOTH, critical=True),
        purposes(*BOTH, ExtendedKeyUsageOID.CODE_SIGNING),
        usage("digital_signature", critical=False),
        usage("digital_signature", "key_encipherment", "key_agreement"), raw(UNKNOWN, b"junk"),
        put(x509.BasicConstraints(False, None)), key("p521"), key("ed25519"), key("p384"),
        fields(digest="sha384"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", bases())
def test_sec_10_what_is_allowed(base: str, change: Change) -> None:
    """SEC-10, C-14: what the profile leaves open is accepted."""
    ca, leaf = bases()[base]
    assert verify(ca, change(leaf))


def test_an_id_with_the_longest_trust_domain() -> None:
    """SEC-10, ID-23: a trust domain of 255 bytes is good, and the corpus has the one of 256."""
    ca = FakeCa("d" * 255)
    assert verify(ca, ca.leaf()).spiffe_id.trust_domain == ca.trust_domain


@pytest.mark.parametrize(
    "der_", [b"", b"\x30", b"\x30\x80", b"\x30\x00", b"-----BEGIN CERTIFICATE-----", b"\0" * 99]
)
def test_what_is_no_certificate(der_: bytes) -> None:
    """SEC-10: bytes that are no certificate are refused by our error, wherever they are."""
    ca = FakeCa()
    for chain in ((der_,), (*ca.chain(), der_)):
        with pytest.raises(X509SvidError):
            verify_x509_svid(chain, ca.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="no certificate"):
        verify_x509_svid((), ca.bundles, at=NOW)


def test_pem_and_ber_are_not_der() -> None:
    """SEC-10: the same certificate as PEM, in long lengths, or cut off is not accepted."""
    ca = FakeCa()
    whole = ca.leaf().der
    assert whole[1] == 0x82
    long_length = bytes((0x30, 0x83, 0)) + whole[2:]
    for bad in (certificates_to_pem([whole]).encode(), long_length, whole[:-1], whole[1:]):
        with pytest.raises(X509SvidError):
            verify_x509_svid((bad,), ca.bundles, at=NOW)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_bytes(data: st.DataObject) -> None:
    """SEC-10: a certificate with bytes changed anywhere is refused, by our error alone."""
    ca, leaf = bases()["p256"]
    broken = bytearray(leaf.der)
    for spot in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=4)):
        broken[spot] = data.draw(st.integers(0, 255))
    if bytes(broken) != leaf.der:
        with pytest.raises(X509SvidError):
            verify_x509_svid((bytes(broken),), ca.bundles, at=NOW)


# Anchors (SEC-12).


def anchors() -> dict[str, tuple[bytes, str]]:
    """What must not become an anchor, and what the refusal says."""
    ca = FakeCa()
    leaf = ca.leaf()
    own = leaf.but(issuer=leaf.subject, signer=a_key("p256", "workload"))
    return {
        "a leaf": (leaf.der, "cA TRUE"),
        "a self-signed leaf": (own.but(subject=name("w"), issuer=name("w")).der, "cA TRUE"),
        "no basicConstraints": (ca.cert.without(Oid.BASIC_CONSTRAINTS).der, "needs"),
        "no keyUsage": (ca.cert.without(Oid.KEY_USAGE).der, "needs"),
        "no keyCertSign": (
            ca.cert.having(ext(key_usage("digital_signature", "crl_sign"), True)).der,
            "keyCertSign",
        ),
        "an SVID's path": (
            ca.cert.having(uri_san("spiffe://example.org/w", critical=False)).der,
            "no path",
        ),
        "two certificates": (ca.cert.der * 2, "not one DER"),
        "nothing": (b"", "empty"),
        "a tail": (ca.cert.der + b"\0", "not one DER"),
    }


@pytest.mark.parametrize("what", anchors())
def test_sec_12_only_cas_are_anchors(what: str) -> None:
    """SEC-12, X509-07, X509-09: a bundle takes one CA that may sign, and nothing else."""
    der_, text = anchors()[what]
    assert X509Authority.parse(FakeCa().cert.der)
    with pytest.raises(MalformedError, match=text):
        X509Authority.parse(der_)


@pytest.mark.parametrize("kind", ["rsa1024", "p224", "k256", "rsa-e3", "dsa", "ed448"])
def test_sec_12_sec_15_keys_of_anchors(kind: str) -> None:
    """SEC-12, SEC-15: a CA on a key that is not accepted is no anchor."""
    cert = FakeCa().cert.but(spki=spki_of(a_key(kind, "anchor").public_key()))
    with pytest.raises(AuthorityError):
        X509Authority.parse(cert.der)


def test_sec_12_no_private_key_beside() -> None:
    """SEC-12: a file of anchors with a private key in it is refused as a whole."""
    text = certificates_to_pem([FakeCa().cert.der])
    assert certificates_from_pem(text)
    with pytest.raises(PemError, match="private key"):
        certificates_from_pem(text + "-----BEGIN PRIVATE KEY-----\nAA==\n")


# CAs on the way up (SEC-10, SEC-13).

OTHER_ID = b"\1" * 20
DIRECTORY = [x509.DirectoryName(x509.Name([]))]
CA_DEFECTS: dict[str, tuple[Change, str]] = {
    "no SKI": (lack(Oid.SUBJECT_KEY_IDENTIFIER), "no subject key identifier|no valid path"),
    "SKI of another key": (put(x509.SubjectKeyIdentifier(OTHER_ID)), "no valid path"),
    "SKI critical": (
        lambda c: c.having(ext(x509.SubjectKeyIdentifier(b"\2" * 20), critical=True)),
        "no valid path",
    ),
    "AKI of another key": (
        put(x509.AuthorityKeyIdentifier(OTHER_ID, None, None)), "no valid path|its own key"),
    "AKI without a key ID": (
        put(x509.AuthorityKeyIdentifier(None, DIRECTORY, 1)),
        "no authority key identifier|key ID alone",
    ),
    "constraints not critical": (put(x509.BasicConstraints(True, None)), "no valid path"),
    "an unknown critical extension": (raw(UNKNOWN, b"\x05\x00", True), "no valid path"),
    "name constraints not critical": (
        put(x509.NameConstraints([x509.DNSName("a")], None)), "must be critical"),
    "an extension twice": (
        lambda c: c.adding(c.find(Oid.KEY_USAGE)), "cannot be read|not one DER"),
    "no name": (
        lambda c: c.but(subject=name(), issuer=name() if c.issuer == c.subject else c.issuer),
        "no valid path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["root", "intermediate"])
@pytest.mark.parametrize("defect", CA_DEFECTS)
def test_sec_13_defects_of_a_ca(defect: str, where: str) -> None:
    """SEC-13, X509-45, X509-18, X509-30: one fault in a CA above, and the leaf is refused."""
    change, text = CA_DEFECTS[defect]
    ca = FakeCa() if where == "root" else FakeCa().child()
    bad = ca.changed(change(ca.cert))
    assert verify_x509_svid(ca.chain(), ca.bundles, at=NOW)
    with pytest.raises(MalformedError, match=text):
        verify_x509_svid(bad.chain(), bad.bundles, at=NOW)


@pytest.mark.parametrize(
    ("identifier", "good"),
    [
        (lambda ca: x509.AuthorityKeyIdentifier(ca.key_id, None, None), True),
        (lambda ca: x509.AuthorityKeyIdentifier(ca.key_id, DIRECTORY, 1), False),
        (lambda ca: x509.AuthorityKeyIdentifier(OTHER_ID, None, None), False),
    ],
    ids=["its own key ID", "its issuer too", "another key's"],
)
def test_sec_13_what_a_root_says_of_its_issuer(identifier: Any, good: bool) -> None:
    """SEC-13, X509-45: a root may name its own key as its issuer's, and nothing else."""
    plain = FakeCa()
    root = plain.changed(plain.cert.having(ext(identifier(plain))))
    if good:
        assert verify_x509_svid(root.chain(), root.bundles, at=NOW)
    else:
        with pytest.raises(X509SvidError, match="a root's authority key identifier"):
            verify_x509_svid(root.chain(), root.bundles, at=NOW)


# Sizes and work (SEC-14).


def padded(cert: Cert, size: int) -> bytes:
    """A certificate of exactly *size* bytes."""
    for pad in range(size - len(cert.der) - 60, size):
        found = cert.adding(Ext(UNKNOWN, b"\x04" * pad)).der
        if len(found) >= size:
            return found
    raise AssertionError(size)


def exactly(cert: Cert, size: int) -> bytes:
    """`padded`, tried until the signature's length, which varies, fits."""
    return next(one for _ in range(200) if len(one := padded(cert, size)) == size)


def test_sec_14_certificate_size() -> None:
    """SEC-14: a certificate of 16 KiB is read, one byte more is refused unread."""
    ca = FakeCa()
    assert verify_x509_svid((exactly(ca.leaf(), 16384),), ca.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="longer than 16384 bytes"):
        verify_x509_svid((exactly(ca.leaf(), 16385),), ca.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="longer than 16384 bytes"):
        verify_x509_svid((b"\x30" * 16385,), ca.bundles, at=NOW)


def test_sec_14_chain_length() -> None:
    """SEC-14: five certificates are a chain, six are refused."""
    ca = FakeCa()
    for number in range(4):
        ca = ca.child(str(number))
    assert len(ca.chain()) == 5
    assert verify_x509_svid(ca.chain(), ca.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="chain is too long"):
        verify_x509_svid((*ca.chain(), ca.root.cert.der), ca.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="chain is too long"):
        verify_x509_svid(ca.child("5").chain(), ca.bundles, at=NOW)


def test_sec_14_chain_size() -> None:
    """SEC-14: a chain over 64 KiB is refused before its certificates are read."""
    with pytest.raises(X509SvidError, match="chain is too long"):
        verify_x509_svid((b"\x30" * 16384,) * 4 + (b"\x30",), BundleSet(), at=NOW)
    with pytest.raises(X509SvidError, match="not a DER"):
        verify_x509_svid((b"\x30" * 16384,) * 4, BundleSet(), at=NOW)


def forest(shape: str) -> tuple[tuple[bytes, ...], BundleSet]:
    """Chains made to be searched for long; the attacker knows the roots' names and key IDs."""
    roots = [FakeCa(which=str(number)) for number in range(100)]
    alike = [one.changed(one.cert.but(subject=name("r"), issuer=name("r"))) for one in roots]
    evil = FakeCa(which="evil")
    child = evil.child("c").cert
    if shape == "four alike":
        certs = [child.but(subject=name("x"), issuer=name("x"), serial=n + 1) for n in range(4)]
    elif shape == "two that sign each other":
        pairs = [("x", "y"), ("y", "x")] * 2
        certs = [child.but(subject=name(s), issuer=name(i), serial=n + 1)
                 for n, (s, i) in enumerate(pairs)]  # fmt: skip
    else:
        certs = [child.but(subject=name("r"), issuer=name("r"), serial=n + 1) for n in range(4)]
    first = certs[0].subject
    key_ids = [x509.AuthorityKeyIdentifier(one.key_id, None, None) for one in alike]
    signed = [
        cert.but(signer=a_key("p256", "example.org c")).having(ext(key_ids[number]))
        for number, cert in enumerate(certs)
    ]
    leaf = evil.leaf(issuer=first, signer=a_key("p256", "example.org c"))
    chain = (leaf.having(ext(key_ids[99])).der, *(one.der for one in signed))
    authorities = tuple(X509Authority.parse(one.cert.der) for one in alike)
    return chain, BundleSet.of([Bundle(evil.trust_domain, authorities)])


@pytest.mark.parametrize(
    "shape", ["four alike", "two that sign each other", "named as the roots"]
)
def test_sec_14_search_is_bounded(shape: str) -> None:
    """SEC-14: a chain that would take over 64 signature checks is refused before the first."""
    chain, bundles = forest(shape)
    began = time.process_time()
    with pytest.raises(X509SvidError, match="too many signature checks"):
        verify_x509_svid(chain, bundles, at=NOW)
    assert time.process_time() - began < 0.05


def test_sec_14_a_hundred_roots_of_one_name() -> None:
    """SEC-14: a full bundle whose roots share a name costs no more than one root."""
    roots = [FakeCa(which=str(number)) for number in range(100)]
    alike = [one.changed(one.cert.but(subject=name("r"), issuer=name("r"))) for one in roots]
    authorities = tuple(X509Authority.parse(one.cert.der) for one in alike)
    bundles = BundleSet.of([Bundle(roots[0].trust_domain, authorities)])
    for ca in (alike[0], alike[99]):
        assert verify_x509_svid((ca.leaf(issuer=name("r")).der,), bundles, at=NOW)


def test_sec_14_random_forests() -> None:
    """SEC-14: whatever cross-signed heap is sent, the answer comes at once and is ours."""
    rand = random.Random(14)
    roots = [FakeCa(which=str(number)) for number in range(4)]
    keys = [a_key("p256", f"example.org {number}") for number in range(4)]
    bundles = BundleSet.of([Bundle(roots[0].trust_domain, (roots[0].authority,))])
    took = []
    for _ in range(150):
        names = [name(rand.choice("abc")) for _ in range(4)] + [roots[0].name]
        middle = [
            roots[0].child().cert.but(
                subject=rand.choice(names), issuer=rand.choice(names), signer=rand.choice(keys),
                spki=spki_of(rand.choice(keys).public_key()), serial=n + 1,
            ).having(ext(x509.AuthorityKeyIdentifier(roots[0].key_id, None, None)))
            for n in range(rand.randrange(5))
        ]  # fmt: skip
        leaf = roots[0].leaf(issuer=rand.choice(names), signer=rand.choice(keys))
        began = time.process_time()
        try:
            verify_x509_svid((leaf.der, *(one.der for one in middle)), bundles, at=NOW)
        except X509SvidError:
            pass
        took.append(time.process_time() - began)
    assert sorted(took)[int(len(took) * 0.99)] < 0.05


@pytest.mark.parametrize(
    "rule",
    [
        x509.PolicyConstraints(0, None), x509.InhibitAnyPolicy(0),
        x509.UnrecognizedExtension(Oid.POLICY_MAPPINGS, der.sequence(
            der.sequence(der.oid("1.2.3"), der.oid("1.2.4")))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("critical", [True, False])
def test_sec_14_policy_rules(rule: x509.ExtensionType, critical: bool) -> None:
    """SEC-14: policy mappings and their kin on a CA are refused, critical or not."""
    added = Ext(rule.oid, rule.public_bytes(), critical)
    for ca in (FakeCa(extra=(added,)), FakeCa().child(extra=(added,))):
        with pytest.raises(X509SvidError, match="policy rules"):
            verify_x509_svid(ca.chain(), ca.bundles, at=NOW)


# Keys and hashes on the way up (SEC-15).


@pytest.mark.parametrize("kind", ["rsa1024", "p224", "k256", "rsa-e3", "ed448", "dsa"])
def test_sec_15_keys_of_intermediates(kind: str) -> None:
    """SEC-15: a key that is not accepted is refused in the middle of a chain too."""
    child = FakeCa().child()
    weak = child.changed(child.cert.but(spki=spki_of(a_key(kind, "weak").public_key())))
    with pytest.raises(X509SvidError, match=r"keys must|RSA|EC"):
        verify_x509_svid(weak.chain(), weak.bundles, at=NOW)


@pytest.mark.parametrize("digest", ["md5", "sha1", "sha224"])
@pytest.mark.parametrize("where", ["leaf", "intermediate"])
def test_sec_15_hashes(digest: str, where: str) -> None:
    """SEC-15: MD5, SHA-1 and SHA-224 are refused in leaf and intermediate alike."""
    root = FakeCa(kind="rsa2048")
    child = root.child(kind="rsa2048")
    if where == "leaf":
        bad, leaf = child, child.leaf(digest=digest)
    else:
        bad, leaf = child.changed(child.cert.but(digest=digest)), child.leaf()
    assert verify_x509_svid(child.chain(), root.bundles, at=NOW)
    with pytest.raises(X509SvidError, match="hash"):
        verify_x509_svid(bad.chain(leaf), root.bundles, at=NOW)


def test_sec_15_ed25519_signs_no_certificate() -> None:
    """SEC-15, IOP-07: a leaf may have an Ed25519 key, an authority of certificates may not."""
    ca = FakeCa()
    assert verify(ca, ca.leaf(kind="ed25519"))
    ed = FakeCa(kind="ed25519")
    with pytest.raises(X509SvidError, match="no valid path"):
        verify_x509_svid(ed.chain(), ed.bundles, at=NOW)


# Instants (SEC-16).


def dated(who: str, begin: datetime, end: datetime) -> tuple[tuple[bytes, ...], BundleSet]:
    """A chain of three in which one certificate is valid from *begin* to *end*."""
    wide = {"not_before": datetime(1990, 1, 1, tzinfo=UTC),
            "not_after": datetime(2100, 1, 1, tzinfo=UTC)}  # fmt: skip
    narrow = {"not_before": begin, "not_after": end}
    root = FakeCa(**(narrow if who == "root" else wide))
    child = root.child(**(narrow if who == "intermediate" else wide))
    leaf = child.leaf(**(narrow if who == "leaf" else wide))
    return child.chain(leaf), root.bundles


EDGES = [
    datetime(2026, 3, 1, 12, tzinfo=UTC),
    datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC),
    datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
    datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2050, 1, 1, tzinfo=UTC),
    datetime(2028, 2, 29, 12, tzinfo=UTC),
]


@pytest.mark.parametrize("edge", EDGES, ids=lambda one: one.isoformat())
@pytest.mark.parametrize("who", ["leaf", "intermediate", "root"])
def test_sec_16_edges(who: str, edge: datetime) -> None:
    """SEC-16: at both edges of leaf, intermediate and anchor one second decides."""
    began = dated(who, edge, edge + DAY)
    ended = dated(who, edge - DAY, edge)
    for (chain, bundles), offset, good in (
        (began, -SECOND, False), (began, 0 * SECOND, True), (began, SECOND, True),
        (ended, -SECOND, True), (ended, 0 * SECOND, True), (ended, SECOND, False),
    ):  # fmt: skip
        if good:
            assert verify_x509_svid(chain, bundles, at=edge + offset)
        else:
            with pytest.raises(X509SvidError):
                verify_x509_svid(chain, bundles, at=edge + offset)


@pytest.mark.parametrize("hours", [-12, -5.5, 0, 2, 14])
def test_sec_16_the_instant_may_be_in_any_zone(hours: float) -> None:
    """SEC-16: the same instant in another time zone gives the same answer."""
    zone = timezone(timedelta(hours=hours))
    chain, bundles = dated("intermediate", NOW, NOW + timedelta(hours=1))
    assert verify_x509_svid(chain, bundles, at=NOW.astimezone(zone))
    with pytest.raises(X509SvidError):
        verify_x509_svid(chain, bundles, at=(NOW - SECOND).astimezone(zone))


# One reading (SEC-18).


def handshake(ca: FakeCa, leaf: Cert) -> tuple[bytes, ...]:
    """A TLS handshake in memory; what the server says that the client sent."""
    authorities = [ca.root.authority.der]
    pkcs8 = pkcs8_of(a_key("p256", "workload"))
    server_side = server_context(ca.chain(leaf), pkcs8, authorities)
    client_side = client_context(authorities, ca.chain(leaf), pkcs8)
    one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(one, two, server_side=True)
    client = client_side.wrap_bio(two, one)
    waiting = [client, server, client, server]
    for side in waiting:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert server.version() in ("TLSv1.2", "TLSv1.3")
    return peer_chain(server)


@pytest.mark.parametrize("deep", [False, True])
def test_sec_18_what_tls_verified_is_what_we_read(deep: bool) -> None:
    """SEC-18: the chain that TLS hands over is, byte for byte, the one whose ID we take."""
    now = datetime.now(UTC).replace(microsecond=0)
    life = {"not_before": now - DAY, "not_after": now + DAY}
    ca = FakeCa(**life)
    if deep:
        ca = ca.child(**life)
    leaf = ca.leaf(**life)
    sent = handshake(ca, leaf)

    # OpenSSL adds the root from its store when the chain has no intermediate.
    assert sent[0] == leaf.der
    assert sent[1] == (ca.cert.der if deep else ca.root.cert.der)
    assert verify_x509_svid(sent, ca.bundles, at=now).leaf == leaf.der


@pytest.mark.skipif(OPENSSL is None, reason="no openssl program on this machine")
def test_sec_18_openssl_agrees(tmp_path: Path) -> None:
    """SEC-18: of certificates with bytes changed and signed anew, OpenSSL takes all we take."""
    rand = random.Random(18)
    ca = FakeCa()
    whole = ca.leaf()
    accepted = []
    for _ in range(3000):
        tbs = bytearray(whole.tbs)
        for _ in range(rand.choice((1, 1, 1, 2))):
            tbs[rand.randrange(len(tbs))] = rand.choice((0, 1, 2, 0x7F, 0x80, 0xFF,
                                                         rand.randrange(256)))  # fmt: skip
        signed = whole.but()
        object.__setattr__(signed, "tbs", bytes(tbs))
        try:
            verify_x509_svid((signed.der,), ca.bundles, at=NOW)
        except X509SvidError:
            continue
        accepted.append(signed.der)

    assert len(set(accepted)) > 100
    root = tmp_path / "root.pem"
    root.write_text(certificates_to_pem([ca.authority.der]))
    files = []
    for number, one in enumerate(sorted(set(accepted))):
        files.append(tmp_path / f"{number}.pem")
        files[-1].write_text(certificates_to_pem([one]))
    done = subprocess.run(
        [str(OPENSSL), "verify", "-attime", str(int(NOW.timestamp())), "-purpose", "sslclient",
         "-CAfile", root, *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.count(": OK") == len(files)
