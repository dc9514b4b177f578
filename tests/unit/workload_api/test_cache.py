"""What the agent holds, what one process gets of it, and whom a change wakes."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.spiffeid import TrustDomain
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.endpoint import a_held
from tests.support.store import TD, an_entry, some
from workload_api.cache.cache import (
    EVERYBODY,
    MAX_COMPARISONS,
    Change,
    Waiter,
    WorkloadCache,
)

CA, PARTNER = FakeCa(), FakeCa("partner.test")
MINE = some("unix:uid:1000", "unix:gid:1000")
WEB = an_entry(id="web", created_at=NOW)


def a_cache(*entries: RegistrationEntry, signed: bool = True) -> WorkloadCache:
    """A cache in step, with *entries*."""
    cache = WorkloadCache(TD)
    cache.apply(snapshot=True, entries=entries, bundles=[CA.bundle])
    for entry in entries if signed else ():
        cache.svids[entry.id] = a_held(CA, entry)
    return cache


# What one process gets


def test_the_default_identity_is_the_oldest() -> None:
    """WAPI-56: the first identity is that of the oldest entry, in whatever order they came."""
    entries = [
        an_entry(f"/w{n}", id=f"w{n}", created_at=NOW + timedelta(seconds=n)) for n in range(5)
    ]
    for order in (entries, entries[::-1], entries[2:] + entries[:2]):
        view = a_cache(*order).view(MINE, {}, NOW)
        assert [one.entry.id for one in view.identities] == ["w0", "w1", "w2", "w3", "w4"]


def test_one_of_each_hint() -> None:
    """WAPI-25, IOP-28: of two entries with one hint the older one's SVID is served."""
    older = an_entry("/older", id="b", created_at=NOW, hint="internal")
    newer = an_entry("/newer", id="a", created_at=NOW + timedelta(seconds=1), hint="internal")
    for order in ((older, newer), (newer, older)):
        view = a_cache(*order).view(MINE, {}, NOW)
        assert [one.entry.id for one in view.identities] == ["b"]


def test_an_svid_serves_until_the_next_is_signed() -> None:
    """SEC-106: after an entry changed, the old SVID of the same name serves on."""
    cache = a_cache(WEB)
    cache.apply(snapshot=False, entries=[replace(WEB, revision_number=1, dns_names=("a.b",))])
    view = cache.view(MINE, {}, NOW)
    assert len(view.identities) == 1 and not view.missing


def test_an_svid_of_another_name_does_not_serve() -> None:
    """IOP-27: once an entry has another SPIFFE ID its old SVID is not handed out."""
    cache = a_cache(WEB)
    renamed = replace(WEB, spiffe_id=an_entry("/other").spiffe_id, revision_number=1)
    cache.apply(snapshot=False, entries=[renamed])
    view = cache.view(MINE, {}, NOW)
    assert not view.identities and view.missing == (renamed,)


def test_nothing_expired_is_handed_out() -> None:
    """SEC-106: an SVID is served to its last second, and not beyond."""
    cache = a_cache(WEB)
    ends = cache.svids["web"].validity.not_after
    assert cache.view(MINE, {}, ends).identities
    view = cache.view(MINE, {}, ends + timedelta(microseconds=1))
    assert not view.identities and view.missing == (WEB,)


def test_an_expired_entry_is_nobodys() -> None:
    """SEC-36: an entry counts until its end, whether the server says so or not."""
    entry = replace(WEB, expires_at=NOW + timedelta(seconds=5))
    cache = a_cache(entry)
    view = cache.view(MINE, {}, NOW + timedelta(seconds=4))
    assert view.decision.matched and view.ends_at == entry.expires_at
    assert not cache.view(MINE, {}, NOW + timedelta(seconds=5)).decision.matched


def test_bundles_are_those_of_the_matched_entries() -> None:
    """WAPI-21, WAPI-29: our own bundle, and those that the caller's entries federate with."""
    third = FakeCa("third.test")
    cache = a_cache(
        replace(WEB, federates_with=frozenset({PARTNER.trust_domain, TrustDomain("no.test")})),
        an_entry("/x", id="x", selectors=some("unix:uid:1"),
                 federates_with=frozenset({third.trust_domain})),
    )  # fmt: skip
    cache.apply(snapshot=False, bundles=[PARTNER.bundle, third.bundle])
    assert list(cache.view(MINE, {}, NOW).bundles) == [TD, PARTNER.trust_domain]


# Changes


def test_a_snapshot_forgets_the_rest() -> None:
    """A snapshot is everything: entries, SVIDs and bundles that it does not hold are gone."""
    cache = a_cache(WEB, an_entry("/old", id="old"))
    cache.apply(snapshot=False, bundles=[PARTNER.bundle])
    change = cache.apply(snapshot=True, entries=[WEB], bundles=[CA.bundle])
    assert [one.id for one in cache.index.all()] == ["web"]
    assert set(cache.svids) == {"web"} and set(cache.bundles) == {TD}
    assert [one.id for one in change.entries] == ["old"] and change.everybody


def test_the_same_again_is_no_change() -> None:
    """WAPI-09: polling, which says everything each time, wakes nobody when nothing changed."""
    cache = a_cache(WEB)
    assert not cache.apply(snapshot=True, entries=[replace(WEB)], bundles=[CA.bundle])
    assert not cache.apply(snapshot=False, removed=["unknown"], removed_domains=[])


def test_sec_47_an_entry_made_again_under_its_id() -> None:
    """SEC-47: deleted and created with the same ID: what was signed before is not its own."""
    cache = a_cache(WEB)
    cache.apply(snapshot=False, entries=[replace(WEB, created_at=NOW + timedelta(seconds=9))])
    assert "web" not in cache.svids


def test_a_bundle_that_cannot_be_read_is_kept() -> None:
    """IOP-26: one whose new form breaks a rule stays as it was, in a snapshot too."""
    cache = a_cache(WEB)
    cache.apply(snapshot=False, bundles=[PARTNER.bundle])
    cache.apply(
        snapshot=True, bundles=[], unread_domains=[PARTNER.trust_domain, TrustDomain("x.test")]
    )
    assert set(cache.bundles) == {TD, PARTNER.trust_domain}


@pytest.mark.parametrize(
    "said", [{"snapshot": True}, {"snapshot": False, "removed_domains": [TD]},
             {"snapshot": False, "bundles": [Bundle(TD)]}]
)  # fmt: skip
def test_our_own_bundle_is_never_given_up(said: dict[str, object]) -> None:
    """SEC-57: without it, or with an empty one, the server could not be known any more."""
    cache = a_cache(WEB)
    cache.apply(**said)
    assert cache.bundles[TD] == CA.bundle


def test_an_empty_foreign_bundle_is_taken() -> None:
    """WAPI-31: a partner without authorities is trusted with nothing: that is an update."""
    cache = a_cache(WEB)
    cache.apply(snapshot=False, bundles=[PARTNER.bundle])
    assert cache.apply(snapshot=False, bundles=[Bundle(PARTNER.trust_domain)]).everybody
    assert not cache.bundles[PARTNER.trust_domain].x509_authorities


def test_wiped() -> None:
    """SEC-52: a banned agent holds nothing, and says that it is not ready."""
    cache = a_cache(WEB)
    cache.wipe()
    assert not len(cache.index) and not cache.svids and not cache.bundles and not cache.ready


entry_ids = st.sampled_from(["a", "b", "c", "d"])
changes = st.lists(
    st.tuples(st.booleans(), st.dictionaries(entry_ids, st.integers(0, 2)), st.sets(entry_ids)),
    max_size=8,
)


@given(changes)
def test_any_sequence_of_changes(
    steps: list[tuple[bool, dict[str, int], set[str]]],
) -> None:
    """Whatever is said in whatever order: entries are what was said; no SVID is left over."""
    cache = WorkloadCache(TD)
    expected: dict[str, RegistrationEntry] = {}
    for snapshot, put, removed in steps:
        entries = [
            an_entry(f"/{name}{revision}", id=name, revision_number=revision, created_at=NOW)
            for name, revision in put.items()
        ]
        before = dict(expected)
        change = cache.apply(
            snapshot=snapshot, entries=entries, removed=() if snapshot else removed
        )
        expected = {} if snapshot else expected
        expected = {**expected, **{one.id: one for one in entries}}
        for name in () if snapshot else removed:
            expected.pop(name, None)
        assert {one.id: one for one in cache.index.all()} == expected
        assert set(cache.svids) <= set(expected)
        differ = {
            one
            for one in before.keys() | expected.keys()
            if before.get(one) != expected.get(one)
        }
        assert differ <= {one.id for one in change.entries}
        for entry in expected.values():
            cache.svids.setdefault(entry.id, a_held(CA, WEB))


# Who is woken


def woken(cache: WorkloadCache, change: Change, *selectors: object) -> list[bool]:
    """Which of several waiters *change* wakes."""
    waiters = [Waiter(one) for one in selectors]
    cache._waiters.update(waiters)
    cache.wake(change, 7)
    cache._waiters.clear()
    return [one._changed.is_set() for one in waiters]


def test_a_change_wakes_whom_it_concerns() -> None:
    """Those who match the entry as it is or as it was are woken; so is who is not known yet."""
    others = some("unix:uid:2")
    entries = Change((WEB,))
    assert woken(a_cache(), entries, MINE, others, None, frozenset()) == [
        True,
        False,
        True,
        False,
    ]
    both = Change((WEB, replace(WEB, selectors=others)))
    assert woken(a_cache(), both, MINE, others) == [True, True]
    assert woken(a_cache(), EVERYBODY, MINE, others, frozenset()) == [True] * 3
    assert woken(a_cache(), Change(), MINE, None) == [False, False]


def test_a_large_change_wakes_all() -> None:
    """Beyond a number of comparisons everybody looks for himself."""
    entries = tuple(replace(WEB, id=f"e{n}") for n in range(MAX_COMPARISONS // 2 + 1))
    others = some("unix:uid:2")
    assert woken(a_cache(), Change(entries), others, others) == [True, True]


async def test_many_changes_are_one_look() -> None:
    """SEC-83: who is slow is woken once for all that happened; the oldest commit counts."""
    cache = a_cache()
    with cache.waiter() as waiter:
        assert cache.streams == 1
        for committed_at in (5, 6, 7):
            cache.wake(EVERYBODY, committed_at)
        assert await waiter.wait() == 5
        waiting = asyncio.ensure_future(waiter.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        cache.wake(EVERYBODY, 8)
        assert await waiting == 8
    assert cache.streams == 0


async def test_a_wait_that_is_given_up_loses_nothing() -> None:
    """A change that comes in the very step in which a wait is cancelled is not lost."""
    waiter = Waiter()
    waiting = asyncio.ensure_future(waiter.wait())
    await asyncio.sleep(0)
    waiter.wake(3)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(1):
        assert await waiter.wait() == 3
