"""
What the grammars of both command lines share, on argparse.

``--help`` is as wide as the terminal, options must be spelt out, ``-o`` is the same
everywhere, and a time reads the same everywhere.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from spiffe_wire.commandline import overview

STYLES: Final = ("text", "json", "yaml")
MAX_SECONDS: Final = 2**31 - 1  # int32 on the wire: 68 years
FILE: Final = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
FOLDER: Final = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}

Fill = Callable[[argparse.ArgumentParser], None]


class Help(argparse.HelpFormatter):
    """Help as wide as the terminal, found without importing ``shutil``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=_columns())


def _columns() -> int:
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given):
        return max(40, int(given) - 2)
    try:
        return max(40, os.get_terminal_size(sys.stdout.fileno()).columns - 2)
    except (OSError, ValueError):
        return 94


def new_parser(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the command *name* to *commands*; an option must be spelt out (SEC-95)."""
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=Help, allow_abbrev=False,
    )  # fmt: skip
    return made


def output_option(one: argparse.ArgumentParser) -> None:
    """Add ``-o``; *pretty* is SPIRE's word for text."""
    one.add_argument(
        "-o", "--output", choices=STYLES, default="text", metavar="text|json|yaml",
        type=lambda given: "text" if given == "pretty" else given,
        help="text for people (the default), json or yaml for programs",
    )  # fmt: skip


def completes(option: argparse.Action, how: dict[str, str]) -> None:
    """Say how shells complete the value of *option*: `FILE` or `FOLDER` (shtab reads it)."""
    vars(option)["complete"] = how


def seconds(text: str) -> int:
    """Parse the value of an option: ``600``, ``10m`` or ``1h30m`` (an argparse type)."""
    from spiffe_wire.settings import duration

    try:
        plain = text.isascii() and text.isdigit()
        span = int(text) if plain else int(duration(text).total_seconds())
    except (ValueError, OverflowError):
        span = -1
    if not 0 <= span <= MAX_SECONDS:
        raise argparse.ArgumentTypeError("a time reads 600, 10m or 1h30m, at most 68 years")
    return span


class _Top(argparse.ArgumentParser):
    """The top of a grammar; its help is the overview that costs no argparse."""

    overview = ""

    def format_help(self) -> str:
        """Return the overview."""
        return self.overview


def top_parser(
    program: str,
    text: str,
    commands: dict[str, str],
    epilog: str,
    fill: dict[str, Fill],
    only: str | None,
) -> argparse.ArgumentParser:
    """
    Return the grammar of *program*, with its *commands* filled in by *fill*.

    When *only* is not None, that command alone is filled in: nobody pays for the others'.
    """
    top = _Top(
        prog=program, description=text, epilog=epilog, formatter_class=Help, allow_abbrev=False
    )
    top.overview = overview(program, text, commands, epilog)
    top.add_argument("--version", action="store_true", help="print the version")
    made = top.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name, what in commands.items():
        one = new_parser(made, name, what)
        one.set_defaults(run=name)
        if only in (None, name):
            fill[name](one)
    return top
