"""The keys we accept, and what is derived from them."""

import math
import random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.authority import AuthorityError, X509Authority
from spiffe_core.errors import SpiffeError
from spiffe_core.keys import (
    MAX_CERTIFICATE_BYTES,
    NAMED,
    KeyRefusedError,
    check_certificate_size,
    check_public_key,
    key_identifier_of,
    key_of_spki,
    spki_of,
    subject_key_id_of,
)
from spiffe_core.x509svid import X509SvidError, verify_x509_svid
from tests.support.authorities import NOW, a_ca, a_key
from tests.support.ca import FakeCa
from tests.support.spki import explicit_spki, named_spki

ACCEPTED = ["p256", "p384", "p521", "rsa2048", "ed25519"]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_sec_15_accepted_keys(kind: str) -> None:
    """RSA 2048, the three NIST curves and Ed25519 are read, and written back unchanged."""
    spki = spki_of(a_key(kind).public_key())
    assert spki_of(key_of_spki(spki)) == spki


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rsa1024", "2048 to 4096 bits"),
        ("rsa-e3", "exponent 65537"),
        ("dsa", "RSA, EC or Ed25519"),
        ("ed448", "RSA, EC or Ed25519"),
        ("p224", "P-256, P-384 or P-521"),
        ("k256", "P-256, P-384 or P-521"),
        ("brainpool", "P-256, P-384 or P-521"),
    ],
)
def test_sec_15_refused_keys(kind: str, reason: str) -> None:
    """Other algorithms, curves, sizes and exponents are refused, each for its reason."""
    with pytest.raises(KeyRefusedError, match=reason):
        key_of_spki(spki_of(a_key(kind).public_key()))


def test_sec_15_key_agreement_is_no_signature() -> None:
    """A key that cannot sign at all is refused."""
    with pytest.raises(KeyRefusedError, match="RSA, EC or Ed25519"):
        check_public_key(x25519.X25519PrivateKey.generate().public_key())


def rsa_public(modulus: int, exponent: int = 65537) -> rsa.RSAPublicKey:
    """An RSA public key of these numbers; nobody has to know the factors."""
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


@pytest.mark.parametrize(
    ("bits", "reason"),
    [
        (2040, "2048 to 4096 bits"),
        (2047, "2048 to 4096 bits"),
        (2048, None),
        (2049, "whole number of octets"),
        (2056, None),
        (3072, None),
        (4095, "whole number of octets"),
        (4096, None),
        (4097, "2048 to 4096 bits"),
        (4104, "2048 to 4096 bits"),
    ],
)
def test_sec_15_rsa_sizes(bits: int, reason: str | None) -> None:
    """RSA keys have 2048 to 4096 bits, to the bit, and a whole number of octets."""
    key = rsa_public(random.Random(bits).getrandbits(bits) | 1 << (bits - 1) | 1)
    assert key.key_size == bits
    if reason is None:
        assert check_public_key(key) is key
    else:
        with pytest.raises(KeyRefusedError, match=reason):
            check_public_key(key)


@pytest.mark.parametrize("exponent", [3, 17, 257, 65535, 65539, 2**32 + 1])
def test_sec_15_rsa_exponents(exponent: int) -> None:
    """The exponent is 65537 and no other."""
    modulus = random.Random(1).getrandbits(2048) | 1 << 2047 | 1
    with pytest.raises(KeyRefusedError, match="exponent 65537"):
        check_public_key(rsa_public(modulus, exponent))


# The faulty library's primes are k * M + 65537**a mod M, with M, for RSA of 1984 to 3936 bits,
# the product of the first 126 primes.
M = math.prod(n for n in range(2, 702) if all(n % d for d in range(2, int(n**0.5) + 1)))


@pytest.mark.parametrize("seed", range(20))
def test_sec_15_roca_keys_are_found(seed: int) -> None:
    """A modulus made as the faulty library makes it has the fingerprint (CVE-2017-15361)."""
    rng = random.Random(seed)
    modulus = 1
    for _ in range(2):
        k = rng.randint(3 * 2**1022 // M + 1, 2**1024 // M - 1)
        modulus *= k * M + pow(65537, rng.getrandbits(64), M)
    assert modulus.bit_length() == 2048
    with pytest.raises(KeyRefusedError, match="ROCA"):
        check_public_key(rsa_public(modulus))


# Published with the attack: modulo these the powers of 65537 are few.
TELLING = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


@pytest.mark.parametrize("prime", TELLING)
def test_sec_15_every_prime_of_the_fingerprint_counts(prime: int) -> None:
    """A modulus that is no power of 65537 modulo one of the 17 primes alone is sound."""
    powers = {pow(65537, n, prime) for n in range(prime)}
    other = next(n for n in range(2, prime) if n not in powers)
    whole = math.prod(TELLING) * 2
    # 1 modulo 2 and all the others, *other* modulo this one (Chinese remainder theorem).
    rest = whole // prime
    number = (1 + rest * ((other - 1) * pow(rest, -1, prime) % prime)) % whole
    modulus = number + whole * (2**2047 // whole + 1)
    assert check_public_key(rsa_public(modulus))
    twin = 1 + whole * (2**2047 // whole + 1)
    with pytest.raises(KeyRefusedError, match="ROCA"):
        check_public_key(rsa_public(twin))


def test_sec_15_sound_keys_are_no_roca_keys() -> None:
    """Of 400 random moduli none has the fingerprint."""
    rng = random.Random(7)
    for _ in range(400):
        check_public_key(rsa_public(rng.getrandbits(2048) | 1 << 2047 | 1))


def test_sec_15_curves_are_named() -> None:
    """P-256 spelled out as parameters is refused, though the library reads it as P-256."""
    point = a_key().public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )  # fmt: skip
    explicit = explicit_spki(point)
    assert isinstance(serialization.load_der_public_key(explicit), ec.EllipticCurvePublicKey)
    with pytest.raises(KeyRefusedError, match="name their curve"):
        key_of_spki(explicit)
    assert key_of_spki(named_spki(point)) == a_key().public_key()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_what_stands_before_the_coordinates(curve: ec.EllipticCurve) -> None:
    """The known beginnings are the library's, to the last octet before the coordinates."""
    spki = spki_of(ec.generate_private_key(curve).public_key())
    assert spki[: -2 * ((curve.key_size + 7) // 8)] == NAMED[curve.name]


def test_sec_15_curves_of_certificates_are_named() -> None:
    """An authority or leaf whose key spells its curve out is refused, its twin is not."""
    ca = FakeCa()
    leaf_point, ca_point = (spki[-65:] for spki in (ca.leaf().spki, ca.cert.spki))
    assert verify_x509_svid(ca.chain(), ca.bundles, at=NOW)
    leaf = ca.leaf(spki=explicit_spki(leaf_point))
    assert x509.load_der_x509_certificate(leaf.der).public_key()
    with pytest.raises(X509SvidError, match="name their curve"):
        verify_x509_svid(ca.chain(leaf), ca.bundles, at=NOW)
    assert X509Authority.parse(ca.cert.der)
    with pytest.raises(AuthorityError, match="name their curve"):
        X509Authority.parse(ca.cert.but(spki=explicit_spki(ca_point)).der)


def test_a_point_is_whole() -> None:
    """A compressed point is refused: a key has one spelling, as JWKs compare with it."""
    point = a_key().public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )  # fmt: skip
    with pytest.raises(KeyRefusedError, match="whole point"):
        key_of_spki(named_spki(point))


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "empty"),
        (1, None),
        (MAX_CERTIFICATE_BYTES, None),
        (MAX_CERTIFICATE_BYTES + 1, "longer than 16384"),
    ],
)
def test_sec_14_size_first(size: int, reason: str | None) -> None:
    """A certificate has 1 to 16384 bytes, whatever is in it."""
    if reason is None:
        check_certificate_size(b"x" * size)
    else:
        with pytest.raises(KeyRefusedError, match=reason):
            check_certificate_size(b"x" * size)


def test_sec_14_a_long_key_is_not_parsed() -> None:
    """A public key over 16 KiB is refused before it is parsed."""
    with pytest.raises(KeyRefusedError, match="too long"):
        key_of_spki(b"\x30" * (MAX_CERTIFICATE_BYTES + 1))


@given(
    st.binary(max_size=120)
    | st.tuples(st.sampled_from(ACCEPTED), st.integers(0, 2**16), st.integers(0, 255))
)
def test_any_bytes_are_a_key_or_our_error(data: bytes | tuple[str, int, int]) -> None:
    """Noise, and real keys with one byte changed, give a key we accept or our own error."""
    if isinstance(data, tuple):
        kind, place, byte = data
        spki = bytearray(spki_of(a_key(kind).public_key()))
        spki[place % len(spki)] = byte
        data = bytes(spki)
    try:
        key = key_of_spki(data)
    except SpiffeError:
        return
    assert check_public_key(key) is key


@pytest.mark.parametrize("kind", ACCEPTED)
def test_key_identifiers(kind: str) -> None:
    """The identifier of each kind of key is the one that the library computes."""
    key = a_key(kind).public_key()
    expected = x509.SubjectKeyIdentifier.from_public_key(key).digest
    assert key_identifier_of(spki_of(key), key) == expected


def test_subject_key_ids() -> None:
    """SPIRE API 5.6: the ID is the extension's, else SHA-1 of the key bits; lower-case hex."""
    public = a_key().public_key()
    computed = x509.SubjectKeyIdentifier.from_public_key(public).digest.hex()
    own = x509.SubjectKeyIdentifier(b"\xab\xcd")
    for der, expected in (
        (a_ca(), computed),
        (a_ca(ski=False), computed),
        (a_ca(ski=False, extra=[own]), "abcd"),
    ):
        assert subject_key_id_of(x509.load_der_x509_certificate(der), public) == expected
