"""
Signing keys and who keeps them.

Source: SEC-60 (a key is bound to its purpose), BUNDLE-03 (one key, one kind of document).
"""

import enum
import re
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spiffe_core.errors import InternalError, SpiffeError
from spiffe_core.keys import KeyKind, spki_of

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class KeyPurpose(enum.Enum):
    """What a key may sign."""

    X509_CA = "x509-ca"
    JWT = "jwt"


class KeyStoreError(InternalError):
    """A key cannot be kept or found; the text names the file and what to do, never the key."""


class KeyPurposeError(SpiffeError, TypeError):
    """A key was about to sign what it is not for (SEC-60)."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key with its name and its purpose; its repr holds neither key nor path."""

    key_id: str
    purpose: KeyPurpose
    _private: PrivateKey = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo DER."""
        return spki_of(self._private.public_key())

    def private_for(self, purpose: KeyPurpose) -> PrivateKey:
        """
        Return the private key for *purpose*.

        Raises:
            KeyPurposeError: it is for another.
        """
        if purpose is not self.purpose:
            raise KeyPurposeError(f"key {self.key_id} is for {self.purpose.value} alone")
        return self._private


class KeyManager(Protocol):
    """Keeps signing keys; every implementation passes one contract suite."""

    async def generate(self, key_id: str, kind: KeyKind, purpose: KeyPurpose) -> SigningKey:
        """
        Make a key and keep it durably before returning.

        Raises:
            KeyStoreError: the name is taken, for whichever purpose; it is none; or the key
                cannot be kept.
        """
        ...

    async def load(self, key_id: str, purpose: KeyPurpose) -> SigningKey:
        """
        Return a key that was kept.

        Raises:
            KeyStoreError: missing, for another purpose, damaged or readable by others; never
                answered by a new key.
        """
        ...

    async def delete(self, key_id: str) -> None:
        """
        Forget a key; one that is not there is fine.

        Raises:
            KeyStoreError: it cannot be removed.
        """
        ...

    async def key_ids(self) -> frozenset[str]:
        """
        Return the names of all keys kept.

        Raises:
            KeyStoreError: they cannot be listed.
        """
        ...


def check_key_id(key_id: str) -> str:
    """
    Return *key_id* if a key may have this name, which may become a file's.

    Raises:
        KeyStoreError: it may not.
    """
    if _KEY_ID.fullmatch(key_id) is None:
        raise KeyStoreError("a key's name must be 1 to 100 of a-z 0-9 -")
    return key_id


_KEY_ID = re.compile(r"[a-z0-9-]{1,100}")


def generate_private_key(kind: KeyKind) -> PrivateKey:
    """Make a private key; RSA takes long, so call it off the event loop."""
    if kind is KeyKind.EC_P256:
        return ec.generate_private_key(ec.SECP256R1())
    if kind is KeyKind.EC_P384:
        return ec.generate_private_key(ec.SECP384R1())
    bits = 2048 if kind is KeyKind.RSA_2048 else 4096
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def pkcs8_of(key: PrivateKey) -> bytes:
    """Return unencrypted PKCS#8 DER; for a file of mode 0600 or a sealed one."""
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
