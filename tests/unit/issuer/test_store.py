"""The store: one writer, group commit, readers, the feed (A2, A9, A11)."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from issuer.store.engine import StoreBrokenError, StoreError, refusal
from issuer.store.entries import SimilarEntryError
from issuer.store.events import Event, EventKind, FeedGapError
from issuer.store.store import Repositories, Store
from spiffe_core.errors import AlreadyExistsError, DeadlineError, NotReadyError
from tests.support.store import StoppedClock, a_store, an_agent, an_entry, node_id

Work = Callable[[Repositories], Any]


def adds(name: str) -> Work:
    """Work that adds the entry *name*."""
    return lambda repos: repos.entries.create(an_entry(f"/{name}", id=name))


async def held(store: Store) -> tuple[threading.Event, "asyncio.Future[bool]"]:
    """Keep the writer busy until the event is set."""
    started, release = threading.Event(), threading.Event()

    def hold(_: Repositories) -> bool:
        started.set()
        return release.wait(10)

    holding = asyncio.ensure_future(store.write(hold))
    await asyncio.to_thread(started.wait, 10)
    return release, holding


async def all_at_once(store: Store, *works: Work) -> list[object]:
    """Let *works* wait together, so that one commit takes them all; what each got."""
    release, holding = await held(store)
    tasks = [asyncio.ensure_future(store.write(work)) for work in works]
    await asyncio.sleep(0)
    assert store._jobs.qsize() == len(works)
    release.set()
    await holding
    return await asyncio.gather(*tasks, return_exceptions=True)


def count_and_last(repos: Repositories) -> tuple[int, int]:
    """How many entries there are, and the last event."""
    return repos.entries.count(), repos.events.last()


async def test_write_then_read(tmp_path: Path) -> None:
    """What a write returned is there for the next reader."""
    async with a_store(tmp_path) as store:
        made = await store.write(lambda repos: repos.entries.create(an_entry()))
        assert await store.read(lambda repos: repos.entries.get(made.id)) == made


async def test_one_refusal_undoes_nothing_of_its_neighbours(tmp_path: Path) -> None:
    """In one commit, a failing caller loses its own changes, events and audit rows alone."""

    def fails(repos: Repositories) -> None:
        repos.entries.create(an_entry("/half", id="half"))
        repos.audit.add("entry.create", "half")
        raise ValueError("mine")

    def tells(name: str) -> Work:
        def work(repos: Repositories) -> str:
            repos.audit.add("entry.create", name)
            return repos.entries.create(an_entry(f"/{name}", id=name)).id

        return work

    async with a_store(tmp_path) as store:
        got = await all_at_once(store, tells("one"), fails, tells("two"), tells("one"))
        assert got[0] == "one" and got[2] == "two"
        assert isinstance(got[1], ValueError) and isinstance(got[3], SimilarEntryError)
        found = await store.read(lambda repos: [entry.id for entry in repos.entries.all()])
        events = await store.read(lambda repos: [one.key for one in repos.events.since(0)])
        audit = await store.read(lambda repos: [one.target for one in repos.audit.rows()])
    assert found == events == audit == ["one", "two"]


async def test_a_caller_that_leaves_does_not_stop_the_writer(tmp_path: Path) -> None:
    """A cancelled write is dropped or finished, and those behind it are served."""
    async with a_store(tmp_path) as store:
        release, running = await held(store)
        waiting = asyncio.ensure_future(
            store.write(lambda repos: repos.entries.create(an_entry()))
        )
        await asyncio.sleep(0)
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        release.set()
        async with asyncio.timeout(10):
            await store.write(adds("after"))
        assert await store.read(lambda repos: [one.id for one in repos.entries.all()]) == [
            "after"
        ]


async def test_sec_104_a_full_queue_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-104: writes wait in a bounded queue; one more is told to try again."""
    monkeypatch.setattr("issuer.store.store.QUEUE", 2)
    async with a_store(tmp_path) as store:
        release, running = await held(store)
        tasks = [asyncio.ensure_future(store.write(count_and_last)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="behind"):
            await store.write(count_and_last)
        release.set()
        await asyncio.gather(running, *tasks)


async def test_closing_finishes_what_was_accepted(tmp_path: Path) -> None:
    """Writes accepted before `close` are durable after it; later ones are refused."""
    async with a_store(tmp_path) as store:
        writes = [
            asyncio.ensure_future(
                store.write(lambda repos, n=n: repos.entries.create(an_entry(f"/{n}")))
            )
            for n in range(100)
        ]
        await asyncio.sleep(0)
        await store.close()
        assert len(await asyncio.gather(*writes)) == 100
        with pytest.raises(NotReadyError, match="stopping"):
            await store.write(count_and_last)
        with pytest.raises(NotReadyError, match="stopping"):
            await store.read(count_and_last)
        await store.close()
    async with a_store(tmp_path) as store:
        assert await store.read(count_and_last) == (100, 100)


async def test_readers_cannot_write(tmp_path: Path) -> None:
    """A reader that tries to change something is refused by SQLite itself."""
    async with a_store(tmp_path) as store:
        with pytest.raises(NotReadyError, match="read-only"):
            await store.read(lambda repos: repos.agents.attested(an_agent()))
        assert await store.read(lambda repos: repos.agents.count()) == 0


async def test_readers_see_one_snapshot(tmp_path: Path) -> None:
    """What is committed while a reader reads, it does not see; the next one does."""
    async with a_store(tmp_path) as store:
        started, go_on = threading.Event(), threading.Event()

        def reads(repos: Repositories) -> tuple[int, int]:
            first = repos.entries.count()
            started.set()
            go_on.wait(10)
            return first, repos.entries.count()

        reading = asyncio.ensure_future(store.read(reads))
        await asyncio.to_thread(started.wait, 10)
        await store.write(lambda repos: repos.entries.create(an_entry()))
        go_on.set()
        assert await reading == (0, 0)
        assert await store.read(lambda repos: repos.entries.count()) == 1


def fill(repos: Repositories) -> None:
    """Write until the file may grow no more."""
    for number in range(2000):
        hint = "x" * 1000
        repos.entries.create(an_entry(f"/fill/{number}", id=f"fill{number}", hint=hint))


async def limit_pages(store: Store, pages: int) -> None:
    """Let the writer's file grow to *pages* only, as a full disk would."""

    def work(repos: Repositories) -> None:
        repos.entries._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await store.write(work)


async def test_sec_102_a_full_disk_refuses_and_heals(tmp_path: Path) -> None:
    """SEC-102: a full disk is a clear refusal that changes nothing, and heals by itself."""
    async with a_store(tmp_path) as store:
        await store.write(lambda repos: repos.entries.create(an_entry("/old", id="old")))
        await limit_pages(store, 100)
        got = await all_at_once(
            store, fill, lambda repos: repos.entries.create(an_entry("/new", id="new"))
        )
        assert isinstance(got[0], NotReadyError) and "disk is full" in str(got[0])
        found = await store.read(lambda repos: [one.id for one in repos.entries.all()])
        # Its neighbour was kept or refused with it: acknowledged means there.
        assert found == (["old"] if isinstance(got[1], Exception) else ["old", "new"])
        await limit_pages(store, 100_000)
        await store.write(fill)
        assert (await store.read(count_and_last))[0] >= 2001


async def test_a_transaction_that_sqlite_ended_is_not_gone_on_with(tmp_path: Path) -> None:
    """When SQLite rolls all back in mid-group, nobody of the group is told it worked."""

    def ends(repos: Repositories) -> None:
        repos.entries._connection.exec_driver_sql("ROLLBACK")
        repos.entries.create(an_entry("/loose"))

    async with a_store(tmp_path) as store:
        got = await all_at_once(store, adds("before"), ends, adds("behind"))
        assert all(isinstance(one, Exception) for one in got)
        async with asyncio.timeout(10):
            await store.write(adds("later"))
        found = await store.read(lambda repos: [one.id for one in repos.entries.all()])
    assert "before" not in found and "behind" not in found and "later" in found


def an_error(code: int) -> OperationalError:
    """What SQLAlchemy makes of SQLite's error *code*."""
    cause = sqlite3.OperationalError("detail")
    cause.sqlite_errorcode = code
    return OperationalError("statement", None, cause)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (sqlite3.SQLITE_FULL, NotReadyError, "disk is full"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, NotReadyError, "read-only"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, NotReadyError, "another process"),
        (sqlite3.SQLITE_LOCKED, NotReadyError, "another process"),
        (sqlite3.SQLITE_INTERRUPT, DeadlineError, "longer than 5 s"),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreBrokenError, "start again"),
        (sqlite3.SQLITE_CORRUPT_VTAB, StoreBrokenError, "start again"),
        (sqlite3.SQLITE_NOTADB, StoreBrokenError, "start again"),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, StoreError, "refused"),
    ],
)
def test_errors_in_our_words(code: int, kind: type[Exception], text: str) -> None:
    """Each of SQLite's errors is told as what the caller can do about it, without detail."""
    made = refusal(an_error(code))
    assert type(made) is kind and text in str(made) and "detail" not in str(made)


async def test_sec_101_after_a_failed_fsync_nothing_more_is_done(tmp_path: Path) -> None:
    """SEC-101: once the file failed all work is refused, and the feed ends."""

    def fails(repos: Repositories) -> None:
        raise an_error(sqlite3.SQLITE_IOERR_FSYNC)

    async with a_store(tmp_path) as store:
        feed = store.changes(0)
        hearing = asyncio.ensure_future(anext(feed))
        await asyncio.sleep(0.05)
        got = await all_at_once(store, adds("a"), fails, adds("b"))
        assert [type(one) for one in got] == [StoreBrokenError] * 3
        with pytest.raises(StoreBrokenError):
            await store.write(count_and_last)
        with pytest.raises(StoreBrokenError):
            async with asyncio.timeout(3):
                await hearing
    async with a_store(tmp_path) as store:
        assert await store.read(count_and_last) == (0, 0)


async def test_sec_62_a_statement_has_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-62: a statement that takes too long is stopped, in readers and in the writer."""
    monkeypatch.setattr("issuer.store.engine.STATEMENT_SECONDS", 0.2)
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )

    def work(repos: Repositories) -> None:
        repos.entries._connection.exec_driver_sql(endless)

    async with a_store(tmp_path) as store:
        async with asyncio.timeout(10):
            with pytest.raises(DeadlineError):
                await store.read(work)
            with pytest.raises(DeadlineError):
                await store.write(work)
        await store.write(lambda repos: repos.entries.create(an_entry()))


async def test_every_subscriber_hears_every_change(tmp_path: Path) -> None:
    """Several who listen each get all events, once and in order, long before the poll."""

    async def hear(store: Store, upto: int) -> list[Event]:
        heard: list[Event] = []
        async for events in store.changes(0):
            heard += events
            if heard[-1].seq >= upto:
                break
        return heard

    async with a_store(tmp_path) as store, asyncio.timeout(4):
        hearing = [asyncio.ensure_future(hear(store, 60)) for _ in range(5)]
        for number in range(60):
            await store.write(
                lambda repos, n=number: repos.entries.create(an_entry(f"/{n}", id=f"e{n}"))
            )
        for heard in await asyncio.gather(*hearing):
            assert [one.seq for one in heard] == list(range(1, 61))
            assert [one.key for one in heard] == [f"e{n}" for n in range(60)]
            assert {one.kind for one in heard} == {EventKind.ENTRY}


async def test_the_same_event_twice_counts_once(tmp_path: Path) -> None:
    """One transaction that touches a thing twice says so once."""

    def work(repos: Repositories) -> int:
        made = repos.entries.create(an_entry(id="e"))
        repos.entries.update(made)
        repos.agents.attested(an_agent())
        return repos.events.last()

    async with a_store(tmp_path) as store:
        assert await store.write(work) == 2
        events = await store.read(lambda repos: repos.events.since(0))
        assert [(one.kind, one.key) for one in events] == [
            (EventKind.ENTRY, "e"),
            (EventKind.AGENT, node_id("a").uri),
        ]


async def test_pruned_events_are_missed(tmp_path: Path) -> None:
    """A cursor from before the floor, or from the future, is told to read all again."""
    clock = StoppedClock()
    async with a_store(tmp_path, clock) as store:
        for number in range(5):
            await store.write(lambda repos, n=number: repos.entries.create(an_entry(f"/{n}")))
            clock.advance(timedelta(hours=1))
        before = clock.at - timedelta(hours=2)
        assert await store.write(lambda repos: repos.events.prune(before)) == 3
        assert await store.read(lambda repos: repos.events.first()) == 4
        assert len(await store.read(lambda repos: repos.events.since(3))) == 2
        for cursor in (0, 2, 6):
            with pytest.raises(FeedGapError):
                await store.read(lambda repos, c=cursor: repos.events.since(c))
        with pytest.raises(FeedGapError):
            await anext(store.changes(2))
        # The newest stays whatever its age, so that the floor is always known.
        assert await store.write(lambda repos: repos.events.prune(clock.at)) == 1
        assert await store.read(lambda repos: repos.events.since(5)) == []


async def test_a_constraint_breaks_nobody_else(tmp_path: Path) -> None:
    """A broken UNIQUE rule is the caller's refusal and leaves the store in order."""
    async with a_store(tmp_path) as store:
        await store.write(lambda repos: repos.entries.create(an_entry(id="e")))
        with pytest.raises(AlreadyExistsError, match="ID e exists"):
            await store.write(lambda repos: repos.entries.create(an_entry("/b", id="e")))
        assert await store.read(count_and_last) == (1, 1)
