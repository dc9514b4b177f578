"""What a source does when a stream ends, as the standard's table of errors says."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from spiffe_core import errors
from spiffe_core.errors import ForbiddenError, MalformedError, NotReadyError, UnsupportedError
from tests.support.authorities import NOW
from workload_api.client.client import Broken
from workload_api.client.watching import (
    FIRST_PAUSE,
    LASTING,
    LONGEST_DENIED_PAUSE,
    LONGEST_PAUSE,
    Follower,
    Pauses,
)

END = MalformedError("the script is over")
SECOND = timedelta(seconds=1)


@dataclass
class Hasty:
    """A clock on which every sleep is over at once, and remembered."""

    slept: list[timedelta] = field(default_factory=list)
    at: Any = NOW

    def now(self) -> Any:
        return self.at

    async def sleep(self, span: timedelta) -> None:
        self.slept.append(span)
        self.at += span
        await asyncio.sleep(0)


@dataclass
class Play:
    """Streams that say what is written: text is news, an error ends one, a span passes."""

    streams: list[list[Any]]
    clock: Hasty = field(default_factory=Hasty)
    taken: list[str | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    async def watch(self, broken: Broken) -> AsyncGenerator[str, None]:
        for one in self.streams.pop(0) if self.streams else [END]:
            if isinstance(one, errors.InternalError) and str(one) == "broken":
                broken(one)
            elif isinstance(one, Exception):
                raise one
            elif isinstance(one, timedelta):
                self.clock.at += one
            else:
                yield one

    async def run(self) -> Follower[str]:
        """Follow until the script is over, or the follower gives up."""
        follower = Follower("Fetch", self.watch, self.taken.append, self.clock)
        async with asyncio.timeout(5):
            await follower.run(lambda: self.problems.append(follower.problem))
        return follower


RETRIED = [
    errors.ForbiddenError,
    errors.NotReadyError,
    errors.InternalError,
    errors.DeadlineError,
    errors.ExhaustedError,
    errors.AbortedError,
    errors.UnauthenticatedError,
    errors.NotFoundError,
    errors.PreconditionError,
]
NEVER_RETRIED = [MalformedError, UnsupportedError]


@pytest.mark.parametrize("error", RETRIED, ids=lambda one: one.__name__)
async def test_wep_20_what_is_retried(error: type[errors.SpiffeError]) -> None:
    """WEP-20, WEP-22: after any other error the stream is opened again, after a pause."""
    play = Play([["a", error("no")], ["b", END]])
    await play.run()
    assert [one for one in play.taken if one] == ["a", "b"]
    assert len(play.clock.slept) == 1


@pytest.mark.parametrize("error", NEVER_RETRIED, ids=lambda one: one.__name__)
async def test_wep_18_what_is_never_retried(error: type[errors.SpiffeError]) -> None:
    """WEP-18, WEP-23: after InvalidArgument and Unimplemented nobody asks again."""
    play = Play([["a", error("no")], ["b"]])
    follower = await play.run()
    assert isinstance(follower.final, error) and follower.problem == "no"
    assert "b" not in play.taken and play.clock.slept == []


def test_every_kind_of_error_is_decided() -> None:
    """A new kind of error can't be added without saying whether it is retried."""
    kinds = {one.kind for one in (*RETRIED, *NEVER_RETRIED)}
    assert kinds == set(errors.ErrorKind) - {errors.ErrorKind.ALREADY_EXISTS}


async def test_wapi_07_a_stream_that_ends_well_is_opened_again() -> None:
    """WAPI-07: either side may end it at any time; after an end with OK there is another."""
    play = Play([["a"], ["b"], [END]])
    await play.run()
    assert play.taken == ["a", "b"]
    assert play.problems[1] == "the agent ended the stream"


async def test_a_mistake_of_ours_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    """An exception that nobody foresaw is logged, and the stream opened again."""
    play = Play([[ValueError("x")], ["b", END]])
    await play.run()
    assert play.taken == ["b"]
    assert next(one.levelname for one in caplog.records) == "ERROR"
    assert play.problems[0] == "ValueError while following the stream"


@pytest.mark.parametrize("error", [ForbiddenError, UnsupportedError], ids=["denied", "gone"])
async def test_wapi_28_what_is_denied_is_used_no_longer(error: Any) -> None:
    """WAPI-28, WAPI-31: PermissionDenied takes away what was given; an outage does not."""
    play = Play([["a", NotReadyError("away")], ["b", error("denied")]])
    await play.run()
    assert play.taken == ["a", "b", None]


async def test_a_message_that_breaks_a_rule() -> None:
    """WAPI-15: it is reported and dropped, and the same stream goes on."""
    play = Play([["a", errors.InternalError("broken"), "b", END]])
    await play.run()
    assert play.taken == ["a", "b"] and play.clock.slept == []
    assert play.problems == ["", "broken", "", str(END)]


async def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is tried, an outage is one line, and the next is another."""
    away = [NotReadyError("away")]
    with caplog.at_level(logging.WARNING):
        await Play([away, away, away, ["a", *away], away, [END]]).run()
    why = [one.event_fields["why"] for one in caplog.records]  # type: ignore[attr-defined]
    assert why == ["away", "away", str(END)]
    assert [one.levelname for one in caplog.records] == ["WARNING", "WARNING", "ERROR"]


class Most(random.Random):
    """Draws the longest pause each time."""

    def random(self) -> float:
        return 1.0


def test_sec_107_pauses_grow_to_a_bound() -> None:
    """SEC-107, WEP-20: pauses double up to a bound, and begin anew when all went well."""
    pauses = Pauses(Most())
    spans = [pauses.after(NotReadyError()).total_seconds() for _ in range(8)]
    assert spans == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert timedelta(seconds=spans[-1]) == LONGEST_PAUSE
    pauses.reset()
    assert pauses.after(NotReadyError()).total_seconds() == 0.1


def test_wep_22_who_is_denied_asks_more_slowly() -> None:
    """WEP-22: an agent that knows no identity of ours is asked less often than one away."""
    pauses = Pauses(Most())
    spans = [pauses.after(ForbiddenError()).total_seconds() for _ in range(6)]
    assert spans == [1, 2, 4, 8, 15, 15] and timedelta(seconds=15) == LONGEST_DENIED_PAUSE
    assert pauses.after(NotReadyError()).total_seconds() == 0.1


async def test_sec_107_pauses_are_drawn() -> None:
    """SEC-107: no two programs that lost one agent come back together."""
    first, second = Pauses(), Pauses()
    spans = [one.after(NotReadyError()) for one in (first, second) for _ in range(8)]
    assert len(set(spans)) == 16


async def test_pauses_begin_anew_after_a_stream_that_lasted() -> None:
    """A stream that ends as soon as it began is no success; one that lasted is."""
    longest = []
    for life in (SECOND, LASTING):
        play = Play([*([["a", life, NotReadyError("away")]] * 9), [END]])
        await play.run()
        assert len(play.clock.slept) == 9
        longest.append(max(play.clock.slept))
    short, lasting = longest
    assert lasting <= FIRST_PAUSE < short  # by chance, once in 10^9 runs it is not
