"""What a workload attestor is (style 5, SEC-35)."""

import asyncio
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
class Finding:
    """What one attestor learnt of a process; no selectors mean "not one of mine"."""

    selectors: SelectorSet = frozenset()
    changed: "asyncio.Future[None] | None" = None
    """Done when this may be true no longer; None when only a new look can tell."""
    missing: str = ""
    """Why there may be more, or others; the result is marked partial then (SEC-35)."""


NOTHING_FOUND: Final = Finding()


class NotYetError(AttestationError):
    """
    It is one of ours, and what is to be known of it is on its way.

    *arrived* is done when it is worth asking again; who waits for it holds no slot.  *so_far*
    is what holds already, for when the time is up.
    """

    def __init__(
        self, message: str, arrived: "asyncio.Future[None]", so_far: Finding = NOTHING_FOUND
    ) -> None:
        super().__init__(message)
        self.arrived = arrived
        self.so_far = so_far


@dataclass(frozen=True, slots=True)
class Attested:
    """What was learnt of a process, and which attestors could not vouch, and why."""

    selectors: SelectorSet
    partial: Mapping[str, str] = field(default_factory=dict)
    changed: tuple["asyncio.Future[None]", ...] = ()
    """Each is done when a part of it may be true no longer: attest anew then."""
    is_late: bool = False
    """Its platform has yet to tell of it; one of `changed` is done when it has."""


class WorkloadAttestor(Protocol):
    """Turns a process into selectors that the process itself cannot choose."""

    type: ClassVar[str]
    """The selector type it owns, such as ``unix``; unique in one agent."""

    async def attest(self, peer: UnixPeer) -> Finding:
        """
        Describe the process behind *peer*.

        Called on every new stream and before pushes, with a deadline set by the caller.

        Raises:
            NotYetError: it is known shortly; the caller waits a while and asks again.
            AttestationError: the agent then goes on with fewer selectors, marked partial.
        """
        ...

    def close(self) -> None:
        """The agent ends: stop whatever is under way."""
        ...
