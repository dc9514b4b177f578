"""
Public keys as members of a JWK, both ways.

Source: RFC 7517, RFC 7518 6.2 and 6.3, RFC 8037 2; SEC-15, SEC-45, IOP-14, IOP-15, T-23.
"""

from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from spiffe_core.errors import MalformedError
from spiffe_core.keys import MAX_RSA_BITS, check_public_key
from spiffe_core.strictjson import b64url_decode, b64url_encode

PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_CURVES: Final[Mapping[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}
_MAX_MODULUS_BYTES: Final = MAX_RSA_BITS // 8 + 1  # some writers put a zero in front
_MAX_EXPONENT_BYTES: Final = 8
_ED25519_BYTES: Final = 32


class JwkError(MalformedError):
    """A JWK is not a public key that we accept."""


def key_of_jwk(entry: Mapping[str, Any]) -> PublicKeyTypes:
    """
    Return the public key in *entry*; every other member of it is ignored.

    Raises:
        JwkError: ``kty`` or ``crv`` unknown, or a member absent or of the wrong length.
        KeyRefusedError: a key of a kind that SEC-15 refuses.
    """
    match entry.get("kty"):
        case "EC":
            return check_public_key(_ec_of(entry))
        case "RSA":
            return check_public_key(_rsa_of(entry))
        case "OKP":
            return check_public_key(_okp_of(entry))
    raise JwkError("kty of a key is not known")


def members_of(key: PublicKeyTypes) -> dict[str, str]:
    """
    Return *key* as JWK members: from an allow-list of public ones (SEC-45).

    Raises:
        JwkError: keys of this kind are not published (IOP-15).
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVE_NAMES:
        size = (key.key_size + 7) // 8
        point = key.public_numbers()
        return {
            "kty": "EC",
            "crv": _CURVE_NAMES[key.curve.name],
            "x": _text_of(point.x, size),
            "y": _text_of(point.y, size),
        }
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {
            "kty": "RSA",
            "n": _text_of(numbers.n, (numbers.n.bit_length() + 7) // 8),
            "e": _text_of(numbers.e, (numbers.e.bit_length() + 7) // 8),
        }
    if isinstance(key, ed25519.Ed25519PublicKey):
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(raw)}
    raise JwkError("keys of this kind are not published")


def _ec_of(entry: Mapping[str, Any]) -> ec.EllipticCurvePublicKey:
    curve = _CURVES.get(str(entry.get("crv")))
    if curve is None:
        raise JwkError("crv of a key is not known")
    size = (curve.key_size + 7) // 8
    x, y = (int.from_bytes(_member(entry, name, size, size), "big") for name in ("x", "y"))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError as error:
        raise JwkError("key is not a point of its curve") from error


def _rsa_of(entry: Mapping[str, Any]) -> rsa.RSAPublicKey:
    n = int.from_bytes(_member(entry, "n", 1, _MAX_MODULUS_BYTES), "big")
    e = int.from_bytes(_member(entry, "e", 1, _MAX_EXPONENT_BYTES), "big")
    try:
        return rsa.RSAPublicNumbers(e, n).public_key()
    except ValueError as error:
        raise JwkError("RSA key is not one") from error


def _okp_of(entry: Mapping[str, Any]) -> ed25519.Ed25519PublicKey:
    if entry.get("crv") != "Ed25519":
        raise JwkError("crv of a key is not known")
    return ed25519.Ed25519PublicKey.from_public_bytes(
        _member(entry, "x", _ED25519_BYTES, _ED25519_BYTES)
    )


def _member(entry: Mapping[str, Any], name: str, at_least: int, at_most: int) -> bytes:
    text = entry.get(name)
    if not isinstance(text, str):
        raise JwkError(f"member {name} of a key is missing")
    if len(text) > 2 * at_most:  # before it is decoded
        raise JwkError(f"member {name} of a key has the wrong length")
    data = b64url_decode(text)
    if not at_least <= len(data) <= at_most:
        raise JwkError(f"member {name} of a key has the wrong length")
    return data


def _text_of(number: int, size: int) -> str:
    return b64url_encode(number.to_bytes(size, "big"))
