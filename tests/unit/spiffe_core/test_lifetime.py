"""Validity, and when to renew."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.errors import MalformedError
from spiffe_core.lifetime import Validity, renew_at

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
HOUR = Validity(START, START + timedelta(hours=1))


@pytest.mark.parametrize(
    ("at", "inside"),
    [
        (START - SECOND, False),
        (START - timedelta(microseconds=1), False),
        (START, True),
        (START + timedelta(minutes=30), True),
        (START + timedelta(hours=1), True),
        (START + timedelta(hours=1, microseconds=1), False),
        (START + timedelta(hours=1) + SECOND, False),
    ],
)
def test_sec_16_both_ends_are_inside_and_nothing_beyond(at: datetime, inside: bool) -> None:
    """Validity covers both its ends, and gives no grace on either."""
    assert HOUR.covers(at) is inside
    assert HOUR.covers(at.astimezone(timezone(timedelta(hours=9)))) is inside


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (START, START, "must end after it begins"),
        (START, START - SECOND, "must end after it begins"),
        (START.replace(tzinfo=None), START + SECOND, "time zone"),
        (START, (START + SECOND).replace(tzinfo=None), "time zone"),
    ],
)
def test_what_is_no_validity(start: datetime, end: datetime, reason: str) -> None:
    """A validity has time zones and ends after it begins."""
    with pytest.raises(MalformedError, match=reason):
        Validity(start, end)


@pytest.mark.parametrize(
    ("jitter", "minutes"), [(0.0, 30), (1.0, 36), (-1.0, 24), (0.5, 33), (7.0, 36), (-7.0, 24)]
)
def test_sec_106_renewal_is_at_half_life(jitter: float, minutes: int) -> None:
    """Renewal is at half-life, moved by a tenth of the life at most."""
    assert renew_at(HOUR, jitter) == START + timedelta(minutes=minutes)
    assert renew_at(HOUR) == START + timedelta(minutes=30)


@given(st.integers(1, 10**9), st.floats())
def test_sec_106_never_outside_a_tenth(seconds: int, jitter: float) -> None:
    """Whatever the life and the jitter, NaN too, renewal is half-life ± 10 % of the life."""
    validity = Validity(START, START + timedelta(seconds=seconds))
    due = renew_at(validity, jitter)
    slack = timedelta(microseconds=1)
    middle = START + validity.life / 2
    assert abs(due - middle) <= validity.life / 10 + slack
    assert validity.covers(due)
