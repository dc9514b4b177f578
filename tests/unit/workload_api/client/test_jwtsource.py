"""JwtSource, against a Workload API on a real socket, on a clock that the test drives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from spiffe_core.errors import (
    ForbiddenError,
    MalformedError,
    NotReadyError,
    PreconditionError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid, verify_jwt_svid
from spiffe_core.spiffeid import SpiffeId
from tests.support.callers import eventually
from tests.support.children import open_files
from tests.support.clock import DrivenClock
from workload_api.client import jwtsource
from workload_api.client.jwtsource import JwtSource
from workload_api.client.testing import FakeWorkloadApi

SHORT = timedelta(seconds=0.3)
HALF = timedelta(minutes=3, seconds=1)
"""Of a life of five minutes: a little after the latest moment of renewal."""
EARLY = timedelta(minutes=1, seconds=59)
"""And a little before the earliest."""
LIFE = timedelta(minutes=5)
API = "spiffe://example.org/api"


class Faulty(FakeWorkloadApi):
    """Hands out JWT-SVIDs that are not what was asked for."""

    options: dict[str, Any]
    path = "/web"
    audience: tuple[str, ...] = ()

    def mint_jwt(self, path: str, *audience: str, **options: Any) -> JwtSvid:
        options |= self.options
        return super().mint_jwt(self.path, *(self.audience or audience), **options)


@dataclass
class Play:
    """A fake, a source of it, and the clock of both."""

    fake: FakeWorkloadApi
    source: JwtSource
    clock: DrivenClock

    @property
    def calls(self) -> int:
        """How often the fake was asked for JWT-SVIDs."""
        return self.fake.calls["FetchJWTSVID"]

    async def asleep(self, count: int) -> None:
        """Wait until that many renewals wait for their time."""
        await eventually(lambda: len(self.clock._sleeping) >= count)

    async def renewed(self, calls: int) -> None:
        """Wait until the answer to so many calls is held."""
        await eventually(lambda: self.calls == calls and not self.source._asked)


@contextlib.asynccontextmanager
async def playing(fake: FakeWorkloadApi | None = None, **changes: Any) -> AsyncIterator[Play]:
    """A fake of ``/web`` and ``/api``, and a source."""
    clock = DrivenClock(datetime.now(UTC).replace(microsecond=0))
    with fake or FakeWorkloadApi("/web", "/api", now=clock.now) as served:
        served._now = served.authority._now = clock.now
        async with JwtSource(served.address, clock=clock, **changes) as source:
            yield Play(served, source, clock)


async def test_a_jwt_svid() -> None:
    """WAPI-56: our default identity's, or another's, for all audiences."""
    async with playing() as play:
        svid = await play.source.fetch("db", "cache")
        assert svid.spiffe_id.uri == "spiffe://example.org/web"
        assert set(svid.audience) == {"db", "cache"}
        for wanted in (API, SpiffeId.parse(API)):
            assert (await play.source.fetch("db", spiffe_id=wanted)).spiffe_id.uri == API
        verify_jwt_svid(svid.token, play.fake.bundles, audience="db", at=play.clock.now())
        assert play.source.problem == ""


async def test_wep_11_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEP-11: the address is that of the environment, or else it says what to set."""
    async with playing() as play:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", play.fake.address)
        async with JwtSource(clock=play.clock) as source:
            assert await source.fetch("db")
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET")
    with pytest.raises(PreconditionError, match="set SPIFFE_ENDPOINT_SOCKET"):
        JwtSource()


async def test_it_asks_once_for_an_audience() -> None:
    """One question for each set of audiences and each identity, however often it is wanted."""
    async with playing() as play:
        first = await play.source.fetch("a", "b")
        assert await play.source.fetch("b", "a", "a") is first and play.calls == 1
        other = await play.source.fetch("a")
        named = await play.source.fetch("a", spiffe_id=API)
        assert len({first.token, other.token, named.token}) == 3 and play.calls == 3


async def test_many_who_want_the_same_are_one_question() -> None:
    """SEC-107: a hundred who want one JWT-SVID at once are one call."""
    async with playing() as play:
        svids = await asyncio.gather(*(play.source.fetch("db") for _ in range(100)))
        assert len({one.token for one in svids}) == 1 and play.calls == 1


async def test_one_who_gives_up_takes_nothing_from_the_others() -> None:
    """A caller that is cancelled does not end the call that others wait for."""
    async with playing() as play:
        first = asyncio.create_task(play.source.fetch("db"))
        second = asyncio.create_task(play.source.fetch("db"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).audience == ("db",) and play.calls == 1
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_iop_13_renewed_at_half_life_while_in_use() -> None:
    """IOP-13: at half-life, give or take a tenth, the next is fetched unasked."""
    async with playing() as play:
        first = await play.source.fetch("db")
        await play.asleep(1)
        play.clock.advance(EARLY)
        assert await play.source.fetch("db") is first and play.calls == 1
        await play.asleep(1)
        play.clock.advance(HALF - EARLY)
        await play.renewed(2)
        second = await play.source.fetch("db")
        assert second.expires_at == first.expires_at + HALF and play.calls == 2


async def test_what_nobody_uses_is_not_renewed() -> None:
    """A JWT-SVID that was not wanted since it was fetched ends, and is forgotten."""
    async with playing() as play:
        await play.source.fetch("db")
        await play.asleep(1)
        play.clock.advance(HALF)
        await play.renewed(2)  # it was used once; its successor was not
        await play.asleep(1)
        await play.clock.run_on(HALF)
        play.clock.advance(LIFE - HALF)
        await eventually(lambda: not play.source._held)
        assert play.calls == 2
        assert (await play.source.fetch("db")).expires_at == play.clock.now() + LIFE
        assert play.calls == 3


async def test_one_used_late_is_renewed_at_once() -> None:
    """Past half-life the first use has the next fetched, and waits for nothing."""
    async with playing() as play:
        await play.source.fetch("db")
        await play.asleep(1)
        play.clock.advance(HALF)
        await play.renewed(2)
        await play.asleep(1)
        second = next(iter(play.source._held.values())).svid
        await play.clock.run_on(HALF)
        play.fake.stop()  # so that waiting would fail
        assert await play.source.fetch("db") is second
        play.fake.start()
        await eventually(lambda: not play.source._asked)
        await eventually(lambda: _renewed(play, second))


async def _renewed(play: Play, before: JwtSvid) -> bool:
    return (await play.source.fetch("db")).token != before.token


async def test_the_agent_is_away() -> None:
    """The held one is handed out until it ends; then the failure says what was answered."""
    async with playing(timeout=SHORT) as play:
        first = await play.source.fetch("db")
        await play.asleep(1)
        play.fake.stop()
        play.clock.advance(HALF)
        await eventually(lambda: play.source.problem)
        assert await play.source.fetch("db") is first
        play.clock.advance(LIFE - HALF - timedelta(seconds=1))
        assert await play.source.fetch("db") is first  # in its last second
        play.clock.advance(timedelta(seconds=1))
        with pytest.raises(NotReadyError) as caught:
            await play.source.fetch("db")
        assert f"Workload API at {play.fake.address} in 0.3 s: " in str(caught.value)
        assert "No such file or directory" in str(caught.value)


async def test_the_agent_comes_back() -> None:
    """WAPI-07, WEP-20: a renewal that failed is tried again, and so is the first question."""
    async with playing() as play:
        first = await play.source.fetch("db")
        await play.asleep(1)
        play.fake.stop()
        play.clock.advance(HALF)
        await eventually(lambda: play.source.problem)
        waiting = asyncio.create_task(play.source.fetch("other"))
        await play.asleep(2)  # both pause
        play.fake.start()

        async def both() -> bool:
            play.clock.advance(timedelta(milliseconds=100))
            return waiting.done() and await play.source.fetch("db") is not first

        await eventually(both)
        assert (await waiting).audience == ("other",) and play.source.problem == ""


async def test_iop_13_not_in_its_last_seconds() -> None:
    """IOP-13: in its last ten seconds the next is waited for, where there is one."""
    async with playing() as play:
        first = await play.source.fetch("db")
        next(iter(play.source._held.values())).is_used = False  # so that no renewal comes first
        await play.asleep(1)
        await play.clock.run_on(HALF)
        play.clock.advance(LIFE - HALF - timedelta(seconds=9))
        assert (await play.source.fetch("db")).expires_at == play.clock.now() + LIFE
        assert first.expires_at < play.clock.now() + LIFE


REFUSALS = [ForbiddenError, MalformedError, UnsupportedError]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda one: one.__name__)
async def test_wep_18_a_refusal(error: type[SpiffeError]) -> None:
    """WEP-18, WEP-23, WAPI-28: it is told at once, asked once, and what was held is gone."""
    async with playing() as play:
        await play.source.fetch("db")
        await play.asleep(1)
        play.fake.refuse(error("never"))
        play.clock.advance(HALF)
        await eventually(lambda: not play.source._held)
        assert play.calls == 2 and play.source.problem == "never"
        with pytest.raises(error, match="never"):
            await play.source.fetch("db")
        assert play.calls == 3
        play.fake.allow()
        assert await play.source.fetch("db") and play.source.problem == ""


async def test_an_identity_of_others() -> None:
    """An identity that the agent does not know as ours is refused."""
    async with playing() as play:
        with pytest.raises(ForbiddenError):
            await play.source.fetch("db", spiffe_id="spiffe://example.org/other")


async def test_what_cannot_be_asked() -> None:
    """Without an audience nothing is asked; nor before the source is entered."""
    async with playing() as play:
        for audience in (("",), ("a", "")):
            with pytest.raises(MalformedError, match="audience"):
                await play.source.fetch(*audience)
        with pytest.raises(MalformedError):
            await play.source.fetch("db", spiffe_id="example.org/web")
        assert play.calls == 0
    for source in (play.source, JwtSource(play.fake.address)):
        with pytest.raises(NotReadyError, match="not entered"):
            await source.fetch("db")


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"options": {"expired": True}}, "has expired"),
        ({"path": "/other"}, "another identity"),
        ({"audience": ("x",)}, "another audience"),
    ],
    ids=["expired", "identity", "audience"],
)
async def test_wapi_15_an_answer_that_is_not_what_was_asked_for(
    faults: dict[str, Any], said: str
) -> None:
    """WAPI-15: it is reported and dropped, and asked for again."""
    fake = Faulty("/web")
    fake.options = {}
    for name, value in faults.items():
        setattr(fake, name, value)
    async with playing(fake, timeout=SHORT) as play:
        with pytest.raises(NotReadyError, match=said):
            await play.source.fetch("db", spiffe_id="spiffe://example.org/web")
        assert not play.source._held


async def test_an_old_one_is_not_asked_for_over_and_over() -> None:
    """SEC-107: of a JWT-SVID that is old when it comes, half of what is left is waited for."""
    async with playing(FakeWorkloadApi(jwt_ttl=timedelta(seconds=1))) as play:
        await play.source.fetch("db")
        (held,) = play.source._held.values()
        assert held.renew_at >= play.clock.now() + timedelta(seconds=1)


async def test_it_keeps_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many audiences are asked for, so many are kept: those that were used last."""
    monkeypatch.setattr(jwtsource, "KEPT", 3)
    async with playing() as play:
        for audience in ("a", "b", "c", "a", "d"):
            await play.source.fetch(audience)
        assert [sorted(key[0]) for key in play.source._held] == [["c"], ["a"], ["d"]]
        assert play.calls == 4
        await play.source.fetch("b")
        assert play.calls == 5
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ours = {one.renewal for one in play.source._held.values()}
        assert ours <= asyncio.all_tasks() and len(ours) == 3


async def test_those_who_wait_when_it_is_left() -> None:
    """Who waits for a JWT-SVID when the source is left is told so, and nothing goes on."""
    async with playing() as play:
        play.fake.refuse(NotReadyError("starting"))
        waiting = asyncio.create_task(play.source.fetch("db"))
        await play.asleep(1)
    play.clock.advance(timedelta(seconds=1))
    with pytest.raises(NotReadyError, match="was left"):
        await waiting


async def test_nothing_is_left_open() -> None:
    """Renewals and questions end with the source; no task and no file is left."""
    async with playing() as play:
        before = open_files()
        for _ in range(5):
            async with JwtSource(play.fake.address) as source:
                for audience in ("a", "b"):
                    await source.fetch(audience)
                asking = asyncio.create_task(source.fetch("c"))
                await asyncio.sleep(0)
            with contextlib.suppress(NotReadyError):
                await asking
        await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        await eventually(lambda: open_files() <= before)


async def test_sec_90_no_token_in_any_text() -> None:
    """SEC-90: neither the source nor what it holds shows a token."""
    async with playing() as play:
        svid = await play.source.fetch("db")
        shown = f"{play.source!r} {vars(play.source)!r} {svid!r}"
        assert svid.token.rpartition(".")[2] not in shown
