"""
The signed part of a leaf, written from slices that are the same for every leaf.

Source: RFC 5280 4.1, X.690 (DER), performance 1.  Half of what the library's builder costs is
not the signature, so issuing writes these few elements itself.  The builder stays: as what
`tests/unit/ca/test_template.py` holds every byte of this against, and for authorities that
`TbsTemplate.of` does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ca.keys.protocol import PrivateKey
from spiffe_core.lifetime import Validity

_INTEGER: Final = 0x02
_BIT_STRING: Final = 0x03
_OCTET_STRING: Final = 0x04
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_SEQUENCE: Final = 0x30
_EXTENSIONS: Final = 0xA3  # [3] EXPLICIT
_LONG: Final = bytes.fromhex("3082")  # a SEQUENCE whose length takes two octets
_VERSION_3: Final = bytes.fromhex("a003020102")
_TRUE: Final = bytes.fromhex("0101ff")
_ID_CE: Final = "2.5.29."  # every extension of a leaf; one octet more, below 128
_ALGORITHMS: Final = {
    ("secp256r1", "sha256"): bytes.fromhex("300a06082a8648ce3d040302"),
    ("secp384r1", "sha384"): bytes.fromhex("300a06082a8648ce3d040303"),
    ("rsa", "sha256"): bytes.fromhex("300d06092a864886f70d01010b0500"),
}
"""AlgorithmIdentifier of each signature, by key and hash (RFC 5758 3.2, RFC 4055 5)."""


@dataclass(frozen=True, slots=True)
class TbsTemplate:
    """What the leaves of one authority share, encoded."""

    algorithm: bytes
    scheme: tuple[Any, ...]
    """What the key's ``sign`` takes behind the bytes."""
    issuer: bytes
    extensions: bytes

    @classmethod
    def of(
        cls,
        issuer: x509.Name,
        extensions: Sequence[x509.Extension[x509.ExtensionType]],
        key: PrivateKey,
        digest: hashes.HashAlgorithm,
    ) -> Self | None:
        """Return the template of an authority; None if only the builder can serve it."""
        algorithm = _ALGORITHMS.get((_kind_of(key), digest.name))
        if algorithm is None or not all(map(_is_writable, extensions)):
            return None
        is_rsa = isinstance(key, rsa.RSAPrivateKey)
        scheme = (padding.PKCS1v15(), digest) if is_rsa else (ec.ECDSA(digest),)
        encoded = issuer.public_bytes()
        if x509.Name.from_bytes(encoded) != issuer:
            return None
        return cls(algorithm, scheme, encoded, b"".join(map(extension_der, extensions)))

    def tbs(
        self, *, serial: int, validity: Validity, subject: bytes, spki: bytes, own: bytes
    ) -> bytes:
        """Return the TBSCertificate; *own* are the extensions behind the shared ones."""
        return tlv(
            _SEQUENCE,
            _head(serial, self.algorithm, self.issuer)
            + tlv(_SEQUENCE, _time(validity.not_before) + _time(validity.not_after))
            + subject
            + spki
            + tlv(_EXTENSIONS, tlv(_SEQUENCE, self.extensions + own)),
        )

    def sign(self, tbs: bytes, key: PrivateKey) -> bytes:
        """Return the certificate, signed by the key that the template was made for."""
        signature: bytes = key.sign(tbs, *self.scheme)
        return tlv(_SEQUENCE, tbs + self.algorithm + tlv(_BIT_STRING, b"\0" + signature))


def has_issuer(der: bytes, *, serial: int, algorithm: bytes, issuer: bytes) -> bool:
    """
    True when *der*, which was read as version 3 with this *serial*, has this *issuer*.

    Reading a name costs as much as a third of a signature.  Before the issuer stand version,
    serial number and algorithm, and DER writes each in one way alone.  False says nothing:
    the name is to be read then.
    """
    return der[:2] == der[4:6] == _LONG and der.startswith(_head(serial, algorithm, issuer), 8)


def _head(serial: int, algorithm: bytes, issuer: bytes) -> bytes:
    number = tlv(_INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1, "big"))
    return _VERSION_3 + number + algorithm + issuer


def extension_der(extension: x509.Extension[x509.ExtensionType]) -> bytes:
    """Return one extension of the arc ``id-ce``, encoded."""
    oid = b"\x06\x03\x55\x1d" + bytes((int(extension.oid.dotted_string.removeprefix(_ID_CE)),))
    critical = _TRUE if extension.critical else b""
    return tlv(_SEQUENCE, oid + critical + tlv(_OCTET_STRING, extension.value.public_bytes()))


def _is_writable(extension: x509.Extension[x509.ExtensionType]) -> bool:
    return extension.oid.dotted_string.startswith(_ID_CE)


_KEY_ID: Final = bytes.fromhex("301d0603551d0e04160414")


def key_id_der(key_id: bytes) -> bytes:
    """Return the subject key identifier extension of the 20 octets *key_id*."""
    return _KEY_ID + key_id


def tlv(tag: int, body: bytes) -> bytes:
    """Return one DER element: *tag*, the length in its shortest form, *body*."""
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    octets = (size.bit_length() + 7) // 8
    return bytes((tag, 0x80 | octets)) + size.to_bytes(octets, "big") + body


@lru_cache(maxsize=256)  # a batch shares its instants
def _time(at: datetime) -> bytes:
    """RFC 5280 4.1.2.5: two digits of the year through 2049, four from 2050 on."""
    rest = f"{at.month:02}{at.day:02}{at.hour:02}{at.minute:02}{at.second:02}Z"
    if at.year < 2050:
        return tlv(_UTC_TIME, f"{at.year % 100:02}{rest}".encode())
    return tlv(_GENERALIZED_TIME, f"{at.year:04}{rest}".encode())


def _kind_of(key: PrivateKey) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.curve.name
    return "rsa" if isinstance(key, rsa.RSAPrivateKey) else ""
