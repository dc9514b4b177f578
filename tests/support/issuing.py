"""The product's own signing, with what it needs made once."""

from datetime import timedelta
from functools import cache
from typing import Any

from ca.active import ActiveJwt, ActiveX509
from ca.jwt import JwtProfile, SignedJwt, sign_jwt
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.lint import check_profile
from ca.x509 import (
    CheckedProfile,
    PreparedX509,
    SignedX509,
    X509Profile,
    prepare_x509,
    self_signed,
    sign_x509,
)
from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.authorities import DAY, NOW, a_key

TD = TrustDomain("example.org")
KINDS = ("p256", "p384", "rsa2048", "rsa4096")
"""The keys that an authority may have."""


@cache
def checked_profile() -> CheckedProfile:
    """The default profile, linted."""
    return check_profile(X509Profile(), NOW)


@cache
def an_active_x509(kind: str = "p256", which: str = "ca", ttl: timedelta = 365 * DAY) -> Any:
    """An X.509 authority of example.org that signs."""
    key = SigningKey(f"x509-{which}", KeyPurpose.X509_CA, a_key(kind, which))
    return ActiveX509(self_signed(key, TD, now=NOW, ttl=ttl), key)


@cache
def an_active_jwt(kind: str = "p256", which: str = "jwt", ttl: timedelta = 30 * DAY) -> Any:
    """A JWT authority of example.org that signs; its ``kid`` is *which*."""
    key = SigningKey(f"jwt-{which}", KeyPurpose.JWT, a_key(kind, which))
    return ActiveJwt(which, Validity(NOW, NOW + ttl), key)


def prepared(authority: ActiveX509 | None = None, **changes: Any) -> PreparedX509:
    """A leaf for ``/w``, decided and not signed."""
    made: dict[str, Any] = {
        "spiffe_id": SpiffeId(TD, "/w"),
        "public_key": spki_of(a_key("p256", "workload").public_key()),
        "now": NOW,
    }
    checked = changes.pop("checked", None) or checked_profile()
    return prepare_x509(checked, authority or an_active_x509(), **made | changes)


def issued(authority: ActiveX509 | None = None, **changes: Any) -> SignedX509:
    """A leaf for ``/w``, signed by the product."""
    return sign_x509(prepared(authority, **changes))


def token(authority: ActiveJwt | None = None, **changes: Any) -> SignedJwt:
    """A JWT-SVID for ``/w`` and the audience ``db``, signed by the product."""
    made: dict[str, Any] = {"spiffe_id": SpiffeId(TD, "/w"), "audience": ("db",), "now": NOW}
    profile = changes.pop("profile", None) or JwtProfile()
    return sign_jwt(profile, authority or an_active_jwt(), **made | changes)


def bundles_of(*authorities: ActiveX509 | ActiveJwt) -> BundleSet:
    """The bundle of example.org that holds these."""
    x509 = tuple(one.authority for one in authorities if isinstance(one, ActiveX509))
    jwt = tuple(
        JwtAuthority(one.key_id, one.key.public_key)
        for one in authorities
        if isinstance(one, ActiveJwt)
    )
    return BundleSet.of([Bundle(TD, x509, jwt)])
