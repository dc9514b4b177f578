"""
``issuer-agent``: the agent, and a workload's view of it.

Only argparse is imported here; each command imports what it needs when it runs.  Exit codes:
0 done, 1 refused or failed, 2 wrong usage, 3 unreachable.
"""

import argparse
import os
import sys
from collections.abc import Sequence

ADMIN_VARIABLE = "SPIFFE_ISSUER_AGENT_SOCKET"
DEFAULT_ADMIN = "/run/spiffe-issuer/agent/admin.sock"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    top = parser()
    parsed = top.parse_args(arguments)
    if not hasattr(parsed, "run"):
        top.print_help()
        return 2
    from workload_api.agent import commands

    return commands.guarded(getattr(commands, parsed.run), parsed)


def parser() -> argparse.ArgumentParser:
    """Return the whole grammar."""
    top = argparse.ArgumentParser(
        prog="issuer-agent",
        description="The node's agent: serves the SPIFFE Workload API to the processes here.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=name)
        return one

    run = add("run", "run the agent in the foreground")
    run.add_argument(
        "-c", "-config", "--config", required=True, help="the agent's settings, YAML"
    )
    run.add_argument(
        "--join-token-file", metavar="FILE", help="a join token, for the first start"
    )
    fetch = add("fetch", "fetch what this process is entitled to")
    kinds = fetch.add_subparsers(metavar="KIND", required=True, dest="kind")
    for kind, text in (
        ("x509", "X509-SVIDs"),
        ("jwt", "JWT-SVIDs"),
        ("bundles", "trust bundles"),
    ):
        one = kinds.add_parser(kind, help=text)
        _workload(one)
        if kind == "jwt":
            one.add_argument("--audience", "-audience", action="append", required=True)
            one.add_argument("--spiffe-id", "-spiffeID", dest="spiffe_id")
        if kind != "jwt":
            one.add_argument(
                "--write", "-write", metavar="DIR", help="write PEM files, keys with mode 0600"
            )
    _workload(add("watch", "print every update of this process's X509-SVIDs"))
    validate = add("validate", "validate a JWT-SVID for an audience")
    _workload(validate)
    validate.add_argument("--audience", "-audience", required=True)
    validate.add_argument("token", help="the JWT-SVID; - reads standard input")
    _workload(add("whoami", "what the agent learns of this process"))
    for name, text in (
        ("healthcheck", "exit 0 when the agent serves workloads"),
        ("renew", "sign anew, with new keys, and push"),
        ("status", "how the agent is"),
    ):
        admin = add(name, text)
        admin.add_argument(
            "--socket", "-socketPath", dest="admin",
            default=os.environ.get(ADMIN_VARIABLE, DEFAULT_ADMIN),
            help=f"the agent's admin socket (or {ADMIN_VARIABLE})",
        )  # fmt: skip
        _output(admin)
        if name == "renew":
            admin.add_argument(
                "--spiffe-id", "-spiffeID", dest="spiffe_id", help="this one alone"
            )
    config = add("config", "print the agent's settings")
    config.add_argument("what", choices=("example", "schema", "validate"))
    config.add_argument("-c", "--config", help="the file to validate")
    completion = add("completion", "print a script that completes commands")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return top


def _workload(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--endpoint", "-socketPath", dest="endpoint",
        help="address of the Workload API (or SPIFFE_ENDPOINT_SOCKET)",
    )  # fmt: skip
    _output(one)


def _output(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "-o", "-output", "--output", choices=("text", "json", "yaml"), default="text",
        help="text for people, json or yaml for programs",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
