"""
X509-SVIDs by the standard: what we issue, and what we accept (conformance 2.2 and 3.4).

One file a standard, in the order of its clauses: hence over 500 lines.
"""

import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import renew_at
from spiffe_core.pem import certificates_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid, X509SvidError, verify_x509_svid
from tests.support import der
from tests.support.authorities import DAY, NOW, a_key, key_usage
from tests.support.ca import BOTH, Cert, Ext, FakeCa, ext, name, uri_san
from tests.support.issuing import KINDS, TD, an_active_x509, bundles_of, issued

LEAF_KINDS = ("p256", "p384", "p521", "rsa2048", "ed25519")
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
OPENSSL = shutil.which("openssl")
Oid = ExtensionOID
UNKNOWN = r"no X\.509 authority is known"


def verified(ca: FakeCa, leaf: Cert | None = None, at: datetime = NOW) -> X509Svid:
    """What the bundle of *ca*'s root proves of the chain."""
    return verify_x509_svid(ca.chain(leaf), ca.bundles, at=at)


def refused(ca: FakeCa, leaf: Cert | None, match: str, at: datetime = NOW) -> None:
    """The chain proves nothing, and the text names the rule."""
    with pytest.raises(X509SvidError, match=match):
        verified(ca, leaf, at)


def our_leaf(**changes: Any) -> x509.Certificate:
    """A leaf as the product signs it."""
    return x509.load_der_x509_certificate(issued(**changes).svid.leaf)


def our_root(kind: str = "p256") -> x509.Certificate:
    """A root as the product makes it."""
    return x509.load_der_x509_certificate(an_active_x509(kind).authority.der)


def extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    """One extension."""
    return certificate.extensions.get_extension_for_class(kind)


def uris_of(certificate: x509.Certificate) -> list[str]:
    """The URI SANs."""
    names = extension(certificate, x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


# What we issue.


@pytest.mark.parametrize("dns_names", [(), ("db.example.org",), ("a.example", "b.example")])
def test_we_issue_one_uri_san(dns_names: tuple[str, ...]) -> None:
    """X509-01, X509-03: a leaf of ours has one URI SAN, its ID, whatever DNS names it has."""
    leaf = our_leaf(dns_names=dns_names)
    names = extension(leaf, x509.SubjectAlternativeName).value

    assert uris_of(leaf) == ["spiffe://example.org/w"]
    assert names.get_values_for_type(x509.DNSName) == list(dns_names)
    assert len(list(names)) == 1 + len(dns_names)


def test_we_issue_no_leaf_without_a_path() -> None:
    """X509-05: the trust domain's own ID is refused for a leaf."""
    with pytest.raises(MalformedError, match="must have a path"):
        issued(spiffe_id=TD.id)


@pytest.mark.parametrize("dns_names", [(), ("db.example.org",), ("x" * 63 + ".example",)])
def test_an_empty_subject_has_a_critical_san(dns_names: tuple[str, ...]) -> None:
    """X509-06: the SAN of a leaf of ours is critical exactly when its subject is empty."""
    leaf = our_leaf(dns_names=dns_names)

    assert extension(leaf, x509.SubjectAlternativeName).critical == (not list(leaf.subject))
    assert verify_x509_svid(
        (leaf.public_bytes(Encoding.DER),), bundles_of(an_active_x509()), at=NOW
    )


@pytest.mark.parametrize("kind", KINDS)
def test_our_root(kind: str) -> None:
    """
    X509-07 to X509-10, X509-14, X509-19 to X509-22, X509-26, ID-26, ID-27: a root of ours is
    a CA in critical words, signs certificates and CRLs and nothing else, and carries its
    trust domain's own ID.
    """
    root = our_root(kind)
    constraints = extension(root, x509.BasicConstraints)
    usage = extension(root, x509.KeyUsage)

    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=None)
    assert usage.critical
    assert usage.value == key_usage("key_cert_sign", "crl_sign")
    assert uris_of(root) == ["spiffe://example.org"] == [TD.id.uri]


@pytest.mark.parametrize("kind", KINDS)
def test_our_root_is_self_signed_and_bare(kind: str) -> None:
    """
    X509-17, X509-29, X509-40, ID-28: a root of ours is signed by its own key, and has no name
    constraints and no extended key usage.
    """
    root = our_root(kind)
    root.verify_directly_issued_by(root)

    kinds = {one.oid for one in root.extensions}
    assert kinds == {
        Oid.BASIC_CONSTRAINTS, Oid.KEY_USAGE, Oid.SUBJECT_ALTERNATIVE_NAME,
        Oid.SUBJECT_KEY_IDENTIFIER,
    }  # fmt: skip


def test_our_roots_have_different_names() -> None:
    """X509-45: two roots never share a name, so that no path builder confuses them."""
    first = our_root()
    second = x509.load_der_x509_certificate(an_active_x509(which="another").authority.der)

    assert first.subject != second.subject
    assert list(first.subject)
    assert str(first.serial_number) in first.subject.rfc4514_string()


@pytest.mark.parametrize("kind", LEAF_KINDS)
def test_our_leaf_profile(kind: str) -> None:
    """
    X509-15, X509-19, X509-20, X509-23 to X509-25, X509-27, X509-28, IOP-05, IOP-07, ID-33: the
    profile of a leaf of ours is the table of conformance 3.4, for every kind of key.
    """
    key = a_key(kind, "workload").public_key()
    leaf = our_leaf(public_key=spki_of(key))
    constraints = extension(leaf, x509.BasicConstraints)
    usage = extension(leaf, x509.KeyUsage)
    purposes = extension(leaf, x509.ExtendedKeyUsage)

    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)
    assert usage.critical
    assert usage.value == key_usage("digital_signature")
    assert not purposes.critical
    assert set(purposes.value) == set(BOTH)
    assert {one.oid for one in leaf.extensions} == {
        Oid.BASIC_CONSTRAINTS, Oid.KEY_USAGE, Oid.EXTENDED_KEY_USAGE,
        Oid.SUBJECT_ALTERNATIVE_NAME, Oid.SUBJECT_KEY_IDENTIFIER, Oid.AUTHORITY_KEY_IDENTIFIER,
    }  # fmt: skip
    assert leaf.public_key() == key


@pytest.mark.parametrize(
    ("oid", "value"),
    [
        (Oid.BASIC_CONSTRAINTS, "3000"),
        (Oid.KEY_USAGE, "03020780"),
        (Oid.EXTENDED_KEY_USAGE, "301406082b0601050507030106082b06010505070302"),
    ],
    ids=["basicConstraints", "keyUsage", "extKeyUsage"],
)
def test_the_bytes_of_our_leaf(oid: x509.ObjectIdentifier, value: str) -> None:
    """X509-15, X509-23, X509-28: the constant extensions of a leaf have these very bytes."""
    found = our_leaf().extensions.get_extension_for_oid(oid)
    assert found.value.public_bytes().hex() == value


@pytest.mark.parametrize(
    ("oid", "value"),
    [(Oid.BASIC_CONSTRAINTS, "30030101ff"), (Oid.KEY_USAGE, "03020106")],
    ids=["basicConstraints", "keyUsage"],
)
def test_the_bytes_of_our_root(oid: x509.ObjectIdentifier, value: str) -> None:
    """X509-14, X509-22: the constant extensions of a root have these very bytes."""
    found = our_root().extensions.get_extension_for_oid(oid)
    assert found.value.public_bytes().hex() == value


@pytest.mark.parametrize("kind", KINDS)
def test_the_rfc_5280_profile_of_what_we_sign(kind: str) -> None:
    """
    X509-45, X509-10: version 3, a positive serial of at most 20 octets, an issuer with a name
    in the leaf's own trust domain, and key identifiers that lead from leaf to root.
    """
    root, leaf = our_root(kind), our_leaf(authority=an_active_x509(kind))

    for certificate in (root, leaf):
        assert certificate.version is x509.Version.v3
        assert 0 < certificate.serial_number < 1 << 159
    assert leaf.issuer == root.subject
    assert list(leaf.issuer)
    named = extension(leaf, x509.AuthorityKeyIdentifier).value
    assert named.key_identifier == extension(root, x509.SubjectKeyIdentifier).value.digest
    assert named.authority_cert_issuer is None
    assert SpiffeId.parse(uris_of(leaf)[0]).trust_domain == TD


@pytest.mark.parametrize(
    ("ttl", "tag"), [(timedelta(days=365), 0x17), (timedelta(days=365 * 30), 0x18)]
)
def test_instants_are_written_as_rfc_5280_says(ttl: timedelta, tag: int) -> None:
    """X509-45: our instants are UTCTime through 2049 and GeneralizedTime from 2050."""
    made = an_active_x509(which="long", ttl=ttl).authority
    text = made.validity.not_after.strftime("%Y%m%d%H%M%SZ")
    written = (text[2:] if tag == 0x17 else text).encode()

    assert bytes((tag, len(written))) + written in made.der


def test_a_leaf_lies_inside_its_issuer() -> None:
    """X509-46: a leaf never ends after its authority, nor begins before it."""
    short = an_active_x509(which="short", ttl=timedelta(minutes=10))
    made = issued(short, ttl=HOUR)

    assert made.clamped
    assert made.svid.validity.not_after == short.authority.validity.not_after
    assert made.svid.validity.not_before >= short.authority.validity.not_before
    assert issued().svid.validity.not_before == NOW - timedelta(seconds=60)


@pytest.mark.parametrize("seconds", [1, 5, 30, 60, 239, 240, 3600])
def test_a_short_life_is_backdated_less(seconds: int) -> None:
    """SEC-106: however short its life, a leaf is never due for renewal as it begins."""
    validity = issued(ttl=timedelta(seconds=seconds)).svid.validity

    assert validity.not_before == NOW - min(timedelta(seconds=60), SECOND * (seconds // 4))
    assert renew_at(validity, -1) > NOW


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaf_kind", LEAF_KINDS)
def test_we_accept_what_we_issue(kind: str, leaf_kind: str) -> None:
    """X509-30, IOP-07: each kind of authority vouches for each kind of leaf."""
    authority = an_active_x509(kind)
    key = a_key(leaf_kind, "workload").public_key()
    made = issued(authority, public_key=spki_of(key))

    proved = verify_x509_svid(made.svid.chain, bundles_of(authority), at=NOW)
    assert proved == made.svid
    assert proved.spiffe_id.uri == "spiffe://example.org/w"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dns_names", [(), ("db.example.org",)])
def test_the_library_accepts_what_we_issue(kind: str, dns_names: tuple[str, ...]) -> None:
    """X509-45: `cryptography`'s verifier takes our chains, as client and by DNS name."""
    authority = an_active_x509(kind)
    leaf = our_leaf(authority=authority, dns_names=dns_names)
    policy = (
        PolicyBuilder()
        .store(Store([our_root(kind)]))
        .time(NOW.replace(tzinfo=None))
        .extension_policies(
            ca_policy=ExtensionPolicy.webpki_defaults_ca(),
            ee_policy=ExtensionPolicy.webpki_defaults_ee(),
        )
    )

    assert policy.build_client_verifier().verify(leaf, [])
    for dns_name in dns_names:
        assert policy.build_server_verifier(x509.DNSName(dns_name)).verify(leaf, [])


@pytest.mark.skipif(OPENSSL is None, reason="no openssl program on this machine")
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
@pytest.mark.parametrize("kind", KINDS)
def test_openssl_accepts_what_we_issue(kind: str, purpose: str, tmp_path: Path) -> None:
    """X509-45, X509-06, X509-28: `openssl verify -x509_strict` takes our chains."""
    authority = an_active_x509(kind)
    root = tmp_path / "root.pem"
    root.write_text(certificates_to_pem([authority.authority.der]))
    leaves = []
    for number, dns_names in enumerate([(), ("db.example.org",)]):
        leaves.append(tmp_path / f"leaf{number}.pem")
        made = issued(authority, dns_names=dns_names)
        leaves[-1].write_text(certificates_to_pem(made.svid.chain))

    done = subprocess.run(
        [str(OPENSSL), "verify", "-x509_strict", "-purpose", purpose, "-attime",
         str(int(NOW.timestamp())), "-CAfile", root, *leaves],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(leaves)


# What we accept: the leaf.


def with_names(ca: FakeCa, *uris: str) -> Cert:
    """A leaf with these URI SANs."""
    return ca.leaf().having(uri_san(*uris, critical=True))


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("spiffe://example.org/w", "https://example.org/w"),
        ("spiffe://example.org/w", "spiffe://example.org/w"),
        ("spiffe://example.org/w", "spiffe://example.org/x"),
        ("https://example.org/w", "spiffe://example.org/w"),
        ("spiffe://example.org/w", ""),
    ],
    ids=[
        "none",
        "a web one beside",
        "twice the same",
        "two",
        "a web one first",
        "an empty one",
    ],
)
def test_more_or_less_than_one_uri_san(uris: tuple[str, ...]) -> None:
    """X509-02: anything but one URI SAN is refused, whatever the URIs are."""
    ca = FakeCa()
    others = () if uris else (x509.DNSName("w.example.org"),)
    leaf = ca.leaf().having(uri_san(*uris, others=others, critical=True))
    refused(ca, leaf, "exactly one URI SAN")


def test_no_san_at_all() -> None:
    """X509-02: a leaf without any SAN is refused."""
    ca = FakeCa()
    leaf = ca.leaf(subject=name("w")).without(Oid.SUBJECT_ALTERNATIVE_NAME)
    refused(ca, leaf, "exactly one URI SAN")


def test_other_kinds_of_name() -> None:
    """X509-03: DNS, IP and mail names beside the one URI do no harm."""
    ca = FakeCa()
    others = (x509.DNSName("w.example.org"), x509.RFC822Name("w@example.org"))
    leaf = ca.leaf().having(uri_san("spiffe://example.org/w", others=others, critical=True))

    assert verified(ca, leaf).spiffe_id.path == "/w"


@pytest.mark.parametrize("intermediate", [False, True])
def test_a_signing_certificate_is_no_identity(intermediate: bool) -> None:
    """X509-04, X509-12, X509-32: a CA that presents itself is nobody, good as its ID may be."""
    ca = FakeCa().child() if intermediate else FakeCa()
    named = ca.changed(ca.cert.having(uri_san("spiffe://example.org/ca", critical=False)))

    for one in (ca, named):
        with pytest.raises(X509SvidError, match=r"no identity|no authority key identifier"):
            verify_x509_svid((one.cert.der,), ca.bundles, at=NOW)


def test_a_ca_with_every_right_of_a_leaf() -> None:
    """X509-32: cA TRUE alone is enough to be refused."""
    ca = FakeCa()
    leaf = ca.leaf().having(ext(x509.BasicConstraints(True, None), critical=True))
    refused(ca, leaf, "cA TRUE")


@pytest.mark.parametrize(
    ("subject", "critical", "good"),
    [("", True, True), ("w", False, True), ("w", True, True), ("", False, False)],
)
def test_subject_and_san(subject: str, critical: bool, good: bool) -> None:
    """X509-06: an empty subject with a SAN that is not critical is the one bad pair."""
    ca = FakeCa()
    leaf = ca.leaf(subject=name(*filter(None, [subject]))).having(
        uri_san("spiffe://example.org/w", critical=critical)
    )
    if good:
        assert verified(ca, leaf)
    else:
        refused(ca, leaf, "empty subject")


@pytest.mark.parametrize("bit", ["key_cert_sign", "crl_sign"])
def test_the_bits_of_a_ca_on_a_leaf(bit: str) -> None:
    """X509-33: keyCertSign and cRLSign are each refused on a leaf."""
    ca = FakeCa()
    usage = ext(key_usage("digital_signature", bit), critical=True)
    refused(ca, ca.leaf().having(usage), "keyCertSign or cRLSign")


def test_a_leaf_without_key_usage() -> None:
    """X509-19, X509-33: without key usage nobody knows what the key is for."""
    ca = FakeCa()
    refused(ca, ca.leaf().without(Oid.KEY_USAGE), "no key usage")


@pytest.mark.parametrize("kind", ["p256", "rsa2048"])
@pytest.mark.parametrize(
    "bits", [(), ("key_encipherment",), ("key_agreement",), ("content_commitment",)]
)
def test_a_leaf_that_may_not_sign(kind: str, bits: tuple[str, ...]) -> None:
    """X509-23: a leaf without digitalSignature is refused, an RSA one too."""
    ca = FakeCa()
    leaf = ca.leaf(kind=kind).having(ext(key_usage(*bits), critical=True))
    refused(ca, leaf, "digitalSignature")


@pytest.mark.parametrize("critical", [True, False])
def test_further_bits_and_criticality(critical: bool) -> None:
    """X509-24, X509-20: keyEncipherment and keyAgreement, and a plain usage, are accepted."""
    ca = FakeCa()
    bits = ("digital_signature", "key_encipherment", "key_agreement")
    leaf = ca.leaf(kind="rsa2048").having(ext(key_usage(*bits), critical=critical))
    assert verified(ca, leaf)


@pytest.mark.parametrize("critical", [True, False])
def test_extended_key_usage(critical: bool) -> None:
    """X509-27, X509-28: both purposes are good, critical or not; one alone is refused."""
    ca = FakeCa()
    assert verified(ca, ca.leaf().having(ext(x509.ExtendedKeyUsage(BOTH), critical)))
    assert verified(ca, ca.leaf().without(Oid.EXTENDED_KEY_USAGE))
    for one in (*BOTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE):
        leaf = ca.leaf().having(ext(x509.ExtendedKeyUsage([one]), critical))
        refused(ca, leaf, "both serverAuth and clientAuth")


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/w", "SPIFFE://example.org/w", "spiffe:example.org/w",
        "spiffe://example.org/w?x", "spiffe://example.org/w#x", "spiffe://u@example.org/w",
        "spiffe://example.org:1/w", "spiffe://example.org//w", "spiffe://example.org/w/",
        "spiffe://example.org/%77", "spiffe://example.org/w\0", "spiffe://example.org\n/w",
        "spiffe://Example.org/w", "spiffe:///w", "spiffe://example.org/./w", "",
        "spiffe://example.org/" + "w" * 2028,
    ],
)  # fmt: skip
def test_the_uri_is_no_spiffe_id(uri: str) -> None:
    """X509-34: the URI SAN is a SPIFFE ID by all of its rules, or the leaf is refused."""
    ca = FakeCa()
    refused(ca, ca.leaf().having(uri_san(uri, critical=True)), "not a SPIFFE ID")


@pytest.mark.parametrize("uri", ["spiffe://example.org", "spiffe://example.org/"])
def test_a_leaf_without_a_path(uri: str) -> None:
    """X509-35, X509-05: a properly signed leaf for the trust domain itself is refused."""
    ca = FakeCa()
    refused(ca, ca.leaf().having(uri_san(uri, critical=True)), "path")


def test_the_longest_id() -> None:
    """ID-20, ID-22: an ID of 2048 bytes, all counted, goes through an X509-SVID."""
    path = "/" + "w" * (2048 - len("spiffe://example.org/"))
    made = issued(spiffe_id=SpiffeId(TD, path))

    assert len(made.svid.spiffe_id.uri) == 2048
    assert verify_x509_svid(made.svid.chain, bundles_of(an_active_x509()), at=NOW)
    assert verified(FakeCa(), FakeCa().leaf(path)).spiffe_id.path == path


# What we accept: the path.


@pytest.mark.parametrize("kinds", [("p256",), ("p384", "p256"), ("rsa2048", "p384", "p256")])
def test_chains_of_signing_certificates(kinds: tuple[str, ...]) -> None:
    """X509-11, X509-13, ID-28, X509-30: a root vouches through intermediates of any kind."""
    ca = FakeCa(kind=kinds[0])
    for number, kind in enumerate(kinds[1:]):
        ca = ca.child(f"sub{number}", kind)

    chain = ca.chain()
    assert len(chain) == len(kinds)
    assert verify_x509_svid(chain, ca.bundles, at=NOW).chain == chain


def test_an_intermediate_may_be_the_authority() -> None:
    """X509-11: what the bundle holds is trusted, a root or not."""
    ca = FakeCa().child()
    bundles = BundleSet.of([Bundle(TD, (ca.authority,))])
    assert verify_x509_svid((ca.leaf().der,), bundles, at=NOW)


@pytest.mark.parametrize(("length", "good"), [(None, True), (1, True), (0, False)])
def test_path_length(length: int | None, good: bool) -> None:
    """X509-16: a path length that the chain breaks is refused."""
    ca = FakeCa(path_length=length).child("a")
    if good:
        assert verified(ca)
    else:
        refused(ca, None, "no valid path")


def constrained(*permitted: str, critical: bool = True) -> FakeCa:
    """A root whose names are constrained to these URI hosts."""
    trees = [x509.UniformResourceIdentifier(host) for host in permitted]
    extra = ext(x509.NameConstraints(trees, None), critical)
    return FakeCa(extra=(extra,))


@pytest.mark.parametrize("host", ["partner.test", "example.org", ".example.org"])
@pytest.mark.parametrize("critical", [True, False])
def test_name_constraints_are_never_passed_over(host: str, critical: bool) -> None:
    """X509-18: a CA with URI constraints, which nothing here evaluates, is refused."""
    refused(constrained(host, critical=critical), None, r"no valid path|must be critical")


@pytest.mark.parametrize(("dns", "good"), [("w.example.org", True), ("w.partner.test", False)])
def test_name_constraints_of_a_known_kind(dns: str, good: bool) -> None:
    """X509-18: constraints on DNS names are honoured."""
    extra = ext(x509.NameConstraints([x509.DNSName("example.org")], None), critical=True)
    ca = FakeCa(extra=(extra,))
    names = uri_san("spiffe://example.org/w", others=(x509.DNSName(dns),), critical=True)
    if good:
        assert verified(ca, ca.leaf().having(names))
    else:
        refused(ca, ca.leaf().having(names), "no valid path")


@pytest.mark.parametrize(
    ("purposes", "good"), [(BOTH, True), (BOTH[:1], False), (BOTH[1:], False)]
)
@pytest.mark.parametrize("on", ["root", "intermediate"])
def test_extended_key_usage_of_a_ca(purposes: Any, good: bool, on: str) -> None:
    """X509-29: a CA that names purposes names both."""
    extra = (ext(x509.ExtendedKeyUsage(purposes)),)
    ca = FakeCa(extra=extra) if on == "root" else FakeCa().child(extra=extra)
    if good:
        assert verified(ca)
    else:
        refused(ca, None, "a CA's extended key usage")


def test_a_foreign_ca_may_sign_other_things() -> None:
    """X509-26: an upstream CA with digitalSignature is accepted, though we issue none."""
    usage = ext(key_usage("key_cert_sign", "digital_signature"), critical=True)
    root = FakeCa()
    assert verified(root.changed(root.cert.having(usage)))
    child = root.child()
    assert verified(child.changed(child.cert.having(usage)))


@pytest.mark.parametrize("uris", [(), ("spiffe://example.org/",), ("https://ca.example",)])
def test_a_foreign_ca_needs_no_id(uris: tuple[str, ...]) -> None:
    """X509-08: a foreign authority without an ID, or with a slash at its end, is accepted."""
    root = FakeCa()
    bare = root.cert.without(Oid.SUBJECT_ALTERNATIVE_NAME)
    cert = bare.having(uri_san(*uris, critical=False)) if uris else bare
    assert verified(root.changed(cert))


def test_an_intermediate_without_a_right() -> None:
    """X509-07, X509-14, X509-21, IOP-06: whatever stands after the leaf is a CA that signs."""
    root = FakeCa()
    child = root.child()
    for cert in (
        child.cert.without(Oid.BASIC_CONSTRAINTS),
        child.cert.having(ext(x509.BasicConstraints(False, None), critical=True)),
        child.cert.without(Oid.KEY_USAGE),
        child.cert.having(ext(key_usage("crl_sign"), critical=True)),
    ):
        refused(child.changed(cert), None, "must be a CA with keyCertSign")


def test_a_stray_leaf_in_the_chain() -> None:
    """IOP-06: another leaf behind the leaf is refused, useless as it is."""
    ca = FakeCa()
    chain = (*ca.chain(), ca.leaf("/other").der)
    with pytest.raises(X509SvidError, match="must be a CA"):
        verify_x509_svid(chain, ca.bundles, at=NOW)


def a_broken_path(how: str) -> tuple[FakeCa, tuple[bytes, ...]]:
    """A chain of three with one defect."""
    root = FakeCa()
    child = root.child()
    leaf = child.leaf()
    past = {"not_before": NOW - 2 * DAY, "not_after": NOW - DAY}
    coming = {"not_before": NOW + DAY, "not_after": NOW + 2 * DAY}
    unknown = Ext(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), der.NULL, critical=True)
    made: dict[str, tuple[Cert, Cert]] = {
        "expired leaf": (leaf.but(**past), child.cert),
        "expired intermediate": (leaf, child.cert.but(**past)),
        "leaf of tomorrow": (leaf.but(**coming), child.cert),
        "intermediate of tomorrow": (leaf, child.cert.but(**coming)),
        "leaf by a wrong key": (leaf.but(signer=a_key("p256", "evil")), child.cert),
        "intermediate by a wrong key": (leaf, child.cert.but(signer=a_key("p256", "evil"))),
        "wrong issuer name": (leaf.but(issuer=name("nobody")), child.cert),
        "wrong name of the root": (leaf, child.cert.but(issuer=name("nobody"))),
        "unknown critical extension on the leaf": (leaf.adding(unknown), child.cert),
        "unknown critical extension above": (leaf, child.cert.adding(unknown)),
        "leaf signed by another leaf": (leaf.but(signer=a_key("p256", "workload")), child.cert),
    }
    bad_leaf, bad_child = made[how]
    return root, (bad_leaf.der, bad_child.der)


@pytest.mark.parametrize(
    "how",
    [
        "expired leaf", "expired intermediate", "leaf of tomorrow", "intermediate of tomorrow",
        "leaf by a wrong key", "intermediate by a wrong key", "wrong issuer name",
        "wrong name of the root", "unknown critical extension on the leaf",
        "unknown critical extension above", "leaf signed by another leaf",
    ],
)  # fmt: skip
def test_broken_paths(how: str) -> None:
    """X509-30: a path with one defect, anywhere in it, is no path."""
    root, chain = a_broken_path(how)
    assert verified(root.child())
    with pytest.raises(X509SvidError):
        verify_x509_svid(chain, root.bundles, at=NOW)


def test_a_missing_intermediate() -> None:
    """X509-30: a chain that leaves out its middle is refused."""
    ca = FakeCa().child()
    with pytest.raises(X509SvidError, match="no valid path"):
        verify_x509_svid(ca.chain()[:1], ca.bundles, at=NOW)


def test_intermediates_in_any_order() -> None:
    """X509-30: the order behind the leaf, and a root that was sent along, do no harm."""
    ca = FakeCa().child("a").child("b")
    leaf, b, a = ca.chain()
    for chain in ((leaf, a, b), (leaf, b, a, ca.root.cert.der)):
        assert verify_x509_svid(chain, ca.bundles, at=NOW)


# What we accept: the anchors.


def test_no_bundle_no_svid() -> None:
    """X509-31: without a bundle, or with one that holds no X.509 authority, all is refused."""
    ca = FakeCa()
    jwt_only = Bundle(TD, (), ca.bundle.jwt_authorities)
    for bundles in (BundleSet(), BundleSet.of([Bundle(TD)]), BundleSet.of([jwt_only])):
        with pytest.raises(X509SvidError, match=UNKNOWN):
            verify_x509_svid(ca.chain(), bundles, at=NOW)


def test_a_bundle_of_jwt_keys_vouches_for_no_x509_svid() -> None:
    """X509-44: a trust domain without X.509 authorities has no X509-SVIDs."""
    ca = FakeCa()
    bundles = BundleSet.of([Bundle(TD, (), ca.bundle.jwt_authorities)])
    with pytest.raises(X509SvidError, match=UNKNOWN):
        verify_x509_svid(ca.chain(), bundles, at=NOW)


def test_every_authority_of_the_bundle_counts() -> None:
    """X509-44: an SVID under any of a bundle's authorities is good, and under no other."""
    roots = [FakeCa(which=str(number)) for number in range(4)]
    bundles = BundleSet.of([Bundle(TD, tuple(one.authority for one in roots[:3]))])

    for one in roots[:3]:
        assert verify_x509_svid(one.chain(), bundles, at=NOW)
    with pytest.raises(X509SvidError, match="no valid path"):
        verify_x509_svid(roots[3].chain(), bundles, at=NOW)


@pytest.mark.parametrize("signer", ["example.org", "partner.test", "evil.test"])
@pytest.mark.parametrize("claimed", ["example.org", "partner.test", "evil.test"])
def test_only_the_id_s_own_trust_domain_vouches(signer: str, claimed: str) -> None:
    """
    ID-25, X509-31, SEC-11: of three trust domains whose bundles are all known, each vouches
    for its own IDs and for nobody else's.
    """
    cas = {domain: FakeCa(domain) for domain in ("example.org", "partner.test", "evil.test")}
    bundles = BundleSet.of([ca.bundle for ca in cas.values()])
    chain = cas[signer].chain(cas[signer].leaf(f"spiffe://{claimed}/w"))

    if signer == claimed:
        found = verify_x509_svid(chain, bundles, at=NOW)
        assert found.spiffe_id.uri == f"spiffe://{claimed}/w"
    else:
        with pytest.raises(X509SvidError, match="no valid path"):
            verify_x509_svid(chain, bundles, at=NOW)


@pytest.mark.parametrize("signer", ["example.org", "partner.test"])
def test_an_intermediate_does_not_bridge_trust_domains(signer: str) -> None:
    """SEC-11: an intermediate of one trust domain does not vouch in another."""
    cas = {domain: FakeCa(domain).child() for domain in ("example.org", "partner.test")}
    bundles = BundleSet.of([ca.bundle for ca in cas.values()])
    ca = cas[signer]
    other = next(domain for domain in cas if domain != signer)

    assert verify_x509_svid(ca.chain(), bundles, at=NOW)
    with pytest.raises(X509SvidError, match="no valid path"):
        verify_x509_svid(ca.chain(ca.leaf(f"spiffe://{other}/w")), bundles, at=NOW)


def test_a_root_with_the_name_and_key_id_of_another() -> None:
    """ID-25, X509-30: a look-alike root, down to its name and key ID, signs nothing."""
    good = FakeCa()
    evil = good.leaf(signer=a_key("p256", "evil"))
    refused(good, evil, "no valid path")


def test_an_unknown_trust_domain() -> None:
    """ID-25, X509-31: an ID of a trust domain without a bundle is refused, any signer."""
    ca = FakeCa()
    refused(ca, ca.leaf("spiffe://unknown.test/w"), UNKNOWN)


# The signed part.


def test_id_and_key_are_in_the_signed_part() -> None:
    """ID-29: no bit of the SAN or of the public key can be flipped."""
    ca = FakeCa()
    leaf = ca.leaf()
    whole = leaf.der
    uri = b"spiffe://example.org/w"
    assert verify_x509_svid((whole,), ca.bundles, at=NOW)
    spots = [whole.index(part) + at for part in (uri, leaf.spki) for at in range(len(part))]
    for spot in spots:
        for bit in range(8):
            broken = bytearray(whole)
            broken[spot] ^= 1 << bit
            with pytest.raises(X509SvidError):
                verify_x509_svid((bytes(broken),), ca.bundles, at=NOW)


def test_another_authority_of_the_same_domain_is_named_by_key() -> None:
    """X509-45: two authorities that share a name are told apart by their key IDs."""
    first, second = FakeCa(which="1"), FakeCa(which="2")
    second.name = first.name
    second = second.changed(second.cert.but(subject=first.name, issuer=first.name))
    bundles = BundleSet.of([Bundle(TD, (first.authority, second_authority(second)))])

    assert verify_x509_svid(first.chain(), bundles, at=NOW)
    assert verify_x509_svid((second.leaf(issuer=first.name).der,), bundles, at=NOW)


def second_authority(ca: FakeCa) -> X509Authority:
    """The authority of a CA whose certificate was changed."""
    return X509Authority.parse(ca.cert.der)
