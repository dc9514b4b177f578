"""Signing ahead: what is due, what is taken, what is put off; against a signing server."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509 import (
    SubjectAlternativeName,
    UniformResourceIdentifier,
    load_der_x509_csr,
)

from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import ExhaustedError, InternalError, SpiffeError
from spiffe_core.keys import KeyKind, spki_of
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.x509svid import X509Svid
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder
from tests.support.store import an_entry
from workload_api.cache.cache import Change, WorkloadCache
from workload_api.sync import signer as signing
from workload_api.sync.calls import SvidCalls
from workload_api.sync.signer import BATCH, Signer

CA = FakeCa()
WEB = an_entry(id="web", created_at=NOW)
HOUR = timedelta(hours=1)


@dataclass
class SigningServer(svid_pb2_grpc.SVIDServicer):
    """Signs what it is asked for, for an hour from *now*; a test makes it do otherwise."""

    clock: DrivenClock
    ca: FakeCa = CA
    life: timedelta = HOUR
    batches: list[list[str]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    error: SpiffeError | None = None
    refused: dict[str, str] = field(default_factory=dict)
    uris: dict[str, str] = field(default_factory=dict)
    drop_result: bool = False
    raw: bytes | None = None
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    signed: int = 0

    @property
    def calls(self) -> list[int]:
        """How many SVIDs each call asked for."""
        return [len(one) for one in self.batches]

    async def BatchNewX509SVID(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.3."""
        self.batches.append([one.entry_id for one in request.params])
        self.asked.update(one.entry_id for one in request.params)
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        response = svid_pb2.BatchNewX509SVIDResponse()
        for one in request.params:
            result = response.results.add()
            if one.entry_id in self.refused:
                result.status.code, result.status.message = 5, self.refused[one.entry_id]
                continue
            result.svid.cert_chain.append(self._sign(one))
        if self.drop_result:
            del response.results[-1]
        return response

    def _sign(self, one: Any) -> bytes:
        if self.raw is not None:
            return self.raw
        csr = load_der_x509_csr(one.csr)
        names = csr.extensions.get_extension_for_class(SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(UniformResourceIdentifier)
        self.signed += 1
        now = self.clock.now()
        return self.ca.leaf(
            self.uris.get(one.entry_id, uri),
            spki=spki_of(csr.public_key()),
            serial=self.signed,
            not_before=now,
            not_after=now + self.life,
        ).der


@dataclass
class Place:
    """A signer, its cache and its server."""

    clock: DrivenClock
    server: SigningServer
    cache: WorkloadCache
    signer: Signer

    def put(self, *entries: RegistrationEntry) -> None:
        """The server of entries added or changed these."""
        self.signer.note(self.cache.apply(snapshot=False, entries=entries), 0)

    def trust(self, *authorities: Any) -> None:
        """Our bundle has these authorities now."""
        bundle = Bundle(CA.trust_domain, authorities)
        self.signer.note(self.cache.apply(snapshot=False, bundles=[bundle]), 0)


@asynccontextmanager
async def a_place(**changes: Any) -> AsyncIterator[Place]:
    """A signer that trusts its server's CA; *changes* are the server's."""
    clock = DrivenClock(NOW)
    server = SigningServer(clock, **changes)
    server.answers.set()
    cache = WorkloadCache(CA.trust_domain)
    cache.apply(snapshot=True, bundles=[CA.bundle])
    with a_folder() as folder:
        running = grpc.aio.server(interceptors=[ErrorInterceptor()])
        svid_pb2_grpc.add_SVIDServicer_to_server(server, running)
        running.add_insecure_port(f"unix:{folder}/s")
        await running.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{folder}/s", options) as channel:
            signer = Signer(cache, SvidCalls(lambda: channel), clock.now, KeyKind.EC_P256)
            yield Place(clock, server, cache, signer)
        await running.stop(0)


def many(count: int) -> list[RegistrationEntry]:
    """Entries of different names."""
    return [an_entry(f"/w{n}", id=f"w{n}", created_at=NOW) for n in range(count)]


# What is due


async def test_signed_ahead_in_batches() -> None:
    """SPIRE's agents ask for at most 500 at a time; so do we, and for each entry once."""
    async with a_place() as place:
        entries = many(BATCH + 3)
        place.put(*entries)
        assert await place.signer.sign_due() == len(entries)
        assert place.server.calls == [BATCH, 3]
        assert set(place.server.asked.values()) == {1}
        assert place.cache.svids.keys() == {one.id for one in entries}
        assert await place.signer.sign_due() == 0


async def test_the_key_is_made_here() -> None:
    """SEC-20: each SVID has a key of its own, made here, and only its public half was sent."""
    async with a_place() as place:
        place.put(*many(3))
        await place.signer.sign_due()
        publics = set()
        for held in place.cache.svids.values():
            private = load_der_private_key(held.key, None)
            leaf = X509Svid.from_chain(held.chain).leaf
            assert spki_of(private.public_key()) in leaf
            publics.add(spki_of(private.public_key()))
        assert len(publics) == 3


async def test_sec_106_renewed_at_half_life() -> None:
    """SEC-106: renewal begins between 40 and 60 percent of the life, not all at once."""
    async with a_place() as place:
        entries = many(60)
        place.put(*entries)
        await place.signer.sign_due()
        place.clock.advance(HOUR * 0.4 - timedelta(seconds=1))
        assert await place.signer.sign_due() == 0
        shares = []
        for _ in range(4):
            place.clock.advance(HOUR * 0.05)
            shares.append(await place.signer.sign_due())
        place.clock.advance(timedelta(seconds=1))
        shares.append(await place.signer.sign_due())
        assert sum(shares) == 60 and set(place.server.asked.values()) == {2}
        assert min(shares[:4]) > 3  # spread evenly, as far as sixty can be


async def test_a_new_revision_is_signed_anew() -> None:
    """SEC-47: a changed entry, such as one with other DNS names, has a new SVID at once."""
    async with a_place() as place:
        place.put(WEB)
        await place.signer.sign_due()
        before = place.cache.svids["web"].serial_number
        place.put(replace(WEB, revision_number=1, dns_names=("web.test",)))
        assert await place.signer.sign_due() == 1
        assert place.cache.svids["web"].serial_number != before
        assert place.cache.svids["web"].revision_number == 1


async def test_an_entry_made_again_is_signed_anew() -> None:
    """SEC-47: deleted and created under the same ID and revision: another SVID."""
    async with a_place() as place:
        place.put(WEB)
        await place.signer.sign_due()
        place.put(replace(WEB, created_at=NOW + timedelta(seconds=1)))
        assert await place.signer.sign_due() == 1


@pytest.mark.parametrize("tainted", [True, False], ids=["tainted", "removed"])
async def test_sec_47_a_lost_authority(tainted: bool) -> None:
    """SEC-47: what a tainted or removed authority signed is signed anew at once, by another."""
    async with a_place() as place:
        place.put(WEB)
        await place.signer.sign_due()
        place.server.ca = FakeCa(which="next")
        old = replace(CA.authority, tainted=True)
        place.trust(*([old] if tainted else []), place.server.ca.authority)
        assert await place.signer.sign_due() == 1
        held = place.cache.svids["web"]
        assert held.authority_id == place.server.ca.authority.authority_id
        assert await place.signer.sign_due() == 0


async def test_what_needs_no_svid() -> None:
    """Node aliases and expired entries are not asked for."""
    alias = replace(WEB, id="alias", parent_id=CA.trust_domain.server_id)
    expired = replace(WEB, id="expired", expires_at=NOW)
    async with a_place() as place:
        place.put(alias, expired)
        assert await place.signer.sign_due() == 0 and not place.server.calls


async def test_the_never_signed_come_first() -> None:
    """A new workload does not wait behind the renewal of those that have an SVID."""
    async with a_place() as place:
        place.put(*many(BATCH))
        await place.signer.sign_due()
        place.clock.advance(HOUR * 0.7)
        new = an_entry("/new", id="new", created_at=NOW)
        place.put(new)
        place.server.answers.clear()
        signing_all = asyncio.create_task(place.signer.sign_due())
        while len(place.server.calls) < 2:
            await asyncio.sleep(0.001)
        assert place.server.asked["new"] == 1 and place.server.calls[1] == BATCH
        place.server.answers.set()
        await signing_all


async def test_what_comes_meanwhile_does_not_wait() -> None:
    """An entry that comes while hundreds are being signed is in the very next batch."""
    async with a_place() as place:
        place.put(*many(3 * BATCH))
        place.server.answers.clear()
        signing_all = asyncio.create_task(place.signer.sign_due())
        while not place.server.calls:
            await asyncio.sleep(0.001)
        place.put(an_entry("/new", id="new", created_at=NOW))
        place.server.answers.set()
        assert await signing_all == 3 * BATCH + 1
        assert place.server.calls == [BATCH, BATCH, BATCH, 1]
        assert "new" in place.server.batches[1]
        assert set(place.server.asked.values()) == {1}


async def test_never_twice_at_once() -> None:
    """Two who sign at the same time do not ask for the same SVID twice."""
    async with a_place() as place:
        place.put(*many(20))
        done = await asyncio.gather(*(place.signer.sign_due() for _ in range(3)))
        assert sorted(done) == [0, 0, 20] and place.server.calls == [20]


# What is taken


async def test_whoever_waits_is_woken() -> None:
    """Streams are told when an SVID is there, with the commit that it came of."""
    async with a_place() as place:
        with place.cache.waiter() as waiter, place.cache.waiter() as other:
            waiter.selectors, other.selectors = WEB.selectors, frozenset()
            change = place.cache.apply(snapshot=False, entries=[WEB])
            place.signer.note(change, 12345)
            assert not waiter._changed.is_set()
            await place.signer.sign_due()
            assert await waiter.wait() == 12345
            assert not other._changed.is_set()
            place.clock.advance(HOUR * 0.7)
            await place.signer.sign_due()
            assert await waiter.wait() == 0  # a renewal, not a change


@pytest.mark.parametrize("change", ["removed", "changed", "made again"])
async def test_an_answer_that_came_too_late(change: str) -> None:
    """IOP-27: an SVID for what an entry was is not kept for what it is now, or is no more."""
    async with a_place() as place:
        place.put(WEB)
        place.server.answers.clear()
        signing_it = asyncio.create_task(place.signer.sign_due())
        while not place.server.calls:
            await asyncio.sleep(0.001)
        if change == "removed":
            place.cache.apply(snapshot=False, removed=["web"])
        else:
            other = (
                {"revision_number": 1} if change == "changed" else {"created_at": NOW + HOUR}
            )
            place.cache.apply(snapshot=False, entries=[replace(WEB, **other)])
        place.server.answers.set()
        assert await signing_it == 0
        assert not place.cache.svids


async def test_one_that_is_refused_does_not_stop_the_others() -> None:
    """A refused entry is put off with a growing pause; the others have their SVIDs."""
    async with a_place(refused={"w1": "no such entry"}) as place:
        place.put(*many(3))
        assert await place.signer.sign_due() == 2
        assert place.cache.svids.keys() == {"w0", "w2"}
        for _ in range(50):
            await place.signer.sign_due()
        assert place.server.asked["w1"] < 10


async def test_a_change_ends_the_pause() -> None:
    """An entry that was put off and is changed is asked for at once."""
    async with a_place(refused={"web": "not yet"}) as place:
        place.put(WEB)
        for _ in range(20):
            await place.signer.sign_due()
        place.server.refused.clear()
        place.put(replace(WEB, revision_number=1))
        assert await place.signer.sign_due() == 1


WRONG = {
    "another name": {"uris": {"web": "spiffe://example.org/other"}},
    "another trust domain": {"uris": {"web": "spiffe://evil.test/web"}},
    "no certificate": {"raw": b"x"},
    "a CA": {"raw": CA.cert.der},
    "an unknown authority": {"ca": FakeCa(which="unknown")},
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_iop_27_a_wrong_svid_is_not_taken(wrong: str) -> None:
    """IOP-27: what is not the entry's SVID, of an authority we know, is never handed out."""
    async with a_place(**WRONG[wrong]) as place:
        place.put(WEB)
        assert await place.signer.sign_due() == 0
        assert not place.cache.svids


async def test_an_authority_that_is_heard_of_later() -> None:
    """A bundle that comes after the first SVID under it ends the pause at once."""
    unknown = FakeCa(which="unknown")
    async with a_place(ca=unknown) as place:
        place.put(WEB)
        assert await place.signer.sign_due() == 0
        place.trust(CA.authority, unknown.authority)
        assert await place.signer.sign_due() == 1


async def test_another_number_of_answers() -> None:
    """Answers are matched by position; one too few is an error, and nothing is taken."""
    async with a_place(drop_result=True) as place:
        place.put(*many(3))
        with pytest.raises(InternalError):
            await place.signer.sign_due()
        assert not place.cache.svids


@pytest.mark.parametrize(
    "error",
    [ExhaustedError("slowly"), AgentDeniedError("banned", DenialReason.AGENT_BANNED)],
)
async def test_an_error_of_the_whole_call(error: SpiffeError) -> None:
    """What the server says to the whole call is told as what it is, and can be tried again."""
    async with a_place(error=error) as place:
        place.put(WEB)
        with pytest.raises(type(error)):
            await place.signer.sign_due()
        place.server.error = None
        assert await place.signer.sign_due() == 1


async def test_clocks_that_differ() -> None:
    """SEC-111: an SVID that is due as it comes is served, and not asked for all the time."""
    async with a_place() as place:
        place.put(WEB)
        place.server.clock = DrivenClock(NOW - HOUR)
        place.server.life = HOUR * 1.5  # two thirds of it are over, by our clock
        assert await place.signer.sign_due() == 1
        assert place.cache.view(WEB.selectors, {}, NOW).identities
        for _ in range(50):
            await place.signer.sign_due()
        assert place.server.asked["web"] < 10


async def test_renewed_on_demand() -> None:
    """An operator may have everything signed anew, due or not."""
    async with a_place() as place:
        place.put(*many(3))
        await place.signer.sign_due()
        before = {one.serial_number for one in place.cache.svids.values()}
        assert await place.signer.sign(list(place.cache.index.all())) == 3
        assert before.isdisjoint(one.serial_number for one in place.cache.svids.values())


async def test_idle_waits_for_what_is_under_way() -> None:
    """Before our own connections are cut, what is being signed is finished."""
    async with a_place() as place:
        place.put(WEB)
        place.server.answers.clear()
        signing_it = asyncio.create_task(place.signer.sign_due())
        while not place.server.calls:
            await asyncio.sleep(0.001)

        async def cut() -> bool:
            async with place.signer.idle():
                return "web" in place.cache.svids

        cutting = asyncio.create_task(cut())
        await asyncio.sleep(0.02)
        assert not cutting.done()
        place.server.answers.set()
        await signing_it
        assert await cutting


async def test_notes_of_the_gone_are_dropped() -> None:
    """SEC-80: years of entries that come and go leave nothing behind."""
    async with a_place(refused={f"w{n}": "no" for n in range(0, 400, 2)}) as place:
        for start in range(0, 400, 50):
            entries = many(400)[start : start + 50]
            place.put(*entries)
            await place.signer.sign_due()
            place.cache.apply(snapshot=False, removed=[one.id for one in entries])
        await place.signer.sign_due()
        for notes in (
            place.signer._renew_at,
            place.signer._put_off,
            place.signer._committed_at,
        ):
            assert len(notes) <= 64 + 50


async def test_waiting_for_something_to_do() -> None:
    """What is noted is looked at at once; without anything, after a while."""
    async with a_place() as place:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await place.signer.wanted(0.05)
        assert loop.time() - started >= 0.04
        place.signer.note(Change((WEB,)), 0)
        async with asyncio.timeout(1):
            await place.signer.wanted(30)


def test_limits() -> None:
    """SPIRE API 9, SEC-107: batches of 500, pauses up to a minute."""
    assert BATCH == 500
    assert timedelta(seconds=60) == signing.LONGEST_PAUSE
