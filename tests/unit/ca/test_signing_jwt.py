"""Signing JWT-SVIDs: for whom, for how long, and nothing but what was meant."""

import base64
import json
from datetime import timedelta
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca.active import ActiveJwt
from ca.jwt import JwtProfile, check_audience, read_back
from ca.keys.protocol import KeyPurpose, KeyPurposeError, SigningKey
from ca.x509 import LintError
from spiffe_core.errors import MalformedError, NotReadyError
from spiffe_core.jwtsvid import MAX_TOKEN_BYTES
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId
from tests.support.authorities import DAY, NOW, a_key
from tests.support.issuing import KINDS, TD, an_active_jwt, token
from tests.support.tokens import b64

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


# SEC-26: audiences.


@pytest.mark.parametrize("count", [1, 2, 16])
def test_sec_26_one_to_sixteen_audiences(count: int) -> None:
    """SEC-26: one to sixteen audiences are carried, in their order."""
    wanted = tuple(f"service-{number}" for number in range(count))
    assert token(audience=wanted).svid.audience == wanted


def test_sec_26_seventeen_audiences() -> None:
    """SEC-26: seventeen audiences are refused, doubles and empty ones not counted."""
    wanted = tuple(f"service-{number}" for number in range(17))
    with pytest.raises(MalformedError, match="more than 16 audiences"):
        token(audience=wanted)
    assert token(audience=(*wanted[:16], "", wanted[0], "")).svid.audience == wanted[:16]


@pytest.mark.parametrize(
    ("audience", "good"),
    [("a" * 255, True), ("a" * 256, False), ("ä" * 127, True), ("ä" * 128, False)],
)
def test_sec_26_length_of_an_audience(audience: str, good: bool) -> None:
    """SEC-26: an audience has at most 255 bytes, however many characters."""
    if good:
        assert token(audience=(audience,)).svid.audience == (audience,)
    else:
        with pytest.raises(MalformedError, match="longer than 255 bytes"):
            token(audience=("ok", audience))


@pytest.mark.parametrize("audience", [(), ("",), ("", "", "")])
def test_sec_26_an_audience_is_required(audience: tuple[str, ...]) -> None:
    """SEC-26, JWT-11, C-23: nothing, or nothing but empty values, is no audience."""
    with pytest.raises(MalformedError, match="at least one audience is required"):
        check_audience(audience)


def test_sec_26_an_audience_that_is_no_text() -> None:
    """SEC-26: half a surrogate pair, which no token can carry, is refused."""
    with pytest.raises(MalformedError):
        token(audience=("\ud800",))


def test_sec_43_the_largest_token_of_ours_is_read() -> None:
    """SEC-26, SEC-43: what we sign our validators read: at most 16 KiB."""
    path = "/" + "w" * (2048 - len("spiffe://example.org/"))
    wanted = tuple(f"{number:03}" + '"' * 252 for number in range(16))
    made = token(an_active_jwt("rsa4096"), spiffe_id=SpiffeId(TD, path), audience=wanted).svid
    assert len(made.token) <= MAX_TOKEN_BYTES
    with pytest.raises(MalformedError, match="longer than 16 KiB"):
        token(audience=tuple(f"{number:03}" + "\x01" * 252 for number in range(16)))


# SEC-22, SEC-26: lifetimes.


@pytest.mark.parametrize(
    ("ttl", "lives"),
    [
        (timedelta(0), 5 * MINUTE), (SECOND, SECOND), (HOUR, HOUR), (HOUR + SECOND, HOUR),
        (30 * DAY, HOUR), (timedelta(seconds=2**31 - 1), HOUR),
        (timedelta(days=999_999_999), HOUR),
    ],
)  # fmt: skip
def test_sec_26_lifetimes(ttl: timedelta, lives: timedelta) -> None:
    """SEC-26, SEC-22, JWT-17: five minutes by default, an hour at most, whatever is asked."""
    made = token(ttl=ttl).svid
    assert made.expires_at == NOW + lives
    assert made.issued_at == NOW


@pytest.mark.parametrize("ttl", [-SECOND, timedelta.min, timedelta(milliseconds=1)])
def test_sec_22_bad_lifetimes(ttl: timedelta) -> None:
    """SEC-22: a negative lifetime, or one that is no whole seconds, is refused."""
    with pytest.raises(MalformedError, match="TTL"):
        token(ttl=ttl)


@pytest.mark.parametrize(
    "changes",
    [
        {"default_ttl": timedelta(0)}, {"default_ttl": -SECOND}, {"default_ttl": 2 * HOUR},
        {"max_ttl": MINUTE}, {"default_ttl": timedelta(milliseconds=1500)},
        {"max_ttl": timedelta(hours=1, microseconds=1)},
    ],
)  # fmt: skip
def test_profiles_that_cannot_be(changes: dict[str, timedelta]) -> None:
    """SEC-22: a profile with an impossible lifetime does not exist."""
    with pytest.raises(MalformedError):
        JwtProfile(**changes)


@given(
    st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=9999)),
    st.timedeltas(min_value=timedelta(0), max_value=40 * DAY),
)
def test_sec_22_never_beyond_the_signer(ttl: timedelta, later: timedelta) -> None:
    """SEC-22, JWT-17, IOP-12: exp is never beyond the key's end, and iat never ahead of now."""
    authority = an_active_jwt()
    now = NOW + later
    try:
        made = token(authority, ttl=timedelta(seconds=int(ttl.total_seconds())), now=now).svid
    except NotReadyError:
        assert now > authority.validity.not_after - SECOND
        return
    assert made.issued_at is not None
    assert made.issued_at <= now < made.expires_at <= authority.validity.not_after
    assert made.expires_at - made.issued_at <= HOUR


def test_an_authority_at_its_end() -> None:
    """SEC-22: an authority that has ended signs nothing, and says that it will be renewed."""
    ends = an_active_jwt().validity.not_after
    assert token(now=ends - SECOND).svid.expires_at == ends
    for late in (timedelta(0), SECOND, DAY):
        with pytest.raises(NotReadyError, match="authority has expired"):
            token(now=ends + late)


# SEC-24, SEC-60.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"sub": "spiffe://example.org/v"}, {"sub": "spiffe://partner.test/w"}, {"aud": ["x"]},
        {"aud": ["db", "x"]}, {"aud": "db"}, {"exp": 1}, {"exp": 99999999999}, {"iat": 0},
        {"jti": "x"}, {"nbf": 0}, {"iss": "x"}, {"admin": True}, {"exp": None},
    ],
    ids=str,
)  # fmt: skip
def test_sec_24_a_token_that_says_something_else(kind: str, change: dict[str, Any]) -> None:
    """SEC-24: a token whose claims are not the ones that were meant does not leave."""
    authority = an_active_jwt(kind)
    made = token(authority).svid
    claims = dict(made.claims)
    header, _, signature = made.token.split(".")
    read_back(made.token, claims, authority)
    payload = b64(json.dumps(claims | change).encode())
    with pytest.raises(LintError, match="thrown away"):
        read_back(f"{header}.{payload}.{signature}", claims, authority)
    for name in claims:
        less = {key: value for key, value in claims.items() if key != name}
        payload = b64(json.dumps(less).encode())
        with pytest.raises(LintError):
            read_back(f"{header}.{payload}.{signature}", claims, authority)


@pytest.mark.parametrize(
    "change",
    [{"alg": "ES384"}, {"alg": "none"}, {"kid": "x"}, {"typ": "at+jwt"}, {"crit": ["exp"]}],
    ids=str,
)
def test_sec_24_a_token_with_another_header(change: dict[str, Any]) -> None:
    """SEC-24, JWT-03: a token whose header is not the authority's does not leave."""
    authority = an_active_jwt()
    made = token(authority).svid
    header, payload, signature = made.token.split(".")
    plain = json.loads(base64.urlsafe_b64decode(header + "=="))
    other = b64(json.dumps(plain | change).encode())
    with pytest.raises(LintError, match="thrown away"):
        read_back(f"{other}.{payload}.{signature}", dict(made.claims), authority)


@pytest.mark.parametrize("payload", ["", "AAAA", "e30", "eyJhIjoxLCJhIjoxfQ", "=", "ÄÖ"])
def test_sec_24_a_payload_that_cannot_be_read(payload: str) -> None:
    """SEC-24: what cannot be read back does not leave."""
    made = token().svid
    header, _, signature = made.token.split(".")
    with pytest.raises(LintError, match="thrown away"):
        read_back(f"{header}.{payload}.{signature}", dict(made.claims), an_active_jwt())


def test_sec_60_an_x509_key_signs_no_token() -> None:
    """SEC-60: a token by a key that is for certificates is a type error."""
    wrong = SigningKey("ca", KeyPurpose.X509_CA, a_key("p256", "jwt"))
    authority = ActiveJwt("kid", Validity(NOW, NOW + DAY), wrong)
    with pytest.raises(KeyPurposeError, match="for x509-ca alone"):
        token(authority)
    with pytest.raises(TypeError):
        token(authority)


def test_sec_90_nothing_secret_in_a_repr() -> None:
    """SEC-90: no repr of what signs, or of what was signed, holds the key or the token."""
    made = token()
    number = an_active_jwt().private.private_numbers().private_value
    for shown in (repr(an_active_jwt()), repr(made), repr(made.svid)):
        assert made.svid.token not in shown
        assert str(number) not in shown


@pytest.mark.parametrize(
    ("kind", "algorithm", "size", "times"),
    [("p256", "ES256", 64, 600), ("p384", "ES384", 96, 300), ("rsa2048", "RS256", 256, 3)],
)
def test_jwt_04_signatures_of_one_length(
    kind: str, algorithm: str, size: int, times: int
) -> None:
    """JWT-04: a signature has the length of its kind, numbers with leading zeros too."""
    authority = an_active_jwt(kind)
    public = authority.private.public_key()
    assert authority.algorithm == algorithm
    checker = jwt.get_algorithm_by_name(algorithm)
    for number in range(times):
        data = f"to be signed {number}".encode()
        signature = authority.sign(data)
        assert len(signature) == size
        assert checker.verify(data, public, signature)
        assert not checker.verify(data + b".", public, signature)
