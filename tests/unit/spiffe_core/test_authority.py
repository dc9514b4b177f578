"""What may be an authority (SEC-12)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.authority import AuthorityError, JwtAuthority, X509Authority
from spiffe_core.errors import MalformedError
from spiffe_core.keys import spki_of
from tests.support.authorities import DAY, NOW, a_ca, a_key, a_leaf, key_usage, pkcs8_of
from tests.support.spki import explicit_spki


def test_a_correct_authority() -> None:
    """The certificate that the other tests change is accepted, and its facts are read."""
    der = a_ca()
    authority = X509Authority.parse(der)
    assert authority.der == der
    assert (authority.validity.not_before, authority.validity.not_after) == (
        NOW - DAY,
        NOW + DAY,
    )
    assert len(bytes.fromhex(authority.authority_id)) == 20
    assert not authority.tainted
    assert X509Authority.parse(der, tainted=True).tainted


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048", "ed25519"])
def test_sec_15_keys_of_authorities(kind: str) -> None:
    """An authority may have any key that SEC-15 accepts."""
    assert X509Authority.parse(a_ca(kind))


@pytest.mark.parametrize("kind", ["rsa1024", "rsa-e3", "dsa", "ed448", "p224", "k256"])
def test_sec_15_refused_keys_of_authorities(kind: str) -> None:
    """An authority with any other key is no anchor, however well it is made."""
    with pytest.raises(AuthorityError, match="keys must"):
        X509Authority.parse(a_ca(kind))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ca": False}, "cA TRUE"),
        ({"ca": None}, "needs basicConstraints and keyUsage"),
        ({"usage": None}, "needs basicConstraints and keyUsage"),
        ({"usage": key_usage("crl_sign")}, "keyCertSign"),
        ({"usage": key_usage("digital_signature")}, "keyCertSign"),
        ({"ca": False, "usage": key_usage("digital_signature")}, "cA TRUE"),
        ({"uris": ("spiffe://example.org/w",)}, "has no path"),
        ({"uris": ("spiffe://example.org/ca",)}, "has no path"),
        ({"uris": ("spiffe://example.org", "spiffe://example.org/w")}, "has no path"),
        ({"uris": ("spiffe://example.org//",)}, "has no path"),
    ],
)
def test_sec_12_only_cas(changes: dict[str, Any], reason: str) -> None:
    """X509-07, X509-09: cA and keyCertSign both, and no SVID's path, or it is no anchor."""
    with pytest.raises(AuthorityError, match=reason):
        X509Authority.parse(a_ca(**changes))


def test_sec_12_a_leaf_is_no_root() -> None:
    """A workload's certificate, signed or self-signed, is never an anchor."""
    leaf = a_leaf(a_ca(), a_key())
    self_signed = a_ca(
        ca=False, usage=key_usage("digital_signature"), uris=("spiffe://example.org/w",)
    )
    for der in (leaf, self_signed):
        with pytest.raises(AuthorityError, match="this is a leaf"):
            X509Authority.parse(der)


@pytest.mark.parametrize(
    "uris",
    [(), ("spiffe://example.org",), ("spiffe://example.org/",), ("https://ca.example.org/x",)],
)
def test_foreign_cas_as_they_are(uris: tuple[str, ...]) -> None:
    """C-01, C-09: no ID, one with a bare slash, or another URI in a foreign CA is tolerated."""
    assert X509Authority.parse(a_ca(uris=uris))


def test_c_13_digital_signature_on_a_ca() -> None:
    """C-13: a foreign CA may sign other things too, and may have no key identifier (C-27)."""
    usage = key_usage("digital_signature", "key_cert_sign")
    assert X509Authority.parse(a_ca(usage=usage, ski=False)).authority_id


def test_c_27_an_expired_authority_is_still_one() -> None:
    """C-27: expiry is judged where a path is built, so an expired CA can be published."""
    old = X509Authority.parse(a_ca(life=(NOW - 9 * DAY, NOW - DAY)))
    assert not old.validity.covers(NOW)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda der: b"",
        lambda der: der[:-1],
        lambda der: der + b"\x00",
        lambda der: der + der,
        lambda der: b"\x30" + der,
        lambda der: der[4:],
        lambda der: b"-----BEGIN CERTIFICATE-----",
        lambda der: pkcs8_of(a_key()),
        lambda der: spki_of(a_key().public_key()),
        lambda der: der + pkcs8_of(a_key()),
        lambda der: b"\x30\x84" + len(der).to_bytes(4, "big") + der,
    ],
)
def test_sec_12_exactly_one_certificate(spoil: Any) -> None:
    """Half a certificate, two, one with anything behind it, or a key is refused."""
    with pytest.raises(AuthorityError):
        X509Authority.parse(spoil(a_ca()))


def test_sec_14_size_before_parsing() -> None:
    """A certificate over 16 KiB is refused for its size."""
    big = a_ca(
        extra=[x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x" * 16384)]
    )
    with pytest.raises(AuthorityError, match="longer than 16384"):
        X509Authority.parse(big)


@given(st.integers(0, 2**16), st.integers(0, 255))
def test_any_byte_of_a_certificate(place: int, byte: int) -> None:
    """A CA certificate with one byte changed is an authority still, or our own error."""
    spoilt = bytearray(a_ca())
    spoilt[place % len(spoilt)] = byte
    try:
        authority = X509Authority.parse(bytes(spoilt))
    except MalformedError:
        return
    assert authority.der == bytes(spoilt)


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    """Noise is never an authority of either kind, and never another error than ours."""
    with pytest.raises(MalformedError):
        X509Authority.parse(data)
    with pytest.raises(MalformedError):
        JwtAuthority("k", data)


# --- JWT authorities ---

SPKI = spki_of(a_key("p256", "jwt").public_key())


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048"])
def test_keys_of_jwt_authorities(kind: str) -> None:
    """A key of each kind that one of the nine algorithms fits is accepted."""
    assert JwtAuthority("k", spki_of(a_key(kind).public_key())).key_id == "k"


@pytest.mark.parametrize(
    ("key_id", "public_key", "reason"),
    [
        ("", SPKI, "missing key ID"),
        ("k" * 256, SPKI, "longer than 255"),
        ("é" * 128, SPKI, "longer than 255"),
        ("\ud800", SPKI, "not UTF-8"),
        ("k", b"", "missing public key"),
        ("k", SPKI[:-1], "not a DER public key"),
        ("k", SPKI + b"\x00", "not a DER public key"),
        ("k", pkcs8_of(a_key()), "not a DER public key"),
        ("k", spki_of(a_key("rsa1024").public_key()), "2048 to 4096"),
        ("k", spki_of(a_key("k256").public_key()), "P-256, P-384 or P-521"),
        ("k", spki_of(a_key("ed25519").public_key()), "no algorithm of JWT-SVIDs fits"),
        ("k", explicit_spki(SPKI[-65:]), "name their curve"),
    ],
    ids=lambda value: ascii(value)[:12] if isinstance(value, str) else "key",
)
def test_what_is_no_jwt_authority(key_id: str, public_key: bytes, reason: str) -> None:
    """SPIRE API 5.4, SEC-15: a key ID of 1 to 255 bytes and a key that can sign JWTs."""
    with pytest.raises(MalformedError, match=reason):
        JwtAuthority(key_id, public_key)


def test_the_longest_key_id() -> None:
    """255 bytes of key ID are taken."""
    assert JwtAuthority("k" * 255, SPKI).key_id == "k" * 255
    assert JwtAuthority("é" * 127, SPKI).key_id == "é" * 127


def test_an_authority_may_end() -> None:
    """A JWT authority has an end if it was given one."""
    end = datetime(2027, 1, 1, tzinfo=UTC) + timedelta(0)
    assert JwtAuthority("k", SPKI, end).expires_at == end
    assert JwtAuthority("k", SPKI).expires_at is None
