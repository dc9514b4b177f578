"""
Who may peer with whom: exact comparison of parsed IDs, never a pattern (SEC-03).

Each function returns a check that raises; an empty list of IDs is a failure, not a pass.
"""

from collections.abc import Callable, Collection
from typing import TypeAlias

from spiffe_core.errors import ForbiddenError
from spiffe_core.spiffeid import SpiffeId, TrustDomain

Matcher: TypeAlias = Callable[[SpiffeId], None]


class MismatchError(ForbiddenError):
    """The peer proved an identity, and it is not one that was wanted."""


def any_id() -> Matcher:
    """Accept every verified ID, of whichever trust domain a bundle is held for."""
    return lambda _: None


def exactly(expected: SpiffeId) -> Matcher:
    """Accept one ID."""
    return one_of((expected,))


def one_of(expected: Collection[SpiffeId]) -> Matcher:
    """Accept any of *expected*."""
    wanted = frozenset(expected)

    def check(spiffe_id: SpiffeId) -> None:
        if spiffe_id not in wanted:
            raise MismatchError(
                f'the peer is "{spiffe_id}", which is not the expected identity'
            )

    return check


def member_of(trust_domain: TrustDomain) -> Matcher:
    """Accept every ID of one trust domain."""

    def check(spiffe_id: SpiffeId) -> None:
        if spiffe_id.trust_domain != trust_domain:
            raise MismatchError(f'the peer is "{spiffe_id}", not a member of "{trust_domain}"')

    return check
