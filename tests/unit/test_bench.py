"""The benches' own plumbing: verdicts, the page, and that each of them can be found."""

import importlib
from pathlib import Path

import pytest

from bench import _page
from bench.__main__ import BENCHES
from bench._harness import Result, alternate


@pytest.mark.parametrize("name", BENCHES)
def test_each_bench_is_there(name: str) -> None:
    """Every name that `python -m bench` takes is a module with a main and a text."""
    module = importlib.import_module(f"bench.{name}")
    assert callable(module.main) and module.__doc__


@pytest.mark.parametrize(
    ("limits", "met", "text"),
    [
        ({}, True, ""),
        ({"at_most": 2}, True, "<= 2 x"),
        ({"at_most": 1.99}, False, "<= 1.99 x"),
        ({"at_least": 2}, True, ">= 2 x"),
        ({"at_least": 2.01}, False, ">= 2.01 x"),
    ],
)
def test_verdicts(limits: dict[str, float], met: bool, text: str) -> None:
    """A figure on its target meets it; one without a target is only reported."""
    result = Result("a", 2.0, **limits)
    assert (result.met, result.target_text) == (met, text)


def test_rounds_alternate() -> None:
    """Runs take turns, so that a noisy moment hits all of them; the first turn is not timed."""
    order: list[str] = []
    taken = alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, repeat=2
    )
    assert "".join(order) == "ab" + "aabb" * 2
    assert set(taken) == {"a", "b"} and min(taken.values()) >= 0


def test_the_page_is_filled(tmp_path: Path) -> None:
    """Figures replace figures, and nothing else on the page changes."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{_page.BEGIN}\nold\n{_page.END}\nafter\n")
    found = {"jwt": [Result("sign", 1.234, at_most=1.1, note="slow"), Result("other", 2)]}
    for _ in range(2):
        _page.write(found, page)

    text = page.read_text()
    assert text.startswith(f"before\n{_page.BEGIN}\n") and text.endswith(
        f"{_page.END}\nafter\n"
    )
    assert "old" not in text
    assert "| sign | 1.23 x | <= 1.1 x | **short**; slow |" in text
    assert "| other | 2.00 x |  |  |" in text
    assert text.count("### jwt") == 1


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    """Nothing is written where the comments are missing."""
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="no place for figures"):
        _page.write({}, page)
    assert page.read_text() == "text"


def test_the_real_page_has_its_place() -> None:
    """The reference page can be written."""
    text = _page.PAGE.read_text()
    assert text.index(_page.BEGIN) < text.index(_page.END)
