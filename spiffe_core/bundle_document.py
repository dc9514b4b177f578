"""
The SPIFFE bundle document: a bundle as a JWK Set, both ways.

Source: BUNDLE-05 to BUNDLE-20, X509-36 to X509-44, JWT-24 to JWT-28, conformance 3.6 (the
reading matrix), SEC-45, IOP-01, IOP-02, IOP-14 to IOP-18.  Entries are read one by one, and
one that we cannot use is skipped, never fatal (BUNDLE-14).
"""

import base64
import binascii
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle, BundleError
from spiffe_core.errors import MalformedError
from spiffe_core.keys import check_public_key, key_of_spki, spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.strictjson import StrictJsonError, b64url_decode, b64url_encode, dumps, loads

USE_X509: Final = "x509-svid"
USE_JWT: Final = "jwt-svid"
MAX_KEYS: Final = 100  # SEC-45
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_CURVES: Final[Mapping[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}


def bundle_to_document(bundle: Bundle) -> bytes:
    """Return *bundle* as a SPIFFE bundle document, UTF-8 JSON."""
    keys = [_x509_entry(authority) for authority in bundle.x509_authorities]
    keys += [_jwt_entry(authority) | {"use": USE_JWT} for authority in bundle.jwt_authorities]
    document: dict[str, Any] = {"spiffe_sequence": bundle.sequence_number}
    if bundle.refresh_hint is not None:
        document["spiffe_refresh_hint"] = int(bundle.refresh_hint.total_seconds())
    return dumps(document | {"keys": keys})


def jwks_of(bundle: Bundle) -> bytes:
    """Return the JWT authorities alone, as FetchJWTBundles carries them (WAPI-40, IOP-02)."""
    return dumps({"keys": [_jwt_entry(authority) for authority in bundle.jwt_authorities]})


def bundle_from_document(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """
    Parse the bundle document of *trust_domain*.

    Raises:
        BundleError: not a JWK Set, ``keys`` absent or null, or a counter that is no integer.
    """
    try:
        # BUNDLE-09: the sequence number is a full 64-bit integer.
        document = loads(data, max_integer=2**64 - 1)
    except StrictJsonError as error:
        raise BundleError(f"bundle document cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise BundleError("bundle document must be a JSON object")
    return _bundle_of(trust_domain, document)


def bundle_map_to_document(bundles: Mapping[TrustDomain, Bundle]) -> bytes:
    """Return several bundles keyed by trust domain name, without hints (BUNDLE-21 to -25)."""
    return dumps(
        {
            "trust_domains": {
                name.name: {
                    key: value
                    for key, value in loads(
                        bundle_to_document(bundle), max_integer=2**64
                    ).items()
                    if key != "spiffe_refresh_hint"
                }
                for name, bundle in bundles.items()
            }
        }
    )


def bundle_map_from_document(data: bytes) -> dict[TrustDomain, Bundle]:
    """
    Parse a bundle map, whole or not at all (BUNDLE-24, BUNDLE-27).

    Raises:
        BundleError: one of its bundles or names breaks a rule.
    """
    try:
        document = loads(data, max_integer=2**64 - 1)
    except StrictJsonError as error:
        raise BundleError(f"bundle map cannot be read: {error}") from error
    domains = document.get("trust_domains") if isinstance(document, dict) else None
    if not isinstance(domains, dict):
        raise BundleError("bundle map needs the member trust_domains")
    found = {}
    for name, inner in domains.items():
        if not isinstance(inner, dict):
            raise BundleError("each bundle in a map must be a JSON object")
        try:
            trust_domain = TrustDomain(name)
        except MalformedError as error:
            raise BundleError(f"bundle map: {error}") from error
        found[trust_domain] = _bundle_of(trust_domain, inner)
    return found


def _bundle_of(trust_domain: TrustDomain, document: Mapping[str, Any]) -> Bundle:
    keys = document.get("keys")
    if not isinstance(keys, list):
        raise BundleError("bundle document needs the member keys, an array")
    if len(keys) > MAX_KEYS:
        raise BundleError(f"bundle document holds more than {MAX_KEYS} keys")
    x509_authorities: dict[bytes, X509Authority] = {}
    jwt_authorities: dict[str, JwtAuthority] = {}
    for entry in keys:
        authority = _authority_of(entry)
        if isinstance(authority, X509Authority):
            x509_authorities[authority.der] = authority
        elif authority is not None:
            if authority.key_id in jwt_authorities:
                raise BundleError("two keys of a bundle document share a key ID")
            jwt_authorities[authority.key_id] = authority
    hint = _integer(document, "spiffe_refresh_hint")
    return Bundle(
        trust_domain,
        tuple(x509_authorities.values()),
        tuple(jwt_authorities.values()),
        _integer(document, "spiffe_sequence") or 0,
        None if hint is None else timedelta(seconds=min(max(hint, 0), MAX_HINT_SECONDS)),
    )


MAX_HINT_SECONDS: Final = 30 * 24 * 3600  # a hint is a hint (BUNDLE-12); timedelta has an end


def _authority_of(entry: object) -> X509Authority | JwtAuthority | None:
    """One entry, or None when it is to be skipped (conformance 3.6)."""
    if not isinstance(entry, dict) or _PRIVATE_MEMBERS & entry.keys():
        return None
    try:
        if entry.get("use") == USE_X509:
            return _x509_of(entry)
        if entry.get("use") == USE_JWT:
            return _jwt_of(entry)
    except MalformedError:
        return None
    return None


def _x509_of(entry: Mapping[str, Any]) -> X509Authority | None:
    chain = entry.get("x5c")
    if not isinstance(chain, list) or not chain or not isinstance(chain[0], str):
        return None
    try:
        der = base64.b64decode(chain[0], validate=True)  # X509-43: the first alone
    except (binascii.Error, ValueError):
        return None
    authority = X509Authority.parse(der)
    certified = x509.load_der_x509_certificate(der).public_key()
    return authority if spki_of(certified) == spki_of(_key_of(entry)) else None


def _jwt_of(entry: Mapping[str, Any]) -> JwtAuthority | None:
    key_id = entry.get("kid")
    if not isinstance(key_id, str) or not key_id:
        return None
    return JwtAuthority(key_id, spki_of(_key_of(entry)))


def _key_of(entry: Mapping[str, Any]) -> PublicKeyTypes:
    if entry.get("kty") == "EC":
        curve = _CURVES.get(str(entry.get("crv")))
        if curve is None:
            raise BundleError("curve of a key is not known")
        size = (curve.key_size + 7) // 8
        x, y = _number(entry, "x", size), _number(entry, "y", size)
        try:
            return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
        except ValueError as error:
            raise BundleError("key is not a point of its curve") from error
    if entry.get("kty") == "RSA":
        try:
            key = rsa.RSAPublicNumbers(_number(entry, "e"), _number(entry, "n")).public_key()
        except ValueError as error:
            raise BundleError("RSA key is not one") from error
        return check_public_key(key)
    raise BundleError("kind of a key is not known")


def _number(entry: Mapping[str, Any], name: str, size: int | None = None) -> int:
    text = entry.get(name)
    if not isinstance(text, str):
        raise BundleError("a member of a key is missing")
    data = b64url_decode(text)
    if not data or (size is not None and len(data) != size):
        raise BundleError("a member of a key has the wrong length")
    return int.from_bytes(data, "big")


def _integer(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is None and name not in document:
        return None
    if type(value) is not int:
        raise BundleError(f"{name} must be an integer")
    if name == "spiffe_sequence" and value < 0:
        raise BundleError(f"{name} must not be negative")
    return value


def _x509_entry(authority: X509Authority) -> dict[str, Any]:
    key = x509.load_der_x509_certificate(authority.der).public_key()
    return {
        "use": USE_X509,
        **_members(key),
        "x5c": [base64.b64encode(authority.der).decode()],
    }


def _jwt_entry(authority: JwtAuthority) -> dict[str, Any]:
    return {"kid": authority.key_id, **_members(key_of_spki(authority.public_key))}


def _members(key: PublicKeyTypes) -> dict[str, str]:
    """Public members only, from an allow-list (SEC-45)."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        size = (key.key_size + 7) // 8
        point = key.public_numbers()
        return {
            "kty": "EC",
            "crv": _CURVE_NAMES[key.curve.name],
            "x": b64url_encode(point.x.to_bytes(size, "big")),
            "y": b64url_encode(point.y.to_bytes(size, "big")),
        }
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        size = (key.key_size + 7) // 8
        return {
            "kty": "RSA",
            "n": b64url_encode(numbers.n.to_bytes(size, "big")),
            "e": b64url_encode(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")),
        }
    raise BundleError("keys of this kind are not published")
