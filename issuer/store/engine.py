"""
One SQLite file, set up safely, and its errors in our words.

Source: architecture A11, SEC-62 (WAL, FULL, foreign keys, statement time-out, 0600, check at
start), SEC-101 to SEC-103.  The writer begins IMMEDIATE, so that it never finds out halfway
that another process was faster; readers cannot write at all.
"""

import contextlib
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from issuer.store import migrate
from issuer.store.rows import StoredValueError
from issuer.store.wal import is_whole
from spiffe_core.errors import (
    DeadlineError,
    InternalError,
    NotReadyError,
    PreconditionError,
    SpiffeError,
)
from spiffe_core.spiffeid import TrustDomain

READERS: Final = 4
BUSY_SECONDS: Final = 5.0  # SEC-62
STATEMENT_SECONDS: Final = 5.0  # SEC-62
_PROGRESS_STEPS: Final = 20_000  # of SQLite's machine between two looks at the clock: ~1 ms

_FULL, _READONLY, _INTERRUPT = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
)
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_BROKEN: Final = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class StoreError(InternalError):
    """The database cannot do it; the cause is in the log."""


class StoreBrokenError(StoreError):
    """
    The file failed under us, so nothing more is done with it (SEC-101).

    After a failed fsync nobody knows what is on the disk: only a new process that reads it
    again does.
    """


def make_engine(path: Path, *, readers: bool = False) -> Engine:
    """
    Return an engine on the SQLite file at *path*: for the one writer, or for readers.

    Its connections wait 5 s for another process's lock and stop a statement after 5 s.
    """
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        pool_size=READERS if readers else 1,
        max_overflow=0,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )
    pragmas = ["journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"]
    pragmas += ["query_only=ON"] if readers else []
    begin = "BEGIN" if readers else "BEGIN IMMEDIATE"

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        ends = record.info["ends"] = [float("inf")]
        connection.set_progress_handler(lambda: time.monotonic() > ends[0], _PROGRESS_STEPS)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    @event.listens_for(engine, "before_cursor_execute")
    def _time(connection: Connection, *_: object) -> None:
        seconds = connection.get_execution_options().get("seconds", STATEMENT_SECONDS)
        connection.info["ends"][0] = time.monotonic() + seconds

    return engine


def in_transaction(connection: Connection) -> bool:
    """False when SQLite itself has rolled back, as it does on a full disk."""
    return bool(connection.connection.in_transaction)


def refusal(error: SQLAlchemyError | UnicodeDecodeError) -> SpiffeError:
    """Return what to tell the caller; the cause goes along, for the log alone."""
    code = _code_of(error)
    made: SpiffeError
    if code == _FULL:
        made = NotReadyError("the disk is full; nothing was changed")
    elif code == _READONLY:
        made = NotReadyError("the database is read-only; nothing was changed")
    elif code in _BUSY:
        made = NotReadyError("the database is held by another process; nothing was changed")
    elif code == _INTERRUPT:
        made = DeadlineError("the database took longer than 5 s; nothing was changed")
    elif isinstance(error, UnicodeDecodeError) or "Could not decode" in str(error):
        made = StoredValueError("a stored text is damaged: restore the database")
    elif code in _BROKEN:
        made = StoreBrokenError("the database failed: see the log, then start again")
    else:
        made = StoreError("the database refused; nothing was changed")
    made.__cause__ = error
    return made


def _code_of(error: BaseException | None) -> int:
    """The first error's own code: a full disk ends the savepoint, which fails in its turn."""
    code = 0
    while error is not None:
        code = (getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF) or code
        error = error.__context__
    return code


def prepare(path: Path, trust_domain: TrustDomain) -> Engine:
    """
    Open or make the database at *path*, check it, bring its schema up to date; blocks.

    Raises:
        PreconditionError: damaged, unsafe, of a newer release, or of another trust domain.
    """
    try:
        _check_file(path)
        _check_content(path)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be opened: {error.strerror}") from error
    engine = make_engine(path)
    try:
        migrate.upgrade(engine)
        migrate.claim(engine, trust_domain, path)
    except (SQLAlchemyError, UnicodeDecodeError) as error:
        engine.dispose()
        raise unusable(path, _code_of(error)) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _check_file(path: Path) -> None:
    """The file and its folder are ours alone; the file's mode is right from its first byte."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Whoever may write in the folder may swap the file, and the log beside it.
        held = os.fstat(folder)
        if held.st_uid not in {0, os.geteuid()} or stat.S_IMODE(held.st_mode) & 0o022:
            raise PreconditionError(
                f"{path.parent} must be writable by this user alone: chmod go-w {path.parent}"
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(path.name, flags, 0o600, dir_fd=folder)
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
        os.fsync(folder)  # a file whose name is lost with the power has lost all it held
    finally:
        os.close(folder)
    if not stat.S_ISREG(found.st_mode):
        raise PreconditionError(f"{path} is not a plain file")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PreconditionError(f"{path} must be this user's alone: chmod 0600 {path}")


def _check_content(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    # Asked twice, as a command may look at a database that a server is writing to.
    if not is_whole(log) and not is_whole(log):
        raise PreconditionError(
            f"{log} is damaged, and changes that were acknowledged lie behind the damage; it "
            "was left as it is: restore a backup with `issuer db restore`"
        )
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise unusable(path, getattr(error, "sqlite_errorcode", 0) & 0xFF) from error
    if verdict != "ok":
        raise unusable(path)


def unusable(path: Path, code: int = 0) -> PreconditionError:
    """Why a server cannot begin with the database at *path*, and what to do."""
    return PreconditionError(f"{path} {_UNUSABLE.get(code, _DAMAGED)}")


_UNUSABLE: Final = {
    _FULL: "is on a disk that is full: make room, then start again",
    _READONLY: "cannot be written: have its disk mounted for writing, then start again",
    **dict.fromkeys(_BUSY, "is held by another process: end that, then start again"),
}
_DAMAGED: Final = (
    "is damaged or not a database of ours, and was left as it is: restore a backup with "
    "`issuer db restore`, or move it and the keys beside it away to begin anew"
)
