"""
The store: runs repositories where they belong, one transaction at a time.

Source: architecture A9, A11, SEC-62, SEC-100, SEC-101.  On SQLite a single writer thread
takes everything that waits into one commit (group commit), each in its own savepoint, so
that one refusal undoes nothing of its neighbours; readers have connections of their own.
What a caller is told has happened is on the disk.
"""

import asyncio
import contextlib
import os
import queue
import stat
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from ca.clock import Clock
from ca.crashpoints import crash_point
from ca.journal import AuthorityRecord
from issuer.store import migrate
from issuer.store.agents import AgentRepository, TokenRepository
from issuer.store.authorities import (
    AuthorityRepository,
    BundleRepository,
    IssuedRepository,
)
from issuer.store.entries import EntryRepository
from issuer.store.events import AuditRepository, Event, EventRepository
from spiffe_core.bundle import Bundle
from spiffe_core.errors import InternalError, NotReadyError, PreconditionError
from spiffe_core.spiffeid import TrustDomain

_T = TypeVar("_T")
READERS: Final = 4
GROUP: Final = 64  # transactions in one commit
QUEUE: Final = 4096
BUSY_MS: Final = 5000  # SEC-62
POLL_SECONDS: Final = 5.0  # the safety net under the wake-up
SYSTEM: Final = "issuer"


class StoreError(InternalError):
    """The database cannot do it; the cause is in the log."""


@dataclass(frozen=True)
class Repositories:
    """Everything in the store, over one transaction."""

    entries: EntryRepository
    agents: AgentRepository
    tokens: TokenRepository
    authorities: AuthorityRepository
    bundles: BundleRepository
    issued: IssuedRepository
    events: EventRepository
    audit: AuditRepository


@dataclass(slots=True)
class _Job(Generic[_T]):
    work: Callable[[Repositories], _T]
    actor: str
    done: "Future[_T]"


class Store:
    """SQLite in one file; made by `open`, ended by `close`."""

    def __init__(self, path: Path, clock: Clock, engine: Engine) -> None:
        self.path = path
        self._clock = clock
        self._engine = engine
        self._jobs: queue.Queue[_Job[Any] | None] = queue.Queue(QUEUE)
        self._readers = ThreadPoolExecutor(READERS, "store-read")
        self._writer = threading.Thread(
            target=self._write_loop, name="store-write", daemon=True
        )
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._writer.start()

    @classmethod
    async def open(cls, path: Path, trust_domain: TrustDomain, clock: Clock) -> Self:
        """
        Open or make the database at *path*, bring its schema up to date, and check it.

        Raises:
            PreconditionError: damaged, of a newer release, or of another trust domain.
        """
        engine = await asyncio.to_thread(_prepare, path, trust_domain)
        return cls(path, clock, engine)

    async def close(self) -> None:
        """Finish what was accepted, then close; idempotent."""
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        self._readers.shutdown()
        self._engine.dispose()

    async def read(self, work: Callable[[Repositories], _T]) -> _T:
        """Run *work* on a snapshot of the store, in a reader thread."""
        return await self._loop.run_in_executor(self._readers, self._read, work)

    async def write(self, work: Callable[[Repositories], _T], *, actor: str = SYSTEM) -> _T:
        """
        Run *work* in a transaction and return its answer once that is durable.

        An exception undoes all that *work* did, and nothing else.

        Raises:
            NotReadyError: the queue of writers is full.
            StoreError: the database refused.
        """
        job: _Job[_T] = _Job(work, actor, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise NotReadyError("the database is behind; try again") from None
        return await asyncio.wrap_future(job.done)

    async def changes(self, after: int) -> AsyncIterator[Sequence[Event]]:
        """Yield events behind *after* as they are committed, in order, none left out."""
        while True:
            self._changed.clear()
            found = await self.read(lambda repos: repos.events.since(after))  # noqa: B023
            if found:
                after = found[-1].seq
                yield found
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()

    def _read(self, work: Callable[[Repositories], _T]) -> _T:
        try:
            with self._engine.connect() as connection:
                return work(self._repositories(connection, SYSTEM))
        except SQLAlchemyError as error:
            raise StoreError("the database cannot be read") from error

    def _repositories(self, connection: Connection, actor: str) -> Repositories:
        now: datetime = self._clock.now()
        events = EventRepository(connection, now)
        return Repositories(
            EntryRepository(connection, events, now),
            AgentRepository(connection, events),
            TokenRepository(connection, now),
            AuthorityRepository(connection, events),
            BundleRepository(connection, events),
            IssuedRepository(connection),
            events,
            AuditRepository(connection, now, actor),
        )

    def _write_loop(self) -> None:
        stopping = False
        while not stopping:
            first = self._jobs.get()
            group = [] if first is None else [first]
            stopping = first is None
            while not stopping and len(group) < GROUP:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    stopping = True
                else:
                    group.append(job)
            if group:
                self._commit(group)

    def _commit(self, group: Sequence[_Job[Any]]) -> None:
        answers: list[tuple[_Job[Any], Any, BaseException | None]] = []
        wrote = False
        try:
            with self._engine.begin() as connection:
                for job in group:
                    repositories = self._repositories(connection, job.actor)
                    try:
                        with connection.begin_nested():
                            answers.append((job, job.work(repositories), None))
                        wrote = wrote or repositories.events.wrote
                    except SQLAlchemyError as error:
                        refused = StoreError("the database refused the change")
                        refused.__cause__ = error
                        answers.append((job, None, refused))
                    except Exception as error:  # noqa: BLE001 it is the caller's answer
                        answers.append((job, None, error))
                crash_point("store.before_commit")
            crash_point("store.after_commit")
        except SQLAlchemyError as error:
            # Nothing was committed, so nothing is acknowledged (SEC-101).
            failed = NotReadyError("the database cannot be written; nothing was changed")
            failed.__cause__ = error
            answers = [(job, None, failed) for job in group]
            wrote = False
        for job, answer, problem in answers:
            if problem is not None:
                job.done.set_exception(problem)
            else:
                job.done.set_result(answer)
        if wrote:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._changed.set)


class SqlJournal:
    """`ca.journal.JournalStore` on the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def load(self) -> tuple[AuthorityRecord, ...]:
        """Return every record."""
        return await self._store.read(lambda repos: repos.authorities.all())

    async def add_prepared(self, record: AuthorityRecord) -> None:
        """Add a PREPARED record; see `JournalStore`."""

        def work(repos: Repositories) -> None:
            repos.authorities.add_prepared(record)
            repos.audit.add("authority.prepare", record.authority_id)

        await self._store.write(work)

    async def published(self) -> Bundle:
        """Read the bundle back."""
        return await self._store.read(lambda repos: repos.authorities.bundle())

    async def activate(self, authority_id: str, *, at: datetime) -> None:
        """PREPARED to ACTIVE; see `JournalStore`."""

        def work(repos: Repositories) -> None:
            repos.authorities.activate(authority_id, at)
            repos.audit.add("authority.activate", authority_id)

        await self._store.write(work)

    async def prune(self, authority_id: str) -> None:
        """Drop an OLD record."""

        def work(repos: Repositories) -> None:
            repos.authorities.prune(authority_id)
            repos.audit.add("authority.prune", authority_id)

        await self._store.write(work)


def make_engine(path: Path) -> Engine:
    """Return an engine on the SQLite file at *path*, with every connection set up alike."""
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=READERS + 1,
        max_overflow=0,
        connect_args={"timeout": BUSY_MS / 1000, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _prepare(path: Path, trust_domain: TrustDomain) -> Engine:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The file is made by us, so that its mode is right from the first byte.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    os.close(descriptor)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PreconditionError(f"{path} must be this user's alone: chmod 0600 {path}")
    engine = make_engine(path)
    try:
        with engine.connect() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise PreconditionError(f"{path} is damaged: restore it from a backup")
        migrate.upgrade(engine)
        migrate.claim(engine, trust_domain, path)
    except (OperationalError, DatabaseError) as error:
        engine.dispose()
        raise PreconditionError(
            f"{path} cannot be used as a database: restore it from a backup, or see the log"
        ) from error
    except Exception:
        engine.dispose()
        raise
    return engine
