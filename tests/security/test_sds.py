"""SDS against those who should get nothing by it: the header, names, limits, processes."""

import asyncio
import contextlib
import os
import sys
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_core.bundle import Bundle
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.security_header import KEY, METADATA
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.children import a_python, open_files
from tests.support.sds import NODE, Sds, a_request, an_sds, sds_at, talk
from tests.support.stack import ROOT, AgentProcess, a_folder, a_server, channel_to
from tests.support.store import an_entry, some
from workload_api.attestors.unix import UnixAttestor
from workload_api.sds import stream
from workload_api.sds.request import MAX_REQUEST_BYTES

Code = grpc.StatusCode
WEB = an_entry(id="web", created_at=NOW)
STRANGER = an_entry("/stranger", id="stranger", selectors=some("unix:uid:4242"))
PARTNER = FakeCa("partner.test")
SERVICE = "/envoy.service.secret.v3.SecretDiscoveryService"
ASKED = a_request("default").SerializeToString()

# SEC-38: the header

SDS_METHODS = {f"{SERVICE}/StreamSecrets": ASKED, f"{SERVICE}/FetchSecrets": ASKED}
OTHERS = {
    "/SpiffeWorkloadAPI/FetchX509SVID": b"",
    "/SpiffeWorkloadAPI/FetchX509Bundles": b"",
    "/SpiffeWorkloadAPI/FetchJWTBundles": b"",
    "/SpiffeWorkloadAPI/FetchJWTSVID": pb.JWTSVIDRequest(audience=["a"]).SerializeToString(),
    "/SpiffeWorkloadAPI/ValidateJWTSVID": b"",
    "/spiffe_issuer.v1.WhoAmI/Get": b"",
    "/grpc.health.v1.Health/Check": b"",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": b"",
    "/no.such.Service/Method": b"",
    f"{SERVICE}/NoSuchMethod": b"",
    f"{SERVICE}/streamsecrets": b"",
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources": b"",
}
NONE, RIGHT = (), METADATA
WRONG = {
    "twice": ((KEY, "true"), (KEY, "true")),
    "True": ((KEY, "True"),),
    "empty": ((KEY, ""),),
    "false": ((KEY, "false"),),
    "true and false": ((KEY, "true"), (KEY, "false")),
}
AGENTS = {
    "default": {},
    "both": {"on_workload_socket": True},
    "waived": {"on_workload_socket": True, "unsafe_without_header": True},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents() -> AsyncIterator[dict[str, AgentProcess]]:
    """An agent for each way in which SDS can be served; this process has an identity in all."""
    async with a_server() as server, contextlib.AsyncExitStack() as stack:
        running = {}
        for name, settings in AGENTS.items():
            folder = stack.enter_context(a_folder())
            agent = running[name] = AgentProcess(folder, server, {"sds": settings})
            stack.callback(agent.process.close)
            await agent.join()
            await server.add_entry("/web", agent.agent_id, f"unix:uid:{os.geteuid()}")
        for agent in running.values():
            await agent.until_svids(1)
        yield running


async def said(channel: Any, method: str, request: bytes, metadata: Any) -> str:
    """How a call ends: answered, no header, or the name of its code."""
    call = channel.unary_stream(method)(request, metadata=metadata, timeout=10)
    with contextlib.suppress(grpc.aio.AioRpcError):
        if await call.read() is not grpc.aio.EOF:
            call.cancel()
            return "answered"
    code, text = await call.code(), str(await call.details())
    if code is Code.INVALID_ARGUMENT and text.startswith("security header missing"):
        return "no header"
    return "answered" if code is Code.OK else code.name


async def all_said(socket: Any, methods: dict[str, bytes], metadata: Any) -> dict[str, str]:
    """How a call of each method ends."""
    async with channel_to(socket) as channel:
        return {
            method: await said(channel, method, request, metadata)
            for method, request in methods.items()
        }


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("agent", AGENTS)
async def test_sec_38_its_own_socket(agents: dict[str, AgentProcess], agent: str) -> None:
    """SEC-38: on its own socket SDS asks for no header, and nothing else is there at all."""
    socket = agents[agent].sds_socket
    for metadata in (NONE, RIGHT, (("x-forwarded-for", "10.0.0.1"),)):
        assert set((await all_said(socket, SDS_METHODS, metadata)).values()) == {"answered"}
    assert set((await all_said(socket, OTHERS, NONE)).values()) == {"no header"}
    assert set((await all_said(socket, OTHERS, RIGHT)).values()) == {"UNIMPLEMENTED"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("agent", "silent", "right"),
    [
        ("default", "no header", "UNIMPLEMENTED"),
        ("both", "no header", "answered"),
        ("waived", "answered", "answered"),
    ],
)
async def test_sec_38_sds_on_the_workload_socket(
    agents: dict[str, AgentProcess], agent: str, silent: str, right: str
) -> None:
    """SEC-38, SDS-02: only by setting, and with the header unless an unsafe one waives it."""
    socket = agents[agent].workload_socket
    assert set((await all_said(socket, SDS_METHODS, NONE)).values()) == {silent}
    assert set((await all_said(socket, SDS_METHODS, RIGHT)).values()) == {right}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("agent", AGENTS)
async def test_sec_38_the_rest_of_the_workload_socket(
    agents: dict[str, AgentProcess], agent: str
) -> None:
    """SEC-38, WEP-08: however SDS is served, every other method demands the header as ever."""
    socket = agents[agent].workload_socket
    assert set((await all_said(socket, OTHERS, NONE)).values()) == {"no header"}
    assert "no header" not in (await all_said(socket, OTHERS, RIGHT)).values()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("header", WRONG)
@pytest.mark.parametrize("agent", AGENTS)
async def test_sec_38_a_header_that_is_wrong(
    agents: dict[str, AgentProcess], agent: str, header: str
) -> None:
    """SEC-38: repeated or otherwise wrong it is refused everywhere, where it is waived, too."""
    for socket in (agents[agent].sds_socket, agents[agent].workload_socket):
        found = await all_said(socket, {**SDS_METHODS, **OTHERS}, WRONG[header])
        assert set(found.values()) == {"no header"}


@pytest.mark.asyncio(loop_scope="module")
async def test_sec_38_each_start_warns(agents: dict[str, AgentProcess]) -> None:
    """SEC-38: an agent whose setting waives the header says so when it starts; others don't."""
    warned = {
        name: [one["setting"] for one in agent.process.events()
               if one["event"] == "unsafe_setting"]
        for name, agent in agents.items()
    }  # fmt: skip
    assert warned == {"default": [], "both": [], "waived": ["sds.unsafe_without_header"]}


@pytest.mark.asyncio(loop_scope="module")
async def test_sec_38_there_is_no_tcp(agents: dict[str, AgentProcess]) -> None:
    """SEC-38: SDS is on Unix sockets alone: an agent that serves it has no TCP port."""
    for agent in agents.values():
        listening = await asyncio.to_thread(tcp_ports, agent.process.pid)
        assert listening == []


def tcp_ports(pid: int) -> list[str]:
    """The lines of /proc/net/tcp that are listening sockets of a process."""
    inodes = set(open_sockets(pid))
    lines = []
    for family in ("tcp", "tcp6"):
        with open(f"/proc/net/{family}") as table:
            lines += [line.split() for line in list(table)[1:]]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


def open_sockets(pid: int) -> list[str]:
    """The inodes of a process's sockets."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.append(target[8:-1])
    return found


# SEC-85: names


async def test_sec_85_a_domain_that_another_federates_with() -> None:
    """SEC-85, SDS-07: roots that the agent holds for another's entry are not there for us."""
    theirs = replace(STRANGER, federates_with=frozenset({PARTNER.trust_domain}))
    async with an_sds() as sds:
        sds.endpoint.cache.apply(snapshot=False, bundles=[PARTNER.bundle])
        sds.endpoint.put(WEB, theirs)
        assert set((await sds.talk().get("ALL")).roots("ALL")) == {"example.org"}
        held = [sds.talk() for _ in range(2)]
        for conversation, name in zip(
            held, ("spiffe://partner.test", "spiffe://nobody.test"), strict=True
        ):
            await conversation.ask(name)
            assert await conversation.is_quiet()
        sds.endpoint.put(replace(theirs, revision_number=1))  # nor do changes of it tell
        for conversation in held:
            assert await conversation.is_quiet()


async def test_sec_85_the_refusals_are_alike() -> None:
    """SEC-85: under SPIRE's setting, too, another's name and nobody's end in the same way."""
    async with an_sds(refuse_unknown_names=True) as sds:
        sds.endpoint.put(WEB, STRANGER)
        endings = []
        for name in ("spiffe://example.org/stranger", "spiffe://example.org/nobody---"):
            conversation = sds.talk()
            await conversation.ask(name)
            code, text = await conversation.ending()
            endings.append((code, text.replace(name, "NAME")))
        ((code, text),) = set(endings)
        assert code is Code.INVALID_ARGUMENT
        assert text.startswith("this process may not have 'NAME'; the operator can ask why")


async def test_sec_91_what_was_asked_for_is_quoted_legibly() -> None:
    """SEC-91: a refusal quotes three names at most, cut, controls escaped."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        names = [f"{one}\x1b[31m" + "n" * 1000 for one in range(7)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sds.stub.FetchSecrets(a_request(*names))
        text = caught.value.details() or ""
        assert " and 4 more; " in text
        assert len(text) < 800
        assert text.isprintable()


# SEC-80, SEC-81, SEC-83: limits


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(
            a_request(*(f"spiffe://example.org/{n}" for n in range(1000))),
            Code.INVALID_ARGUMENT, id="a thousand names",
        ),
        pytest.param(a_request("n" * 5000), Code.INVALID_ARGUMENT, id="a long name"),
        pytest.param(
            a_request("default", version_info="v" * MAX_REQUEST_BYTES),
            Code.RESOURCE_EXHAUSTED, id="a long request",
        ),
    ],
)  # fmt: skip
async def test_sec_80_what_is_too_much(request_: Any, code: grpc.StatusCode) -> None:
    """SEC-80: too many names, long ones, and a long request are refused on both calls."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.call.write(request_)
        assert (await conversation.ending())[0] is code
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sds.stub.FetchSecrets(request_)
        assert caught.value.code() is code


async def test_sec_80_what_is_not_a_request() -> None:
    """SEC-80: bytes that are no request end the stream with InvalidArgument, and it alone."""
    async with an_sds() as sds, channel_to(sds.socket) as channel:
        sds.endpoint.put(WEB)
        other = talk(sds.stub)
        await other.get("default")
        call = channel.stream_stream(f"{SERVICE}/StreamSecrets")()
        await call.write(b"\xff\xff")
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert await call.read() is grpc.aio.EOF
        assert await call.code() is Code.INVALID_ARGUMENT
        sds.endpoint.renew(WEB)
        assert await other.read(1)


async def test_envoys_long_node_is_taken_and_not_kept() -> None:
    """SEC-80: 61 KB of itself in each request of an Envoy cost an open stream nothing."""
    big = NODE.__class__.FromString(NODE.SerializeToString())
    big.metadata.update({"extensions": "x" * 500_000})
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversations = [sds.talk() for _ in range(20)]
        await sds.talk().get("default", node=big)  # what is loaded when it is first used
        tracemalloc.start()
        try:
            for conversation in conversations:
                await conversation.ask("default", node=big)
                await conversation.read()
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 20 * 500_000 / 4


async def test_sec_81_only_so_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-80, SEC-81: without an identity a user's streams are held up to a number."""
    monkeypatch.setattr(stream, "HELD_PER_UID", 3)
    async with an_sds() as sds:
        held = [sds.talk() for _ in range(3)]
        for conversation in held:
            await conversation.ask("default")
            assert await conversation.is_quiet(0.05)
        late = sds.talk()
        assert await late.ending() == (
            Code.RESOURCE_EXHAUSTED,
            "too many streams without an identity of this user: 3 are open",
        )
        sds.endpoint.put(WEB)
        for conversation in held:
            assert await conversation.read(1)
        more = []
        for _ in range(5):  # and with one there is no such number
            more.append(sds.talk())
            assert await more[-1].get("default")


async def test_sec_83_a_slow_reader_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """SEC-83: an Envoy that reads nothing while something waits for it is cut, and it alone."""
    roots = tuple(FakeCa(which=f"big {n}").authority for n in range(60))
    narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 * 1024))
    stall = timedelta(milliseconds=300)
    async with an_sds(stall=stall) as sds, sds_at(sds.socket, *narrow) as stub:
        big = Bundle(sds.endpoint.ca.trust_domain, roots)
        sds.endpoint.cache.apply(snapshot=False, bundles=[big])
        sds.endpoint.put(WEB)
        slow, quick = talk(stub), sds.talk()
        await slow.ask("default", "ROOTCA")
        await quick.get("default", "ROOTCA")
        for _ in range(20):
            sds.endpoint.renew(WEB)
            await quick.read(1)
            await quick.ack()
        async with asyncio.timeout(5):
            assert await slow.call.code() is not Code.OK
        assert "slow_reader" in caplog.messages
        sds.endpoint.renew(WEB)
        assert await quick.read(1)


async def test_sec_83_who_comes_back_late_gets_the_newest() -> None:
    """SEC-83: who reads slowly finds the newest SVID, not every one that he missed."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.ask("default")
        for _ in range(100):
            sds.endpoint.renew(WEB)
        newest = sds.endpoint.cache.svids["web"].chain
        assert (await conversation.read(1)).svid("default").chain == newest
        assert await conversation.is_quiet()


async def test_sds_08_a_storm_of_refusals(caplog: pytest.LogCaptureFixture) -> None:
    """SDS-08, SEC-80: a thousand refusals of one answer are one line and no answer."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.get("default")
        sds.endpoint.renew(WEB)
        await conversation.read(1)
        attested = sds.endpoint.told.calls
        for number in range(1000):
            await conversation.nack(f"reason {number}")
        assert await conversation.is_quiet()
        assert sds.endpoint.told.calls == attested
        assert caplog.messages.count("sds_refused_by_envoy") == 1
        assert refusals(sds) == 1
        sds.endpoint.renew(WEB)
        assert await conversation.read(1)


async def test_sds_08_one_that_refuses_everything(caplog: pytest.LogCaptureFixture) -> None:
    """SDS-08, SEC-80: one that refuses all it is sent is counted, and floods no log."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.ask("default")
        for _ in range(3 * stream.LINES_PER_SECOND):
            await conversation.read(1)
            before = refusals(sds)
            await conversation.nack("no")
            while refusals(sds) == before:
                await asyncio.sleep(0.001)
            sds.endpoint.renew(WEB)
        await conversation.read(1)
        lines = caplog.messages.count("sds_refused_by_envoy")
        assert refusals(sds) == 3 * stream.LINES_PER_SECOND
        assert 0 < lines < refusals(sds)


def refusals(sds: Sds) -> float:
    """The counter."""
    text = sds.servicer.metrics.registry.text().decode()
    (line,) = [one for one in text.splitlines() if one.startswith("agent_sds_refusals_total ")]
    return float(line.split()[1])


# SEC-36: the process


async def test_sec_36_a_process_that_became_another() -> None:
    """SEC-36: one that matches another entry by now is not sent the old one's SVID."""
    async with an_sds() as sds:
        sds.endpoint.put(WEB)
        conversation = sds.talk()
        await conversation.get("default")
        sds.endpoint.told.selectors = STRANGER.selectors
        sds.endpoint.renew(WEB)
        assert await conversation.is_quiet()
        assert [one.state for one in sds.state()] == ["awaited"]
        sds.endpoint.put(STRANGER)
        assert (await conversation.read(1)).svid("default").spiffe_id == STRANGER.spiffe_id


async def test_sec_36_noticed_by_the_clock() -> None:
    """SEC-36: attested anew at its interval, with no change that would wake the stream."""
    endpoint = {"reattest_interval": timedelta(milliseconds=50)}
    async with an_sds(endpoint=endpoint) as sds:
        sds.endpoint.put(WEB, STRANGER)
        conversation = sds.talk()
        await conversation.get("default")
        sds.endpoint.told.selectors = STRANGER.selectors
        assert (await conversation.read(1)).svid("default").spiffe_id == STRANGER.spiffe_id
        await conversation.ack()
        assert await conversation.is_quiet()


async def test_sec_36_a_held_stream_is_attested_anew() -> None:
    """SEC-36: one that matched nothing at first is answered when it is what an entry names."""
    endpoint = {"reattest_interval": timedelta(milliseconds=50)}
    async with an_sds(endpoint=endpoint) as sds:
        sds.endpoint.put(STRANGER)
        conversation = sds.talk()
        await conversation.ask("default")
        assert await conversation.is_quiet()
        sds.endpoint.told.selectors = STRANGER.selectors
        assert await conversation.read(1)


CALLER = """
import os, sys
sys.path[:0] = sys.argv[2:]
import grpc
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2 as pb
channel = grpc.insecure_channel("unix:" + sys.argv[1])
call = channel.stream_stream(
    "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
    request_serializer=pb.DiscoveryRequest.SerializeToString,
)
def ask():
    yield pb.DiscoveryRequest(resource_names=["default"])
    sys.stdin.readline()
    os._exit(0)
answers = call(ask())
next(answers)
print("answered")
next(answers)
"""


async def test_sec_36_a_process_that_ends() -> None:
    """SEC-36: with its process a stream ends, and nothing of it stays open."""
    me = replace(WEB, selectors=some(f"unix:uid:{os.geteuid()}"))
    async with an_sds(endpoint={"attestors": [UnixAttestor()]}) as sds:
        sds.endpoint.put(me)
        paths = [str(ROOT), *(one for one in sys.path if one)]
        before = open_files()
        with a_python(CALLER, str(sds.socket), *paths) as child:
            assert await asyncio.to_thread(child.hear) == "answered"
            assert len(sds.servicer.exchanges) == 1
            child.say("end")
            async with asyncio.timeout(5):
                while len(sds.servicer.exchanges):
                    await asyncio.sleep(0.005)
        async with asyncio.timeout(5):
            while open_files() > before:
                await asyncio.sleep(0.005)
        assert sds.endpoint.cache.streams == 0
