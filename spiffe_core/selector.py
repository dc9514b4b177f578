"""
Selectors: one attested fact about a process or a node.

Source: SPIRE API 3.8; SEC-03.  Two selectors match when type and value are equal,
byte for byte; a set of them has no order and no duplicates.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from spiffe_core.errors import MalformedError
from spiffe_core.text import utf8_bytes

_T = TypeVar("_T")

MAX_SELECTORS: Final = 64  # per entry; security requirements, table 1


class SelectorError(MalformedError):
    """A selector or a set of selectors breaks a rule."""


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """One fact, such as type ``unix`` and value ``uid:1000``."""

    type: str
    value: str

    def __post_init__(self) -> None:
        if not self.type:
            raise SelectorError("missing selector type")
        if ":" in self.type:
            raise SelectorError("selector type contains ':'")
        if not self.value:
            raise SelectorError("missing selector value")
        if utf8_bytes(self.type) is None or utf8_bytes(self.value) is None:
            raise SelectorError("selector is not UTF-8 text")

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Parse ``type:value``, split at the first colon.

        Raises:
            SelectorError: no colon, one half is empty, or not UTF-8 text.
        """
        type_, colon, value = text.partition(":")
        if not colon:
            raise SelectorError("a selector reads type:value, such as unix:uid:1000")
        return cls(type_, value)

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


SelectorSet = frozenset[Selector]
"""What was learnt about one process or node, or what an entry asks for."""


def selector_set(selectors: Iterable[Selector]) -> SelectorSet:
    """
    Return *selectors* as a set that an entry may carry.

    Raises:
        SelectorError: empty, or more than 64.
    """
    made = frozenset(selectors)
    if not made:
        raise SelectorError("selector list is empty")
    if len(made) > MAX_SELECTORS:
        raise SelectorError(f"more than {MAX_SELECTORS} selectors")
    return made


class SetMatch(enum.Enum):
    """How a stored set S must relate to a given set G (SPIRE API 3.8)."""

    EXACT = 0
    SUBSET = 1
    SUPERSET = 2
    ANY = 3

    def holds(self, stored: frozenset[_T], given: frozenset[_T]) -> bool:
        """True when *stored* relates to *given* as this match asks."""
        if self is SetMatch.EXACT:
            return stored == given
        if self is SetMatch.SUBSET:
            return bool(stored) and stored <= given
        if self is SetMatch.SUPERSET:
            return stored >= given
        return bool(stored & given)
