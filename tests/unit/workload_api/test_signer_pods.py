"""
Signing ahead for pods: only for those of this node, and with their UID (architecture A5).

Against servers of tests: one that has our service, and one that has SPIRE's alone.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography.x509 import (
    SubjectAlternativeName,
    UniformResourceIdentifier,
    load_der_x509_csr,
)

from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, NotReadyError
from spiffe_core.keys import KeyKind, spki_of
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.selector import SelectorSet
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2, podsvid_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.callers import eventually
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder
from tests.support.store import an_entry, some
from workload_api.attestors.pods import PodTable
from workload_api.cache.cache import WorkloadCache
from workload_api.sync.calls import Pods, SvidCalls
from workload_api.sync.signer import SWEEP_SECONDS, UNUSED_KEPT, Signer

CA = FakeCa()
HOUR = timedelta(hours=1)
PLAIN = an_entry("/plain", id="plain", created_at=NOW)
WEB = an_entry("/web", id="web", created_at=NOW, selectors=some("k8s:ns:shop", "k8s:sa:web"))
DB = an_entry("/db", id="db", created_at=NOW, selectors=some("k8s:ns:shop", "k8s:sa:db"))


@dataclass
class SomePods:
    """The pods of a node, by what their entries ask for."""

    here: dict[SelectorSet, str] = field(default_factory=dict)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def pod_for(self, entry_selectors: SelectorSet) -> str:
        """See `Pods`."""
        return self.here.get(entry_selectors, "")

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `Pods`."""
        self.listeners.append(listener)

    def put(self, entry: RegistrationEntry, uid: str) -> None:
        """There is such a pod now, or, without a UID, none any more."""
        self.here[entry.selectors] = uid
        for listener in self.listeners:
            listener()


@dataclass
class Signing:
    """Signs what it is asked for."""

    clock: DrivenClock
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Entry and pod."""
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    late: set[str] = field(default_factory=set)
    """Pods that are waited for until `come` is set."""
    come: asyncio.Event = field(default_factory=asyncio.Event)
    late_error: Exception | None = None
    renumber: Callable[[int], int] = lambda number: number

    def chain(self, csr: bytes) -> bytes:
        """An SVID for what a CSR names."""
        request = load_der_x509_csr(csr)
        names = request.extensions.get_extension_for_class(SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(UniformResourceIdentifier)
        now = self.clock.now()
        return CA.leaf(
            uri,
            spki=spki_of(request.public_key()),
            serial=len(self.asked),
            not_before=now,
            not_after=now + HOUR,
        ).der


@dataclass
class PodSvids(podsvid_pb2_grpc.PodSvidServicer):
    """Our service."""

    signing: Signing

    async def BatchNewX509SVID(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """At once what can be, then the rest."""
        now, late = (
            podsvid_pb2.BatchNewX509SVIDResponse(),
            podsvid_pb2.BatchNewX509SVIDResponse(),
        )
        for number, one in enumerate(request.params):
            self.signing.asked.append((one.entry_id, one.pod_uid))
            part = late if one.pod_uid in self.signing.late else now
            result = part.results.add(number=self.signing.renumber(number))
            if self.signing.refused[one.entry_id, one.pod_uid]:
                result.status.code, result.status.message = 7, "no"
            else:
                result.svid.cert_chain.append(self.signing.chain(one.csr))
        yield now
        if late.results:
            await self.signing.come.wait()
            if self.signing.late_error is not None:
                raise self.signing.late_error
            yield late

    async def NewJWTSVID(self, request: Any, context: Any) -> Any:
        """No JWT-SVID, but the question."""
        self.signing.asked.append((request.entry_id, request.pod_uid))
        return podsvid_pb2.NewJWTSVIDResponse()


@dataclass
class SpireSvids(svid_pb2_grpc.SVIDServicer):
    """SPIRE's."""

    signing: Signing

    async def BatchNewX509SVID(self, request: Any, context: Any) -> Any:
        """All at once."""
        answer = svid_pb2.BatchNewX509SVIDResponse()
        for one in request.params:
            self.signing.asked.append((one.entry_id, "SPIRE"))
            answer.results.add().svid.cert_chain.append(self.signing.chain(one.csr))
        return answer

    async def NewJWTSVID(self, request: Any, context: Any) -> Any:
        """No JWT-SVID, but the question."""
        self.signing.asked.append((request.entry_id, "SPIRE"))
        return svid_pb2.NewJWTSVIDResponse()


@dataclass
class Place:
    """A signer, the pods it knows, and its server."""

    clock: DrivenClock
    signing: Signing
    cache: WorkloadCache
    pods: SomePods
    calls: SvidCalls
    signer: Signer
    changes: Counter[str]
    elapsed: float = 0.0

    def put(self, *entries: RegistrationEntry) -> None:
        """Entries were added or changed."""
        self.signer.note(self.cache.apply(snapshot=False, entries=entries), 0)

    def asked(self) -> list[tuple[str, str]]:
        """What the server was asked since the last time."""
        asked, self.signing.asked[:] = list(self.signing.asked), []
        return sorted(asked)

    def restart(self) -> None:
        """Another signer takes over the cache, as after a restart."""
        self.signer = Signer(
            self.cache,
            self.calls,
            self.clock.now,
            KeyKind.EC_P256,
            monotonic=self.signer.monotonic,
        )

    async def pass_by(self, seconds: float) -> None:
        """Time goes by, and the signer looks."""
        self.elapsed += seconds
        await self.signer.sign_due()


@asynccontextmanager
async def a_place(*, ours: bool = True, pods: Pods | None = None) -> AsyncIterator[Place]:
    """A signer beside some pods; *ours*: its server has our service."""
    clock = DrivenClock(NOW)
    signing = Signing(clock)
    cache = WorkloadCache(CA.trust_domain)
    cache.apply(snapshot=True, bundles=[CA.bundle])
    with a_folder() as folder:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        svid_pb2_grpc.add_SVIDServicer_to_server(SpireSvids(signing), server)
        if ours:
            podsvid_pb2_grpc.add_PodSvidServicer_to_server(PodSvids(signing), server)
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{folder}/s", options) as channel:
            some_pods = SomePods()
            calls = SvidCalls(lambda: channel, pods or some_pods)
            changes: Counter[str] = Counter()
            place: Place
            signer = Signer(
                cache,
                calls,
                clock.now,
                KeyKind.EC_P256,
                on_changed=lambda: changes.update(["late"]),
                monotonic=lambda: 1000.0 + place.elapsed,
            )
            place = Place(clock, signing, cache, some_pods, calls, signer, changes)
            try:
                yield place
            finally:
                await signer.close()
        await server.stop(0)


# What is asked for


async def test_signed_ahead_for_pods_that_are_here() -> None:
    """An entry for pods is asked for with a pod of this node; others are asked for as ever."""
    async with a_place() as place:
        place.put(PLAIN, WEB, DB)
        place.pods.put(WEB, "u1")
        assert await place.signer.sign_due() == 2
        assert place.asked() == [("plain", ""), ("web", "u1")]
        assert place.cache.svids.keys() == {"plain", "web"}


async def test_a_pod_that_comes_wakes_the_signer() -> None:
    """The first pod that an entry is for is what makes it due, at once."""
    async with a_place() as place:
        place.put(WEB)
        assert await place.signer.sign_due() == 0 and not place.asked()
        async with asyncio.timeout(5):
            waiting = asyncio.create_task(place.signer.wanted(30))
            await asyncio.sleep(0)
            place.pods.put(WEB, "u1")
            await waiting
        assert await place.signer.sign_due() == 1 and place.asked() == [("web", "u1")]


async def test_another_pod_of_the_same_kind_needs_nothing() -> None:
    """An SVID is the entry's: a pod that takes another's place is served by the same one."""
    async with a_place() as place:
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.pods.put(WEB, "u2")
        assert await place.signer.sign_due() == 0
        place.clock.advance(HOUR * 0.7)
        assert await place.signer.sign_due() == 1
        assert place.asked() == [("web", "u1"), ("web", "u2")]


async def test_without_pods_nothing_is_renewed() -> None:
    """When the last pod is gone nothing more is asked for, on demand neither."""
    async with a_place() as place:
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.pods.put(WEB, "")
        place.clock.advance(HOUR * 0.7)
        place.asked()
        assert await place.signer.sign_due() == 0
        assert await place.signer.sign([WEB]) == 0
        assert not place.asked()


async def test_the_svid_of_pods_that_are_gone_is_dropped() -> None:
    """A minute after the last pod went, its SVID and key are dropped; a new pod has another."""
    async with a_place() as place:
        place.put(WEB, PLAIN)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.pods.put(WEB, "")
        await place.pass_by(UNUSED_KEPT - 1)
        assert place.cache.svids.keys() == {"plain", "web"} and not place.changes
        await place.pass_by(SWEEP_SECONDS + 1)
        assert place.cache.svids.keys() == {"plain"} and place.changes["late"] == 1
        place.pods.put(WEB, "u2")
        assert await place.signer.sign_due() == 1
        assert place.cache.svids.keys() == {"plain", "web"}


async def test_what_an_earlier_life_left_is_kept_until_it_ends() -> None:
    """SEC-106: while no pod is known yet, after a restart, nothing is thrown away."""
    async with a_place() as place:
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.pods.put(WEB, "")
        place.restart()
        for _ in range(20):
            await place.pass_by(SWEEP_SECONDS + 1)
        assert place.cache.svids.keys() == {"web"}
        place.clock.advance(HOUR + timedelta(seconds=1))
        await place.pass_by(SWEEP_SECONDS + 1)
        assert not place.cache.svids


# Refusals


async def test_sec_107_a_refusal_is_not_hammered() -> None:
    """SEC-107: a refused pod is asked for with growing pauses; another pod, at once."""
    async with a_place() as place:
        place.put(WEB)
        place.signing.refused["web", "u1"] = 1
        place.pods.put(WEB, "u1")
        for _ in range(50):
            await place.signer.sign_due()
            for listener in place.pods.listeners:
                listener()  # other pods come and go
        assert len(place.asked()) < 10
        place.pods.put(WEB, "u2")
        assert await place.signer.sign_due() == 1 and place.asked() == [("web", "u2")]


# What comes late


async def test_nobody_waits_for_a_pod_that_the_server_does_not_know() -> None:
    """What the server waits for comes later; meanwhile the rest is signed, and new entries."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.put(WEB, DB)
        place.pods.put(WEB, "u1")
        place.pods.put(DB, "u2")
        async with asyncio.timeout(5):
            assert await place.signer.sign_due() == 1
            assert place.cache.svids.keys() == {"db"}
            place.put(PLAIN)
            assert await place.signer.sign_due() == 1
        assert Counter(place.asked()) == {("web", "u1"): 1, ("db", "u2"): 1, ("plain", ""): 1}
        with place.cache.waiter() as waiter:
            waiter.selectors = WEB.selectors
            place.signing.come.set()
            async with asyncio.timeout(5):
                await waiter.wait()
        assert "web" in place.cache.svids
        await eventually(lambda: place.changes["late"])
        assert await place.signer.sign_due() == 0


async def test_when_all_wait_the_signer_does_not() -> None:
    """A batch of nothing but unknown pods holds up nobody."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.put(WEB)
        place.pods.put(WEB, "u1")
        async with asyncio.timeout(5):
            assert await place.signer.sign_due() == 0
            assert await place.signer.sign_due() == 0
        assert len(place.asked()) == 1
        place.signing.come.set()
        await eventually(lambda: "web" in place.cache.svids)


async def test_idle_waits_for_what_is_late() -> None:
    """Before our own connections are cut, what the server waits for has come."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()

        async def cut() -> bool:
            async with place.signer.idle():
                return "web" in place.cache.svids

        cutting = asyncio.create_task(cut())
        await asyncio.sleep(0.02)
        assert not cutting.done()
        place.signing.come.set()
        assert await cutting


@pytest.mark.parametrize(
    "error",
    [NotReadyError("stopping"), AgentDeniedError("banned", DenialReason.AGENT_BANNED)],
    ids=["stopping", "banned"],
)
async def test_an_error_that_comes_late_is_told(error: Exception) -> None:
    """What ends the call while a pod is waited for is raised at the next look."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.signing.late_error = error
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.signing.come.set()
        async with asyncio.timeout(5):
            while not place.changes:
                await asyncio.sleep(0.001)
        with pytest.raises(type(error)):
            await place.signer.sign_due()
        assert not place.cache.svids
        place.signing.late.clear()
        assert await place.signer.sign_due() == 1


async def test_what_is_late_for_an_entry_that_changed_is_not_taken() -> None:
    """IOP-27: an SVID that comes for what an entry was is dropped, and asked for anew."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        place.put(replace(WEB, spiffe_id=an_entry("/other").spiffe_id, revision_number=1))
        place.signing.come.set()
        await eventually(lambda: place.changes["late"])
        assert not place.cache.svids
        place.signing.late.clear()
        assert await place.signer.sign_due() == 1
        assert place.cache.svids["web"].spiffe_id.path == "/other"


async def test_given_up_when_the_agent_ends() -> None:
    """What is late when the agent stops is cancelled, and awaited."""
    async with a_place() as place:
        place.signing.late.add("u1")
        place.put(WEB)
        place.pods.put(WEB, "u1")
        await place.signer.sign_due()
        async with asyncio.timeout(5):
            await place.signer.close()
        assert not place.signer._late and not place.cache.svids


@pytest.mark.parametrize("renumber", [lambda _: 0, lambda n: n + 5], ids=["twice", "beyond"])
async def test_answers_to_what_was_not_asked(renumber: Callable[[int], int]) -> None:
    """A server that answers one number twice, or another than was asked, is not believed."""
    async with a_place() as place:
        place.signing.renumber = renumber
        place.put(WEB, PLAIN)
        place.pods.put(WEB, "u1")
        with pytest.raises(InternalError):
            await place.signer.sign_due()
        assert not place.cache.svids


# Servers without our service


async def test_a_server_of_spires_is_asked_as_ever() -> None:
    """SPIRE has no such service: it is asked once, and then as its own agents ask it."""
    async with a_place(ours=False) as place:
        place.put(WEB, DB, PLAIN)
        place.pods.put(WEB, "u1")
        assert await place.signer.sign_due() == 2
        assert not place.calls.names_pods
        # From now on everything is signed ahead, as SPIRE's agents do.
        assert await place.signer.sign_due() == 1
        assert place.asked() == [("db", "SPIRE"), ("plain", "SPIRE"), ("web", "SPIRE")]
        place.pods.put(WEB, "")
        place.clock.advance(HOUR * 0.7)
        assert await place.signer.sign_due() == 3
        for _ in range(20):
            await place.pass_by(SWEEP_SECONDS + 1)
        assert len(place.cache.svids) == 3


async def test_an_agent_that_watches_no_pods_asks_as_ever() -> None:
    """Without an attestor of pods nothing is known of them: all is signed ahead."""
    async with a_place() as place:
        place.calls.pods = None
        place.put(WEB, PLAIN)
        assert await place.signer.sign_due() == 2
        assert place.asked() == [("plain", "SPIRE"), ("web", "SPIRE")]


# JWT-SVIDs


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "spire"])
async def test_a_jwt_is_asked_for_with_its_pod(ours: bool) -> None:
    """A JWT-SVID is asked for as X509-SVIDs are; without a pod here it is not."""
    async with a_place(ours=ours) as place:
        place.pods.put(WEB, "u1")
        await place.calls.jwt(WEB, ("a",))
        await place.calls.jwt(PLAIN, ("a",))
        assert place.asked() == [("plain", "SPIRE"), ("web", "u1" if ours else "SPIRE")]
        if ours:
            with pytest.raises(NotReadyError, match="no pod of this node"):
                await place.calls.jwt(DB, ("a",))
        else:
            await place.calls.jwt(DB, ("a",))


def test_the_table_of_pods_is_what_the_signer_needs() -> None:
    """The attestor's own table fits."""
    pods: Pods = PodTable()
    assert pods.pod_for(WEB.selectors) == ""
