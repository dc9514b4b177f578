"""
``issuer``: the server, and everything an operator asks of it.

Each command imports what it needs when it runs, so that ``--help`` costs little more than
Python itself.  Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 unreachable.
"""

import sys

from issuer.cli.grammar import SPIRE, parser
from spiffe_wire.commandline import (
    DONE,
    USAGE,
    CommandError,
    given_arguments,
    guarded,
    say,
    version_text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command and return its exit code."""
    try:
        given = given_arguments(sys.argv[1:] if arguments is None else arguments, SPIRE)
    except CommandError as error:
        say(str(error))
        return error.code
    command: list[str] = []
    if given[:1] == ["dev"] and "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    top = parser(given[0] if given else "")
    parsed = top.parse_args(given)
    if parsed.version:
        print(version_text("issuer"))
        return DONE
    if not hasattr(parsed, "run"):
        top.print_help(sys.stderr)
        return USAGE
    parsed.command_line = command
    module, _, function = parsed.run.partition(":")

    def run() -> int:
        import importlib

        loaded = importlib.import_module(f"issuer.cli.{module}")
        return int(getattr(loaded, function)(parsed))

    return guarded(run)
