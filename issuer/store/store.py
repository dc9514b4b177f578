"""
The store: runs repositories where they belong, one transaction at a time.

Source: architecture A9, A11, SEC-62, SEC-100, SEC-101.  On SQLite a single writer thread
takes everything that waits into one commit (group commit), each in its own savepoint, so
that one refusal undoes nothing of its neighbours; readers have connections of their own.
What a caller is told has happened is on the disk.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from ca.clock import Clock
from ca.journal import AuthorityRecord
from issuer.store.agents import AgentRepository, TokenRepository
from issuer.store.authorities import (
    AuthorityRepository,
    BundleRepository,
    IssuedRepository,
)
from issuer.store.engine import (
    READERS,
    StoreBrokenError,
    StoreError,
    in_transaction,
    make_engine,
    prepare,
    refusal,
)
from issuer.store.entries import EntryRepository
from issuer.store.events import AuditRepository, Event, EventRepository
from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import NotReadyError, SpiffeError
from spiffe_core.spiffeid import TrustDomain

_T = TypeVar("_T")
GROUP: Final = 64  # transactions in one commit
QUEUE: Final = 4096
POLL_SECONDS: Final = 5.0  # the safety net under the wake-up
SYSTEM: Final = "issuer"


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
    answer: Any = None
    problem: BaseException | None = None

    def settle(self) -> None:
        """Tell the caller, who may have left."""
        if self.problem is None:
            self.done.set_result(self.answer)
        else:
            self.done.set_exception(self.problem)


class Store:
    """SQLite in one file; made by `open`, ended by `close`."""

    def __init__(self, path: Path, clock: Clock, engine: Engine) -> None:
        self.path = path
        self._clock = clock
        self._engine = engine
        self._reading = make_engine(path, readers=True)
        self._jobs: queue.Queue[_Job[Any] | None] = queue.Queue(QUEUE)
        self._readers = ThreadPoolExecutor(READERS, "store-read")
        self._writer = threading.Thread(
            target=self._write_loop, name="store-write", daemon=True
        )
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Event] = set()
        self._broken: StoreBrokenError | None = None
        self.problem = ""
        """Why the last change could not be made durable; empty when it was."""
        self._closed = False
        self._writer.start()

    @classmethod
    async def open(cls, path: Path, trust_domain: TrustDomain, clock: Clock) -> Self:
        """
        Open or make the database at *path*, bring its schema up to date, and check it.

        Raises:
            PreconditionError: damaged, of a newer release, or of another trust domain.
        """
        engine = await asyncio.to_thread(prepare, path, trust_domain)
        return cls(path, clock, engine)

    async def close(self) -> None:
        """Finish what was accepted, then close; idempotent."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._jobs.put, None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._reading.dispose()
        self._engine.dispose()

    async def read(self, work: Callable[[Repositories], _T]) -> _T:
        """
        Run *work* on a snapshot of the store, in a reader thread.

        Raises:
            NotReadyError: the store is closed, or held by another process.
            StoreError: the database refused.
        """
        self._check_open()
        return await self._loop.run_in_executor(self._readers, self._read, work)

    async def write(self, work: Callable[[Repositories], _T], *, actor: str = SYSTEM) -> _T:
        """
        Run *work* in a transaction and return its answer once that is durable.

        An exception undoes all that *work* did, and nothing else.  A caller that is
        cancelled does not know whether the change was made.

        Raises:
            NotReadyError: too many writers wait, the disk is full, or the store is closed.
            StoreError: the database refused.
        """
        self._check_open()
        job: _Job[_T] = _Job(work, actor, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise NotReadyError("the database is behind; try again") from None
        return await asyncio.wrap_future(job.done)

    async def probe(self) -> None:
        """
        Write what is there already: does the database take changes again?

        Raises:
            NotReadyError: it does not.
            StoreError: the database refused.
        """
        await self.write(lambda repos: repos.authorities.touch())

    async def changes(self, after: int) -> AsyncIterator[Sequence[Event]]:
        """
        Yield events behind *after* as they are committed, in order, none left out.

        Raises:
            FeedGapError: events behind *after* were pruned; read everything again.
            StoreError: the database failed, and no more changes will be heard of.
        """
        # Everyone has a flag of their own: with one for all, who clears it first would
        # take the others' wake-up away.
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            while True:
                changed.clear()
                self._check_open()
                found = await self.read(lambda repos: repos.events.since(after))  # noqa: B023
                if found:
                    after = found[-1].seq
                    yield found
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await changed.wait()
        finally:
            self._waiting.discard(changed)

    def _check_open(self) -> None:
        if self._broken is not None:
            raise StoreBrokenError(str(self._broken)) from self._broken
        if self._closed:
            raise NotReadyError("the server is stopping")

    def _read(self, work: Callable[[Repositories], _T]) -> _T:
        try:
            with self._reading.connect() as connection:
                return work(self._repositories(connection, SYSTEM))
        except (SQLAlchemyError, UnicodeDecodeError) as error:
            raise refusal(error) from error

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
            # From here on a caller that is cancelled leaves its job running: a future that
            # was cancelled under us must not end this thread.
            if group := [job for job in group if job.done.set_running_or_notify_cancel()]:
                self._commit(group)

    def _commit(self, group: Sequence[_Job[Any]]) -> None:
        wrote = False
        problem: BaseException | None = self._broken
        try:
            if problem is None:
                with self._engine.begin() as connection:
                    for job in group:
                        wrote = self._run(job, connection) or wrote
                    crash_point("store.before_commit")
                crash_point("store.after_commit")
        except SQLAlchemyError as error:
            problem = refusal(error)
        except SpiffeError as error:
            problem = error
        except BaseException as error:  # noqa: BLE001 nobody may wait for ever
            problem = StoreError("the database refused; nothing was changed")
            problem.__cause__ = error
        if isinstance(problem, StoreBrokenError):
            self._broken = problem
        self.problem = "" if problem is None else str(problem)
        for job in group:
            # Nothing was committed, so nothing is acknowledged (SEC-101); who was refused
            # for a reason of their own is told that one.
            if problem is not None and (job.problem is None or self._broken):
                job.problem = problem
            job.settle()
        if (wrote and problem is None) or self._broken:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._wake)

    def _run(self, job: _Job[Any], connection: Connection) -> bool:
        """Do one caller's work in its savepoint; True when it changed something."""
        repositories = self._repositories(connection, job.actor)
        try:
            with connection.begin_nested():
                job.answer = job.work(repositories)
                repositories.events.flush()
                repositories.audit.flush()
        except SQLAlchemyError as error:
            job.problem = refusal(error)
            # SQLite ends the whole transaction by itself when the disk is full or fails.
            # To go on would commit this caller's neighbours piecemeal.
            if isinstance(job.problem, StoreBrokenError) or not in_transaction(connection):
                raise job.problem from error
        except Exception as error:  # noqa: BLE001 it is the caller's answer
            job.problem = error
        return repositories.events.wrote and job.problem is None

    def _wake(self) -> None:
        for changed in self._waiting:
            changed.set()


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
