"""Pages of anything that has rows, in the order of insertion (SPIRE API 3.5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from spiffe_core.errors import ExhaustedError, MalformedError

_T = TypeVar("_T")
Fetch: TypeAlias = Callable[[int, int], Sequence[tuple[int, _T]]]
"""Returns up to so many items behind a row, with their rows."""

STEP: Final = 1000  # rows a statement (SEC-62)
MAX_PAGE: Final = 1000  # security requirements, table 1
MAX_WHOLE: Final = 100_000
"""Items without a page size: more of them than this do not fit one message, masked or not."""


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
    fetch: Fetch[_T], keep: Callable[[_T], bool], page_size: int, token: str
) -> Page[_T]:
    """
    Return up to *page_size* kept items behind *token*, 1,000 at most.

    Reads on until the page is full, so that a filter never makes pages short.  A size of 0
    or less returns all there are and looks at no token.

    Raises:
        MalformedError: *token* is not one of ours.
        ExhaustedError: all there are do not fit one message.
    """
    is_paged = page_size > 0
    after = row_of(token) if is_paged else 0
    most = min(page_size, MAX_PAGE) if is_paged else MAX_WHOLE
    found: list[tuple[int, _T]] = []
    while True:
        rows = fetch(after, STEP)
        for row, item in rows:
            if not keep(item):
                continue
            if len(found) == most:
                raise ExhaustedError("the answer is too large: ask for pages with page_size")
            found.append((row, item))
            if is_paged and len(found) == most:
                break
        is_full = is_paged and len(found) == most
        if is_full or len(rows) < STEP:
            token = str(found[-1][0]) if is_paged and found else ""
            return Page(tuple(item for _, item in found), token)
        after = rows[-1][0]


def count(fetch: Fetch[_T], keep: Callable[[_T], bool]) -> int:
    """Return how many items are kept, holding none of them."""
    counted = after = 0
    while rows := fetch(after, STEP):
        counted += sum(1 for _, item in rows if keep(item))
        after = rows[-1][0]
    return counted
