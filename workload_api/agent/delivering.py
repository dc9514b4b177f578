"""What ``run-with`` and ``sidecar`` do: SVIDs as files beside a program."""

import argparse
import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from spiffe_wire import logs
from spiffe_wire.commandline import DONE, USAGE, CommandError, explained, show
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE, parse_endpoint
from workload_api.agent.asking import address_of
from workload_api.sidecar.children import ProgramError
from workload_api.sidecar.config import ROLE, SidecarSettings


def run_with(arguments: argparse.Namespace) -> int:
    """Run a command with its SVIDs in files; end with its exit code."""
    from workload_api.sidecar.run_with import RunWith, run

    if arguments.words:
        given = shlex.join(arguments.words)
        raise CommandError(
            f"put -- before the command: issuer-agent run-with -- {given}", USAGE
        )
    if not arguments.command_line:
        raise CommandError("name a command: issuer-agent run-with -- COMMAND", USAGE)
    endpoint = address_of(arguments.address)
    with explained("--endpoint" if arguments.address else ENVIRONMENT_VARIABLE):
        parse_endpoint(endpoint)
    wanted = RunWith(
        command=arguments.command_line,
        endpoint=endpoint,
        dir=Path(arguments.dir) if arguments.dir else None,
        spiffe_id=arguments.spiffe_id or "",
        hint=arguments.hint or "",
        audiences=arguments.audience,
        on_renew=arguments.on_renew,
    )
    logs.set_up("text", "warning")
    with explained("run-with"):
        return _coded(run(wanted, os.environ))


def sidecar(arguments: argparse.Namespace) -> int:
    """Keep SVIDs in files as the settings say, until told to stop."""
    from spiffe_wire.settings import example, json_schema

    if arguments.what == "example":
        sys.stdout.write(example(SidecarSettings, {"dir": "/run/svids"}))
        return DONE
    if arguments.what == "schema":
        sys.stdout.write(json.dumps(json_schema(SidecarSettings), indent=2) + "\n")
        return DONE
    if not arguments.config:
        raise CommandError("-c FILE names the settings; --example prints some", USAGE)
    settings = _settings(arguments.config)
    if arguments.what == "check":
        value = {"file": arguments.config, "valid": True}
        show(value, arguments.output, f"{arguments.config} is valid")
        return DONE
    from workload_api.sidecar.app import serve

    logs.set_up(settings.log_style.value, settings.log_level)
    return _coded(serve(settings, os.environ, once=arguments.once))


def _coded(running: Any) -> int:
    # Not uvloop: it forks with grpc's threads running, and grpc says so on standard error.
    try:
        return int(asyncio.run(running))
    except ProgramError as error:
        raise CommandError(str(error), error.code) from error


def _settings(path: str) -> SidecarSettings:
    from spiffe_wire.settings import load

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CommandError(
            f"cannot read {path}: {why}; `issuer-agent sidecar --example` prints one to start "
            "from"
        ) from error
    return load(SidecarSettings, text, os.environ, ROLE)
