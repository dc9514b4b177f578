"""The Workload Endpoint (WEP) of a real agent that follows a real server, by raw gRPC."""

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from spiffe_wire.pb import workloadapi_pb2 as pb
from tests.support.children import a_python
from tests.support.endpoint import read
from tests.support.stack import (
    ROOT,
    AgentProcess,
    ServerProcess,
    Stack,
    a_folder,
    a_stack,
    channel_to,
)
from workload_api.agent.config import AgentSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "workload.spiffe.io"
HEADER = ((KEY, "true"),)
Code = grpc.StatusCode

METHODS = {
    "/SpiffeWorkloadAPI/FetchX509SVID": "stream",
    "/SpiffeWorkloadAPI/FetchX509Bundles": "stream",
    "/SpiffeWorkloadAPI/FetchJWTSVID": "unary",
    "/SpiffeWorkloadAPI/FetchJWTBundles": "stream",
    "/SpiffeWorkloadAPI/ValidateJWTSVID": "unary",
    "/SpiffeWorkloadAPI/FetchWITSVID": "stream",
    "/SpiffeWorkloadAPI/FetchWITBundles": "stream",
    "/spiffe_issuer.v1.WhoAmI/Get": "unary",
    "/grpc.health.v1.Health/Check": "unary",
    "/grpc.health.v1.Health/Watch": "stream",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "both",
    "/SpiffeWorkloadAPI/NoSuchMethod": "unary",
    "/no.such.Service/Method": "unary",
    "/spiffe_issuer.v1.AgentAdmin/GetStatus": "unary",
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs": "stream",
}
"""What is on the socket and what is not, with the shape that a client would call it by."""

WRONG_HEADERS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "True": ((KEY, "True"),),
    "TRUE": ((KEY, "TRUE"),),
    "one": ((KEY, "1"),),
    "yes": ((KEY, "yes"),),
    "empty": ((KEY, ""),),
    "false": ((KEY, "false"),),
    "space before": ((KEY, " true "), (KEY, "x")),
    "twice": ((KEY, "true"), (KEY, "true")),
    "true and false": ((KEY, "true"), (KEY, "false")),
    "false and true": ((KEY, "false"), (KEY, "true")),
    "list": ((KEY, "true,true"),),
    "the broker's": (("broker.spiffe.io", "true"),),
    "another key": (("workload-spiffe-io", "true"),),
    "a longer key": (("workload.spiffe.io.x", "true"),),
    "binary": (("workload.spiffe.io-bin", b"true"),),  # type: ignore[dict-item]
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent; this process has the identity ``/web``."""
    async with a_stack(agent_changes={"workloads": {"no_identity_grace": "1s"}}) as made:
        await made.server.add_entry("/web", made.agent.agent_id, f"unix:uid:{os.geteuid()}")
        await made.agent.until_svids(1)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(stack: Stack) -> AsyncIterator[Any]:
    """A connection to the agent's socket."""
    async with stack.agent.workload() as channel:
        yield channel


async def answer(
    channel: Any, method: str, metadata: Any = HEADER, request: bytes = b""
) -> tuple[grpc.StatusCode, str]:
    """How a call of *method*, in the shape a client would use, is answered."""
    shape = METHODS.get(method, "unary")
    if shape == "unary":
        call = channel.unary_unary(method)(request, metadata=metadata, timeout=10)
        try:
            await call
        except grpc.aio.AioRpcError:
            pass
        return await call.code(), await call.details()
    if shape == "stream":
        call = channel.unary_stream(method)(request, metadata=metadata, timeout=10)
    else:
        call = channel.stream_stream(method)(metadata=metadata, timeout=10)
        if metadata == HEADER:  # grpcio's client calls a write that comes too late INTERNAL
            await call.write(request)
    try:
        if await call.read() is not grpc.aio.EOF:
            call.cancel()
            return Code.OK, ""
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), await call.details()


# The header


@pytest.mark.parametrize("method", METHODS)
async def test_wep_08_no_header_no_answer(channel: Any, method: str) -> None:
    """WEP-08, WEP-09, SEC-38: without the header any method, known or not, is refused."""
    code, text = await answer(channel, method, metadata=())
    assert code is Code.INVALID_ARGUMENT
    assert text == "security header missing: send metadata workload.spiffe.io: true"


HEADER_MATRIX = list(itertools.product(
    ["/SpiffeWorkloadAPI/FetchX509SVID", "/SpiffeWorkloadAPI/ValidateJWTSVID",
     "/grpc.health.v1.Health/Check",
     "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
     "/no.such.Service/Method"],
    WRONG_HEADERS,
))  # fmt: skip


@pytest.mark.parametrize(("method", "header"), HEADER_MATRIX)
async def test_wep_08_not_exactly_the_header(channel: Any, method: str, header: str) -> None:
    """WEP-08, SEC-38: exactly once, exactly `true`, exactly this key; anything else is none."""
    code, _ = await answer(channel, method, metadata=WRONG_HEADERS[header])
    assert code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("method", METHODS)
async def test_with_the_header_the_method_counts(channel: Any, method: str) -> None:
    """WEP-01, WEP-23, WAPI-01: what exists answers, by default; the rest: UNIMPLEMENTED."""
    code, _ = await answer(channel, method)
    expected = {
        "/SpiffeWorkloadAPI/FetchX509SVID": Code.OK,
        "/SpiffeWorkloadAPI/FetchX509Bundles": Code.OK,
        "/SpiffeWorkloadAPI/FetchJWTBundles": Code.OK,
        "/SpiffeWorkloadAPI/FetchJWTSVID": Code.INVALID_ARGUMENT,  # it asked for nothing
        "/SpiffeWorkloadAPI/ValidateJWTSVID": Code.INVALID_ARGUMENT,
        "/spiffe_issuer.v1.WhoAmI/Get": Code.OK,
        "/grpc.health.v1.Health/Check": Code.OK,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Code.OK,
    }.get(method, Code.UNIMPLEMENTED)
    assert code is expected


async def test_other_metadata_changes_nothing(channel: Any) -> None:
    """WEP-15, WEP-16: who calls is the kernel's word, whatever the caller says of itself."""
    said = (
        *HEADER, ("x-forwarded-for", "10.0.0.1"), ("x-uid", "0"), ("uid", "0"), ("pid", "1"),
        ("authorization", "Bearer x"), ("x-forwarded-client-cert", "URI=spiffe://evil.test/x"),
    )  # fmt: skip
    call = channel.unary_stream(
        "/SpiffeWorkloadAPI/FetchX509SVID", response_deserializer=pb.X509SVIDResponse.FromString
    )(b"", metadata=said)
    assert [one.spiffe_id for one in (await read(call)).svids] == ["spiffe://example.org/web"]


async def test_the_header_comes_before_everything(stack: Stack) -> None:
    """WEP-09: checked before the request's fields, and before the caller is looked at."""
    async with stack.agent.workload() as channel:
        for request in (b"\xff\xff", b""):
            code, text = await answer(
                channel, "/SpiffeWorkloadAPI/FetchJWTSVID", metadata=(), request=request
            )
            assert code is Code.INVALID_ARGUMENT and "security header" in text


# Transport


async def test_wep_10_plain_http2(stack: Stack) -> None:
    """WEP-04, WEP-10: a plain HTTP/2 client is answered: no TLS, no upgrade."""
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(5)
        plain.connect(str(stack.agent.workload_socket))
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        frame = plain.recv(9)
        assert frame[3] == 4  # SETTINGS


async def test_wep_05_no_tcp(stack: Stack) -> None:
    """WEP-02, WEP-03, WEP-05, WEP-06: the agent listens on Unix sockets, on no TCP port."""
    inodes = set()
    fds = f"/proc/{stack.agent.process.pid}/fd"
    for name in os.listdir(fds):
        try:
            target = os.readlink(f"{fds}/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    listening = [
        line
        for family in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]
        if line.split()[9] in inodes and line.split()[3] == "0A"
    ]
    assert inodes and not listening


async def test_wep_06_there_is_no_setting_for_tcp() -> None:
    """WEP-06: no setting makes the Workload API listen on TCP."""
    settings = AgentSettings(trust_domain="example.org")
    assert str(settings.workload_socket).startswith("/run/")
    assert not [
        name
        for name in AgentSettings.__dataclass_fields__
        if "workload" in name and ("port" in name or "address" in name)
    ]


async def test_wep_15_any_process_may_ask(stack: Stack) -> None:
    """WEP-15, IOP-24: the socket is open to every local user; who calls is asked after that."""
    mode = stack.agent.workload_socket.stat().st_mode
    assert mode & 0o777 == 0o777
    assert len(os.fsencode(stack.agent.workload_socket)) <= 107


CALLER = """
import sys
sys.path[:0] = sys.argv[2:]
import grpc
from spiffe_wire.pb import workloadapi_pb2 as pb
channel = grpc.insecure_channel("unix:" + sys.argv[1])
call = channel.unary_stream(
    "/SpiffeWorkloadAPI/FetchX509SVID", response_deserializer=pb.X509SVIDResponse.FromString
)
print(next(call(b"", metadata=(("workload.spiffe.io", "true"),))).svids[0].spiffe_id)
sys.stdin.read()
"""


async def test_wep_17_nothing_is_asked_of_the_workload(stack: Stack) -> None:
    """WEP-16, WEP-17: a process with no file, variable or argument is known by the kernel."""
    paths = [str(ROOT), *(one for one in sys.path if one)]
    with a_python(CALLER, str(stack.agent.workload_socket), *paths, env={}) as child:
        assert await asyncio.to_thread(child.hear) == "spiffe://example.org/web"


# Refusals


async def test_wep_21_a_process_without_an_identity(stack: Stack) -> None:
    """WEP-21: PERMISSION_DENIED, and a text that says whom to ask and names nobody else."""
    entry = await stack.server.add_entry(
        "/secret", stack.agent.agent_id, "unix:uid:4242", "unix:path:/opt/secret"
    )
    (web,) = await stack.server.entries("/web")
    await stack.server.delete_entries(web)
    try:
        async with stack.agent.workload() as channel:
            await stack.agent.process.until(lambda: _entry_count(stack, 1))
            for method in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"):
                code, text = await answer(channel, f"/SpiffeWorkloadAPI/{method}")
                assert code is Code.PERMISSION_DENIED
                assert f"issuer explain --pid {os.getpid()}" in text
                assert "secret" not in text and "4242" not in text
            for method, request in (
                ("FetchJWTSVID", pb.JWTSVIDRequest(audience=["db"])),
                ("ValidateJWTSVID", pb.ValidateJWTSVIDRequest(audience="db", svid="a.b.c")),
            ):
                code, _ = await answer(
                    channel, f"/SpiffeWorkloadAPI/{method}", request=request.SerializeToString()
                )
                assert code is Code.PERMISSION_DENIED
    finally:
        await stack.server.delete_entries(entry)
        await stack.server.add_entry("/web", stack.agent.agent_id, f"unix:uid:{os.geteuid()}")
        await stack.agent.until_svids(1)


async def _entry_count(stack: Stack, count: int) -> bool:
    status = await stack.agent.status()
    return status is not None and status.entries == count


async def test_wep_22_registered_later(stack: Stack) -> None:
    """WEP-22: one that was denied is answered once it is registered, on the same connection."""
    (web,) = await stack.server.entries("/web")
    async with stack.agent.workload() as channel:
        await stack.server.delete_entries(web)
        await stack.agent.process.until(lambda: _entry_count(stack, 0))
        method = "/SpiffeWorkloadAPI/FetchX509Bundles"
        assert (await answer(channel, method))[0] is Code.PERMISSION_DENIED
        await stack.server.add_entry("/web", stack.agent.agent_id, f"unix:uid:{os.geteuid()}")
        await stack.agent.until_svids(1)
        assert (await answer(channel, method))[0] is Code.OK


async def test_wep_19_not_in_step_yet() -> None:
    """WEP-19, SEC-114: an agent that never reached its server says UNAVAILABLE to all."""
    with a_folder() as folder:
        server = ServerProcess(folder)
        agent = AgentProcess(folder, server)
        try:
            await server.start()
            token, bundle = await server.join_token(), await server.bundle_pem()
            server.process.kill()
            await _start_without_server(agent, token, bundle)
            async with agent.workload() as channel:
                for method in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"):
                    code, _ = await answer(channel, f"/SpiffeWorkloadAPI/{method}")
                    assert code is Code.UNAVAILABLE
                # Ready is asked before the fields are: an empty audience would be malformed.
                for method in ("FetchJWTSVID", "ValidateJWTSVID"):
                    code, _ = await answer(channel, f"/SpiffeWorkloadAPI/{method}")
                    assert code is Code.UNAVAILABLE
                # And whether a method exists at all is asked before that.
                code, _ = await answer(channel, "/SpiffeWorkloadAPI/FetchWITSVID")
                assert code is Code.UNIMPLEMENTED
        finally:
            agent.process.close()
            server.process.close()


async def _start_without_server(agent: AgentProcess, token: str, bundle: str) -> None:
    folder = agent.folder
    (folder / "token").write_text(token)
    (folder / "bundle.pem").write_text(bundle)
    agent.config.write_text(yaml.safe_dump({
        "trust_domain": "example.org", "data_dir": str(folder / "agent"),
        "runtime_dir": str(folder / "a"), "workload_socket": str(agent.workload_socket),
        "admin_socket": str(agent.admin_socket), "join_token_file": str(folder / "token"),
        "server": {"address": "127.0.0.1", "port": agent.server.port,
                   "trust_bundle": str(folder / "bundle.pem")},
        "status": {"port": 0},
    }))  # fmt: skip
    await agent.start(connected=False)


# Reflection: nothing added to the standard's service


async def reflected(channel: Any, **request: str) -> Any:
    """One answer of the reflection service."""
    call = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(**request)]), metadata=HEADER, timeout=10)
    try:
        return await call.read()
    finally:
        call.cancel()


async def test_wep_25_reflection_lists_the_services(channel: Any) -> None:
    """WEP-25, SEC-92: reflection, with the header, lists what is served to workloads alone."""
    found = await reflected(channel, list_services="")
    assert {one.name for one in found.list_services_response.service} == {
        "SpiffeWorkloadAPI",
        "spiffe_issuer.v1.WhoAmI",
        "grpc.reflection.v1alpha.ServerReflection",
    }


STANDARD = {
    "X509SVIDRequest": {},
    "X509BundlesRequest": {},
    "JWTBundlesRequest": {},
    "WITBundlesRequest": {},
    "X509SVIDResponse": {1: "svids X509SVID*", 2: "crl bytes*", 3: "federated_bundles bytes%"},
    "X509SVID": {
        1: "spiffe_id string", 2: "x509_svid bytes", 3: "x509_svid_key bytes",
        4: "bundle bytes", 5: "hint string",
    },
    "X509BundlesResponse": {1: "crl bytes*", 2: "bundles bytes%"},
    "JWTSVIDRequest": {1: "audience string*", 2: "spiffe_id string"},
    "JWTSVIDResponse": {1: "svids JWTSVID*"},
    "JWTSVID": {1: "spiffe_id string", 2: "svid string", 3: "hint string"},
    "JWTBundlesResponse": {1: "bundles bytes%"},
    "ValidateJWTSVIDRequest": {1: "audience string", 2: "svid string"},
    "ValidateJWTSVIDResponse": {1: "spiffe_id string", 2: "claims google.protobuf.Struct"},
    "WITSVIDRequest": {1: "spiffe_id string"},
    "WITSVIDResponse": {1: "svids WITSVID*"},
    "WITSVID": {
        1: "spiffe_id string", 2: "wit_svid string", 3: "wit_svid_key string", 4: "hint string",
    },
    "WITBundlesResponse": {1: "bundles string%"},
}  # fmt: skip
"""Conformance 3.2: number to name and type; ``*`` is repeated, ``%`` a map from string."""

RPCS = {
    "FetchX509SVID": ("X509SVIDRequest", "X509SVIDResponse", True),
    "FetchX509Bundles": ("X509BundlesRequest", "X509BundlesResponse", True),
    "FetchJWTSVID": ("JWTSVIDRequest", "JWTSVIDResponse", False),
    "FetchJWTBundles": ("JWTBundlesRequest", "JWTBundlesResponse", True),
    "ValidateJWTSVID": ("ValidateJWTSVIDRequest", "ValidateJWTSVIDResponse", False),
    "FetchWITSVID": ("WITSVIDRequest", "WITSVIDResponse", True),
    "FetchWITBundles": ("WITBundlesRequest", "WITBundlesResponse", True),
}


def shape_of(message: Any) -> dict[int, str]:
    """A message's fields in the words of `STANDARD`."""
    maps = {one.name: one for one in message.nested_type if one.options.map_entry}
    found = {}
    for one in message.field:
        nested = maps.get(one.type_name.rpartition(".")[2])
        if nested is not None:
            found[one.number] = f"{one.name} {_type(nested.field[1])}%"
        else:
            many = "*" if one.label == one.LABEL_REPEATED else ""
            found[one.number] = f"{one.name} {_type(one)}{many}"
    return found


def _type(one: Any) -> str:
    if one.type == one.TYPE_MESSAGE:
        return str(one.type_name.removeprefix("."))
    return {one.TYPE_STRING: "string", one.TYPE_BYTES: "bytes"}[one.type]


async def test_wep_24_nothing_is_added(channel: Any) -> None:
    """WEP-24, WAPI-03, WAPI-04: what is served is wl.proto; no package, no field more."""
    found = await reflected(channel, file_containing_symbol="SpiffeWorkloadAPI")
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(one)
        for one in found.file_descriptor_response.file_descriptor_proto
    ]
    (file,) = (one for one in files if one.service)
    assert file.package == "" and file.syntax == "proto3"
    assert {one.name: shape_of(one) for one in file.message_type} == STANDARD
    (service,) = file.service
    assert service.name == "SpiffeWorkloadAPI"
    assert {
        one.name: (one.input_type.strip("."), one.output_type.strip("."), one.server_streaming)
        for one in service.method
    } == RPCS
    assert not any(one.client_streaming for one in service.method)


async def test_health_tells_whether_workloads_are_served(channel: Any) -> None:
    """SEC-114: health on the socket says SERVING while it does; it knows no single services."""
    call = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await call(b"", metadata=HEADER, timeout=5) == b"\x08\x01"
    code, _ = await answer(
        channel, "/grpc.health.v1.Health/Check", request=b"\n\x11SpiffeWorkloadAPI"
    )
    assert code is Code.INVALID_ARGUMENT


async def test_a_message_over_64_kib(stack: Stack) -> None:
    """SEC-80: a request over 64 KiB is refused, and one below is read."""
    async with stack.agent.workload() as channel:
        for size, expected in (
            (60_000, Code.INVALID_ARGUMENT),
            (70_000, Code.RESOURCE_EXHAUSTED),
        ):
            request = pb.ValidateJWTSVIDRequest(audience="db", svid="x" * size)
            code, _ = await answer(
                channel,
                "/SpiffeWorkloadAPI/ValidateJWTSVID",
                request=request.SerializeToString(),
            )
            assert code is expected


async def test_wapi_05_streams_of_one_socket(stack: Stack) -> None:
    """WAPI-05: two connections of one process see the same; the socket is the same for all."""
    async with channel_to(stack.agent.workload_socket) as one:
        async with channel_to(stack.agent.workload_socket) as two:
            found = [
                await answer(channel, "/SpiffeWorkloadAPI/FetchX509SVID")
                for channel in (one, two)
            ]
    assert found == [(Code.OK, "")] * 2
