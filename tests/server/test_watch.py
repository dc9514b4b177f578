"""The held stream: what an agent may act for, pushed when it changes (architecture A2)."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from sqlalchemy import delete as sql_delete

from issuer.api import ours
from issuer.services.watch import Difference, View
from issuer.store.store import Repositories
from issuer.store.tables import events
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import bundle_pb2 as types_bundle_pb2
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from tests.support.callers import (
    Calls,
    Holder,
    Running,
    a_running_server,
    an_id,
    below,
    dialing,
    eventually,
    id_message,
    mask,
)
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder, channel_to, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
QUIET = 0.3
"""Seconds in which nothing comes, where nothing should."""


class Told:
    """What an agent knows that heeds the stream."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.bundles: dict[str, Any] = {}
        self.cursor = ""

    def heed(self, messages: list[Any]) -> None:
        """Apply one change: everything in its messages, together."""
        if messages[0].snapshot:
            self.entries.clear()
            self.bundles.clear()
        for message in messages:
            self.entries.update((one.id, one) for one in message.entries)
            self.bundles.update((one.trust_domain, one) for one in message.bundles)
            for entry_id in message.removed_entry_ids:
                del self.entries[entry_id]
            for name in message.removed_trust_domains:
                del self.bundles[name]
        self.cursor = messages[-1].cursor


@contextlib.asynccontextmanager
async def watching(node: Holder, cursor: str = "") -> AsyncIterator[Any]:
    """A held stream."""
    call = node.calls.watch.Watch(watch_pb2.WatchRequest(cursor=cursor))
    try:
        yield call
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call.code()


async def change(call: Any) -> list[Any]:
    """The messages of the next change."""
    found = []
    async with asyncio.timeout(10):
        while True:
            message = await call.read()
            assert message is not grpc.aio.EOF
            found.append(message)
            if not message.more:
                # The cursor holds once everything was said, and not before.
                assert all(one.cursor == "" for one in found[:-1])
                assert message.cursor
                return found


async def nothing_comes(call: Any) -> None:
    """See that the stream is silent for a while."""
    reading = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait([reading], timeout=QUIET)
    assert not done, reading.result()
    reading.cancel()


async def authorized(node: Holder) -> dict[str, Any]:
    """What GetAuthorizedEntries says, by id."""
    request = entry_pb2.GetAuthorizedEntriesRequest()
    found = await node.calls.entry.GetAuthorizedEntries(request)
    return {one.id: one for one in found.entries}


async def delete(running: Running, *ids: str) -> None:
    """Delete entries."""
    await running.local.entry.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=ids))


async def test_first_everything_then_the_difference(running: Running) -> None:
    """A snapshot with our bundle; then what is added, changed and removed, alone."""
    node = await running.node()
    (old,) = await running.add(below(node, "/old"))
    async with watching(node) as call:
        (first,) = await change(call)
        assert (first.snapshot, list(first.entries)) == (True, [old])
        assert [one.trust_domain for one in first.bundles] == ["example.org"]
        assert first.committed_at_micros == 0
        (new,) = await running.add(below(node, "/new"))
        (second,) = await change(call)
        assert (second.snapshot, list(second.entries)) == (False, [new])
        assert not (second.bundles or second.removed_entry_ids)
        now = running.server.own.clock.now().timestamp() * 1e6
        assert 0 < now - second.committed_at_micros < 10e6
        new.hint = "changed"
        await running.local.entry.BatchUpdateEntry(
            entry_pb2.BatchUpdateEntryRequest(entries=[new])
        )
        (third,) = await change(call)
        assert [(one.id, one.hint, one.revision_number) for one in third.entries] == [
            (new.id, "changed", 1)
        ]
        await delete(running, old.id)
        (fourth,) = await change(call)
        assert (list(fourth.entries), list(fourth.removed_entry_ids)) == ([], [old.id])
        cursors = [one.cursor for one in (first, second, third, fourth)]
        assert len(set(cursors)) == 4


async def test_others_changes_are_not_heard(running: Running) -> None:
    """What concerns another agent alone wakes nobody else."""
    node, other = await running.node(), await running.node()
    async with watching(node) as call:
        await change(call)
        (entry,) = await running.add(below(other, "/others"))
        await delete(running, entry.id)
        await nothing_comes(call)


async def test_what_lies_deeper_is_heard(running: Running) -> None:
    """An entry that joins two levels brings along what lies below it, and takes it away."""
    node = await running.node()
    (under,) = await running.add(below(an_id("/bridge"), "/under-bridge"))
    async with watching(node) as call:
        await change(call)
        (bridge,) = await running.add(below(node, "/bridge"))
        (found,) = await change(call)
        assert {one.id for one in found.entries} == {under.id, bridge.id}
        await delete(running, bridge.id)
        (found,) = await change(call)
        assert set(found.removed_entry_ids) == {under.id, bridge.id}


async def test_a_cursor_goes_on_where_it_was(running: Running) -> None:
    """Come back to the same state, an agent is told so and nothing more; else everything."""
    node = await running.node()
    (entry,) = await running.add(below(node, "/here"))
    async with watching(node) as call:
        (first,) = await change(call)
    async with watching(node, first.cursor) as call:
        (same,) = await change(call)
        assert not (same.snapshot or same.entries or same.bundles)
        assert same.cursor == first.cursor
        (new,) = await running.add(below(node, "/new-here"))
        assert list((await change(call))[0].entries) == [new]
    for cursor in (first.cursor, "of another server", "x" * 10_000):
        async with watching(node, cursor) as call:
            (whole,) = await change(call)
            assert whole.snapshot
            assert {one.id for one in whole.entries} == {entry.id, new.id}
    # Back to a state that was is back to its cursor.
    await delete(running, new.id)
    await running.settled()
    async with watching(node, first.cursor) as call:
        (same,) = await change(call)
        assert not same.snapshot


async def test_cursors_are_an_agents_own(running: Running) -> None:
    """One agent's cursor names nothing of another's, though both see the same."""
    node, other = await running.node(), await running.node()
    async with watching(node) as call:
        (first,) = await change(call)
    async with watching(other, first.cursor) as call:
        assert (await change(call))[0].snapshot


async def test_sec_47_a_changed_entry_never_has_an_old_cursor(running: Running) -> None:
    """SEC-47: deleted and created anew with one id, or changed back, it is another state."""
    node = await running.node()
    cursors = set()
    for hint in ("a", "b", "a"):
        await running.add(below(node, "/again", hint=hint, id=f"again-{node.id.path[-8:]}"))
        async with watching(node) as call:
            cursors.add((await change(call))[-1].cursor)
        await delete(running, f"again-{node.id.path[-8:]}")
    assert len(cursors) == 3


async def test_a_cursor_survives_the_server() -> None:
    """A restarted server knows the cursor of the one before: no stampede of snapshots."""
    with a_folder() as folder:
        async with serving(folder) as server:
            async with contextlib.AsyncExitStack() as stack:
                local = Calls(
                    await stack.enter_async_context(
                        channel_to(server.settings.admin_socket_path)
                    )
                )
                anonymous = await stack.enter_async_context(dialing(server))
                running = Running(server, folder, local, anonymous, stack)
                node = await running.node()
                await running.add(*[below(node, f"/n{n}", "b:2", "a:1") for n in range(20)])
                async with watching(node) as call:
                    (first,) = await change(call)
        async with serving(folder) as server:
            async with dialing(server, node.chain, node.key) as again:
                async with watching(again, first.cursor) as call:
                    (same,) = await change(call)
        assert not same.snapshot
        assert same.cursor == first.cursor


async def test_expiry_is_a_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that expires goes, with what lies below it, though nothing was written."""
    assert ours.RECHECK_SECONDS <= 5
    monkeypatch.setattr(ours, "RECHECK_SECONDS", 0.05)
    async with a_running_server(DrivenClock()) as running:
        node = await running.node()
        ends = int(running.server.own.clock.now().timestamp()) + 60
        soon, under, ever = await running.add(
            below(node, "/soon", expires_at=ends), below(an_id("/soon"), "/soon/under"),
            below(node, "/ever"),
        )  # fmt: skip
        async with watching(node) as call:
            (first,) = await change(call)
            assert len(first.entries) == 3
            running.server.own.clock.advance(timedelta(seconds=61))  # type: ignore
            (gone,) = await change(call)
            assert set(gone.removed_entry_ids) == {soon.id, under.id}
            assert gone.committed_at_micros == 0
            await nothing_comes(call)
        assert set(await authorized(node)) == {ever.id}


async def test_many_come_in_parts() -> None:
    """SEC-62: 1,100 entries come in three messages, which are one change together."""
    async with a_running_server() as running:
        node = await running.node()
        made = []
        for first in (0, 1000):
            made += await running.add(
                *[below(node, f"/n{n}") for n in range(first, min(first + 1000, 1100))]
            )
        told = Told()
        async with watching(node) as call:
            parts = await change(call)
            assert [len(one.entries) for one in parts] == [500, 500, 100]
            assert [one.snapshot for one in parts] == [True, False, False]
            told.heed(parts)
            assert told.entries == {one.id: one for one in made}
            await delete(running, *[one.id for one in made[:100]])
            while len(told.entries) > 1000:
                told.heed(await change(call))
        assert told.entries == {one.id: one for one in made[100:]}


async def test_large_things_come_in_parts(running: Running) -> None:
    """SEC-62: entries and bundles that are large come in messages far below 4 MiB."""
    node = await running.node()
    heavy = [f"k{m}:{'v' * 3900}" for m in range(60)]
    made = [
        one
        for first in range(0, 20, 10)
        for one in await running.add(
            *[below(node, f"/h{n}", *heavy) for n in range(first, first + 10)]
        )
    ]
    async with watching(node) as call:
        parts = await change(call)
    assert all(one.ByteSize() < 2 * 1024 * 1024 for one in parts)
    assert [one for part in parts for one in part.entries] == made
    difference = Difference(False, removed=tuple(f"{n:0>255}" for n in range(20_000)))
    sizes = [one.ByteSize() for one in ours._messages(difference, "c", 7)]
    assert len(sizes) == 40
    assert max(sizes) < 2 * 1024 * 1024


async def test_nothing_is_lost_under_concurrent_changes(running: Running) -> None:
    """
    However changes race with the stream, whoever applies its differences ends up with what
    GetAuthorizedEntries says; resumed streams too.
    """
    nodes = [await running.node() for _ in range(3)]
    parents: list[Any] = [node.id for node in nodes] + [an_id("/mid0"), an_id("/mid1")]
    told = [Told() for _ in nodes]
    chosen = random.Random(7)
    await running.local.bundle.BatchSetFederatedBundle(
        bundle_pb2.BatchSetFederatedBundleRequest(
            bundle=[types_bundle_pb2.Bundle(trust_domain=f"f{n}.test") for n in range(3)]
        )
    )
    stop = asyncio.Event()

    async def follow(node: Holder, one: Told) -> None:
        """Watch, and begin anew now and then."""
        while not stop.is_set():
            async with watching(node, one.cursor) as call:
                for _ in range(chosen.randint(1, 12)):
                    try:
                        async with asyncio.timeout(0.5):
                            one.heed(await change(call))
                    except TimeoutError:
                        break

    async def write(number: int) -> None:
        """Create, move and delete entries, some of them between the levels."""
        ids: list[str] = []
        for step in range(40):
            roll = chosen.random()
            if roll < 0.5 or not ids:
                path = f"/mid{chosen.randrange(2)}" if roll < 0.1 else f"/{number}/{step}"
                wanted = below(chosen.choice(parents), path, f"w:{number}.{step}")
                if roll > 0.3:
                    wanted.federates_with.append(f"f{chosen.randrange(3)}.test")
                answer = await running.local.entry.BatchCreateEntry(
                    entry_pb2.BatchCreateEntryRequest(entries=[wanted])
                )
                ids += [answer.results[0].entry.id] if answer.results[0].entry.id else []
            elif roll < 0.75:
                moved = types_pb2.Entry(
                    id=chosen.choice(ids), parent_id=id_message(chosen.choice(parents).path)
                )
                await running.local.entry.BatchUpdateEntry(
                    entry_pb2.BatchUpdateEntryRequest(
                        entries=[moved], input_mask=mask(types_pb2.EntryMask, "parent_id")
                    )
                )
            else:
                await delete(running, ids.pop(chosen.randrange(len(ids))))

    followers = [
        asyncio.create_task(follow(node, one)) for node, one in zip(nodes, told, strict=True)
    ]
    await asyncio.gather(*(write(number) for number in range(4)))
    await running.settled()
    stop.set()
    await asyncio.gather(*followers)
    total = 0
    for node, one in zip(nodes, told, strict=True):
        async with watching(node, one.cursor) as call:
            one.heed(await change(call))
        expected = await authorized(node)
        total += len(expected)
        assert one.entries == expected
        domains = {name for entry in expected.values() for name in entry.federates_with}
        assert set(one.bundles) == {"example.org", *domains}
    assert total > 5


async def test_a_slow_reader_is_told_the_newest_state_once(running: Running) -> None:
    """SEC-83: changes that come while nobody reads become one, of the state there is."""
    node = await running.node()
    async with watching(node) as call:
        await change(call)
        view = View(running.server.hub, node.id)
        view.start("", running.server.own.clock.now())
        (entry,) = await running.add(below(node, "/slow"))
        for number in range(30):
            entry.hint = str(number)
            await running.local.entry.BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=[entry])
            )
        await running.settled()
        difference = view.step(running.server.own.clock.now())
        assert [one.hint for one in difference.entries] == ["29"]
        assert view.step(running.server.own.clock.now()).is_empty
        last = ""
        while last != "29":
            last = (await change(call))[-1].entries[-1].hint


async def test_a_view_costs_nothing_while_nothing_changes(running: Running) -> None:
    """
    The same view is the same answer: no walk, no comparison; and the cursor of a view that
    was changed step by step is that of one made anew.
    """
    node = await running.node()
    now = running.server.own.clock.now()
    view = View(running.server.hub, node.id)
    view.start("", now)
    assert view.step(now) is view.step(now)
    ids = []
    for number in range(12):
        made = await running.add(below(node, f"/step{number}", hint=str(number)))
        ids += [one.id for one in made]
        if number % 3 == 2:
            await delete(running, ids.pop(0))
            await running.settled()
        view.step(now)
        fresh = View(running.server.hub, node.id)
        fresh.start("", now)
        assert view.cursor() == fresh.cursor()
        assert fresh.start(view.cursor(), now).is_empty


async def test_streams_leave_nothing_behind(running: Running) -> None:
    """A stream that a client ends is forgotten, within the time between two looks."""
    node = await running.node()
    streams = [node.calls.watch.Watch(watch_pb2.WatchRequest()) for _ in range(10)]
    for stream in streams:
        await stream.read()
    before = running.server.hub.watchers
    for stream in streams:
        stream.cancel()
    await eventually(lambda: running.server.hub.watchers == before - 10)


async def test_a_gap_in_the_feed_is_read_anew() -> None:
    """
    A hub that is told that the feed does not reach back reads everything again, tells the
    streams what differs, and goes on.
    """
    async with a_running_server() as running:
        node = await running.node()
        hub = running.server.hub
        (kept, gone) = await running.add(below(node, "/kept"), below(node, "/gone"))
        async with watching(node) as call:
            await change(call)
            before = hub.index

            def behind(repos: Repositories) -> None:
                """Delete an entry, and the event that says so, as if it was long ago."""
                repos.entries.delete(gone.id)
                repos.events.flush()
                repos.events._connection.execute(sql_delete(events))
                repos.agents.set_version(node.id, "later")

            await running.server.store.write(behind)
            found: list[str] = []
            while gone.id not in found:
                found += (await change(call))[-1].removed_entry_ids
            assert hub.index is not before
            (new,) = await running.add(below(node, "/after-the-gap"))
            seen: list[str] = []
            while new.id not in seen:
                seen += [one.id for one in (await change(call))[-1].entries]
        assert set(await authorized(node)) == {kept.id, new.id}
        assert hub.problem == ""
