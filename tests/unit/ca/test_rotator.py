"""
The rotator over years on a clock of the tests' own, and killed at every step (SEC-66).

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ca.active import ActiveJwt, ActiveX509
from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from ca.jwt import JwtProfile, sign_jwt
from ca.keys.disk import DiskKeyManager
from ca.keys.memory import MemoryKeyManager
from ca.keys.protocol import KeyManager, KeyPurpose, KeyStoreError
from ca.rotator import STEP_INTERVAL, RotationSettings, Rotator
from ca.schedule import activate_at, prepare_at, prune_at
from ca.x509 import prepare_x509, sign_x509
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import InternalError, MalformedError, NotReadyError, SpiffeError
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.keys import KeyKind, spki_of
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import verify_x509_svid
from tests.support.authorities import NOW, a_key
from tests.support.issuing import TD, checked_profile
from tests.support.journal import Fuse, FusedKeys, Happened, KilledError, MemoryJournal
from tests.support.store import StoppedClock

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
WORKLOAD = SpiffeId(TD, "/w")
X509, JWT = AuthorityKind.X509, AuthorityKind.JWT
ACTIVE, PREPARED, OLD = AuthorityState.ACTIVE, AuthorityState.PREPARED, AuthorityState.OLD

YEARLY = RotationSettings(365 * DAY, 30 * DAY, KeyKind.EC_P256, timedelta(minutes=10))
DAILY = RotationSettings(DAY, DAY, KeyKind.EC_P256, timedelta(minutes=10))


@dataclass
class World:
    """A server's rotator with what outlives it."""

    settings: RotationSettings = YEARLY
    clock: StoppedClock = field(default_factory=lambda: StoppedClock(NOW))
    changes: int = 0

    def __post_init__(self) -> None:
        self.journal = MemoryJournal(self.clock, TD)
        self.keys: KeyManager = FusedKeys(self.journal)
        self.rotator = self.restarted()

    def restarted(self) -> Rotator:
        """A new process on the same journal and keys."""
        self.rotator = Rotator(
            self.journal, self.keys, self.settings, self.clock, TD, self._note
        )
        return self.rotator

    def _note(self) -> None:
        self.changes += 1

    def one(self, kind: AuthorityKind, state: AuthorityState) -> AuthorityRecord:
        """The one record of this kind and state."""
        [found] = self.journal.of(kind, state)
        return found

    def states(self, kind: AuthorityKind) -> list[str]:
        """The states of one kind's records, in order of age."""
        return [one.state.value for one in self.journal.records.values() if one.kind is kind]

    def bundles(self) -> BundleSet:
        """What verifiers hold at this instant."""
        return BundleSet.of([self.journal.bundle()])

    async def go_to(self, at: datetime) -> None:
        """Move the clock and take a step."""
        self.clock.at = at
        await self.rotator.step()


@asynccontextmanager
async def a_world(settings: RotationSettings = YEARLY) -> AsyncIterator[World]:
    """A trust domain whose server has just started for the first time."""
    world = World(settings)
    await world.rotator.start()
    yield world


@dataclass
class Issued:
    """One SVID of each type, with the authorities that signed them."""

    chain: tuple[bytes, ...]
    token: str
    by: tuple[str, str]
    ends: tuple[datetime, datetime]


def issue(world: World, ttl: timedelta) -> Issued:
    """Sign one SVID of each type now."""
    now = world.clock.now()
    x509, jwt = world.rotator.x509, world.rotator.jwt
    leaf = sign_x509(
        prepare_x509(
            checked_profile(), x509, spiffe_id=WORKLOAD, now=now, ttl=ttl,
            public_key=spki_of(a_key("p256", "workload").public_key()),
        )
    )  # fmt: skip
    token = sign_jwt(
        JwtProfile(), jwt, spiffe_id=WORKLOAD, audience=("db",), now=now, ttl=ttl
    ).svid
    assert leaf.svid.validity.not_after <= x509.authority.validity.not_after
    assert token.expires_at <= jwt.validity.not_after
    return Issued(
        leaf.svid.chain, token.token, (leaf.authority_id, jwt.key_id),
        (leaf.svid.validity.not_after, token.expires_at),
    )  # fmt: skip


def check(world: World, issued: Issued) -> None:
    """Whatever of it has not ended verifies with the bundle of this instant."""
    now = world.clock.now()
    if now <= issued.ends[0]:
        assert verify_x509_svid(issued.chain, world.bundles(), at=now)
    if now < issued.ends[1]:
        assert verify_jwt_svid(issued.token, world.bundles(), audience="db", at=now)


def check_history(world: World) -> None:
    """Each authority was published, read back, and known long enough before it signed."""
    log, ahead = world.journal.log, world.settings.publish_ahead
    first: set[str] = set()
    for happened in (one for one in log if one.what == "activate"):
        published = _at(log, "publish", happened)
        read_back = _at(log, "read back", happened)
        assert published is not None
        assert read_back is not None
        assert published <= read_back <= happened.at
        kind = "x" if len(happened.authority_id) == 40 else "j"
        if kind in first:
            assert happened.at - published >= ahead
        first.add(kind)


def _at(log: list[Happened], what: str, of: Happened) -> datetime | None:
    before = log[: log.index(of)]
    found = [x.at for x in before if x.what == what and x.authority_id == of.authority_id]
    return found[-1] if found else None


async def live(world: World, steps: int, step: timedelta, ttl: timedelta) -> None:
    """Live for a while, issuing and checking all that was issued at every step."""
    living: list[Issued] = []
    ended: dict[str, datetime] = {}
    for _ in range(steps):
        issued = issue(world, ttl)
        living.append(issued)
        for authority_id, end in zip(issued.by, issued.ends, strict=True):
            ended[authority_id] = max(end, ended.get(authority_id, end))
        await world.go_to(world.clock.at + step)
        now = world.clock.now()
        assert world.rotator.x509.authority.validity.not_after > now
        assert world.rotator.jwt.validity.not_after > now
        living = [one for one in living if max(one.ends) >= now]
        for one in living:
            check(world, one)
        kept = {one.key_id for one in world.journal.records.values()}
        assert await world.keys.key_ids() == kept
    check_history(world)
    for happened in world.journal.log:
        if happened.what == "prune":
            assert happened.at > ended.get(happened.authority_id, NOW)


async def test_sec_66_three_years() -> None:
    """SEC-66: over three years the server never expires, and all that it issued verifies."""
    async with a_world() as world:
        await live(world, 2 * 365 * 3, DAY / 2, 23 * HOUR)
        activated = [one for one in world.journal.log if one.what == "activate"]
        assert sum(len(one.authority_id) == 40 for one in activated) == 4
        assert sum(len(one.authority_id) == 32 for one in activated) > 40


@pytest.mark.parametrize("kind", [KeyKind.EC_P384, KeyKind.EC_P256])
async def test_sec_66_authorities_of_a_day(kind: KeyKind) -> None:
    """SEC-66: authorities that live for a day follow each other as those of a year do."""
    settings = RotationSettings(DAY, DAY, kind, timedelta(minutes=10))
    async with a_world(settings) as world:
        await live(world, 6 * 24, timedelta(minutes=30), HOUR)
        assert world.rotator.x509.authority.validity.not_after > NOW + 3 * DAY


async def test_sec_66_the_first_authorities() -> None:
    """SEC-66: the first of a trust domain sign once they are stored and read back."""
    async with a_world() as world:
        assert world.states(X509) == world.states(JWT) == ["active"]
        check(world, issue(world, HOUR))
        whats = [one.what for one in world.journal.log]
        assert whats == ["publish", "read back", "activate"] + [
            "publish", "read back", "read back", "activate",
        ]  # fmt: skip
        assert world.changes == 4


async def test_before_the_start_nothing_signs() -> None:
    """SEC-66: a rotator that has not started has no authority to sign with."""
    world = World()
    for name in ("x509", "jwt"):
        with pytest.raises(NotReadyError, match=r"no .* authority is active yet"):
            getattr(world.rotator, name)


@pytest.mark.parametrize("kind", AuthorityKind)
async def test_sec_66_a_life_by_its_schedule(kind: AuthorityKind) -> None:
    """SEC-66: one second before each date nothing happens, and on it the step is taken."""
    async with a_world() as world:
        first = world.one(kind, ACTIVE)
        await world.go_to(prepare_at(first.validity) - SECOND)
        assert world.states(kind) == ["active"]
        await world.go_to(prepare_at(first.validity))
        assert world.states(kind) == ["active", "prepared"]
        second = world.one(kind, PREPARED)
        await world.go_to(activate_at(first.validity) - SECOND)
        assert world.states(kind) == ["active", "prepared"]
        await world.go_to(activate_at(first.validity))
        assert world.states(kind) == ["old", "active"]
        assert world.one(kind, ACTIVE).authority_id == second.authority_id
        await world.go_to(prune_at(first.validity) - SECOND)
        assert first.authority_id in world.journal.records
        await world.go_to(prune_at(first.validity))
        assert first.authority_id not in world.journal.records
        assert first.key_id not in await world.keys.key_ids()


async def test_sec_66_publish_ahead_is_waited_for() -> None:
    """SEC-66: a next authority that was published late signs late, not unannounced."""
    async with a_world(DAILY) as world:
        first = world.one(X509, ACTIVE)
        late = activate_at(first.validity) + HOUR
        await world.go_to(late)
        assert world.states(X509) == ["active", "prepared"]
        await world.go_to(late + DAILY.publish_ahead - SECOND)
        assert world.rotator.x509.authority_id == first.authority_id
        await world.go_to(late + DAILY.publish_ahead)
        assert world.rotator.x509.authority_id == world.one(X509, ACTIVE).authority_id
        assert world.states(X509) == ["old", "active"]


async def test_steps_are_idempotent() -> None:
    """SEC-66: taking a step again, at any point of a life, changes nothing."""
    async with a_world() as world:
        first = world.one(JWT, ACTIVE)
        for at in (
            NOW, prepare_at(first.validity), activate_at(first.validity),
            prune_at(first.validity),
        ):  # fmt: skip
            await world.go_to(at)
            records, changes = dict(world.journal.records), world.changes
            held = (world.rotator.x509, world.rotator.jwt)
            for _ in range(3):
                await world.rotator.step()
            assert (world.journal.records, world.changes) == (records, changes)
            assert (world.rotator.x509, world.rotator.jwt) == held


async def test_a_restart_takes_up_what_is_on_record() -> None:
    """SEC-66: a new process signs with the same authorities, and makes none."""
    async with a_world() as world:
        before = (world.rotator.x509.authority, world.rotator.jwt.key_id)
        await world.restarted().start()
        assert (world.rotator.x509.authority, world.rotator.jwt.key_id) == before
        assert len(world.journal.records) == 2


@pytest.mark.parametrize(
    "asleep", [366 * DAY, 31 * DAY, 400 * DAY, 5 * 365 * DAY], ids=lambda one: f"{one.days}d"
)
async def test_a_server_that_slept_too_long(asleep: timedelta) -> None:
    """SEC-66: after any sleep the server has authorities that sign and are trusted."""
    async with a_world() as world:
        await world.go_to(NOW + 20 * DAY)  # a next JWT authority is prepared
        assert world.states(JWT) == ["active", "prepared"]
        world.clock.at = NOW + asleep
        await world.restarted().start()
        check(world, issue(world, HOUR))
        await world.rotator.step()
        check(world, issue(world, HOUR))
        now = world.clock.now()
        assert all(one.validity.not_after + DAY > now for one in world.journal.records.values())
        assert await world.keys.key_ids() == {
            one.key_id for one in world.journal.records.values()
        }


# Killed at every step.


async def a_life(world: World) -> None:
    """From a first start to the pruning of the first authorities, with a restart in between."""
    await world.rotator.start()
    first = world.one(X509, ACTIVE).validity
    for at in (prepare_at(first), activate_at(first), prune_at(first), prune_at(first)):
        world.clock.at = max(at, world.clock.at)
        await world.rotator.step()


async def places() -> list[str]:
    """Every place that a life leads past."""
    world = World(DAILY)
    await a_life(world)
    return world.journal.fuse.passed


PLACES = asyncio.run(places())


@pytest.mark.parametrize(
    "number", range(1, len(PLACES) + 1), ids=lambda n: f"{n} {PLACES[n - 1]}"
)
async def test_sec_66_killed_at_every_step(number: int) -> None:
    """SEC-66, SEC-100: killed anywhere, a server resumes, with no key or record too many."""
    world = World(DAILY)
    world.journal.fuse = Fuse(burns_at=number)
    issued: list[Issued] = []
    with pytest.raises(KilledError):
        await a_life(world)

    world.journal.fuse = Fuse()
    await world.restarted().start()
    for _ in range(2):
        await world.rotator.step()
    check_history(world)
    kept = {one.key_id for one in world.journal.records.values()}
    assert await world.keys.key_ids() == kept
    for kind in AuthorityKind:
        assert len(world.journal.of(kind, ACTIVE)) == 1
        assert len(world.journal.of(kind, PREPARED)) <= 1
        assert len(world.journal.of(kind, OLD)) <= 1
    issued.append(issue(world, HOUR))
    for _ in range(8):
        await world.go_to(world.clock.at + 4 * HOUR)
        issued.append(issue(world, HOUR))
        for one in issued:
            check(world, one)
    check_history(world)


def test_the_places_are_many() -> None:
    """SEC-66: a life leads past every kind of place, so that each was killed at."""
    assert len(PLACES) >= 50
    assert set(PLACES) == {
        "before load", "before add", "after add", "before read back", "before activate",
        "after activate", "before prune", "after prune", "before key", "after key",
        "before key load", "before key delete", "after key delete",
    }  # fmt: skip


async def test_fifty_crashes_leave_no_orphan() -> None:
    """SEC-66: fifty first starts killed after the key was made leave one key, then none."""
    world = World()
    for _ in range(50):
        world.journal.fuse = Fuse()
        world.journal.fuse.burns_at = 4 + (await _orphans(world)) * 2
        with pytest.raises(KilledError, match="after key"):
            await world.restarted().start()
        assert len(await world.keys.key_ids()) == 1
    world.journal.fuse = Fuse()
    await world.restarted().start()
    assert len(await world.keys.key_ids()) == 2


async def _orphans(world: World) -> int:
    return len(await world.keys.key_ids())


# What must not be papered over.


async def test_sec_61_a_missing_key_is_no_reason_for_a_new_ca() -> None:
    """SEC-61: with its key gone the server refuses to start, and makes no new authority."""
    for kind in AuthorityKind:
        async with a_world() as world:
            await world.keys.delete(world.one(kind, ACTIVE).key_id)
            with pytest.raises(KeyStoreError, match=r"no .* key named"):
                await world.restarted().start()
            assert world.states(kind) == ["active"]


async def test_sec_61_another_key_in_its_place() -> None:
    """SEC-61: a key that is not the one on record is refused, good as it is."""
    for kind, purpose in ((X509, KeyPurpose.X509_CA), (JWT, KeyPurpose.JWT)):
        async with a_world() as world:
            key_id = world.one(kind, ACTIVE).key_id
            await world.keys.delete(key_id)
            await world.keys.generate(key_id, KeyKind.EC_P256, purpose)
            with pytest.raises(KeyStoreError, match="not the one on record"):
                await world.restarted().start()
            assert world.states(kind) == ["active"]


async def test_sec_61_a_lost_journal_is_no_new_trust_domain() -> None:
    """SEC-61: keys without records stop the start; nothing is deleted, nothing is made."""
    async with a_world() as world:
        keys = await world.keys.key_ids()
        world.journal.records.clear()
        with pytest.raises(KeyStoreError, match="restore the database"):
            await world.restarted().start()
        assert await world.keys.key_ids() == keys
        assert world.journal.records == {}


async def test_sec_61_a_lost_folder_of_keys(tmp_path: Path) -> None:
    """SEC-61: a server whose key files are gone refuses to start, with what to do."""
    world = World()
    world.keys = DiskKeyManager(tmp_path / "keys")
    await world.restarted().start()
    for file in (tmp_path / "keys").iterdir():
        file.unlink()
    with pytest.raises(KeyStoreError, match="restore it from a backup"):
        await world.restarted().start()
    assert world.states(X509) == ["active"]


async def test_an_authority_that_is_not_in_the_bundle() -> None:
    """SEC-66: what cannot be read back from the bundle does not sign."""

    class Forgetful(MemoryJournal):
        """Publishes nothing."""

        def bundle(self) -> Bundle:
            """An empty one."""
            return Bundle(TD)

    world = World()
    world.journal = Forgetful(world.clock, TD)
    world.keys = MemoryKeyManager()
    with pytest.raises(InternalError, match="not in the bundle that was read back"):
        await world.restarted().start()
    assert world.states(X509) == ["prepared"]
    with pytest.raises(NotReadyError):
        _ = world.rotator.x509


async def test_another_server_was_quicker() -> None:
    """SEC-66: an activation that another server made first is taken up, not fought."""
    async with a_world() as world:
        first = world.one(X509, ACTIVE)
        await world.go_to(prepare_at(first.validity))
        second = world.one(X509, PREPARED)
        other = World()
        other.journal, other.keys, other.clock = world.journal, world.keys, world.clock
        await other.restarted().start()
        assert other.rotator.x509.authority_id == first.authority_id

        stale = await world.journal.load()
        await world.go_to(activate_at(first.validity))
        other.journal = Stale(world.journal, stale)  # type: ignore[assignment]
        taking = other.restarted()
        await taking.step()
        with pytest.raises(NotReadyError):
            _ = taking.x509
        await taking.step()
        assert taking.x509.authority_id == second.authority_id


class Stale:
    """A journal whose first load is an old one."""

    def __init__(self, journal: MemoryJournal, records: tuple[AuthorityRecord, ...]) -> None:
        self._journal = journal
        self._stale = [records]

    async def load(self) -> tuple[AuthorityRecord, ...]:
        """Old, then new."""
        return self._stale.pop() if self._stale else await self._journal.load()

    def __getattr__(self, name: str) -> object:
        return getattr(self._journal, name)


async def test_one_kind_s_trouble_is_not_the_other_s() -> None:
    """SEC-66: with the next X.509 key gone, JWT authorities still follow each other."""
    async with a_world() as world:
        first = world.one(X509, ACTIVE)
        await world.go_to(prepare_at(first.validity))
        await world.keys.delete(world.one(X509, PREPARED).key_id)
        jwt = world.rotator.jwt.key_id
        world.clock.at = activate_at(first.validity)
        for _ in range(2):
            with pytest.raises(KeyStoreError):
                await world.rotator.step()
            world.clock.advance(20 * DAY / 60)
        world.clock.at = activate_at(world.one(JWT, ACTIVE).validity)
        for _ in range(2):
            with pytest.raises(KeyStoreError):
                await world.rotator.step()
            world.clock.advance(HOUR)
        assert world.rotator.jwt.key_id != jwt
        assert world.rotator.x509.authority_id == first.authority_id


# The loop, and the settings.


class Ticking(StoppedClock):
    """Moves on when it is slept on, and ends the loop after some sleeps."""

    def __init__(self, sleeps: int, then: Callable[[int], None]) -> None:
        super().__init__(NOW)
        self.left = sleeps
        self.then = then

    async def sleep(self, span: timedelta) -> None:
        """Move on."""
        assert span == STEP_INTERVAL
        if self.left == 0:
            raise asyncio.CancelledError
        self.left -= 1
        self.advance(10 * DAY)
        self.then(self.left)


async def test_the_loop_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """SEC-66: a failed step is logged and shown, and gone once a later one succeeds."""
    shown: list[str] = []

    def then(left: int) -> None:
        shown.append(world.rotator.problem)
        broken.broken = left in (8, 7)

    class Broken(MemoryJournal):
        """Fails when told to."""

        broken = False

        async def load(self) -> tuple[AuthorityRecord, ...]:
            """Fail, or load."""
            if self.broken:
                raise SpiffeErrorOfAStore("the disk is full")
            return await super().load()

    class SpiffeErrorOfAStore(SpiffeError):
        """What a store raises."""

    world = World()
    world.clock = Ticking(12, then)
    broken = Broken(world.clock, TD)
    world.journal = broken
    world.keys = MemoryKeyManager()
    await world.restarted().start()
    with pytest.raises(asyncio.CancelledError):
        await world.rotator.run()
    assert shown[:4] == [""] * 4
    assert shown[4:6] == ["rotation: the disk is full"] * 2
    assert shown[6:] == [""] * 6
    assert "rotation_failed" in caplog.text
    check(world, issue(world, HOUR))


@pytest.mark.parametrize(
    ("x509", "jwt", "ahead"),
    [
        (timedelta(0), DAY, HOUR), (DAY, timedelta(0), HOUR), (-DAY, DAY, HOUR),
        (DAY, 40000 * DAY, HOUR), (DAY, DAY, timedelta(0)), (DAY, DAY, -HOUR),
        (DAY, DAY, 8 * HOUR), (365 * DAY, DAY, 9 * HOUR), (HOUR, DAY, timedelta(minutes=20)),
    ],
)  # fmt: skip
def test_settings_that_would_let_a_server_expire(
    x509: timedelta, jwt: timedelta, ahead: timedelta
) -> None:
    """SEC-66: lives and lead that do not fit each other are refused at the start."""
    with pytest.raises(MalformedError, match=r"^authority\."):
        RotationSettings(x509, jwt, KeyKind.EC_P256, ahead)


def test_settings_at_the_edge() -> None:
    """SEC-66: the longest lead that fits is accepted."""
    lead = timedelta(minutes=20) - STEP_INTERVAL
    assert RotationSettings(HOUR, HOUR, KeyKind.EC_P256, lead)


async def test_sec_60_each_kind_has_keys_of_its_own() -> None:
    """SEC-60, BUNDLE-03: X.509 and JWT authorities never share a key."""
    async with a_world() as world:
        x509, jwt = world.rotator.x509, world.rotator.jwt
        assert isinstance(x509, ActiveX509)
        assert isinstance(jwt, ActiveJwt)
        assert x509.key.public_key != jwt.key.public_key
        assert x509.key.purpose is KeyPurpose.X509_CA
        assert jwt.key.purpose is KeyPurpose.JWT
