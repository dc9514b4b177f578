"""
Kinds of caller, and whether an agent's certificate still counts.

Source: SPIRE API 2.1 to 2.3; SEC-17, SEC-30, SEC-52, SEC-54.
"""

import enum
from datetime import datetime

from spiffe_core.agent import AttestedAgent
from spiffe_core.errors import ForbiddenError


class CallerKind(enum.Enum):
    """How a caller proved itself; one caller can be several."""

    ANY = "any"
    """Everybody, without a certificate too."""
    LOCAL = "local"
    """The admin Unix socket."""
    ADMIN = "admin"
    DOWNSTREAM = "downstream"
    AGENT = "agent"


class DenialReason(enum.IntEnum):
    """Why an agent was denied; the numbers are the wire's."""

    UNKNOWN = 0
    AGENT_EXPIRED = 1
    AGENT_NOT_ATTESTED = 2
    AGENT_NOT_ACTIVE = 3
    AGENT_BANNED = 4
    AGENT_MUST_REATTEST = 5


class AgentDeniedError(ForbiddenError):
    """An agent may not, for a reason that it acts upon."""

    def __init__(self, message: str, reason: DenialReason) -> None:
        super().__init__(message)
        self.reason = reason


class AgentCheck(enum.Enum):
    """The certificate counts; the second value also says that a renewal is now in use."""

    ALLOWED = enum.auto()
    ACTIVATES_NEW = enum.auto()


def check_agent(
    agent: AttestedAgent | None, *, serial: str, not_after: datetime, at: datetime
) -> AgentCheck:
    """
    Decide whether the certificate with *serial* still speaks for *agent* (SPIRE API 2.3).

    Raises:
        AgentDeniedError: expired, not attested, banned, or superseded; in this order.
    """
    if at > not_after:
        raise AgentDeniedError("agent SVID has expired", DenialReason.AGENT_EXPIRED)
    if agent is None:
        raise AgentDeniedError("agent is not attested", DenialReason.AGENT_NOT_ATTESTED)
    if agent.banned:
        raise AgentDeniedError("agent is banned", DenialReason.AGENT_BANNED)
    if serial and serial == agent.serial:
        return AgentCheck.ALLOWED
    if serial and serial == agent.new_serial:
        return AgentCheck.ACTIVATES_NEW
    raise AgentDeniedError("agent SVID was superseded", DenialReason.AGENT_NOT_ACTIVE)
