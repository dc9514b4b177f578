"""Selectors and sets of them (SPIRE API 3.8)."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.selector import Selector, SelectorError, SetMatch, selector_set


@pytest.mark.parametrize(
    ("type_", "value", "reason"),
    [
        ("", "uid:0", "missing selector type"),
        ("a:b", "c", "selector type contains ':'"),
        (":", "c", "selector type contains ':'"),
        ("unix", "", "missing selector value"),
        ("unix", "\ud800", "not UTF-8"),
        ("\udcff", "x", "not UTF-8"),
    ],
)
def test_what_is_no_selector(type_: str, value: str, reason: str) -> None:
    """SPIRE API 3.8: type and value are both there, and the type holds no colon."""
    with pytest.raises(SelectorError, match=reason):
        Selector(type_, value)


@pytest.mark.parametrize(
    ("text", "type_", "value"),
    [
        ("unix:uid:1000", "unix", "uid:1000"),
        ("a:b", "a", "b"),
        ("k8s:pod-label:app:web", "k8s", "pod-label:app:web"),
        ("a::", "a", ":"),
        ("unix:path:/opt/\N{SNOWMAN} x", "unix", "path:/opt/\N{SNOWMAN} x"),
    ],
)
def test_text_splits_at_the_first_colon(text: str, type_: str, value: str) -> None:
    """The command line's form is type:value, cut at the first colon."""
    assert Selector.parse(text) == Selector(type_, value)
    assert str(Selector(type_, value)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "reads type:value"),
        ("unix", "reads type:value"),
        (":uid", "missing selector type"),
        ("unix:", "missing selector value"),
    ],
)
def test_text_that_is_none(text: str, reason: str) -> None:
    """Text without a colon or with an empty half is refused, saying which."""
    with pytest.raises(SelectorError, match=reason):
        Selector.parse(text)


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_text(text: str) -> None:
    """Any text is a selector that prints back unchanged, or our own error."""
    try:
        assert str(Selector.parse(text)) == text
    except SelectorError:
        return


def test_a_set_has_no_order_and_no_duplicates() -> None:
    """Equal lists of selectors in any order, with repeats, are one set."""
    some = [Selector("a", "1"), Selector("a", "2"), Selector("b", "1")]
    for order in itertools.permutations(some):
        assert selector_set([*order, order[0]]) == frozenset(some)


def test_the_limits_of_a_set() -> None:
    """An entry has 1 to 64 selectors (security requirements, table 1)."""
    many = [Selector("a", str(number)) for number in range(65)]
    assert len(selector_set(many[:64])) == 64
    with pytest.raises(SelectorError, match="more than 64"):
        selector_set(many)
    with pytest.raises(SelectorError, match="selector list is empty"):
        selector_set([])


@pytest.mark.parametrize(
    ("match", "stored", "given_", "holds"),
    [
        (SetMatch.EXACT, "ab", "ab", True),
        (SetMatch.EXACT, "ab", "abc", False),
        (SetMatch.EXACT, "", "", True),
        (SetMatch.SUBSET, "a", "ab", True),
        (SetMatch.SUBSET, "ab", "ab", True),
        (SetMatch.SUBSET, "ac", "ab", False),
        (SetMatch.SUBSET, "", "ab", False),
        (SetMatch.SUPERSET, "abc", "ab", True),
        (SetMatch.SUPERSET, "a", "ab", False),
        (SetMatch.ANY, "ac", "ab", True),
        (SetMatch.ANY, "c", "ab", False),
        (SetMatch.ANY, "", "ab", False),
    ],
)
def test_match_behaviour(match: SetMatch, stored: str, given_: str, holds: bool) -> None:
    """SPIRE API 3.8: exact, subset (of a set that is not empty), superset, any."""
    assert match.holds(frozenset(stored), frozenset(given_)) is holds


def test_match_numbers_are_the_wires() -> None:
    """SPIRE API 4: the enum's numbers are those of SelectorMatch."""
    assert {one.name: one.value for one in SetMatch} == {
        "EXACT": 0,
        "SUBSET": 1,
        "SUPERSET": 2,
        "ANY": 3,
    }
