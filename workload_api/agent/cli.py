"""
``issuer-agent``: the agent, and a workload's view of it.

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

TEXT = "The node's agent: serves the SPIFFE Workload API to the processes here."
EPILOG = "For a workload: fetch, watch, validate, whoami."
COMMANDS = {
    "run": "run the agent in the foreground",
    "fetch": "fetch what this process is entitled to",
    "watch": "print every update of this process's X509-SVIDs",
    "validate": "validate a JWT-SVID for an audience",
    "whoami": "what the agent learns of this process, and who it is to it",
    "healthcheck": "exit 0 when the agent serves workloads",
    "renew": "sign anew, with new keys, and push",
    "status": "how the agent is",
    "config": "settings of the agent",
    "completion": "print a script that completes commands",
}


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in ([], ["-h"], ["--help"]):
        page = overview("issuer-agent", TEXT, COMMANDS, EPILOG)
        print(page, end="", file=sys.stdout if given else sys.stderr)
        return DONE if given else USAGE
    return guarded(lambda: _run(given))


def _run(given: "list[str]") -> int:
    from workload_api.agent.grammar import SPIRE, parser

    given = given_arguments(given, SPIRE)
    parsed = parser(given[0]).parse_args(given)
    if parsed.version:
        print(version_text("issuer-agent"))
        return DONE
    if not hasattr(parsed, "run"):
        raise CommandError("name a command: `issuer-agent --help` lists them", USAGE)
    from workload_api.agent import commands

    return int(getattr(commands, parsed.run)(parsed))


if __name__ == "__main__":
    sys.exit(main())
