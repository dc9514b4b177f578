"""
Copies of the database, and the way back (SEC-64, BUNDLE-08).

The database holds no private key, so neither does a copy.  A copy is of the past: what was
used, banned or counted up since is not in it.  So a restored database begins a new epoch,
forgets every join token, and counts on from far above what anybody can have seen.
"""

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, delete, update
from sqlalchemy.exc import SQLAlchemyError

from issuer.store import migrate
from issuer.store.engine import make_engine
from issuer.store.events import AuditRepository
from issuer.store.tables import entries, gone_entries, meta, tokens
from spiffe_core.errors import AlreadyExistsError, PreconditionError

LEAP: Final = 1 << 24  # more changes than any trust domain makes between two backups


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did."""

    epoch: str
    tokens_dropped: int


def backup(path: Path, to: Path) -> None:
    """
    Copy the database at *path*, which may be in use, to the new file *to*; blocks.

    Raises:
        AlreadyExistsError: *to* is there.
        PreconditionError: there is no database at *path*, or it cannot be read.
    """
    if not path.is_file():
        raise PreconditionError(f"there is no database at {path}")
    try:
        _copy(path, to)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{to} is there already; nothing was changed") from error
    except (sqlite3.Error, OSError) as error:
        raise PreconditionError(f"{path} cannot be copied to {to}") from error


def restore(copy: Path, path: Path, *, now: datetime, actor: str) -> Restored:
    """
    Make the database at *path*, where none may be, from *copy*; blocks.

    Raises:
        AlreadyExistsError: a database, or what is left of one, is at *path*.
        PreconditionError: *copy* is damaged, or of a newer release.
    """
    for beside in ("", "-wal", "-shm", "-journal"):
        if os.path.lexists(f"{path}{beside}"):
            raise AlreadyExistsError(
                f"{path}{beside} is there: stop the server and move it away first"
            )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.restoring")
    for beside in ("", "-wal", "-shm", "-journal"):
        Path(f"{unfinished}{beside}").unlink(missing_ok=True)
    try:
        _copy(copy, unfinished)
        done = _begin_anew(unfinished, now, actor)
    except (sqlite3.Error, SQLAlchemyError, OSError) as error:
        raise PreconditionError(f"{copy} cannot be restored: it is damaged") from error
    unfinished.rename(path)
    _sync(path.parent)
    return done


def _copy(source: Path, to: Path) -> None:
    descriptor = os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with (
            contextlib.closing(
                sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
            ) as old,
            contextlib.closing(sqlite3.connect(to)) as new,
        ):
            old.backup(new)
            (verdict,) = new.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError("damaged")
        os.fsync(descriptor)
    except BaseException:
        to.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync(to.parent)


def _begin_anew(path: Path, now: datetime, actor: str) -> Restored:
    engine = make_engine(path)
    try:
        migrate.upgrade(engine)
        with engine.begin() as connection:
            done = _leap(connection)
            audit = AuditRepository(connection, now, actor)
            audit.add("store.restore", done.epoch)
            audit.flush()
    finally:
        engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        # One file again, so that one rename puts it in place.
        connection.execute("PRAGMA journal_mode=DELETE")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return done


def _leap(connection: Connection) -> Restored:
    epoch = migrate.new_epoch()
    connection.execute(
        update(meta).values(epoch=epoch, bundle_sequence=meta.c.bundle_sequence + LEAP)
    )
    for table in (entries, gone_entries):
        connection.execute(update(table).values(revision_number=table.c.revision_number + LEAP))
    dropped = connection.execute(delete(tokens)).rowcount
    return Restored(epoch, dropped)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
