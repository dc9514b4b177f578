"""
Agents after they joined: what their certificate is still good for (SPIRE API 2.3).

SEC-17, SEC-20, SEC-52, SEC-54: on every call expiry, bundle, ban and serial count anew.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.x509 import self_signed
from issuer.api import ours
from issuer.store.store import Repositories
from spiffe_core.permission import DenialReason
from spiffe_wire.pb.google.rpc import status_pb2
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.callers import (
    Code,
    Holder,
    Running,
    a_running_server,
    an_id,
    attest,
    below,
    code_of,
    codes,
    csr_params,
    csr_with,
    dialing,
    eventually,
    id_message,
    reason_of,
    refused,
)
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder, serving
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    """One server for the module, on a clock that a test can move."""
    async with a_running_server(DrivenClock()) as made:
        yield made


async def ban(running: Running, node: Holder) -> None:
    """Ban a node."""
    await running.local.agent.BanAgent(agent_pb2.BanAgentRequest(id=id_message(node.id.path)))


async def evict(running: Running, node: Holder) -> None:
    """Evict a node."""
    await running.local.agent.DeleteAgent(
        agent_pb2.DeleteAgentRequest(id=id_message(node.id.path))
    )


async def _sync(node: Holder) -> None:
    call = node.calls.entry.SyncAuthorizedEntries(timeout=10)
    await call.write(entry_pb2.SyncAuthorizedEntriesRequest())
    await call.read()
    call.cancel()


async def _watch(node: Holder) -> None:
    call = node.calls.watch.Watch(watch_pb2.WatchRequest(), timeout=10)
    await call.read()
    call.cancel()


# Every method that an agent may call, as it calls it.
AGENTS_CALLS: dict[str, Callable[[Holder], Awaitable[Any]]] = {
    "GetAuthorizedEntries": lambda node: node.calls.entry.GetAuthorizedEntries(
        entry_pb2.GetAuthorizedEntriesRequest()
    ),
    "SyncAuthorizedEntries": _sync,
    "RenewAgent": lambda node: node.renew(),
    "PostStatus": lambda node: node.calls.agent.PostStatus(agent_pb2.PostStatusRequest()),
    "BatchNewX509SVID": lambda node: node.calls.svid.BatchNewX509SVID(
        svid_pb2.BatchNewX509SVIDRequest(params=[svid_pb2.NewX509SVIDParams(entry_id="x")])
    ),
    "NewJWTSVID": lambda node: node.calls.svid.NewJWTSVID(
        svid_pb2.NewJWTSVIDRequest(entry_id="x", audience=["a"])
    ),
    "BatchNewWITSVID": lambda node: node.calls.svid.BatchNewWITSVID(
        svid_pb2.BatchNewWITSVIDRequest()
    ),
    "GetFederatedBundle": lambda node: node.calls.bundle.GetFederatedBundle(
        bundle_pb2.GetFederatedBundleRequest(trust_domain="x.test")
    ),
    "Watch": _watch,
}
DENIED = (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED)


async def expire(running: Running, node: Holder) -> None:
    """Let its certificate end, on a connection that is older than that moment."""
    await running.advance(node.svid.validity.not_after - running.server.own.clock.now())
    await node.calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())  # the connection lives
    await running.advance(timedelta(microseconds=1))


async def supersede(running: Running, node: Holder) -> None:
    """Renew, and use what that yielded."""
    renewed = await running.dial(*await node.renew())
    await renewed.calls.agent.PostStatus(agent_pb2.PostStatusRequest())


ENDS = {
    DenialReason.AGENT_EXPIRED: expire,
    DenialReason.AGENT_NOT_ATTESTED: evict,
    DenialReason.AGENT_NOT_ACTIVE: supersede,
    DenialReason.AGENT_BANNED: ban,
}


@pytest.mark.parametrize("reason", ENDS, ids=lambda one: one.name)
async def test_sec_17_every_call_is_denied_with_its_reason(
    running: Running, reason: DenialReason
) -> None:
    """
    SEC-17, SEC-52, SEC-54: once expired, evicted, superseded or banned, each of an agent's
    calls on its open connection is denied, with the typed reason that agents act upon.
    """
    node = await running.node()
    for call in AGENTS_CALLS.values():
        try:
            await call(node)
        except grpc.aio.AioRpcError as error:
            assert error.code() not in DENIED
    await ENDS[reason](running, node)
    for name, call in AGENTS_CALLS.items():
        async with refused(Code.PERMISSION_DENIED) as seen:
            await call(node)
        assert reason_of(seen[0]) is reason, name
        assert seen[0].details().startswith("authorization denied for method /")
        assert seen[0].details().endswith(f"/{name}")
    # What everybody may call it still may.
    await node.calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())


async def test_the_detail_repeats_code_and_text(running: Running) -> None:
    """SPIRE API 2.3: the embedded status has the same code and message, and one detail."""
    node = await running.node()
    await ban(running, node)
    async with refused(Code.PERMISSION_DENIED) as seen:
        await AGENTS_CALLS["PostStatus"](node)
    details = [v for k, v in seen[0].trailing_metadata() if k == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details[0])
    assert (len(details), status.code, status.message) == (1, 7, seen[0].details())
    assert [one.type_url for one in status.details] == [
        "type.googleapis.com/spire.api.types.PermissionDeniedDetails"
    ]


async def test_others_are_denied_plainly(running: Running) -> None:
    """No certificate, no detail; a workload's SVID is no attested agent's."""
    for name, call in AGENTS_CALLS.items():
        async with refused(Code.PERMISSION_DENIED, f"/{name}") as seen:
            await call(running.anonymous)
        assert reason_of(seen[0]) is None
    workload = await running.holder("/web")
    async with refused(Code.PERMISSION_DENIED) as seen:
        await AGENTS_CALLS["PostStatus"](workload)
    assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ATTESTED


async def test_sec_17_a_certificate_under_a_revoked_authority_is_worth_nothing() -> None:
    """SEC-17: when its authority leaves the bundle, an open connection proves nobody."""
    async with a_running_server(DrivenClock()) as running:
        node = await running.node()
        await AGENTS_CALLS["PostStatus"](node)
        now = running.server.own.clock.now()
        key = SigningKey("new", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP256R1()))
        root = self_signed(key, running.server.hub.trust_domain, now=now, ttl=timedelta(days=9))
        record = AuthorityRecord(
            root.authority_id, AuthorityKind.X509, AuthorityState.PREPARED, "new", root.der,
            root.validity, now,
        )  # fmt: skip
        old = running.server.rotator.x509.authority.authority_id

        def work(repos: Repositories) -> None:
            repos.authorities.add_prepared(record)
            repos.authorities.activate(record.authority_id, now)

        await running.server.store.write(work)
        await running.settled()
        await AGENTS_CALLS["PostStatus"](node)  # old, and trusted still
        stream = node.calls.watch.Watch(watch_pb2.WatchRequest())
        await stream.read()
        await running.server.store.write(lambda repos: repos.authorities.prune(old))
        await running.settled()
        for call in AGENTS_CALLS.values():
            async with refused(Code.UNAUTHENTICATED, "no longer trusted"):
                await call(node)
        async with refused(Code.UNAUTHENTICATED, "no longer trusted"):
            await stream.read()


async def test_who_can_attest_again_must(running: Running) -> None:
    """SPIRE API 5.2: a re-attestable node is told AGENT_MUST_REATTEST instead of renewing."""
    node = await running.node()
    agent = running.server.hub.index.agent(node.id)
    assert agent is not None
    again = replace(agent, can_reattest=True)
    await running.server.store.write(lambda repos: repos.agents.attested(again))
    await running.settled()
    async with refused(Code.PERMISSION_DENIED, "reattest") as seen:
        await node.renew()
    assert reason_of(seen[0]) is DenialReason.AGENT_MUST_REATTEST
    await AGENTS_CALLS["PostStatus"](node)


# Renewal


async def test_sec_54_old_and_new_are_good_until_the_new_is_used(running: Running) -> None:
    """
    SEC-54: between renewal and first use both work (a lost reply harms nobody); from then
    on the old one is nobody's, and its use is an event of its own.
    """
    node = await running.node()
    lost = await running.dial(*await node.renew())
    renewed = await running.dial(*await node.renew())
    await AGENTS_CALLS["PostStatus"](node)
    assert renewed.id == node.id
    assert renewed.svid.serial != node.svid.serial
    assert renewed.svid.validity.not_after >= node.svid.validity.not_after
    await AGENTS_CALLS["PostStatus"](renewed)
    shown = await running.local.agent.GetAgent(
        agent_pb2.GetAgentRequest(id=id_message(node.id.path))
    )
    assert shown.x509svid_serial_number == renewed.svid.serial
    for stale in (node, lost):
        rows = await running.audited(lambda one=stale: _denied(one))  # type: ignore[misc]
        assert [action for action, _, _ in rows] == (
            ["agent.superseded"] if stale is node else []
        )


async def _denied(node: Holder) -> None:
    async with refused(Code.PERMISSION_DENIED) as seen:
        await AGENTS_CALLS["PostStatus"](node)
    assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ACTIVE


async def test_sec_54_first_uses_at_once_all_count(running: Running) -> None:
    """SEC-54: twenty first calls at once with a renewed SVID are all served."""
    node = await running.node()
    renewed = await running.dial(*await node.renew())
    await asyncio.gather(*(AGENTS_CALLS["GetAuthorizedEntries"](renewed) for _ in range(20)))


async def test_sec_54_a_cloned_key_is_noticed(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-54: of two who hold one identity, only one can go on; the other raises an alarm."""
    node = await running.node()
    thief = await running.dial(node.chain, node.key)
    stolen = await running.dial(*await thief.renew())
    await AGENTS_CALLS["PostStatus"](stolen)
    with caplog.at_level(logging.WARNING):
        async with refused(Code.PERMISSION_DENIED) as seen:
            await node.renew()
    assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ACTIVE
    assert "superseded_serial_used" in caplog.messages


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (agent_pb2.RenewAgentRequest(), "params cannot be nil"),
        (agent_pb2.RenewAgentRequest(params=csr_params(b"")), "missing CSR"),
        (agent_pb2.RenewAgentRequest(params=csr_params(b"x")), "malformed CSR"),
    ],
    ids=range(3),
)
async def test_renewals_that_are_wrong(running: Running, request_: Any, text: str) -> None:
    """Each is INVALID_ARGUMENT, and the agent's SVID stays what it was."""
    node = await running.node()
    async with refused(Code.INVALID_ARGUMENT, text):
        await node.calls.agent.RenewAgent(request_)
    await AGENTS_CALLS["PostStatus"](node)


async def test_sec_20_a_csr_yields_its_key_alone(running: Running) -> None:
    """SEC-20: whatever an agent's CSR asks for, the SVID is the agent's own."""
    node = await running.node()
    key = make_key()
    csr = csr_with(
        key,
        x509.UniformResourceIdentifier("spiffe://example.org/spire/server"),
        x509.DNSName("server.example.org"),
        extensions=[
            x509.BasicConstraints(ca=True, path_length=None),
            x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.3.6.1.5.5.7.3.3")]),
        ],
    )
    answers = [
        (
            await node.calls.agent.RenewAgent(
                agent_pb2.RenewAgentRequest(params=csr_params(csr))
            )
        ).svid,
        (
            await attest(
                running.anonymous.calls,
                await running.token(),
                csr_with(make_key(), x509.DNSName("server.example.org")),
            )
        ).result.svid,
    ]
    for answer in answers:
        leaf = x509.load_der_x509_certificate(answer.cert_chain[0])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == []
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert uri.startswith("spiffe://example.org/spire/agent/join_token/")
        basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert not basic.ca


async def ways_to_a_leaf(running: Running, key: bytes, node: Holder, entry: Any) -> list[int]:
    """The codes of every call that would put *key* into a certificate, one after another."""
    csr = make_csr(key)

    async def batch() -> int:
        answer = await node.calls.svid.BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(
                params=[svid_pb2.NewX509SVIDParams(entry_id=entry.id, csr=csr)]
            )
        )
        return codes(answer.results)[0]

    async def mint() -> None:
        wanted = svid_pb2.MintX509SVIDRequest(csr=make_csr(key, an_id("/minted")))
        await running.local.svid.MintX509SVID(wanted)

    async def renew() -> None:
        wanted = agent_pb2.RenewAgentRequest(params=csr_params(csr))
        await node.calls.agent.RenewAgent(wanted)

    found = [await batch(), number_of(await code_of(mint()))]
    found.append(number_of(await code_of(renew())))
    joining = attest(running.anonymous.calls, await running.token(), csr)
    return [*found, number_of(await code_of(joining))]


def number_of(code: grpc.StatusCode) -> int:
    """The number of a code."""
    return int(code.value[0])


async def test_sec_20_nobody_gets_another_nodes_key(running: Running) -> None:
    """
    SEC-20: no call signs for the key of another live node, renewed or banned; for one's own,
    or that of a node that is gone, it does.
    """
    node, other = await running.node(), await running.node()
    (entry,) = await running.add(below(node, "/own"))
    # The last way but one makes it the node's own, so that the last is refused.
    assert await ways_to_a_leaf(running, make_key(), node, entry) == [0, 0, 0, 3]
    assert await ways_to_a_leaf(running, other.key, node, entry) == [3, 3, 3, 3]
    chain, renewed = await other.renew()
    assert await ways_to_a_leaf(running, renewed, node, entry) == [3, 3, 3, 3]
    await AGENTS_CALLS["PostStatus"](await running.dial(chain, renewed))
    assert await ways_to_a_leaf(running, renewed, node, entry) == [3, 3, 3, 3]
    await ban(running, other)
    assert await ways_to_a_leaf(running, renewed, node, entry) == [3, 3, 3, 3]
    await evict(running, other)
    assert await ways_to_a_leaf(running, renewed, node, entry) == [0, 0, 0, 3]
    # Its own key a node may use again; nobody else may, operators included.
    assert await ways_to_a_leaf(running, node.key, node, entry) == [0, 3, 0, 3]


async def test_sec_20_nobody_gets_an_authoritys_key(running: Running) -> None:
    """SEC-20: no call signs for the key of any authority of ours, to come or retired too."""
    node = await running.node()
    (entry,) = await running.add(below(node, "/authority"))
    rotator = running.server.rotator
    key = SigningKey("next", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP256R1()))
    now = running.server.own.clock.now()
    root = self_signed(key, running.server.hub.trust_domain, now=now, ttl=timedelta(days=9))
    prepared = AuthorityRecord(
        root.authority_id, AuthorityKind.X509, AuthorityState.PREPARED, "next", root.der,
        root.validity, now,
    )  # fmt: skip
    await running.server.store.write(lambda repos: repos.authorities.add_prepared(prepared))
    await running.settled()
    for private in (
        rotator.x509.private,
        rotator.jwt.private,
        key.private_for(KeyPurpose.X509_CA),
    ):
        der = private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        assert await ways_to_a_leaf(running, der, node, entry) == [3, 3, 3, 3]


# Races


async def test_sec_52_a_ban_wins_every_race(running: Running) -> None:
    """SEC-52: whatever runs beside it, once a ban is acknowledged nothing is good any more."""
    for number in range(12):
        token, key = await running.token(), make_key()
        node = await running.node(token, key)

        async def renew_and_use(node: Holder = node) -> None:
            renewed = await running.dial(*await node.renew())
            await AGENTS_CALLS["PostStatus"](renewed)

        async def come_again(token: str = token, key: bytes = key) -> None:
            again = await running.node(token, key)
            await AGENTS_CALLS["PostStatus"](again)

        async def ban_after(pause: float, node: Holder = node) -> None:
            await asyncio.sleep(pause)
            await ban(running, node)

        await asyncio.gather(
            renew_and_use(),
            come_again(),
            ban_after(number % 5 * 0.004),
            return_exceptions=True,
        )
        shown = await running.local.agent.GetAgent(
            agent_pb2.GetAgentRequest(id=id_message(node.id.path))
        )
        assert (shown.banned, shown.x509svid_serial_number) == (True, "")
        for again in (renew_and_use(), come_again(), AGENTS_CALLS["PostStatus"](node)):
            async with refused(Code.PERMISSION_DENIED) as seen:
                await again
            assert reason_of(seen[0]) is DenialReason.AGENT_BANNED


async def test_sec_52_an_eviction_wins_every_race(running: Running) -> None:
    """SEC-52: evicted while it renews, a node is gone when that is acknowledged."""
    for number in range(10):
        node = await running.node()

        async def evict_after(pause: float, node: Holder = node) -> None:
            await asyncio.sleep(pause)
            await evict(running, node)

        await asyncio.gather(
            node.renew(), evict_after(number % 5 * 0.003), return_exceptions=True
        )
        async with refused(Code.PERMISSION_DENIED) as seen:
            await node.renew()
        assert reason_of(seen[0]) is DenialReason.AGENT_NOT_ATTESTED
        async with refused(Code.NOT_FOUND):
            await running.local.agent.GetAgent(
                agent_pb2.GetAgentRequest(id=id_message(node.id.path))
            )


async def test_sec_52_bans_are_known_from_the_first_call_on() -> None:
    """SEC-52: a server that starts denies a banned node before it says that it is ready."""
    clock = DrivenClock()
    with a_folder() as folder:
        async with a_running_server(clock) as running:
            node = await running.node()
            await ban(running, node)
            # As it lies on the disk, with what SQLite still has in its log.
            await running.server.store.read(lambda repos: repos.agents.count())
            copy = folder / "server"
            shutil.copytree(running.server.settings.data_dir, copy)
        async with serving(folder, clock) as server:
            assert server.is_ready()
            async with dialing(server, node.chain, node.key) as again:
                async with refused(Code.PERMISSION_DENIED) as seen:
                    await AGENTS_CALLS["PostStatus"](again)
    assert reason_of(seen[0]) is DenialReason.AGENT_BANNED


@pytest.mark.parametrize(
    ("end", "reason"),
    [(ban, DenialReason.AGENT_BANNED), (evict, DenialReason.AGENT_NOT_ATTESTED),
     (supersede, DenialReason.AGENT_NOT_ACTIVE), (expire, DenialReason.AGENT_EXPIRED)],
    ids=["ban", "evict", "supersede", "expire"],
)  # fmt: skip
async def test_sec_17_open_streams_end(
    running: Running,
    end: Callable[..., Awaitable[None]],
    reason: DenialReason,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SEC-17, SEC-52: held streams end within 5 s, with the typed reason; others stay."""
    assert ours.RECHECK_SECONDS <= 5
    if end is expire:  # nobody says so: the stream looks by itself
        monkeypatch.setattr(ours, "RECHECK_SECONDS", 0.05)
    node, other = await running.node(), await running.node()
    if end is expire:  # the other one must not expire with it
        other = node
    streams = [node.calls.watch.Watch(watch_pb2.WatchRequest()) for _ in range(20)]
    kept = other.calls.watch.Watch(watch_pb2.WatchRequest())
    for stream in [*streams, kept]:
        assert (await stream.read()).snapshot
    await end(running, node)
    async with asyncio.timeout(5):
        for stream in streams:
            async with refused(Code.PERMISSION_DENIED) as seen:
                await stream.read()
            assert reason_of(seen[0]) is reason
    if other is not node:
        await running.add(below(other, f"/still-{reason.name}"))
        assert len((await kept.read()).entries) == 1
    kept.cancel()
    await eventually(lambda: running.server.hub.watchers == 0)


async def test_sec_83_who_reads_nothing_is_cut(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    SEC-83, SEC-52: a stream whose reader has taken nothing for 30 s is cut, and at once
    when its agent is banned; what waited for it never arrives.
    """
    monkeypatch.setattr(ours, "RECHECK_SECONDS", 0.05)
    node = await running.node()
    heavy = [f"k{m}:{'v' * 3900}" for m in range(60)]
    for first in range(0, 40, 10):
        await running.add(*[below(node, f"/k{n}", *heavy) for n in range(first, first + 10)])
    stream = node.calls.watch.Watch(watch_pb2.WatchRequest())
    await eventually(lambda: running.server.hub.watchers == 1)
    await asyncio.sleep(0.3)
    assert running.server.hub.watchers == 1, "a slow reader has its time"
    await ban(running, node)
    await eventually(lambda: running.server.hub.watchers == 0)
    taken = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in stream:
            taken += len(message.entries)
    assert caught.value.code() is Code.UNAVAILABLE
    assert taken < 40
    # And without a ban, when its time is over.
    monkeypatch.setattr(ours, "STALL_SECONDS", 0.3)
    other = await running.node()
    for first in range(0, 40, 10):
        await running.add(*[below(other, f"/o{n}", *heavy) for n in range(first, first + 10)])
    stream = other.calls.watch.Watch(watch_pb2.WatchRequest())
    await eventually(lambda: running.server.hub.watchers == 1)
    await eventually(lambda: running.server.hub.watchers == 0)
    stream.cancel()
    # Who reads gets everything, in as many messages as it takes.
    stream = other.calls.watch.Watch(watch_pb2.WatchRequest())
    taken = 0
    async for message in stream:
        taken += len(message.entries)
        assert message.ByteSize() < 2 * 1024 * 1024
        if not message.more:
            break
    assert taken == 40
    stream.cancel()
