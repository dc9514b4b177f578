"""What every servicer does with what it was asked and with what it answers."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from spiffe_core.errors import ExhaustedError, MalformedError, NotFoundError, SpiffeError
from spiffe_core.selector import SelectorSet, SetMatch
from spiffe_wire.convert.entry import masked, selectors_from_wire
from spiffe_wire.pb.spire.api.types import status_pb2
from spiffe_wire.status import status_of

_T = TypeVar("_T")

MAX_BATCH: Final = 1000  # security requirements, table 1
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024 - 64 * 1024
YIELD_EVERY: Final = 50
"""Messages between two turns of the event loop: about 1.5 ms."""
_ITEM_BYTES: Final = 6  # tag and length of an item inside its message

OK: Final = status_pb2.Status(code=0, message="OK")


def failure(error: SpiffeError, context: str = "") -> Any:
    """Return the status of one batch item that failed; NOT_FOUND says no more (3.2)."""
    outcome = status_of(error)
    text = outcome.text
    if context and not isinstance(error, NotFoundError):
        text = f"{context}: {text}"
    return status_pb2.Status(code=outcome.number, message=text)


def check_batch(size: int) -> None:
    """
    Refuse a batch over the limit.

    Raises:
        ExhaustedError: more than 1000 items.
    """
    if size > MAX_BATCH:
        raise ExhaustedError(f"a batch holds at most {MAX_BATCH} items: send several")


def mask_of(request: Any, field: str = "output_mask") -> Any | None:
    """Return the mask in *field*; None when there is none, which is not an empty one (3.4)."""
    return getattr(request, field) if request.HasField(field) else None


async def to_wire(
    items: Iterable[_T], convert: Callable[[_T], Any], mask: Any | None, always: str
) -> list[Any]:
    """
    Return *items* as messages that fit one answer together (SEC-62).

    Raises:
        ExhaustedError: they do not, whatever the rest of the answer is.
    """
    made = []
    size = 0
    for number, item in enumerate(items, 1):
        message = masked(convert(item), mask, always)
        size += message.ByteSize() + _ITEM_BYTES
        if size > MAX_MESSAGE_BYTES:
            raise ExhaustedError("the answer is too large: ask for pages with page_size")
        made.append(message)
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
    return made


def selector_match(message: Any, what: str) -> tuple[SelectorSet, SetMatch]:
    """
    Parse a ``SelectorMatch``.

    Raises:
        MalformedError: empty, an unknown match, or a selector breaks a rule.
    """
    try:
        selectors = selectors_from_wire(message.selectors)
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
    if not selectors:
        raise MalformedError(f"{what}: empty selector set")
    return selectors, set_match(message.match, what)


def set_match(number: int, what: str) -> SetMatch:
    """
    Parse a match behaviour.

    Raises:
        MalformedError: one that this release does not know (SEC-95).
    """
    try:
        return SetMatch(number)
    except ValueError:
        raise MalformedError(f"{what}: no such match behaviour") from None
