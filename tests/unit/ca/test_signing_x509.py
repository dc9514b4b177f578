"""
Prepare, sign, compare: what may be signed, for how long, and what never leaves.

Over 500 lines: the tables of one subject stay together.
"""

import ipaddress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from hypothesis import given, settings
from hypothesis import strategies as st

from ca.active import ActiveX509
from ca.keys.protocol import KeyPurpose, KeyPurposeError, SigningKey
from ca.lint import CHECKS, check_profile, lint_leaf
from ca.x509 import (
    CheckedProfile,
    LintError,
    PreparedX509,
    X509Profile,
    compared,
    leaf_of,
    prepare_x509,
    random_serial,
    self_signed,
    sign_x509,
)
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import MalformedError, NotReadyError
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import verify_x509_svid
from tests.support.authorities import DAY, NOW, a_key, key_usage
from tests.support.ca import BOTH, Cert, Ext, algorithm_of, uri_san
from tests.support.defects import (
    DEFECTS,
    UNKNOWN,
    Change,
    fields,
    key,
    lack,
    purposes,
    put,
    uri,
)
from tests.support.defects import raw as raw_value
from tests.support.issuing import (
    KINDS,
    TD,
    an_active_x509,
    bundles_of,
    checked_profile,
    issued,
    prepared,
)

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
DNS = ("db.example.org", "w.example.org")
Oid = ExtensionOID

pytestmark = pytest.mark.filterwarnings(
    "ignore::cryptography.utils.CryptographyDeprecationWarning"
)


# SEC-22: serial number and lifetime.


def test_sec_22_serials() -> None:
    """SEC-22, X509-45: serials are unique, positive, 129 to 159 bits long, and look random."""
    count = 20_000
    serials = [random_serial() for _ in range(count)]
    assert len(set(serials)) == count
    assert all(1 << 128 <= one < 1 << 159 for one in serials)
    for bit in range(128):
        share = sum(one >> bit & 1 for one in serials) / count
        assert 0.45 < share < 0.55


def test_sec_22_serials_of_what_is_signed() -> None:
    """SEC-22: each certificate has a serial of its own, at most 20 octets on the wire."""
    found = {issued().svid.serial_number for _ in range(50)}
    assert len(found) == 50
    assert all(len(x509.load_der_x509_certificate(issued().svid.leaf).serial_number
                   .to_bytes(20, "big")) == 20 for _ in range(3))  # fmt: skip


@pytest.mark.parametrize(
    ("ttl", "lives", "clamped"),
    [
        (timedelta(0), HOUR, False), (SECOND, SECOND, False), (HOUR, HOUR, False),
        (24 * HOUR, 24 * HOUR, False), (24 * HOUR + SECOND, 24 * HOUR, True),
        (365 * DAY, 24 * HOUR, True), (timedelta(seconds=2**31 - 1), 24 * HOUR, True),
        (timedelta(days=999_999_999), 24 * HOUR, True),
    ],
)  # fmt: skip
def test_sec_22_lifetimes(ttl: timedelta, lives: timedelta, clamped: bool) -> None:
    """SEC-22: what is asked for is given up to the cap; beyond it, it is clamped."""
    made = issued(ttl=ttl)
    assert made.svid.validity.not_after == NOW + lives
    assert made.clamped == clamped


@pytest.mark.parametrize(
    "ttl",
    [-SECOND, -HOUR, timedelta.min, timedelta(microseconds=1), timedelta(milliseconds=1500)],
)
def test_sec_22_bad_lifetimes(ttl: timedelta) -> None:
    """SEC-22: a negative lifetime, or one that is no whole seconds, is refused."""
    with pytest.raises(MalformedError, match="TTL"):
        prepared(ttl=ttl)


@given(
    st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=999_999)),
    st.timedeltas(min_value=timedelta(0), max_value=400 * DAY),
)
def test_sec_22_never_beyond_the_signer(ttl: timedelta, later: timedelta) -> None:
    """SEC-22, X509-46: whenever and however long, a leaf lies inside its authority's life."""
    authority = an_active_x509()
    ends = authority.authority.validity
    now = NOW + later
    try:
        made = prepared(authority, ttl=timedelta(seconds=int(ttl.total_seconds())), now=now)
    except NotReadyError:
        assert now.replace(microsecond=0) >= ends.not_after
        return
    assert ends.not_before <= made.validity.not_before < now < made.validity.not_after
    assert made.validity.not_after <= min(ends.not_after, now + 24 * HOUR)


@pytest.mark.parametrize(
    ("left", "good"), [(timedelta(0), False), (SECOND, True), (-SECOND, False)]
)
def test_an_authority_at_its_end(left: timedelta, good: bool) -> None:
    """SEC-22, X509-46: an authority signs to its last second, for as long as it has."""
    authority = an_active_x509()
    now = authority.authority.validity.not_after - left
    if good:
        made = sign_x509(prepared(authority, now=now))
        assert made.svid.validity.not_after == authority.authority.validity.not_after
        assert made.clamped
    else:
        with pytest.raises(NotReadyError, match="authority has expired"):
            prepared(authority, now=now)


@pytest.mark.parametrize(("ttl", "backdate"), [(1, 0), (3, 0), (4, 1), (100, 25), (240, 60)])
def test_sec_22_a_short_life_is_backdated_less(ttl: int, backdate: int) -> None:
    """SEC-22: a leaf is backdated by a quarter of its life at most."""
    made = issued(ttl=timedelta(seconds=ttl))
    assert made.svid.validity.not_before == NOW - timedelta(seconds=backdate)


@pytest.mark.parametrize("micros", [0, 1, 999_999])
@pytest.mark.parametrize("backdate", [0, 1, 60, 300])
def test_sec_16_backdate(backdate: int, micros: int) -> None:
    """SEC-16: a leaf begins the backdate ago, 0 to 5 minutes, in whole seconds."""
    profile = check_profile(X509Profile(backdate=timedelta(seconds=backdate)), NOW)
    now = NOW + HOUR + timedelta(microseconds=micros)
    made = issued(checked=profile, now=now)
    assert made.svid.validity.not_before == NOW + HOUR - timedelta(seconds=backdate)
    assert verify_x509_svid(made.svid.chain, bundles_of(an_active_x509()), at=now)


@pytest.mark.parametrize(
    "changes",
    [
        {"default_ttl": timedelta(0)}, {"default_ttl": -HOUR}, {"default_ttl": 25 * HOUR},
        {"default_ttl": HOUR, "max_ttl": HOUR - SECOND}, {"max_ttl": timedelta(0)},
        {"backdate": -SECOND}, {"backdate": timedelta(seconds=301)},
        {"default_ttl": timedelta(milliseconds=500)}, {"backdate": timedelta(milliseconds=1)},
        {"max_ttl": timedelta(hours=24, microseconds=1)},
    ],
)  # fmt: skip
def test_profiles_that_cannot_be(changes: dict[str, timedelta]) -> None:
    """SEC-22, SEC-24: a profile with an impossible lifetime does not exist."""
    with pytest.raises(MalformedError):
        X509Profile(**changes)


@pytest.mark.parametrize("at", [
    datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2050, 1, 1, tzinfo=UTC), datetime(2028, 2, 29, tzinfo=UTC),
])  # fmt: skip
def test_sec_16_dates_that_break_others(at: datetime) -> None:
    """SEC-16: leaves around 2038 and 2050 are signed and verify, on both sides of the date."""
    signing = SigningKey("k", KeyPurpose.X509_CA, a_key("p256", "ca"))
    active = ActiveX509(self_signed(signing, TD, now=at - DAY, ttl=DAY * 3), signing)
    made = issued(active, now=at)
    for offset in (-SECOND, timedelta(0), SECOND):
        assert verify_x509_svid(made.svid.chain, bundles_of(active), at=at + offset)


# What may be prepared at all.


def test_x509_05_a_path_is_needed() -> None:
    """X509-05: nothing is prepared for the trust domain's own ID."""
    with pytest.raises(MalformedError, match="must have a path"):
        prepared(spiffe_id=TD.id)


@pytest.mark.parametrize(
    "names",
    [
        ("",), ("A.example",), ("a..b",), (".a",), ("a.",), ("a b",), ("a\0b",), ("-a",),
        ("a" * 64,), ("a." * 127 + "a",), ("ä.example",), ("a", "b", ""), ("*",), ("*.*.a",),
        ("spiffe://example.org/w",), ("a/b",), ("1.2.3.4:5",), ("a,b",),
    ],
)  # fmt: skip
def test_sec_24_names_that_cannot_be(names: tuple[str, ...]) -> None:
    """SEC-24, SEC-25: a DNS name that is none is refused before anything is signed."""
    with pytest.raises(MalformedError, match="DNS name"):
        prepared(dns_names=names)


def test_sec_25_the_number_of_names() -> None:
    """SEC-25: 64 DNS names are signed, 65 are refused."""
    names = tuple(f"n{number}.example.org" for number in range(65))
    leaf = x509.load_der_x509_certificate(issued(dns_names=names[:64]).svid.leaf)
    found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tuple(found.get_values_for_type(x509.DNSName)) == names[:64]
    with pytest.raises(MalformedError, match="more than 64 DNS names"):
        prepared(dns_names=names)


@pytest.mark.parametrize("kind", ["p224", "k256", "rsa1024", "rsa-e3", "ed448", "dsa"])
def test_sec_15_keys_that_get_no_leaf(kind: str) -> None:
    """SEC-15: a key of another kind gets no leaf."""
    made = prepared(public_key=spki_of(a_key(kind).public_key()))
    with pytest.raises(MalformedError):
        sign_x509(made)


@pytest.mark.parametrize("public_key", [b"", b"\x30\x00", b"key"])
def test_bytes_that_are_no_key(public_key: bytes) -> None:
    """SEC-24: bytes that are no public key get no leaf."""
    with pytest.raises(MalformedError):
        sign_x509(prepared(public_key=public_key))


def test_sec_24_signed_once() -> None:
    """SEC-24: what was prepared is signed once; the second time nothing leaves."""
    made = prepared()
    assert sign_x509(made)
    with pytest.raises(LintError, match="signed once"):
        sign_x509(made)


def test_sec_24_a_profile_that_was_not_linted() -> None:
    """SEC-24: a profile that has not passed can't sign, and nobody else can pass it."""
    profile = X509Profile()
    for proof in (None, True, object(), profile):
        with pytest.raises(LintError, match="before `check_profile` has seen it"):
            CheckedProfile(profile, proof)
    with pytest.raises(AttributeError):
        prepare_x509(
            profile,  # type: ignore[arg-type]
            an_active_x509(),
            spiffe_id=SpiffeId(TD, "/w"),
            public_key=spki_of(a_key().public_key()),
            now=NOW,
        )
    with pytest.raises(AttributeError):
        checked_profile().profile = profile  # type: ignore[misc]


@pytest.mark.parametrize(
    "profile",
    [
        X509Profile(), X509Profile(SECOND, SECOND), X509Profile(HOUR, 24 * HOUR, timedelta(0)),
        X509Profile(HOUR, 10_000 * DAY, timedelta(minutes=5)),
    ],
)  # fmt: skip
def test_sec_24_a_good_profile_passes(profile: X509Profile) -> None:
    """SEC-24: a profile is linted by signing with a throw-away key, and then signs."""
    checked = check_profile(profile, NOW + timedelta(microseconds=7))
    assert checked.profile is profile
    assert issued(checked=checked)


# SEC-24: what was signed is what was prepared, or it does not leave.


def template(made: PreparedX509) -> Cert:
    """The certificate that the product signs for *made*, as bytes that can be changed."""
    leaf = leaf_of(made)
    return Cert(
        subject=leaf.subject.public_bytes(),
        issuer=made.authority.issuer_name.public_bytes(),
        spki=made.public_key,
        signer=leaf.signer,
        extensions=tuple(
            Ext(one.oid, one.value.public_bytes(), one.critical) for one in leaf.extensions
        ),
        serial=made.serial_number,
        not_before=made.validity.not_before,
        not_after=made.validity.not_after,
        digest="sha384" if getattr(leaf.signer, "curve", None).__class__.__name__ == "SECP384R1"
        else "sha256",
    )  # fmt: skip


BASES: dict[str, dict[str, Any]] = {"plain": {}, "with DNS names": {"dns_names": DNS}}

# Rows of the corpus that change nothing but the signature, which the library has just made.
OF_THE_SIGNATURE = {
    "another key's signature", "no signature", "a signature of zeros", "signature with a tail",
    "inner algorithm differs",
}  # fmt: skip
# The same once more, for values that are no defect in others' certificates.
OTHERS: dict[str, Change] = {
    "no EKU": lack(Oid.EXTENDED_KEY_USAGE),
    "no constraints": lack(Oid.BASIC_CONSTRAINTS),
    "no SKI": lack(Oid.SUBJECT_KEY_IDENTIFIER),
    "EKU critical": purposes(*BOTH, critical=True),
    "a third purpose": purposes(*BOTH, ExtendedKeyUsageOID.CODE_SIGNING),
    "purposes turned round": purposes(*BOTH[::-1]),
    "usage not critical": put(key_usage("digital_signature")),
    "keyEncipherment": put(key_usage("digital_signature", "key_encipherment"), True),
    "keyAgreement": put(key_usage("digital_signature", "key_agreement"), True),
    "nonRepudiation": put(key_usage("digital_signature", "content_commitment"), True),
    "constraints not critical": put(x509.BasicConstraints(False, None)),
    "an unknown extension": raw_value(UNKNOWN, b"\x05\x00"),
    "certificate policies": put(
        x509.CertificatePolicies([x509.PolicyInformation(UNKNOWN, None)])
    ),
    "no check of revocation": put(x509.OCSPNoCheck()),
    "must staple": put(x509.TLSFeature([x509.TLSFeatureType.status_request])),
    "where to ask": put(
        x509.CRLDistributionPoints([
            x509.DistributionPoint(
                [x509.UniformResourceIdentifier("http://a/")], None, None, None)
        ])
    ),
    "another ID": uri("spiffe://example.org/v"),
    "an ID below": uri("spiffe://example.org/w/x"),
    "an ID in another case": uri("spiffe://example.org/W"),
    "a foreign ID": uri("spiffe://partner.test/w"),
    "an agent's ID": uri("spiffe://example.org/spire/agent/x"),
    "another SKI": put(x509.SubjectKeyIdentifier(b"\1" * 20)),
    "another AKI": put(x509.AuthorityKeyIdentifier(b"\1" * 20, None, None)),
    "AKI with a serial": put(
        x509.AuthorityKeyIdentifier(b"\1" * 20, [x509.DirectoryName(x509.Name([]))], 1)
    ),
    "an address": lambda c: c.having(_names(x509.RFC822Name("w@example.org"))),
    "an IP address": lambda c: c.having(_names(x509.IPAddress(_ip()))),
    "a DNS name more": lambda c: c.having(_names(x509.DNSName("x.example.org"))),
    "the DNS names turned round": lambda c: c.having(
        _names(*(x509.DNSName(one) for one in DNS[::-1]))),
    "another key": key("p384"),
    "an RSA key": key("rsa2048"),
    "a day longer": lambda c: c.but(not_after=c.not_after + DAY),
    "a second longer": lambda c: c.but(not_after=c.not_after + SECOND),
    "a second shorter": lambda c: c.but(not_after=c.not_after - SECOND),
    "a second earlier": lambda c: c.but(not_before=c.not_before - SECOND),
    "a second later": lambda c: c.but(not_before=c.not_before + SECOND),
    "the next serial": lambda c: c.but(serial=c.serial + 1),
    "a small serial": fields(serial=1),
    "another subject": lambda c: c.but(subject=x509.Name([
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]).public_bytes()),
    "a second subject": lambda c: c.but(subject=x509.Name([
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "db.example.org"),
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "x")]).public_bytes()),
    "another issuer": lambda c: c.but(issuer=x509.Name([
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "other")]).public_bytes()),
    "another hash": fields(digest="sha512"),
    "extensions in another order": lambda c: c.but(extensions=c.extensions[::-1]),
}  # fmt: skip


def _names(*others: x509.GeneralName) -> Ext:
    return uri_san("spiffe://example.org/w", others=others, critical=True)


def _ip() -> Any:
    return ipaddress.ip_address("192.0.2.1")


MUTATIONS: dict[str, Change] = {
    name: bad for name, (_, bad, _) in DEFECTS.items() if name not in OF_THE_SIGNATURE
} | OTHERS


def test_sec_24_there_are_two_hundred() -> None:
    """SEC-24: at least 200 mutations are tried, and the untouched certificate is accepted."""
    assert len(MUTATIONS) * len(BASES) >= 200
    for changes in BASES.values():
        made = prepared(**changes)
        assert compared(template(made).der, made, leaf_of(made)).spiffe_id == made.spiffe_id


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_sec_24_no_mutation_leaves(name: str, base: str) -> None:
    """SEC-24: a certificate that differs in anything from what was prepared does not leave."""
    made = prepared(**BASES[base])
    whole = template(made)
    changed = MUTATIONS[name](whole)
    assert changed != whole
    with pytest.raises(LintError, match="thrown away"):
        compared(changed.der, made, leaf_of(made))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sec_24_no_byte_can_change(data: st.DataObject) -> None:
    """SEC-24: with any byte of the signed part changed, the certificate does not leave."""
    made, cert = ready()
    whole = bytearray(cert.der)
    spot = data.draw(st.integers(4, 3 + len(cert.tbs)))
    value = data.draw(st.integers(0, 255))
    if whole[spot] == value or spot in free_spots(cert, bytes(whole)):
        return
    whole[spot] = value
    with pytest.raises(LintError):
        compared(bytes(whole), made, leaf_of(made))


@cache
def ready() -> tuple[PreparedX509, Cert]:
    """One that was prepared, and what it is to become."""
    made = prepared(dns_names=DNS)
    return made, template(made)


def free_spots(cert: Cert, whole: bytes) -> set[int]:
    """
    Bytes that do not change what is read: which kind of text a name is written in, the form
    of a point, the count of unused bits, and the inner copy of the signature's algorithm.
    """

    def at(part: bytes) -> range:
        start = whole.find(part)
        return range(start, start + len(part))

    texts = {
        spot for part in (cert.issuer, cert.subject) for spot in at(part)
        if whole[spot] in (0x0C, 0x13)
    }  # fmt: skip
    point = at(cert.spki).stop - 65
    unused = at(cert.find(Oid.KEY_USAGE).value).start + 2
    return {*texts, point, unused, *at(algorithm_of(cert.signer, cert.digest))}


@pytest.mark.parametrize(
    "name",
    [
        "no EKU", "no constraints", "no SKI", "EKU critical", "a third purpose",
        "usage not critical", "keyEncipherment", "keyAgreement", "nonRepudiation",
        "constraints not critical", "an unknown extension", "certificate policies",
        "no check of revocation", "must staple", "where to ask", "an address", "an IP address",
        "a small serial",
    ],
)  # fmt: skip
def test_sec_24_the_lint_has_a_check_for_it(name: str) -> None:
    """SEC-24: what no leaf of ours may have, a named check finds, before anything counts."""
    whole = template(prepared())
    lint_leaf(x509.load_der_x509_certificate(whole.der))
    changed = x509.load_der_x509_certificate(OTHERS[name](whole).der)
    with pytest.raises(LintError, match=r"the profile breaks (X509|SEC|conformance)"):
        lint_leaf(changed)


@pytest.mark.parametrize(
    "defect",
    [
        "empty SAN", "two URIs", "a web URI beside", "ID 'spiffe://example.org'", "cA TRUE",
        "no key usage", "keyCertSign", "cRLSign", "no digitalSignature", "serverAuth alone",
        "no AKI", "name constraints", "unknown critical extension", "no SAN",
        "SAN not critical, no subject", "serial 0", "ID 'https://example.org/w'",
    ],
)  # fmt: skip
def test_sec_24_the_lint_refuses_defects(defect: str) -> None:
    """SEC-24: the lint refuses a leaf with a defect of SEC-10, by the name of a rule."""
    bad = DEFECTS[defect][1](template(prepared()))
    with pytest.raises(LintError, match=r"the profile breaks (X509|SEC|conformance)"):
        lint_leaf(x509.load_der_x509_certificate(bad.der))


def test_every_check_can_fail() -> None:
    """SEC-24: there is no check in the lint that no certificate fails."""
    whole = template(prepared())
    failed = set()
    for change in (*MUTATIONS.values(), fields(issuer=x509.Name([]).public_bytes())):
        for rule, check in CHECKS.items():
            try:
                good = check(x509.load_der_x509_certificate(change(whole).der))
            except Exception:
                good = False
            if not good:
                failed.add(rule)
    assert failed == set(CHECKS)


# SEC-60: a key signs what it is for.


def test_sec_60_a_jwt_key_signs_no_certificate() -> None:
    """SEC-60: a certificate by a key that is for JWTs is a type error, for leaf and root."""
    wrong = SigningKey("jwt", KeyPurpose.JWT, a_key("p256", "ca"))
    active = ActiveX509(an_active_x509().authority, wrong)
    with pytest.raises(KeyPurposeError, match="for jwt alone"):
        sign_x509(prepared(active))
    with pytest.raises(TypeError):
        self_signed(wrong, TD, now=NOW, ttl=DAY)


def test_sec_60_nothing_secret_in_a_repr() -> None:
    """SEC-90: no repr of what signs holds a key."""
    active = an_active_x509()
    number = active.private.private_numbers().private_value
    for shown in (repr(active), repr(prepared()), repr(leaf_of(prepared())), repr(issued())):
        assert str(number) not in shown
        assert "EllipticCurvePrivateKey" not in shown


# Roots.


@pytest.mark.parametrize("kind", KINDS)
def test_id_26_a_root_of_each_kind(kind: str) -> None:
    """ID-26, X509-09, X509-45: every kind of key makes a root with its trust domain's ID."""
    authority = an_active_x509(kind).authority
    root = x509.load_der_x509_certificate(authority.der)
    names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org"]
    assert authority.validity == Validity(NOW - timedelta(seconds=60), NOW + 365 * DAY)
    root.verify_directly_issued_by(root)


def test_a_root_of_the_longest_trust_domain() -> None:
    """ID-23, ID-26: a trust domain of 255 bytes has a root, and leaves under it verify."""
    domain = TrustDomain("d" * 255)
    signing = SigningKey("k", KeyPurpose.X509_CA, a_key("p256", "ca"))
    active = ActiveX509(self_signed(signing, domain, now=NOW, ttl=DAY), signing)
    made = issued(active, spiffe_id=SpiffeId(domain, "/w"))
    known = BundleSet.of([Bundle(domain, (active.authority,))])
    assert verify_x509_svid(made.svid.chain, known, at=NOW).spiffe_id.trust_domain == domain


def test_prepared_values_are_what_was_asked() -> None:
    """SEC-24: what is prepared carries exactly what was asked for."""
    made = prepared(dns_names=DNS, ttl=2 * HOUR)
    assert made.spiffe_id == SpiffeId(TD, "/w")
    assert made.dns_names == DNS
    assert made.public_key == spki_of(a_key("p256", "workload").public_key())
    assert not made.clamped
