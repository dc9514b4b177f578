"""
Callers known by a JWT-SVID: where TLS ends at a proxy, or reaches only part of the way.

Source: JWT-13, JWT-14, JWT-22, JWT-23, JWT-32, SEC-41 to SEC-44, T-08; RFC 6750.  A bearer
secret: whoever sees one can use it until it ends.  So the audience is the one service that it
is for, it goes over TLS alone, and it stands in no log.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import ForbiddenError, SpiffeError, UnauthenticatedError
from spiffe_core.jwtsvid import JwtSvid, JwtSvidError, verify_jwt_svid
from spiffe_core.matching import Matcher
from workload_api.client.peer_check import Now, utc_now

HEADER: Final = "authorization"
_SCHEME: Final = "bearer"


class HasBundles(Protocol):
    """`BundleSource`, or a stand-in: the JWT authorities by trust domain, as they are now."""

    @property
    def bundles(self) -> BundleSet:
        """They change as the agent says."""
        ...


class NoJwtSvidError(UnauthenticatedError):
    """The caller sent no JWT-SVID, or not in the one form in which they are sent."""


class JwtRefusedError(UnauthenticatedError):
    """The caller sent what is not a JWT-SVID for us; says which rule it breaks."""


def authenticate(
    values: Sequence[str],
    bundles: BundleSet,
    *,
    audience: str,
    authorize: Matcher,
    at: datetime,
) -> JwtSvid:
    """
    Return the JWT-SVID of a caller; *values* are all that stood in ``authorization``.

    Raises:
        NoJwtSvidError: there is none, or not exactly one (JWT-22, JWT-23).
        JwtRefusedError: it is not good, or for another audience.
        ForbiddenError: it is good, and *authorize* does not want its subject.
    """
    try:
        svid = verify_jwt_svid(_bearer(values), bundles, audience=audience, at=at)
    except JwtSvidError as error:
        raise JwtRefusedError(str(error)) from error
    try:
        authorize(svid.spiffe_id)
    except SpiffeError:
        raise
    except Exception as error:
        raise ForbiddenError("the caller is not welcome") from error
    return svid


def header_of(svid: JwtSvid) -> Mapping[str, str]:
    """Return the HTTP header that carries *svid* (JWT-22)."""
    return {"Authorization": f"Bearer {svid.token}"}


def metadata_of(svid: JwtSvid) -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata that carry *svid* (JWT-23)."""
    return ((HEADER, f"Bearer {svid.token}"),)


@dataclass(frozen=True, slots=True)
class JwtVerifier:
    """
    `authenticate` with what a service knows beforehand.

    Raises:
        ValueError: *audience* is empty: it would be everybody's.
    """

    source: HasBundles = field(repr=False)
    audience: str
    authorize: Matcher = field(repr=False)
    now: Now | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.audience:
            raise ValueError("name the audience: the one service that this is (JWT-14)")

    def authenticate(self, values: Sequence[str]) -> JwtSvid:
        """Return the caller's JWT-SVID; raises as `authenticate` does."""
        return authenticate(
            values,
            self.source.bundles,
            audience=self.audience,
            authorize=self.authorize,
            at=(self.now or utc_now)(),
        )


def _bearer(values: Sequence[str]) -> str:
    if not values:
        raise NoJwtSvidError("no authorization: send a JWT-SVID as Bearer")
    if len(values) > 1:
        # Two readers might take a different one each.
        raise NoJwtSvidError("authorization must stand there once")
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != _SCHEME or not token.strip(" "):
        raise NoJwtSvidError("authorization must be a JWT-SVID as Bearer")
    return token.strip(" ")
