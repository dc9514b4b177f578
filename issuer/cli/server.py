"""``issuer server run``, ``config``, ``db``, ``completion``."""

import argparse
import json
import os
import sys
from pathlib import Path

from issuer.cli.calls import DONE, REFUSED, CommandError
from issuer.cli.output import show
from issuer.config import ROLE, ServerSettings
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
    except OSError as error:
        raise CommandError(
            f"cannot read {arguments.config}: {error.strerror}; `issuer config example` "
            "prints one to start from"
        ) from error
    return load(ServerSettings, text, os.environ, ROLE)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from issuer.lifecycle import run_server

    return run_server(settings_of(arguments))


def validate(arguments: argparse.Namespace) -> int:
    """Check a settings file."""
    settings_of(arguments)
    print(f"{arguments.config} is valid")
    return DONE


def example(_: argparse.Namespace) -> int:
    """Print every setting."""
    print(example_of(ServerSettings, {"trust_domain": "example.org"}), end="")
    return DONE


def schema(_: argparse.Namespace) -> int:
    """Print the JSON schema."""
    print(json.dumps(json_schema(ServerSettings), indent=2))
    return DONE


def db_status(arguments: argparse.Namespace) -> int:
    """Say which schema the database has."""
    from issuer.store import migrate
    from issuer.store.engine import make_engine

    settings = settings_of(arguments)
    if not settings.database.exists():
        raise CommandError(f"no database at {settings.database}: `issuer db upgrade` makes it")
    found = migrate.status(make_engine(settings.database))
    value = {"current": found.current, "wanted": found.wanted, "is_current": found.is_current}
    verdict = "up to date" if found.is_current else "run `issuer db upgrade`"
    show(
        value,
        arguments.output,
        f"schema {found.current}, this release wants {found.wanted}: {verdict}",
    )
    return DONE if found.is_current else REFUSED


def db_upgrade(arguments: argparse.Namespace) -> int:
    """Bring the database to this release's schema."""
    import asyncio

    from ca.clock import SystemClock
    from issuer.store.store import Store
    from spiffe_core.spiffeid import TrustDomain

    settings = settings_of(arguments)

    async def upgrade() -> None:
        os.umask(0o077)
        domain = TrustDomain(settings.trust_domain)
        await (await Store.open(settings.database, domain, SystemClock())).close()

    asyncio.run(upgrade())
    return db_status(arguments)


def completion(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    import shtab

    from issuer.cli import parser

    sys.stdout.write(shtab.complete(parser(), shell=arguments.shell))
    return DONE
