"""Workloads of several users on one node, as root can start them."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer
from spiffe_wire.pb import workloadapi_pb2_grpc
from tests.support.children import (
    SLEEP,
    a_child,
    a_connected_child,
    a_python,
    spoken_through,
)
from tests.support.endpoint import an_endpoint, ending, fetch, read
from tests.support.stack import ROOT, Stack, a_stack
from tests.support.store import an_entry, some
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.unix import UnixAttestor

pytestmark = [
    pytest.mark.root,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        os.geteuid() != 0, reason="needs root: it starts processes as other users"
    ),
]

UIDS = [1, 2, 3, 4, 33, 4242, 2_000_000_000]

FETCHES = """
import json, os, sys
sys.path[:0] = sys.argv[3:]
import grpc
from spiffe_wire.pb import workloadapi_pb2 as pb
uid = int(sys.argv[2])
os.setgroups([uid + 1])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
print("ready")
sys.stdin.readline()
channel = grpc.insecure_channel("unix:" + sys.argv[1])
metadata = (("workload.spiffe.io", "true"),)
stream = channel.unary_stream(
    "/SpiffeWorkloadAPI/FetchX509SVID", response_deserializer=pb.X509SVIDResponse.FromString
)
unary = channel.unary_unary(
    "/SpiffeWorkloadAPI/FetchJWTSVID",
    request_serializer=pb.JWTSVIDRequest.SerializeToString,
    response_deserializer=pb.JWTSVIDResponse.FromString,
)
for _ in range(10):
    call = stream(b"", metadata=metadata)
    ids = [one.spiffe_id for one in next(call).svids]
    call.cancel()
    tokens = unary(pb.JWTSVIDRequest(audience=["db"]), metadata=metadata)
    print(json.dumps([ids, [one.spiffe_id for one in tokens.svids]]))
"""
"""Becomes another user once everything is imported, and asks ten times who it is."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A stack in a folder that other users can enter, with an identity for each of `UIDS`."""
    before, tempfile.tempdir = tempfile.tempdir, "/run"
    try:
        async with a_stack(open_to_all=True) as made:
            for uid in UIDS:
                selectors = (f"unix:uid:{uid}", f"unix:supplementary_gid:{uid + 1}")
                await made.server.add_entry(f"/uid-{uid}", made.agent.agent_id, *selectors)
            await made.agent.until_svids(len(UIDS))
            yield made
    finally:
        tempfile.tempdir = before


def a_caller(stack: Stack, uid: int) -> Any:
    """A process that asks as *uid*."""
    paths = [str(ROOT), *(one for one in sys.path if one)]
    return a_python(FETCHES, str(stack.agent.workload_socket), str(uid), *paths)


async def test_wapi_05_each_user_gets_his_own(stack: Stack) -> None:
    """WAPI-05, SEC-31: eight processes of seven users at once get their own identities."""
    uids = [*UIDS, UIDS[0]]
    with contextlib.ExitStack() as running:
        children = [running.enter_context(a_caller(stack, uid)) for uid in uids]
        for child in children:
            assert await asyncio.to_thread(child.hear, 30) == "ready"
        for child in children:
            child.say("go")
        for uid, child in zip(uids, children, strict=True):
            expected = [[f"spiffe://example.org/uid-{uid}"]] * 2
            for _ in range(10):
                assert json.loads(await asyncio.to_thread(child.hear, 30)) == expected


async def test_wep_15_other_users_can_reach_the_socket(stack: Stack) -> None:
    """WEP-15, IOP-24: the socket and its folder let every user in, and nobody change them."""
    folder = stack.agent.workload_socket.parent
    assert folder.stat().st_mode & 0o777 == 0o755
    assert stack.agent.workload_socket.stat().st_mode & 0o777 == 0o777
    assert stack.agent.admin_socket.parent.stat().st_mode & 0o077 == 0


# What a user may try


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, on a file system with set-user-ID."""
    folder = Path(tempfile.mkdtemp(prefix="si-", dir="/var/lib"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _as(uid: int) -> dict[str, Any]:
    return {"user": uid, "group": uid, "extra_groups": []}


async def test_sec_32_a_set_user_id_program(open_folder: Path) -> None:
    """SEC-32: one that connects and then runs a set-user-ID program is refused."""
    program = Path(shutil.copy(SLEEP, open_folder / "sleep"))
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    shell = Path(shutil.copy("/bin/sh", open_folder / "sh"))
    attestor = UnixAttestor()
    with a_child(shell, "-c", f"read line; exec {program} 60", **_as(4242)) as child:
        peer = child.peer(uid=4242, gid=4242)
        found = {one.value for one in (await attestor.attest(peer)).selectors}
        assert {"uid:4242", "gid:4242", f"path:{shell}"} <= found
        child.say("go")
        while child.runs() != str(program):
            await asyncio.sleep(0.001)
        with pytest.raises(AttestationError, match="changed its user"):
            await attestor.attest(peer)
    attestor.close()


async def test_sec_31_a_process_that_changes_its_user() -> None:
    """SEC-31: a connection that was made as root is worth nothing to another user."""
    async with an_endpoint(attestors=[UnixAttestor()]) as endpoint:
        endpoint.put(an_entry("/root", id="root", selectors=some("unix:uid:0")))
        endpoint.put(an_entry("/other", id="other", selectors=some("unix:uid:4242")))
        with a_connected_child(endpoint.socket) as (child, connection):
            async with spoken_through(connection) as address:
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)
                    call = fetch(stub)
                    assert (await read(call)).svids[0].spiffe_id.endswith("/root")
                    child.say("setuid 4242")
                    assert await asyncio.to_thread(child.hear) == "done"
                    endpoint.renew(endpoint.cache.index.get("root"))
                    code, text = await ending(call)
    assert code is grpc.StatusCode.UNAVAILABLE and "changed its user" in text


async def test_sec_32_all_selectors_of_another_user(open_folder: Path) -> None:
    """SEC-31, SEC-32: groups and names are those of the process, not of the agent."""
    program = Path(shutil.copy(SLEEP, open_folder / "sleep"))
    attestor = UnixAttestor()
    options = {"user": 1, "group": 2, "extra_groups": [3, 4_000_000]}
    with a_child(program, "60", **options) as child:
        found = {
            str(one) for one in (await attestor.attest(child.peer(uid=1, gid=2))).selectors
        }
    attestor.close()
    assert {
        "unix:uid:1", "unix:user:daemon", "unix:gid:2", "unix:group:bin",
        "unix:supplementary_gid:3", "unix:supplementary_group:sys",
        "unix:supplementary_gid:4000000", f"unix:path:{program}",
    } <= found  # fmt: skip
    assert not [one for one in found if one.endswith((":0", ":root"))]


async def test_sec_31_root_of_a_namespace(open_folder: Path) -> None:
    """SEC-31: who is root in a user namespace of his own is to the agent who he is outside."""
    shell = Path(shutil.copy("/bin/sh", open_folder / "sh"))
    command = ("unshare", "-U", "-r", "-p", "-f", str(shell), "-c", "id -u; echo $$; read line")
    attestor = UnixAttestor()
    with a_child(*command, **_as(4242)) as child:
        said = await asyncio.to_thread(child.hear)
        if said != "0":
            pytest.skip("this kernel lets no user make a user namespace")
        assert child.hear() == "1"  # and it is the first process there
        (inner,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        pidfd = PidFd(os.pidfd_open(int(inner)))
        peer = UnixPeer(int(inner), 4242, 4242, PeerProof.PIDFD, pidfd)
        found = {one.value for one in (await attestor.attest(peer)).selectors}
    attestor.close()
    assert {"uid:4242", "gid:4242", f"path:{shell}"} <= found
    assert not found & {"uid:0", "gid:0", "user:root"}


async def test_sec_81_one_user_floods(stack: Stack) -> None:
    """SEC-81: a user with all the connections he may have keeps no other user waiting."""
    flood = """
import os, socket, sys, time
os.setresgid(3, 3, 3); os.setresuid(3, 3, 3)
held = []
for _ in range(200):
    one = socket.socket(socket.AF_UNIX)
    one.connect(sys.argv[1])
    one.setblocking(False)
    try:
        one.send(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(9) * 100)
    except OSError:
        pass
    held.append(one)
print("flooding")
sys.stdin.readline()
"""
    with a_python(flood, str(stack.agent.workload_socket)) as flooding:
        assert await asyncio.to_thread(flooding.hear, 30) == "flooding"
        with a_caller(stack, 4) as child:
            assert await asyncio.to_thread(child.hear, 30) == "ready"
            child.say("go")
            for _ in range(10):
                ids, _ = json.loads(await asyncio.to_thread(child.hear, 30))
                assert ids == ["spiffe://example.org/uid-4"]
