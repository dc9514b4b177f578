"""
Who is calling: real processes at a real socket, and what they may try.

The servicer, its front door and the ``unix`` attestor are the product's; entries and SVIDs are
put into the cache by hand.  A caller that hands its connection on is made by one process that
connects and passes the descriptor to the test, which then speaks on it.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.authorities import NOW
from tests.support.children import (
    SLEEP,
    Child,
    a_connected_child,
    a_program,
    open_files,
    spoken_through,
)
from tests.support.endpoint import (
    Endpoint,
    Told,
    an_endpoint,
    ending,
    fetch,
    read,
    says_nothing,
)
from tests.support.store import an_entry, some
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.unix import UnixAttestor

Code = grpc.StatusCode
PYTHON = os.path.realpath(sys.executable)
ME = f"unix:uid:{os.geteuid()}"
PY = an_entry("/py", id="py", created_at=NOW, selectors=some(ME, f"unix:path:{PYTHON}"))
SLEEPER = an_entry("/sleeper", id="sleeper", selectors=some(ME, f"unix:path:{SLEEP}"))
STREAMS = ["FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"]


@asynccontextmanager
async def a_place(**changes: Any) -> AsyncIterator[Endpoint]:
    """A Workload API that attests for real; entries for the interpreter and for `sleep`."""
    async with an_endpoint(attestors=[UnixAttestor()], **changes) as endpoint:
        endpoint.put(PY, SLEEPER)
        yield endpoint


@asynccontextmanager
async def speaking_for(endpoint: Endpoint) -> AsyncIterator[tuple[Child, Any]]:
    """A child that connected and passed its connection on, and a stub that speaks on it."""
    with a_connected_child(endpoint.socket) as (child, connection):
        async with spoken_through(connection) as address:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            async with grpc.aio.insecure_channel(address, options) as channel:
                yield child, workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


def ids(message: Any) -> list[str]:
    """The paths of a message's SPIFFE IDs."""
    return [one.spiffe_id.removeprefix("spiffe://example.org") for one in message.svids]


async def test_wapi_05_the_connection_is_the_callers() -> None:
    """WAPI-05, SEC-31: who connected is served, not who speaks on his connection."""
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        child.say(f"exec {SLEEP} 60")
        while child.runs() != str(SLEEP):
            await asyncio.sleep(0.001)
        assert ids(await read(fetch(stub))) == ["/sleeper"]  # we are an interpreter


@pytest.mark.parametrize("method", STREAMS)
async def test_sec_36_the_stream_ends_with_its_process(method: str) -> None:
    """SEC-36: the process is killed while another holds the connection: the stream ends."""
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        call = fetch(stub, method)
        await read(call)
        child.process.kill()  # not waited for: a zombie is as dead
        code, text = await ending(call, within=2)
        assert (code, text) == (Code.PERMISSION_DENIED, "the calling process has ended")
        assert (await ending(fetch(stub, method)))[0] is Code.PERMISSION_DENIED


async def test_sec_36_a_child_of_the_caller_inherits_nothing() -> None:
    """SEC-36: the process ends, its child lives on with the connection: no more answers."""
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        call = fetch(stub)
        await read(call)
        child.say("fork")
        assert await asyncio.to_thread(child.hear) == "done"  # said by the grandchild
        assert (await ending(call, within=2))[0] is Code.PERMISSION_DENIED
        request = pb.JWTSVIDRequest(audience=["db"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.FetchJWTSVID(request, metadata=METADATA)
        assert caught.value.code() is Code.PERMISSION_DENIED


async def test_sec_36_another_program_is_noticed_at_the_next_push() -> None:
    """SEC-36: a process that runs another program now is not sent what the old one got."""
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        call = fetch(stub)
        assert ids(await read(call)) == ["/py"]
        child.say(f"exec {SLEEP} 60")
        while child.runs() != str(SLEEP):
            await asyncio.sleep(0.001)
        endpoint.renew(PY)
        assert ids(await read(call)) == ["/sleeper"]


async def test_sec_36_another_program_is_noticed_without_a_push() -> None:
    """SEC-36: without any change the next attestation by the clock notices it."""
    interval = timedelta(milliseconds=100)
    async with a_place(reattest_interval=interval) as endpoint:
        async with speaking_for(endpoint) as (child, stub):
            call = fetch(stub)
            assert ids(await read(call)) == ["/py"]
            child.say("exec /bin/cat")
            assert (await ending(call, within=2))[0] is Code.PERMISSION_DENIED


async def test_sec_32_one_user_is_not_kept_apart_by_path() -> None:
    """SEC-32: as the manual says: a process may connect, and become the other program after."""
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        child.say(f"exec {SLEEP} 60")
        while child.runs() != str(SLEEP):
            await asyncio.sleep(0.001)
        assert ids(await read(fetch(stub))) == ["/sleeper"]


async def test_sec_32_a_deleted_program_is_nobody(tmp_path: Path) -> None:
    """SEC-32: a program whose file was replaced loses what its path gave it."""
    program = a_program(tmp_path, "app")
    entry = an_entry("/app", id="app", selectors=some(ME, f"unix:path:{program}"))
    async with a_place() as endpoint, speaking_for(endpoint) as (child, stub):
        endpoint.put(entry)
        child.say(f"exec {program} 60")
        while child.runs() != str(program):
            await asyncio.sleep(0.001)
        call = fetch(stub)
        assert ids(await read(call)) == ["/app"]
        os.replace(a_program(tmp_path, "new"), program)
        endpoint.renew(entry)
        assert (await ending(call, within=2))[0] is Code.PERMISSION_DENIED


async def test_sec_31_a_caller_that_ends_while_it_is_attested() -> None:
    """SEC-31: one that ends in the middle of its attestation gets nothing."""
    told = Told(ME, f"unix:path:{PYTHON}")
    async with (
        an_endpoint(attestors=[told]) as endpoint,
        speaking_for(endpoint) as (child, stub),
    ):
        endpoint.put(PY)
        told.answers.clear()
        call = fetch(stub)
        while not told.calls:
            await asyncio.sleep(0.001)
        child.end()
        told.answers.set()
        assert (await ending(call, within=2))[0] is Code.PERMISSION_DENIED


async def test_sec_31_descriptors_stay_flat() -> None:
    """SEC-31: thousands of refused calls and hundreds of connections leave no descriptor."""
    async with an_endpoint("unix:uid:4242") as endpoint:
        endpoint.put(an_entry("/nobody", id="n", selectors=some("unix:uid:1")))
        await _refused(endpoint, calls=10)
        await _closed(endpoint)
        before = open_files()
        for _ in range(20):
            await _refused(endpoint, calls=100)
        for _ in range(200):
            reader, writer = await asyncio.open_unix_connection(str(endpoint.socket))
            writer.close()
            del reader
        await _closed(endpoint)
        assert open_files() <= before


async def _refused(endpoint: Endpoint, calls: int) -> None:
    async with endpoint.stub() as stub:
        for _ in range(calls):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["x"]), metadata=METADATA)
            assert caught.value.code() is Code.PERMISSION_DENIED
            del caught


async def _closed(endpoint: Endpoint) -> None:
    async with asyncio.timeout(10):
        while endpoint.door.connections:
            await asyncio.sleep(0.01)


async def test_sec_31_a_long_life_leaves_nothing() -> None:
    """SEC-31: a process that lives on and connects again and again leaves no descriptor."""
    async with a_place() as endpoint:
        async with endpoint.stub() as stub:
            await read(fetch(stub))
        await _closed(endpoint)
        before = open_files()
        for _ in range(50):
            async with endpoint.stub() as stub:
                call = fetch(stub)
                await read(call)
                del call
        await _closed(endpoint)
        assert open_files() <= before


# Attestors that fail


class Broken(Told):
    """An attestor of another type, which cannot vouch for anybody."""

    type = "k8s"  # type: ignore[misc]

    async def attest(self, peer: Any) -> Any:
        await super().attest(peer)
        raise AttestationError("the kubelet does not answer")


async def test_sec_35_entries_of_the_others_are_served() -> None:
    """SEC-35: with one attestor failing, entries that need it are not matched; others are."""
    pod = an_entry("/pod", id="pod", selectors=some(ME, "k8s:ns:shop"))
    async with an_endpoint(attestors=[UnixAttestor(), Broken()]) as endpoint:
        endpoint.put(PY, pod)
        async with endpoint.stub() as stub:
            assert ids(await read(fetch(stub))) == ["/py"]


async def test_sec_35_when_all_fail_it_is_no_denial() -> None:
    """SEC-35, WEP-19: when nobody can vouch for a caller: UNAVAILABLE, on every method."""
    async with an_endpoint(attestors=[Broken()]) as endpoint, endpoint.stub() as stub:
        endpoint.put(PY)
        for method in STREAMS:
            code, text = await ending(fetch(stub, method))
            assert code is Code.UNAVAILABLE and "the kubelet does not answer" in text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["x"]), metadata=METADATA)
        assert caught.value.code() is Code.UNAVAILABLE


async def test_sec_80_an_attestor_that_hangs() -> None:
    """SEC-80: an attestation ends after its limit; the caller is told to come back."""
    limit = timedelta(milliseconds=100)
    async with an_endpoint(attestation_timeout=limit) as endpoint, endpoint.stub() as stub:
        endpoint.told.answers.clear()
        started = time.monotonic()
        code, text = await ending(fetch(stub))
        assert code is Code.UNAVAILABLE and "took too long" in text
        assert time.monotonic() - started < 2


async def test_sec_81_hundreds_of_calls_that_hang() -> None:
    """SEC-81: the calls of one process that hang in attestation leave a slot for the others."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.put(an_entry(id="web"))
        endpoint.told.answers.clear()
        calls = [fetch(stub) for _ in range(100)]
        while endpoint.callers.attestation.slots.held < 24:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert endpoint.callers.attestation.slots.held == 24
        endpoint.told.answers.set()
        for call in calls:
            assert await read(call)


async def test_an_idle_stream_says_nothing() -> None:
    """WAPI-09: a stream whose process goes on as it is says nothing, attested or not."""
    interval = timedelta(milliseconds=50)
    async with a_place(reattest_interval=interval) as endpoint:
        async with speaking_for(endpoint) as (_, stub):
            call = fetch(stub)
            await read(call)
            assert await says_nothing(call, 0.3)
