"""Entries that expired are not kept for ever (SPIRE API 5.1.1)."""

from datetime import timedelta

import pytest

from issuer.app import KEEP_EXPIRED, PRUNE_INTERVAL
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder, channel_to, entry_message, serving

AGENT = "spiffe://example.org/spire/agent/join_token/a"


@pytest.mark.parametrize("late", [timedelta(seconds=-30), timedelta(seconds=1)])
async def test_an_expired_entry_is_removed_after_an_hour(late: timedelta) -> None:
    """It stays for an hour, for whoever asks why; then it goes, on record."""
    clock = DrivenClock()
    with a_folder() as folder:
        async with serving(folder, clock) as server:
            async with channel_to(server.settings.admin_socket_path) as channel:
                stub = entry_pb2_grpc.EntryStub(channel)
                ends = int((clock.now() + timedelta(minutes=5)).timestamp())
                answer = await stub.BatchCreateEntry(
                    entry_pb2.BatchCreateEntryRequest(
                        entries=[
                            entry_message("/brief", AGENT, "unix:uid:1", expires_at=ends),
                            entry_message("/lasting", AGENT, "unix:uid:2"),
                        ]
                    )
                )
                brief = answer.results[0].entry.id
                await clock.run_on(timedelta(minutes=5) + KEEP_EXPIRED + late - PRUNE_INTERVAL)
                await clock.run_on(PRUNE_INTERVAL)
                left = await stub.ListEntries(entry_pb2.ListEntriesRequest())
            paths = [one.spiffe_id.path for one in left.entries]
            audit = await server.store.read(
                lambda repos: [(one.action, one.target) for one in repos.audit.rows()]
            )
    if late < timedelta(0):
        assert paths == ["/brief", "/lasting"]
        assert ("entry.expire", brief) not in audit
    else:
        assert paths == ["/lasting"]
        assert ("entry.expire", brief) in audit
