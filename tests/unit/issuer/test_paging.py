"""Pages over rows, without a database (SPIRE API 3.5, SEC-62)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from issuer.services import paging
from issuer.services.paging import MAX_PAGE, Page, collect, count, row_of
from spiffe_core.errors import ExhaustedError, MalformedError


class Rows:
    """Items with rows, given out a step at a time, as a repository does."""

    def __init__(self, *rows: int) -> None:
        self.rows = sorted(rows)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, after: int, limit: int) -> list[tuple[int, str]]:
        self.asked.append((after, limit))
        return [(row, f"i{row}") for row in self.rows if row > after][:limit]


def everything(_: str) -> bool:
    """Keep."""
    return True


@given(
    st.sets(st.integers(1, 400), max_size=60),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_pages_hold_what_is_kept_once(rows: set[int], size: int, modulus: int) -> None:
    """However large the pages, they hold everything that a filter keeps, in order, once."""
    fetch = Rows(*rows)

    def keep(item: str) -> bool:
        return int(item[1:]) % modulus == 0

    expected = [f"i{row}" for row in sorted(rows) if row % modulus == 0]
    assert collect(fetch, keep, 0, "ignored") == Page(tuple(expected))
    assert count(fetch, keep) == len(expected)
    found: list[str] = []
    token = ""
    while True:
        page = collect(fetch, keep, size, token)
        found += page.items
        assert len(page.items) == size or len(found) == len(expected)
        if not page.next_token:
            assert not page.items
            break
        token = page.next_token
    assert found == expected


def test_sec_62_a_page_reads_a_thousand_rows_at_once_and_holds_as_many() -> None:
    """SEC-62: rows are read by the thousand, and a page of 2^31 is one of 1,000."""
    fetch = Rows(*range(1, 2501))
    page = collect(fetch, everything, 2**31 - 1, "")
    assert (len(page.items), page.next_token) == (MAX_PAGE, "1000")
    assert fetch.asked == [(0, 1000)]
    assert len(collect(fetch, everything, 0, "").items) == 2500


def test_sec_62_a_whole_answer_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-62: without a page size nobody can make the server hold everything there is."""
    monkeypatch.setattr(paging, "MAX_WHOLE", 1500)
    assert len(collect(Rows(*range(1, 1501)), everything, 0, "").items) == 1500
    fetch = Rows(*range(1, 5001))
    with pytest.raises(ExhaustedError, match="page_size"):
        collect(fetch, everything, 0, "")
    assert len(fetch.asked) == 2
    assert count(fetch, everything) == 5000


@pytest.mark.parametrize(
    "token", ["-1", "+1", " 1", "1 ", "1.0", "0x1", "\u0661", "x", "9" * 19]
)
def test_tokens_are_ours(token: str) -> None:
    """A token is a row number as we write it, or refused."""
    with pytest.raises(MalformedError, match="page token"):
        row_of(token)


def test_good_tokens() -> None:
    """No token is the beginning."""
    assert [row_of(one) for one in ("", "0", "17", "9" * 18)] == [0, 0, 17, 10**18 - 1]
