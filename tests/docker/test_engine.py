"""The engine that these tests start leaves this machine as it found it."""

import os
import uuid
from pathlib import Path

import pytest

from tests.support.containers import Engine, pod_cgroup, why_not

pytestmark = pytest.mark.docker


async def test_nothing_is_left() -> None:
    """Processes, mounts, cgroups and files of an engine and its containers end with it."""
    if reason := why_not():
        pytest.skip(reason)
    uid = str(uuid.uuid4())
    with Engine() as engine:
        for cgroup in (pod_cgroup(uid), ""):
            container = await engine.create("sleep", "60", cgroup=cgroup)
            await container.start()
        pid = await container.pid()
        assert str(engine.folder) in mounts_of(pid)
        assert str(engine.folder) not in mounts_of(os.getpid()), "they are its own"
        assert list(Path("/sys/fs/cgroup").glob(f"**/pod{uid}"))
    assert not engine.folder.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert list(Path("/sys/fs/cgroup").glob(f"**/pod{uid}")) == []
    assert str(engine.folder) not in mounts_of(os.getpid())


def mounts_of(pid: int) -> str:
    """What is mounted where a process is."""
    return Path(f"/proc/{pid}/mountinfo").read_text()
