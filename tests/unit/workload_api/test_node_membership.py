"""Staying one of the server's agents: who comes back, who ends, and what waits meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_core.errors import ForbiddenError, InternalError, NotReadyError, SpiffeError
from spiffe_core.permission import AgentDeniedError, DenialReason
from tests.support.authorities import NOW, a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.clock import DrivenClock
from tests.support.store import TD
from workload_api.cache.cache import WorkloadCache
from workload_api.node.identity import NodeIdentity
from workload_api.storage import AgentStorage, NodeState
from workload_api.sync import membership as module
from workload_api.sync.gate import CallGate
from workload_api.sync.membership import Membership, SyncState

CA = FakeCa()
KEY = pkcs8_of(a_key("p256", "workload"))
Reason = DenialReason
RETURNS = [Reason.AGENT_EXPIRED, Reason.AGENT_NOT_ATTESTED, Reason.AGENT_NOT_ACTIVE,
           Reason.AGENT_MUST_REATTEST]  # fmt: skip


class Connections:
    """Stands for the connections that are cut."""

    cuts = 0

    def cut(self) -> None:
        """Count it."""
        self.cuts += 1


class Place:
    """A member with an identity on disk, and what it does when it attests again."""

    def __init__(self, folder: Path, *, repeatable: bool = True) -> None:
        self.clock = DrivenClock(NOW)
        storage = AgentStorage(folder / "data", folder / "run")
        storage.save_node(NodeState(KEY, CA.chain(CA.leaf("/spire/agent/k8s_psat/c/n")), True))
        cache = WorkloadCache(TD)
        cache.apply(snapshot=True, bundles=[CA.bundle])
        self.storage = storage
        self.node = NodeIdentity(TD, storage, cache, self.clock.now)
        self.connections = Connections()
        self.attested = 0
        self.forgotten = 0
        self.said: list[str] = []
        self.answers: list[SpiffeError] = []
        """What the server refuses with, before it does not."""
        self.member = Membership(
            self.node,
            self.connections,  # type: ignore[arg-type]
            SyncState(connected=True),
            self._hold,
            self._forget,
            lambda name, error: self.said.append(f"{name}: {error}"),
            self._attest if repeatable else None,
        )

    @contextlib.asynccontextmanager
    async def _hold(self) -> AsyncIterator[None]:
        yield

    def _forget(self) -> None:
        self.forgotten += 1

    async def _attest(self) -> None:
        self.attested += 1
        await asyncio.sleep(0)
        if self.answers:
            raise self.answers.pop(0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test need not wait for."""
    monkeypatch.setattr(module, "FIRST_PAUSE", timedelta(milliseconds=1))
    monkeypatch.setattr(module, "LONGEST_PAUSE", timedelta(milliseconds=8))


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    """A member that can attest again."""
    made = Place(tmp_path)
    assert await made.node.load() and made.node.reattestable
    return made


@pytest.fixture
async def once(tmp_path: Path) -> Place:
    """One that cannot."""
    made = Place(tmp_path, repeatable=False)
    assert await made.node.load()
    return made


def denied(reason: DenialReason) -> AgentDeniedError:
    """What the server says."""
    return AgentDeniedError("denied", reason)


@pytest.mark.parametrize("reason", RETURNS, ids=lambda one: one.name)
async def test_it_comes_back(place: Place, reason: DenialReason) -> None:
    """SPIRE API 2.3: for every reason but a ban it attests again, and cuts its lines."""
    await place.member.denied(denied(reason), 0)
    assert (place.attested, place.connections.cuts, place.member.switched) == (1, 1, 1)
    assert place.forgotten == 0 and place.node.svid is not None


async def test_it_tries_again(place: Place) -> None:
    """SPIRE API 2.3: what passes is waited for; evicted it serves nobody meanwhile."""
    place.answers = [NotReadyError("away"), InternalError("broken")]
    await place.member.denied(denied(Reason.AGENT_NOT_ATTESTED), 0)
    assert place.attested == 3 and place.forgotten == 2
    assert place.said == ["attestation_failed: away", "attestation_failed: broken"]


@pytest.mark.parametrize("reason", [Reason.AGENT_EXPIRED, Reason.AGENT_NOT_ACTIVE])
async def test_sec_106_nothing_good_is_thrown_away(place: Place, reason: DenialReason) -> None:
    """SEC-106: expired or superseded, what workloads hold is served while it tries."""
    place.answers = [NotReadyError("away")]
    await place.member.denied(denied(reason), 0)
    assert place.attested == 2 and place.forgotten == 0


@pytest.mark.parametrize("reason", RETURNS, ids=lambda one: one.name)
@pytest.mark.parametrize(
    "answer", [ForbiddenError("no"), denied(Reason.AGENT_BANNED)], ids=["refused", "banned"]
)
async def test_sec_52_refused_it_ends(
    place: Place, reason: DenialReason, answer: SpiffeError
) -> None:
    """SEC-52: when it may not come back it forgets everything, on disk too, and says why."""
    place.answers = [answer]
    with pytest.raises(SpiffeError, match=str(answer)):
        await place.member.denied(denied(reason), 0)
    assert place.forgotten == 1 and place.node.svid is None
    assert place.storage.load_node() is None
    assert place.member.state.denied is answer and not place.member.state.connected


async def test_sec_52_a_ban_is_the_end(place: Place) -> None:
    """SEC-52: banned it does not even try."""
    with pytest.raises(AgentDeniedError):
        await place.member.denied(denied(Reason.AGENT_BANNED), 0)
    assert place.attested == 0 and place.forgotten == 1 and place.node.svid is None


@pytest.mark.parametrize(
    "reason", [Reason.AGENT_NOT_ATTESTED, Reason.AGENT_NOT_ACTIVE, Reason.AGENT_BANNED]
)
async def test_who_joined_once_ends(once: Place, reason: DenialReason) -> None:
    """SPIRE API 2.3: without a proof that can be repeated, every denial is the end."""
    with pytest.raises(AgentDeniedError):
        await once.member.denied(denied(reason), 0)
    assert once.forgotten == 1 and once.node.svid is None


async def test_sec_111_two_clocks(once: Place) -> None:
    """SEC-111: expired by the server's clock alone it goes on; by its own as well it ends."""
    error = denied(Reason.AGENT_EXPIRED)
    await once.member.denied(error, 0)
    assert once.forgotten == 0 and "compare the clocks" in once.member.state.problem
    once.clock.advance(timedelta(hours=2))
    with pytest.raises(AgentDeniedError):
        await once.member.denied(error, 0)


@pytest.mark.parametrize("reason", [Reason.UNKNOWN, Reason.AGENT_MUST_REATTEST])
async def test_what_ends_nobody(once: Place, reason: DenialReason) -> None:
    """SPIRE API 2.3: a denial without a reason, or to renew, is told in health alone."""
    await once.member.denied(denied(reason), 0)
    assert once.forgotten == 0 and once.member.state.problem == "denied"


async def test_all_that_are_denied_come_back_once(place: Place) -> None:
    """SEC-54: many calls denied at once are one attestation; it supersedes no other of ours."""
    await asyncio.gather(
        *(place.member.denied(denied(Reason.AGENT_NOT_ACTIVE), 0) for _ in range(8))
    )
    assert (place.attested, place.member.switched) == (1, 1)


@pytest.mark.parametrize("reason", [Reason.AGENT_NOT_ACTIVE, Reason.AGENT_BANNED])
async def test_a_word_about_the_certificate_before(place: Place, reason: DenialReason) -> None:
    """SEC-54: a denial of a call that went out with the old certificate concerns nobody."""
    await place.member.denied(denied(Reason.AGENT_NOT_ACTIVE), 0)
    await place.member.denied(denied(reason), 0)
    assert place.attested == 1 and place.forgotten == 0


async def test_at_half_life(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPIRE API 9 (8): from half-life on it attests again, and tries until it is done."""
    monkeypatch.setattr(module, "TICK", 0.001)
    place.answers = [NotReadyError("away")]
    keeping = asyncio.create_task(place.member.keep())
    await asyncio.sleep(0.02)
    assert place.attested == 0
    place.clock.advance(timedelta(minutes=40))
    async with asyncio.timeout(5):
        while place.member.switched < 2:
            await asyncio.sleep(0.001)
    assert place.said[:2] == [
        "renewal_failed: away",
        # The stand-in leaves the identity as it is, as a server with another clock would.
        "renewal_failed: the new SVID is due for renewal: compare the clocks",
    ]
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_refused_at_half_life(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-106: refused at half-life it lives on until its SVID ends, and ends then."""
    monkeypatch.setattr(module, "TICK", 0.001)
    place.answers = [ForbiddenError("no")] * 1000
    place.clock.advance(timedelta(minutes=40))
    keeping = asyncio.create_task(place.member.keep())
    async with asyncio.timeout(5):
        while place.attested < 3:
            await asyncio.sleep(0.001)
    assert not keeping.done() and place.forgotten == 0
    place.clock.advance(timedelta(hours=1))
    with pytest.raises(ForbiddenError):
        await asyncio.wait_for(keeping, 5)
    assert place.forgotten == 1


# What waits


class Log:
    """What happened, in order."""

    def __init__(self, gate: CallGate) -> None:
        self.gate = gate
        self.told: list[str] = []
        self.go_on = asyncio.Event()

    async def call(self, name: str) -> None:
        """A call that ends when it is let."""
        async with self.gate.call():
            self.told.append(f"{name} begins")
            await self.go_on.wait()
            self.told.append(f"{name} ends")

    async def exchange(self, name: str) -> None:
        """An exchange."""
        async with self.gate.shut():
            self.told.append(f"{name} begins")
            await asyncio.sleep(0.01)
            self.told.append(f"{name} ends")


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_sec_54_no_call_meets_an_exchange() -> None:
    """SEC-54: calls go side by side; an exchange waits for them, and the next calls for it."""
    log = Log(CallGate())
    tasks: list[asyncio.Task[Any]] = []
    for one in (log.call("a"), log.call("b"), log.exchange("x"), log.call("c")):
        tasks.append(asyncio.create_task(one))
        await _settle()
    assert log.told == ["a begins", "b begins"]
    log.go_on.set()
    await asyncio.gather(*tasks)
    assert sorted(log.told[2:4]) == ["a ends", "b ends"]
    assert log.told[4:] == ["x begins", "x ends", "c begins", "c ends"]


async def test_two_exchanges_take_turns() -> None:
    """SEC-54: one exchange at a time; calls come after both or between, never within."""
    log = Log(CallGate())
    log.go_on.set()
    await asyncio.gather(log.exchange("x"), log.exchange("y"), log.call("a"))
    for name in "xya":
        begins = log.told.index(f"{name} begins")
        assert log.told[begins + 1] == f"{name} ends"


@pytest.mark.parametrize("what", ["call", "exchange"])
async def test_what_is_given_up_holds_nobody(what: str) -> None:
    """A call or exchange that is cancelled, at work or in waiting, leaves the gate open."""
    log = Log(CallGate())
    holding = asyncio.create_task(log.call("a"))
    await _settle()
    given_up = asyncio.create_task(log.exchange("x"))
    await _settle()
    if what == "call":
        waiting = asyncio.create_task(log.call("b"))
        await _settle()
        waiting.cancel()
        holding.cancel()
    else:
        given_up.cancel()
        log.go_on.set()
    await asyncio.gather(holding, given_up, return_exceptions=True)
    log.go_on.set()
    async with asyncio.timeout(2):
        await log.exchange("y")
        await log.call("c")


async def test_sec_106_with_another_svid_nobody_waits_on(place: Place) -> None:
    """SEC-106: a pause for what was refused to an old SVID ends when there is a new one."""
    async with asyncio.timeout(5):
        waiting = asyncio.create_task(place.member.pause(3600, 0))
        await asyncio.sleep(0)
        await place.member.denied(denied(Reason.AGENT_EXPIRED), 0)
        await waiting
        await place.member.pause(3600, 0)  # it has come already
    started = asyncio.get_running_loop().time()
    await place.member.pause(0.02, 1)
    assert asyncio.get_running_loop().time() - started >= 0.015
