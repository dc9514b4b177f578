"""JWT-SVIDs that were fetched already: when one serves again, and when it must not."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import ForbiddenError, NotFoundError, NotReadyError
from spiffe_core.jwtsvid import JwtSvid
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.clock import DrivenClock
from tests.support.store import an_entry
from workload_api.cache.cache import WorkloadCache
from workload_api.sync import tokens
from workload_api.sync.tokens import TokenCache

CA = FakeCa()
WEB = an_entry(id="web", created_at=NOW)
LIFE = timedelta(minutes=5)
AUDIENCE = ("a", "b")


class Issuer:
    """Answers tokens that live five minutes, unless it is told otherwise."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.error: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.life = LIFE

    async def fetch(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        """A new token."""
        self.asked.append((entry.id, audience))
        number = len(self.asked)
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        now = self._now()
        return JwtSvid(
            f"token {number}", entry.spiffe_id, audience, now + self.life, now, "k1", {}
        )


class Place:
    """A token cache with everything around it."""

    def __init__(self) -> None:
        self.clock = DrivenClock(NOW)
        self.issuer = Issuer(self.clock.now)
        self.cache = WorkloadCache(CA.trust_domain)
        self.cache.apply(snapshot=True, bundles=[CA.bundle])
        self.tokens = TokenCache(self.cache, self.issuer.fetch, self.clock.now)

    async def get(self, entry: RegistrationEntry = WEB, *audience: str) -> str:
        """The token that is answered."""
        return (await self.tokens.get(entry, audience or AUDIENCE)).token

    def trust(self, *authorities: JwtAuthority) -> None:
        """Our bundle has these JWT authorities now."""
        own = Bundle(CA.trust_domain, CA.bundle.x509_authorities, authorities)
        self.cache.apply(snapshot=False, bundles=[own])


async def test_answered_again_until_half_life() -> None:
    """IOP-13: a token is answered again before half of its life, and replaced from then on."""
    place = Place()
    assert await place.get() == "token 1"
    place.clock.advance(LIFE / 2 - timedelta(seconds=1))
    assert await place.get() == "token 1"
    place.clock.advance(timedelta(seconds=1))
    assert await place.get() == "token 2"


async def test_the_order_of_audiences_does_not_matter() -> None:
    """WAPI-32: one token carries all that were asked for, in whatever order they were."""
    place = Place()
    assert await place.get(WEB, "a", "b") == await place.get(WEB, "b", "a") == "token 1"
    assert await place.get(WEB, "a") == "token 2"
    assert await place.get(WEB, "a", "b", "c") == "token 3"


@pytest.mark.parametrize(
    "other",
    [
        replace(WEB, id="other"),
        replace(WEB, revision_number=1),
        replace(WEB, created_at=NOW + timedelta(seconds=1)),
    ],
    ids=["entry", "revision", "made again"],
)
async def test_sec_47_a_changed_entry_has_no_token(other: RegistrationEntry) -> None:
    """SEC-47: another entry, revision or life of an entry has a token of its own."""
    place = Place()
    assert await place.get() == "token 1"
    assert await place.get(other) == "token 2"


@pytest.mark.parametrize("gone", [True, False], ids=["removed", "tainted"])
async def test_sec_47_a_token_of_a_lost_authority(gone: bool) -> None:
    """SEC-47: a token whose key is tainted or gone is replaced, and never the fall-back."""
    place = Place()
    await place.get()
    (k1,) = CA.bundle.jwt_authorities
    k2 = JwtAuthority("k2", k1.public_key)
    place.trust(k2) if gone else place.trust(replace(k1, tainted=True), k2)
    place.issuer.error = NotReadyError("away")
    with pytest.raises(NotReadyError):
        await place.get()
    place.issuer.error = None
    assert await place.get() == "token 3"


async def test_sec_47_a_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-47: with a good token at hand a slow server is waited for no longer than a second."""
    assert tokens.PATIENCE == 1.0
    monkeypatch.setattr(tokens, "PATIENCE", 0.02)
    place = Place()
    await place.get()
    place.clock.advance(LIFE / 2)
    place.issuer.answers.clear()
    async with asyncio.timeout(1):
        assert await place.get() == "token 1"
        assert await place.get() == "token 1"
    assert len(place.issuer.asked) == 2  # the first question still stands
    place.issuer.answers.set()
    await asyncio.sleep(0.01)
    assert await place.get() == "token 2"


@pytest.mark.parametrize(
    "error", [NotReadyError("away"), ForbiddenError("no"), NotFoundError("")]
)
async def test_sec_106_a_server_that_is_away(error: Exception) -> None:
    """SEC-106: a good token is answered while the server is away or fails."""
    place = Place()
    await place.get()
    place.clock.advance(LIFE / 2)
    place.issuer.error = error
    assert await place.get() == "token 1"


async def test_iop_13_a_token_near_its_end() -> None:
    """IOP-13: with ten seconds left a token is handed out no more, though there is no other."""
    place = Place()
    await place.get()
    place.issuer.error = NotReadyError("away")
    place.clock.advance(LIFE - timedelta(seconds=11))
    assert await place.get() == "token 1"
    place.clock.advance(timedelta(seconds=1))
    with pytest.raises(NotReadyError):
        await place.get()


async def test_a_first_token_that_fails() -> None:
    """With no token at hand the server's answer is the answer."""
    place = Place()
    place.issuer.error = ForbiddenError("no")
    with pytest.raises(ForbiddenError):
        await place.get()


async def test_an_entry_the_server_does_not_know_yet() -> None:
    """WEP-20: NOT_FOUND may be a replica that is behind: the workload is told to try again."""
    place = Place()
    place.issuer.error = NotFoundError("no such entry")
    for entry in (WEB, replace(WEB, jwt_svid_include_jti=True)):
        with pytest.raises(NotReadyError, match="not known to the server yet"):
            await place.get(entry)


async def test_one_question_for_all() -> None:
    """SEC-107: a hundred callers who want the same token at once are one question."""
    place = Place()
    place.issuer.answers.clear()
    calls = [asyncio.create_task(place.get()) for _ in range(100)]
    await asyncio.sleep(0)
    calls[0].cancel()  # the first one asked; the others still get their answer
    await asyncio.sleep(0)
    place.issuer.answers.set()
    assert set(await asyncio.gather(*calls[1:])) == {"token 1"}
    assert len(place.issuer.asked) == 1


async def test_a_failure_is_not_kept() -> None:
    """All who asked together hear the failure; the next one asks again."""
    place = Place()
    place.issuer.error = NotReadyError("away")
    found = await asyncio.gather(*(place.get() for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in found] == [NotReadyError] * 3
    place.issuer.error = None
    assert await place.get() == "token 2"


async def test_tokens_with_an_id_are_never_shared() -> None:
    """An entry whose tokens are to have an ID of their own gets a new one each time."""
    place = Place()
    entry = replace(WEB, jwt_svid_include_jti=True)
    assert len({await place.get(entry) for _ in range(3)}) == 3
    together = await asyncio.gather(*(place.get(entry) for _ in range(3)))
    assert len(set(together)) == 3


async def test_forgotten() -> None:
    """SEC-52: after a ban no token is answered, and who waits for one is told to come back."""
    place = Place()
    await place.get()
    place.issuer.answers.clear()
    waiting = asyncio.create_task(place.get(WEB, "other"))
    await asyncio.sleep(0)
    place.tokens.clear()
    with pytest.raises(NotReadyError):
        await waiting
    place.issuer.answers.set()
    assert await place.get() != "token 1"


async def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-80: however many audiences are asked for, the oldest tokens make room."""
    monkeypatch.setattr(tokens, "KEPT", 10)
    place = Place()
    await place.get(WEB, "mine")
    for number in range(50):
        await place.get(WEB, f"audience {number}")
        if number % 5 == 0:
            assert await place.get(WEB, "mine") == "token 1"
    assert len(place.tokens._held) == 10
