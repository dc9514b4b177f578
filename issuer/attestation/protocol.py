"""What a node attestor is (SPIRE API 5.2, 8)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from issuer.store.store import Repositories
from spiffe_core.selector import SelectorSet
from spiffe_core.spiffeid import SpiffeId

Challenge: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Sends a challenge to the agent and returns its response."""


@dataclass(frozen=True, slots=True)
class AttestedNode:
    """What an attestor proved; the payload is dropped (SEC-51)."""

    agent_id: SpiffeId
    selectors: SelectorSet
    can_reattest: bool
    """False: the node is refused while it is there, unless *consume* lets it back."""
    check: Callable[[Repositories], None] | None = None
    """Raises if the proof would not do; asked before anything is signed."""
    consume: Callable[[Repositories], None] | None = None
    """Uses the proof up, in the transaction that stores the node; may raise."""


class NodeAttestor(Protocol):
    """Turns a payload into a node's identity."""

    type: ClassVar[str]
    """The attestation type it answers to, such as ``join_token``."""

    async def attest(
        self, payload: bytes, *, public_key: bytes, challenge: Challenge
    ) -> AttestedNode:
        """
        Verify *payload* for the agent whose CSR carries *public_key*.

        Raises:
            MalformedError: the payload is not one.
            ForbiddenError: it proves nothing.
        """
        ...
