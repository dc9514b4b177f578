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
        completes(
            made.add_argument(
                "--write",
                metavar="DIR",
                help="write files there, keys and tokens with mode 0600",
            ),
            FOLDER,
        )
        if kind == "jwt":
            made.add_argument(
                "--audience", action="append", required=True, metavar="NAME",
                help="who is to accept it; repeatable",
            )  # fmt: skip
            made.add_argument("--spiffe-id", metavar="ID", help="this identity alone")
            continue
        made.add_argument(
            "--format", choices=("pem", "pkcs12"), default="pem",
            help="what --write writes: pem (the default), or pkcs12 as Java reads it",
        )  # fmt: skip
        completes(
            made.add_argument(
                "--password-file", metavar="FILE",
                help="seal PKCS#12 with the first line of this file",
            ),
            FILE,
        )  # fmt: skip


def _run_with(one: argparse.ArgumentParser) -> None:
    one.usage = "issuer-agent run-with [options] -- COMMAND [ARGUMENT…]"
    one.add_argument(
        "--endpoint", "--socket", dest="address", metavar="ADDRESS",
        help="the Workload API: unix:///path, or a path (or SPIFFE_ENDPOINT_SOCKET)",
    )  # fmt: skip
    completes(
        one.add_argument(
            "--dir", metavar="DIR",
            help="write the files there, and leave them; without it they are in a private "
            "folder, in memory where there is such a place, which goes with the command",
        ),
        FOLDER,
    )  # fmt: skip
    one.add_argument("--spiffe-id", metavar="ID", help="this identity; else the agent's first")
    one.add_argument("--hint", metavar="HINT", help="the identity with this hint")
    one.add_argument(
        "--audience", action="append", default=[], metavar="NAME",
        help="a JWT-SVID for this audience too; repeatable, a file for each",
    )  # fmt: skip
    one.add_argument(
        "--on-renew",
        default="none",
        metavar="WHAT",
        help="what to do when the files have changed: none (the default), signal:HUP, restart, "
        "or 'run:PROGRAM ARGUMENT…', which no shell sees",
    )
    # A command without its `--`, to be told so.
    one.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _sidecar(one: argparse.ArgumentParser) -> None:
    completes(
        one.add_argument("-c", "--config", metavar="FILE", help="its settings, YAML"), FILE
    )
    one.add_argument(
        "--once", action="store_true", help="end when every file is there, as an init container"
    )
    what = one.add_mutually_exclusive_group()
    for name, text in (
        ("check", "check the settings, and do nothing"),
        ("example", "print every setting with its default"),
        ("schema", "print the JSON schema of the settings"),
    ):
        what.add_argument(f"--{name}", dest="what", action="store_const", const=name, help=text)
    output_option(one)


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
    "run-with": _run_with,
    "sidecar": _sidecar,
    "healthcheck": _admin,
    "renew": _renew,
    "status": _admin,
    "config": _config,
    "completion": _completion,
}
