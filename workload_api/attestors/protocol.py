"""What a workload attestor is (style 5, SEC-35)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from spiffe_core.errors import NotReadyError
from spiffe_core.selector import SelectorSet
from spiffe_wire.frontdoor.peer import UnixPeer

AT_ONCE: Final = 32  # security requirements, table 1
PER_UID: Final = 24  # of these; the rest is for everybody else (SEC-81)


class AttestationError(NotReadyError):
    """It may be one of ours, but the attestor can't vouch for it."""


@dataclass(frozen=True, slots=True)
class Attested:
    """What was learnt of a process, and which attestors could not vouch, and why."""

    selectors: SelectorSet
    partial: Mapping[str, str] = field(default_factory=dict)


class WorkloadAttestor(Protocol):
    """Turns a process into selectors that the process itself cannot choose."""

    type: ClassVar[str]
    """The selector type it owns, such as ``unix``; unique in one agent."""

    async def attest(self, peer: UnixPeer) -> SelectorSet:
        """
        Describe the process behind *peer*; an empty set means "not one of mine".

        Called on every new stream and before pushes, with a deadline set by the caller.

        Raises:
            AttestationError: the agent then goes on with fewer selectors, marked partial.
        """
        ...

    def close(self) -> None:
        """The agent ends: stop whatever is under way."""
        ...
