"""Limits and deadlines of single calls (SEC-80, SEC-55; SPIRE API 3.6, 5.2)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.api import agent as agent_api
from issuer.api import entry as entry_api
from issuer.attestation.protocol import AttestedNode, Challenge
from spiffe_core.errors import ForbiddenError, MalformedError
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import attestation_pb2
from tests.support.callers import (
    Code,
    Running,
    a_running_server,
    an_id,
    attest,
    below,
    csr_params,
    eventually,
    refused,
)
from tests.support.store import some
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Challenging:
    """An attestor that asks three questions, and another when told so."""

    type = "challenging"

    def __init__(self) -> None:
        self.waiting = 0
        self.go_on = asyncio.Event()

    async def attest(
        self, payload: bytes, *, public_key: bytes, challenge: Challenge
    ) -> AttestedNode:
        """Ask, and see that each answer is the question turned round."""
        assert public_key
        if payload == b"wait":
            self.waiting += 1
            await self.go_on.wait()
            raise ForbiddenError("waited long enough")
        for question in (b"one", b"two", b"three"):
            if await challenge(question) != question[::-1]:
                raise MalformedError("that is not the answer")
        node = an_id(f"/spire/agent/challenging/{payload.decode()}")
        return AttestedNode(node, some("challenging:a"), can_reattest=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attestor() -> Challenging:
    """The attestor of the module's server."""
    return Challenging()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(attestor: Challenging) -> AsyncIterator[Running]:
    """One server for the module, with an attestor that challenges."""
    async with a_running_server() as made:
        made.server.agents.attestors[attestor.type] = attestor  # type: ignore[index]
        yield made


def params(payload: bytes, csr: bytes = b"") -> Any:
    """The first message of an attestation."""
    return agent_pb2.AttestAgentRequest(
        params=agent_pb2.AttestAgentRequest.Params(
            data=attestation_pb2.AttestationData(type="challenging", payload=payload),
            params=csr_params(csr or make_csr(make_key())),
        )
    )


async def answer(call: Any, data: bytes) -> None:
    """Answer a challenge."""
    await call.write(agent_pb2.AttestAgentRequest(challenge_response=data))


async def test_challenges_are_asked_one_by_one(running: Running) -> None:
    """SPIRE API 5.2: any number of challenges, each answered once, then the result."""
    key = make_key()
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.write(params(b"n1", make_csr(key)))
    for question in (b"one", b"two", b"three"):
        asked = await call.read()
        assert (asked.WhichOneof("step"), asked.challenge) == ("challenge", question)
        await answer(call, question[::-1])
    result = (await call.read()).result
    assert result.reattestable
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is Code.OK
    node = await running.dial(tuple(result.svid.cert_chain), key)
    assert node.id == an_id("/spire/agent/challenging/n1")
    shown = running.server.hub.index.agent(node.id)
    assert shown is not None
    assert (shown.selectors, shown.attestation_type) == (some("challenging:a"), "challenging")
    # It may come again, and then has another serial, and what was learnt anew.
    again = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await again.write(params(b"n1"))
    for question in (b"one", b"two", b"three"):
        await again.read()
        await answer(again, question[::-1])
    assert (await again.read()).WhichOneof("step") == "result"
    async with refused(Code.PERMISSION_DENIED):
        await node.calls.agent.PostStatus(agent_pb2.PostStatusRequest())


@pytest.mark.parametrize("wrong", ["another answer", "no answer", "params again", "an end"])
async def test_challenges_that_are_not_answered(running: Running, wrong: str) -> None:
    """A wrong answer, an empty one, or none attests nobody."""
    before = running.server.hub.index.agent_count
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.write(params(b"n2"))
    await call.read()
    if wrong == "another answer":
        await answer(call, b"eno!")
    elif wrong == "no answer":
        await answer(call, b"")
    elif wrong == "params again":
        await call.write(params(b"n2"))
    else:
        await call.done_writing()
    async with refused(Code.INVALID_ARGUMENT):
        await call.read()
    await running.settled()
    assert running.server.hub.index.agent_count == before


async def test_sec_55_so_many_attest_at_once(running: Running, attestor: Challenging) -> None:
    """SEC-55: 32 nodes attest at once; one more is told to come again, not that it may not."""
    calls = [running.anonymous.calls.agent.AttestAgent(timeout=20) for _ in range(32)]
    for call in calls:
        await call.write(params(b"wait"))
    await eventually(lambda: attestor.waiting == 32)
    token = await running.token()
    async with refused(Code.UNAVAILABLE, "at once"):
        await running.node(token)
    attestor.go_on.set()
    for call in calls:
        async with refused(Code.PERMISSION_DENIED, "waited"):
            await call.read()
    attestor.waiting = 0
    attestor.go_on.clear()
    await running.node(token)


async def test_sec_80_an_attestation_has_a_deadline(
    running: Running, attestor: Challenging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: who says nothing, or never answers, is told so when the time is over."""
    monkeypatch.setattr(agent_api, "FIRST_MESSAGE_TIMEOUT", 0.05)
    silent = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await silent.wait_for_connection()
    async with refused(Code.DEADLINE_EXCEEDED, "too long"):
        await silent.read()
    monkeypatch.setattr(agent_api, "ATTEST_TIMEOUT", 0.05)
    slow = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await slow.write(params(b"n3"))
    await slow.read()
    async with refused(Code.DEADLINE_EXCEEDED, "too long"):
        await slow.read()
    assert attestor.waiting == 0


async def test_sec_80_a_sync_has_a_deadline(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: a sync in which nothing is asked any more is ended."""
    node = await running.node()
    await running.add(*[below(node, f"/s{n}") for n in range(501)])
    monkeypatch.setattr(entry_api, "SYNC_IDLE_SECONDS", 0.05)
    call = node.calls.entry.SyncAuthorizedEntries(timeout=10)
    await call.write(entry_pb2.SyncAuthorizedEntriesRequest())
    assert [(await call.read()).more for _ in range(2)] == [True, False]
    async with refused(Code.DEADLINE_EXCEEDED, "new sync"):
        await call.read()


async def test_a_status_ten_times_a_second(running: Running) -> None:
    """SPIRE API 3.6: ten a second, 50 wait, and the next is refused at once."""
    node, other = await running.node(), await running.node()
    request = agent_pb2.PostStatusRequest(agent_version="1")
    calls = [node.calls.agent.PostStatus(request) for _ in range(80)]
    try:

        async def ended(code: grpc.StatusCode) -> int:
            return [await one.code() for one in calls if one.done()].count(code)

        async def told() -> bool:
            return await ended(Code.OK) >= 10 and await ended(Code.RESOURCE_EXHAUSTED) >= 2

        await eventually(told)
        assert await ended(Code.OK) < 60
        await other.calls.agent.PostStatus(request)
    finally:
        for one in calls:
            one.cancel()


async def test_operators_are_not_limited(running: Running) -> None:
    """Calls on the admin socket have no rate: 30 tokens at once are made."""
    made = await asyncio.gather(*(running.token() for _ in range(30)))
    assert len(set(made)) == 30
    # Nor does an attestation there count against anybody.
    await attest(running.local, made[0], make_csr(make_key()))
