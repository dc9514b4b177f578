"""What the kernel writes for containers that really run, as our parser reads it."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.support.containers import Container, Engine, Podman, a_kubelet_runs, pod_cgroup
from workload_api.attestors.cgroup import (
    CgroupError,
    CgroupLayout,
    ContainerRef,
    container_of,
    read_cgroup,
)

pytestmark = pytest.mark.docker

PODS, ENGINE = CgroupLayout.pods(), CgroupLayout.engine()
STATIC = "0123456789abcdef0123456789abcdef"
"""The UID of a pod that the kubelet has from a file."""


@asynccontextmanager
async def sleeping(
    engine: Engine, cgroup: str = "", options: Sequence[str] = ()
) -> AsyncIterator[tuple[Container, int]]:
    """A container that sleeps, and its process."""
    container = await engine.create("sleep", "60", cgroup=cgroup, options=options)
    try:
        await container.start()
        yield container, await container.pid()
    finally:
        await container.remove()


@pytest.mark.parametrize("namespace", ["host", "private"])
@pytest.mark.parametrize(
    ("parent", "uid"),
    [
        pytest.param(pod_cgroup("{uid}"), None, id="besteffort"),
        pytest.param(pod_cgroup("{uid}", "burstable"), None, id="burstable"),
        pytest.param(pod_cgroup("{uid}", "guaranteed"), None, id="guaranteed"),
        pytest.param(pod_cgroup("{uid}"), STATIC, id="static-pod"),
        pytest.param(pod_cgroup("{uid}", root="/kubepods"), None, id="kubepods"),
    ],
)
async def test_sec_33_container_of_a_pod(
    engine: Engine, parent: str, uid: str | None, namespace: str
) -> None:
    """SEC-33: the cgroup of a container below a pod's names both, whatever it sees itself."""
    if parent.startswith("/kubepods") and a_kubelet_runs():
        pytest.skip("a kubelet runs here, and ends what it does not know below /kubepods")
    uid = uid or str(uuid.uuid4())
    options = ("--cgroupns", namespace)
    async with sleeping(engine, parent.format(uid=uid), options) as (container, pid):
        text = read_cgroup(pid)
        assert container_of(text, PODS) == ContainerRef(container.id, uid)
        assert container_of(text, ENGINE) is None, "the engine's attestor leaves it alone"
        inside = await container.run("cat", "/proc/1/cgroup")
        assert (uid in inside) is (namespace == "host")


async def test_sec_33_container_of_the_engine(engine: Engine) -> None:
    """SEC-33: Docker's own containers are named by theirs, and are in no pod."""
    async with sleeping(engine) as (container, pid):
        text = read_cgroup(pid)
        assert container_of(text, ENGINE) == ContainerRef(container.id)
        assert container_of(text, PODS) is None


async def test_sec_33_container_of_podman(podman: Podman) -> None:
    """SEC-33: Podman's containers with runc are named by theirs, and are in no pod."""
    async with sleeping(podman) as (container, pid):
        text = read_cgroup(pid)
        assert container_of(text, ENGINE) == ContainerRef(container.id)
        assert container_of(text, PODS) is None


async def test_sec_33_every_process_of_a_container(engine: Engine) -> None:
    """SEC-33: a process that joins a running container is in the same one."""
    uid = str(uuid.uuid4())
    async with sleeping(engine, pod_cgroup(uid)) as (container, _):
        await container.run("sh", "-c", "sleep 60 >/dev/null 2>&1 &")
        found = {container_of(read_cgroup(pid), PODS) for pid in await container.pids()}
        assert found == {ContainerRef(container.id, uid)}
        assert len(await container.pids()) == 2


@pytest.mark.parametrize(
    "parent",
    [
        pytest.param(
            "/user.slice/user-1000.slice/kubepods/besteffort/pod{uid}", id="delegated"
        ),
        pytest.param(pod_cgroup("{uid}") + "/" + 64 * "a", id="inside-another-container"),
        pytest.param("/kubelet/kubepods/besteffort/pod{uid}/pod{uid}", id="two-pods"),
        pytest.param("/kubelet/kubepods/besteffort", id="no-pod"),
    ],
)
async def test_sec_33_a_real_container_in_a_wrong_place(engine: Engine, parent: str) -> None:
    """SEC-33: a container that runs where no kubelet puts one is refused, however real."""
    async with sleeping(engine, parent.format(uid=uuid.uuid4())) as (_, pid):
        with pytest.raises(CgroupError):
            container_of(read_cgroup(pid), PODS)
