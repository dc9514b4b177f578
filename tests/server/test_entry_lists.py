"""``Entry``: counting, listing, filters, pages, hostile texts (SPIRE API 3.5, 3.8, 5.1)."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import bundle_pb2 as types_bundle_pb2
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import federateswith_pb2, selector_pb2
from tests.support.callers import (
    Code,
    Running,
    a_running_server,
    an_id,
    below,
    codes,
    id_message,
    mask,
    refused,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
Filter = entry_pb2.ListEntriesRequest.Filter
CountFilter = entry_pb2.CountEntriesRequest.Filter
Mask = types_pb2.EntryMask
MODES = {"EXACT": 0, "SUBSET": 1, "SUPERSET": 2, "ANY": 3}


def some_entries() -> list[Any]:
    """Entries of all sorts: two parents, three IDs, selectors, domains, hints, flags."""
    selectors = (["a:1"], ["a:1", "b:2"], ["b:2", "c:3"])
    domains = ([], ["one.test"], ["one.test", "two.test"])
    made = []
    for number, (parent, chosen, federated) in enumerate(
        itertools.product(("/p1", "/p2"), selectors, domains)
    ):
        made.append(
            below(
                an_id(parent),
                f"/w{number % 3}",
                *chosen,
                federates_with=federated,
                hint=("", "x", "X")[number % 3],
                downstream=number % 4 == 0,
                # Selectors alone would make some of them similar.
                id=f"e{number}",
            )
        )
        made[-1].selectors.add(type="n", value=str(number // 6))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def listed() -> AsyncIterator[tuple[Running, list[Any]]]:
    """A server with `some_entries`, in that order, and what it stored."""
    async with a_running_server() as running:
        await running.local.bundle.BatchSetFederatedBundle(
            bundle_pb2.BatchSetFederatedBundleRequest(
                bundle=[
                    types_bundle_pb2.Bundle(trust_domain=name)
                    for name in ("one.test", "two.test", "three.test")
                ]
            )
        )
        wanted = {}
        for one in some_entries():
            key = (str(one.spiffe_id), str(one.parent_id), str(one.selectors))
            wanted.setdefault(key, one)
        yield running, await running.add(*wanted.values())


async def a_list(running: Running, **fields: Any) -> Any:
    """One answer of ListEntries."""
    return await running.local.entry.ListEntries(entry_pb2.ListEntriesRequest(**fields))


async def a_count(running: Running, wanted: Any = None) -> int:
    """CountEntries with the filter of a list."""
    if wanted is not None:
        wanted = CountFilter.FromString(wanted.SerializeToString())
    request = entry_pb2.CountEntriesRequest(filter=wanted)
    return int((await running.local.entry.CountEntries(request)).count)


def holds(mode: str, stored: set[str], given: set[str]) -> bool:
    """What SPIRE API 3.8 says of a stored and a given set."""
    return {
        "EXACT": stored == given,
        "SUBSET": stored <= given and stored != set(),
        "SUPERSET": stored >= given,
        "ANY": stored & given != set(),
    }[mode]


def selectors_of(entry: Any) -> set[str]:
    """Its selectors as text."""
    return {f"{one.type}:{one.value}" for one in entry.selectors}


SETS = (["a:1"], ["a:1", "n:0"], ["b:2", "a:1", "n:0", "n:1", "n:2"], ["z:9"], ["n:2", "n:2"])


@pytest.mark.parametrize("given", SETS, ids=" ".join)
@pytest.mark.parametrize("mode", MODES)
async def test_by_selectors(listed: Any, mode: str, given: list[str]) -> None:
    """SPIRE API 3.8: each match behaviour, against the definition."""
    running, stored = listed
    wanted = Filter()
    wanted.by_selectors.match = MODES[mode]
    for text in given:
        type_, value = text.split(":")
        wanted.by_selectors.selectors.add(type=type_, value=value)
    found = await a_list(running, filter=wanted)
    expected = [one for one in stored if holds(mode, selectors_of(one), set(given))]
    assert list(found.entries) == expected
    assert await a_count(running, wanted) == len(expected)


@pytest.mark.parametrize(
    "given", (["one.test"], ["two.test", "spiffe://one.test"], ["three.test"]), ids=" ".join
)
@pytest.mark.parametrize("mode", MODES)
async def test_by_federates_with(listed: Any, mode: str, given: list[str]) -> None:
    """The same for the trust domains that an entry federates with; none is no subset."""
    running, stored = listed
    match = federateswith_pb2.FederatesWithMatch(trust_domains=given, match=MODES[mode])
    found = await a_list(running, filter=Filter(by_federates_with=match))
    bare = {name.removeprefix("spiffe://") for name in given}
    expected = [one for one in stored if holds(mode, set(one.federates_with), bare)]
    assert list(found.entries) == expected


def hint(text: str) -> Any:
    """A filter by hint."""
    made = Filter()
    made.by_hint.value = text
    return made


def downstream(flag: bool) -> Any:
    """A filter by the downstream flag, set to true or to false."""
    made = Filter()
    made.by_downstream.value = flag
    return made


async def test_by_names_hint_and_flag(listed: Any) -> None:
    """Names and hints match exactly; an empty hint and a false flag filter nothing."""
    running, stored = listed
    by_id = await a_list(running, filter=Filter(by_spiffe_id=id_message("/w1")))
    assert list(by_id.entries) == [one for one in stored if one.spiffe_id.path == "/w1"] != []
    by_parent = await a_list(running, filter=Filter(by_parent_id=id_message("/p2")))
    assert list(by_parent.entries) == [one for one in stored if one.parent_id.path == "/p2"]
    for wanted, expected in (
        (hint("x"), [one for one in stored if one.hint == "x"]),
        (hint("y"), []),
        (hint(""), stored),
        (downstream(True), [one for one in stored if one.downstream]),
        (downstream(False), stored),
        (Filter(), stored),
    ):
        assert list((await a_list(running, filter=wanted)).entries) == expected
        assert await a_count(running, wanted) == len(expected)
    assert await a_count(running) == len(stored)


async def test_filters_are_anded(listed: Any) -> None:
    """Everything given must hold."""
    running, stored = listed
    wanted = downstream(True)
    wanted.by_parent_id.CopyFrom(id_message("/p1"))
    wanted.by_selectors.match = MODES["ANY"]
    wanted.by_selectors.selectors.add(type="b", value="2")
    expected = [
        one
        for one in stored
        if one.downstream and one.parent_id.path == "/p1" and "b:2" in selectors_of(one)
    ]
    assert list((await a_list(running, filter=wanted)).entries) == expected != []
    wanted.by_hint.value = "nobody has it"
    assert list((await a_list(running, filter=wanted)).entries) == []


def _bad_filters() -> dict[str, tuple[Any, str]]:
    no_value = Filter()
    no_value.by_selectors.selectors.add(type="a")
    no_set, no_domains = Filter(), Filter()
    no_set.by_selectors.match = 0
    no_domains.by_federates_with.match = 0
    odd_match, odd_domains = Filter(), Filter()
    odd_match.by_selectors.match = 4
    odd_match.by_selectors.selectors.add(type="a", value="1")
    odd_domains.by_federates_with.match = 99
    odd_domains.by_federates_with.trust_domains.append("one.test")
    bad_domain = Filter()
    bad_domain.by_federates_with.trust_domains.append("One.test")
    return {
        "agent's ID": (Filter(by_spiffe_id=id_message("/spire/agent/x")), "SPIFFE ID filter"),
        "foreign ID": (Filter(by_spiffe_id=id_message("/a", "x.org")), "SPIFFE ID filter"),
        "no path": (Filter(by_spiffe_id=id_message("")), "SPIFFE ID filter"),
        "no ID": (Filter(by_spiffe_id=id_message("", "")), "SPIFFE ID filter"),
        "foreign parent": (Filter(by_parent_id=id_message("/a", "x.org")), "parent ID filter"),
        "parent, no path": (Filter(by_parent_id=id_message("")), "parent ID filter"),
        "no value": (no_value, "malformed selectors filter: missing selector value"),
        "empty set": (no_set, "malformed selectors filter: empty selector set"),
        "no domains": (no_domains, "federates with filter: empty trust domain set"),
        "bad domain": (bad_domain, "malformed federates with filter"),
        "unknown match": (odd_match, "no such match"),
        "unknown match of domains": (odd_domains, "no such match"),
    }


@pytest.mark.parametrize("case", _bad_filters())
async def test_sec_95_bad_filters_are_refused(listed: Any, case: str) -> None:
    """SEC-95: an unknown or malformed filter is refused; it never widens the answer."""
    running, _ = listed
    wanted, text = _bad_filters()[case]
    async with refused(Code.INVALID_ARGUMENT, text):
        await a_list(running, filter=wanted)
    async with refused(Code.INVALID_ARGUMENT, text):
        await a_count(running, wanted)


async def test_a_parent_filter_takes_any_member(listed: Any) -> None:
    """by_parent_id may be the server's or an agent's own ID."""
    running, _ = listed
    for path in ("/spire/server", "/spire/agent/x/n"):
        found = await a_list(running, filter=Filter(by_parent_id=id_message(path)))
        assert list(found.entries) == []


# Pages


async def pages(running: Running, size: int, **fields: Any) -> list[list[Any]]:
    """Every page, as a client asks for them: until the token is empty."""
    token, found = "", []
    while True:
        page = await a_list(running, page_size=size, page_token=token, **fields)
        found.append(list(page.entries))
        # A page that holds something always has a token (SPIRE API 3.5).
        assert bool(page.next_page_token) == bool(page.entries)
        if not page.next_page_token:
            return found
        token = page.next_page_token


@pytest.mark.parametrize("size", [1, 2, 5, 17, 1000])
async def test_pages_hold_everything_once(listed: Any, size: int) -> None:
    """In the order of insertion, each page full but the last ones; the very last is empty."""
    running, stored = listed
    found = await pages(running, size)
    assert [one for page in found for one in page] == stored
    assert found[-1] == []
    assert all(len(page) == size for page in found[:-2])


async def test_filtered_pages_are_full(listed: Any) -> None:
    """SPIRE API 5.1: by_downstream with pages does not stop early, nor does any filter."""
    running, stored = listed
    expected = [one for one in stored if one.downstream]
    found = await pages(running, 2, filter=downstream(True))
    assert [one for page in found for one in page] == expected
    assert all(len(page) == 2 for page in found[:-2])


async def test_masks_in_lists(listed: Any) -> None:
    """A list is masked like a single answer."""
    running, stored = listed
    found = await a_list(running, output_mask=mask(Mask, "hint"), page_size=3)
    assert list(found.entries) == [
        types_pb2.Entry(id=one.id, hint=one.hint) for one in stored[:3]
    ]
    found = await a_list(running, output_mask=Mask())
    assert list(found.entries) == [types_pb2.Entry(id=one.id) for one in stored]


@pytest.mark.parametrize("size", [0, -1, -(2**31)])
async def test_no_page_size_is_everything(listed: Any, size: int) -> None:
    """SPIRE API 3.5: without a size above 0 the token is not looked at and all is answered."""
    running, stored = listed
    found = await a_list(running, page_size=size, page_token="not a token")
    assert list(found.entries) == stored
    assert found.next_page_token == ""


@pytest.mark.parametrize("token", ["x", "-1", "1.0", " 1", "1 OR 1=1", "9" * 19, "१", "0x10"])
async def test_bad_tokens(listed: Any, token: str) -> None:
    """A page token that is not ours is INVALID_ARGUMENT."""
    running, _ = listed
    async with refused(Code.INVALID_ARGUMENT, "page token"):
        await a_list(running, page_size=5, page_token=token)


async def test_a_token_behind_the_end(listed: Any) -> None:
    """A token behind everything yields an empty last page."""
    running, _ = listed
    found = await a_list(running, page_size=5, page_token="999999999")
    assert (list(found.entries), found.next_page_token) == ([], "")


async def test_sec_62_pages_are_clamped_and_whole_answers_limited() -> None:
    """
    SEC-62: 2^31 as a page size yields 1,000; without one everything up to 4 MiB, and over
    that RESOURCE_EXHAUSTED; pages of what is added meanwhile are neither lost nor doubled.
    """
    async with a_running_server() as running:
        heavy = [
            below(an_id("/p"), f"/h{number}", f"k:{'v' * 8000}{number}", hint="heavy")
            for number in range(1010)
        ]
        parts = [heavy[at : at + 400] for at in (0, 400, 800)]
        made = [one for part in parts for one in await running.add(*part)]
        first = await a_list(running, page_size=2**31 - 1, output_mask=mask(Mask, "hint"))
        assert len(first.entries) == 1000
        late = (await running.add(below(an_id("/p"), "/late")))[0]
        rest = await a_list(running, page_size=2**31 - 1, page_token=first.next_page_token)
        assert [one.id for one in rest.entries] == [one.id for one in [*made[1000:], late]]
        async with refused(Code.RESOURCE_EXHAUSTED, "page_size"):
            await a_list(running, page_size=2**31 - 1)
        async with refused(Code.RESOURCE_EXHAUSTED, "page_size"):
            await a_list(running)
        # What is masked away does not count, and what is deleted neither.
        assert len((await a_list(running, output_mask=mask(Mask, "hint"))).entries) == 1011
        ids = [one.id for one in made[:520]]
        request = entry_pb2.BatchDeleteEntryRequest(ids=ids)
        assert set(codes((await running.local.entry.BatchDeleteEntry(request)).results)) == {0}
        assert len((await a_list(running)).entries) == 491
        assert await a_count(running) == 491


# Texts


HOSTILE = [
    "'; DROP TABLE entries; --",
    "' OR '1'='1",
    '" OR ""="',
    "%",
    "_",
    "\\",
    "x\x00y",
    "a\nb\r\tc",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "\u202e\u0000é漢字🙂",
    '["a"]',
    "NULL",
    "0; SELECT sqlite_version()",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
async def test_sec_62_no_text_is_code(running: Running, text: str) -> None:
    """
    SEC-62, SEC-03: in every free field hostile text is stored as it is and found by itself
    alone; in every other field it is refused; nothing else changes.
    """
    before = await a_count(running)
    number = HOSTILE.index(text)
    free = below(an_id("/p"), f"/t{number}", hint=text)
    free.selectors.add(type=text.replace(":", ""), value=text)
    (made,) = await running.add(free)
    assert made.hint == text
    assert selector_pb2.Selector(type=text.replace(":", ""), value=text) in made.selectors
    wanted = hint(text)
    wanted.by_selectors.match = MODES["ANY"]
    wanted.by_selectors.selectors.add(type=text.replace(":", ""), value=text)
    assert [one.id for one in (await a_list(running, filter=wanted)).entries] == [made.id]
    bad = [below(an_id("/p"), f"/u{number}") for _ in range(5)]
    # NULL and the like are right as names; the newline makes them wrong ones.
    wrong = f"/{text}\n"
    bad[0].spiffe_id.path = wrong
    bad[1].parent_id.path = wrong
    bad[2].federates_with.append(text + "\n")
    bad[3].dns_names.append(text + "\n")
    bad[4].id = text + "\n"
    answer = await running.local.entry.BatchCreateEntry(
        entry_pb2.BatchCreateEntryRequest(entries=bad)
    )
    assert codes(answer.results) == [3] * 5
    for request in (text, text + "'"):
        async with refused(Code.NOT_FOUND):
            await running.local.entry.GetEntry(entry_pb2.GetEntryRequest(id=request))
        deleted = await running.local.entry.BatchDeleteEntry(
            entry_pb2.BatchDeleteEntryRequest(ids=[request])
        )
        assert (codes(deleted.results), deleted.results[0].id) == ([5], request)
    assert await a_count(running) == before + 1
