"""``issuer db``: the schema of the server's database, copies of it, and the way back."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from issuer.cli.server import settings_of
from issuer.config import ServerSettings
from issuer.store import backup as copies
from issuer.store import migrate
from issuer.store.engine import make_engine, prepare
from spiffe_core.errors import PreconditionError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.commandline import DONE, REFUSED, CommandError, show


def status(arguments: argparse.Namespace) -> int:
    """Say which schema the database has; exit 1 when it is not this release's."""
    found = schema_of(settings_of(arguments))
    value = {"current": found.current, "wanted": found.wanted, "is_current": found.is_current}
    verdict = "up to date" if found.is_current else "run `issuer db upgrade`"
    text = f"schema {found.current or 'none'}, this release wants {found.wanted}: {verdict}"
    show(value, arguments.output, text)
    return DONE if found.is_current else REFUSED


def upgrade(arguments: argparse.Namespace) -> int:
    """Bring the database to this release's schema."""
    settings = settings_of(arguments)
    with _as_its_owner(settings):
        prepare(settings.database, TrustDomain(settings.trust_domain)).dispose()
    return status(arguments)


def backup(arguments: argparse.Namespace) -> int:
    """Copy the database, which may be in use."""
    settings, to = settings_of(arguments), Path(arguments.file)
    copies.backup(settings.database, to)
    size = to.stat().st_size
    show(
        {"copy": str(to), "bytes": size}, arguments.output,
        f"copied to {to}, {size} bytes; the keys are not in it: "
        f"keep a copy of {settings.data_dir / 'keys'} as well",
    )  # fmt: skip
    return DONE


def restore(arguments: argparse.Namespace) -> int:
    """Make the database anew from a copy."""
    settings, copy = settings_of(arguments), Path(arguments.file)
    if not copy.is_file():
        raise CommandError(f"there is no file {copy}")
    with _as_its_owner(settings):
        actor = f"issuer db restore, uid {os.getuid()}"
        done = copies.restore(copy, settings.database, now=datetime.now(UTC), actor=actor)
        try:
            # Whose it is: the server would refuse another trust domain's, and say so later.
            prepare(settings.database, TrustDomain(settings.trust_domain)).dispose()
        except PreconditionError:
            for beside in ("", "-wal", "-shm", "-journal"):
                Path(f"{settings.database}{beside}").unlink(missing_ok=True)
            raise
    show(
        {"database": str(settings.database), "tokens_dropped": done.tokens_dropped},
        arguments.output,
        f"restored to {settings.database}; {done.tokens_dropped} join tokens were dropped; "
        "bans and changes made after the copy are lost: look at `issuer agent list`",
    )
    return DONE


def schema_of(settings: ServerSettings) -> migrate.SchemaStatus:
    """
    Return the database's schema and this release's.

    Raises:
        CommandError: there is no database, or it cannot be read.
    """
    if not settings.database.exists():
        raise CommandError(
            f"no database at {settings.database}: the server makes it, or `issuer db upgrade`"
        )
    engine = make_engine(settings.database)  # one that writes also tidies up when it closes
    try:
        return migrate.status(engine)
    except SQLAlchemyError as error:
        raise CommandError(
            f"{settings.database} cannot be read as a database: restore a backup with "
            "`issuer db restore`, or look at its owner and mode"
        ) from error
    finally:
        engine.dispose()


@contextmanager
def _as_its_owner(settings: ServerSettings) -> Iterator[None]:
    """
    What is made is the server's: of its user, and private.

    Raises:
        CommandError: the folder belongs to another user, who could not open what we make.
    """
    folder = settings.data_dir
    if folder.exists() and folder.stat().st_uid != os.geteuid():
        owner = folder.stat().st_uid
        raise CommandError(f"{folder} belongs to uid {owner}: run this command as that user")
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
