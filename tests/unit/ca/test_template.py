"""The template writes what the library's builder does, byte for byte."""

import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ca.x509
from ca.active import ActiveX509, signature_hash
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.template import TbsTemplate, has_issuer
from ca.x509 import (
    LintError,
    PreparedX509,
    built,
    compared,
    leaf_of,
    names_of,
    self_signed,
    sign_x509,
    tbs_of,
)
from spiffe_core.authority import X509Authority
from spiffe_core.entry import MAX_DNS_NAMES
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import MAX_ID_BYTES, SCHEME, SpiffeId, TrustDomain
from tests.support.authorities import DAY, NOW, a_key
from tests.support.ca import ext, name
from tests.support.defects import UNKNOWN
from tests.support.issuing import TD, an_active_x509, issued, prepared

AUTHORITIES = ("p256", "p384", "rsa2048")
LEAVES = ("p256", "p384", "p521", "rsa2048", "ed25519")
SECOND = timedelta(seconds=1)
LAST_OF_2049 = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)

letters = st.sampled_from("abcxyz0189")
labels = st.text(letters, min_size=1, max_size=63)
dns_names = st.builds(
    lambda star, parts: ".".join([*(["*"] if star else []), *parts])[:253].rstrip("."),
    st.booleans(),
    st.lists(labels, min_size=1, max_size=5),
).filter(lambda one: one != "*")
segments = st.text(st.sampled_from("azAZ09._-"), min_size=1, max_size=600).filter(
    lambda one: one not in (".", "..")
)
paths = (
    st.lists(segments, min_size=1, max_size=4)
    .map(lambda parts: "/" + "/".join(parts)[: MAX_ID_BYTES - 30].strip("/."))
    .filter(lambda one: one != "/" and not one.endswith(("/.", "/..")))
)
instants = st.integers(0, 150 * 365 * 86_400).map(
    lambda seconds: datetime.fromtimestamp(seconds, UTC)
)
serials = st.one_of(
    st.integers(1, 300),
    st.sampled_from([0x7F, 0x80, 0xFF, 1 << 127, (1 << 128) - 1, (1 << 159) - 1, 1 << 158]),
    st.integers(1 << 128, (1 << 159) - 1),
)


def both(made: PreparedX509) -> tuple[bytes, bytes]:
    """What is signed for *made*: as the template has it, and as the builder has it."""
    leaf = leaf_of(made)
    template = made.authority.template
    assert template is not None
    return tbs_of(template, made, leaf), built(made, leaf).tbs_certificate_bytes


def a_leaf_to_be(
    authority: str = "p256",
    key: str = "p256",
    *,
    path: str = "/w",
    begin: datetime = NOW,
    life: timedelta = timedelta(hours=1),
    serial: int = 1 << 150,
    **changes: Any,
) -> PreparedX509:
    """A prepared leaf whose instants and serial number are given, whatever the authority's."""
    made = prepared(
        an_active_x509(authority),
        spiffe_id=SpiffeId(TD, path),
        public_key=spki_of(a_key(key, "workload").public_key()),
        **changes,
    )
    return replace(made, validity=Validity(begin, begin + life), serial_number=serial)


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(AUTHORITIES),
    st.sampled_from(LEAVES),
    paths,
    st.lists(dns_names, max_size=MAX_DNS_NAMES).map(tuple),
    instants,
    st.integers(1, 86_400 * 400),
    serials,
)
@example("p256", "p256", "/w", (), LAST_OF_2049, 1, 1 << 158)
@example("p256", "p256", "/w", (), LAST_OF_2049 + SECOND, 1, 0x80)
@example("p384", "rsa2048", "/w", ("a" * 63,) * MAX_DNS_NAMES, NOW, 1, 1)
def test_sec_24_the_same_bytes(
    authority: str,
    key: str,
    path: str,
    names: tuple[str, ...],
    begin: datetime,
    seconds: int,
    serial: int,
) -> None:
    """SEC-24, X509-45: whatever a leaf holds, template and builder sign the same bytes."""
    made = a_leaf_to_be(
        authority, key, path=path, dns_names=names, begin=begin,
        life=timedelta(seconds=seconds), serial=serial,
    )  # fmt: skip
    ours, librarys = both(made)
    assert ours == librarys


@pytest.mark.parametrize("authority", AUTHORITIES)
@pytest.mark.parametrize("key", LEAVES)
def test_sec_15_every_kind_of_key(authority: str, key: str) -> None:
    """SEC-15: each kind of key may be a leaf's below each kind of authority, in one form."""
    ours, librarys = both(a_leaf_to_be(authority, key))
    assert ours == librarys


@pytest.mark.parametrize("size", [*range(1, 260), 1000, MAX_ID_BYTES])
def test_x509_45_every_length(size: int) -> None:
    """X509-45: lengths take the shortest form, whichever the ID's size makes it."""
    shortest = len(SCHEME) + len(TD.name) + 1
    ours, librarys = both(
        a_leaf_to_be(path="/" + "a" * max(1, min(size, MAX_ID_BYTES - shortest)))
    )
    assert ours == librarys


@pytest.mark.parametrize("count", [0, 1, 2, 3, MAX_DNS_NAMES])
@pytest.mark.parametrize("first", [1, 63, 64, 65, 253])
def test_x509_06_every_subject(count: int, first: int) -> None:
    """X509-06: with or without a subject, and with a DNS name too long for one."""
    longest = ".".join(["a" * 63] * 4)
    names = (longest[-first:].lstrip(".") or "a", *(f"b{n}" for n in range(count - 1)))
    made = a_leaf_to_be(dns_names=names[:count])
    ours, librarys = both(made)
    assert ours == librarys
    assert leaf_of(made).names.extension.critical == (not list(leaf_of(made).subject))


@pytest.mark.parametrize("begin", [LAST_OF_2049 + n * SECOND for n in (-2, -1, 0, 1, 2)])
@pytest.mark.parametrize("seconds", [1, 2, 3600])
def test_sec_22_the_turn_of_2050(begin: datetime, seconds: int) -> None:
    """SEC-22: an instant has two digits for the year through 2049, and four from 2050 on."""
    ours, librarys = both(a_leaf_to_be(begin=begin, life=seconds * SECOND))
    assert ours == librarys


@pytest.mark.parametrize(
    "serial", [1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 1 << 127, 1 << 128, (1 << 159) - 1]
)
def test_sec_22_every_serial(serial: int) -> None:
    """SEC-22: a serial number is positive, also when its highest bit is set."""
    ours, librarys = both(a_leaf_to_be(serial=serial))
    assert ours == librarys


def test_x509_45_an_issuer_of_another_maker() -> None:
    """X509-45: the issuer's name is as its certificate has it, whatever it is made of."""
    subject = x509.Name([
        x509.NameAttribute(NameOID.COUNTRY_NAME, "AT"),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Größe " * 10),
        x509.NameAttribute(NameOID.COMMON_NAME, "ca", x509.name._ASN1Type.PrintableString),
        x509.NameAttribute(NameOID.DN_QUALIFIER, "x" * 60),
    ])  # fmt: skip
    key = a_key("p256", "other maker")
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 77)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(b"any"), critical=False)
        .add_extension(ca.active.key_usage(key_cert_sign=True), critical=True)
        .sign(key, signature_hash(key))
    )
    active = ActiveX509(
        X509Authority.parse(certificate.public_bytes(Encoding.DER)),
        SigningKey("other", KeyPurpose.X509_CA, key),
    )
    ours, librarys = both(prepared(active))
    assert ours == librarys


def test_sec_24_what_leaves_is_the_templates() -> None:
    """SEC-24: the certificate that is handed out holds what the template wrote."""
    made = prepared()
    ours, _ = both(made)
    signed = sign_x509(made)
    leaf = x509.load_der_x509_certificate(signed.svid.leaf)
    assert leaf.tbs_certificate_bytes == ours
    leaf.verify_directly_issued_by(made.authority.certificate)


def test_sec_24_another_authority_is_the_builders() -> None:
    """SEC-24: an authority that the template does not know signs through the builder."""
    key = SigningKey("odd", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP521R1()))
    active = ActiveX509(self_signed(key, TD, now=NOW, ttl=DAY), key)
    assert active.template is None
    leaf = x509.load_der_x509_certificate(issued(active).svid.leaf)
    leaf.verify_directly_issued_by(active.certificate)


def test_sec_24_no_template_for_a_foreign_extension() -> None:
    """SEC-24: an extension that the template cannot write is left to the builder."""
    active = an_active_x509()
    odd = x509.UnrecognizedExtension(UNKNOWN, b"\x05\x00")
    extensions = [*active.leaf_extensions, x509.Extension(odd.oid, False, odd)]
    key = active.private
    assert TbsTemplate.of(active.issuer_name, extensions, key, signature_hash(key)) is None


@pytest.mark.parametrize("part", ["issuer", "extensions", "algorithm"])
def test_sec_24_a_damaged_template_signs_nothing(part: str) -> None:
    """SEC-24: were a slice of the template wrong, nothing that it makes would leave."""
    right = an_active_x509()
    wrong = {
        "issuer": name("somebody else"),
        "extensions": ext(x509.BasicConstraints(True, None), critical=True).der(),
        "algorithm": an_active_x509("p384").template.algorithm,
    }[part]
    active = ActiveX509(right.authority, right.key)
    active.__dict__["template"] = replace(right.template, **{part: wrong})
    with pytest.raises(LintError, match="thrown away"):
        issued(active)


def test_sec_24_an_issuer_is_found_in_its_place_alone() -> None:
    """SEC-24: the issuer's name counts where the issuer stands, behind what was read as is."""
    made = a_leaf_to_be()
    cert = built(made, leaf_of(made)).public_bytes(Encoding.DER)
    assert made.authority.template is not None
    right = {
        "serial": made.serial_number,
        "algorithm": made.authority.template.algorithm,
        "issuer": made.authority.issuer_der,
    }
    assert has_issuer(cert, **right)
    assert not has_issuer(cert[4:], **right)
    assert not has_issuer(b"\0" + cert, **right)
    assert not has_issuer(cert[:60], **right)
    assert not has_issuer(cert, **right | {"serial": made.serial_number + 1})
    assert not has_issuer(cert, **right | {"issuer": name("somebody else")})
    assert not has_issuer(cert, **right | {"algorithm": b""})


def test_sec_24_another_leafs_bytes_do_not_pass() -> None:
    """SEC-24: what was kept of one ID is never taken for another's, or for other DNS names."""
    seen = set()
    for path, dns in (("/a", ()), ("/b", ()), ("/a", ("a",)), ("/a", ("a", "b"))):
        made = a_leaf_to_be(path=path, dns_names=dns)
        signed = sign_x509(replace(made, validity=prepared().validity)).svid
        names = x509.load_der_x509_certificate(signed.leaf).extensions[4].value
        assert [one.value for one in names] == [f"spiffe://example.org{path}", *dns]
        seen.add(signed.leaf)
    with pytest.raises(LintError):
        compared(seen.pop(), made, leaf_of(a_leaf_to_be(path="/c")))


def test_sec_80_what_is_kept_is_bounded() -> None:
    """SEC-80: encoded names are kept for a bounded number of IDs."""
    bound = names_of.cache_info().maxsize
    assert bound is not None
    domain = TrustDomain("many.test")
    for number in range(bound + 10):
        names_of(SpiffeId(domain, f"/{number}"), ())
    assert names_of.cache_info().currsize == bound


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("authority", AUTHORITIES)
@pytest.mark.parametrize("dns", [(), ("db.example.org", "*.example.org")], ids=["", "dns"])
def test_x509_45_openssl_takes_it(authority: str, dns: tuple[str, ...], tmp_path: Path) -> None:
    """X509-45: `openssl verify -x509_strict` takes what the template makes."""
    active = an_active_x509(authority)
    root, leaf = tmp_path / "root.pem", tmp_path / "leaf.pem"
    root.write_bytes(active.certificate.public_bytes(Encoding.PEM))
    svid = issued(active, dns_names=dns).svid
    leaf.write_bytes(x509.load_der_x509_certificate(svid.leaf).public_bytes(Encoding.PEM))
    at = str(int(NOW.timestamp()) + 1)
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-attime", at, "-CAfile", root, leaf],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
