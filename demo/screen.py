"""How the story looks: numbered steps and indented lines, in colour on a terminal."""

import os
import sys
import textwrap
from typing import TextIO

WIDTH = 100
"""Columns at which a line is folded."""


class TextScreen:
    """
    Writes steps and lines to *stream*.

    Colour is used on a terminal, unless ``NO_COLOR`` is set (no-color.org).
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._steps = 0

    def title(self, text: str) -> None:
        """The first line."""
        self._write(text, 1)

    def step(self, text: str) -> None:
        """A step begins."""
        self._steps += 1
        self._write(f"{self._steps}. {text}", 36)

    def line(self, text: str) -> None:
        """Something happened."""
        deep = " " * (len(text) - len(text.lstrip()) + 3)
        self._write(
            textwrap.fill(
                text.lstrip(), WIDTH, initial_indent=deep, subsequent_indent=f"{deep}  ",
                break_on_hyphens=False,
            )
        )  # fmt: skip

    def good(self, text: str) -> None:
        """The last line of a story that came out as promised."""
        self._write(text, 32)

    def bad(self, text: str) -> None:
        """The last line of one that did not."""
        self._write(text, 31)

    def _write(self, text: str, colour: int = 0) -> None:
        if self._colour and colour:
            text = f"\x1b[{colour}m{text}\x1b[0m"
        print(text, file=self._stream, flush=True)
