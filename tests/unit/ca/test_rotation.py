"""An authority's life as a table, and its schedule as arithmetic."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca.journal import AuthorityState
from ca.rotation import NEXT, Step, after
from ca.schedule import activate_at, lead_of, prepare_at, prune_at
from spiffe_core.errors import PreconditionError
from spiffe_core.lifetime import Validity

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
LIVES = st.timedeltas(min_value=timedelta(minutes=1), max_value=timedelta(days=36500))

ALLOWED = {
    ("prepared", "activate"): "active",
    ("active", "retire"): "old",
    ("old", "activate"): "active",
    ("old", "taint"): "tainted",
    ("old", "prune"): "revoked",
    ("tainted", "revoke"): "revoked",
}


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("state", AuthorityState)
def test_sec_66_the_table(state: AuthorityState, step: Step) -> None:
    """SEC-66: each pair of state and step leads where the table says, or is refused by name."""
    wanted = ALLOWED.get((state.value, step.value))
    if wanted is not None:
        assert after(state, step) is AuthorityState(wanted)
    else:
        with pytest.raises(PreconditionError, match=f"{state.value}.*{step.value}"):
            after(state, step)


def test_sec_66_every_life_ends_revoked() -> None:
    """SEC-66: revoked is the one end, every state leads there, and nothing leads out of it."""
    assert all(state is not AuthorityState.REVOKED for state, _ in NEXT)
    for start in AuthorityState:
        reached = {start}
        while more := {to for (at, _), to in NEXT.items() if at in reached} - reached:
            reached |= more
        assert AuthorityState.REVOKED in reached


def test_sec_66_reversible_until_revoked() -> None:
    """SEC-66: what was retired can be made active again; what signs is not tainted."""
    assert after(AuthorityState.OLD, Step.ACTIVATE) is AuthorityState.ACTIVE
    with pytest.raises(PreconditionError):
        after(AuthorityState.ACTIVE, Step.TAINT)


@pytest.mark.parametrize(
    ("life", "prepared", "activated"),
    [
        (365 * DAY, 30 * DAY, 7 * DAY),
        (60 * DAY, 30 * DAY, 7 * DAY),
        (42 * DAY, 21 * DAY, 7 * DAY),
        (30 * DAY, 15 * DAY, 5 * DAY),
        (DAY, timedelta(hours=12), timedelta(hours=4)),
        (timedelta(hours=1), timedelta(minutes=30), timedelta(minutes=10)),
    ],
)
def test_the_schedule(life: timedelta, prepared: timedelta, activated: timedelta) -> None:
    """SEC-66: the next is made at half-life or 30 days, and signs at a sixth or 7 days."""
    validity = Validity(NOW, NOW + life)
    assert validity.not_after - prepare_at(validity) == prepared
    assert validity.not_after - activate_at(validity) == activated
    assert lead_of(life) == prepared - activated
    assert prune_at(validity) > validity.not_after


@given(LIVES)
def test_the_order_of_a_life(life: timedelta) -> None:
    """SEC-66: whatever the life: begin, prepare the next, activate it, end, prune."""
    validity = Validity(NOW, NOW + life)
    instants = [
        validity.not_before, prepare_at(validity), activate_at(validity), validity.not_after,
        prune_at(validity),
    ]  # fmt: skip
    assert instants == sorted(set(instants))
    rounded = timedelta(microseconds=1)
    assert lead_of(life) >= min(life / 3, 23 * DAY) - rounded
