"""
What both command lines share: exit codes, SPIRE's spelling, output, refusals.

Cheap to import, so that ``--help`` costs little more than Python itself: no argparse (see
`spiffe_wire.options`), no typing, no dataclasses; YAML, protobuf and rich when they are used.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any, TextIO

DONE = 0
REFUSED = 1
USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130  # what a shell says of SIGINT

RED, GREEN, YELLOW = 31, 32, 33


class CommandError(Exception):
    """A command cannot go on; the text says what to do next."""

    def __init__(self, text: str, code: int = REFUSED) -> None:
        super().__init__(text)
        self.code = code


def overview(program: str, text: str, commands: "Mapping[str, str]", epilog: str) -> str:
    """Return the first page of help: every command with what it is for."""
    width = max(map(len, commands))
    return "\n".join(
        (
            f"usage: {program} [-h] [--version] COMMAND …",
            "",
            text,
            "",
            "commands:",
            *(f"  {name:<{width}}  {what}" for name, what in commands.items()),
            "",
            f"`{program} COMMAND --help` explains one.  {epilog}",
            "",
        )
    )


def given_arguments(arguments: "Sequence[str]", spire: "Mapping[str, str]") -> list[str]:
    """
    Return *arguments*, with SPIRE's spelling (``-spiffeID X``, ``--ttl=5``) in ours.

    What follows ``--`` is a command of its own and stays as it is.

    Raises:
        CommandError: an argument is not UTF-8.
    """
    made: list[str] = []
    for at, one in enumerate(arguments):
        if one == "--":
            return [*made, *arguments[at:]]
        if any("\ud800" <= letter <= "\udfff" for letter in one):
            raise CommandError("arguments must be UTF-8 text", USAGE)
        name, equals, value = one.lstrip("-").partition("=")
        if one.startswith("-") and name in spire:
            one = f"--{spire[name]}{equals}{value}"
        made.append(one)
    return made


def guarded(run: "Callable[[], int]") -> int:
    """Run a command; print what went wrong, and return its exit code."""
    from spiffe_core.errors import SpiffeError

    try:
        code = run()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CommandError(f"cannot write the answer: {error.strerror}") from error
    except CommandError as error:
        say(str(error))
        return error.code
    except SpiffeError as error:
        say(str(error))
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return code


class explained:  # noqa: N801 read as a statement
    """Turns a parse error into a refusal that names the argument (or file) *what*."""

    def __init__(self, what: str, code: int = USAGE) -> None:
        self._what = what
        self._code = code

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from spiffe_core.errors import MalformedError

        if isinstance(error, MalformedError):
            raise CommandError(f"{self._what}: {error}", self._code) from error


def say(text: str) -> None:
    """Say what went wrong, on standard error, in red on a terminal."""
    print(paint(RED, _lines(text), sys.stderr), file=sys.stderr)


def has_colour(stream: "TextIO") -> bool:
    """True on a terminal that shows colour, unless NO_COLOR is set (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


def paint(colour: int, text: str, stream: "TextIO | None" = None) -> str:
    """Return *text* in *colour* where the stream shows it."""
    return f"\x1b[{colour}m{text}\x1b[0m" if has_colour(stream or sys.stdout) else text


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def plain(text: str) -> str:
    """Return *text* as one line without controls: a peer's text drives no terminal."""
    return text.translate(_CONTROLS)


def _lines(text: str) -> str:
    return "\n".join(plain(one) for one in text.split("\n"))


def show(value: "Any", style: str, text: str = "") -> None:
    """Print *value* for programs, or *text* for people."""
    if style == "json":
        import json

        print(json.dumps(value, indent=2))
    elif style == "yaml":
        import yaml

        print(yaml.safe_dump(value, sort_keys=False), end="")
    elif text:
        print(_lines(text))


def message(one: "Any") -> "Any":
    """Return a protobuf message as plain values, proto names and defaults included."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(
        one, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def table(titles: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> None:
    """Print a table: with colour and fitted on a terminal, plain columns elsewhere."""
    rows = [[plain(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in _columns_of([titles, *rows]):
            print(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*titles, box=None, header_style="bold cyan", pad_edge=False)
    for row in rows:
        # As Text: a selector may read [bold], and is no markup.
        made.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console(no_color=not has_colour(sys.stdout)).print(made)


def _columns_of(rows: "Sequence[Sequence[str]]") -> "Iterator[str]":
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def details(facts: "Sequence[tuple[str, str]]") -> str:
    """Return one thing's facts as lines, names and values aligned; empty values left out."""
    kept = [(name, plain(value)) for name, value in facts if value]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in kept)


def spiffe_id(one: "Any") -> str:
    """Return a ``SPIFFEID`` message as text."""
    return f"spiffe://{one.trust_domain}{one.path}"


def relative(at: int) -> str:
    """Return Unix seconds as a time from now; ``never`` for 0."""
    import time

    if not at:
        return "never"
    span = int(at - time.time())
    amount, unit = abs(span), "s"
    if not amount:
        return "now"
    for size, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if amount >= 2 * size:
            amount, unit = amount // size, name
            break
    return f"in {amount}{unit}" if span >= 0 else f"{amount}{unit} ago"


def version_text(program: str) -> str:
    """Return what ``--version`` prints."""
    from spiffe_core.version import VERSION

    return f"{program} {VERSION}"


def completion_script(parser: "argparse.ArgumentParser", shell: str) -> str:
    """Return a script that completes the commands of *parser* in *shell*."""
    import shtab

    return str(shtab.complete(parser, shell=shell))
