"""
An authority's life as a table (SEC-66).

prepared: published, signs nothing.  active: signs.  old: signs nothing, still trusted.
tainted: to be replaced everywhere.  revoked: gone from the bundle.
"""

import enum
from typing import Final

from ca.journal import AuthorityState
from spiffe_core.errors import PreconditionError


class Step(enum.Enum):
    """What can be done to an authority."""

    ACTIVATE = "activate"
    RETIRE = "retire"
    TAINT = "taint"
    REVOKE = "revoke"
    PRUNE = "prune"


_PREPARED, _ACTIVE, _OLD, _TAINTED, _REVOKED = AuthorityState

NEXT: Final[dict[tuple[AuthorityState, Step], AuthorityState]] = {
    (_PREPARED, Step.ACTIVATE): _ACTIVE,
    (_ACTIVE, Step.RETIRE): _OLD,
    (_OLD, Step.ACTIVATE): _ACTIVE,  # the way back, until it is revoked
    (_OLD, Step.TAINT): _TAINTED,
    (_OLD, Step.PRUNE): _REVOKED,
    (_TAINTED, Step.REVOKE): _REVOKED,
}


def after(state: AuthorityState, step: Step) -> AuthorityState:
    """
    Return the state that *step* leads to.

    Raises:
        PreconditionError: it is not possible from *state*.
    """
    try:
        return NEXT[state, step]
    except KeyError:
        raise PreconditionError(
            f"an authority that is {state.value} cannot be taken through {step.value}"
        ) from None
