"""Which files the settings ask for, of what the agent has said."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import pkcs12

from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.bundle_document import bundle_from_jwks
from spiffe_core.errors import PreconditionError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.pem import certificates_from_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid
from tests.support.authorities import DAY, NOW, a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.tokens import a_token
from workload_api.client.client import X509Context, X509Identity
from workload_api.sidecar.config import (
    Bundles,
    JwtFile,
    Kind,
    SidecarSettings,
    WhenDenied,
    X509Files,
)
from workload_api.sidecar.files import File
from workload_api.sidecar.formats import Password
from workload_api.sidecar.plan import FileSet, Known, Plan

CA, PARTNER = FakeCa(), FakeCa("partner.test")
SUB = CA.child()
BUNDLES = BundleSet.of([CA.bundle, PARTNER.bundle])
TOKEN = a_token()
OURS, THEIRS = "bundle.example.org.pem", "bundle.partner.test.pem"


def identity(path: str = "/web", hint: str = "", ca: FakeCa = CA) -> X509Identity:
    """One identity of ours."""
    svid = X509Svid.from_chain(ca.chain(ca.leaf(path)))
    return X509Identity(svid, pkcs8_of(a_key("p256", "workload")), hint)


def known(*identities: X509Identity, bundles: BundleSet = BUNDLES) -> Known:
    """An agent that has said all there is."""
    token = JwtSvid.parse_unverified(TOKEN)
    tokens = {JwtFile(audience=("db",)): token}
    return Known(X509Context(identities or (identity(),), bundles), bundles, tokens)


def plan(**changes: Any) -> Plan:
    """A plan for one SVID, but for *changes*."""
    made = {"dir": Path("/run/svids"), "x509": (X509Files(),), **changes}
    return Plan(SidecarSettings(**made))


def ders(file: File) -> tuple[bytes, ...]:
    """The certificates in a PEM file, which may be empty."""
    return certificates_from_pem(file.content.decode()) if file.content else ()


@pytest.fixture
def password(tmp_path: Path) -> Iterator[Path]:
    """A file with a password."""
    file = tmp_path / "password"
    file.write_bytes(b"secret\n")
    return file


def test_sec_11_a_file_for_each_domain() -> None:
    """SEC-11: each trust domain's authorities are in a file of their own, and in no other."""
    made = plan().files(known(), NOW)
    assert made.problems == ()
    assert set(made.files) == {"svid.pem", "svid.key", OURS, THEIRS}
    assert ders(made.files[OURS]) == (CA.authority.der,)
    assert ders(made.files[THEIRS]) == (PARTNER.authority.der,)
    assert made.files["svid.key"].mode == 0o600
    assert made.expires_at == NOW + timedelta(hours=1)


def test_a_merged_file_only_where_unsafe_is_said() -> None:
    """All domains are in one file only where the setting, which is called unsafe, names one."""
    made = plan(bundles=Bundles(unsafe_merged_file="all.pem")).files(known(), NOW)
    assert set(ders(made.files["all.pem"])) == {CA.authority.der, PARTNER.authority.der}
    assert ders(made.files[OURS]) == (CA.authority.der,)


def test_names_of_ones_own() -> None:
    """Each file can have another name, and the own domain's bundle a fixed one."""
    wanted = X509Files(certificate_file="tls.crt", key_file="tls.key", bundle_file="ca.crt")
    made = plan(x509=(wanted,)).files(known(), NOW)
    assert set(made.files) == {"tls.crt", "tls.key", "ca.crt", OURS, THEIRS}
    assert made.files["ca.crt"] == made.files[OURS]


def test_several_identities() -> None:
    """SVIDs are picked by ID, by hint, and by being the first."""
    wanted = (
        X509Files(name="by-id", spiffe_id="spiffe://example.org/api"),
        X509Files(name="by-hint", hint="internal"),
        X509Files(name="first"),
    )
    three = (identity(), identity("/api"), identity("/db", "internal"))
    made = plan(x509=wanted).files(known(*three), NOW)
    for name, one in (("first", three[0]), ("by-id", three[1]), ("by-hint", three[2])):
        assert ders(made.files[f"{name}.pem"]) == one.svid.chain


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (X509Files(spiffe_id="spiffe://example.org/x"), "the identity spiffe://example.org/x"),
        (X509Files(hint="h"), 'an identity with the hint "h"'),
    ],
    ids=["id", "hint"],
)
def test_one_that_is_not_there(wanted: X509Files, why: str) -> None:
    """It is said what is waited for, and which identities there are."""
    made = plan(x509=(wanted,)).files(known(), NOW)
    assert made.problems == (f"waiting for {why}; the agent gives us spiffe://example.org/web",)
    assert made.is_answered


def test_nothing_said_yet() -> None:
    """An agent that has not answered is waited for, and that is no answer."""
    wanted = plan(jwt=(JwtFile(audience=("db",)),), bundles=Bundles(jwt=True))
    made = wanted.files(Known(), NOW)
    assert not made.is_answered
    assert made.problems == (
        "waiting for an X509-SVID", "waiting for the JWT bundles",
        "waiting for a JWT-SVID for db",
    )  # fmt: skip


@pytest.mark.parametrize("when", WhenDenied)
def test_one_that_is_taken_away(when: WhenDenied) -> None:
    """An identity that goes holds up no other: its files stay or go as is set."""
    wanted = (X509Files(name="web"), X509Files(name="api", hint="api"))
    kept = plan(x509=wanted, when_denied=when)
    before = kept.files(known(identity(), identity("/api", "api")), NOW)
    after = kept.files(known(identity("/new")), NOW, before)
    assert len(after.problems) == 1
    assert after.files["web.pem"] != before.files["web.pem"]
    if when is WhenDenied.KEEP:
        assert after.files["api.key"] == before.files["api.key"]
    else:
        assert "api.key" not in after.files
        assert kept.files(Known(), NOW, after).files == {}


def test_which_kinds_changed() -> None:
    """A change is of the kinds whose files are new, other or gone, and of no more."""
    wanted = plan(jwt=(JwtFile(audience=("db",)),))
    said = known()
    first = wanted.files(said, NOW)
    assert first.changes_from(None) == set(Kind)
    assert wanted.files(said, NOW, first).changes_from(first) == set()
    said.tokens = {JwtFile(audience=("db",)): JwtSvid.parse_unverified(a_token(jti="2"))}
    assert wanted.files(said, NOW, first).changes_from(first) == {Kind.JWT}
    fewer = known(bundles=CA.bundles)
    fewer.x509 = X509Context(said.x509.identities, CA.bundles) if said.x509 else None
    assert Kind.BUNDLES in wanted.files(fewer, NOW, first).changes_from(first)
    assert FileSet({}).changes_from(first) == set(Kind)


def test_intermediates() -> None:
    """They stand behind the leaf, or, where that is set, in their own domain's bundle."""
    said = known(identity(ca=SUB))
    usual = plan().files(said, NOW)
    assert said.x509 is not None
    assert ders(usual.files["svid.pem"]) == said.x509.identities[0].svid.chain
    assert len(ders(usual.files["svid.pem"])) == 2
    moved = plan(bundles=Bundles(intermediates=True)).files(said, NOW)
    assert len(ders(moved.files["svid.pem"])) == 1
    assert set(ders(moved.files[OURS])) == {CA.authority.der, SUB.cert.der}
    assert ders(moved.files[THEIRS]) == (PARTNER.authority.der,)


def test_expired_authorities() -> None:
    """With omit_expired they are left out; where there is no other, nothing is trusted."""
    late = NOW + 31 * DAY
    assert ders(plan().files(known(), late).files[OURS]) == (CA.authority.der,)
    made = plan(bundles=Bundles(omit_expired=True)).files(known(), late)
    assert made.files[OURS].content == b""


def test_without_federated_domains() -> None:
    """With federated off, only our own trust domain's bundles are written."""
    how = Bundles(federated=False, jwt=True)
    made = plan(bundles=how).files(known(), NOW)
    assert set(made.files) == {"svid.pem", "svid.key", OURS, "bundle.example.org.jwks.json"}


def test_jwt_files() -> None:
    """A token is alone in its file; the keys of each domain are a JWK Set without secrets."""
    wanted = plan(x509=(), jwt=(JwtFile(audience=("db",)),), bundles=Bundles(jwt=True))
    made = wanted.files(known(), NOW)
    assert made.files["jwt.db.token"] == File(TOKEN.encode(), 0o600)
    read = bundle_from_jwks(
        TrustDomain("partner.test"), made.files["bundle.partner.test.jwks.json"].content
    )
    assert read.jwt_authorities == PARTNER.bundle.jwt_authorities
    assert made.expires_at == NOW + timedelta(minutes=5)


def test_audiences_never_share_a_file() -> None:
    """Whatever two lists of audiences hold, their files have different names."""
    lists = (("a", "b"), ("a+b",), ("a/b",), ("a%2Fb",), ("b", "a"))
    names = {JwtFile(audience=one).file_name for one in lists}
    assert len(names) == len(lists)
    assert not any("/" in name for name in names)


def test_pkcs12(password: Path) -> None:
    """Key and chain open with the password, a trust store for each domain beside them."""
    wanted = X509Files(pkcs12=True, pem=False, combined=True)
    made = plan(x509=(wanted,), pkcs12_password_file=password).files(known(), NOW)
    opened = pkcs12.load_pkcs12(made.files["svid.p12"].content, b"secret")
    assert opened.key is not None
    assert opened.cert is not None
    assert opened.cert.friendly_name == b"spiffe://example.org/web"
    assert made.files["svid.p12"].mode == made.files["svid.combined.pem"].mode == 0o600
    store = pkcs12.load_pkcs12(made.files["bundle.partner.test.p12"].content, b"secret")
    assert [one.friendly_name for one in store.additional_certs] == [b"partner.test-0"]
    assert "svid.pem" not in made.files


def test_the_same_svid_is_sealed_once(password: Path) -> None:
    """PKCS#12 draws a salt; a set in which nothing changed is the same all the same."""
    wanted = plan(x509=(X509Files(pkcs12=True),), pkcs12_password_file=password)
    said = known()
    first = wanted.files(said, NOW)
    assert wanted.files(said, NOW, first).changes_from(first) == set()
    password.write_bytes(b"another\n")
    assert wanted.files(said, NOW, first).changes_from(first) == {Kind.X509, Kind.BUNDLES}


def test_a_domain_without_authorities(password: Path) -> None:
    """It is trusted by none: an empty file, and no trust store."""
    empty = BundleSet.of([CA.bundle, Bundle(TrustDomain("partner.test"))])
    wanted = plan(x509=(X509Files(pkcs12=True),), pkcs12_password_file=password)
    made = wanted.files(known(bundles=empty), NOW)
    assert made.files[THEIRS].content == b""
    assert "bundle.partner.test.p12" not in made.files


def test_two_files_of_one_name() -> None:
    """A name that an operator chose and that a trust domain makes too is refused."""
    wanted = plan(x509=(X509Files(certificate_file=THEIRS),))
    with pytest.raises(PreconditionError, match="two files would be called"):
        wanted.files(known(), NOW)


def test_sec_90_no_secret_in_a_repr(password: Path) -> None:
    """SEC-90: neither a file, nor a set of them, nor a password says what it holds."""
    made = plan(jwt=(JwtFile(audience=("db",)),)).files(known(), NOW)
    for text in (repr(made), repr(known()), repr(Password.from_file(password))):
        assert "PRIVATE" not in text
        assert TOKEN not in text
        assert "secret" not in text
