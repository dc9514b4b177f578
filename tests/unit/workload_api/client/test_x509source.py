"""X509Source, against a Workload API on a real socket that changes under it."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from spiffe_core.errors import (
    MalformedError,
    NotReadyError,
    PreconditionError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain
from spiffe_core.x509svid import verify_x509_svid
from spiffe_wire.endpoint import EndpointError
from tests.support.callers import eventually
from tests.support.children import open_files
from tests.support.clock import DrivenClock
from tests.support.stack import ROOT
from workload_api.client.client import X509Context
from workload_api.client.material import X509Material
from workload_api.client.testing import FakeIdentity, FakeWorkloadApi
from workload_api.client.x509source import X509Source, by_hint, by_id

SHORT = timedelta(seconds=0.3)
PARTNER = TrustDomain("partner.test")


class Hasty:
    """The system's time, and pauses that are over soon."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, span: timedelta) -> None:
        await asyncio.sleep(min(span.total_seconds(), 0.01))


@pytest.fixture
def fake() -> Iterator[FakeWorkloadApi]:
    """A fake with one identity, ``/web``, and one partner."""
    with FakeWorkloadApi("/web", federated=[PARTNER.name]) as made:
        yield made


def a_source(fake: FakeWorkloadApi, **changes: Any) -> X509Source:
    """A source of *fake* that tries again soon."""
    return X509Source(fake.address, **{"clock": Hasty(), **changes})


def tampered(fake: FakeWorkloadApi, **changes: Any) -> None:
    """Have *fake* send identities with *changes*, whatever rule that breaks."""
    with fake._changed:
        fake._identities = tuple(replace(one, **changes) for one in fake._identities)
        fake._tell()


async def changed(source: X509Source, during: Callable[[], Any]) -> int:
    """Do something, wait for the change that it brings, and return how many were told."""
    told: list[bool] = []
    end = source.on_change(lambda: told.append(True))
    during()
    await eventually(lambda: told)
    end()
    return len(told)


@contextlib.asynccontextmanager
async def watched(source: X509Source) -> AsyncIterator[list[X509Context]]:
    """Every update of *source*."""
    seen: list[X509Context] = []

    async def watch() -> None:
        async for context in source.updates():
            seen.append(context)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Entering


async def test_it_is_ready_when_entered(fake: FakeWorkloadApi) -> None:
    """WAPI-56: the agent's first identity, and every bundle; it is an X509Material."""
    fake.set_identities("/web", "/api")
    async with a_source(fake) as source:
        material: X509Material = source
        assert material.identity == fake.identities[0] and source.problem == ""
        assert set(material.bundles) == {TrustDomain("example.org"), PARTNER}
        assert source.context.identities == fake.identities
        proved = verify_x509_svid(
            material.identity.svid.chain, material.bundles, at=datetime.now(UTC)
        )
        assert proved.spiffe_id.uri == "spiffe://example.org/web"


async def test_wep_11_the_address_of_the_environment(
    fake: FakeWorkloadApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WEP-11: with no address, that of SPIFFE_ENDPOINT_SOCKET; with neither it says so."""
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", fake.address)
    async with X509Source() as source:
        assert source.identity == fake.identities[0]
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET")
    with pytest.raises(PreconditionError, match="set SPIFFE_ENDPOINT_SOCKET"):
        X509Source()
    with pytest.raises(EndpointError):
        X509Source("/run/a.sock")


async def test_wep_22_an_identity_that_comes_late(fake: FakeWorkloadApi) -> None:
    """WEP-20, WEP-22: entering goes on through absence and denial until an identity comes."""
    fake.stop()
    source = a_source(fake)
    entering = asyncio.create_task(source.__aenter__())
    await eventually(lambda: source.problem)
    fake.deny()
    fake.start()
    await eventually(lambda: source.problem == "no identity issued")
    assert not entering.done()
    fake.allow()
    await entering
    assert source.identity == fake.identities[0] and source.problem == ""
    await source.__aexit__()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (FakeWorkloadApi.deny, "no identity issued"),
        (FakeWorkloadApi.stop, "No such file or directory"),
        (lambda fake: fake.refuse(NotReadyError("starting")), "starting"),
        (lambda fake: tampered(fake, key=b""), "not whole"),
    ],
    ids=["denied", "nobody there", "not ready", "broken"],
)
async def test_nothing_comes_in_time(
    fake: FakeWorkloadApi, prepare: Callable[[FakeWorkloadApi], None], said: str
) -> None:
    """Who enters and gets nothing is told where it was asked, and what was answered."""
    prepare(fake)
    with pytest.raises(NotReadyError, match=said) as caught:
        async with a_source(fake, timeout=SHORT):
            pass
    assert f"from the Workload API at {fake.address} in 0.3 s: " in str(caught.value)


@pytest.mark.parametrize("error", [MalformedError, UnsupportedError])
async def test_wep_18_answers_that_end_the_wait(
    fake: FakeWorkloadApi, error: type[SpiffeError]
) -> None:
    """WEP-18, WEP-23: InvalidArgument and Unimplemented are told at once, and asked once."""
    fake.refuse(error("never"))
    with pytest.raises(error, match="never"):
        async with a_source(fake):
            pass
    assert fake.calls["FetchX509SVID"] == 1


# Staying fresh


async def test_wapi_06_rotations_on_one_stream(fake: FakeWorkloadApi) -> None:
    """WAPI-06: each rotation is another identity and the same bundles, on one open stream."""
    async with a_source(fake) as source:
        bundles = source.bundles
        for _ in range(5):
            before = source.identity
            assert await changed(source, fake.rotate) == 1
            assert source.identity == fake.identities[0] != before
            assert source.bundles is bundles
    assert fake.calls["FetchX509SVID"] == 1


async def test_wapi_12_bundles_come_and_go(fake: FakeWorkloadApi) -> None:
    """WAPI-12, WAPI-13, WAPI-31: what an update does not hold is gone; the rest is the same."""
    async with a_source(fake) as source:
        identity = source.identity
        await changed(source, lambda: fake.unfederate(PARTNER.name))
        assert set(source.bundles) == {TrustDomain("example.org")}
        await changed(source, lambda: fake.federate("other.test"))
        assert TrustDomain("other.test") in source.bundles and source.identity is identity


async def test_new_authorities(fake: FakeWorkloadApi) -> None:
    """SVIDs of the old and the new authority are verified while both are in the bundle."""
    async with a_source(fake) as source:
        before = source.identity.svid
        await changed(source, fake.rotate_authorities)
        for svid in (before, source.identity.svid):
            verify_x509_svid(svid.chain, source.bundles, at=datetime.now(UTC))
        await changed(source, lambda: fake.rotate_authorities(keep_old=False))
        with pytest.raises(MalformedError):
            verify_x509_svid(before.chain, source.bundles, at=datetime.now(UTC))


async def test_wapi_07_the_agent_restarts(fake: FakeWorkloadApi) -> None:
    """WAPI-07: the last good state stays while it is away; then it has the next."""
    async with a_source(fake) as source:
        before = source.identity
        fake.stop()
        await eventually(lambda: source.problem)
        assert source.identity is before and PARTNER in source.bundles
        fake.rotate()
        await changed(source, fake.start)
        assert source.identity == fake.identities[0] and source.problem == ""


async def test_equal_updates_wake_nobody(fake: FakeWorkloadApi) -> None:
    """A stream that is opened again says the same again, and that is no news."""
    async with a_source(fake) as source, watched(source) as seen:
        told: list[bool] = []
        source.on_change(lambda: told.append(True))
        before = source.identity
        for _ in range(3):
            fake.stop()
            await eventually(lambda: source.problem)
            fake.start()
            await eventually(lambda: not source.problem)
        assert fake.calls["FetchX509SVID"] == 4
        assert told == [] and len(seen) == 1 and source.identity is before


async def test_wapi_28_denied(fake: FakeWorkloadApi) -> None:
    """WAPI-28, WAPI-31: PermissionDenied takes identity and bundles away while it lasts."""
    async with a_source(fake) as source:
        await changed(source, fake.deny)
        assert source.problem == "no identity issued" and len(source.bundles) == 0
        for asked in ("identity", "context"):
            with pytest.raises(NotReadyError, match="no X509-SVID: no identity issued"):
                getattr(source, asked)
        await changed(source, fake.allow)
        assert source.identity == fake.identities[0] and PARTNER in source.bundles


BROKEN = {"no key": b"", "no key at all": b"x", "the key of another": None}


@pytest.mark.parametrize("broken", BROKEN)
async def test_an_update_that_breaks_a_rule(fake: FakeWorkloadApi, broken: str) -> None:
    """WAPI-15: the last good state stays and the problem is told; the next one heals it."""
    other = fake.mint_x509("/web").key
    async with a_source(fake) as source:
        before = source.identity
        tampered(fake, key=other if BROKEN[broken] is None else BROKEN[broken])
        await eventually(lambda: source.problem)
        assert source.identity is before
        await changed(source, fake.rotate)
        assert source.problem == "" and source.identity == fake.identities[0]
    assert fake.calls["FetchX509SVID"] == 1


async def test_an_svid_that_expired() -> None:
    """SEC-16: the last good SVID is good to its end and not a second longer."""
    clock = DrivenClock(datetime.now(UTC).replace(microsecond=0))
    with FakeWorkloadApi(FakeIdentity("/web", ttl=timedelta(minutes=5)), now=clock.now) as fake:
        async with a_source(fake, clock=clock) as source:
            clock.advance(timedelta(minutes=5))
            assert source.identity and source.problem == ""
            clock.advance(timedelta(seconds=1))
            with pytest.raises(NotReadyError, match=r"example\.org/web expired at .*no other"):
                _ = source.identity
            assert "example.org/web expired at" in source.problem
            assert source.context.identities and PARTNER not in source.bundles
            await changed(source, fake.rotate)
            assert source.identity == fake.identities[0] and source.problem == ""
        clock.advance(timedelta(hours=1))
        with pytest.raises(NotReadyError, match="expired at"):
            async with a_source(fake, clock=clock, timeout=SHORT):
                pass


# Which identity


@pytest.mark.parametrize(
    "pick",
    [
        by_hint("external"),
        by_id("spiffe://example.org/api"),
        by_id(SpiffeId.parse("spiffe://example.org/api")),
        lambda identities: identities[-1],
    ],
    ids=["hint", "id as text", "id", "function"],
)
async def test_wapi_58_pick(fake: FakeWorkloadApi, pick: Any) -> None:
    """WAPI-58: one identity of several, by hint, by ID or by a function of one's own."""
    fake.set_identities("/web", FakeIdentity("/api", hint="external"))
    async with a_source(fake, pick=pick) as source:
        assert source.identity == fake.identities[1]
        assert len(source.context.identities) == 2


async def test_wapi_58_an_identity_that_is_not_there(fake: FakeWorkloadApi) -> None:
    """WAPI-58: a hint that nothing has is a clear failure; when it comes, all is well."""
    fake.set_identities(FakeIdentity("/web", hint="internal"), "/api")
    expected = (
        "none of our identities is the one to pick "
        '(spiffe://example.org/web with the hint "internal", spiffe://example.org/api)'
    )
    with pytest.raises(NotReadyError) as caught:
        async with a_source(fake, pick=by_hint("external"), timeout=SHORT):
            pass
    assert expected in str(caught.value)
    source = a_source(fake, pick=by_hint("external"))
    entering = asyncio.create_task(source.__aenter__())
    await eventually(lambda: source.problem == expected)
    assert not entering.done()
    fake.set_identities(FakeIdentity("/api", hint="external"))
    await entering
    assert source.identity.svid.spiffe_id.path == "/api"
    await changed(source, lambda: fake.set_identities("/web"))
    with pytest.raises(NotReadyError, match="none of our identities"):
        _ = source.identity
    assert source.problem.startswith("none of our identities")
    await source.__aexit__()


def test_an_id_that_is_none() -> None:
    """`by_id` refuses what is no SPIFFE ID when it is made, not when it is used."""
    with pytest.raises(SpiffeIdError):
        by_id("example.org/api")


async def test_a_pick_that_fails(fake: FakeWorkloadApi) -> None:
    """What a function of the program raises, the program gets, and nothing is left behind."""
    with pytest.raises(ZeroDivisionError):
        async with a_source(fake, pick=lambda _: 1 / 0):  # type: ignore[arg-type,return-value]
            pass
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


# Who is told


async def test_updates_are_the_latest_only(fake: FakeWorkloadApi) -> None:
    """An iterator gives the present state, then the latest; it ends with the source."""
    async with a_source(fake) as source:
        updates = source.updates()
        assert (await anext(updates)).identities == fake.identities
        for _ in range(3):
            await changed(source, fake.rotate)
        assert (await anext(updates)).identities == fake.identities
        waiting = asyncio.ensure_future(anext(updates, None))
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting is None
    assert [one async for one in source.updates()] == []


async def test_every_iterator_gets_every_state(fake: FakeWorkloadApi) -> None:
    """Two who watch see the same; a denial gives them nothing, its end the state again."""
    async with a_source(fake) as source, watched(source) as one, watched(source) as other:
        await eventually(lambda: one and other)
        await changed(source, fake.deny)
        await changed(source, fake.allow)
        await eventually(lambda: len(one) == len(other) == 2)
        assert one == other and one[0].identities == one[1].identities == fake.identities


async def test_listeners(fake: FakeWorkloadApi) -> None:
    """Listeners are told in the loop; one that fails harms nobody, an ended one is not told."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
    told: list[Any] = []
    async with a_source(fake) as source:
        source.on_change(lambda: told.append(1 / 0))
        end = source.on_change(lambda: told.append("ended"))
        source.on_change(lambda: told.append(asyncio.get_running_loop()))
        end()
        end()
        await changed(source, fake.rotate)
        assert told == [asyncio.get_running_loop()]
    assert isinstance(failures[0]["exception"], ZeroDivisionError)


# Nothing is left


async def test_nothing_is_left_open(fake: FakeWorkloadApi) -> None:
    """A source that is left, or that could not be entered, leaves no task and no file."""
    async with a_source(fake):
        pass
    before = open_files()
    for _ in range(5):
        async with a_source(fake) as source:
            await changed(source, fake.rotate)
    fake.deny()
    for _ in range(3):
        with pytest.raises(NotReadyError):
            async with a_source(fake, timeout=timedelta(seconds=0.05)):
                pass
    entering = asyncio.create_task(a_source(fake).__aenter__())
    await eventually(lambda: fake.calls["FetchX509SVID"] > 15)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    await eventually(lambda: open_files() <= before)


async def test_sec_90_no_key_in_any_text(fake: FakeWorkloadApi) -> None:
    """SEC-90: neither a source nor what it gives shows a private key."""
    async with a_source(fake) as source:
        shown = f"{source!r} {vars(source)!r} {source.identity!r} {source.context!r}"
        assert repr(source.identity.key)[2:30] not in shown


UVLOOP = """
import asyncio, sys, uvloop
from workload_api.client.x509source import X509Source

async def main():
    async with X509Source() as source:
        updates = source.updates()
        for _ in range(2):
            context = await anext(updates)
            print(type(asyncio.get_running_loop()).__module__, source.identity.svid.serial,
                  flush=True)

uvloop.run(main())
"""


async def test_with_uvloop_in_another_process(fake: FakeWorkloadApi) -> None:
    """A source works in uvloop's loop as in asyncio's own, and in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", UVLOOP, stdout=subprocess.PIPE, cwd=ROOT, env=fake.environment
    )
    assert process.stdout is not None
    for _ in range(2):
        line = (await process.stdout.readline()).decode().split()
        assert line == ["uvloop", fake.identities[0].svid.serial]
        fake.rotate()
    assert await process.wait() == 0
    process._transport.close()  # type: ignore[attr-defined]
