"""The fake Workload API that is shipped: it says what a good agent says, or what it is told."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import ExhaustedError, MalformedError, PreconditionError
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.spiffeid import SpiffeIdError, TrustDomain
from spiffe_core.x509svid import X509SvidError, verify_x509_svid
from spiffe_wire.endpoint import EndpointError
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.callers import eventually
from tests.support.children import open_files
from tests.support.stack import ROOT
from workload_api.client.client import WorkloadClient
from workload_api.client.testing import FakeAuthority, FakeIdentity, FakeWorkloadApi
from workload_api.client.x509source import X509Source

Code = grpc.StatusCode
OWN = TrustDomain("example.org")
REQUESTS = {
    "FetchX509SVID": pb.X509SVIDRequest(),
    "FetchX509Bundles": pb.X509BundlesRequest(),
    "FetchJWTSVID": pb.JWTSVIDRequest(audience=["db"]),
    "FetchJWTBundles": pb.JWTBundlesRequest(),
    "ValidateJWTSVID": pb.ValidateJWTSVIDRequest(audience="db", svid="x"),
    "FetchWITSVID": pb.WITSVIDRequest(),
    "FetchWITBundles": pb.WITBundlesRequest(),
}


def now() -> datetime:
    """The present instant."""
    return datetime.now(UTC)


@pytest.fixture
def fake() -> Iterator[FakeWorkloadApi]:
    """A fake with two identities and a partner."""
    identities = ("/web", FakeIdentity("/api", "external", timedelta(minutes=1)))
    with FakeWorkloadApi(*identities, federated=["partner.test"]) as made:
        yield made


@pytest.fixture
def stub(fake: FakeWorkloadApi) -> Iterator[Any]:
    """The Workload API over blocking gRPC, as a client that knows nothing of ours uses it."""
    with grpc.insecure_channel(f"unix:{fake.socket}") as channel:
        yield workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


def asked(stub: Any, method: str, metadata: Any = METADATA, request: Any = None) -> Any:
    """The answer of a call, or the first one of a stream."""
    call = getattr(stub, method)(request or REQUESTS[method], metadata=metadata, timeout=5)
    if not hasattr(call, "__next__"):
        return call
    try:
        return next(call)
    finally:
        call.cancel()


def code_of(stub: Any, method: str, metadata: Any = METADATA, request: Any = None) -> Code:
    """How a call ends."""
    try:
        asked(stub, method, metadata, request)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined]  # a call is an error too
    return Code.OK


# What it says


def test_its_svids_are_good(fake: FakeWorkloadApi) -> None:
    """What it signs is verified by the bundles that it gives out, for as long as it says."""
    assert [one.svid.spiffe_id.path for one in fake.identities] == ["/web", "/api"]
    assert [one.hint for one in fake.identities] == ["", "external"]
    for one, life in zip(fake.identities, (60, 1), strict=True):
        verify_x509_svid(one.svid.chain, fake.bundles, at=now())
        left = one.svid.validity.not_after - now()
        assert timedelta(minutes=life, seconds=-5) < left <= timedelta(minutes=life)
    token = fake.mint_jwt("/web", "db", "cache").token
    svid = verify_jwt_svid(token, fake.bundles, audience="cache", at=now())
    assert svid.audience == ("db", "cache") and svid.spiffe_id.path == "/web"


def test_an_intermediate() -> None:
    """With an intermediate a chain has two certificates; its root is in the bundle alone."""
    authority = FakeAuthority(intermediate=True)
    svid = authority.mint_x509("/w").svid
    assert len(svid.chain) == 2
    verify_x509_svid(svid.chain, BundleSet.of([authority.bundle]), at=now())
    with pytest.raises(X509SvidError):
        verify_x509_svid(svid.chain[:1], BundleSet.of([authority.bundle]), at=now())


def test_what_is_minted_wrong_on_demand(fake: FakeWorkloadApi) -> None:
    """Expired ones, and those of a stranger that claims the domain, are refused."""
    stranger = FakeAuthority("example.org")
    for identity in (fake.mint_x509("/web", expired=True), stranger.mint_x509("/web")):
        with pytest.raises(X509SvidError):
            verify_x509_svid(identity.svid.chain, fake.bundles, at=now())
    for token in (fake.mint_jwt("/web", "db", expired=True), stranger.mint_jwt("/web", "db")):
        with pytest.raises(MalformedError):
            verify_jwt_svid(token.token, fake.bundles, audience="db", at=now())
    expired = fake.mint_x509("/web", expired=True).svid
    verify_x509_svid(expired.chain, fake.bundles, at=expired.validity.not_after)


def test_material(fake: FakeWorkloadApi) -> None:
    """A peer that never changes has its SVID, our bundles, and nobody to tell."""
    peer = fake.material("/peer", expired=True)
    assert peer.identity.svid.spiffe_id.path == "/peer" and peer.bundles == fake.bundles
    peer.on_change(lambda: None)()


def test_over_the_wire(fake: FakeWorkloadApi, stub: Any) -> None:
    """Every method answers with what it holds; nothing in it is empty."""
    x509 = asked(stub, "FetchX509SVID")
    assert [one.spiffe_id for one in x509.svids] == [
        one.svid.spiffe_id.uri for one in fake.identities
    ]
    assert set(x509.federated_bundles) == {"spiffe://partner.test"}
    for method in ("FetchX509Bundles", "FetchJWTBundles"):
        bundles = asked(stub, method).bundles
        assert set(bundles) == {"spiffe://example.org", "spiffe://partner.test"}
    jwt = asked(stub, "FetchJWTSVID")
    assert [(one.spiffe_id, one.hint) for one in jwt.svids] == [
        ("spiffe://example.org/web", ""), ("spiffe://example.org/api", "external"),
    ]  # fmt: skip
    request = pb.ValidateJWTSVIDRequest(audience="db", svid=jwt.svids[0].svid)
    answer = asked(stub, "ValidateJWTSVID", request=request)
    assert answer.spiffe_id == "spiffe://example.org/web"
    assert list(answer.claims["aud"]) == ["db"] and answer.claims["exp"] > 0
    assert fake.calls == dict.fromkeys(
        ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "FetchJWTSVID",
         "ValidateJWTSVID"), 1,
    )  # fmt: skip


# How it refuses


WRONG = {
    "none": (),
    "another value": (("workload.spiffe.io", "True"),),
    "empty": (("workload.spiffe.io", ""),),
    "two": (*METADATA, *METADATA),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", REQUESTS)
def test_without_the_security_header(stub: Any, method: str, wrong: str) -> None:
    """Without exactly that header each method, known or not, is refused as an agent does."""
    assert code_of(stub, method, WRONG[wrong]) is Code.INVALID_ARGUMENT


def test_unknown_methods(fake: FakeWorkloadApi) -> None:
    """A method that is not there is Unimplemented with the header, and refused without."""
    with grpc.insecure_channel(f"unix:{fake.socket}") as channel:
        call = channel.unary_unary("/SpiffeWorkloadAPI/Nothing")
        for metadata, code in ((METADATA, Code.UNIMPLEMENTED), ((), Code.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", metadata=metadata, timeout=5)
            assert caught.value.code() is code  # type: ignore[attr-defined]


REFUSED = [
    ("FetchJWTSVID", pb.JWTSVIDRequest(), Code.INVALID_ARGUMENT),
    ("FetchJWTSVID", pb.JWTSVIDRequest(audience=["db", ""]), Code.INVALID_ARGUMENT),
    ("FetchJWTSVID", pb.JWTSVIDRequest(audience=["a"], spiffe_id="x"), Code.INVALID_ARGUMENT),
    (
        "FetchJWTSVID",
        pb.JWTSVIDRequest(audience=["a"], spiffe_id="spiffe://example.org/other"),
        Code.PERMISSION_DENIED,
    ),
    ("ValidateJWTSVID", pb.ValidateJWTSVIDRequest(audience="a"), Code.INVALID_ARGUMENT),
    ("ValidateJWTSVID", pb.ValidateJWTSVIDRequest(svid="a"), Code.INVALID_ARGUMENT),
    ("ValidateJWTSVID", REQUESTS["ValidateJWTSVID"], Code.INVALID_ARGUMENT),
    ("FetchWITSVID", REQUESTS["FetchWITSVID"], Code.UNIMPLEMENTED),
    ("FetchWITBundles", REQUESTS["FetchWITBundles"], Code.UNIMPLEMENTED),
]


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    REFUSED,
    ids=[f"{n}-{one[0]}" for n, one in enumerate(REFUSED)],
)
def test_bad_requests(stub: Any, method: str, request_: Any, code: Code) -> None:
    """A request that an agent refuses, it refuses with the same status."""
    assert code_of(stub, method, request=request_) is code


def test_denials(fake: FakeWorkloadApi, stub: Any) -> None:
    """`deny` is PermissionDenied everywhere, `refuse` any error anywhere, `allow` ends both."""
    methods = [one for one in REQUESTS if "Fetch" in one and "WIT" not in one]
    fake.deny()
    assert {code_of(stub, one) for one in methods} == {Code.PERMISSION_DENIED}
    fake.allow()
    assert {code_of(stub, one) for one in methods} == {Code.OK}
    fake.refuse(ExhaustedError("slower"), "FetchJWTSVID")
    assert code_of(stub, "FetchJWTSVID") is Code.RESOURCE_EXHAUSTED
    assert code_of(stub, "FetchX509SVID") is Code.OK
    fake.allow()
    fake.set_identities()
    assert {code_of(stub, one) for one in methods} == {Code.PERMISSION_DENIED}


def test_what_it_cannot_be_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, paths and sockets that are none are refused at once, and nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SpiffeIdError):
        FakeWorkloadApi(trust_domain="Example.org")
    with pytest.raises(SpiffeIdError):
        FakeWorkloadApi("web")
    with pytest.raises(PreconditionError, match="107 bytes"):
        FakeWorkloadApi(socket=tmp_path / ("x" * 107))
    with pytest.raises(EndpointError):
        FakeWorkloadApi(socket="relative.sock")
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(PreconditionError, match="107 bytes"):
        FakeWorkloadApi()
    assert list(tmp_path.iterdir()) == [long] and not list(long.iterdir())


# Open streams


def test_open_streams_hear_of_every_change(fake: FakeWorkloadApi, stub: Any) -> None:
    """Each change is a message on an open stream, from whichever thread it was made."""
    stream = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=METADATA, timeout=20)
    seen = [next(stream)]
    changes = (
        fake.rotate,
        fake.rotate_authorities,
        lambda: fake.set_identities("/other"),
        lambda: fake.federate("third.test"),
        lambda: fake.unfederate("partner.test"),
    )
    for change in changes:
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
        seen.append(next(stream))
    assert len({one.SerializeToString(deterministic=True) for one in seen}) == len(seen)
    assert seen[1].svids[0].x509_svid_key != seen[0].svids[0].x509_svid_key
    assert len(seen[2].svids[0].bundle) > len(seen[1].svids[0].bundle)
    assert [one.spiffe_id for one in seen[3].svids] == ["spiffe://example.org/other"]
    assert set(seen[5].federated_bundles) == {"spiffe://third.test"}
    fake.deny()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is Code.PERMISSION_DENIED  # type: ignore[attr-defined]


def test_a_change_that_a_stream_does_not_show_is_no_message(
    fake: FakeWorkloadApi, stub: Any
) -> None:
    """A rotation is no news on a stream of bundles."""
    stream = stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=METADATA, timeout=20)
    assert len(next(stream).bundles) == 2
    fake.rotate()
    fake.unfederate("partner.test")
    assert len(next(stream).bundles) == 1
    stream.cancel()


def test_stop_and_start(fake: FakeWorkloadApi, stub: Any) -> None:
    """Stopped, it ends its streams as an agent does, and is gone; started, it is back."""
    stream = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=METADATA, timeout=20)
    next(stream)
    fake.stop()
    fake.stop()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is Code.UNAVAILABLE  # type: ignore[attr-defined]
    assert not fake.socket.exists()
    fake.start()
    fake.start()
    with grpc.insecure_channel(f"unix:{fake.socket}") as channel:
        assert asked(workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel), "FetchX509SVID")


async def test_nothing_is_left() -> None:
    """When it ends, its socket, folder, files and threads are gone."""
    with FakeWorkloadApi():
        pass
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        with FakeWorkloadApi() as fake, grpc.insecure_channel(f"unix:{fake.socket}") as channel:
            stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)
            streams = [
                stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=METADATA) for _ in range(5)
            ]
            for one in streams:
                next(one)
            folder = fake.socket.parent
        assert not folder.exists()
    await eventually(lambda: open_files() <= files and threading.active_count() <= threads)


def test_a_socket_of_ones_own(tmp_path: Path) -> None:
    """A socket can be where a test wants it; the folder stays when it ends."""
    with FakeWorkloadApi(socket=tmp_path / "s") as fake:
        assert fake.address == f"unix://{tmp_path}/s" and (tmp_path / "s").is_socket()
        assert fake.environment == {"SPIFFE_ENDPOINT_SOCKET": fake.address}
    assert tmp_path.is_dir() and not (tmp_path / "s").exists()


# How it is used


async def test_in_a_test_that_awaits() -> None:
    """Its calls return at once in a test that awaits, which sees what they bring."""
    with FakeWorkloadApi() as fake:
        async with X509Source(fake.address) as source, WorkloadClient(fake.address) as client:
            updates = source.updates()
            for _ in range(3):
                assert (await anext(updates)).identities == fake.identities
                fake.rotate()
            token = (await client.fetch_jwt(("db",)))[0].token
            assert (await client.validate_jwt(token, "db"))[0].path == "/workload"
            assert await client.fetch_bundles() == fake.bundles


CONFTEST = 'pytest_plugins = ["workload_api.client.pytest_plugin"]\n'
THEIR_TEST = """
import asyncio
from workload_api.client.x509source import X509Source

def test_it(fake_workload_api):
    async def main():
        async with X509Source() as source:
            assert source.identity == fake_workload_api.identities[0]
    asyncio.run(main())

def test_another(fake_workload_api, seen=[]):
    assert fake_workload_api.calls == {}
"""


def test_the_fixture(tmp_path: Path) -> None:
    """In somebody else's tests, one line gives a fixture whose fake the environment names."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_theirs.py").write_text(THEIR_TEST)
    command = (sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:asyncio")
    ran = subprocess.run(
        [*command, str(tmp_path), f"--rootdir={tmp_path}"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout


def test_only_the_plugin_needs_pytest() -> None:
    """The client library and its fake import neither pytest nor any signing code of ours."""
    code = (
        "import sys, workload_api.client.testing, workload_api.client.x509source\n"
        "import workload_api.client.jwtsource, workload_api.client.bundlesource\n"
        "bad = {'pytest', 'ca', 'issuer', 'tests', 'aiohttp'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {bad}' if bad else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
