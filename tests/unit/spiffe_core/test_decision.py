"""The decision: which entries a process gets, and why not the others (architecture A3)."""

import itertools
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.decision import MAX_NEAR_MISSES, Decision, age, decide
from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector
from tests.support.store import NOW, TD, an_entry, an_id, node_id, some

SECOND = timedelta(seconds=1)
UID = "unix:uid:1000"


def wanting(*selectors: str, **changes: Any) -> RegistrationEntry:
    """An entry that asks for *selectors*."""
    return an_entry(selectors=some(*selectors), **changes)


def decided(have: Sequence[str], *entries: RegistrationEntry, **changes: Any) -> Decision:
    """The decision for a process with the selectors *have*."""
    return decide(some(*have), entries, **{"at": NOW, **changes})


def test_an_entry_matches_when_all_it_asks_for_was_attested() -> None:
    """Every selector of the entry must be there; more of the process does no harm."""
    entry = wanting(UID, "unix:gid:7")
    assert decided([UID, "unix:gid:7"], entry).matched == (entry,)
    assert decided([UID, "unix:gid:7", "unix:path:/bin/x"], entry).matched == (entry,)
    assert decided([UID], entry).matched == ()
    assert decided([], entry).matched == ()


@pytest.mark.parametrize(
    ("have", "entries", "reason"),
    [
        ([UID], [wanting(UID)], "identity"),
        ([UID], [wanting("unix:uid:0")], "no_match"),
        ([UID], [wanting(UID, expires_at=NOW)], "no_match"),
        ([UID], [], "no_entries"),
        ([UID], [wanting(UID, parent_id=TD.server_id)], "no_entries"),
        ([], [wanting(UID)], "attestation_failed"),
        ([], [], "attestation_failed"),
    ],
)
def test_reason(have: list[str], entries: list[RegistrationEntry], reason: str) -> None:
    """The one word for programs says which of the four outcomes it is."""
    assert decided(have, *entries).reason == reason


# --- near misses ---


@pytest.mark.parametrize(
    ("wanted", "have", "changes", "text"),
    [
        (
            ["unix:uid:1001"],
            [UID],
            {},
            "the entry wants unix:uid:1001, the process has unix:uid:1000",
        ),
        (
            [UID, "unix:path:/bin/a"],
            [UID, "unix:path:/bin/b", "unix:gid:7"],
            {},
            "the entry wants unix:path:/bin/a, the process has unix:path:/bin/b",
        ),
        (
            [UID, "docker:label:x"],
            [UID],
            {},
            "the entry wants docker:label:x, which the process does not have",
        ),
        (
            ["unix:supplementary_gid:9"],
            ["unix:supplementary_gid:1", "unix:supplementary_gid:2"],
            {},
            "the entry wants unix:supplementary_gid:9, which the process does not have",
        ),
        (
            ["docker:a", "docker:b"],
            [UID],
            {},
            "the entry wants docker:a, docker:b, which the process does not have",
        ),
        (
            ["unix:uid:1001", "docker:a"],
            [UID],
            {},
            "the entry wants docker:a, unix:uid:1001, which the process does not have",
        ),
        ([UID], [UID], {"expires_at": NOW - SECOND}, "the entry has expired"),
        (
            ["unix:uid:0"],
            [UID],
            {"expires_at": NOW},
            "the entry wants unix:uid:0, the process has unix:uid:1000; the entry has expired",
        ),
    ],
)
def test_the_one_fact_that_differs(
    wanted: list[str], have: list[str], changes: dict[str, Any], text: str
) -> None:
    """A near miss names what stood in the way, with both values when there are two."""
    decision = decided(have, wanting(*wanted, **changes))
    (miss,) = decision.near_misses
    assert decision.matched == ()
    assert miss.difference == text
    assert set(miss.missing) == some(*wanted) - some(*have)
    assert miss.expired is ("expires_at" in changes)


def test_the_nearest_come_first() -> None:
    """Fewest facts missing first; among equals those with another value of the same kind."""
    expired = wanting(UID, id="expired", expires_at=NOW)
    other_uid = wanting("unix:uid:0", id="other-uid")
    absent = wanting("docker:x", id="absent")
    two = wanting("docker:x", "docker:y", id="two")
    entries = [two, absent, other_uid, expired]
    for order in itertools.permutations(entries):
        misses = decided([UID], *order).near_misses
        assert [one.entry.id for one in misses] == ["expired", "other-uid", "absent", "two"]


def test_five_near_misses_are_enough() -> None:
    """However many entries there are, the trace keeps the five nearest and counts all."""
    entries = [wanting(*[f"docker:{n}" for n in range(count + 1)]) for count in range(20)]
    random.Random(5).shuffle(entries)
    decision = decided([UID], *entries)
    assert [len(one.missing) for one in decision.near_misses] == [1, 2, 3, 4, 5]
    assert MAX_NEAR_MISSES == 5
    assert decision.considered == 20


def test_a_match_is_no_near_miss() -> None:
    """What matched is not listed among what did not."""
    good, bad = wanting(UID, id="good"), wanting("unix:uid:0", id="bad")
    decision = decided([UID], good, bad)
    assert decision.matched == (good,)
    assert [one.entry for one in decision.near_misses] == [bad]


# --- expiry ---


@pytest.mark.parametrize(
    ("expires_at", "matches"),
    [(None, True), (NOW + SECOND, True), (NOW, False), (NOW - SECOND, False)],
)
def test_an_expired_entry_authorizes_nobody(expires_at: datetime | None, matches: bool) -> None:
    """SPIRE API 5.1: an entry matches until its end, and not at it."""
    assert bool(decided([UID], wanting(UID, expires_at=expires_at)).matched) is matches


# --- partial knowledge ---


def test_sec_35_what_an_attestor_did_not_say_matches_nothing() -> None:
    """An entry that asks for a fact of a failed attestor does not match."""
    entry = wanting(UID, "docker:label:x")
    decision = decided([UID], entry, partial={"docker": "the daemon does not answer"})
    assert decision.matched == ()
    assert decision.partial == {"docker": "the daemon does not answer"}


def test_sec_35_unknown_is_told_from_false() -> None:
    """A near miss says that a fact is unknown, and does not claim that it is not so."""
    entry = wanting(UID, "docker:label:x")
    (unknown,) = decided([UID], entry, partial={"docker": "down"}).near_misses
    (false,) = decided([UID], entry).near_misses
    assert unknown.unknown == (Selector.parse("docker:label:x"),)
    assert unknown.difference == (
        "the entry wants docker:label:x, for which no attestor could vouch"
    )
    assert false.unknown == ()
    assert false.difference == "the entry wants docker:label:x, which the process does not have"


def test_sec_35_unknown_beside_false() -> None:
    """With one fact false and one unknown, both are named for what they are."""
    entry = wanting("unix:uid:0", "docker:x")
    (miss,) = decided([UID], entry, partial={"docker": "down"}).near_misses
    assert miss.difference == (
        "the entry wants unix:uid:0, the process has unix:uid:1000; "
        "the entry wants docker:x, for which no attestor could vouch"
    )


def test_sec_35_the_rest_still_counts() -> None:
    """An entry that does not ask the failed attestor matches, and the decision stays marked."""
    entry = wanting(UID)
    decision = decided([UID], entry, partial={"docker": "down"})
    assert decision.matched == (entry,)
    assert decision.partial == {"docker": "down"}


def test_the_trace_is_kept_apart_from_its_source() -> None:
    """What the attestors said later does not change a decision that was taken."""
    partial = {"docker": "down"}
    decision = decided([UID], wanting(UID), partial=partial)
    partial["unix"] = "x"
    assert decision.partial == {"docker": "down"}


# --- hints ---


def dated(id_: str, age_seconds: int, **changes: Any) -> RegistrationEntry:
    """A matching entry made *age_seconds* ago."""
    created = NOW - timedelta(seconds=age_seconds)
    return wanting(UID, id=id_, spiffe_id=an_id(f"/{id_}"), created_at=created, **changes)


def test_iop_28_the_older_of_two_equal_hints_stays() -> None:
    """WAPI-25, WAPI-36: with one hint twice, the SVID of the older entry is given."""
    old, new = dated("old", 60, hint="internal"), dated("new", 1, hint="internal")
    for order in itertools.permutations([old, new]):
        decision = decided([UID], *order)
        assert decision.matched == (old,)
        assert decision.dropped_hints == (new,)


def test_iop_28_the_same_survivor_on_every_call() -> None:
    """Entries of one second go by their ids, so every call keeps the same one."""
    twins = [dated(name, 5, hint="h") for name in "cab"]
    for order in itertools.permutations(twins):
        assert [one.id for one in decided([UID], *order).matched] == ["a"]


def test_no_hint_is_no_clash() -> None:
    """WAPI-25: entries without a hint, or with different ones, all stay."""
    entries = [dated("a", 4), dated("b", 3), dated("c", 2, hint="x"), dated("d", 1, hint="X")]
    decision = decided([UID], *entries)
    assert decision.matched == tuple(entries)
    assert decision.dropped_hints == ()


def test_a_hint_clashes_among_matches_alone() -> None:
    """An older entry with the hint that is not this process's, or has expired, drops nobody."""
    mine = dated("mine", 1, hint="h")
    foreign = wanting("unix:uid:0", id="foreign", hint="h", created_at=NOW - 9 * SECOND)
    expired = dated("expired", 60, hint="h", expires_at=NOW)
    decision = decided([UID], foreign, expired, mine)
    assert decision.matched == (mine,)
    assert decision.dropped_hints == ()


# --- order ---


def test_wapi_56_the_oldest_is_first_in_any_order() -> None:
    """The default identity is the oldest entry's, however the candidates arrive."""
    entries = [dated("c", 90), dated("b", 60), dated("d", 60), dated("a", 5)]
    for order in itertools.permutations(entries):
        assert [one.id for one in decided([UID], *order).matched] == ["c", "b", "d", "a"]


def test_wapi_56_a_new_entry_does_not_change_the_default() -> None:
    """An entry that is added, or an update of one, leaves the first identity the first."""
    first, second = dated("z", 60), dated("y", 30)
    assert decided([UID], first, second).matched[0] == first
    updated = dated("z", 60, hint="h", revision_number=4)
    added = dated("a", 0)
    assert [one.id for one in decided([UID], added, second, updated).matched] == ["z", "y", "a"]


def test_an_entry_of_no_known_age_is_the_youngest() -> None:
    """An entry that was not stored yet never takes the first place from one that was."""
    unknown, old = wanting(UID, id="a"), dated("z", 60)
    assert decided([UID], unknown, old).matched == (old, unknown)
    assert age(old) < age(unknown)


# --- node aliases ---


def test_no_process_gets_a_node_alias() -> None:
    """SPIRE API 5.1.1: an entry that names nodes is no identity, and is not counted."""
    alias = wanting(UID, id="alias", parent_id=TD.server_id)
    entry = wanting(UID, id="entry", parent_id=node_id("a"))
    decision = decided([UID], alias, entry)
    assert decision.matched == (entry,)
    assert (decision.considered, decision.near_misses) == (1, ())


# --- brute force ---

SELECTORS = [f"{type_}:{kind}:{value}" for type_ in "ab" for kind in "xy" for value in "12"]
ENTRIES = st.builds(
    lambda wanted, born, dies, hint, alias, number: an_entry(
        id=f"e{number}",
        selectors=some(*wanted),
        created_at=None if born is None else NOW - timedelta(seconds=born),
        expires_at=None if dies is None else NOW + timedelta(seconds=dies),
        hint=hint,
        parent_id=TD.server_id if alias else node_id("a"),
    ),
    st.sets(st.sampled_from(SELECTORS), min_size=1, max_size=4),
    st.none() | st.integers(0, 3),
    st.none() | st.integers(-2, 2),
    st.sampled_from(["", "", "h", "i"]),
    st.booleans(),
    st.integers(0, 99),
)


@given(
    st.sets(st.sampled_from(SELECTORS), max_size=8),
    st.lists(ENTRIES, max_size=8, unique_by=lambda entry: entry.id),
    st.sets(st.sampled_from("ab")),
    st.randoms(use_true_random=False),
)
def test_brute_force_agrees(
    have: set[str],
    entries: list[RegistrationEntry],
    failed: set[str],
    rng: random.Random,
) -> None:
    """A decision written out step by step says the same, whatever the order of entries."""
    partial = dict.fromkeys(failed, "down")
    shuffled = list(entries)
    rng.shuffle(shuffled)
    decision = decide(some(*have), shuffled, at=NOW, partial=partial)

    counted, matched, missed = [], [], []
    for entry in entries:
        if str(entry.parent_id) == "spiffe://example.org/spire/server":
            continue
        counted.append(entry)
        ok = entry.expires_at is None or entry.expires_at > NOW
        for selector in entry.selectors:
            ok = ok and str(selector) in have
        (matched if ok else missed).append(entry)
    far = NOW + timedelta(days=1)
    matched.sort(key=lambda entry: (entry.created_at or far, entry.id))
    kept = [
        entry
        for place, entry in enumerate(matched)
        if not entry.hint or entry.hint not in [one.hint for one in matched[:place]]
    ]

    assert list(decision.matched) == kept
    assert list(decision.dropped_hints) == [one for one in matched if one not in kept]
    assert decision.considered == len(counted)
    assert len(decision.near_misses) == min(len(missed), 5)
    hints = [one.hint for one in decision.matched if one.hint]
    assert len(hints) == len(set(hints))
    for miss in decision.near_misses:
        assert miss.entry in missed
        assert {str(one) for one in miss.missing} == {
            str(one) for one in miss.entry.selectors if str(one) not in have
        }
        assert {one.type for one in miss.unknown} <= failed
        assert miss.difference
    left_out = [one for one in missed if one not in [m.entry for m in decision.near_misses]]
    for entry in left_out:
        lacks = len(entry.selectors - some(*have))
        assert all(len(miss.missing) <= lacks for miss in decision.near_misses)


@pytest.mark.parametrize(
    ("wanted", "has", "said"),
    [
        (
            "k8s:pod-label:role:a",
            "k8s:pod-label:role:b",
            "the process has k8s:pod-label:role:b",
        ),
        ("k8s:pod-label:role:a", "k8s:pod-label:app:b", "which the process does not have"),
        ("docker:label:role:a", "docker:label:app:b", "which the process does not have"),
        ("k8s:pod-image:x:1", "k8s:pod-image:y:1", "the process has k8s:pod-image:y:1"),
    ],
    ids=["value", "key", "docker", "image"],
)
def test_another_label_is_not_the_same_with_another_value(
    wanted: str, has: str, said: str
) -> None:
    """A near miss compares labels of one key, and images whatever their names."""
    (miss,) = decided([has], wanting(wanted)).near_misses
    assert said in miss.difference
