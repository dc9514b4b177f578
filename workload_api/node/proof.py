"""What an agent proves its node with (SPIRE API 8)."""

from datetime import datetime
from typing import ClassVar, Protocol

from spiffe_core.errors import PreconditionError


class NoWayToAttestError(PreconditionError):
    """There is nothing to prove this node with; says what to do."""


class NodeProof(Protocol):
    """One way to prove this node to the server; how long a proof is good is its own affair."""

    type: ClassVar[str]
    """The attestation type, such as ``join_token``."""
    can_repeat: ClassVar[bool]
    """Whether this node can prove itself again, as often as it likes."""

    @property
    def is_given(self) -> bool:
        """False when an operator has to give something first, so that no try is made."""
        ...

    async def payload(self) -> bytes:
        """
        Return what the server is sent, as it is now.

        Raises:
            NoWayToAttestError: there is none.
        """
        ...

    def what_to_do(self, expired_at: datetime | None) -> str:
        """
        What an operator does about an agent that has no identity and gets none.

        *expired_at* is when the one that it had ended, if it had one.
        """
        ...
