"""What the server holds in memory, kept right from the feed (architecture A2)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from issuer.services import hub as hub_module
from issuer.services.hub import Hub
from issuer.services.refusals import RefusalLog
from issuer.store.engine import StoreBrokenError
from issuer.store.events import Event, FeedGapError
from issuer.store.store import Repositories, Store
from spiffe_core.bundle import Bundle
from spiffe_core.errors import DeadlineError, NotReadyError, SpiffeError
from spiffe_core.spiffeid import TrustDomain
from tests.support.store import NOW, TD, a_store, an_agent, an_entry, node_id


@contextlib.asynccontextmanager
async def a_hub(store: Any) -> AsyncIterator[Hub]:
    """A hub that folds what *store* says."""
    hub = Hub(store, TD)
    await hub.hydrate()
    folding = asyncio.create_task(hub.run())
    try:
        yield hub
    finally:
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)


async def test_changes_are_folded_in(tmp_path: Path) -> None:
    """Entries, agents and bundles are as the store has them, once caught up."""
    async with a_store(tmp_path) as store:

        def before(repos: Repositories) -> None:
            repos.entries.create(an_entry("/before", id="before"))

        await store.write(before)
        async with a_hub(store) as hub:
            assert len(hub.index) == 1

            def work(repos: Repositories) -> int:
                repos.entries.delete("before")
                repos.entries.create(an_entry("/after", id="after"))
                repos.agents.attested(an_agent("a", key_hash=b"key"))
                repos.bundles.set(Bundle(TrustDomain("other.org"), sequence_number=3))
                return repos.events.last()

            await hub.caught_up(await store.write(work))
            assert [one.id for one in hub.index.entries_of(node_id("a"), NOW)] == ["after"]
            assert hub.index.holder_of(b"key", NOW) == node_id("a")
            held = hub.held_bundle(TrustDomain("other.org"))
            assert held is not None and held.bundle.sequence_number == 3

            def undo(repos: Repositories) -> int:
                repos.agents.delete(node_id("a"))
                repos.bundles.delete(TrustDomain("other.org"))
                return repos.events.last()

            await hub.caught_up(await store.write(undo))
            assert hub.index.agent(node_id("a")) is None
            assert hub.index.holder_of(b"key", NOW) is None
            assert hub.held_bundle(TrustDomain("other.org")) is None


async def test_only_those_concerned_are_woken(tmp_path: Path) -> None:
    """A change wakes the agents whose answer it may change; a bundle wakes everybody."""
    async with a_store(tmp_path) as store:

        def before(repos: Repositories) -> None:
            for name in "ab":
                repos.agents.attested(an_agent(name, serial=f"1{name}"))

        await store.write(before)
        async with a_hub(store) as hub:
            with hub.waiter(node_id("a")) as one, hub.waiter(node_id("b")) as other:
                assert hub.watchers == 2

                def work(repos: Repositories) -> int:
                    repos.entries.create(an_entry())
                    return repos.events.last()

                await hub.caught_up(await store.write(work))
                assert (one.changed.is_set(), other.changed.is_set()) == (True, False)
                assert await one.wait() > 0

                def bundle(repos: Repositories) -> int:
                    repos.bundles.set(Bundle(TrustDomain("other.org")))
                    return repos.events.last()

                await hub.caught_up(await store.write(bundle))
                assert (one.changed.is_set(), other.changed.is_set()) == (True, True)
            assert hub.watchers == 0


class Troubled:
    """A store whose feed fails with one error after another, and then works."""

    def __init__(self, store: Store, *errors: SpiffeError) -> None:
        self._store = store
        self.errors = list(errors)
        self.read = store.read

    async def changes(self, after: int) -> AsyncIterator[Sequence[Event]]:
        """The feed, or the next error."""
        if self.errors:
            raise self.errors.pop(0)
        async for found in self._store.changes(after):
            yield found


@pytest.mark.parametrize(
    "error",
    [NotReadyError("held"), DeadlineError("slow"), FeedGapError("gap")],
    ids=lambda one: type(one).__name__,
)
async def test_a_store_that_is_away_is_asked_again(
    tmp_path: Path, error: SpiffeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble that passes does not end the feed."""
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.01)
    async with a_store(tmp_path) as store:
        troubled = Troubled(store, error, error)
        async with a_hub(troubled) as hub:
            async with asyncio.timeout(10):
                while troubled.errors or hub.problem:
                    await asyncio.sleep(0.005)

            def work(repos: Repositories) -> int:
                repos.entries.create(an_entry())
                return repos.events.last()

            await hub.caught_up(await store.write(work))
            assert len(hub.index) == 1


async def test_sec_114_trouble_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-114: while changes are not heard of, the server has a problem, with the reason."""
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 60.0)
    async with a_store(tmp_path) as store:
        async with a_hub(Troubled(store, NotReadyError("held by another"))) as hub:
            await asyncio.sleep(0.05)
            assert hub.problem == "changes are not heard: held by another"


async def test_a_store_that_failed_for_good_ends_the_feed(tmp_path: Path) -> None:
    """SEC-101: when nobody knows what is on the disk, folding ends, and so does the server."""
    async with a_store(tmp_path) as store:
        hub = Hub(Troubled(store, StoreBrokenError("broken")), TD)  # type: ignore[arg-type]
        with pytest.raises(StoreBrokenError):
            await hub.run()


async def test_catching_up_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a change that is never folded in is told to try again."""
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 0.01)
    async with a_store(tmp_path) as store:
        hub = Hub(store, TD)
        await hub.hydrate()
        await hub.caught_up(hub.seq)
        with pytest.raises(NotReadyError, match="not heard of its own change"):
            await hub.caught_up(hub.seq + 1)


async def test_sec_91_a_refusal_stands_when_it_cannot_be_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-91: a store that fails changes nothing for who is refused; the log has it."""
    async with a_store(tmp_path) as store:
        refusals = RefusalLog(store)
    await refusals.note("spiffe://example.org/a", "/m", "why", action="call.refuse")
    await refusals.end_window()
    assert "refusal_not_recorded" in caplog.messages
    assert "call_refused" in caplog.messages


async def test_sec_91_the_last_window_is_written_at_the_end(tmp_path: Path) -> None:
    """SEC-91: what was counted is written when the server stops."""
    async with a_store(tmp_path) as store:
        refusals = RefusalLog(store)
        running = asyncio.create_task(refusals.run())
        await asyncio.sleep(0)
        for _ in range(3):
            await refusals.note("c", "/m", "why", action="call.refuse")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        rows = await store.read(lambda repos: repos.audit.rows())
    assert [(row.actor, row.target, row.outcome) for row in rows] == [
        ("c", "/m", "refused"),
        ("c", "/m", "refused 2 times more"),
    ]
