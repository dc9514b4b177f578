"""
A caller's JWT-SVID in a header or in metadata: exactly one, good, for us, and welcome.

Each test names its rule.  What makes a token good is tested where it is verified, in
tests/unit/spiffe_core and tests/security/test_jwt_profile.py.
"""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import ForbiddenError, UnauthenticatedError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.matching import any_id, exactly
from spiffe_core.spiffeid import SpiffeId
from tests.support.authorities import NOW
from tests.support.tokens import a_bundle, a_token, bundles
from workload_api.client.jwt_auth import (
    JwtRefusedError,
    JwtVerifier,
    NoJwtSvidError,
    authenticate,
    header_of,
    metadata_of,
)

W = SpiffeId.parse("spiffe://example.org/w")


def asked(*values: str, **changes: Any) -> JwtSvid:
    """What *values* of ``authorization`` prove to db."""
    arguments = {"audience": "db", "authorize": exactly(W), "at": NOW, **changes}
    known = arguments.pop("bundles", bundles())
    return authenticate(values, known, **arguments)


@pytest.mark.parametrize(
    "form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {}", "Bearer {} "]
)
def test_jwt_22_what_is_taken(form: str) -> None:
    """JWT-22: the scheme is Bearer in any case, as HTTP has it, and then the JWT-SVID."""
    token = a_token()
    svid = asked(form.format(token))
    assert (svid.spiffe_id, svid.token) == (W, token)


NONE: dict[str, tuple[str, ...]] = {
    "no header": (),
    "two headers": (f"Bearer {a_token()}", f"Bearer {a_token()}"),
    "two in one": (f"Bearer {a_token()}, Bearer {a_token()}",),
    "an empty one": ("",),
    "the scheme alone": ("Bearer",),
    "the scheme and a space": ("Bearer ",),
    "no scheme": (a_token(),),
    "another scheme": (f"Basic {a_token()}",),
    "a tab": (f"Bearer\t{a_token()}",),
    "the scheme twice": (f"Bearer Bearer {a_token()}",),
}


@pytest.mark.parametrize("what", NONE)
def test_jwt_22_what_is_not_taken(what: str) -> None:
    """JWT-22, JWT-23: anything but exactly one JWT-SVID as Bearer is none."""
    with pytest.raises(UnauthenticatedError) as refused:
        asked(*NONE[what])
    assert a_token().split(".")[0] not in str(refused.value)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another audience": ({"aud": ["web"]}, {}, "another audience"),
    "expired": ({}, {"at": NOW + timedelta(hours=1)}, "expired"),
    "another domain's key": (
        {"sub": "spiffe://partner.test/w"},
        {"bundles": bundles(a_bundle("partner.test", "other"))},
        "does not verify",
    ),
    "an unknown domain": ({"sub": "spiffe://stranger.test/w"}, {}, "no JWT authority"),
    "no bundle at all": ({}, {"bundles": BundleSet()}, "no JWT authority"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_jwt_32_what_is_refused(what: str) -> None:
    """JWT-32: a JWT-SVID is good for its audience, by its own domain's keys alone."""
    claims, changes, why = REFUSED[what]
    with pytest.raises(JwtRefusedError, match=why):
        asked(f"Bearer {a_token(**claims)}", **{"authorize": any_id(), **changes})


def test_an_unwanted_subject_is_forbidden() -> None:
    """A JWT-SVID that is good, of somebody who is not wanted, is another refusal."""
    with pytest.raises(ForbiddenError):
        asked(f"Bearer {a_token(sub='spiffe://example.org/x')}")


def test_a_check_that_breaks_is_a_refusal() -> None:
    """Whatever `authorize` raises, nobody is let in."""

    def authorize(_: SpiffeId) -> None:
        raise LookupError("odd")

    with pytest.raises(ForbiddenError, match="not welcome"):
        asked(f"Bearer {a_token()}", authorize=authorize)


@given(st.lists(st.text(), max_size=2))
def test_whatever_stands_there_is_refused_cleanly(values: list[str]) -> None:
    """Any text in the header is a refusal of ours, never another error."""
    with pytest.raises((NoJwtSvidError, JwtRefusedError)):
        asked(*values)


def test_an_audience_is_named() -> None:
    """A service cannot be made that takes JWT-SVIDs for nobody in particular."""
    with pytest.raises(ValueError, match="audience"):
        JwtVerifier(None, "", any_id())  # type: ignore[arg-type]


def test_jwt_22_and_23_it_is_sent() -> None:
    """JWT-22, JWT-23: header and metadata read ``Bearer`` and the JWT-SVID, and are taken."""
    svid = JwtSvid.parse_unverified(a_token())
    assert asked(header_of(svid)["Authorization"]).spiffe_id == W
    ((key, value),) = metadata_of(svid)
    assert key == "authorization" and asked(value).spiffe_id == W


def test_no_secret_in_a_repr() -> None:
    """SEC-90: neither the JWT-SVID nor the keys stand in what is printed."""
    svid = asked(f"Bearer {a_token()}")
    verifier = JwtVerifier(None, "db", any_id())  # type: ignore[arg-type]
    assert svid.token not in repr(svid)
    assert repr(verifier) == "JwtVerifier(audience='db')"
