"""
SDS streams over time: what is waited for, what wakes them, how they end, what is told of them.

The servicer, the front door and grpcio are real; entries and SVIDs are put into the cache by
hand, so that each change comes alone.  What an operator sees is asked of a real agent.
"""

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import grpc
import pytest

from spiffe_core.bundle import Bundle
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.envoy.service.secret.v3 import sds_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.faults.workloads import saved
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.children import open_files
from tests.support.endpoint import Told, read
from tests.support.endpoint import fetch as fetch_svids
from tests.support.programs import DONE, REFUSED, Programs
from tests.support.sds import Sds, Secrets, a_request, an_sds, sds_at, talk
from tests.support.stack import ROOT, a_stack
from tests.support.store import an_entry, some
from workload_api.attestors.protocol import AttestationError, Finding, NotYetError
from workload_api.cache.cache import EVERYBODY
from workload_api.sds import stream

Code = grpc.StatusCode
ME = f"unix:uid:{os.geteuid()}"
WEB = an_entry(id="web", created_at=NOW)
API = an_entry("/api", id="api", created_at=NOW + timedelta(seconds=1))
STRANGER = an_entry("/stranger", id="stranger", selectors=some("unix:uid:4242"))
PARTNER = FakeCa("partner.test")


def only(sds: Sds) -> tuple[str, str]:
    """State and reason of the only stream."""
    (one,) = sds.state()
    return one.state, one.reason


async def until_told(sds: Sds, state: str, reason: str) -> None:
    """Wait until an operator is told this of the only stream."""
    async with asyncio.timeout(5):
        while not sds.state() or only(sds) != (state, reason):
            await asyncio.sleep(0.001)


# The first answer


async def test_the_default_waits_a_moment_for_the_first_entry() -> None:
    """The default is the first entry's: one that is just being signed is waited for."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB, signed=False)
        sds.endpoint.put(API)
        conversation = sds.talk()
        await conversation.ask("default")
        assert await conversation.is_quiet(0.1)
        sds.endpoint.renew(WEB)
        assert (await conversation.read(1)).svid("default").spiffe_id == WEB.spiffe_id


async def test_the_default_does_not_wait_long() -> None:
    """SDS-04: while the first entry cannot be signed for, the first SVID there is is given."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB, signed=False)
        sds.endpoint.put(API)
        conversation = sds.talk()
        await conversation.ask("default")
        assert (await conversation.read(2)).svid("default").spiffe_id == API.spiffe_id
        await conversation.ack()
        sds.endpoint.renew(WEB)
        assert (await conversation.read(1)).svid("default").spiffe_id == WEB.spiffe_id


async def test_everything_waits_a_moment_for_the_rest() -> None:
    """Who asks for everything is not answered twice because of one that is being signed."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        sds.endpoint.put(API, signed=False)
        conversation = sds.talk()
        await conversation.ask()
        assert await conversation.is_quiet(0.1)
        sds.endpoint.renew(API)
        names = {WEB.spiffe_id.uri, API.spiffe_id.uri, "spiffe://example.org"}
        assert (await conversation.read(1)).names == names


async def test_other_names_do_not_wait() -> None:
    """A name that is there is given at once, whatever else is being signed."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        sds.endpoint.put(API, signed=False)
        for name in ("ROOTCA", "default", WEB.spiffe_id.uri):
            conversation = sds.talk()
            await conversation.ask(name)
            assert (await conversation.read(0.4)).names == {name}


async def test_an_agent_that_is_not_in_step_yet() -> None:
    """SDS-10: a stream is held while the agent has heard nothing of its server."""
    async with an_sds() as sds:
        sds.endpoint.cache.ready = False
        conversation = sds.talk()
        await conversation.ask("default")
        await until_told(sds, "awaited", "the agent has not heard from its server yet")
        assert await code_of(sds.stub.FetchSecrets(a_request("default"))) is Code.UNAVAILABLE
        sds.endpoint.cache.ready = True
        sds.endpoint.put(WEB)
        assert await conversation.read(1)


async def test_under_spires_setting_not_in_step_is_not_refused() -> None:
    """SDS-10: what is not known yet is not unknown: UNAVAILABLE, and Envoy tries again."""
    async with an_sds(refuse_unknown_names=True) as sds:
        sds.endpoint.cache.ready = False
        conversation = sds.talk()
        await conversation.ask("default")
        assert (await conversation.ending())[0] is Code.UNAVAILABLE


async def test_under_spires_setting_what_is_being_signed_is_waited_for() -> None:
    """SDS-10: an entry that matches and has no SVID yet is no reason to refuse."""
    async with an_sds(refuse_unknown_names=True) as sds:
        sds.endpoint.put(WEB, signed=False)
        conversation = sds.talk()
        await conversation.ask("default")
        await until_told(sds, "awaited", "being signed: default")
        sds.endpoint.renew(WEB)
        assert await conversation.read(1)
        await conversation.ack()
        sds.endpoint.drop(WEB)  # and one that is gone is one
        assert (await conversation.ending(1))[0] is Code.INVALID_ARGUMENT


async def code_of(call: Any) -> grpc.StatusCode:
    """How a unary call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


# FetchSecrets


async def test_fetch_waits_for_what_is_being_signed() -> None:
    """SDS-01: the single call waits for an SVID that is on its way, and gives it."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB, signed=False)
        call = asyncio.ensure_future(sds.stub.FetchSecrets(a_request("default")))
        await asyncio.sleep(0.05)
        sds.endpoint.renew(WEB)
        assert Secrets(await call).svid("default").spiffe_id == WEB.spiffe_id
        assert not Secrets(await call).message.nonce


async def test_fetch_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDS-01: an SVID that does not come in time: UNAVAILABLE, try again."""
    monkeypatch.setattr(stream, "FIRST_SVID_SECONDS", 0.05)
    async with an_sds() as sds:
        sds.endpoint.put(WEB, signed=False)
        assert await code_of(sds.stub.FetchSecrets(a_request("default"))) is Code.UNAVAILABLE
        code = await code_of(sds.stub.FetchSecrets(a_request("default", "nobody")))
        assert code is Code.INVALID_ARGUMENT  # for which nobody waits


# Attestation


async def test_who_cannot_be_attested_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDS-10, SEC-35: a platform that does not answer makes no Envoy back off."""
    monkeypatch.setattr(stream, "RETRY_SECONDS", 0.05)
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        sds.endpoint.told.error = AttestationError("the kubelet does not answer")
        conversation = sds.talk()
        await conversation.ask("default")
        why = "workload attestation failed: unix: the kubelet does not answer"
        await until_told(sds, "awaited", why)
        assert await conversation.is_quiet(0.1)
        sds.endpoint.told.error = None
        assert await conversation.read(1)
        await conversation.ack()
        sds.endpoint.told.error = AttestationError("the kubelet does not answer")
        sds.endpoint.renew(WEB)  # nor is anything pushed that was not attested for
        assert await conversation.is_quiet(0.1)
        assert only(sds) == ("awaited", why)
        sds.endpoint.told.error = None
        assert await conversation.read(1)


async def test_who_cannot_be_attested_under_spires_setting() -> None:
    """SDS-10: with SPIRE such a stream ends with UNAVAILABLE, and so it does by the setting."""
    async with an_sds(refuse_unknown_names=True) as sds:
        sds.endpoint.put(WEB)
        sds.endpoint.told.error = AttestationError("the kubelet does not answer")
        conversation = sds.talk()
        await conversation.ask("default")
        assert (await conversation.ending())[0] is Code.UNAVAILABLE


class Arriving:
    """An attestor whose platform tells of the process when it is told to."""

    type: ClassVar[str] = "unix"

    def __init__(self) -> None:
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def attest(self, _: UnixPeer) -> Finding:
        """See `WorkloadAttestor`."""
        if not self.arrived.done():
            raise NotYetError("the kubelet has yet to tell", self.arrived)
        return Finding(WEB.selectors)

    def close(self) -> None:
        """Nothing is under way."""


async def test_a_container_that_the_platform_tells_of_late() -> None:
    """SDS-10: answered when the kubelet has told of the container, however long that takes."""
    attestor = Arriving()
    endpoint = {
        "attestors": [attestor, Told("docker:label:a:b")],
        "attestation_timeout": timedelta(milliseconds=50),
    }
    async with an_sds(endpoint=endpoint) as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.ask("default")
        await until_told(sds, "awaited", "no registration entry matches this process")
        assert await conversation.is_quiet()
        attestor.arrived.set_result(None)
        assert await conversation.read(1)


# What wakes a stream, and what does not


async def test_a_change_wakes_whom_it_concerns() -> None:
    """What does not concern a stream costs it no attestation, an acceptance neither."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversations = [sds.talk() for _ in range(100)]
        for conversation in conversations:
            await conversation.get("default")
        before = sds.endpoint.told.calls
        for number in range(20):
            sds.endpoint.put(replace(STRANGER, id=f"s{number}"))
        sds.endpoint.cache.wake(EVERYBODY)
        assert await conversations[0].is_quiet()
        assert sds.endpoint.told.calls == before > 0


async def test_an_answer_is_made_once_for_all() -> None:
    """A push to a hundred streams of one identity is put together once."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversations = [sds.talk() for _ in range(100)]
        for conversation in conversations:
            await conversation.get("default")
        assert len(sds.servicer.answers) == 1
        sds.endpoint.renew(WEB)
        answers = [await conversation.read(1) for conversation in conversations]
        assert len(sds.servicer.answers) == 2
        assert len({one.version for one in answers}) == 1
        assert len({one.message.nonce for one in answers}) == 100


async def test_nothing_is_said_twice() -> None:
    """SDS-08: a change that leaves what was asked for as it is sends nothing."""
    async with an_sds() as sds:
        sds.endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        sds.endpoint.put(WEB, API)
        conversation = sds.talk()
        await conversation.get("default", "ROOTCA")
        sds.endpoint.renew(API)
        same = replace(sds.endpoint.ca.bundle, sequence_number=9)
        sds.endpoint.cache.wake(sds.endpoint.cache.apply(snapshot=False, bundles=[same]))
        federated = replace(
            WEB, federates_with=frozenset({PARTNER.trust_domain}), revision_number=1
        )
        sds.endpoint.cache.wake(sds.endpoint.cache.apply(snapshot=False, entries=[federated]))
        assert await conversation.is_quiet()


async def test_federation_comes_and_goes() -> None:
    """SDS-09: ALL follows what the caller's entries federate with."""
    async with an_sds() as sds:
        sds.endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        sds.endpoint.put(WEB)
        everyone, partners = sds.talk(), sds.talk()
        await everyone.get("ALL")
        await partners.ask("spiffe://partner.test")
        assert await partners.is_quiet(0.05)
        names = frozenset({PARTNER.trust_domain})
        sds.endpoint.put(replace(WEB, federates_with=names, revision_number=1))
        assert set((await everyone.read(1)).roots("ALL")) == {"example.org", "partner.test"}
        assert (await partners.read(1)).names == {"spiffe://partner.test"}
        await everyone.ack()
        await partners.ack()
        sds.endpoint.put(replace(WEB, revision_number=2))
        assert set((await everyone.read(1)).roots("ALL")) == {"example.org"}
        assert await partners.is_quiet(0.05)


async def test_a_partner_whose_bundle_is_not_known() -> None:
    """An operator is told that a bundle is missing, and not to look for an entry."""
    async with an_sds() as sds:
        names = frozenset({PARTNER.trust_domain})
        sds.endpoint.put(replace(WEB, federates_with=names))
        conversation = sds.talk()
        await conversation.ask("spiffe://partner.test")
        await until_told(sds, "awaited", "no bundle is known of spiffe://partner.test")
        change = sds.endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        sds.endpoint.cache.wake(change)
        assert await conversation.read(1)


async def test_a_stream_that_is_held_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """SDS-10: the log says which process waits for what, once, and not what is being signed."""
    caplog.set_level("INFO")
    async with an_sds() as sds:
        sds.endpoint.put(WEB, signed=False)
        conversation, other = sds.talk(), sds.talk()
        await other.ask("default")
        await conversation.ask("nobody")
        for _ in range(5):
            assert await conversation.is_quiet(0.02)
            sds.endpoint.cache.wake(EVERYBODY)
        assert caplog.messages.count("sds_awaited") == 1


async def test_an_entry_that_expires() -> None:
    """SEC-36: when its entry expires a stream is held, with no change that would wake it."""
    async with an_sds() as sds:
        sds.endpoint.put(replace(WEB, expires_at=NOW + timedelta(milliseconds=100)))
        conversation = sds.talk()
        await conversation.get("default")
        sds.endpoint.clock.advance(timedelta(seconds=1))
        await until_told(sds, "awaited", "no registration entry matches this process")
        assert await conversation.is_quiet(0.05)


async def test_what_would_break_a_rule_is_withheld(caplog: pytest.LogCaptureFixture) -> None:
    """IOP-26: a bad SVID in the cache is not sent, and said once; Envoy keeps its own."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.get("default")
        good = sds.endpoint.cache.svids["web"]
        sds.endpoint.cache.svids["web"] = replace(good, chain=(b"0\x00",), serial_number=9)
        for _ in range(5):
            sds.endpoint.cache.wake(EVERYBODY)
            assert await conversation.is_quiet(0.02)
        assert caplog.messages.count("response_withheld") == 1
        assert await code_of(sds.stub.FetchSecrets(a_request("default"))) is Code.UNAVAILABLE
        sds.endpoint.renew(WEB)
        assert await conversation.read(1)


# How a stream ends


async def test_iop_10_a_stopping_agent() -> None:
    """IOP-10: when the agent stops every stream ends with UNAVAILABLE: Envoy comes back."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        served, held, silent = sds.talk(), sds.talk(), sds.talk()
        await served.get("default")
        await held.ask("nobody")
        assert await held.is_quiet(0.05)
        sds.endpoint.callers.stop()
        for conversation in (served, held, silent):
            assert await conversation.ending(1) == (Code.UNAVAILABLE, "the agent is stopping")


async def test_a_client_that_closes_its_side() -> None:
    """Who has said all is served on, as by grpcurl; who never asked is done with."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation, silent = sds.talk(), sds.talk()
        await conversation.ask("default")
        await conversation.call.done_writing()
        await silent.call.done_writing()
        assert await conversation.read(1)
        assert (await silent.ending(1))[0] is Code.OK
        sds.endpoint.renew(WEB)
        assert await conversation.read(1)


@pytest.mark.parametrize("when", ["silent", "held", "served"])
async def test_nothing_is_left_of_a_stream(when: str) -> None:
    """SEC-84: a stream that its client cancels leaves no task, waiter or descriptor."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        await sds.talk().get("default")
        before, tasks = open_files(), len(asyncio.all_tasks())
        for _ in range(20):
            conversation = sds.talk()
            if when != "silent":
                await conversation.ask("default" if when == "served" else "nobody")
            if when == "served":
                await conversation.read()
            else:
                await conversation.is_quiet(0.01)
            conversation.call.cancel()
        async with asyncio.timeout(5):
            while len(sds.servicer.exchanges) > 1 or len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.001)
        assert sds.endpoint.cache.streams == 1
        assert open_files() == before
        assert len(sds.servicer._held) == 0


# A real agent


async def test_explain_shows_what_an_envoy_waits_for() -> None:
    """SDS-10: `issuer explain` says of each stream what it asks for and how far it is."""
    async with a_stack() as stack, sds_at(stack.agent.sds_socket) as stub:
        programs = Programs.of(stack)
        pid = str(os.getpid())

        async def lines() -> tuple[int, list[str]]:
            said = await programs.issuer("explain", "--pid", pid)
            return said.code, [one for one in said.out.splitlines() if one.startswith("sds ")]

        assert await lines() == (REFUSED, [])
        svid, roots = talk(stub), talk(stub)
        await svid.ask("default")
        await roots.ask("spiffe://partner.test")
        assert await svid.is_quiet()
        code, (first, second) = await lines()
        assert code == REFUSED
        assert first.startswith("sds default: awaited, since 20")
        assert first.endswith("Z: no registration entry matches this process")
        assert second.startswith("sds spiffe://partner.test: awaited, since ")
        await stack.server.add_entry("/web", stack.agent.agent_id, ME)
        sent = await svid.read()
        await svid.nack("KEY_VALUES_MISMATCH")
        assert await svid.is_quiet(0.05)
        code, (first, second) = await lines()
        assert code == DONE
        assert f"Envoy has refused version {sent.version}, since" in first
        assert first.endswith("Z: KEY_VALUES_MISMATCH")
        assert second.endswith("no entry of this process gives it spiffe://partner.test")
        facts = (await programs.issuer("explain", "--pid", pid, "-o", "json")).json
        assert [one["state"] for one in facts["sds_streams"]] == ["refused", "awaited"]
        assert "sds default: Envoy has refused" in facts["text"]


async def test_both_doors_give_the_same_svid() -> None:
    """SDS-02: a process gets one SVID, be it by the Workload API or by SDS; renewed as one."""
    settings = {"sds": {"on_workload_socket": True}}
    async with a_stack(agent_changes=settings) as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        async with sds_at(stack.agent.sds_socket) as own, stack.agent.workload() as channel:
            svids = fetch_svids(workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel))
            both = sds_pb2_grpc.SecretDiscoveryServiceStub(channel)
            first, second = talk(own), talk(both, METADATA)
            for _ in range(2):
                if first.last is None:
                    await first.ask("default")
                    await second.ask("default")
                leaf = (await read(svids)).svids[0].x509_svid
                assert (await first.read()).svid("default").leaf == leaf
                assert (await second.read()).svid("default").leaf == leaf
                await first.ack()
                await second.ack()
                await stack.agent.renew()


async def test_after_a_restart_the_version_is_the_same() -> None:
    """SDS-08, SEC-106: a killed agent, back without a server, gives the same version."""
    async with a_stack() as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, ME)
        await saved(stack.agent, 1)
        async with sds_at(stack.agent.sds_socket) as stub:
            before = await talk(stub).get("default", "ROOTCA")
        stack.server.process.kill()
        stack.agent.process.kill()
        await stack.agent.start(connected=False)
        async with sds_at(stack.agent.sds_socket) as stub:
            conversation = talk(stub)
            await conversation.ask("default", "ROOTCA", version_info=before.version)
            after = await conversation.read()
        assert after.version == before.version
        assert after.svid("default") == before.svid("default")


async def test_the_metrics_page_counts_streams() -> None:
    """The agent's metrics say how many SDS streams are open, and count what is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def metrics() -> dict[str, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        found = [one.split() for one in text.splitlines() if one.startswith("agent_sds_")]
        return {one[0]: float(one[1]) for one in found}

    async with a_stack(agent_changes={"status": {"port": port}}) as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, ME)
        async with sds_at(stack.agent.sds_socket) as stub:
            for _ in range(3):
                conversation = talk(stub)
                await conversation.ask("default")
                await conversation.read()
            assert await metrics() == {"agent_sds_streams": 3, "agent_sds_refusals_total": 0}
            await conversation.nack("bad key")
            async with asyncio.timeout(5):
                while (await metrics())["agent_sds_refusals_total"] != 1:
                    await asyncio.sleep(0.01)


async def test_switched_off() -> None:
    """An agent told so has no socket for Envoys, and explains as ever."""
    async with a_stack(agent_changes={"sds": {"socket": ""}}) as stack:
        assert not stack.agent.sds_socket.exists()
        assert not (await stack.agent.explain(os.getpid())).sds_streams


def test_envoys_messages_are_loaded_where_sds_is_on() -> None:
    """An agent without SDS is spared its messages: nothing else of it imports them."""
    code = (
        "import sys, workload_api.agent.app, workload_api.agent.commands;"
        "print([one for one in sys.modules if 'envoy' in one or 'workload_api.sds' in one])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"


async def test_a_bundle_of_a_hundred_roots() -> None:
    """SDS-09: a bundle as long as one may be is sent whole."""
    roots = tuple(FakeCa(which=f"root {n}").authority for n in range(100))
    async with an_sds() as sds:
        big = Bundle(sds.endpoint.ca.trust_domain, roots)
        sds.endpoint.cache.apply(snapshot=False, bundles=[big])
        sds.endpoint.put(WEB)
        answer = await sds.talk().get("ROOTCA")
        assert answer.roots("ROOTCA")["example.org"] == tuple(one.der for one in roots)
