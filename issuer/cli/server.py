"""``issuer server run``, ``config``, ``completion``."""

import argparse
import json
import os
import sys
from pathlib import Path

from issuer.config import ROLE, ServerSettings
from spiffe_wire.commandline import DONE, CommandError, completion_script, show
from spiffe_wire.settings import example as example_of
from spiffe_wire.settings import json_schema, load


def settings_of(arguments: argparse.Namespace) -> ServerSettings:
    """
    Load the settings that ``-c`` names, environment included.

    Raises:
        CommandError: the file cannot be read.
        SettingsError: a setting is unknown or impossible.
    """
    try:
        text = Path(arguments.config).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CommandError(
            f"cannot read {arguments.config}: {why}; `issuer config example` prints one to "
            "start from"
        ) from error
    return load(ServerSettings, text, os.environ, ROLE)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from issuer.lifecycle import run_server

    return run_server(settings_of(arguments))


def validate(arguments: argparse.Namespace) -> int:
    """Check a settings file."""
    settings_of(arguments)
    value = {"file": arguments.config, "valid": True}
    show(value, arguments.output, f"{arguments.config} is valid")
    return DONE


def example(_: argparse.Namespace) -> int:
    """Print every setting."""
    print(example_of(ServerSettings, {"trust_domain": "example.org"}), end="")
    return DONE


def schema(_: argparse.Namespace) -> int:
    """Print the JSON schema."""
    print(json.dumps(json_schema(ServerSettings), indent=2))
    return DONE


def completion(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    from issuer.cli.grammar import parser

    sys.stdout.write(completion_script(parser(), arguments.shell))
    return DONE
