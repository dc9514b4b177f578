"""The index of what each agent may act for (SPIRE API 5.1.1, A12)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issuer.authorized import AuthorizedIndex
from spiffe_core.agent import AttestedAgent
from spiffe_core.decision import age
from spiffe_core.entry import RegistrationEntry
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.store import NOW, TD, an_agent, an_entry, an_id, node_id, some

ALIAS = TD.server_id


def an_index(*things: RegistrationEntry | AttestedAgent) -> AuthorizedIndex:
    """An index that holds *things*."""
    index = AuthorizedIndex(TD)
    for thing in things:
        if isinstance(thing, AttestedAgent):
            index.put_agent(thing)
        else:
            index.put_entry(thing)
    return index


def ids(entries: Iterable[RegistrationEntry]) -> list[str]:
    """The ids of *entries*, in order."""
    return [entry.id for entry in entries]


def test_own_entries_and_those_below_them() -> None:
    """An agent gets the entries below its ID, and those below their SPIFFE IDs."""
    index = an_index(
        an_agent(),
        an_entry("/x", id="x"),
        an_entry("/y", id="y", parent_id=an_id("/x")),
        an_entry("/z", id="z", parent_id=node_id("b")),
    )
    assert ids(index.entries_of(node_id("a"), NOW)) == ["x", "y"]
    assert index.entry_for(node_id("a"), "y", NOW) is not None
    assert index.entry_for(node_id("a"), "z", NOW) is None


def test_aliases_widen_and_are_not_returned() -> None:
    """An alias whose selectors the node has adds what lies below it, and never itself."""
    index = an_index(
        an_agent(selectors=some("k8s:cluster:c", "k8s:node:n")),
        an_entry("/group", id="alias", parent_id=ALIAS, selectors=some("k8s:cluster:c")),
        an_entry("/other", id="no", parent_id=ALIAS, selectors=some("k8s:cluster:d")),
        an_entry("/x", id="x", parent_id=an_id("/group")),
        an_entry("/y", id="y", parent_id=an_id("/other")),
    )
    assert ids(index.entries_of(node_id("a"), NOW)) == ["x"]
    assert index.entry_for(node_id("a"), "alias", NOW) is None
    assert index.entry_for(node_id("a"), "y", NOW) is None


def test_cycles_end() -> None:
    """Entries that are each other's parents are tolerated."""
    index = an_index(
        an_agent(),
        an_entry("/x", id="in"),
        an_entry("/y", id="xy", parent_id=an_id("/x")),
        an_entry("/x", id="yx", parent_id=an_id("/y")),
        an_entry("/s", id="self", parent_id=an_id("/s")),
    )
    assert sorted(ids(index.entries_of(node_id("a"), NOW))) == ["in", "xy", "yx"]
    assert index.entry_for(node_id("a"), "self", NOW) is None
    assert index.agents_of(an_entry("/q", id="q", parent_id=an_id("/y"))) == {node_id("a")}


def test_foreign_names_are_left_out() -> None:
    """An entry whose ID or parent lies in another trust domain authorizes nobody."""
    foreign = SpiffeId(TrustDomain("other.org"), "/x")
    index = an_index(
        an_agent(),
        an_entry("/x", id="child", parent_id=foreign),
        an_entry(id="id", spiffe_id=foreign),
    )
    assert index.entries_of(node_id("a"), NOW) == []
    assert index.entry_for(node_id("a"), "id", NOW) is None
    assert len(index) == 2


@pytest.mark.parametrize("expired", ["entry", "parent", "alias"])
def test_nothing_expired_authorizes(expired: str) -> None:
    """At the instant it expires an entry is gone, with all that hung on it alone."""
    ends = {"expires_at": NOW + timedelta(seconds=10)}
    index = an_index(
        an_agent(selectors=some("k8s:cluster:c")),
        replace(
            an_entry("/g", id="g", parent_id=ALIAS, selectors=some("k8s:cluster:c")),
            **(ends if expired == "alias" else {}),
        ),
        replace(
            an_entry("/p", id="p", parent_id=an_id("/g")),
            **(ends if expired == "parent" else {}),
        ),
        replace(
            an_entry("/e", id="e", parent_id=an_id("/p")),
            **(ends if expired == "entry" else {}),
        ),
    )
    before, then = NOW + timedelta(seconds=9.9), NOW + timedelta(seconds=10)
    assert ids(index.entries_of(node_id("a"), before)) == ["e", "p"]
    assert index.entry_for(node_id("a"), "e", before) is not None
    left = {"entry": ["p"], "parent": [], "alias": []}[expired]
    assert ids(index.entries_of(node_id("a"), then)) == left
    assert index.entry_for(node_id("a"), "e", then) is None


@pytest.mark.parametrize(
    "change", [{"banned": True}, {"expires_at": NOW - timedelta(seconds=1)}], ids=str
)
def test_no_selectors_without_standing(change: Mapping[str, object]) -> None:
    """A banned agent, and one whose certificate is over, has no selectors."""
    index = an_index(
        an_agent(selectors=some("k8s:cluster:c")),
        an_entry("/g", id="g", parent_id=ALIAS, selectors=some("k8s:cluster:c")),
        an_entry("/e", id="e", parent_id=an_id("/g")),
    )
    assert ids(index.entries_of(node_id("a"), NOW)) == ["e"]
    index.put_agent(an_agent(selectors=some("k8s:cluster:c"), **change))
    assert index.entries_of(node_id("a"), NOW) == []
    assert index.entry_for(node_id("a"), "e", NOW) is None


def test_the_same_answer_until_something_changes() -> None:
    """A view is one object while nothing that concerns the agent happens."""
    index = an_index(an_agent(), an_agent("b"), an_entry("/x", id="x"))
    view = index.view_of(node_id("a"), NOW)
    assert index.put_entry(an_entry("/y", id="y", parent_id=node_id("b"))) == {node_id("b")}
    assert index.view_of(node_id("a"), NOW) is view
    assert index.drop_entry("x") == {node_id("a")}
    assert index.view_of(node_id("a"), NOW).entries == ()


def test_sec_20_keys_have_one_holder() -> None:
    """SEC-20: a key is its live or banned agent's own, and nobody's once that is gone."""
    index = an_index(an_agent(key_hash=b"old"))
    holder = node_id("a")
    later = NOW + timedelta(hours=3)
    assert index.holder_of(b"old", NOW) == holder
    assert index.holder_of(b"", NOW) is index.holder_of(b"other", NOW) is None
    index.put_agent(
        an_agent(key_hash=b"old", new_key_hash=b"new", new_expires_at=NOW + timedelta(hours=2))
    )
    assert index.holder_of(b"old", NOW) == index.holder_of(b"new", NOW) == holder
    assert index.holder_of(b"new", later) is None
    index.put_agent(an_agent(key_hash=b"new"))
    assert index.holder_of(b"old", NOW) is None
    index.put_agent(an_agent(key_hash=b"new", banned=True))
    assert index.holder_of(b"new", later) == holder
    index.drop_agent(holder)
    assert index.holder_of(b"new", NOW) is None
    assert index._agents_by_key == {}


def test_dropping_what_is_not_there() -> None:
    """To drop an unknown entry or agent concerns nobody."""
    index = an_index(an_agent())
    assert index.drop_entry("x") == set()
    assert index.drop_agent(node_id("z")) == set()


def test_privileges_follow_entries() -> None:
    """Any unexpired entry with the flag makes its ID an admin or a downstream."""
    index = an_index(
        an_entry("/root", id="1", admin=True),
        an_entry("/root", id="2"),
        an_entry("/ca", id="3", downstream=True, expires_at=NOW + timedelta(seconds=5)),
    )
    assert index.is_admin(an_id("/root"), NOW) and not index.is_admin(an_id("/ca"), NOW)
    assert index.is_downstream(an_id("/ca"), NOW)
    assert not index.is_downstream(an_id("/ca"), NOW + timedelta(seconds=5))
    index.put_entry(an_entry("/root", id="1"))
    assert not index.is_admin(an_id("/root"), NOW)


# The property: after any changes the index says what a search through everything says.

NODES = ("a", "b", "c")
SELECTORS = ("k:1", "k:2", "k:3")
IDS = (*(node_id(one) for one in NODES), *(an_id(f"/{one}") for one in "xyz"))
FOREIGN = SpiffeId(TrustDomain("other.org"), "/x")

selectors_in = st.frozensets(st.sampled_from(SELECTORS), min_size=1)
entries_in = st.builds(
    lambda id_, parent, to, selectors, ends: an_entry(
        "/x",
        id=f"e{id_}",
        parent_id=parent,
        spiffe_id=to,
        selectors=some(*selectors),
        expires_at=None if ends is None else NOW + timedelta(seconds=ends),
    ),
    st.integers(0, 11),
    st.sampled_from((*IDS, ALIAS, ALIAS, FOREIGN)),
    st.sampled_from((*IDS[3:], FOREIGN)),
    selectors_in,
    st.sampled_from((None, None, None, 5, 20, 40)),
)
agents_in = st.builds(
    lambda name, selectors, banned, ends: an_agent(
        name,
        selectors=some(*selectors),
        banned=banned,
        expires_at=NOW + timedelta(seconds=ends),
    ),
    st.sampled_from(NODES),
    st.frozensets(st.sampled_from(SELECTORS)),
    st.sampled_from((False, False, False, True)),
    st.sampled_from((15, 1000)),
)
changes_in = st.lists(
    st.one_of(
        entries_in,
        entries_in,
        agents_in,
        st.integers(0, 11).map(lambda number: f"e{number}"),
        st.sampled_from(NODES).map(node_id),
        st.just(timedelta(seconds=7)),
    ),
    max_size=40,
)


def by_force(
    entries: Mapping[str, RegistrationEntry],
    agents: Mapping[SpiffeId, AttestedAgent],
    agent_id: SpiffeId,
    at: datetime,
) -> list[RegistrationEntry]:
    """What SPIRE API 5.1.1 says, word by word."""
    agent = agents.get(agent_id)
    has = agent is not None and not agent.banned and at <= agent.expires_at
    selectors = agent.selectors if agent is not None and has else frozenset()
    usable = [
        one
        for one in entries.values()
        if one.spiffe_id.trust_domain == TD == one.parent_id.trust_domain
        and (one.expires_at is None or at < one.expires_at)
    ]
    reached = {agent_id} | {
        one.spiffe_id
        for one in usable
        if one.parent_id == TD.server_id and one.selectors <= selectors
    }
    found: dict[str, RegistrationEntry] = {}
    while True:
        more = [one for one in usable if one.parent_id in reached and one.id not in found]
        if not more:
            return sorted(found.values(), key=age)
        for one in more:
            found[one.id] = one
            reached.add(one.spiffe_id)


@settings(max_examples=200, deadline=None)
@given(changes_in)
def test_index_equals_brute_force(changes: list[object]) -> None:
    """After each of any changes all agents' answers are those of a search by force."""
    index = AuthorizedIndex(TD)
    entries: dict[str, RegistrationEntry] = {}
    agents: dict[SpiffeId, AttestedAgent] = {}
    at = NOW
    for change in changes:
        before = {one: by_force(entries, agents, one, at) for one in map(node_id, NODES)}
        concerned = set(before)
        if isinstance(change, RegistrationEntry):
            concerned = index.put_entry(change)
            entries[change.id] = change
        elif isinstance(change, AttestedAgent):
            concerned = index.put_agent(change)
            agents[change.id] = change
        elif isinstance(change, str):
            concerned = index.drop_entry(change)
            entries.pop(change, None)
        elif isinstance(change, SpiffeId):
            concerned = index.drop_agent(change)
            agents.pop(change, None)
        elif isinstance(change, timedelta):
            at += change
        for one, old in before.items():
            wanted = by_force(entries, agents, one, at)
            assert index.entries_of(one, at) == wanted
            assert index.view_of(one, at).entries == tuple(wanted)
            for entry in entries.values():
                held = index.entry_for(one, entry.id, at)
                assert (held is entry) == (entry in wanted)
            if wanted != old and one in agents:
                assert one in concerned
        assert len(index) == len(entries)
    for id_ in list(entries):
        index.drop_entry(id_)
    for one in list(agents):
        index.drop_agent(one)
    fresh = AuthorizedIndex(TD)
    for name in ("_by_parent", "_by_spiffe_id", "_privileged"):
        assert vars(getattr(index, name)) == vars(getattr(fresh, name)), "left something"
    assert not index._agents_by_selector and not index._views
    assert not index._aliases._postings and not index._aliases._home
