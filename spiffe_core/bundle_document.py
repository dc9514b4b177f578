"""
The SPIFFE bundle document: a bundle as a JWK Set, both ways.

Source: BUNDLE-05 to BUNDLE-20, X509-36 to X509-44, JWT-24 to JWT-28, conformance 3.6 (the
reading matrix), SEC-45, IOP-01, IOP-02, IOP-14 to IOP-18.  Entries are read one by one, and
one that we cannot use is skipped, never fatal (BUNDLE-14).
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from cryptography import x509

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle, BundleError, BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.jwk import PRIVATE_MEMBERS, key_of_jwk, members_of
from spiffe_core.jwtsvid import algorithms_of
from spiffe_core.keys import key_of_spki, spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.strictjson import StrictJsonError, b64_decode, dumps, loads

USE_X509: Final = "x509-svid"
USE_JWT: Final = "jwt-svid"
MAX_KEYS: Final = 100  # SEC-45
MAX_HINT_SECONDS: Final = 30 * 24 * 3600  # a hint is a hint (BUNDLE-12); timedelta has an end


@dataclass(frozen=True, slots=True)
class SkippedKey:
    """An entry of a document that was not used, for a warning (conformance 3.6)."""

    position: int
    """In ``keys``, counted from 0."""
    reason: str
    private: bool = False
    """It holds a private key, which its owner has to hear about."""


@dataclass(frozen=True, slots=True)
class BundleReading:
    """What a document holds for us, and what was left out of it."""

    bundle: Bundle
    skipped: tuple[SkippedKey, ...]


class _SkippedError(BundleError):
    """Says why one entry of a document cannot be used."""

    def __init__(self, reason: str, *, private: bool = False) -> None:
        super().__init__(reason)
        self.private = private


def bundle_to_document(bundle: Bundle) -> bytes:
    """Return *bundle* as a SPIFFE bundle document, UTF-8 JSON."""
    document = _document_of(bundle)
    if bundle.refresh_hint is not None:
        document["spiffe_refresh_hint"] = int(bundle.refresh_hint.total_seconds())
    return dumps(document)


def jwks_of(bundle: Bundle) -> bytes:
    """Return the JWT authorities alone, as FetchJWTBundles carries them (WAPI-40, IOP-02)."""
    return dumps({"keys": [_jwt_entry(authority) for authority in bundle.jwt_authorities]})


def bundle_from_document(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """
    Parse the bundle document of *trust_domain*.

    Raises:
        BundleError: not a JWK Set, ``keys`` absent or null, or a counter that is no integer.
    """
    return read_document(trust_domain, data).bundle


def read_document(trust_domain: TrustDomain, data: bytes) -> BundleReading:
    """
    Parse the bundle document of *trust_domain*, and say what was left out and why.

    Raises:
        BundleError: see `bundle_from_document`.
    """
    return _reading_of(trust_domain, _object_of(data, "bundle document"))


def bundle_from_jwks(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """
    Parse what FetchJWTBundles carries for *trust_domain*: JWT keys, whatever their ``use``.

    Raises:
        BundleError: not a JWK Set, or two keys share a ``kid``.
    """
    document = _object_of(data, "JWK Set")
    # C-17: the standard leaves `use` open here, and IOP-02 leaves it out.
    entries = [
        {**entry, "use": USE_JWT} if isinstance(entry, dict) else entry
        for entry in _keys_of(document)
    ]
    return _reading_of(trust_domain, {"keys": entries}).bundle


def bundle_map_to_document(bundles: BundleSet) -> bytes:
    """Return several bundles keyed by trust domain name, without hints (BUNDLE-21 to -25)."""
    return dumps(
        {"trust_domains": {name.name: _document_of(bundle) for name, bundle in bundles.items()}}
    )


def bundle_map_from_document(data: bytes) -> BundleSet:
    """
    Parse a bundle map, whole or not at all (BUNDLE-24, BUNDLE-27).

    Raises:
        BundleError: one of its bundles or names breaks a rule.
    """
    domains = _object_of(data, "bundle map").get("trust_domains")
    if not isinstance(domains, dict):
        raise BundleError("bundle map needs the member trust_domains, an object")
    found = []
    for name, inner in domains.items():
        if not isinstance(inner, dict):
            raise BundleError("each bundle in a map must be a JSON object")
        try:
            found.append(_reading_of(TrustDomain(name), inner).bundle)
        except MalformedError as error:
            raise BundleError(f"bundle map: {error}") from error
    return BundleSet.of(found)


def _object_of(data: bytes, what: str) -> Mapping[str, Any]:
    try:
        # BUNDLE-09: the sequence number is a full 64-bit integer.
        document = loads(data, max_integer=2**64 - 1)
    except StrictJsonError as error:
        raise BundleError(f"{what} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{what} must be a JSON object")
    return document


def _keys_of(document: Mapping[str, Any]) -> list[Any]:
    keys = document.get("keys")
    if not isinstance(keys, list):
        raise BundleError("bundle document needs the member keys, an array")
    if len(keys) > MAX_KEYS:
        raise BundleError(f"bundle document holds more than {MAX_KEYS} keys")
    return keys


def _reading_of(trust_domain: TrustDomain, document: Mapping[str, Any]) -> BundleReading:
    x509_authorities: dict[bytes, X509Authority] = {}
    jwt_authorities: dict[str, JwtAuthority] = {}
    skipped = []
    for position, entry in enumerate(_keys_of(document)):
        try:
            authority = _authority_of(entry)
        except MalformedError as error:
            private = isinstance(error, _SkippedError) and error.private
            skipped.append(SkippedKey(position, str(error), private))
            continue
        if isinstance(authority, X509Authority):
            x509_authorities[authority.der] = authority
            continue
        if authority.key_id in jwt_authorities:
            raise BundleError("two keys of a bundle document share a key ID")
        jwt_authorities[authority.key_id] = authority
    hint = _integer(document, "spiffe_refresh_hint")
    bundle = Bundle(
        trust_domain,
        tuple(x509_authorities.values()),
        tuple(jwt_authorities.values()),
        _integer(document, "spiffe_sequence") or 0,
        None if hint is None else timedelta(seconds=min(max(hint, 0), MAX_HINT_SECONDS)),
    )
    return BundleReading(bundle, tuple(skipped))


def _authority_of(entry: object) -> X509Authority | JwtAuthority:
    """One entry; whatever is raised here is a reason to skip it (conformance 3.6)."""
    if not isinstance(entry, dict):
        raise _SkippedError("it is not a JSON object")
    if PRIVATE_MEMBERS & entry.keys():
        raise _SkippedError("it holds a private key, which is no secret any more", private=True)
    if entry.get("use") == USE_X509:
        return _x509_of(entry)
    if entry.get("use") == USE_JWT:
        return _jwt_of(entry)
    raise _SkippedError("its use is not known here")


def _x509_of(entry: Mapping[str, Any]) -> X509Authority:
    chain = entry.get("x5c")
    if not isinstance(chain, list) or not chain or not isinstance(chain[0], str):
        raise _SkippedError("x5c is missing")
    der = b64_decode(chain[0])  # X509-43: the first alone
    authority = X509Authority.parse(der)
    certified = x509.load_der_x509_certificate(der).public_key()
    if spki_of(certified) != spki_of(key_of_jwk(entry)):
        raise _SkippedError("x5c certifies another key than the entry holds")
    return authority


def _jwt_of(entry: Mapping[str, Any]) -> JwtAuthority:
    key_id = entry.get("kid")
    if not isinstance(key_id, str):
        raise _SkippedError("kid is missing")
    key = key_of_jwk(entry)
    # No entry needs these two (BUNDLE-18), but one that has them says what the key is for.
    if "alg" in entry and entry["alg"] not in algorithms_of(key):
        raise _SkippedError("its alg does not fit the key")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise _SkippedError("its key_ops do not let it verify")
    return JwtAuthority(key_id, spki_of(key))


def _integer(document: Mapping[str, Any], name: str) -> int | None:
    if name not in document:
        return None
    value = document[name]
    if type(value) is not int:
        raise BundleError(f"{name} must be an integer")
    if name == "spiffe_sequence" and value < 0:
        raise BundleError(f"{name} must not be negative")
    return value


def _document_of(bundle: Bundle) -> dict[str, Any]:
    return {
        "spiffe_sequence": bundle.sequence_number,
        "keys": [
            *map(_x509_entry, bundle.x509_authorities),
            *({"use": USE_JWT, **_jwt_entry(one)} for one in bundle.jwt_authorities),
        ],
    }


def _x509_entry(authority: X509Authority) -> dict[str, Any]:
    key = x509.load_der_x509_certificate(authority.der).public_key()
    return {
        "use": USE_X509,
        **members_of(key),
        "x5c": [base64.b64encode(authority.der).decode()],
    }


def _jwt_entry(authority: JwtAuthority) -> dict[str, Any]:
    return {"kid": authority.key_id, **members_of(key_of_spki(authority.public_key))}
