"""Who serves a container engine's socket: other users' are not believed (SEC-34)."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cgroups import CONTAINER
from tests.support.children import Child, a_python
from tests.support.engine import a_container
from tests.support.stack import a_folder
from workload_api.attestors.engine import Engine, EngineError

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user"),
]
NOBODY = 65534

# The kernel notes who listens, not who bound or accepts.
SERVES = """
import os, socket, sys
path, uid, owner, body = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
os.chown(path, owner, owner)
os.seteuid(uid)
listener.listen()
os.seteuid(0)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    head = "HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: "
    connection.sendall(f"{head}{len(body)}\\r\\n\\r\\n".encode() + body)
    connection.close()
"""


@contextlib.contextmanager
def a_server(folder: Path, uid: int, owner: int) -> Iterator[Path]:
    """An engine that user *uid* serves, at a socket of *owner*."""
    path = folder / "engine.sock"
    answer = json.dumps(a_container())
    child: Child
    with a_python(SERVES, str(path), str(uid), str(owner), answer) as child:
        assert child.hear() == "ready"
        yield path


async def test_sec_34_roots_engine() -> None:
    """SEC-34: what root serves at a socket of root's is believed."""
    with a_folder() as folder, a_server(folder, 0, 0) as path:
        assert (await Engine(path).inspect(CONTAINER)).container.labels["app"] == "web"


async def test_sec_34_a_socket_that_belongs_to_another_user() -> None:
    """SEC-34: a socket of an ordinary user's is not connected to, whoever serves it."""
    with a_folder() as folder, a_server(folder, 0, NOBODY) as path:
        with pytest.raises(EngineError, match="belongs to uid 65534"):
            await Engine(path).inspect(CONTAINER)


async def test_sec_34_another_user_listens_at_roots_socket() -> None:
    """SEC-34: the kernel says who listens; whose the file is proves nothing of that."""
    with a_folder() as folder, a_server(folder, NOBODY, 0) as path:
        with pytest.raises(EngineError, match="is run by uid 65534"):
            await Engine(path).inspect(CONTAINER)


async def test_sec_34_a_folder_of_another_users() -> None:
    """SEC-34: in a folder that another user owns he could put any socket: not believed."""
    with a_folder() as folder, a_server(folder, 0, 0) as path:
        os.chown(folder, NOBODY, NOBODY)
        with pytest.raises(EngineError, match="belongs to uid 65534"):
            await Engine(path).inspect(CONTAINER)
