"""
Named places at which a test can end the process, as a power cut would (SEC-100).

Nothing happens at them unless a composition root armed one.  Places are named by what has
just happened, ``token.consumed``; before it, ``token.before_consume``.
"""

from collections.abc import Callable
from typing import Final

VARIABLE: Final = "SPIFFE_ISSUER_CRASH_POINT"
"""The environment variable that names one: ``name``, or ``name:3`` for its third time."""

_armed = ""
_passes_left = 0
_end: Callable[[], object] = lambda: None  # noqa: E731


def arm(wanted: str, end: Callable[[], object]) -> None:
    """Call *end*, which must not return, at the crash point that *wanted* names."""
    global _armed, _passes_left, _end
    _armed, _, count = wanted.partition(":")
    _passes_left = int(count or 1)
    _end = end


def crash_point(name: str) -> None:
    """A place worth dying at."""
    if name == _armed:
        _count_down()


def _count_down() -> None:
    global _passes_left
    _passes_left -= 1
    if _passes_left == 0:
        _end()
