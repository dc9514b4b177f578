"""
``issuer``: the server, and everything an operator asks of it.

Each command imports what it needs when it runs, and the first page of help imports nothing.
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 unreachable.
"""

import sys

from spiffe_wire.commandline import (
    DONE,
    USAGE,
    CommandError,
    given_arguments,
    guarded,
    overview,
    version_text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT = "Workload identity: the server of a SPIFFE trust domain."
EPILOG = "Start with `issuer dev`."
COMMANDS = {
    "dev": "one trust domain on this machine; `-- COMMAND` runs one in it",
    "server": "the server itself",
    "config": "settings of the server",
    "db": "the server's database",
    "entry": "registration entries: which process gets which identity",
    "token": "join tokens: how an agent joins",
    "agent": "attested agents",
    "bundle": "trust bundles: ours, and foreign ones exchanged by hand",
    "x509": "X509-SVIDs",
    "jwt": "JWT-SVIDs",
    "explain": "why a process gets an identity, or does not",
    "doctor": "look for what is wrong here, and say what to do",
    "healthcheck": "exit 0 when the server is healthy",
    "completion": "print a script that completes commands",
}


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in ([], ["-h"], ["--help"]):
        page = overview("issuer", TEXT, COMMANDS, EPILOG)
        print(page, end="", file=sys.stdout if given else sys.stderr)
        return DONE if given else USAGE
    return guarded(lambda: _run(given))


def _run(given: "list[str]") -> int:
    import importlib

    from issuer.cli.grammar import SPIRE, parser

    given = given_arguments(given, SPIRE)
    command: list[str] = []
    if given[:1] == ["dev"] and "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    parsed = parser(given[0]).parse_args(given)
    if parsed.version:
        print(version_text("issuer"))
        return DONE
    if not hasattr(parsed, "run"):
        raise CommandError("name a command: `issuer --help` lists them", USAGE)
    parsed.command_line = command
    module, _, function = parsed.run.partition(":")
    loaded = importlib.import_module(f"issuer.cli.{module}")
    return int(getattr(loaded, function)(parsed))
