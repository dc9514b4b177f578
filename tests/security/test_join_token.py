"""Join tokens: made, used once, never seen (SEC-50, SPIRE API 5.2 and 8.1)."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.api.agent import network_of
from issuer.attestation.join_token import JoinToken, JoinTokenError
from issuer.attestation.protocol import AttestedNode
from issuer.config import RateLimits
from issuer.services.agents import AgentService
from issuer.store.store import Repositories
from spiffe_core.errors import SpiffeError
from spiffe_core.permission import DenialReason
from spiffe_core.x509svid import X509Svid
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from tests.support.callers import (
    Calls,
    Code,
    Running,
    a_running_server,
    an_id,
    attest,
    csr_params,
    dialing,
    eventually,
    id_message,
    reason_of,
    refused,
)
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder, channel_to, serving
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = "s" * 43


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    """One server for the module, on a clock that a test can move."""
    async with a_running_server(DrivenClock()) as made:
        yield made


def clock_of(running: Running) -> Any:
    """The server's clock."""
    return running.server.own.clock


async def agents_of(running: Running) -> int:
    """How many agents there are."""
    return int((await running.local.agent.CountAgents(agent_pb2.CountAgentsRequest())).count)


async def issued_of(running: Running) -> int:
    """How many SVIDs are on record."""
    return await running.server.store.read(lambda repos: repos.issued.count())


# Made


async def test_sec_50_a_token_has_a_public_half_and_256_random_bits(running: Running) -> None:
    """SEC-50: `<public id>.<secret>`; only the public id is in the agent's SPIFFE ID."""
    made = [await running.token() for _ in range(20)]
    halves = [JoinToken.parse(text) for text in made]
    assert len({one.secret for one in halves}) == len({one.public_id for one in halves}) == 20
    assert all(len(one.secret) >= 43 for one in halves)
    node = await running.node(made[0])
    assert node.id == an_id(f"/spire/agent/join_token/{halves[0].public_id}")
    assert "".join(made) not in repr(halves) and halves[0].secret not in repr(halves[0])


async def test_a_token_says_when_it_ends(running: Running) -> None:
    """JoinToken.expires_at is now plus the ttl, in whole seconds."""
    now = int(clock_of(running).now().timestamp())
    made = await running.local.agent.CreateJoinToken(agent_pb2.CreateJoinTokenRequest(ttl=77))
    assert made.expires_at == now + 77


@pytest.mark.parametrize("ttl", [0, -1, -(2**31)])
async def test_a_ttl_is_required(running: Running, ttl: int) -> None:
    """SPIRE API 5.2: a ttl below 1 is INVALID_ARGUMENT."""
    async with refused(Code.INVALID_ARGUMENT, "ttl is required"):
        await running.token(ttl=ttl)


@pytest.mark.parametrize(
    "text", [f"mine.{SECRET}", f"{'p' * 64}.{'s' * 22}", f"A_-9.{'s' * 256}"]
)
async def test_sec_50_a_chosen_token_is_used_as_it_is(running: Running, text: str) -> None:
    """SEC-50: a token of the form, with 128 bits of secret or more, may be chosen."""
    assert await running.token(token=text) == text
    node = await running.node(text)
    assert node.id.path == f"/spire/agent/join_token/{text.partition('.')[0]}"


@pytest.mark.parametrize(
    "text",
    [
        "a6e2c5a8-9f1b-4c5d-8e7f-000000000000",  # SPIRE's form
        "nodot", f".{SECRET}", "mine.", f"mine.{'s' * 21}", f"mine.{'s' * 257}",
        f"{'p' * 65}.{SECRET}", f"a/b.{SECRET}", f"a.b.{SECRET}", f"a b.{SECRET}",
        f"mine.{SECRET}\n", f"mine.{SECRET}=", f"mïne.{SECRET}", f"..{SECRET}", "x" * 100_000,
    ],
    ids=range(15),
)  # fmt: skip
async def test_sec_50_a_chosen_token_must_have_the_form(running: Running, text: str) -> None:
    """SEC-50: anything else is INVALID_ARGUMENT, says the form and quotes nothing of it."""
    with pytest.raises(JoinTokenError):
        JoinToken.parse(text)
    async with refused(Code.INVALID_ARGUMENT, "<public id>.<secret>") as seen:
        await running.token(token=text)
    assert text not in seen[0].details()


async def test_a_public_id_is_taken_once(running: Running) -> None:
    """ALREADY_EXISTS while a token of that public id is kept."""
    await running.token(token=f"once.{SECRET}")
    async with refused(Code.ALREADY_EXISTS, "taken"):
        await running.token(token=f"once.{'t' * 43}")


async def test_sec_54_a_node_is_not_handed_over_by_another_token(running: Running) -> None:
    """SEC-54: while a node is there, no second token for its name can be made."""
    await running.node(await running.token(token=f"owned.{SECRET}"))
    await running.advance(timedelta(hours=1))  # the used token is long forgotten
    async with refused(Code.ALREADY_EXISTS):
        await running.token(token=f"owned.{'t' * 43}")


async def test_an_alias_comes_with_the_token(running: Running) -> None:
    """SPIRE API 5.2: agent_id adds an entry below the node that is to be."""
    token = await running.token(agent_id=id_message("/fleet"))
    node = an_id(f"/spire/agent/join_token/{JoinToken.parse(token).public_id}")
    wanted = entry_pb2.ListEntriesRequest.Filter(by_parent_id=id_message(node.path))
    answer = await running.local.entry.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted))
    (alias,) = answer.entries
    assert alias.spiffe_id == id_message("/fleet")
    assert [(one.type, one.value) for one in alias.selectors] == [("spiffe_id", node.uri)]
    # Nobody came for it: both are forgotten, a day after the token expired.
    await running.advance(timedelta(days=1, hours=1))
    await running.token()
    answer = await running.local.entry.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted))
    assert list(answer.entries) == []


@pytest.mark.parametrize(
    "agent_id",
    [id_message(""), id_message("/spire/agent/x"), id_message("/a", "x.org"), id_message("a"),
     id_message("/a", "")],
    ids=str,
)  # fmt: skip
async def test_sec_04_an_alias_is_a_workload(running: Running, agent_id: Any) -> None:
    """SEC-04: agent_id must be a workload's ID; the token is not made either."""
    rows = await running.audited(lambda: _refused_token(running, agent_id))
    assert rows == []


async def _refused_token(running: Running, agent_id: Any) -> None:
    async with refused(Code.INVALID_ARGUMENT, "invalid agent ID"):
        await running.token(agent_id=agent_id)


# Used


async def test_sec_50_one_token_one_node(running: Running) -> None:
    """SEC-50: of 16 racers with keys of their own one joins, the others hear why not."""
    for _ in range(6):
        token = await running.token()
        before = await agents_of(running), await issued_of(running)
        answers = await asyncio.gather(
            *(attest(running.anonymous.calls, token, make_csr(make_key())) for _ in range(16)),
            return_exceptions=True,
        )
        refusals = [one for one in answers if isinstance(one, grpc.aio.AioRpcError)]
        assert len(refusals) == 15
        assert {one.code() for one in refusals} == {Code.INVALID_ARGUMENT}
        assert {one.details() for one in refusals} == {
            "failed to attest: join token does not exist or has already been used"
        }
        # The losers' certificates were never on record, so they never existed.
        assert (await agents_of(running), await issued_of(running)) == (
            before[0] + 1,
            before[1] + 1,
        )


async def test_sec_50_a_lost_reply_can_be_had_again(running: Running) -> None:
    """
    SEC-50: the same token and key within 60 s get the same node, with a new serial that
    counts; another key, or a minute later, get nothing.
    """
    token, key = await running.token(), make_key()
    first = await running.node(token, key)
    again = await running.node(token, key)
    assert again.id == first.id
    assert again.svid.serial != first.svid.serial
    request = entry_pb2.GetAuthorizedEntriesRequest()
    await again.calls.entry.GetAuthorizedEntries(request)
    async with refused(Code.PERMISSION_DENIED) as seen:
        await first.calls.entry.GetAuthorizedEntries(request)
    assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ACTIVE
    async with refused(Code.INVALID_ARGUMENT, "already been used"):
        await running.node(token)
    await running.advance(timedelta(seconds=60))
    await running.node(token, key)
    await running.advance(timedelta(seconds=1))
    async with refused(Code.INVALID_ARGUMENT, "already been used"):
        await running.node(token, key)


async def test_sec_50_a_lost_reply_can_be_had_from_the_next_server() -> None:
    """SEC-50: a server that ended before the reply left is asked again, once it is back."""
    clock = DrivenClock()
    key = make_key()
    with a_folder() as folder:
        async with serving(folder, clock) as server:
            async with channel_to(server.settings.admin_socket_path) as channel:
                made = await Calls(channel).agent.CreateJoinToken(
                    agent_pb2.CreateJoinTokenRequest(ttl=600)
                )
            async with dialing(server) as stranger:
                first = await attest(stranger.calls, made.value, make_csr(key))
        clock.advance(timedelta(seconds=30))
        async with serving(folder, clock) as server:
            async with dialing(server) as stranger:
                again = await attest(stranger.calls, made.value, make_csr(key))
                async with refused(Code.INVALID_ARGUMENT, "already been used"):
                    await attest(stranger.calls, made.value, make_csr(make_key()))
    assert again.result.svid.id == first.result.svid.id


async def test_sec_50_racing_retries_get_one_node(running: Running) -> None:
    """SEC-50: eight tries with one token and one key at once make one node."""
    token, key = await running.token(), make_key()
    before = await agents_of(running)
    answers = await asyncio.gather(
        *(attest(running.anonymous.calls, token, make_csr(key)) for _ in range(8))
    )
    ids = {X509Svid.from_chain(tuple(one.result.svid.cert_chain)).spiffe_id for one in answers}
    assert len(ids) == 1
    assert await agents_of(running) == before + 1


async def test_sec_50_a_token_expires(running: Running) -> None:
    """SEC-50: at the instant it ends a token is worth nothing; who comes late hears that."""
    token, spare = await running.token(ttl=600), await running.token(ttl=601)
    await running.advance(timedelta(seconds=600))
    async with refused(Code.INVALID_ARGUMENT, "join token expired"):
        await running.node(token)
    await running.node(spare)


@pytest.mark.parametrize("spoil", ["wrong secret", "unknown", "no dot", "not text", "huge"])
async def test_sec_50_a_guess_costs_no_signature(running: Running, spoil: str) -> None:
    """SEC-50, SEC-55: what is no token signs nothing, stores nothing and uses nothing up."""
    token = await running.token()
    public_id = JoinToken.parse(token).public_id
    payload = {
        "wrong secret": f"{public_id}.{SECRET}".encode(),
        "unknown": f"nobody.{SECRET}".encode(),
        "no dot": token.replace(".", "-").encode(),
        "not text": b"\xff\xfe",
        "huge": b"x" * 1_000_000,
    }[spoil]
    await running.server.refusals.end_window()
    before = await issued_of(running)
    rows = await running.audited(lambda: _refused_payload(running, payload))
    assert rows == [("agent.attest", "", "refused")]  # SEC-91: once a minute and address
    assert await running.audited(lambda: _refused_payload(running, payload)) == []
    assert await issued_of(running) == before
    await running.node(token)


async def _refused_payload(running: Running, payload: bytes) -> None:
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.write(params(payload=payload))
    async with refused(Code.INVALID_ARGUMENT) as seen:
        await call.read()
    assert SECRET not in seen[0].details()


async def test_sec_52_a_banned_node_cannot_come_back(running: Running) -> None:
    """SEC-52: a ban wins over the minute of grace; evicted, it needs a new token."""
    token, key = await running.token(), make_key()
    node = await running.node(token, key)
    target = id_message(node.id.path)
    await running.local.agent.BanAgent(agent_pb2.BanAgentRequest(id=target))
    async with refused(Code.PERMISSION_DENIED, "banned") as seen:
        await running.node(token, key)
    assert reason_of(seen[0]) is DenialReason.AGENT_BANNED
    await running.local.agent.DeleteAgent(agent_pb2.DeleteAgentRequest(id=target))
    async with refused(Code.INVALID_ARGUMENT, "already been used"):
        await running.node(token, key)
    public_id = JoinToken.parse(token).public_id
    again = await running.node(await running.token(token=f"{public_id}.{SECRET}"))
    assert again.id == node.id


async def test_the_agent_can_go_on_at_once(running: Running) -> None:
    """SPIRE API 9: on the same connection, without a certificate, it gets the bundle next."""
    key = make_key()
    answer = await attest(running.anonymous.calls, await running.token(), make_csr(key))
    assert not answer.result.reattestable
    assert len(answer.result.svid.cert_chain) >= 1
    bundle = await running.anonymous.calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())
    assert len(bundle.x509_authorities) == 1
    svid = X509Svid.from_chain(tuple(answer.result.svid.cert_chain))
    assert answer.result.svid.id == id_message(svid.spiffe_id.path)
    assert answer.result.svid.expires_at == int(svid.validity.not_after.timestamp())


# The stream


def params(
    type_: str = "join_token", payload: bytes = b"a.b", csr: bytes | None = None
) -> agent_pb2.AttestAgentRequest:
    """A first message."""
    made = agent_pb2.AttestAgentRequest()
    made.params.data.type = type_
    made.params.data.payload = payload
    made.params.params.CopyFrom(csr_params(make_csr(make_key()) if csr is None else csr))
    return made


def without(*path: str) -> agent_pb2.AttestAgentRequest:
    """A first message that lacks one part."""
    made: Any = params()
    owner = made
    for name in path[:-1]:
        owner = getattr(owner, name)
    owner.ClearField(path[-1])
    return made


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (agent_pb2.AttestAgentRequest(), "missing params"),
        (agent_pb2.AttestAgentRequest(challenge_response=b"x"), "missing params"),
        (without("params", "data"), "missing attestation data"),
        (without("params", "params"), "missing X509-SVID parameters"),
        (without("params", "params", "csr"), "missing CSR"),
        (without("params", "data", "type"), "missing attestation data type"),
        (without("params", "data", "payload"), "missing attestation data payload"),
        (params(csr=b"no csr"), "malformed CSR"),
        (params(csr=b"x" * 20_000), "malformed CSR"),
    ],
    ids=range(9),
)  # fmt: skip
async def test_first_messages_that_are_wrong(running: Running, first: Any, text: str) -> None:
    """SPIRE API 5.2: each part that is missing is named."""
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.write(first)
    async with refused(Code.INVALID_ARGUMENT, text):
        await call.read()


@pytest.mark.parametrize("type_", ["x509pop", "join_token ", "JOIN_TOKEN", "a" * 100_000])
async def test_unknown_attestors(running: Running, type_: str) -> None:
    """FAILED_PRECONDITION, without echoing what the stranger sent."""
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.write(params(type_))
    async with refused(Code.FAILED_PRECONDITION, "could not find node attestor type") as seen:
        await call.read()
    assert "a" * 100 not in seen[0].details()


async def test_an_end_without_a_message(running: Running) -> None:
    """A stream that ends before it said anything is malformed."""
    call = running.anonymous.calls.agent.AttestAgent(timeout=10)
    await call.done_writing()
    async with refused(Code.INVALID_ARGUMENT, "missing params"):
        await call.read()


async def test_a_client_that_leaves(running: Running) -> None:
    """A client that cancels in the middle leaves no task behind."""
    before = asyncio.all_tasks()
    for number in range(10):
        call = running.anonymous.calls.agent.AttestAgent()
        if number % 2:
            await call.write(params())
        call.cancel()
    for _ in range(200):
        left = {one for one in asyncio.all_tasks() - before if "_attest" in repr(one)}
        if not left:
            break
        await asyncio.sleep(0.01)
    assert left == set()


# Limits


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("local", "local"),
    ],
)
async def test_sec_55_who_shares_a_limit(address: str, network: str) -> None:
    """SEC-55: one IPv4 address, or one IPv6 /64, is one client."""
    assert network_of(address) == network


async def test_sec_55_one_attestation_a_second() -> None:
    """SEC-55: one a second for each address; more wait, and too many are refused cheaply."""
    async with a_running_server(rate_limits=RateLimits(attestation=True)) as running:
        before = len(await running.audit())
        calls = running.anonymous.calls
        tries = [
            asyncio.create_task(attest(calls, f"nobody.{SECRET}", make_csr(make_key())))
            for _ in range(9)
        ]
        try:
            # One goes through at once, five wait up to 5 s, and three are told at once.
            await eventually(lambda: sum(one.done() for one in tries) == 4)
            ended = [one.exception() for one in tries if one.done()]
            seen = [one.code() for one in ended if isinstance(one, grpc.aio.AioRpcError)]
            assert seen.count(Code.RESOURCE_EXHAUSTED) == 3
            assert seen.count(Code.INVALID_ARGUMENT) == 1
        finally:
            for one in tries:
                one.cancel()
            await asyncio.gather(*tries, return_exceptions=True)
        (row,) = (await running.audit())[before:]
        assert (row.actor, row.action, row.outcome) == ("127.0.0.1", "agent.attest", "refused")


async def test_sec_04_an_attestor_names_its_own_nodes_alone(running: Running) -> None:
    """SEC-04: an attestor can only yield IDs below its own part of the namespace."""

    class Wrong:
        type = "wrong"

        def __init__(self, path: str) -> None:
            self.path = path

        async def attest(self, payload: bytes, *, public_key: bytes, challenge: Any) -> Any:
            return AttestedNode(an_id(self.path), frozenset(), can_reattest=True)

    for path in (
        "/spire/agent/join_token/x", "/spire/server", "/web", "/spire/agent/wrong",
        "/spire/agent/wrongly/x",
    ):  # fmt: skip
        service: AgentService = replace(running.server.agents, attestors={"wrong": Wrong(path)})
        with pytest.raises(SpiffeError):
            await service.attest("wrong", b"x", make_csr(make_key()), None)  # type: ignore
    good = replace(running.server.agents, attestors={"wrong": Wrong("/spire/agent/wrong/x")})
    await good.attest("wrong", b"x", make_csr(make_key()), None)  # type: ignore[arg-type]
    await running.settled()

    def drop(repos: Repositories) -> None:
        repos.agents.delete(an_id("/spire/agent/wrong/x"))

    await running.server.store.write(drop)
