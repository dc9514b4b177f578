"""SVIDs as files where root is needed: as a container's first process, and for another user."""

import asyncio
import os
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.programs import DONE, environment, ran
from tests.support.stack import ROOT, a_folder
from workload_api.client.testing import FakeWorkloadApi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and other users"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv"),
]
UID = 61001
AGENT = (sys.executable, "-m", "workload_api.agent")
AS_FIRST = (
    "unshare",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child",
    *AGENT,
    "run-with",
    "--",
)
ORPHANS = """
import os, time
for _ in range(5):
    if not os.fork():
        if not os.fork():
            time.sleep(0.1)
        os._exit(0)
    os.wait()
deadline = time.monotonic() + 10
while True:
    time.sleep(0.1)
    left = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with open(f"/proc/{name}/stat") as file:
                left[name] = file.read().rpartition(")")[2].split()[:2]
    theirs = [one for one in left.values() if one[1] == "1"]
    if theirs == [["R", "1"]] or time.monotonic() > deadline:
        break
print(os.getppid(), theirs)
"""
"""Leaves five orphans to the first process, and looks what became of them."""
WAITS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
print("up", flush=True)
signal.pause()
"""


@pytest.fixture
def fake() -> Iterator[FakeWorkloadApi]:
    """An agent for which we are ``/web``."""
    with FakeWorkloadApi("/web") as made:
        yield made


async def test_the_first_process_reaps(fake: FakeWorkloadApi) -> None:
    """As the first process of a container run-with reaps orphans, and ends with its command."""
    done = await ran(*AS_FIRST, sys.executable, "-S", "-c", ORPHANS, env=fake.environment)
    assert (done.code, done.out) == (DONE, "1 [['R', '1']]\n"), done.err


async def test_the_first_process_passes_signals_on(fake: FakeWorkloadApi) -> None:
    """TERM, which the kernel keeps from a first process without a handler, ends the command."""
    process = await asyncio.create_subprocess_exec(
        *AS_FIRST, sys.executable, "-S", "-c", WAITS, stdout=asyncio.subprocess.PIPE,
        env=environment(fake.environment), cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 15) == b"up\n"
        # unshare's child is the first process of the new namespace.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 9
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_files_of_another_user(fake: FakeWorkloadApi) -> None:
    """With `owner` the files are the other user's, who can read the key; a third one cannot."""
    with a_folder(open_to_all=True) as folder:
        settings = {
            "dir": f"{folder}/svids",
            "x509": [{}],
            "files": {"owner": str(UID), "group": str(UID)},
        }
        (folder / "sidecar.yaml").write_text(yaml.safe_dump(settings))
        done = await ran(*AGENT, "sidecar", "-c", folder / "sidecar.yaml", "--once",
                         env=fake.environment)  # fmt: skip
        assert done.code == DONE, done.err
        key = folder / "svids" / "svid.key"
        found = key.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (UID, UID, 0o600)
        for uid, code in ((UID, 0), (UID + 1, 1)):
            read = await ran("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
                             "cat", key)  # fmt: skip
            assert read.code == code
