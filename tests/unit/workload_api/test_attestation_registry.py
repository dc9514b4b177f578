"""All attestors together: limits, failures, and a process that must live throughout."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import ClassVar

import pytest

from spiffe_core.errors import ErrorKind, NotReadyError
from spiffe_core.selector import Selector, SelectorSet
from spiffe_wire.frontdoor.peer import PeerGoneError, UnixPeer
from tests.support.children import a_child
from workload_api.attestors.protocol import AttestationError, Finding, NotYetError
from workload_api.attestors.registry import LAST_LOOK, Attestation


class Fake:
    """An attestor that does what it is told."""

    type: ClassVar[str] = "fake"

    def __init__(self, does: Callable[[UnixPeer], Awaitable[SelectorSet]], type_: str) -> None:
        async def attest(peer: UnixPeer) -> Finding:
            return Finding(await does(peer))

        self.attest = attest
        self.type = type_  # type: ignore[misc]
        self.closed = False

    def close(self) -> None:
        self.closed = True


def knows(*texts: str, type_: str = "good") -> Fake:
    """One that learns *texts* of everybody."""

    async def attest(_: UnixPeer) -> SelectorSet:
        return frozenset(Selector.parse(text) for text in texts)

    return Fake(attest, type_)


def fails(error: Exception, type_: str = "bad") -> Fake:
    """One that fails with *error*."""

    async def attest(_: UnixPeer) -> SelectorSet:
        raise error

    return Fake(attest, type_)


def hangs(type_: str = "slow") -> Fake:
    """One that never answers."""

    async def attest(_: UnixPeer) -> SelectorSet:
        await asyncio.Event().wait()
        raise AssertionError

    return Fake(attest, type_)


SOON = timedelta(milliseconds=50)
LATE = timedelta(milliseconds=500)
"""Of which a fifth is enough for a last look, on a busy machine too."""


async def test_what_all_of_them_learn() -> None:
    """The selectors of every attestor together are what is known of a process."""
    with a_child() as child:
        attestation = Attestation([knows("a:1", "a:2"), knows("b:1", type_="other")])
        found = await attestation.attest(child.peer())
    assert found.selectors == {Selector("a", "1"), Selector("a", "2"), Selector("b", "1")}
    assert not found.partial


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (fails(AttestationError("the kubelet does not answer")), "the kubelet does not answer"),
        (fails(ZeroDivisionError("secret")), "failed; the log says why"),
        (fails(OSError(5, "secret")), "failed; the log says why"),
        (hangs("bad"), "took too long"),
    ],
)
async def test_sec_35_one_fails(broken: Fake, why: str) -> None:
    """SEC-35: one that fails, breaks or hangs costs its own selectors, and says so."""
    with a_child() as child:
        found = await Attestation([knows("a:1"), broken], timeout=SOON).attest(child.peer())
    assert found.selectors == {Selector("a", "1")}
    assert found.partial == {"bad": why}


async def test_sec_35_all_fail() -> None:
    """SEC-35, WEP-19: when nobody can vouch the caller may try again; it is not denied."""
    attestation = Attestation([fails(AttestationError("no")), hangs()], timeout=SOON)
    with a_child() as child:
        with pytest.raises(NotReadyError, match="attestation failed: bad: no; slow: took too"):
            await attestation.attest(child.peer())
    assert NotReadyError.kind is ErrorKind.NOT_READY


async def test_sec_35_an_attestor_that_knows_nothing() -> None:
    """SEC-35: "not one of mine" is an answer: nothing is partial about it."""
    with a_child() as child:
        found = await Attestation([knows()]).attest(child.peer())
    assert not found.selectors and not found.partial


async def test_sec_31_a_process_that_ends_meanwhile() -> None:
    """SEC-31: selectors that were read of a process that has ended since are not used."""
    with a_child() as child:

        async def attest(_: UnixPeer) -> SelectorSet:
            child.end()
            return frozenset({Selector("a", "1")})

        with pytest.raises(PeerGoneError):
            await Attestation([Fake(attest, "good")]).attest(child.peer())


async def test_32_at_once_and_no_more() -> None:
    """SEC-80: 32 are attested at once, of however many, and all get their answer."""
    inside, most, go = 0, 0, asyncio.Event()

    async def attest(_: UnixPeer) -> SelectorSet:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await go.wait()
        inside -= 1
        return frozenset({Selector("a", "1")})

    attestation = Attestation([Fake(attest, "good")])
    with a_child() as child:
        calls = [
            asyncio.create_task(attestation.attest(child.peer(uid=uid))) for uid in range(100)
        ]
        await asyncio.sleep(0.05)
        assert inside == most == 32
        go.set()
        answers = await asyncio.gather(*calls)
    assert most == 32 and len(answers) == 100 and attestation.slots.held == 0


async def test_sec_81_one_user_does_not_starve_another() -> None:
    """SEC-81: with a thousand calls of one user that hang, another is answered at once."""

    async def attest(peer: UnixPeer) -> SelectorSet:
        if peer.uid == 1:
            await asyncio.Event().wait()
        return frozenset({Selector("a", "1")})

    attestation = Attestation([Fake(attest, "good")], timeout=timedelta(seconds=5))
    with a_child() as child:
        many = [child.peer(uid=1) for _ in range(500)]
        greedy = [asyncio.create_task(attestation.attest(one)) for one in many * 2]
        await asyncio.sleep(0)
        async with asyncio.timeout(1):
            assert (await attestation.attest(child.peer(uid=2))).selectors
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
    assert attestation.slots.held == 0


async def test_waiting_counts_as_time() -> None:
    """SEC-80: five seconds are the limit with the waiting in them, and then: try again."""
    attestation = Attestation([hangs()], timeout=SOON)
    with a_child() as child:
        calls = [
            asyncio.create_task(attestation.attest(one))
            for one in [child.peer() for _ in range(100)]
        ]
        async with asyncio.timeout(2):
            answers = await asyncio.gather(*calls, return_exceptions=True)
    texts = {str(one) for one in answers}
    assert all(isinstance(one, NotReadyError) for one in answers)
    assert texts == {
        "workload attestation failed: slow: took too long",
        "too many processes are being attested; try again",
    }


@pytest.mark.parametrize("leaving", [0, 3, 9])
async def test_sec_36_calls_of_one_connection_share_a_look(leaving: int) -> None:
    """SEC-36: calls share a look that began after all of them came, and none that ran."""
    began, go = [], asyncio.Event()

    async def attest(_: UnixPeer) -> SelectorSet:
        number = len(began)
        began.append(number)
        await go.wait()
        return frozenset({Selector("look", str(number))})

    attestation = Attestation([Fake(attest, "good")])
    with a_child() as child:
        one, another = child.peer(), child.peer()
        early = [asyncio.create_task(attestation.attest(one)) for _ in range(10)]
        other = asyncio.create_task(attestation.attest(another))
        while len(began) < 2:
            await asyncio.sleep(0)
        late = asyncio.create_task(attestation.attest(one))
        while len(began) < 3:
            await asyncio.sleep(0)
        for task in early[:leaving]:
            task.cancel()
        await asyncio.gather(*early[:leaving], return_exceptions=True)
        go.set()
        answers = await asyncio.gather(*early[leaving:], other, late)
    assert [next(iter(one.selectors)).value for one in answers] == [
        *["0"] * (10 - leaving), "1", "2",
    ]  # fmt: skip
    assert attestation.slots.held == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_nobody_joins_a_look_that_is_given_up(steps: int) -> None:
    """Who comes as the only caller goes, while it waits for a slot, has a look of his own."""
    go = asyncio.Event()

    async def attest(peer: UnixPeer) -> SelectorSet:
        await go.wait()
        return frozenset({Selector("a", "1")})

    attestation = Attestation([Fake(attest, "good")])
    with a_child() as child:
        busy = [
            asyncio.create_task(attestation.attest(child.peer(uid=uid))) for uid in range(100)
        ]
        await asyncio.sleep(0.01)
        peer = child.peer()
        gone = asyncio.create_task(attestation.attest(peer))
        for _ in range(steps):
            await asyncio.sleep(0)
        gone.cancel()
        joining = asyncio.create_task(attestation.attest(peer))
        await asyncio.gather(gone, return_exceptions=True)
        go.set()
        assert (await joining).selectors == {Selector("a", "1")}
        await asyncio.gather(*busy)
    assert attestation.slots.held == 0 and not attestation._looks


async def test_who_joins_late_waits_as_long_as_anybody() -> None:
    """SEC-80: a call has its five seconds, though the look that it joined began before it."""
    go = asyncio.Event()

    async def attest(peer: UnixPeer) -> SelectorSet:
        await go.wait()
        return frozenset({Selector("a", "1")})

    attestation = Attestation([Fake(attest, "good")], timeout=LATE)
    with a_child() as child:
        peer = child.peer(uid=1)
        async with contextlib.AsyncExitStack() as slots:
            for uid in range(2, 34):
                await slots.enter_async_context(attestation.slots.slot(uid))
            early = asyncio.create_task(attestation.attest(peer))
            await asyncio.sleep(LATE.total_seconds() / 2)
            late = asyncio.create_task(attestation.attest(peer))
            with pytest.raises(NotReadyError, match="too many"):
                await early
            go.set()
            assert not late.done()
        assert (await late).selectors == {Selector("a", "1")}
    assert attestation.slots.held == 0 and not attestation._looks


async def test_sec_31_a_shared_look_of_a_process_that_ended() -> None:
    """SEC-31: every call that shared a look is refused when the process ended meanwhile."""
    with a_child() as child:

        async def attest(_: UnixPeer) -> SelectorSet:
            child.end()
            return frozenset({Selector("a", "1")})

        attestation, peer = Attestation([Fake(attest, "good")]), child.peer()
        answers = await asyncio.gather(
            *(attestation.attest(peer) for _ in range(3)), return_exceptions=True
        )
    assert [type(one) for one in answers] == [PeerGoneError] * 3


async def test_a_caller_who_goes_away_frees_his_slot() -> None:
    """A call that is cancelled while it is attested, or while it waits, holds nothing."""
    attestation = Attestation([hangs()])
    with a_child() as child:
        calls = [
            asyncio.create_task(attestation.attest(child.peer(uid=uid))) for uid in range(50)
        ]
        await asyncio.sleep(0.01)
        assert attestation.slots.held == 32
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert attestation.slots.held == 0


def test_closing_closes_all() -> None:
    """The agent's end is told to every attestor."""
    fakes = [knows(), knows(type_="other")]
    Attestation(fakes).close()
    assert all(one.closed for one in fakes)


async def test_what_arrives_shortly_is_waited_for() -> None:
    """A process that the platform tells of in a moment is attested with what it tells."""
    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    calls = []

    async def attest(_: UnixPeer) -> SelectorSet:
        calls.append(attestation.slots.held)
        if not arrived.done():
            raise NotYetError("not listed yet", arrived)
        return frozenset({Selector("pod", "1")})

    attestation = Attestation([Fake(attest, "pod"), knows("good:1")])
    with a_child() as child:
        asking = asyncio.create_task(attestation.attest(child.peer()))
        while not calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert not asking.done() and attestation.slots.held == 0, "waiting holds no slot"
        arrived.set_result(None)
        found = await asking
    assert found.selectors == {Selector("pod", "1"), Selector("good", "1")} and len(calls) == 2
    assert not found.partial


@pytest.mark.parametrize("patient", [True, False])
async def test_sec_35_what_does_not_arrive(patient: bool) -> None:
    """SEC-35: what does not arrive in time is absent, marked, and the others count."""
    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    attestation = Attestation(
        [fails(NotYetError("not listed yet", arrived), "pod"), knows("good:1")], timeout=LATE
    )
    started = asyncio.get_running_loop().time()
    with a_child() as child:
        found = await attestation.attest(child.peer(), patient=patient)
    waited = asyncio.get_running_loop().time() - started
    assert found.selectors == {Selector("good", "1")}
    assert found.partial == {"pod": "not listed yet"} and found.changed == (arrived,)
    assert (waited >= LATE.total_seconds() * (1 - LAST_LOOK)) is patient


async def test_sec_35_who_waited_in_vain_is_looked_at_once_more() -> None:
    """SEC-35: what does not arrive leaves the others time to say what is so by then."""
    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    looks = 0

    async def slow(_: UnixPeer) -> SelectorSet:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.005)
        return frozenset({Selector("slow", str(looks))})

    attestation = Attestation(
        [fails(NotYetError("not listed yet", arrived), "pod"), Fake(slow, "slow")],
        timeout=LATE,
    )
    with a_child() as child:
        found = await attestation.attest(child.peer())
    assert found.selectors == {Selector("slow", "2")}
    assert found.partial == {"pod": "not listed yet"}


async def test_sec_35_what_holds_so_far_counts_and_is_marked() -> None:
    """SEC-35: an attestor that knows a part says so, and is asked again when there is more."""
    arrived, changed = (asyncio.get_running_loop().create_future() for _ in range(2))
    so_far = Finding(frozenset({Selector("pod", "1")}), changed, "its namespace is not known")
    attestation = Attestation(
        [fails(NotYetError("wait", arrived, so_far), "pod")], timeout=SOON
    )
    with a_child() as child:
        found = await attestation.attest(child.peer(), patient=False)
    assert found.selectors == so_far.selectors
    assert found.partial == {"pod": "wait"}
    assert found.changed == (arrived, changed)


async def test_sec_35_a_finding_that_may_not_be_all_is_marked() -> None:
    """SEC-35: selectors that may be outdated, or not all, count and are marked partial."""

    class Stale:
        type: ClassVar[str] = "pod"

        async def attest(self, _: UnixPeer) -> Finding:
            return Finding(frozenset({Selector("pod", "1")}), None, "not heard of for 9 s")

        def close(self) -> None:
            """Nothing is under way."""

    attestation = Attestation([Stale()])
    with a_child() as child:
        found = await attestation.attest(child.peer())
    assert found.selectors == {Selector("pod", "1")}
    assert found.partial == {"pod": "not heard of for 9 s"}
