"""
JWT-SVIDs: verify one against the bundle of its own trust domain.

Source: JWT-01 to JWT-32, SEC-40 to SEC-46, C-05, C-06, C-15, T-08, T-18, T-21, T-30.
PyJWT checks the signature, with the algorithm taken from the key; what stands around it
is strict and ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from spiffe_core.authority import MAX_KEY_ID_BYTES
from spiffe_core.bundle import BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.keys import key_of_spki
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError
from spiffe_core.strictjson import StrictJsonError, b64url_decode, loads

if TYPE_CHECKING:
    from jwt.algorithms import Algorithm

MAX_TOKEN_BYTES: Final = 16 * 1024  # SEC-43
MAX_HEADER_DEPTH: Final = 8  # SEC-43
MAX_LEEWAY: Final = timedelta(seconds=30)  # SEC-42
# Beyond what clocks that still work together may differ (SEC-111): SEC-42 wants ``iat`` to be
# looked at, T-19 warns that a narrow look refuses good tokens of an issuer whose clock is fast.
MAX_IAT_AHEAD: Final = timedelta(minutes=5)
TYPES: Final = ("JWT", "JOSE")  # JWT-08

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_BY_CURVE: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
ALGORITHMS: Final = (*_RSA, *_BY_CURVE.values())
"""The nine of JWT-04, in the one place that lists them (C-16)."""

# Never key material from the token, and nothing that changes how it is read (C-15, SEC-41).
_REFUSED_HEADERS: Final = frozenset(
    {"crit", "b64", "zip", "jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256"}
)


class JwtSvidError(MalformedError):
    """A token is not a JWT-SVID, or not one to be trusted.  Never quotes the token."""


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A JWT-SVID; *token* is a bearer secret and stays out of every repr."""

    token: str = field(repr=False)
    spiffe_id: SpiffeId
    audience: tuple[str, ...]
    expires_at: datetime
    issued_at: datetime | None
    key_id: str
    claims: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse_unverified(cls, token: str) -> Self:
        """
        Read a token that we were handed by our own issuer; nothing is proved.

        Raises:
            JwtSvidError: names the first rule broken.
        """
        return cls._of(token, parse_jws(token))

    @classmethod
    def _of(cls, token: str, jws: "Jws") -> Self:
        payload = _claims(jws.payload)
        return cls(
            token,
            _subject(payload),
            _audience(payload),
            _instant(payload, "exp"),
            _instant(payload, "iat") if "iat" in payload else None,
            jws.header["kid"],
            payload,
        )


def verify_jwt_svid(
    token: str,
    bundles: BundleSet,
    *,
    audience: str,
    at: datetime,
    leeway: timedelta = MAX_LEEWAY,
) -> JwtSvid:
    """
    Verify *token* for *audience* at the instant *at*, and return what it proves.

    The keys are those of the trust domain in ``sub``, and no others (JWT-32).

    Raises:
        JwtSvidError: names the first rule broken.
    """
    if not audience:
        raise JwtSvidError("the audience to expect is missing")
    jws = parse_jws(token)
    svid = JwtSvid._of(token, jws)
    bundle = bundles.get(svid.spiffe_id.trust_domain)
    if bundle is None or not bundle.jwt_authorities:
        raise JwtSvidError("no JWT authority is known for the token's trust domain")
    authority = bundle.jwt_authority(svid.key_id)
    if authority is None:
        raise JwtSvidError("the token's key is not among its trust domain's JWT authorities")
    check_signature(authority.public_key, jws.header["alg"], jws.signed, jws.signature)
    _check_claims(svid, audience, at, min(leeway, MAX_LEEWAY))
    return svid


def algorithms_of(key: PublicKeyTypes) -> tuple[str, ...]:
    """The algorithms that fit *key*; empty when none does (JWT-06, SEC-40)."""
    if isinstance(key, rsa.RSAPublicKey):
        return _RSA
    if isinstance(key, ec.EllipticCurvePublicKey):
        return (_BY_CURVE[key.curve.name],) if key.curve.name in _BY_CURVE else ()
    return ()


class Jws(NamedTuple):
    """A token taken apart: *signed* is what the *signature* is over."""

    header: Mapping[str, Any]
    payload: bytes
    signed: bytes
    signature: bytes


def parse_jws(token: str) -> Jws:
    """
    Take a token apart and check its header; nothing is proved, no claim is read.

    Raises:
        JwtSvidError: too long, not a JWS in compact form, or a header that a JWT-SVID may
            not have (JWT-01 to JWT-08, SEC-41, SEC-43).
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise JwtSvidError("token is longer than 16 KiB")
    parts = token.split(".", 3)
    if len(parts) != 3:
        raise JwtSvidError("token must be a JWS in compact form: three parts")
    try:
        header = _header(parts[0])
        _check_header(header)  # JWT-18: before anything else is looked at
        payload, signature = b64url_decode(parts[1]), b64url_decode(parts[2])
    except StrictJsonError as error:
        raise JwtSvidError(f"token cannot be read: {error}") from error
    return Jws(header, payload, f"{parts[0]}.{parts[1]}".encode(), signature)


def _header(part: str) -> Mapping[str, Any]:
    header = loads(b64url_decode(part), max_depth=MAX_HEADER_DEPTH)
    if not isinstance(header, dict):
        raise JwtSvidError("token header must be a JSON object")
    return header


def _check_header(header: Mapping[str, Any]) -> None:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise JwtSvidError("token algorithm is not one a JWT-SVID may have")
    if _REFUSED_HEADERS & header.keys():
        raise JwtSvidError("token header holds a member that a JWT-SVID may not have")
    if "typ" in header and header["typ"] not in TYPES:
        raise JwtSvidError("token type must be JWT or JOSE")
    key_id = header.get("kid")
    if not isinstance(key_id, str) or not key_id:
        raise JwtSvidError("token has no key ID")
    if len(key_id.encode("utf-8", "surrogatepass")) > MAX_KEY_ID_BYTES:
        raise JwtSvidError(f"token key ID is longer than {MAX_KEY_ID_BYTES} bytes")


@lru_cache(maxsize=256)
def _verifier(spki: bytes, algorithm: str) -> tuple["Algorithm", PublicKeyTypes]:
    """Load a bundle's key once for each algorithm that fits it; the token never chooses."""
    key = key_of_spki(spki)
    if algorithm not in algorithms_of(key):
        raise JwtSvidError("token algorithm does not fit the key")
    # Here and not above: an agent whose workloads validate none goes without it, and without
    # the HTTP client that comes along.
    import jwt

    return jwt.get_algorithm_by_name(algorithm), key


def check_signature(spki: bytes, algorithm: str, signed: bytes, signature: bytes) -> None:
    """
    Check a JWS signature by the key in *spki* (JWT-06, SEC-40, SEC-44).

    Raises:
        JwtSvidError: *algorithm* does not fit the key, or the signature is not its own.
    """
    verifier, key = _verifier(spki, algorithm)
    if (
        isinstance(key, ec.EllipticCurvePublicKey)
        and len(signature) != (key.key_size + 7) // 8 * 2
    ):
        raise JwtSvidError("token signature has the wrong length")
    try:
        good = verifier.verify(signed, key, signature)
    except Exception as error:
        raise JwtSvidError("token signature does not verify") from error
    if not good:
        raise JwtSvidError("token signature does not verify")


def _claims(payload: bytes) -> Mapping[str, Any]:
    try:
        claims = loads(payload)
    except StrictJsonError as error:
        raise JwtSvidError(f"token cannot be read: {error}") from error
    if not isinstance(claims, dict):
        raise JwtSvidError("token payload must be a JSON object")
    return claims


def _check_claims(svid: JwtSvid, audience: str, at: datetime, leeway: timedelta) -> None:
    if audience not in svid.audience:
        raise JwtSvidError("token is for another audience")
    # Differences, as a sum with an instant of year 9999 has no value.
    if at - svid.expires_at >= leeway:
        raise JwtSvidError("token has expired")
    if "nbf" in svid.claims and _instant(svid.claims, "nbf") - at > leeway:
        raise JwtSvidError("token is not valid yet")
    if svid.issued_at is not None and svid.issued_at - at > MAX_IAT_AHEAD:
        raise JwtSvidError("token was issued in the future")


def _subject(payload: Mapping[str, Any]) -> SpiffeId:
    subject = payload.get("sub")
    if not isinstance(subject, str):
        raise JwtSvidError("token has no subject")
    try:
        return SpiffeId.parse(subject)
    except SpiffeIdError as error:
        raise JwtSvidError(f"token subject is not a SPIFFE ID: {error}") from error


def _audience(payload: Mapping[str, Any]) -> tuple[str, ...]:
    audience = payload.get("aud")
    values = [audience] if isinstance(audience, str) else audience
    if not isinstance(values, list) or not values:
        raise JwtSvidError("token has no audience")
    if not all(isinstance(value, str) and value for value in values):
        raise JwtSvidError("token audience must be non-empty strings")
    return tuple(values)


def _instant(payload: Mapping[str, Any], name: str) -> datetime:
    value = payload.get(name)
    # 1765456503.0 is an integer by JSON Schema (JWT-31); True is not one by anybody's.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= 2**53:
        raise JwtSvidError(f"token claim {name} must be a number of seconds")
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise JwtSvidError(f"token claim {name} is out of range") from error
