"""
Callers that are other users, or live in other namespaces (SEC-31, SEC-37, SEC-81).

A socket that they can reach lies below /run, as in production; each caller is a real
process that takes its identity before it connects.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from spiffe_wire.frontdoor.door import DoorLimits
from spiffe_wire.frontdoor.peer import REGISTRY, UnixPeer
from tests.support.children import Child, a_python
from tests.support.door import HOLD, Door, a_door, eventually, on_uvloop
from tests.support.http2 import OPENING, request
from tests.support.stack import ROOT

pytestmark = pytest.mark.root
NOBODY = 65534
HOLDING = (OPENING + request(1, HOLD, b"x")).hex()

# Takes a uid and a gid, connects and says what became of it; more arguments change the order.
CALLER = """
import os, socket, sys
path, uid, gid, data, *late = sys.argv[1:]
one = socket.socket(socket.AF_UNIX)

def become():
    os.setgroups([])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))

if not late:
    become()
try:
    one.connect(path)
    if late:
        become()
    one.sendall(bytes.fromhex(data))
    print("open", flush=True)
    print("answered" if one.recv(1) else "closed", flush=True)
except PermissionError:
    print("no permission", flush=True)
except ConnectionError:
    print("closed", flush=True)
sys.stdin.read()
"""
# Proves one caller of a socket of its own, from inside whatever namespace it was put in.
PROVER = """
import json, os, socket, sys
from spiffe_core.errors import UnauthenticatedError
from spiffe_wire.frontdoor.kernel import PeerPolicy, prove
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listener.listen()
print("ready", flush=True)
accepted, _ = listener.accept()
try:
    peer = prove(accepted, PeerPolicy.ALLOW_FALLBACK, old_kernel="old" in sys.argv)
    print(json.dumps({"pid": peer.pid, "uid": peer.uid, "gid": peer.gid}), flush=True)
except UnauthenticatedError as error:
    print(json.dumps({"refused": str(error)}), flush=True)
"""


@pytest.fixture
def run() -> Iterator[Path]:
    """A folder below /run that every user may enter."""
    if os.geteuid():
        pytest.skip("left out: only root can be other users")
    folder = Path(tempfile.mkdtemp(prefix="si-", dir="/run"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def a_public_door(run: Path, mode: int = 0o666, **listen: object) -> AsyncIterator[Door]:
    """A door on a socket that other users reach."""
    limits = listen.pop("limits", None)
    async with a_door(limits=limits) as door:
        door.path = run / "s"
        await door.door.listen_unix(door.path, mode=mode, **listen)
        yield door


@contextlib.contextmanager
def a_caller(door: Door, uid: int, gid: int = 0, *late: str) -> Iterator[Child]:
    """A process of *uid* and *gid* that holds a stream."""
    with a_python(CALLER, str(door.path), str(uid), str(gid or uid), HOLDING, *late) as child:
        yield child


async def heard(child: Child) -> str:
    """The next line of *child*."""
    return await asyncio.to_thread(child.hear)


async def turned_away(child: Child) -> None:
    """See *child* closed, before or after it had said something."""
    if (line := await heard(child)) == "open":
        line = await heard(child)
    assert line == "closed"


def peers() -> list[UnixPeer]:
    """Every caller of now."""
    return [one for one in REGISTRY.values() if isinstance(one, UnixPeer)]


@on_uvloop
async def test_sec_31_callers_of_many_uids(run: Path) -> None:
    """SEC-31, WEP-16: seven users at once are told apart by uid, gid and pid."""
    async with a_public_door(run) as door, contextlib.AsyncExitStack() as stack:
        callers = {
            uid: stack.enter_context(a_caller(door, uid, uid + 1000))
            for uid in range(5001, 5008)
        }
        await eventually(lambda: door.echo.held == 7)
        found = {(one.uid, one.gid, one.pid) for one in peers()}
        assert found == {(uid, uid + 1000, one.pid) for uid, one in callers.items()}


@on_uvloop
async def test_sec_31_credentials_are_those_of_connect(run: Path) -> None:
    """SEC-31: what a process becomes later does not change who connected."""
    async with a_public_door(run) as door:
        with a_caller(door, 5001, 5001, "late"):
            await eventually(lambda: door.echo.held == 1)
            assert [(one.uid, one.gid) for one in peers()] == [(0, 0)]


@on_uvloop
async def test_sec_31_the_fall_back_serves_who_dropped_privileges(run: Path) -> None:
    """SEC-31: on an old kernel a daemon that gave up root before it connected is served."""
    async with a_public_door(run, old_kernel=True) as door:
        with a_caller(door, 5001):
            await eventually(lambda: door.echo.held == 1)
            assert [(one.uid, one.proof.value) for one in peers()] == [(5001, "fallback")]


@on_uvloop
async def test_sec_37_a_private_socket_keeps_others_out(run: Path) -> None:
    """SEC-37: a socket of mode 0600 cannot be opened by another user."""
    async with a_public_door(run, 0o600) as door:
        with a_caller(door, 5001) as child:
            assert await heard(child) == "no permission"
        with a_caller(door, 0) as child:
            assert await heard(child) == "open"


@on_uvloop
async def test_sec_37_the_list_of_uids_decides(run: Path) -> None:
    """SEC-37: on a socket with a list, a listed user is served and any other is closed."""
    async with a_public_door(run, allowed_uids=frozenset({5001})) as door:
        with a_caller(door, 5001) as listed, a_caller(door, 5002) as other:
            assert (await heard(listed), await heard(listed)) == ("open", "answered")
            await turned_away(other)
            await eventually(lambda: door.door.refusals.counts["ForbiddenError"] == 1)
            assert [one.uid for one in peers()] == [5001]


@on_uvloop
async def test_sec_81_one_user_cannot_starve_another(run: Path) -> None:
    """SEC-81: a user at the limit of connections is refused one more; another user is not."""
    async with a_public_door(run, limits=DoorLimits(per_uid=3)) as door:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(a_caller(door, 5001))
            await eventually(lambda: door.echo.held == 3)
            one_more = stack.enter_context(a_caller(door, 5001))
            await turned_away(one_more)
            assert door.door.refusals.counts["ExhaustedError"] == 1
            stack.enter_context(a_caller(door, 5002))
            await eventually(lambda: door.echo.held == 4)


@on_uvloop
async def test_sec_31_nobody_is_a_user_on_a_plain_host(run: Path) -> None:
    """SEC-31: where every ID has a name, 65534 is the user nobody, and is served."""
    with open("/proc/self/uid_map") as file:
        if file.read().split() != ["0", "0", "4294967295"]:
            pytest.skip("left out: we are in a user namespace, where 65534 means unknown")
    async with a_public_door(run) as door:
        with a_caller(door, NOBODY, NOBODY):
            await eventually(lambda: door.echo.held == 1)
            assert [(one.uid, one.gid) for one in peers()] == [(NOBODY, NOBODY)]


# Namespaces.


def unshare(*flags: str) -> list[str]:
    """A command that puts what follows into new namespaces."""
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("left out: unshare(1) is not installed, so we have no namespace")
    probe = subprocess.run([program, *flags, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"left out: the kernel refuses {flags}: {probe.stderr.decode().strip()}")
    return [program, *flags]


def proved_in(namespace: list[str], run: Path, uid: int, *prover: str) -> dict[str, object]:
    """What a server inside *namespace* learns of a caller of *uid* outside it."""
    path = run / f"p{uid}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [*namespace, sys.executable, "-c", PROVER, str(path), *prover],
        stdout=subprocess.PIPE,
        env=environment,
    )
    with server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"ready\n"
            arguments = (str(path), str(uid), str(uid), "00")
            with a_python(CALLER, *arguments):
                return dict(json.loads(server.stdout.readline()))
        finally:
            server.kill()


@pytest.mark.parametrize("road", ["new", "old"])
def test_sec_31_a_caller_out_of_our_pid_namespace(road: str, run: Path) -> None:
    """SEC-31: a caller that has no number in our PID namespace (pid 0) is refused."""
    namespace = unshare("--pid", "--fork", "--mount-proc")
    assert proved_in(namespace, run, 5001, road) == {
        "refused": "the caller lives in a PID namespace out of our sight"
    }


@on_uvloop
async def test_sec_31_a_caller_in_a_pid_namespace_below_ours(run: Path) -> None:
    """SEC-31: a caller in a container is known by its number in our namespace."""
    namespace = unshare("--pid", "--fork", "--mount-proc")
    async with a_public_door(run) as door:
        arguments = [CALLER, str(door.path), "5001", "5001", HOLDING]
        inside = subprocess.Popen(
            [*namespace, sys.executable, "-c", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        with inside:
            await eventually(lambda: door.echo.held == 1)
            (peer,) = peers()
            assert peer.uid == 5001 and peer.pid > 1
            assert Path(f"/proc/{peer.pid}/cmdline").read_bytes().count(b"5001") == 2
            os.kill(peer.pid, 9)  # our own child's child
            await eventually(lambda: door.echo.held == 0)
            inside.kill()


def test_sec_31_an_overflow_uid(run: Path) -> None:
    """SEC-31: a user that our user namespace has no name for is refused, whoever it is."""
    namespace = unshare("--user", "--map-root-user")
    refused = {"refused": "the caller's uid or gid has no meaning here"}
    assert proved_in(namespace, run, 5001) == refused
    assert proved_in(namespace, run, NOBODY) == refused
    # Its twin that is right: root outside is root inside this namespace.
    found = proved_in(namespace, run, 0)
    assert (found.get("uid"), found.get("gid")) == (0, 0)


@on_uvloop
async def test_sec_31_root_of_its_own_user_namespace(run: Path) -> None:
    """SEC-31: a user that made itself root in a namespace of its own is that user to us."""
    unshare("--user", "--map-root-user")
    code = (
        "import ctypes, os, socket, sys\n"
        "os.setgroups([]); os.setresgid(5001, 5001, 5001); os.setresuid(5001, 5001, 5001)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # or /proc/self would be root's
        "if ctypes.CDLL(None).unshare(0x10000000):\n"
        "    print('left out', flush=True); sys.exit()\n"
        "open('/proc/self/setgroups', 'w').write('deny')\n"
        "open('/proc/self/uid_map', 'w').write('0 5001 1')\n"
        "open('/proc/self/gid_map', 'w').write('0 5001 1')\n"
        "one = socket.socket(socket.AF_UNIX)\n"
        "one.connect(sys.argv[1])\n"
        "one.sendall(bytes.fromhex(sys.argv[2]))\n"
        "print(os.geteuid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    async with a_public_door(run) as door:
        with a_python(code, str(door.path), HOLDING) as child:
            said = await heard(child)
            if said == "left out":
                pytest.skip("left out: the kernel lets no ordinary user make a user namespace")
            assert said == "0"
            await eventually(lambda: door.echo.held == 1)
            assert [(one.uid, one.gid) for one in peers()] == [(5001, 5001)]
