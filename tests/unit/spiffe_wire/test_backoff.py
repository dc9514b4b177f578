"""Pauses that grow and are drawn at random (SEC-107)."""

import random
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spiffe_wire.backoff import Backoff

patient = hypothesis_settings(deadline=None)  # the machine may be busy

SECOND = timedelta(seconds=1)


class Always(random.Random):
    """Draws the same every time."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def random(self) -> float:
        """That."""
        return self._value


@patient
@given(
    st.timedeltas(timedelta(milliseconds=1), timedelta(minutes=1)),
    st.integers(1, 10_000),
    st.floats(0, 1, exclude_max=True),
)
def test_sec_107_bounds(initial: timedelta, factor: int, drawn: float) -> None:
    """SEC-107: each pause lies between nothing and a bound that doubles up to the cap."""
    cap = initial * factor
    backoff = Backoff(initial, cap, Always(drawn))
    bound = initial
    for _ in range(40):
        pause = backoff.next()
        assert pause == bound * drawn
        assert timedelta(0) <= pause <= cap
        bound = min(bound * 2, cap)
    backoff.reset()
    assert backoff.next() == initial * drawn


def test_sec_107_two_of_us_do_not_keep_step() -> None:
    """SEC-107: agents that begin together draw different pauses, all over the bound."""
    first = [Backoff(SECOND, SECOND).next() / SECOND for _ in range(2000)]
    assert len(set(first)) > 1990
    thirds = [sum(1 for one in first if low <= one < low + 1 / 3) for low in (0, 1 / 3, 2 / 3)]
    assert sum(thirds) >= 1990 and min(thirds) > 500


@pytest.mark.parametrize(
    ("initial", "cap"),
    [
        (timedelta(0), SECOND),
        (-SECOND, SECOND),
        (2 * SECOND, SECOND),
        (timedelta(0), timedelta(0)),
    ],
)
def test_no_back_off_without_a_pause(initial: timedelta, cap: timedelta) -> None:
    """A back-off that would never wait, or whose cap is below its start, cannot be made."""
    with pytest.raises(ValueError, match="0 < initial <= cap"):
        Backoff(initial, cap)
