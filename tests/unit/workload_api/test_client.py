"""The client library, against a Workload API on a real socket that says what a test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from spiffe_core.bundle_document import jwks_of
from spiffe_core.errors import (
    ErrorKind,
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    PreconditionError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.endpoint import EndpointError
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import whoami_pb2, whoami_pb2_grpc
from tests.support.authorities import a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.children import open_files
from tests.support.stack import a_folder
from tests.support.tokens import a_token
from workload_api.client import client as library
from workload_api.client.client import WorkloadClient

CA, PARTNER = FakeCa(), FakeCa("partner.test")
KEY = pkcs8_of(a_key("p256", "workload"))
A_JWT = pb.JWTSVID(spiffe_id="spiffe://example.org/w", svid=a_token())


def an_svid(path: str = "/web", hint: str = "", **changes: Any) -> Any:
    """One X509-SVID of a message."""
    made = {
        "spiffe_id": f"spiffe://example.org{path}",
        "x509_svid": b"".join(CA.chain(CA.leaf(path))),
        "x509_svid_key": KEY,
        "bundle": CA.authority.der,
        "hint": hint,
    }
    return pb.X509SVID(**{**made, **changes})


def x509(*svids: Any, **federated: bytes) -> Any:
    """One message of FetchX509SVID."""
    return pb.X509SVIDResponse(
        svids=svids or [an_svid()],
        federated_bundles={f"spiffe://{name}.test": der for name, der in federated.items()},
    )


@dataclass
class FakeAgent(workloadapi_pb2_grpc.SpiffeWorkloadAPIServicer, whoami_pb2_grpc.WhoAmIServicer):
    """Answers what it is told to, and remembers the metadata of every call."""

    messages: list[Any] = field(default_factory=lambda: [x509()])
    ends: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    jwt: Any = None
    x509_bundles: Any = None
    jwt_bundles: Any = None
    validated: Any = None
    metadata: list[dict[str, Any]] = field(default_factory=list)
    open: int = 0

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._stream(context, self.messages):
            yield message

    async def FetchX509Bundles(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._stream(context, self.x509_bundles):
            yield message

    async def FetchJWTBundles(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._stream(context, self.jwt_bundles):
            yield message

    async def FetchJWTSVID(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self.jwt)

    async def ValidateJWTSVID(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self.validated)

    async def Get(self, request: Any, context: Any) -> Any:
        return await self._answer(context, whoami_pb2.WhoAmIResponse(pid=7))

    async def _answer(self, context: Any, answer: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        if isinstance(answer, grpc.StatusCode):
            await context.abort(answer, "as told")
        return answer

    async def _stream(self, context: Any, messages: Any) -> AsyncIterator[Any]:
        self.metadata.append(dict(context.invocation_metadata()))
        self.open += 1
        try:
            for message in messages:
                yield message
            if self.ends is not None:
                await context.abort(self.ends, "as told")
        finally:
            self.open -= 1


@asynccontextmanager
async def an_agent(**changes: Any) -> AsyncIterator[tuple[FakeAgent, str]]:
    """A fake agent, and its address."""
    agent = FakeAgent(**changes)
    with a_folder() as folder:
        server = grpc.aio.server()
        workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(agent, server)
        whoami_pb2_grpc.add_WhoAmIServicer_to_server(agent, server)
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        try:
            yield agent, f"unix://{folder}/s"
        finally:
            await server.stop(0)


# Where to


async def test_wep_11_an_explicit_address_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEP-11: the address that is given, or else that of the environment."""
    async with an_agent() as (_, address), an_agent(ends=None, messages=[]) as (_, other):
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", other)
        async with WorkloadClient(address) as client:
            assert await client.fetch_x509()
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", address)
        async with WorkloadClient() as client:
            assert await client.fetch_x509()


@pytest.mark.parametrize("value", [None, ""])
def test_wep_11_no_address(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """WEP-11: with neither it says what to set."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", value)
    with pytest.raises(PreconditionError, match="set SPIFFE_ENDPOINT_SOCKET=unix:///"):
        WorkloadClient()


@pytest.mark.parametrize("address", ["/run/a.sock", "http://x", "unix:run/a", "unix://run/a"])
def test_wep_12_no_such_address(address: str) -> None:
    """WEP-12, WEP-13: what is no Workload Endpoint address is refused, and not dialled."""
    with pytest.raises(EndpointError):
        WorkloadClient(address)


async def test_wep_14_tcp() -> None:
    """WEP-14: an IP address and a port are dialled too."""
    agent = FakeAgent()
    server = grpc.aio.server()
    workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(agent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with WorkloadClient(f"tcp://127.0.0.1:{port}") as client:
        assert await client.fetch_x509()
    await server.stop(0)


async def test_wep_07_the_header_is_on_every_call() -> None:
    """WEP-07, WEP-26: each call carries the header; none needs reflection."""
    bundles = [pb.X509BundlesResponse(bundles={"spiffe://example.org": CA.authority.der})]
    keys = [pb.JWTBundlesResponse(bundles={"spiffe://example.org": jwks_of(CA.bundle)})]
    async with an_agent(
        x509_bundles=bundles, jwt_bundles=keys,
        jwt=pb.JWTSVIDResponse(svids=[A_JWT]),
        validated=pb.ValidateJWTSVIDResponse(spiffe_id="spiffe://example.org/w"),
    ) as (agent, address):  # fmt: skip
        async with WorkloadClient(address) as client:
            await client.fetch_x509()
            await client.fetch_jwt(("db",))
            await client.fetch_bundles()
            await client.validate_jwt("x", "db")
            assert (await client.who_am_i()).pid == 7
            async for _ in client.watch_x509():
                break
    assert len(agent.metadata) == 7
    assert all(one["workload.spiffe.io"] == "true" for one in agent.metadata)


# X.509


async def test_an_x509_context() -> None:
    """WAPI-56, WAPI-21: identities in their order, each domain's bundle under its own name."""
    message = x509(an_svid(), an_svid("/api", "external"), partner=PARTNER.authority.der)
    async with an_agent(messages=[message]) as (_, address):
        async with WorkloadClient(address) as client:
            context = await client.fetch_x509()
    assert [(one.svid.spiffe_id.path, one.hint) for one in context.identities] == [
        ("/web", ""), ("/api", "external"),
    ]  # fmt: skip
    assert context.identities[0].key == KEY
    assert {name.name for name in context.bundles} == {"example.org", "partner.test"}
    assert context.bundles[PARTNER.trust_domain].x509_authorities == (PARTNER.authority,)


async def test_wapi_12_each_message_stands_alone() -> None:
    """WAPI-06, WAPI-12, WAPI-13, WAPI-28, WAPI-31: what a message does not hold is gone."""
    first = x509(an_svid(), an_svid("/api"), partner=PARTNER.authority.der)
    denied = grpc.StatusCode.PERMISSION_DENIED
    async with an_agent(messages=[first, x509()], ends=denied) as (agent, address):
        async with WorkloadClient(address) as client:
            contexts = []
            with pytest.raises(ForbiddenError):
                async for context in client.watch_x509():
                    contexts.append(context)
        assert len(agent.metadata) == 1  # one stream, kept open
    assert [len(one.identities) for one in contexts] == [2, 1]
    assert [len(one.bundles) for one in contexts] == [2, 1]


async def test_wapi_26_the_first_of_a_hint_counts() -> None:
    """WAPI-26, WAPI-58: of two SVIDs with one hint the first; without a hint each is kept."""
    message = x509(an_svid("/a", "x"), an_svid("/b", "x"), an_svid("/c"), an_svid("/d"))
    async with an_agent(messages=[message]) as (_, address):
        async with WorkloadClient(address) as client:
            context = await client.fetch_x509()
    assert [one.svid.spiffe_id.path for one in context.identities] == ["/a", "/c", "/d"]


BROKEN = {
    "no svid": pb.X509SVIDResponse(),
    "no certificate": x509(an_svid(x509_svid=b"")),
    "PEM": x509(an_svid(x509_svid=b"-----BEGIN CERTIFICATE-----")),
    "no bundle": x509(an_svid(bundle=b"")),
    "a broken bundle": x509(an_svid(bundle=b"0\x82")),
    "no key": x509(an_svid(x509_svid_key=b"")),
    "another ID": x509(an_svid(spiffe_id="spiffe://example.org/other")),
    "a CA": x509(an_svid(x509_svid=CA.cert.der)),
    "an empty federated bundle": x509(an_svid(), partner=b""),
    "a federated name that is none": pb.X509SVIDResponse(
        svids=[an_svid()], federated_bundles={"partner.test": PARTNER.authority.der}
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_wapi_15_a_message_that_is_not_whole(broken: str) -> None:
    """WAPI-15: a message that breaks a rule is reported, and nothing of it is used."""
    async with an_agent(messages=[BROKEN[broken]]) as (_, address):
        async with WorkloadClient(address) as client:
            with pytest.raises(InternalError):
                await client.fetch_x509()


# JWT


async def test_jwt_svids() -> None:
    """WAPI-32, WAPI-33: the tokens, parsed; and an empty answer is none."""
    answer = pb.JWTSVIDResponse(svids=[A_JWT])
    async with an_agent(jwt=answer) as (agent, address):
        async with WorkloadClient(address) as client:
            (svid,) = await client.fetch_jwt(("db",), SpiffeId.parse("spiffe://example.org/w"))
            assert svid.spiffe_id.uri == "spiffe://example.org/w" and svid.audience == ("db",)
            for wrong in (pb.JWTSVIDResponse(), pb.JWTSVIDResponse(svids=[{"svid": "x"}])):
                agent.jwt = wrong
                with pytest.raises(InternalError):
                    await client.fetch_jwt(("db",))


async def test_validation() -> None:
    """WAPI-59: the agent's word on a token, and its refusal, are told apart."""
    answer = pb.ValidateJWTSVIDResponse(spiffe_id="spiffe://example.org/w")
    answer.claims.update({"sub": "spiffe://example.org/w", "aud": ["db"]})
    async with an_agent(validated=answer) as (agent, address):
        async with WorkloadClient(address) as client:
            who, claims = await client.validate_jwt("x", "db")
            assert who.path == "/w" and claims["aud"] == ["db"]
            agent.validated = grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(MalformedError):
                await client.validate_jwt("x", "db")
            agent.validated = pb.ValidateJWTSVIDResponse(spiffe_id="no ID")
            with pytest.raises(InternalError):
                await client.validate_jwt("x", "db")


async def test_bundles() -> None:
    """WAPI-16, WAPI-22, WAPI-38: each domain's X.509 and JWT authorities, each in its place."""
    x509_bundles = pb.X509BundlesResponse(bundles={"spiffe://example.org": CA.authority.der})
    keys = {f"spiffe://{one.trust_domain}": jwks_of(one.bundle) for one in (CA, PARTNER)}
    jwt_bundles = pb.JWTBundlesResponse(bundles=keys)
    async with an_agent(x509_bundles=[x509_bundles], jwt_bundles=[jwt_bundles]) as (_, address):
        async with WorkloadClient(address) as client:
            bundles = await client.fetch_bundles()
    assert bundles[CA.trust_domain].x509_authorities == (CA.authority,)
    assert bundles[CA.trust_domain].jwt_authority("k1")
    assert not bundles[PARTNER.trust_domain].x509_authorities
    assert bundles[PARTNER.trust_domain].jwt_authority("k1")


async def test_broken_bundles() -> None:
    """WAPI-15: bundles that cannot be read are the agent's fault, and reported."""
    good = pb.JWTBundlesResponse(bundles={"spiffe://example.org": jwks_of(CA.bundle)})
    for x509_bundles, jwt_bundles in (
        ([pb.X509BundlesResponse(bundles={"example.org": CA.authority.der})], [good]),
        ([pb.X509BundlesResponse(bundles={"spiffe://example.org": b""})], [good]),
        (
            [pb.X509BundlesResponse()],
            [pb.JWTBundlesResponse(bundles={"spiffe://a.test": b"x"})],
        ),
    ):
        async with an_agent(x509_bundles=x509_bundles, jwt_bundles=jwt_bundles) as (_, address):
            async with WorkloadClient(address) as client:
                with pytest.raises(InternalError):
                    await client.fetch_bundles()


# How it ends


CODES = [
    (grpc.StatusCode.PERMISSION_DENIED, ForbiddenError),
    (grpc.StatusCode.INVALID_ARGUMENT, MalformedError),
    (grpc.StatusCode.UNAVAILABLE, NotReadyError),
    (grpc.StatusCode.UNIMPLEMENTED, UnsupportedError),
    (grpc.StatusCode.INTERNAL, InternalError),
    (grpc.StatusCode.UNKNOWN, InternalError),
    (grpc.StatusCode.DATA_LOSS, InternalError),
]


@pytest.mark.parametrize(("code", "error"), CODES)
async def test_wep_18_errors_are_typed(code: Any, error: type[SpiffeError]) -> None:
    """WEP-18, WEP-20, WEP-22, WEP-23: each code is an error of its own; no call is repeated."""
    async with an_agent(
        messages=[], ends=code, jwt=code, validated=code, x509_bundles=[], jwt_bundles=[]
    ) as (agent, address):
        async with WorkloadClient(address) as client:
            for call in (
                lambda: client.fetch_x509(),
                lambda: client.fetch_jwt(("db",)),
                lambda: client.validate_jwt("x", "db"),
                lambda: client.fetch_bundles(),
            ):
                with pytest.raises(error, match="as told") as caught:
                    await call()
                assert type(caught.value) is error
        assert len(agent.metadata) == 4


async def test_a_stream_that_ends_without_an_answer() -> None:
    """IOP-10: an agent that ends a stream with OK has not answered."""
    async with an_agent(messages=[], ends=None, x509_bundles=[], jwt_bundles=[]) as (
        _,
        address,
    ):
        async with WorkloadClient(address) as client:
            for call in (client.fetch_x509, client.fetch_bundles):
                with pytest.raises(InternalError, match="without an answer"):
                    await call()


async def test_nobody_there() -> None:
    """WEP-20: an agent that is not there: try again, in a kind that says so."""
    async with WorkloadClient("unix:///tmp/si-nobody/s") as client:
        for call in (client.fetch_x509, client.fetch_bundles, lambda: client.fetch_jwt(("a",))):
            with pytest.raises(SpiffeError) as caught:
                await call()
            assert caught.value.kind is ErrorKind.NOT_READY


async def test_an_agent_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that asks once comes back after its limit; a watch has none."""
    monkeypatch.setattr(library, "TIMEOUT", 0.1)

    class Silent(FakeAgent):
        async def _stream(self, context: Any, messages: Any) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

    agent = Silent()
    with a_folder() as folder:
        server = grpc.aio.server()
        workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(agent, server)
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        async with WorkloadClient(f"unix://{folder}/s") as client:
            for call in (client.fetch_x509, client.fetch_bundles):
                with pytest.raises(SpiffeError) as caught:
                    await call()
                assert caught.value.kind is ErrorKind.DEADLINE
        await server.stop(0)


async def test_nothing_is_left_open() -> None:
    """Streams end with the call that asked, or with the loop that watched; no file is left."""
    async with an_agent(messages=[x509()] * 3, ends=None) as (agent, address):
        async with WorkloadClient(address) as client:
            await client.fetch_x509()
        before = open_files()
        for _ in range(10):
            async with WorkloadClient(address) as client:
                await client.fetch_x509()
                watching = client.watch_x509()
                await anext(watching)
                await watching.aclose()
        async with asyncio.timeout(5):
            while agent.open or open_files() > before:  # grpcio closes in a thread of its own
                await asyncio.sleep(0.01)


def test_keys_are_in_no_repr() -> None:
    """SEC-90: the text of what a client gets holds no private key."""
    identity = library.X509Identity(None, KEY)  # type: ignore[arg-type]
    assert repr(KEY)[2:20] not in repr(identity)
