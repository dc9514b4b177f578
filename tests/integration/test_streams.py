"""
Streams of the Workload API: what wakes them, what they send, how they end.

The servicer, the front door and the kernel's word for who calls are real; entries and SVIDs are
put into the cache by hand, so that each change comes alone.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import os
import random
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest

from spiffe_core.bundle import Bundle
from spiffe_wire.pb import workloadapi_pb2_grpc
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.children import open_files
from tests.support.endpoint import (
    SELECTOR,
    Endpoint,
    an_endpoint,
    ending,
    fetch,
    read,
    says_nothing,
)
from tests.support.store import an_entry, some
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.unix import UnixAttestor
from workload_api.cache.cache import EVERYBODY
from workload_api.endpoint import workload
from workload_api.endpoint.following import Callers

WEB = an_entry(id="web", created_at=NOW)
API = an_entry("/api", id="api", created_at=NOW + timedelta(seconds=1))
STRANGER = an_entry("/stranger", id="stranger", selectors=some("unix:uid:4242"))
PARTNER = FakeCa("partner.test")
STREAMS = ["FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"]


def ids(message: object) -> list[str]:
    """The SPIFFE IDs of a message, in its order."""
    return [one.spiffe_id for one in message.svids]


# The first message


@pytest.mark.parametrize("method", STREAMS)
async def test_the_first_message_comes_at_once(method: str) -> None:
    """WAPI-10: what is known is sent at once, on every stream, on each new connection."""
    async with an_endpoint() as endpoint:
        endpoint.put(WEB)
        for _ in range(3):
            async with endpoint.stub() as stub:
                assert await read(fetch(stub, method), within=1)


async def test_the_first_message_does_not_wait_long_for_the_rest() -> None:
    """WAPI-10: an entry that cannot be signed for does not keep the others back for long."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        endpoint.put(API, signed=False)
        assert ids(await read(fetch(stub), within=1)) == [WEB.spiffe_id.uri]


async def test_the_first_message_waits_a_moment_for_the_rest() -> None:
    """WAPI-08: an SVID that is just being signed is in the first message."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        endpoint.put(API, signed=False)
        call = fetch(stub)
        await asyncio.sleep(0.05)
        endpoint.renew(API)
        assert ids(await read(call)) == [WEB.spiffe_id.uri, API.spiffe_id.uri]


async def test_bundles_do_not_wait_for_an_svid() -> None:
    """WAPI-10: who is entitled gets bundles at once, though his SVID cannot be signed now."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB, signed=False)
        for method in STREAMS[1:]:
            assert (await read(fetch(stub, method), within=1)).bundles


async def test_the_first_svid_is_waited_for() -> None:
    """WEP-19: whose first SVID is not signed in time is told to try again, not denied."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB, signed=False)
        call = fetch(stub)
        assert await says_nothing(call)
        call = fetch(stub)
        await asyncio.sleep(0.05)
        endpoint.renew(WEB)
        assert ids(await read(call)) == [WEB.spiffe_id.uri]


async def test_a_first_svid_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEP-19: an SVID that is not there in five seconds: UNAVAILABLE, try again."""
    monkeypatch.setattr(workload, "FIRST_SVID_SECONDS", 0.05)
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB, signed=False)
        assert await ending(fetch(stub)) == (
            grpc.StatusCode.UNAVAILABLE,
            "the identity is being signed; try again",
        )


# Updates


async def test_every_change_is_sent_whole() -> None:
    """WAPI-08, WAPI-09: entries, renewals and bundles each bring the full state at once."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        first = await read(call)
        endpoint.put(API)
        second = await read(call, within=1)
        assert ids(second) == [WEB.spiffe_id.uri, API.spiffe_id.uri]
        endpoint.renew(API)
        third = await read(call, within=1)
        assert third.svids[0].x509_svid == first.svids[0].x509_svid
        assert third.svids[1].x509_svid != second.svids[1].x509_svid
        root = FakeCa(which="next").authority
        bundle = replace(endpoint.ca.bundle, x509_authorities=(endpoint.ca.authority, root))
        endpoint.cache.wake(endpoint.cache.apply(snapshot=False, bundles=[bundle]))
        fourth = await read(call, within=1)
        assert ids(fourth) == ids(third)
        assert {one.bundle for one in fourth.svids} == {endpoint.ca.authority.der + root.der}
        endpoint.drop(API)
        assert ids(await read(call, within=1)) == [WEB.spiffe_id.uri]


@pytest.mark.parametrize("method", STREAMS)
async def test_nothing_is_said_twice(method: str) -> None:
    """WAPI-09: a change that concerns a caller in no way he can see sends him nothing."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(replace(WEB, federates_with=frozenset({PARTNER.trust_domain})))
        endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        call = fetch(stub, method)
        await read(call)
        endpoint.put(STRANGER)
        endpoint.cache.wake(EVERYBODY)
        same = replace(endpoint.ca.bundle, sequence_number=9)
        endpoint.cache.wake(endpoint.cache.apply(snapshot=False, bundles=[same]))
        assert await says_nothing(call)


async def test_federated_bundles_come_and_go() -> None:
    """WAPI-08, WAPI-21, WAPI-31: a partner's bundle is there while an entry names it."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        endpoint.put(WEB)
        calls = [fetch(stub, method) for method in STREAMS]
        first = [await read(call) for call in calls]
        assert not first[0].federated_bundles
        federated = replace(
            WEB, federates_with=frozenset({PARTNER.trust_domain}), revision_number=1
        )
        endpoint.put(federated)
        messages = [await read(call, within=1) for call in calls]
        assert dict(messages[0].federated_bundles) == {
            "spiffe://partner.test": PARTNER.authority.der
        }
        for message in messages[1:]:
            assert set(message.bundles) == {"spiffe://example.org", "spiffe://partner.test"}
        endpoint.cache.wake(
            endpoint.cache.apply(snapshot=False, removed_domains=[PARTNER.trust_domain])
        )
        messages = [await read(call, within=1) for call in calls]
        assert not messages[0].federated_bundles
        assert set(messages[1].bundles) == set(messages[2].bundles) == {"spiffe://example.org"}


async def test_bundle_updates_do_not_wait_for_an_svid() -> None:
    """WAPI-09: a caller whose SVID ran out while nobody signs still hears of bundles."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub, "FetchX509Bundles")
        await read(call)
        endpoint.cache.svids.clear()
        root = FakeCa(which="next").authority
        bundle = replace(endpoint.ca.bundle, x509_authorities=(root,))
        endpoint.cache.wake(endpoint.cache.apply(snapshot=False, bundles=[bundle]))
        message = await read(call, within=1)
        assert message.bundles["spiffe://example.org"] == root.der


async def test_a_renamed_entry() -> None:
    """IOP-27: the old name is gone at once; the new one comes when it is signed."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB, API)
        call = fetch(stub)
        assert len(ids(await read(call))) == 2
        renamed = replace(WEB, spiffe_id=an_entry("/renamed").spiffe_id, revision_number=1)
        endpoint.put(renamed, signed=False)
        assert ids(await read(call)) == [API.spiffe_id.uri]
        endpoint.renew(renamed)
        assert ids(await read(call)) == [renamed.spiffe_id.uri, API.spiffe_id.uri]


async def test_an_answer_that_would_break_a_rule_is_withheld() -> None:
    """WAPI-15, IOP-26: what cannot be built right is not sent: the last good state stands."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        good = endpoint.cache.svids["web"]
        endpoint.cache.svids["web"] = replace(good, chain=(b"0\x00",), serial_number=2**150)
        endpoint.cache.wake(EVERYBODY)
        assert await says_nothing(call)
        other = fetch(stub)
        assert await ending(other) == (
            grpc.StatusCode.UNAVAILABLE,
            "the answer is not ready; try again",
        )
        endpoint.renew(WEB)
        assert ids(await read(fetch(stub))) == [WEB.spiffe_id.uri]


# Being entitled no more


@pytest.mark.parametrize("method", STREAMS)
async def test_losing_the_last_entry_ends_the_stream(method: str) -> None:
    """SEC-36, WAPI-27, IOP-09: no empty answer: the stream ends with PERMISSION_DENIED."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub, method)
        await read(call)
        endpoint.drop(WEB)
        code, text = await ending(call, within=1)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert text.startswith("no identity issued: no registration entry matches this process")


async def test_an_entry_that_asks_for_others_now() -> None:
    """SEC-36: an entry whose selectors change is lost to those who matched it before."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        endpoint.put(replace(WEB, selectors=STRANGER.selectors, revision_number=1))
        assert (await ending(call, within=1))[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("method", STREAMS)
async def test_no_entry_no_answer(method: str) -> None:
    """WEP-21, WAPI-27, WAPI-30, WAPI-42: a caller without an entry: PERMISSION_DENIED."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(STRANGER)
        code, text = await ending(fetch(stub, method))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "4242" not in text and "stranger" not in text


async def test_an_entry_that_expires_ends_the_stream() -> None:
    """SEC-36: an entry's end is known in advance, so nothing has to come for it to count."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(replace(WEB, expires_at=NOW + timedelta(milliseconds=300)))
        call = fetch(stub)
        await read(call)
        endpoint.clock.advance(timedelta(milliseconds=300))
        code, _ = await ending(call, within=2)
        assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_ban_ends_every_stream() -> None:
    """SEC-36, SEC-52: when the agent forgets everything its streams end, at once and denied."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        calls = [fetch(stub, method) for method in STREAMS]
        for call in calls:
            await read(call)
        endpoint.cache.wipe()
        for call in calls:
            assert (await ending(call, within=1))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert (await ending(fetch(stub)))[0] is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("method", STREAMS)
async def test_a_stopping_agent_says_unavailable(method: str) -> None:
    """IOP-10, WEP-19: streams of an agent that stops end with UNAVAILABLE, never with OK."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub, method)
        await read(call)
        endpoint.callers.stop()
        assert (await ending(call, within=1))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await ending(fetch(stub, method)))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_stopping_agent_lets_go_of_the_held() -> None:
    """IOP-10: a caller who is held without an identity is told to come back, not denied."""
    async with an_endpoint(grace=timedelta(seconds=30)) as endpoint, endpoint.stub() as stub:
        call = fetch(stub)
        assert await says_nothing(call, 0.05)
        call = fetch(stub)
        await asyncio.sleep(0.05)
        endpoint.callers.stop()
        assert (await ending(call, within=1))[0] is grpc.StatusCode.UNAVAILABLE


# Attestation again and again


async def test_attested_before_each_push() -> None:
    """SEC-36: whoever is sent something was attested after the change, and not only before."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        for count in range(2, 6):
            endpoint.renew(WEB)
            await read(call)
            assert endpoint.told.calls == count


async def test_a_process_that_became_another_gets_no_push() -> None:
    """SEC-36: a caller that no longer is what it was gets PERMISSION_DENIED, not the update."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        endpoint.told.selectors = STRANGER.selectors
        endpoint.renew(WEB)
        assert (await ending(call, within=1))[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_a_process_that_became_another_is_noticed_by_itself() -> None:
    """SEC-36: attestation is repeated though nothing changes."""
    interval = timedelta(milliseconds=50)
    async with an_endpoint(reattest_interval=interval) as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB, STRANGER)
        call = fetch(stub)
        assert ids(await read(call)) == [WEB.spiffe_id.uri]
        endpoint.told.selectors |= STRANGER.selectors
        assert len(ids(await read(call, within=1))) == 2
        endpoint.told.selectors = STRANGER.selectors
        assert ids(await read(call, within=1)) == [STRANGER.spiffe_id.uri]
        endpoint.told.selectors = frozenset()
        assert (await ending(call, within=1))[0] is grpc.StatusCode.PERMISSION_DENIED


def test_the_interval_is_half_a_minute() -> None:
    """SEC-36: every 30 s, unless a test says otherwise."""
    assert Callers.reattest_interval == timedelta(seconds=30)


async def test_attestation_that_fails_later() -> None:
    """WEP-19: when nobody can vouch for a caller any more it is told to come back."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        endpoint.told.error = AttestationError("the kubelet does not answer")
        endpoint.renew(WEB)
        code, text = await ending(call, within=1)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "the kubelet does not answer" in text


async def test_a_change_that_comes_while_it_is_attested() -> None:
    """No wake-up is lost: what changes between the attestation's start and end is sent."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        endpoint.told.answers.clear()
        endpoint.renew(WEB)
        while endpoint.told.calls < 2:
            await asyncio.sleep(0.001)
        endpoint.put(API)  # while the caller is being attested for the first change
        endpoint.told.answers.set()
        seen = ids(await read(call))
        while API.spiffe_id.uri not in seen:
            seen = ids(await read(call, within=1))


async def test_a_new_selector_and_its_entry_at_once() -> None:
    """No wake-up is lost: an entry for what is only being learnt is not missed."""
    interval = timedelta(milliseconds=50)
    async with an_endpoint(reattest_interval=interval) as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        await read(call)
        endpoint.told.answers.clear()
        while endpoint.told.calls < 2:
            await asyncio.sleep(0.001)
        endpoint.told.selectors |= STRANGER.selectors
        endpoint.put(STRANGER)  # does not concern what was known of the caller so far
        endpoint.told.answers.set()
        assert len(ids(await read(call, within=1))) == 2


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_the_last_state_arrives(seed: int) -> None:
    """WAPI-08, WAPI-09: after any storm of changes the last message is the last state."""
    rng = random.Random(seed)
    entries = [an_entry(f"/w{n}", id=f"w{n}", created_at=NOW) for n in range(5)]
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        call = fetch(stub)
        last = await read(call)
        for _ in range(60):
            entry = rng.choice(entries)
            rng.choice([endpoint.put, endpoint.drop])(entry)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() / 500)
        view = endpoint.cache.view(endpoint.told.selectors, {}, NOW)
        expected = endpoint.servicer.responses.x509_svids(view)
        while last.SerializeToString(deterministic=True) != expected:
            last = await read(call, within=2)
        assert await says_nothing(call)


# A thousand streams


async def test_a_change_wakes_whom_it_concerns() -> None:
    """A change costs nothing to streams that it does not concern: they are not attested."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        calls = [fetch(stub) for _ in range(100)]
        for call in calls:
            await read(call)
        before = endpoint.told.calls
        for number in range(20):
            endpoint.put(replace(STRANGER, id=f"s{number}"))
        await asyncio.sleep(0.1)
        assert endpoint.told.calls == before > 0
        endpoint.renew(WEB)
        await asyncio.gather(*(read(call) for call in calls))
        assert endpoint.told.calls > before


async def test_sec_107_a_thousand_workloads_come_back() -> None:
    """SEC-107: a thousand streams that come at once, attested for real, are served in 10 s."""
    me = some(f"unix:uid:{os.geteuid()}")
    async with an_endpoint(attestors=[UnixAttestor()]) as endpoint:
        endpoint.put(replace(WEB, selectors=me), STRANGER)
        async with contextlib.AsyncExitStack() as channels:
            stubs = [await channels.enter_async_context(endpoint.stub()) for _ in range(10)]
            async with asyncio.timeout(10):
                calls = [fetch(stub) for stub in stubs for _ in range(100)]
                for call in calls:
                    assert ids(await read(call)) == [WEB.spiffe_id.uri]
            assert endpoint.cache.streams == 1000
            loop = asyncio.get_running_loop()
            started = loop.time()
            for number in range(100):  # changes that concern none of them cost next to nothing
                endpoint.put(replace(STRANGER, id=f"s{number}"))
            await asyncio.sleep(0)
            assert loop.time() - started < 1
            endpoint.renew(endpoint.cache.index.get("web"))
            for call in calls:
                await read(call)
            del calls, call


async def test_streams_that_end_leave_nothing() -> None:
    """Streams that a client cancels, or whose connection it closes, leave no waiter or file."""
    async with an_endpoint() as endpoint:
        endpoint.put(WEB)
        async with endpoint.stub() as stub:
            await read(fetch(stub))
        await _settled(endpoint)
        before = open_files()
        for _ in range(10):
            async with endpoint.stub() as stub:
                calls = [fetch(stub, method) for method in STREAMS * 3]
                for call in calls:
                    await read(call)
                calls[0].cancel()
                endpoint.renew(WEB)
            del calls, call  # they hold their connection
        await _settled(endpoint)
        assert open_files() <= before


async def _settled(endpoint: Endpoint) -> None:
    async with asyncio.timeout(5):
        while endpoint.cache.streams or endpoint.door.connections:
            await asyncio.sleep(0.01)


async def test_a_caller_who_is_cancelled_while_attested() -> None:
    """A caller that goes away in the middle of its attestation leaves no slot and no waiter."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        endpoint.told.answers.clear()
        calls = [fetch(stub) for _ in range(40)]
        while endpoint.told.calls < 24:
            await asyncio.sleep(0.001)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(5):
            while endpoint.cache.streams:
                await asyncio.sleep(0.01)
        assert endpoint.callers.attestation.slots.held == 0
        endpoint.told.answers.set()
        assert await read(fetch(stub))


# A slow reader


async def test_sec_83_a_slow_reader_gets_the_newest() -> None:
    """SEC-83: who reads slowly finds the newest state, not every one that he missed."""
    async with an_endpoint() as endpoint:
        roots = tuple(FakeCa(which=f"big {n}").authority for n in range(60))
        big = Bundle(endpoint.ca.trust_domain, roots)  # some 30 KiB in each message
        endpoint.cache.apply(snapshot=False, bundles=[big])
        endpoint.put(WEB)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0),
                   ("grpc.http2.lookahead_bytes", 64 * 1024)]  # fmt: skip
        async with grpc.aio.insecure_channel(f"unix:{endpoint.socket}", options) as channel:
            call = fetch(workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel))
            await read(call)
            for _ in range(300):
                endpoint.renew(WEB)
                await asyncio.sleep(0.001)
            newest = endpoint.cache.svids["web"].chain[0]
            count = 1
            while (await read(call, within=2)).svids[0].x509_svid != newest:
                count += 1
        assert count < 50


# Held without an identity


GRACE = timedelta(milliseconds=200)


async def test_held_until_the_entry_comes() -> None:
    """WEP-22: a caller that comes shortly before its entry is answered when the entry comes."""
    async with an_endpoint(grace=timedelta(seconds=5)) as endpoint, endpoint.stub() as stub:
        call = fetch(stub)
        reading = asyncio.ensure_future(call.read())
        done, _ = await asyncio.wait([reading], timeout=0.1)
        assert not done
        endpoint.put(WEB, signed=False)
        done, _ = await asyncio.wait([reading], timeout=0.05)
        assert not done
        endpoint.renew(WEB)
        async with asyncio.timeout(0.5):
            assert ids(await reading) == [WEB.spiffe_id.uri]


async def test_held_no_longer_than_said() -> None:
    """WEP-21: when no entry comes in time the answer is PERMISSION_DENIED."""
    async with an_endpoint(grace=GRACE) as endpoint, endpoint.stub() as stub:
        loop = asyncio.get_running_loop()
        started = loop.time()
        code, _ = await ending(fetch(stub))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert 0.2 <= loop.time() - started < 1


@pytest.mark.parametrize("method", STREAMS[1:])
async def test_other_streams_are_not_held(method: str) -> None:
    """WAPI-30, WAPI-42: only FetchX509SVID is held; the others are denied at once."""
    async with an_endpoint(grace=timedelta(seconds=30)) as endpoint, endpoint.stub() as stub:
        code, _ = await ending(fetch(stub, method), within=1)
        assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_held_callers_hold_no_slot() -> None:
    """SEC-81: any number of callers that are held keep nobody from being attested."""
    async with an_endpoint(grace=timedelta(seconds=30)) as endpoint, endpoint.stub() as stub:
        calls = [fetch(stub) for _ in range(60)]
        while endpoint.servicer._held.total() < 60:
            await asyncio.sleep(0.001)
        assert endpoint.callers.attestation.slots.held == 0
        endpoint.put(WEB)
        for call in calls:
            assert await read(call, within=1)


async def test_only_so_many_of_a_user_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-80, SEC-81: one user's callers are held up to a number; above it denied at once."""
    monkeypatch.setattr(workload, "HELD_PER_UID", 3)
    async with an_endpoint(grace=timedelta(seconds=30)) as endpoint, endpoint.stub() as stub:
        held = [fetch(stub) for _ in range(3)]
        while endpoint.servicer._held.total() < 3:
            await asyncio.sleep(0.001)
        code, _ = await ending(fetch(stub), within=1)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        held[0].cancel()
        async with asyncio.timeout(2):
            while endpoint.servicer._held.total() > 2:
                await asyncio.sleep(0.001)
        late = fetch(stub)
        await asyncio.sleep(0.05)
        endpoint.put(WEB)
        for call in (*held[1:], late):
            assert await read(call, within=1)
        assert not endpoint.servicer._held


async def test_changes_for_others_do_not_end_the_grace() -> None:
    """A held caller is woken by what concerns it, and others' changes cost it nothing."""
    async with an_endpoint(grace=timedelta(seconds=5)) as endpoint, endpoint.stub() as stub:
        call = fetch(stub)
        while endpoint.told.calls < 1:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        for number in range(50):
            endpoint.put(replace(STRANGER, id=f"s{number}"))
            await asyncio.sleep(0)
        assert endpoint.told.calls == 1
        endpoint.put(WEB)
        assert await read(call, within=1)


async def test_not_in_step_yet() -> None:
    """WEP-19: before the first word of the server every method answers UNAVAILABLE."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(WEB)
        endpoint.cache.ready = False
        for method in STREAMS:
            code, text = await ending(fetch(stub, method))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert text == "the agent has not heard from its server yet"


def test_selectors_of_these_tests() -> None:
    """The entries of these tests ask for what the callers have, but for the stranger's."""
    assert {str(one) for one in WEB.selectors} == {SELECTOR}
    assert {str(one) for one in STRANGER.selectors} == {"unix:uid:4242"}
