"""Token buckets, on a clock of the test's own (SPIRE API 3.6, SEC-80)."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from issuer.services import ratelimit
from issuer.services.ratelimit import MAX_WAIT, RateLimit
from spiffe_core.errors import ExhaustedError


class Now:
    """An instant that a test sets."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def a_limit(rate: float) -> tuple[RateLimit, Now]:
    """A limit and its clock."""
    now = Now()
    return RateLimit("test", rate, now), now


def test_a_bucket_then_the_rate() -> None:
    """A second's worth at once, then each waits its turn, then the queue is too long."""
    limit, now = a_limit(2)
    assert [limit.reserve("k") for _ in range(5)] == [0, 0, 0.5, 1.0, 1.5]
    now.at += 1.0  # two came back; three are still owed
    assert limit.reserve("k") == 1.0
    now.at += 100
    waits = [limit.reserve("k") for _ in range(12)]
    assert waits == [0, 0, *[n / 2 for n in range(1, 11)]]
    with pytest.raises(ExhaustedError, match="test rate limiting"):
        limit.reserve("k")
    assert limit.reserve("other") == 0


def test_a_refusal_takes_nothing() -> None:
    """Who is refused does not push the next one further back."""
    limit, now = a_limit(1)
    while True:
        try:
            last = limit.reserve("k")
        except ExhaustedError:
            break
    assert last == MAX_WAIT
    for _ in range(100):
        with pytest.raises(ExhaustedError):
            limit.reserve("k")
    now.at += 1.0
    assert limit.reserve("k") == MAX_WAIT


def test_more_than_a_bucket_is_never_given() -> None:
    """SPIRE API 3.6: more turns than the bucket holds are refused with both numbers."""
    limit, _ = a_limit(500)
    with pytest.raises(ExhaustedError, match=r"rate \(501\) exceeds burst size \(500\)"):
        limit.reserve("k", 501)
    assert limit.reserve("k", 500) == 0
    assert limit.reserve("k", 500) == 1.0


def test_off_is_off() -> None:
    """A rate of 0 limits nothing."""
    limit, _ = a_limit(0)
    assert {limit.reserve("k", 10**6) for _ in range(1000)} == {0}


def test_slow_rates_give_one_at_once() -> None:
    """Below one a second, the first is still free."""
    limit, now = a_limit(0.5)
    assert [limit.reserve("k") for _ in range(3)] == [0, 2, 4]
    now.at += 1000
    assert limit.reserve("k") == 0


@given(
    st.floats(0.5, 50),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5)), min_size=1, max_size=60),
)
def test_no_window_holds_more_than_it_may(rate: float, steps: list[tuple[float, int]]) -> None:
    """However calls come, any span gets at most its share, and one bucket on top."""
    limit, now = a_limit(rate)
    served: list[tuple[float, int]] = []
    for pause, count in steps:
        now.at += pause
        try:
            wait = limit.reserve("k", count)
        except ExhaustedError:
            continue
        served.append((now.at + wait, count))
    bucket = max(rate, 1.0)
    for first in range(len(served)):
        for last in range(first, len(served)):
            span = served[last][0] - served[first][0]
            given_out = sum(count for _, count in served[first : last + 1])
            assert given_out <= bucket + rate * span + 1e-6


def test_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-80: however many addresses knock, only so many are remembered: the latest."""
    monkeypatch.setattr(ratelimit, "MAX_KEYS", 10)
    limit, _ = a_limit(1)
    for number in range(1000):
        limit.reserve(str(number))
    assert len(limit._taken_until) == 10
    assert limit.reserve("999") == 1.0


async def test_two_who_race_are_served_in_turn() -> None:
    """Calls at once share one bucket: the second waits for its turn, by the real clock."""
    limit = RateLimit("test", 20)
    loop = asyncio.get_running_loop()
    started = loop.time()
    ended: list[float] = []

    async def one() -> None:
        await limit.take("k")
        ended.append(loop.time() - started)

    await asyncio.gather(*(one() for _ in range(24)))
    assert len(ended) == 24
    assert all(at >= 0.05 * n - 0.01 for n, at in enumerate(sorted(ended)[20:], 1))
