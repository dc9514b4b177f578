"""Bare signatures: the floor that everything which signs is held against."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ca.active import ActiveJwt, ActiveX509
from ca.keys.protocol import KeyPurpose, PrivateKey, SigningKey, generate_private_key
from ca.x509 import self_signed
from spiffe_core.keys import KeyKind
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import TrustDomain

NOW = datetime.now(UTC)
TD = TrustDomain("example.org")
MESSAGE = b"m" * 400
"""About as long as what a certificate's signature covers."""
_SHA256 = hashes.SHA256()
_ECDSA = ec.ECDSA(_SHA256)
_PKCS1 = padding.PKCS1v15()


def bare_sign(key: PrivateKey) -> Callable[[], bytes]:
    """One signature with nothing around it."""
    if isinstance(key, rsa.RSAPrivateKey):
        return lambda: key.sign(MESSAGE, _PKCS1, _SHA256)
    return lambda: key.sign(MESSAGE, _ECDSA)


def bare_verify(key: PrivateKey) -> Callable[[], None]:
    """One verification with nothing around it."""
    signature = bare_sign(key)()
    if isinstance(key, rsa.RSAPrivateKey):
        public = key.public_key()
        return lambda: public.verify(signature, MESSAGE, _PKCS1, _SHA256)
    other = key.public_key()
    return lambda: other.verify(signature, MESSAGE, _ECDSA)


def sign_and_verify() -> Callable[[], None]:
    """S+V: a P-256 signature and a P-256 verification, the floor of an issuance."""
    key = generate_private_key(KeyKind.EC_P256)
    sign, verify = bare_sign(key), bare_verify(key)

    def both() -> None:
        sign()
        verify()

    return both


def an_x509_authority(kind: KeyKind = KeyKind.EC_P256) -> ActiveX509:
    """An X.509 authority, active."""
    key = SigningKey("bench", KeyPurpose.X509_CA, generate_private_key(kind))
    return ActiveX509(self_signed(key, TD, now=NOW, ttl=timedelta(days=400)), key)


def a_jwt_authority(kind: KeyKind = KeyKind.EC_P256) -> ActiveJwt:
    """A JWT authority, active."""
    key = SigningKey("bench", KeyPurpose.JWT, generate_private_key(kind))
    return ActiveJwt("bench", Validity(NOW - timedelta(days=1), NOW + timedelta(days=30)), key)
