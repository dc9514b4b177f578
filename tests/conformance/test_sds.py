"""
Envoy's secret discovery service (SDS) of a real agent that follows a real server, by raw gRPC:
what SPIRE's users know (SDS-01 to SDS-10), in the order of its rows.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509SvidError, verify_x509_svid
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.children import a_child
from tests.support.sds import (
    Secrets,
    Talk,
    a_node,
    a_request,
    an_sds,
    sds_at,
    talk,
)
from tests.support.stack import ROOT, Stack, a_stack
from tests.support.store import an_entry

pytestmark = pytest.mark.asyncio(loop_scope="module")

Code = grpc.StatusCode
PYTHON = os.path.realpath(sys.executable)
ME = (f"unix:uid:{os.geteuid()}", f"unix:path:{PYTHON}")
PARTNER = FakeCa("partner.test")
OWN, PARTNERS = "spiffe://example.org", "spiffe://partner.test"
WEB, API, PROXY = f"{OWN}/web", f"{OWN}/api", f"{OWN}/proxy"
PLAIN = a_node(disable_spiffe_cert_validation=True)
EVERYTHING = {WEB, API, OWN, PARTNERS}
NOT_MINE = [PROXY, f"{OWN}/stranger", f"{OWN}/nobody", "spiffe://other.test", "nonsense"]


@dataclass
class World:
    """A stack in which this process has two identities and another program has a third."""

    stack: Stack
    program: Path

    async def add(self, path: str, *selectors: str, **fields: Any) -> Any:
        """An entry below the agent, for this process if nothing else is said."""
        parent = self.stack.agent.agent_id
        return await self.stack.server.add_entry(path, parent, *(selectors or ME), **fields)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """One for all tests here, which leave it as they found it."""
    async with a_stack() as stack:
        program = stack.folder / "proxy"
        shutil.copy2(PYTHON, program)
        here = World(stack, program)
        await stack.server.set_bundle(PARTNER.bundle)
        await here.add("/web", federates_with=["partner.test"])
        await here.add("/api")
        await here.add("/proxy", f"unix:path:{program}")
        await here.add("/stranger", "unix:uid:4242")
        await stack.agent.until_svids(4)
        yield here


@pytest_asyncio.fixture(loop_scope="module")
async def stub(world: World) -> AsyncIterator[Any]:
    """A connection of its own for each test."""
    async with sds_at(world.stack.agent.sds_socket) as made:
        yield made


async def fetch(stub: Any, *names: str, **fields: Any) -> Secrets:
    """What FetchSecrets gives."""
    return Secrets(await stub.FetchSecrets(a_request(*names, **fields), timeout=10))


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a unary call is refused; it must be."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def refused(name: str) -> str:
    """What a caller is told of a name that is not its own."""
    return (
        f"this process may not have '{name}'; the operator can ask why with "
        f"`issuer explain --pid {os.getpid()}`"
    )


# The service and its callers


async def test_sds_01_stream_and_fetch(stub: Any) -> None:
    """SDS-01: secrets come over the stream and by the single call, and are the same."""
    streamed, fetched = await talk(stub).get("default"), await fetch(stub, "default")
    assert streamed.svid("default") == fetched.svid("default")
    assert streamed.version == fetched.version


async def test_sds_01_no_delta(stub: Any) -> None:
    """SDS-01: the incremental form is not offered, and says what to set."""
    code, text = await Talk(stub.DeltaSecrets()).ending()
    assert code is Code.UNIMPLEMENTED
    assert "api_type" in text


CALLER = """
import sys
sys.path[:0] = sys.argv[2:]
import grpc
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2 as pb
from spiffe_wire.pb.envoy.extensions.transport_sockets.tls.v3 import secret_pb2
channel = grpc.insecure_channel("unix:" + sys.argv[1])
call = channel.unary_unary(
    "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets",
    request_serializer=pb.DiscoveryRequest.SerializeToString,
    response_deserializer=pb.DiscoveryResponse.FromString,
)
names = []
for resource in call(pb.DiscoveryRequest()).resources:
    secret = secret_pb2.Secret()
    resource.Unpack(secret)
    names.append(secret.name)
print(*sorted(names))
"""


async def test_sds_02_two_callers_two_identities(world: World, stub: Any) -> None:
    """SDS-02: two programs on one socket get what is each one's own, by the kernel's word."""
    paths = [str(ROOT), *(one for one in sys.path if one)]
    command = (world.program, "-S", "-c", CALLER, str(world.stack.agent.sds_socket), *paths)
    with a_child(*command, env={"PYTHONHOME": sys.base_prefix}) as child:
        assert await asyncio.to_thread(child.hear, 20) == f"{OWN} {PROXY}"
    assert (await fetch(stub)).names == EVERYTHING


async def test_sds_02_the_socket_is_open_to_all(world: World) -> None:
    """SDS-02: any process may ask, as for the Workload API; who it is is asked after that."""
    assert world.stack.agent.sds_socket.stat().st_mode & 0o777 == 0o777


# What is asked for, and what comes


async def test_sds_03_the_type(stub: Any) -> None:
    """SDS-03: the type of each resource and of the whole is the one that was asked for."""
    request = a_request("default", "ROOTCA")
    answer = await stub.FetchSecrets(request, timeout=10)
    assert answer.type_url == request.type_url
    assert {one.type_url for one in answer.resources} == {request.type_url}


async def test_sds_03_another_type(stub: Any) -> None:
    """SDS-03: other resources are refused with InvalidArgument, on both calls."""
    other = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    conversation = talk(stub)
    await conversation.ask("default", type_url=other)
    assert (await conversation.ending())[0] is Code.INVALID_ARGUMENT
    code, text = await refusal(stub.FetchSecrets(a_request("default", type_url=other)))
    assert code is Code.INVALID_ARGUMENT
    assert "tls.v3.Secret" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("default", WEB), (WEB, WEB), (API, API)],
    ids=["default", "first", "second"],
)
async def test_sds_04_certificates(stub: Any, name: str, expected: str) -> None:
    """SDS-04: default is the first SVID; a SPIFFE ID is that one."""
    answer = await talk(stub).get(name)
    assert answer.names == {name}
    assert answer.svid(name).spiffe_id.uri == expected


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        (OWN, {"example.org"}),
        ("ROOTCA", {"example.org"}),
        (PARTNERS, {"partner.test"}),
        ("ALL", {"example.org", "partner.test"}),
    ],
    ids=["own", "ROOTCA", "federated", "ALL"],
)
async def test_sds_04_roots(stub: Any, name: str, domains: set[str]) -> None:
    """SDS-04: a trust domain's ID is its roots, ROOTCA our own, ALL those of all domains."""
    assert set((await talk(stub).get(name)).roots(name)) == domains


async def test_sds_04_no_names(stub: Any) -> None:
    """SDS-04: no names are everything that the caller may have, and nothing else."""
    assert (await talk(stub).get()).names == EVERYTHING


async def test_sds_04_the_three_names_are_settings() -> None:
    """SDS-04: an agent can be told other words for the three."""
    names = {
        "default_svid_name": "mine",
        "default_bundle_name": "roots",
        "default_all_bundles_name": "every",
    }
    async with a_stack(agent_changes={"sds": names}) as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, *ME)
        await stack.agent.until_svids(1)
        async with sds_at(stack.agent.sds_socket) as stub:
            answer = await talk(stub).get("mine", "roots", "every")
            assert answer.svid("mine").spiffe_id.uri == WEB
            assert set(answer.roots("every")) == set(answer.roots("roots")) == {"example.org"}
            conversation = talk(stub)
            await conversation.ask("default")
            assert await conversation.is_quiet()


async def test_sds_05_pem_everywhere(stub: Any) -> None:
    """SDS-05: certificates and keys are PEM, the key PKCS#8; no DER anywhere."""
    answer = await talk(stub).get("default", "ROOTCA")
    secret = answer.by_name["default"].tls_certificate
    assert secret.private_key.inline_bytes.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert secret.private_key.inline_bytes.endswith(b"-----END PRIVATE KEY-----\n")
    assert secret.certificate_chain.inline_bytes.startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert answer.svid("default").spiffe_id.uri == WEB  # whose key is the certificate's
    (root,) = answer.roots("ROOTCA")["example.org"]
    assert X509Authority.parse(root)


async def test_sds_06_one_store_for_each_domain(stub: Any) -> None:
    """SDS-06, SEC-11, FED-43: no store of ours takes what a partner's CA signs as ours."""
    answer = await talk(stub).get("ALL", "default")
    roots = answer.roots("ALL")
    assert roots["partner.test"] == (PARTNER.authority.der,)
    assert PARTNER.authority.der not in roots["example.org"]
    bundles = BundleSet.of(
        Bundle(TrustDomain(name), tuple(X509Authority.parse(one) for one in found))
        for name, found in roots.items()
    )

    def verify(claimed: str) -> str:
        chain = PARTNER.chain(PARTNER.leaf(claimed))
        return verify_x509_svid(chain, bundles, at=NOW).spiffe_id.uri

    now = datetime.now(UTC)
    assert verify_x509_svid(answer.svid("default").chain, bundles, at=now)
    assert verify(f"{PARTNERS}/web") == f"{PARTNERS}/web"
    for claimed in (WEB, f"{OWN}/anything", "spiffe://other.test/web"):
        with pytest.raises(X509SvidError, match=r"no valid path|no X\.509 authority"):
            verify(claimed)


@pytest.mark.parametrize(
    "node",
    [PLAIN, a_node(disable_spiffe_cert_validation="true"), a_node((1, 17, 4))],
    ids=["metadata", "metadata as text", "before 1.18"],
)
async def test_sds_06_a_plain_store(stub: Any, node: Any) -> None:
    """SDS-06: who cannot use the validator, or says so, gets a plain store of one domain."""
    (root,) = (await talk(stub).get("ROOTCA", node=node)).plain("ROOTCA")
    (partners,) = (await talk(stub).get(PARTNERS, node=node)).plain(PARTNERS)
    assert root != partners == PARTNER.authority.der


async def test_sds_06_all_in_a_plain_store_is_refused(stub: Any) -> None:
    """SDS-06, FED-43: several domains never come in one plain store."""
    conversation = talk(stub)
    await conversation.ask("ALL", node=PLAIN)
    code, text = await conversation.ending()
    assert code is Code.INVALID_ARGUMENT
    assert "FED-43" in text
    assert await refusal(stub.FetchSecrets(a_request("ALL", node=PLAIN))) == (code, text)


# What the caller may not have


@pytest.mark.parametrize("name", NOT_MINE)
async def test_sds_07_a_stream_is_held(stub: Any, name: str) -> None:
    """SDS-07, SDS-10, SEC-85: foreign or non-existing, the stream is held and says nothing."""
    conversation = talk(stub)
    await conversation.ask(name)
    assert await conversation.is_quiet()


@pytest.mark.parametrize("name", NOT_MINE)
async def test_sds_07_fetch_is_refused(stub: Any, name: str) -> None:
    """SDS-07, SEC-85: foreign or non-existing, the single call says the same: not yours."""
    code, text = await refusal(stub.FetchSecrets(a_request(name)))
    assert (code, text) == (Code.INVALID_ARGUMENT, refused(name))


async def test_sds_07_no_partial_answer(stub: Any) -> None:
    """SDS-07: one name that is not the caller's keeps the others back; without it they come."""
    conversation = talk(stub)
    await conversation.ask("default", PROXY)
    assert await conversation.is_quiet()
    code, _ = await refusal(stub.FetchSecrets(a_request("default", PROXY)))
    assert code is Code.INVALID_ARGUMENT
    await conversation.ask("default")
    assert (await conversation.read(1)).names == {"default"}


async def test_sds_07_as_spire_answers() -> None:
    """SDS-07, SDS-10: under the setting a stream ends with InvalidArgument, as with SPIRE."""
    async with a_stack(agent_changes={"sds": {"refuse_unknown_names": True}}) as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, *ME)
        await stack.server.add_entry("/stranger", stack.agent.agent_id, "unix:uid:4242")
        await stack.agent.until_svids(2)
        async with sds_at(stack.agent.sds_socket) as stub:
            for name in NOT_MINE:
                conversation = talk(stub)
                await conversation.ask("default", name)
                assert await conversation.ending() == (Code.INVALID_ARGUMENT, refused(name))
            assert (await talk(stub).get("default")).names == {"default"}


# Versions, nonces, acceptance


async def test_sds_08_versions_and_nonces(world: World, stub: Any) -> None:
    """SDS-08: each change has a new version; each answer, of whichever stream, a new nonce."""
    first, second = talk(stub), talk(stub)
    answers = [await first.get("default"), await second.get("default")]
    assert answers[0].version == answers[1].version
    await world.stack.agent.renew()
    answers += [await first.read(), await second.read()]
    assert answers[2].version == answers[3].version != answers[0].version
    assert len({one.message.nonce for one in answers}) == 4


async def test_sds_08_an_acceptance_is_not_answered(stub: Any) -> None:
    """SDS-08: an accepted answer is not sent again, whatever is said of it afterwards."""
    conversation = talk(stub)
    await conversation.get("default")
    await conversation.ack()
    assert await conversation.is_quiet()


async def test_sds_08_a_stale_nonce(stub: Any) -> None:
    """SDS-08: what is said of an answer that is not the last is ignored."""
    conversation = talk(stub)
    await conversation.get("default")
    await conversation.ask("ROOTCA", response_nonce="another")
    assert await conversation.is_quiet()


async def test_sds_08_a_refused_answer(world: World, stub: Any) -> None:
    """SDS-08: a refusal is logged once, with its reason, not answered; the next change is."""
    conversation = talk(stub)
    await conversation.get("default")
    await world.stack.agent.renew()
    refused = await conversation.read()
    for _ in range(50):
        await conversation.nack("KEY_VALUES_MISMATCH\nfor \x1bdefault")

    def logged() -> list[dict[str, Any]]:
        events = world.stack.agent.process.events()
        return [one for one in events if one["event"] == "sds_refused_by_envoy"]

    (line,) = await world.stack.agent.process.until(logged)
    assert line["reason"] == r"KEY_VALUES_MISMATCH\nfor \x1bdefault"
    assert (line["pid"], line["names"]) == (os.getpid(), "default")
    assert line["version"] == refused.version
    told = (await world.stack.agent.explain(os.getpid())).sds_streams
    assert [(one.state, one.reason) for one in told] == [("refused", line["reason"])]
    await world.stack.agent.renew()
    assert (await conversation.read()).version != refused.version
    await conversation.ack()
    assert len(logged()) == 1


async def test_sds_08_after_a_reconnect(stub: Any) -> None:
    """SDS-08: the last version and no nonce, as after a reconnect, are a first request."""
    conversation = talk(stub)
    version = (await talk(stub).get("default")).version
    await conversation.ask("default", version_info=version)
    assert (await conversation.read(1)).version == version


# Changes


async def test_sds_09_new_names_at_once(stub: Any) -> None:
    """SDS-09: other names on the same stream are answered at once, with what is asked now."""
    conversation = talk(stub)
    await conversation.get("default")
    await conversation.ask("default", "ROOTCA")
    assert (await conversation.read(1)).names == {"default", "ROOTCA"}
    await conversation.ask("ROOTCA")
    assert (await conversation.read(1)).names == {"ROOTCA"}


async def test_sds_09_a_rotation_is_pushed(world: World, stub: Any) -> None:
    """SDS-09: a new SVID comes by itself, under a new version, within seconds."""
    conversation = talk(stub)
    before = await conversation.get("default")
    await world.stack.agent.renew()
    after = await conversation.read(5)
    assert after.version != before.version
    assert after.svid("default").serial_number != before.svid("default").serial_number
    assert after.svid("default").spiffe_id == before.svid("default").spiffe_id


async def test_sds_09_a_bundle_change_is_pushed(world: World, stub: Any) -> None:
    """SDS-09: a partner's new root comes by itself, to whom his roots are known."""
    own, partners, everyone = talk(stub), talk(stub), talk(stub)
    for conversation, name in ((own, "ROOTCA"), (partners, PARTNERS), (everyone, "ALL")):
        await conversation.get(name)
    following = FakeCa("partner.test", which="next")
    both = Bundle(PARTNER.trust_domain, (PARTNER.authority, following.authority))
    try:
        await world.stack.server.set_bundle(both)
        roots = {PARTNER.authority.der, following.authority.der}
        assert set((await partners.read()).roots(PARTNERS)["partner.test"]) == roots
        assert set((await everyone.read()).roots("ALL")["partner.test"]) == roots
        assert await own.is_quiet()
    finally:
        await world.stack.server.set_bundle(PARTNER.bundle)


async def test_sds_10_an_identity_that_comes_late(world: World, stub: Any) -> None:
    """SDS-10: a stream that is held is answered the moment its identity exists."""
    conversation = talk(stub)
    await conversation.ask(f"{OWN}/late")
    assert await conversation.is_quiet()
    entry = await world.add("/late")
    try:
        answer = await conversation.read(2)
        assert answer.svid(f"{OWN}/late").spiffe_id.uri == f"{OWN}/late"
    finally:
        await world.stack.server.delete_entries(entry)


async def test_sds_10_the_first_identity_of_a_process() -> None:
    """SDS-10: so it is for a process that had no identity at all; it is told nothing before."""
    async with a_stack() as stack, sds_at(stack.agent.sds_socket) as stub:
        default, roots = talk(stub), talk(stub)
        await default.ask("default")
        await roots.ask("ROOTCA")
        why = "no registration entry matches this process"

        async def are_held() -> bool:
            told = (await stack.agent.explain(os.getpid())).sds_streams
            return [(one.state, one.reason) for one in told] == [("awaited", why)] * 2

        await stack.agent.process.until(are_held)
        await stack.server.add_entry("/web", stack.agent.agent_id, *ME)
        assert (await default.read(3)).svid("default").spiffe_id.uri == WEB
        assert set((await roots.read(3)).roots("ROOTCA")) == {"example.org"}


async def test_sds_10_an_identity_that_goes_away() -> None:
    """SDS-10: who loses its identity is held, and answered when it has one again."""
    async with an_sds() as sds:
        web = an_entry(id="web")
        sds.endpoint.put(web)
        conversation = sds.talk()
        await conversation.get("default")
        sds.endpoint.drop(web)
        await asyncio.sleep(0.05)
        assert [one.state for one in sds.state()] == ["awaited"]
        sds.endpoint.put(web)
        assert (await conversation.read(1)).svid("default").spiffe_id == web.spiffe_id
