"""A join token: good for one join, and the only proof that a person hands over (SEC-50)."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar

from workload_api.node.proof import NoWayToAttestError


@dataclass(frozen=True)
class JoinTokenProof:
    """Proves the node once; empty when no token was given."""

    type: ClassVar[str] = "join_token"
    can_repeat: ClassVar[bool] = False
    token: str = field(default="", repr=False)

    @property
    def is_given(self) -> bool:
        """See `NodeProof`."""
        return bool(self.token)

    async def payload(self) -> bytes:
        """See `NodeProof`."""
        if not self.token:
            raise NoWayToAttestError(self.what_to_do(None))
        return self.token.encode()

    def what_to_do(self, expired_at: datetime | None) -> str:
        """See `NodeProof`."""
        why = "this agent has no identity"
        if expired_at is not None:
            why = (
                f"this agent's SVID ended at {expired_at:%Y-%m-%d %H:%M:%S} UTC, while it "
                "was stopped (or is its clock wrong?), and a join token is good for one join"
            )
        return (
            f"{why}: make a new token with `issuer token generate` on the server, and start "
            "with --join-token-file FILE; it will be another agent, so entries below the old "
            "one need its ID as their parent"
        )
