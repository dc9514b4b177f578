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
EPILOG = "For a workload: fetch, watch, validate, whoami, run-with, sidecar."
COMMANDS = {
    "run": "run the agent in the foreground",
    "fetch": "fetch what this process is entitled to",
    "watch": "print every update of this process's X509-SVIDs",
    "validate": "validate a JWT-SVID for an audience",
    "whoami": "what the agent learns of this process, and who it is to it",
    "run-with": "run a command with its SVIDs in files: `run-with -- COMMAND`",
    "sidecar": "keep SVIDs in files for a program beside this one",
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


MODULES = {
    **dict.fromkeys(("fetch", "watch", "validate", "whoami"), "workload"),
    **dict.fromkeys(("run-with", "sidecar"), "delivering"),
}
"""Where a command is done; the others are in `workload_api.agent.commands`."""


def _run(given: "list[str]") -> int:
    import importlib

    from workload_api.agent.grammar import SPIRE, parser

    given = given_arguments(given, SPIRE)
    command: list[str] = []
    if given[:1] == ["run-with"] and "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    parsed = parser(given[0]).parse_args(given)
    if parsed.version:
        print(version_text("issuer-agent"))
        return DONE
    if not hasattr(parsed, "run"):
        raise CommandError("name a command: `issuer-agent --help` lists them", USAGE)
    parsed.command_line = command
    module = MODULES.get(parsed.run, "commands")
    loaded = importlib.import_module(f"workload_api.agent.{module}")
    return int(getattr(loaded, parsed.run.replace("-", "_"))(parsed))


if __name__ == "__main__":
    sys.exit(main())
