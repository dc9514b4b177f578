"""Pages of anything that has rows, in the order of insertion (SPIRE API 3.5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from spiffe_core.errors import MalformedError

_T = TypeVar("_T")
STEP = 1000


@dataclass(frozen=True, slots=True)
class Page(Generic[_T]):
    """Some items, and the token that continues behind them; empty after an empty page."""

    items: tuple[_T, ...]
    next_token: str = ""


def row_of(token: str) -> int:
    """
    Return the row that a page token stands for.

    Raises:
        MalformedError: not one of our tokens.
    """
    if not token:
        return 0
    if not (token.isascii() and token.isdigit() and len(token) < 19):
        raise MalformedError("page token is not one that this server gave out")
    return int(token)


def collect(
    fetch: Callable[[int, int], Sequence[tuple[int, _T]]],
    keep: Callable[[_T], bool],
    page_size: int,
    token: str,
) -> Page[_T]:
    """
    Return up to *page_size* kept items behind *token*; a size of 0 or less returns all.

    Reads on until the page is full, so that a filter never makes pages short.
    """
    after = row_of(token) if page_size > 0 else 0
    found: list[_T] = []
    last = after
    while True:
        rows = fetch(after, STEP)
        for row, item in rows:
            if keep(item):
                found.append(item)
                last = row
                if 0 < page_size <= len(found):
                    return Page(tuple(found), str(last))
        if len(rows) < STEP:
            token_of = str(last) if page_size > 0 and found else ""
            return Page(tuple(found), token_of)
        after = rows[-1][0]
