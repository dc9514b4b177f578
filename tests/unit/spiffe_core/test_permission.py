"""Whether an agent's certificate still counts, and why not (SPIRE API 2.3)."""

import itertools
from datetime import datetime, timedelta
from typing import Any

import pytest

from spiffe_core.agent import AttestedAgent
from spiffe_core.errors import ErrorKind
from spiffe_core.permission import (
    AgentCheck,
    AgentDeniedError,
    CallerKind,
    DenialReason,
    check_agent,
)
from tests.support.store import NOW, an_agent

SECOND = timedelta(seconds=1)
LATER = NOW + timedelta(hours=1)


def checked(agent: AttestedAgent | None, **changes: Any) -> AgentCheck:
    """Check *agent*'s current certificate, an hour before its end."""
    return check_agent(agent, **{"serial": "1001", "not_after": LATER, "at": NOW, **changes})


def reason_of(agent: AttestedAgent | None, **changes: Any) -> DenialReason:
    """Why *agent* is denied."""
    with pytest.raises(AgentDeniedError) as caught:
        checked(agent, **changes)
    assert caught.value.kind is ErrorKind.FORBIDDEN
    return caught.value.reason


def test_the_current_serial_counts() -> None:
    """An attested agent with its current certificate is allowed."""
    assert checked(an_agent()) is AgentCheck.ALLOWED


def test_the_new_serial_counts_and_says_so() -> None:
    """After a renewal both serials count; first use of the new one activates it."""
    renewed = an_agent(new_serial="1002", new_expires_at=LATER)
    assert checked(renewed) is AgentCheck.ALLOWED
    assert checked(renewed, serial="1002") is AgentCheck.ACTIVATES_NEW


@pytest.mark.parametrize(
    ("agent", "changes", "reason"),
    [
        (an_agent(), {"at": LATER + SECOND}, DenialReason.AGENT_EXPIRED),
        (None, {}, DenialReason.AGENT_NOT_ATTESTED),
        (an_agent(banned=True), {}, DenialReason.AGENT_BANNED),
        (an_agent(), {"serial": "1000"}, DenialReason.AGENT_NOT_ACTIVE),
        (an_agent(), {"serial": ""}, DenialReason.AGENT_NOT_ACTIVE),
        (an_agent(new_serial="1002"), {"serial": "1003"}, DenialReason.AGENT_NOT_ACTIVE),
        (an_agent(), {"serial": "01001"}, DenialReason.AGENT_NOT_ACTIVE),
        (an_agent(), {"serial": "1001 "}, DenialReason.AGENT_NOT_ACTIVE),
    ],
)
def test_denials(
    agent: AttestedAgent | None, changes: dict[str, Any], reason: DenialReason
) -> None:
    """Each way not to be allowed has its own reason; serials compare as text."""
    assert reason_of(agent, **changes) is reason


@pytest.mark.parametrize(
    ("at", "allowed"), [(LATER - SECOND, True), (LATER, True), (LATER + SECOND, False)]
)
def test_expiry_is_at_the_end(at: datetime, allowed: bool) -> None:
    """A certificate counts up to and at its notAfter."""
    if allowed:
        assert checked(an_agent(), at=at) is AgentCheck.ALLOWED
    else:
        assert reason_of(an_agent(), at=at) is DenialReason.AGENT_EXPIRED


def test_order_of_reasons() -> None:
    """SPIRE API 2.3: expired, then not attested, then banned, then superseded, in all mixes."""
    for expired, known, banned, current in itertools.product([False, True], repeat=4):
        agent = an_agent(banned=banned) if known else None
        changes = {
            "at": LATER + SECOND if expired else NOW,
            "serial": "1001" if current else "9",
        }
        if expired:
            expected = DenialReason.AGENT_EXPIRED
        elif not known:
            expected = DenialReason.AGENT_NOT_ATTESTED
        elif banned:
            expected = DenialReason.AGENT_BANNED
        elif not current:
            expected = DenialReason.AGENT_NOT_ACTIVE
        else:
            assert checked(agent, **changes) is AgentCheck.ALLOWED
            continue
        assert reason_of(agent, **changes) is expected


def test_a_ban_covers_the_renewed_certificate() -> None:
    """SEC-52: a banned agent is denied with its new serial as with its old one."""
    agent = an_agent(banned=True, new_serial="1002")
    for serial in ("1001", "1002"):
        assert reason_of(agent, serial=serial) is DenialReason.AGENT_BANNED


def test_an_empty_serial_never_counts() -> None:
    """No serial equals none: an agent without one has nothing that a caller can show."""
    assert reason_of(an_agent(serial=""), serial="") is DenialReason.AGENT_NOT_ACTIVE


def test_reasons_have_the_wires_numbers() -> None:
    """SPIRE API 4: PermissionDeniedDetails.Reason."""
    assert {one.name: int(one) for one in DenialReason} == {
        "UNKNOWN": 0,
        "AGENT_EXPIRED": 1,
        "AGENT_NOT_ATTESTED": 2,
        "AGENT_NOT_ACTIVE": 3,
        "AGENT_BANNED": 4,
        "AGENT_MUST_REATTEST": 5,
    }


def test_kinds_of_caller() -> None:
    """SPIRE API 2.1: the five kinds that the table of RPCs names."""
    assert {one.value for one in CallerKind} == {
        "any",
        "local",
        "admin",
        "downstream",
        "agent",
    }
