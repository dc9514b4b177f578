"""The grammar of ``issuer-agent``: every command and option, and SPIRE's names for them."""

import argparse
import os
from typing import Final

from spiffe_wire.options import (
    FILE,
    FOLDER,
    Fill,
    completes,
    new_parser,
    output_option,
    top_parser,
)
from workload_api.agent.cli import COMMANDS, EPILOG, TEXT

ADMIN_VARIABLE = "SPIFFE_ISSUER_AGENT_SOCKET"
DEFAULT_ADMIN = "/run/spiffe-issuer/agent/admin.sock"

SPIRE = {
    "socketPath": "socket",
    "spiffeID": "spiffe-id",
    **{one: one for one in ("audience", "config", "output", "write")},
}
"""SPIRE's option, with one hyphen or two, to ours."""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the grammar; of the command *only* alone when one is named."""
    return top_parser("issuer-agent", TEXT, COMMANDS, EPILOG, _FILL, only)


def _config_option(one: argparse.ArgumentParser) -> None:
    completes(
        one.add_argument(
            "-c", "--config", required=True, metavar="FILE", help="the agent's settings, YAML"
        ),
        FILE,
    )


def _run(one: argparse.ArgumentParser) -> None:
    _config_option(one)
    completes(
        one.add_argument(
            "--join-token-file", metavar="FILE", help="a join token, for the first start"
        ),
        FILE,
    )


def _workload(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--endpoint", "--socket", metavar="ADDRESS",
        help="the Workload API: unix:///path, or a path (or SPIFFE_ENDPOINT_SOCKET)",
    )  # fmt: skip
    output_option(one)


def _fetch(one: argparse.ArgumentParser) -> None:
    kinds = one.add_subparsers(title="kinds", metavar="KIND", required=True, dest="kind")
    for kind, text in (
        ("x509", "X509-SVIDs and the bundles to check others by"),
        ("jwt", "JWT-SVIDs for an audience; printed alone, for use in a header"),
        ("bundles", "trust bundles"),
    ):
        made = new_parser(kinds, kind, text)
        _workload(made)
        if kind == "jwt":
            made.add_argument(
                "--audience", action="append", required=True, metavar="NAME",
                help="who is to accept it; repeatable",
            )  # fmt: skip
            made.add_argument("--spiffe-id", metavar="ID", help="this identity alone")
        else:
            completes(
                made.add_argument(
                    "--write", metavar="DIR", help="write PEM files, keys with mode 0600"
                ),
                FOLDER,
            )


def _validate(one: argparse.ArgumentParser) -> None:
    _workload(one)
    one.add_argument("--audience", required=True, metavar="NAME", help="who is to accept it")
    one.add_argument("token", metavar="TOKEN", help="the JWT-SVID; - reads standard input")


def _admin(one: argparse.ArgumentParser) -> None:
    completes(
        one.add_argument(
            "--socket", dest="admin", metavar="PATH",
            default=os.environ.get(ADMIN_VARIABLE, DEFAULT_ADMIN),
            help=f"the agent's admin socket (or {ADMIN_VARIABLE}; default {DEFAULT_ADMIN})",
        ),
        FILE,
    )  # fmt: skip
    output_option(one)


def _renew(one: argparse.ArgumentParser) -> None:
    _admin(one)
    one.add_argument("--spiffe-id", metavar="ID", help="this identity alone")


def _config(one: argparse.ArgumentParser) -> None:
    what = one.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="what")
    validate = new_parser(what, "validate", "check a settings file")
    _config_option(validate)
    output_option(validate)
    new_parser(what, "example", "print every setting with its default")
    new_parser(what, "schema", "print the JSON schema of the settings")


def _completion(one: argparse.ArgumentParser) -> None:
    one.epilog = "For bash: source <(issuer-agent completion bash)"
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


_FILL: Final[dict[str, Fill]] = {
    "run": _run,
    "fetch": _fetch,
    "watch": _workload,
    "validate": _validate,
    "whoami": _workload,
    "healthcheck": _admin,
    "renew": _renew,
    "status": _admin,
    "config": _config,
    "completion": _completion,
}
