"""
The front door on a Unix socket: who called, and what is left when it is over.

Source: transport (rules for the Unix sockets, rules for the splice), SEC-31, SEC-36, SEC-81.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import gc
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from spiffe_core.errors import InternalError, UnauthenticatedError
from spiffe_wire.frontdoor import kernel, selfcheck
from spiffe_wire.frontdoor.door import DoorLimits, FrontDoor
from spiffe_wire.frontdoor.kernel import PeerPolicy, prove, start_time
from spiffe_wire.frontdoor.peer import REGISTRY, PeerGoneError, PeerProof, UnixPeer, peer_of
from tests.support.children import Child, a_python
from tests.support.door import (
    ECHO,
    HOLD,
    WHO,
    Door,
    Traces,
    a_door,
    call,
    eventually,
    no_descriptors_left,
    on_both_loops,
    on_uvloop,
    settled_traces,
)
from tests.support.http2 import DATA, HEADERS, OPENING, PREFACE, request
from tests.support.stack import a_folder

# Connects, says so, and holds the connection; a line on stdin is sent as it is, in hex.
HOLDER = """
import os, socket, sys
one = socket.socket(socket.AF_UNIX)
one.connect(sys.argv[1])
print("open", flush=True)
for line in sys.stdin:
    one.sendall(bytes.fromhex(line))
    print("sent", flush=True)
"""
# Passes its connection to a child of its own, then ends.
PASSES_ON = """
import os, socket, sys
one = socket.socket(socket.AF_UNIX)
one.connect(sys.argv[1])
if os.fork():
    print("open", flush=True)
    sys.stdin.readline()
    os._exit(0)
one.sendall(bytes.fromhex(sys.argv[2]))
answer = b""
while sys.argv[3].encode() not in answer:
    more = one.recv(65536)
    if not more:
        answer += b"closed"
        break
    answer += more
with open(sys.argv[4], "wb") as file:
    file.write(answer)
"""


@contextlib.contextmanager
def a_pair(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of this process to itself: the client's end, and the accepted one."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            yield client, accepted


@asynccontextmanager
async def a_holder(door: Door) -> AsyncIterator[Child]:
    """Another process that is connected to *door*."""
    with a_python(HOLDER, str(door.path)) as child:
        assert await asyncio.to_thread(child.hear) == "open"
        yield child


async def say(child: Child, data: bytes) -> None:
    """Let *child* send bytes over its connection."""
    child.say(data.hex())
    assert await asyncio.to_thread(child.hear) == "sent"


# Who called.


@on_both_loops
async def test_sec_31_the_kernel_says_who_called() -> None:
    """SEC-31, WEP-16: pid, uid and gid are the kernel's, and the proof is a pidfd."""
    async with a_door() as door, door.channel() as channel:
        expected = f"pid={os.getpid()} uid={os.geteuid()} gid={os.getegid()} pidfd"
        assert await call(channel, WHO) == expected.encode()
        lie = (("x-pid", "1"), ("x-uid", "0"), ("user-agent", "pid=1"))
        assert await call(channel, WHO, metadata=lie) == expected.encode()


@on_uvloop
async def test_sec_31_each_connection_has_its_own_caller() -> None:
    """SEC-31: several processes at once are told apart, call by call."""
    async with a_door() as door, contextlib.AsyncExitStack() as stack:
        children = [await stack.enter_async_context(a_holder(door)) for _ in range(5)]
        for child in children:
            await say(child, OPENING + request(1, HOLD, b"x"))
        await eventually(lambda: door.echo.held == 5)
        pids = {one.pid for one in REGISTRY.values() if isinstance(one, UnixPeer)}
        assert pids == {child.pid for child in children}


def test_sec_31_asked_before_a_byte_is_read(tmp_short: Path) -> None:
    """SEC-31: the caller of a connection is known before it has said anything."""
    with a_pair(tmp_short / "s") as (_, accepted):
        peer = prove(accepted, PeerPolicy.REQUIRE_PIDFD)
        assert (peer.pid, peer.proof, peer.alive()) == (os.getpid(), PeerProof.PIDFD, True)
        assert not os.get_inheritable(peer.pidfd.fd)


async def test_sec_31_a_caller_that_died_before_accept_is_refused(tmp_short: Path) -> None:
    """SEC-31: a process that connected and has ended is nobody, on either road."""
    for old_kernel in (False, True):
        path = tmp_short / f"s{old_kernel}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            with a_python(HOLDER, str(path)) as child:
                assert await asyncio.to_thread(child.hear) == "open"
                child.end()
            accepted, _ = listener.accept()
            with accepted, pytest.raises(UnauthenticatedError):
                prove(accepted, PeerPolicy.ALLOW_FALLBACK, old_kernel=old_kernel)


def test_sec_31_the_policy_refuses_an_old_kernel(tmp_short: Path) -> None:
    """SEC-31: where the settings demand a pidfd, a kernel without one serves nobody."""
    with a_pair(tmp_short / "s") as (_, accepted):
        with pytest.raises(UnauthenticatedError, match=r"before 6\.5"):
            prove(accepted, PeerPolicy.REQUIRE_PIDFD, old_kernel=True)
        peer = prove(accepted, PeerPolicy.ALLOW_FALLBACK, old_kernel=True)
        assert (peer.pid, peer.proof) == (os.getpid(), PeerProof.FALLBACK)


def test_sec_31_the_fall_back_compares_uid_and_gid(tmp_short: Path) -> None:
    """SEC-31: on an old kernel a process whose IDs are not those that connected is refused."""
    pid, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    assert kernel._pin(pid, uid, gid).alive()
    for wrong in ((uid + 1, gid), (uid, gid + 1)):
        with pytest.raises(UnauthenticatedError, match="not who connected"):
            kernel._pin(pid, *wrong)


@on_uvloop
async def test_sec_31_the_fall_back_serves_and_is_shown() -> None:
    """SEC-31: on an old kernel callers are served, and the door says that the proof is weak."""
    async with a_door(listen={"old_kernel": True}) as door, door.channel() as channel:
        assert (await call(channel, WHO)).endswith(b" fallback")
        assert door.door.proof is PeerProof.FALLBACK


@on_uvloop
async def test_sec_31_the_fall_back_refused_by_policy_serves_nobody() -> None:
    """SEC-31: the refusal happens at accept; not a byte of the server is seen."""
    async with a_door() as door:
        path = door.folder / "strict"
        policy = PeerPolicy.REQUIRE_PIDFD
        await door.door.listen_unix(path, mode=0o600, policy=policy, old_kernel=True)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(OPENING)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert door.door.refusals.counts["UnauthenticatedError"] == 1


@pytest.mark.parametrize(
    "name", ["a) R 1 (b", ") ) )", "(((", "a\nb", "\x01\x7f", "é", "12 34 56", "x" * 15]
)
def test_sec_31_odd_process_names(name: str) -> None:
    """SEC-31: /proc/<pid>/stat is split at its last parenthesis, whatever the name is."""
    plain = start_time(os.getpid())
    with open("/proc/self/comm") as file:
        before = file.read().rstrip("\n")
    try:
        Path("/proc/self/comm").write_bytes(name.encode())
        assert start_time(os.getpid()) == plain
    finally:
        Path("/proc/self/comm").write_text(before)


# The life of a caller.


@on_both_loops
async def test_sec_36_a_stream_ends_with_its_process() -> None:
    """SEC-36: a held stream ends at once when the process behind it dies."""
    async with a_door() as door:
        async with a_holder(door) as child:
            await say(child, OPENING + request(1, HOLD, b"x"))
            await eventually(lambda: door.echo.held == 1)
            child.end()
            await eventually(lambda: door.echo.held == 0)
        await door.settled()


@on_both_loops
async def test_sec_36_a_connection_that_outlives_its_process() -> None:
    """SEC-36: whoever holds the socket of a dead process gets nothing in its name."""
    async with a_door() as door:
        got = door.folder / "got"
        first = (OPENING + request(1, HOLD, b"x")).hex()
        with a_python(PASSES_ON, str(door.path), first, "ended", str(got)) as child:
            assert await asyncio.to_thread(child.hear) == "open"
            await eventually(lambda: door.echo.held == 1)
            (peer,) = [one for one in REGISTRY.values() if isinstance(one, UnixPeer)]
            assert peer.pid == child.pid
            child.say("end")
            await eventually(lambda: door.echo.held == 0)
            with pytest.raises(PeerGoneError):
                peer.check_alive()
            del peer
            # The heir, which holds the connection, was told the end of the stream.
            await eventually(lambda: got.exists() and got.read_bytes() != b"")
            assert b"the calling process has ended" in got.read_bytes()
        await door.settled()


@on_both_loops
async def test_sec_36_a_new_call_in_a_dead_process_name() -> None:
    """SEC-36, SEC-31: an RPC that comes after the process ended is refused too."""
    async with a_door() as door:
        got = door.folder / "got"
        with a_python(PASSES_ON, str(door.path), OPENING.hex(), "ended", str(got)) as child:
            assert await asyncio.to_thread(child.hear) == "open"
            await eventually(lambda: len(REGISTRY) == 1)
            (peer,) = REGISTRY.values()
            assert isinstance(peer, UnixPeer)
            child.process.stdin.close()
            await asyncio.to_thread(child.process.wait, 10)
            assert not peer.alive()
            with pytest.raises(PeerGoneError):
                peer.check_alive()
            del peer
            door.door.disconnect(lambda _: True)
        await door.settled()


@on_uvloop
async def test_sec_31_exec_keeps_the_pidfd() -> None:
    """SEC-31: a process stays the caller when it runs another program; a documented limit."""
    code = (
        "import os, socket, sys\n"
        "one = socket.socket(socket.AF_UNIX)\n"
        "one.connect(sys.argv[1])\n"
        "one.sendall(bytes.fromhex(sys.argv[2]))\n"
        "os.set_inheritable(one.fileno(), True)\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        "os.execv(sys.argv[3], ['sleep', '60'])\n"
    )
    sleep = shutil.which("sleep") or "/bin/sleep"
    async with a_door() as door:
        opening = (OPENING + request(1, HOLD, b"x")).hex()
        with a_python(code, str(door.path), opening, sleep) as child:
            assert await asyncio.to_thread(child.hear) == "open"
            await eventually(lambda: door.echo.held == 1)
            child.say("exec")
            await eventually(lambda: "python" not in child.runs())
            (peer,) = REGISTRY.values()
            assert isinstance(peer, UnixPeer) and peer.pid == child.pid and peer.alive()
            del peer
            child.end()
            await eventually(lambda: door.echo.held == 0)
        await door.settled()


@on_both_loops
async def test_exited_after_the_connection_closed() -> None:
    """A future asked for after its connection closed is over, and watches no descriptor."""
    async with a_door() as door:
        async with door.channel() as channel:
            await call(channel, ECHO)
            (peer,) = REGISTRY.values()
            assert isinstance(peer, UnixPeer)
        await eventually(lambda: door.door.connections == 0)
        assert peer.exited().cancelled()
        del peer
        await door.settled()


# The inner names.


class Unknown:
    """A context whose connection did not come through a door."""

    def __init__(self, name: str) -> None:
        self._name = name

    def peer(self) -> str:
        """What grpcio would say."""
        return self._name


@pytest.mark.parametrize("name", ["unix:", "unix:/tmp/x", "ipv4:127.0.0.1:1", ""])
def test_sec_31_an_unknown_name_is_nobody(name: str) -> None:
    """SEC-31: a call that came by another way than a door is UNAUTHENTICATED."""
    with pytest.raises(UnauthenticatedError):
        peer_of(Unknown(name))


@on_both_loops
async def test_names_are_single_use_and_unguessable() -> None:
    """Each connection has a name of 128 random bits of its own, gone when it closes."""
    async with a_door() as door:
        seen: set[str] = set()
        for _ in range(20):
            async with door.channel() as channel:
                await call(channel, ECHO)
                (name,) = REGISTRY
                assert re.fullmatch(r"unix:/proc/self/fd/\d+/[0-9a-f]{32}", name)
                assert name not in seen
                seen.add(name)
            await eventually(lambda: not REGISTRY)
        await door.settled()


@on_uvloop
async def test_names_cannot_be_squatted() -> None:
    """Nobody can bind or reach an inner name: the folder is ours alone, and empty."""
    async with a_door() as door, door.channel() as channel:
        await call(channel, WHO)
        (private,) = (door.folder / "i").iterdir()
        assert private.stat().st_mode & 0o777 == 0o700
        assert list(private.iterdir()) == []


@on_uvloop
async def test_grpcio_that_hides_the_name_is_refused(
    tmp_short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ADR 1: a server that cannot tell connections apart does not start, and leaves nothing."""

    class Nameless:
        def peer(self) -> str:
            return "unix:"

    # As plain grpcio says it of a connection whose client has bound no name.
    monkeypatch.setattr(selfcheck, "peer_of", lambda _: peer_of(Nameless()))
    left = []
    for _ in range(2):  # grpcio keeps some descriptors from its first use on
        with pytest.raises(InternalError, match="install the pinned one"):
            async with FrontDoor(lambda _: None, runtime_dir=tmp_short / "i"):
                pass
        assert list((tmp_short / "i").iterdir()) == []
        await settled_traces()
        left.append(Traces.now())
    assert left[0] == left[1]


@on_uvloop
async def test_a_long_runtime_folder(tmp_short: Path) -> None:
    """The private sockets fit sun_path wherever the runtime folder lies."""
    deep = tmp_short / ("x" * 100) / ("y" * 100)
    async with FrontDoor(lambda _: None, runtime_dir=deep) as door:
        assert door.connections == 0


# Limits before attestation.


@on_both_loops
async def test_sec_81_connections_of_a_process() -> None:
    """SEC-81, table 1: a process has 20 connections; one more is closed, another's is not."""
    async with a_door() as door, contextlib.AsyncExitStack() as stack:
        raw = [await stack.enter_async_context(door.raw()) for _ in range(20)]
        await asyncio.gather(*(one.send(OPENING, request(1, HOLD, b"x")) for one in raw))
        for one in raw:
            assert await one.until(DATA) is not None
        async with door.raw() as one_more:
            assert await one_more.everything() == []
        async with a_holder(door) as child:
            await say(child, OPENING + request(1, HOLD, b"x"))
            await eventually(lambda: door.echo.held == 21)
        await raw[0].close()
        await eventually(lambda: door.door.connections == 19)
        await door.neighbour()
        assert door.door.refusals.counts["ExhaustedError"] == 1


@on_both_loops
async def test_sec_81_limits_hold_in_a_burst() -> None:
    """SEC-81: of 60 connections at the same moment exactly the limit is let in."""
    async with a_door(limits=DoorLimits(per_pid=10)) as door:
        async with contextlib.AsyncExitStack() as stack:
            made = [asyncio.open_unix_connection(str(door.path)) for _ in range(60)]
            pairs = await asyncio.gather(*made)
            for _, writer in pairs:
                stack.callback(writer.transport.abort)
            await eventually(lambda: door.door.refusals.counts["ExhaustedError"] == 50)
            assert door.door.connections == 10
        await door.settled()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (DoorLimits(per_uid=3), "ExhaustedError"),
        (DoorLimits(connections=3), "too_many"),
        (DoorLimits(unopened_per_uid=3), "ExhaustedError"),
    ],
    ids=["per uid", "in all", "silent ones of a uid"],
)
@on_uvloop
async def test_sec_81_the_limit_and_one_over(limits: DoorLimits, reason: str) -> None:
    """SEC-81, SEC-80: each limit lets in exactly as many as it says, before any attestation."""
    async with a_door(limits=limits) as door:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(door.raw())
            await eventually(lambda: door.door.connections == 3)
            async with door.raw() as one_more:
                assert await one_more.everything() == []
            assert door.door.refusals.counts == {reason: 1}
        await eventually(lambda: door.door.connections == 0)
        await door.neighbour()
        await door.settled()


@on_uvloop
async def test_sec_81_an_opened_connection_is_not_silent_any_more() -> None:
    """SEC-81: the limit on silent connections counts only those that have not begun HTTP/2."""
    async with a_door(limits=DoorLimits(unopened_per_uid=1)) as door:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                one = await stack.enter_async_context(door.raw())
                await one.send(OPENING, request(1, HOLD, b"x"))
                assert await one.until(DATA) is not None
        await door.settled()


@on_uvloop
async def test_sec_80_the_opening_times_out() -> None:
    """SEC-80, table 1: five seconds for the preface is the default, and one byte is none."""
    limits = DoorLimits()
    assert limits.opening == timedelta(seconds=5)
    assert limits.first_request == timedelta(seconds=10)
    assert (limits.per_pid, limits.per_uid, limits.connections) == (20, 1500, 4096)
    async with a_door(limits=DoorLimits(opening=timedelta(seconds=0.1))) as door:
        async with door.raw() as client:
            await client.send(PREFACE[:1])
            assert await client.everything() == []
        await door.settled()


@on_uvloop
async def test_sec_37_admin_socket_admits_listed_uids() -> None:
    """SEC-37: a caller whose uid is not on the list is closed before it is read."""
    async with a_door() as door:
        for uids, served in (
            (frozenset({os.geteuid()}), True),
            (frozenset({os.geteuid() + 1}), False),
        ):
            path = door.folder / f"a{served}"
            await door.door.listen_unix(path, mode=0o600, allowed_uids=uids)
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                asked = call(channel, ECHO, b"x", timeout=2)
                if served:
                    assert await asked == b"x"
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await asked
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


# Nothing stays behind.


@on_both_loops
async def test_sec_31_descriptors_stay_flat() -> None:
    """SEC-31: two thousand failed calls and connections later no descriptor is left over."""
    async with a_door() as door:
        async with door.raw() as client:
            await client.send(OPENING)
            for stream in range(1, 2001, 2):
                await client.send(request(stream, "/test.Echo/Nothing"))
                assert await client.until(HEADERS, stream) is not None
        gc.collect()  # grpcio's own cycles; a connection of ours must go away without it
        gc.disable()
        try:
            for data in (b"", b"x", PREFACE, OPENING, OPENING + request(1, WHO)):
                for _ in range(200):
                    async with door.raw() as client:
                        with contextlib.suppress(ConnectionError):
                            await client.send(data)
            await door.settled()
        finally:
            gc.enable()


@on_both_loops
async def test_disconnect_cuts_the_unwanted_alone() -> None:
    """Cutting by peer ends those connections at once, and no other."""
    async with a_door() as door, a_holder(door) as child:
        await say(child, OPENING + request(1, HOLD, b"x"))
        async with door.raw() as own:
            await own.send(OPENING, request(1, HOLD, b"x"))
            await eventually(lambda: door.echo.held == 2)
            assert door.door.disconnect(lambda one: getattr(one, "pid", 0) == child.pid) == 1
            await eventually(lambda: door.echo.held == 1)
            await own.send(request(3, ECHO, b"still"))
            assert await own.until(DATA, 3) is not None


@on_both_loops
async def test_close_leaves_nothing() -> None:
    """Closing a busy door ends its connections, removes its socket, and may be done twice."""
    gc.collect()
    async with a_door() as door, contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(door.raw()) for _ in range(4)]
        for at, one in enumerate(busy):
            await one.send([b"", PREFACE, OPENING, OPENING + request(1, HOLD, b"x")][at])
        await eventually(lambda: door.echo.held == 1 and door.door.connections == 4)
        await door.door.close(timedelta(0))
        assert door.door.connections == 0 and not REGISTRY
        assert not door.path.exists()
        for one in busy:
            await one.everything()
        await door.door.close(timedelta(0))


@on_uvloop
async def test_close_gives_running_calls_their_grace() -> None:
    """SEC-108: a call that is running when the door closes is answered inside the grace."""
    async with a_door() as door, door.channel() as channel:
        chat = channel.stream_stream("/test.Echo/Chat")(timeout=10)
        await chat.write(b"one")
        assert await chat.read() == b"one"
        closing = asyncio.create_task(door.door.close(timedelta(seconds=5)))
        await eventually(lambda: not door.path.exists())
        await chat.write(b"two")
        assert await chat.read() == b"two"
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF
        await asyncio.wait_for(closing, 5)


# Twenty connections of another process, held until it ends.
CROWD = """
import socket, sys
held = [socket.socket(socket.AF_UNIX) for _ in range(20)]
for one in held:
    one.connect(sys.argv[1])
    one.sendall(bytes.fromhex(sys.argv[2]))
print("open", flush=True)
sys.stdin.read()
"""


@on_both_loops
async def test_sec_84_out_of_descriptors() -> None:
    """SEC-84: without descriptors new callers wait or are shed, nothing spins, and it heals."""
    async with a_door() as door:
        said = (OPENING + request(1, HOLD, b"x")).hex()
        with a_python(CROWD, str(door.path), said) as crowd:
            failed = door.door.refusals.counts
            with no_descriptors_left():
                await eventually(lambda: failed["accept_failed"] >= 1)
                tries = failed["accept_failed"]
                await asyncio.sleep(0.5)  # what is measured: how often it is tried meanwhile
                assert failed["accept_failed"] - tries <= 6
                assert door.echo.held == 0
            assert await asyncio.to_thread(crowd.hear) == "open"
            await eventually(lambda: door.echo.held == 20)
        await door.neighbour()
        await door.settled()


@on_uvloop
async def test_sec_80_refusals_are_logged_once_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SEC-80: a flood of refusals is counted, and is no flood of log lines."""
    caplog.set_level("INFO", "spiffe_wire")
    async with a_door(limits=DoorLimits(per_pid=1)) as door:
        async with door.raw() as inside:
            await inside.send(OPENING)
            await eventually(lambda: door.door.connections == 1)
            for _ in range(50):
                async with door.raw() as one_more:
                    assert await one_more.everything() == []
        assert door.door.refusals.counts["ExhaustedError"] == 50
        assert 1 <= caplog.messages.count("connection_refused") <= 5
        await door.settled()


@pytest.fixture
def tmp_short() -> Iterator[Path]:
    """A private folder with a short name."""
    with a_folder() as folder:
        yield folder
