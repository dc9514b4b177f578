"""``Entry``: what an agent may act for, whole or in parts (SPIRE API 5.1.1)."""

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_core.permission import DenialReason
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from tests.support.callers import (
    Code,
    Holder,
    Running,
    a_running_server,
    an_id,
    below,
    id_message,
    mask,
    reason_of,
    refused,
)
from tests.support.clock import DrivenClock

pytestmark = pytest.mark.asyncio(loop_scope="module")
Mask = types_pb2.EntryMask
Request = entry_pb2.SyncAuthorizedEntriesRequest
# What spire-agent asks for (SPIRE API 9).
AGENTS_MASK = mask(
    Mask, "spiffe_id", "selectors", "federates_with", "admin", "downstream", "revision_number",
    "store_svid", "hint", "additional_attributes", "created_at",
)  # fmt: skip


async def authorized(node: Holder, output: Any = None) -> list[Any]:
    """What GetAuthorizedEntries answers."""
    request = entry_pb2.GetAuthorizedEntriesRequest(output_mask=output)
    return list((await node.calls.entry.GetAuthorizedEntries(request)).entries)


@contextlib.asynccontextmanager
async def syncing(node: Holder, output: Any = None) -> AsyncIterator[Any]:
    """A sync stream on which the first request was made."""
    call = node.calls.entry.SyncAuthorizedEntries(timeout=30)
    await call.write(Request(output_mask=output))
    try:
        yield call
    finally:
        call.cancel()


async def until_no_more(call: Any) -> list[Any]:
    """Messages up to the one after which nothing more follows."""
    found = []
    while True:
        message = await call.read()
        assert message is not grpc.aio.EOF
        found.append(message)
        if not message.more:
            return found


async def test_own_entries_and_those_below_them(running: Running) -> None:
    """An agent gets what lies below it, directly or not, and nothing of another's."""
    node, other = await running.node(), await running.node()
    made = await running.add(
        below(node, "/a"),
        below(an_id("/a"), "/a/b"),
        below(an_id("/a/b"), "/a/b/c"),
        below(other, "/o"),
        below(an_id("/o"), "/o/p"),
    )
    assert await authorized(node) == made[:3]
    assert await authorized(other) == made[3:]
    async with syncing(node) as call:
        (message,) = await until_no_more(call)
        assert list(message.entries) == made[:3]
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is Code.OK


async def test_a_join_tokens_alias(running: Running) -> None:
    """SPIRE API 5.2: a token for a workload ID brings what lies below that ID."""
    token = await running.token(agent_id=id_message("/fleet"))
    node = await running.node(token)
    (entry,) = await running.add(below(an_id("/fleet"), "/of-the-fleet"))
    alias, found = await authorized(node)
    assert found == entry
    assert (alias.spiffe_id.path, alias.selectors[0].value) == ("/fleet", node.id.uri)


async def test_masks(running: Running) -> None:
    """Masks yield what spire-agent asks for; an empty one only ids."""
    node = await running.node()
    (entry,) = await running.add(below(node, "/masked", hint="h", x509_svid_ttl=7))
    (found,) = await authorized(node, AGENTS_MASK)
    assert (found.hint, found.created_at) == ("h", entry.created_at)
    assert not found.HasField("parent_id")
    assert found.x509_svid_ttl == 0
    assert await authorized(node, Mask()) == [types_pb2.Entry(id=entry.id)]
    async with syncing(node, mask(Mask, "revision_number")) as call:
        (message,) = await until_no_more(call)
    assert list(message.entries) == [types_pb2.Entry(id=entry.id)]


async def test_none_is_said_too(running: Running) -> None:
    """An agent without entries hears so in one message, then OK."""
    node = await running.node()
    async with syncing(node) as call:
        (message,) = await until_no_more(call)
        assert message == entry_pb2.SyncAuthorizedEntriesResponse()
        assert await call.read() is grpc.aio.EOF


async def test_first_requests_that_are_wrong(running: Running) -> None:
    """IDs first, or revisions masked away, are refused; ending at once is no error."""
    node = await running.node()
    call = node.calls.entry.SyncAuthorizedEntries(timeout=30)
    await call.write(Request(ids=["x"]))
    async with refused(Code.INVALID_ARGUMENT, "IDs on initial request"):
        await call.read()
    for output in (Mask(), mask(Mask, "spiffe_id")):
        async with syncing(node, output) as call:
            async with refused(Code.INVALID_ARGUMENT, "revision number"):
                await call.read()
    call = node.calls.entry.SyncAuthorizedEntries(timeout=30)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is Code.OK


async def test_expired_entries_are_left_out() -> None:
    """SPIRE API 5.1: an expired entry authorizes nobody, nor does what lies below it."""
    clock = DrivenClock()
    async with a_running_server(clock) as running:
        node = await running.node()
        soon = int(clock.now().timestamp()) + 60
        made = await running.add(
            below(node, "/soon", expires_at=soon), below(an_id("/soon"), "/under"),
            below(node, "/ever"),
        )  # fmt: skip
        assert await authorized(node) == made
        clock.advance(timedelta(seconds=61))
        assert await authorized(node) == [made[2]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def large() -> AsyncIterator[tuple[Running, Holder, list[Any]]]:
    """A server, an agent of it with 1,201 entries, and these."""
    async with a_running_server() as running:
        node = await running.node()
        made = []
        for first in range(0, 1201, 1000):
            made += await running.add(
                *[below(node, f"/n{n}") for n in range(first, min(first + 1000, 1201))]
            )
        yield running, node, made


async def test_many_come_as_revisions_first(large: Any) -> None:
    """Over 500: pages of revisions, then entries by id; never both in one message."""
    _, node, made = large
    async with syncing(node, AGENTS_MASK) as call:
        found = await until_no_more(call)
        assert [len(one.entry_revisions) for one in found] == [500, 500, 201]
        assert [one.more for one in found] == [True, True, False]
        assert not any(one.entries for one in found)
        revisions = [one for page in found for one in page.entry_revisions]
        assert [(one.id, one.revision_number, one.created_at) for one in revisions] == [
            (one.id, 0, one.created_at) for one in made
        ]
        # At most as many as the first page had; unknown ones are skipped in silence.
        await call.write(Request(ids=[one.id for one in made[700:1199]] + ["unknown"]))
        found = await until_no_more(call)
        assert [len(one.entries) for one in found] == [499]
        assert [one.id for one in found[0].entries] == [one.id for one in made[700:1199]]
        assert not found[0].entry_revisions
        # The mask of the first message stays in force, whatever comes later.
        await call.write(Request(ids=[made[0].id], output_mask=mask(Mask, "parent_id")))
        (message,) = await until_no_more(call)
        assert not message.entries[0].HasField("parent_id")
        assert message.entries[0].spiffe_id == made[0].spiffe_id
        await call.write(Request(ids=[one.id for one in made[:1000]]))
        found = await until_no_more(call)
        assert [len(one.entries) for one in found] == [500, 500]
        for nothing in (Request(), Request(ids=["unknown"])):
            await call.write(nothing)
            (message,) = await until_no_more(call)
            assert (list(message.entries), message.more) == ([], False)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is Code.OK


async def test_sec_80_a_request_names_a_thousand_ids(large: Any) -> None:
    """SEC-80: over 1,000 ids in one message are refused."""
    _, node, _ = large
    async with syncing(node) as call:
        await until_no_more(call)
        await call.write(Request(ids=["x"] * 1001))
        async with refused(Code.RESOURCE_EXHAUSTED):
            await call.read()


async def test_sec_21_ids_are_checked_when_they_are_asked_for(large: Any) -> None:
    """SEC-21: what was taken from the agent, or never was its own, is skipped meanwhile."""
    running, node, made = large
    other = await running.node()
    (foreign,) = await running.add(below(other, "/foreign"))
    async with syncing(node) as call:
        await until_no_more(call)
        moved = types_pb2.Entry(id=made[1].id, parent_id=id_message(other.id.path))
        await running.local.entry.BatchUpdateEntry(
            entry_pb2.BatchUpdateEntryRequest(
                entries=[moved], input_mask=mask(Mask, "parent_id")
            )
        )
        await running.settled()
        await call.write(Request(ids=[made[0].id, made[1].id, foreign.id, made[2].id]))
        (message,) = await until_no_more(call)
    assert [one.id for one in message.entries] == [made[0].id, made[2].id]


async def test_sec_17_a_sync_stream_checks_its_caller_again(large: Any) -> None:
    """SEC-17, SEC-52: banned in the middle of a sync, an agent gets nothing more."""
    running, _, _ = large
    node = await running.node()
    await running.add(*[below(node, f"/b{n}") for n in range(501)])
    async with syncing(node) as call:
        revisions = await until_no_more(call)
        await running.local.agent.BanAgent(
            agent_pb2.BanAgentRequest(id=id_message(node.id.path))
        )
        await call.write(Request(ids=[revisions[0].entry_revisions[0].id]))
        async with refused(Code.PERMISSION_DENIED) as seen:
            await call.read()
    assert reason_of(seen[0]) is DenialReason.AGENT_BANNED


async def test_sec_62_large_entries_come_in_parts() -> None:
    """SEC-62: few entries that are over 4 MiB together come by revisions, in small parts."""
    async with a_running_server() as running:
        node = await running.node()
        made = []
        for first in range(0, 30, 10):
            made += await running.add(
                *[
                    below(node, f"/l{n}", *[f"k{m}:{'v' * 3900}" for m in range(60)])
                    for n in range(first, first + 10)
                ]
            )
        async with refused(Code.RESOURCE_EXHAUSTED):
            await authorized(node)
        assert len(await authorized(node, mask(Mask, "spiffe_id"))) == 30
        async with syncing(node) as call:
            (revisions,) = await until_no_more(call)
            ids = [one.id for one in revisions.entry_revisions]
            await call.write(Request(ids=ids))
            found = await until_no_more(call)
        assert all(0 < one.ByteSize() < 4 * 1024 * 1024 for one in found)
        assert [one for page in found for one in page.entries] == made
