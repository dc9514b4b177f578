"""
JWT-SVID signing: from our own fields only, and read back before it leaves.

Source: JWT-01 to JWT-17, JWT-31, IOP-01, IOP-11, IOP-12, SEC-24, SEC-26, T-18.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from ca.active import ActiveJwt
from ca.x509 import LintError, check_span
from spiffe_core.errors import MalformedError, NotReadyError
from spiffe_core.jwtsvid import MAX_TOKEN_BYTES, JwtSvid
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.strictjson import b64url_decode, b64url_encode, dumps, loads
from spiffe_core.text import utf8_bytes

MAX_AUDIENCES: Final = 16  # SEC-26
MAX_AUDIENCE_BYTES: Final = 255


@dataclass(frozen=True, slots=True)
class JwtProfile:
    """How long tokens live, and who they say issued them."""

    default_ttl: timedelta = timedelta(minutes=5)
    max_ttl: timedelta = timedelta(hours=1)
    issuer: str = ""

    def __post_init__(self) -> None:
        check_span("JWT-SVID", self.default_ttl)
        check_span("JWT-SVID", self.max_ttl)
        if not timedelta(0) < self.default_ttl <= self.max_ttl:
            raise MalformedError("JWT-SVID lifetime must be above 0 and within its cap")


@dataclass(frozen=True, slots=True)
class SignedJwt:
    """A token that is ready to be recorded and handed out."""

    svid: JwtSvid
    authority_id: str


def check_audience(audience: tuple[str, ...]) -> tuple[str, ...]:
    """
    Return *audience* without its empty values (C-23).

    Raises:
        MalformedError: nothing is left, or there are too many or too long values.
    """
    values = tuple(dict.fromkeys(filter(None, audience)))
    if not values:
        raise MalformedError("at least one audience is required")
    if len(values) > MAX_AUDIENCES:
        raise MalformedError(f"more than {MAX_AUDIENCES} audiences")
    for value in values:
        size = utf8_bytes(value)
        if size is None:
            raise MalformedError("an audience is not UTF-8 text")
        if size > MAX_AUDIENCE_BYTES:
            raise MalformedError(f"an audience is longer than {MAX_AUDIENCE_BYTES} bytes")
    return values


def sign_jwt(
    profile: JwtProfile,
    authority: ActiveJwt,
    *,
    spiffe_id: SpiffeId,
    audience: tuple[str, ...],
    now: datetime,
    ttl: timedelta = timedelta(0),
) -> SignedJwt:
    """
    Sign one JWT-SVID; *ttl* of zero means the default.

    Raises:
        MalformedError: the audience or lifetime breaks a rule.
        NotReadyError: the authority has expired.
        LintError: what was signed is not what was meant; it was thrown away.
    """
    check_span("JWT-SVID", ttl)
    if not spiffe_id.path:
        raise MalformedError("a JWT-SVID's SPIFFE ID must have a path")
    values = check_audience(audience)
    issued_at = now.replace(microsecond=0)  # rounded down: never ahead of time (IOP-12)
    end = min(
        issued_at + min(ttl or profile.default_ttl, profile.max_ttl),
        authority.validity.not_after.replace(microsecond=0),
    )
    if end <= now:
        raise NotReadyError("the JWT authority has expired; it is renewed by itself")
    claims: dict[str, object] = {
        "sub": spiffe_id.uri,
        "aud": list(values),
        "exp": int(end.timestamp()),
        "iat": int(issued_at.timestamp()),
        "jti": b64url_encode(secrets.token_bytes(16)),
    }
    if profile.issuer:
        claims["iss"] = profile.issuer
    # Put together here: PyJWT, which validates, makes and checks the constant header each
    # time, which costs as much as half a signature.
    signed = f"{authority.header}.{b64url_encode(dumps(claims))}"
    signature = authority.sign(signed.encode())
    token = f"{signed}.{b64url_encode(signature)}"
    if len(token) > MAX_TOKEN_BYTES:
        # Control characters take six bytes each; no validator of ours would read it (SEC-43).
        raise MalformedError("the audiences make the token longer than 16 KiB")
    read_back(token, claims, authority)
    svid = JwtSvid(token, spiffe_id, values, end, issued_at, authority.key_id, claims)
    return SignedJwt(svid, authority.key_id)


def read_back(token: str, claims: dict[str, object], authority: ActiveJwt) -> None:
    """
    See that *token* says what was meant, and nothing else (SEC-24).

    Raises:
        LintError: it does not; it must not leave.
    """
    header, payload, _ = token.split(".")
    try:
        same = loads(b64url_decode(payload)) == claims and header == authority.header
    except MalformedError as error:
        raise LintError("what was signed is not a JWT-SVID; it was thrown away") from error
    if not same:
        raise LintError("what was signed is not what was meant; it was thrown away")
