"""
The kinds of key we accept, and what is derived from a public key.

Source: SEC-14 (size before parsing), SEC-15, IOP-07, SPIRE API 5.6 (authority IDs).
"""

import enum
import hashlib
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from spiffe_core.errors import MalformedError

MAX_CERTIFICATE_BYTES: Final = 16 * 1024  # SEC-14
MAX_CHAIN_BYTES: Final = 64 * 1024
MAX_CHAIN_CERTIFICATES: Final = 5
MAX_CSR_BYTES: Final = 16 * 1024
MIN_RSA_BITS: Final = 2048  # SEC-15
MAX_RSA_BITS: Final = 4096
RSA_EXPONENT: Final = 65537
SIGNATURE_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})  # SEC-15: no SHA-1, MD5


class KeyRefusedError(MalformedError):
    """A key is of a kind we do not accept."""


class KeyKind(enum.Enum):
    """The kinds of key pair we make."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    RSA_2048 = "rsa-2048"
    RSA_4096 = "rsa-4096"


def check_certificate_size(der: bytes) -> None:
    """
    Refuse a certificate that is empty or over 16 KiB, before anything parses it (SEC-14).

    Raises:
        KeyRefusedError: it is.
    """
    if not der:
        raise KeyRefusedError("certificate is empty")
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise KeyRefusedError(f"certificate is longer than {MAX_CERTIFICATE_BYTES} bytes")


class CheckedSpki(bytes):
    """The SubjectPublicKeyInfo of a *key* that was checked, so that none reads it again."""

    key: PublicKeyTypes

    @classmethod
    def of(cls, spki: bytes, key: PublicKeyTypes) -> Self:
        """Return *spki*, which `spki_of` made of a *key* that `check_public_key` returned."""
        made = cls(spki)
        made.key = key
        return made


def key_of_spki(der: bytes) -> PublicKeyTypes:
    """
    Parse a SubjectPublicKeyInfo and check its kind (SEC-15).

    Raises:
        KeyRefusedError: unreadable, or of a kind we do not accept.
    """
    if isinstance(der, CheckedSpki):
        return der.key
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise KeyRefusedError("public key is too long")
    try:
        key = serialization.load_der_public_key(der)
    except Exception as error:
        raise KeyRefusedError("not a DER public key (SubjectPublicKeyInfo)") from error
    return _check_encoding(check_public_key(key), der)


def key_of_certificate(certificate: x509.Certificate) -> PublicKeyTypes:
    """
    Return the key of *certificate* if it may have it (SEC-15).

    Raises:
        KeyRefusedError: see `check_public_key`; or its curve is spelled out, not named.
    """
    key = check_public_key(certificate.public_key())
    return _check_encoding(key, certificate.tbs_certificate_bytes)


def _check_encoding(key: PublicKeyTypes, encoded: bytes) -> PublicKeyTypes:
    # The library reads the parameters of a curve it knows as if they were its name; other
    # readers have been made to trust parameters that only look alike (CVE-2020-0601).
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return key
    # A SubjectPublicKeyInfo that begins so cannot be spelled in another way, and need not be
    # encoded again, which costs an issuance a twentieth.
    if not encoded.startswith(NAMED[key.curve.name]) and spki_of(key) not in encoded:
        raise KeyRefusedError("EC keys must name their curve and give their whole point")
    return key


NAMED: Final = {
    "secp256r1": bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004"),
    "secp384r1": bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004"),
    "secp521r1": bytes.fromhex("30819b301006072a8648ce3d020106052b810400230381860004"),
}
"""All of a SubjectPublicKeyInfo before the coordinates: curve by name, point not compressed."""
_ALL_NAMED: Final = tuple(NAMED.values())


def check_public_key(key: PublicKeyTypes) -> PublicKeyTypes:
    """
    Return *key* if an SVID or authority may have it (SEC-15).

    Raises:
        KeyRefusedError: another algorithm, curve, size or exponent, or a ROCA key.
    """
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, _CURVES):
            raise KeyRefusedError("EC keys must be on P-256, P-384 or P-521")
    elif isinstance(key, rsa.RSAPublicKey):
        _check_rsa(key)
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise KeyRefusedError("keys must be RSA, EC or Ed25519")
    return key


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise KeyRefusedError(f"RSA keys must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits")
    numbers = key.public_numbers()
    if numbers.e != RSA_EXPONENT:
        raise KeyRefusedError(f"RSA keys must have the exponent {RSA_EXPONENT}")
    if all((mask >> (numbers.n % prime)) & 1 for prime, mask in _ROCA):
        raise KeyRefusedError(
            "RSA key has the ROCA fingerprint (CVE-2017-15361): make a new one"
        )
    if key.key_size % 8:
        raise KeyRefusedError("RSA keys must have a whole number of octets")


_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def _powers_of(generator: int, prime: int) -> int:
    """Bit r is set when r is a power of *generator* modulo *prime*."""
    mask, value = 0, 1
    while not mask >> value & 1:
        mask |= 1 << value
        value = value * generator % prime
    return mask


# ROCA: the faulty library's primes are powers of 65537 modulo many small primes, and so is
# their product.  A sound modulus passes all of these with a chance below 2**-27.
_ROCA = tuple(
    (prime, _powers_of(RSA_EXPONENT, prime))
    for prime in (
        11,
        13,
        17,
        19,
        37,
        53,
        61,
        71,
        73,
        79,
        97,
        103,
        107,
        109,
        127,
        151,
        157,
    )
)


def spki_of(key: PublicKeyTypes) -> bytes:
    """Return the SubjectPublicKeyInfo DER of *key*."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def encoded_key(spki: bytes, key: PublicKeyTypes) -> bytes:
    """Return what `spki_of` does, for a *key* that `key_of_spki` found in *spki*."""
    return spki if spki.startswith(_ALL_NAMED) else spki_of(key)


def key_identifier_of(spki: bytes, key: PublicKeyTypes) -> bytes:
    """
    Return SHA-1 of the key bits (RFC 5280 4.2.1.2, method 1); *key* is what *spki* says.

    An EC key's bits stand at the end of *spki*; the library would encode the key for them.
    """
    for named in _ALL_NAMED:
        if spki.startswith(named):
            return hashlib.sha1(spki[len(named) - 1 :], usedforsecurity=False).digest()
    return x509.SubjectKeyIdentifier.from_public_key(key).digest  # type: ignore[arg-type]


def subject_key_id_of(certificate: x509.Certificate, key: PublicKeyTypes) -> str:
    """Return the lower-case hex subject key ID: the extension's, else SHA-1 of the key bits."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return extension.value.digest.hex()
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(key).digest.hex()  # type: ignore[arg-type]
