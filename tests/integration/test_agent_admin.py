"""What an agent tells: to a workload of itself, to an operator of everything."""

import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import (
    agentadmin_pb2,
    agentadmin_pb2_grpc,
    explain_pb2,
    explain_pb2_grpc,
    whoami_pb2,
    whoami_pb2_grpc,
)
from spiffe_wire.pb.spire.api.types import spiffeid_pb2
from spiffe_wire.security_header import METADATA
from tests.support.children import SLEEP, a_child
from tests.support.endpoint import fetch, read
from tests.support.stack import Stack, a_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

Code = grpc.StatusCode
ME = f"unix:uid:{os.geteuid()}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A stack with an entry for `sleep`, one for every process of ours, and one for nobody."""
    async with a_stack() as made:
        agent = made.agent.agent_id
        await made.server.add_entry("/me", agent, ME)
        await made.server.add_entry("/sleeper", agent, ME, f"unix:path:{SLEEP}")
        await made.server.add_entry("/nobody", agent, "unix:uid:4242", f"unix:path:{SLEEP}")
        await made.agent.until_svids(3)
        yield made


async def explain(stack: Stack, pid: int) -> Any:
    """What an operator is told of a process."""
    async with stack.agent.admin() as channel:
        return await agentadmin_pb2_grpc.AgentAdminStub(channel).ExplainProcess(
            agentadmin_pb2.ExplainProcessRequest(pid=pid), timeout=10
        )


def texts(selectors: Any) -> set[str]:
    """Selectors as text."""
    return {f"{one.type}:{one.value}" for one in selectors}


async def test_who_am_i(stack: Stack) -> None:
    """WEP-24, SEC-31: a process is told what was learnt of it, and of nobody else."""
    async with stack.agent.workload() as channel:
        found = await whoami_pb2_grpc.WhoAmIStub(channel).Get(
            whoami_pb2.WhoAmIRequest(), metadata=METADATA
        )
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert ME in texts(found.selectors)
    assert list(found.spiffe_ids) == ["spiffe://example.org/me"]
    assert not found.partial and "nobody" not in str(found)


async def test_a_process_is_explained(stack: Stack) -> None:
    """A running process: what was learnt, what matched, and the one fact that differs."""
    with a_child() as child:
        found = await explain(stack, child.pid)
    assert found.process.pid == child.pid and found.process.path == str(SLEEP)
    assert [one.spiffe_id.path for one in found.matched] == ["/me", "/sleeper"]
    (miss,) = found.near_misses
    assert miss.entry.spiffe_id.path == "/nobody"
    assert miss.difference == f"the entry wants unix:uid:4242, the process has {ME}"
    assert found.reason == "identity" and found.considered == 3


@pytest.mark.parametrize(
    ("pid", "code"),
    [(0, Code.INVALID_ARGUMENT), (-1, Code.INVALID_ARGUMENT), (2**22 + 1, Code.NOT_FOUND)],
)
async def test_no_such_process(stack: Stack, pid: int, code: Any) -> None:
    """A number that no process has, or can have, is refused as what it is."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(stack, pid)
    assert caught.value.code() is code


async def test_a_process_that_ended(stack: Stack) -> None:
    """One that has ended is not explained by what its number meant before."""
    with a_child() as child:
        child.end()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await explain(stack, child.pid)
    assert caught.value.code() is Code.NOT_FOUND


async def test_status(stack: Stack) -> None:
    """SEC-114: the status says what is held, how it is synced, and how callers are proved."""
    async with stack.agent.workload() as channel:
        call = fetch(workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel))
        await read(call)
        status = await stack.agent.status()
    assert status.trust_domain == "example.org" and status.ready and status.connected
    assert status.sync_mode == "watch" and status.last_sync_at
    assert (status.entries, status.x509_svids, status.streams) == (3, 3, 1)
    assert status.peer_proof in ("pidfd", "fallback") and not status.problem
    assert status.svid_expires_at > status.last_sync_at


async def test_selectors_are_explained(stack: Stack) -> None:
    """Selectors that no process has now are explained too; none at all is a mistake."""
    async with stack.agent.admin() as channel:
        stub = explain_pb2_grpc.ExplainStub(channel)
        wanted = [{"type": "unix", "value": "uid:4242"}]
        found = await stub.ExplainSelectors(
            explain_pb2.ExplainSelectorsRequest(selectors=wanted)
        )
        assert found.reason == "no_match" and not found.matched
        missing = {one.entry.spiffe_id.path: texts(one.missing) for one in found.near_misses}
        assert missing["/nobody"] == {f"unix:path:{SLEEP}"} and missing["/me"] == {ME}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ExplainSelectors(explain_pb2.ExplainSelectorsRequest())
        assert caught.value.code() is Code.INVALID_ARGUMENT


async def test_renewed_on_demand(stack: Stack) -> None:
    """An operator may renew one identity, or all; one that is not there is not found."""
    async with stack.agent.admin() as channel:
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        one = spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/me")
        answer = await stub.RenewSvids(agentadmin_pb2.RenewSvidsRequest(spiffe_id=one))
        assert answer.renewed == 1
        assert (await stub.RenewSvids(agentadmin_pb2.RenewSvidsRequest())).renewed == 3
        one.path = "/unknown"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RenewSvids(agentadmin_pb2.RenewSvidsRequest(spiffe_id=one))
        assert caught.value.code() is Code.NOT_FOUND


async def test_what_is_for_operators_is_not_for_workloads(stack: Stack) -> None:
    """SEC-30, SEC-37: explanations and renewals are on the admin socket alone."""
    async with stack.agent.workload() as channel:
        for call in (
            agentadmin_pb2_grpc.AgentAdminStub(channel).ExplainProcess(
                agentadmin_pb2.ExplainProcessRequest(pid=1), metadata=METADATA
            ),
            explain_pb2_grpc.ExplainStub(channel).ExplainSelectors(
                explain_pb2.ExplainSelectorsRequest(), metadata=METADATA
            ),
            agentadmin_pb2_grpc.AgentAdminStub(channel).RenewSvids(
                agentadmin_pb2.RenewSvidsRequest(), metadata=METADATA
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is Code.UNIMPLEMENTED
    assert stack.agent.admin_socket.stat().st_mode & 0o777 == 0o600
