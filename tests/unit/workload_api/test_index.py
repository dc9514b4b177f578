"""From selectors to entries, against trying every entry."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector, SelectorSet
from tests.support.store import an_entry, some
from workload_api.cache.index import SelectorIndex

SELECTORS = [Selector("unix", f"uid:{n}") for n in range(6)]
sets = st.frozensets(st.sampled_from(SELECTORS), min_size=1, max_size=4)
names = st.sampled_from([f"e{n}" for n in range(8)])


def matching(entries: list[RegistrationEntry], selectors: SelectorSet) -> set[str]:
    """What trying every entry finds."""
    return {one.id for one in entries if one.selectors <= selectors}


@given(st.dictionaries(names, sets), st.frozensets(st.sampled_from(SELECTORS)))
def test_nothing_that_matches_is_missed(
    made: dict[str, SelectorSet], selectors: SelectorSet
) -> None:
    """SEC-03: the candidates are few, and every entry that matches is among them."""
    entries = [an_entry(id=name, selectors=found) for name, found in made.items()]
    index = SelectorIndex()
    for entry in entries:
        index.put(entry)
    candidates = list(index.candidates(selectors))
    assert matching(candidates, selectors) == matching(entries, selectors)
    assert len({one.id for one in candidates}) == len(candidates)
    assert all(one.selectors & selectors for one in candidates)


class Changing(RuleBasedStateMachine):
    """An index under any sequence of changes, beside a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.index = SelectorIndex()
        self.entries: dict[str, RegistrationEntry] = {}

    @rule(name=names, selectors=sets, revision=st.integers(0, 3))
    def put(self, name: str, selectors: SelectorSet, revision: int) -> None:
        """Add or replace."""
        entry = an_entry(id=name, selectors=selectors, revision_number=revision)
        self.index.put(entry)
        self.entries[name] = entry

    @rule(name=names)
    def drop(self, name: str) -> None:
        """Remove, whether it is there or not."""
        self.index.drop(name)
        self.entries.pop(name, None)

    @precondition(lambda self: len(self.entries) > 5)
    @rule()
    def clear(self) -> None:
        """Forget everything."""
        self.index.clear()
        self.entries.clear()

    @invariant()
    def holds_the_same(self) -> None:
        """Every question has the dictionary's answer."""
        assert len(self.index) == len(self.entries)
        assert {one.id: one for one in self.index.all()} == self.entries
        for name in ("e0", "e7"):
            assert self.index.get(name) == self.entries.get(name)
        for size in range(1, 5):
            selectors = frozenset(SELECTORS[:size])
            candidates = list(self.index.candidates(selectors))
            assert matching(candidates, selectors) == matching(
                list(self.entries.values()), selectors
            )
        if not self.entries:
            assert not self.index._postings and not self.index._filed


TestChanging = Changing.TestCase


@pytest.mark.parametrize("shared", [10, 200])
def test_a_shared_selector_does_not_make_everything_a_candidate(shared: int) -> None:
    """Entries that share one selector are filed under the other: few are looked at."""
    index = SelectorIndex()
    for number in range(shared):
        selectors = some("unix:uid:0", f"unix:path:/bin/p{number}")
        index.put(an_entry(id=f"e{number}", selectors=selectors))
    found = list(index.candidates(some("unix:uid:0", "unix:path:/bin/p3")))
    assert {one.id for one in found} >= {"e3"}
    assert len(found) <= 2


def test_an_entry_that_is_replaced_moves() -> None:
    """An entry with new selectors is found under them alone."""
    index = SelectorIndex()
    entry = an_entry(id="e", selectors=some("unix:uid:1"))
    index.put(entry)
    index.put(replace(entry, selectors=some("unix:uid:2")))
    assert not list(index.candidates(some("unix:uid:1")))
    assert [one.id for one in index.candidates(some("unix:uid:2"))] == ["e"]
