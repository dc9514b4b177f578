"""
Pods: from connect() in a real container to an SVID, where all but the API server is real.

The cgroups of these containers are exactly a kubelet's, and the processes in them are proved
by the kernel; the API server is the stand-in that `tests/contract` holds against the facts.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from demo.casting import Role
from demo.player import Player
from demo.pods.forger import delegated
from tests.support.containers import ROOT, Engine, pod_cgroup, python
from tests.support.podstack import PodStack, a_pod, a_pod_stack, a_pod_workload
from tests.support.programs import Programs, Ran
from tests.support.stack import Stack

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]

UID = 61_234
SOON = 5.0
"""Seconds within which a stream follows its pod (SEC-36); it takes milliseconds."""

ENTRIES = {
    "/web": ("k8s:ns:shop", "k8s:sa:web"),
    "/app": ("k8s:ns:parts", "k8s:container-name:app"),
    "/proxy": ("k8s:ns:parts", "k8s:container-name:proxy"),
    "/gold": ("k8s:ns:labels", "k8s:pod-label:tier:gold"),
    "/silver": ("k8s:ns:labels", "k8s:pod-label:tier:silver"),
    "/set": ("k8s:ns:sets", "k8s:pod-name:db-0"),
}

CHILD = """
import asyncio, os, sys
from workload_api.client.client import WorkloadClient
async def ask():
    async with WorkloadClient() as client:
        context = await client.fetch_x509()
        print(*(one.svid.spiffe_id.path for one in context.identities))
if os.fork():
    os.waitpid(-1, 0)
elif sys.argv[1:] == ["again"]:
    asyncio.run(ask())
else:
    os.execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], "again"])
"""
"""Asks from a grandchild that became another program."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[PodStack]:
    """
    A cluster, a server, the agent of this node, and `ENTRIES`.

    Other pods of this node have every identity of these, so that the agent holds each: who is
    refused one is not refused for want of it.
    """
    async with a_pod_stack() as made:
        for path, selectors in ENTRIES.items():
            await made.add_entry(path, *selectors)
        made.cluster.pod("other")
        made.cluster.pod("other", "parts", containers=("app", "proxy"))
        for tier in ("gold", "silver"):
            made.cluster.pod(f"other-{tier}", "labels", labels={"tier": tier})
        await made.agent.until_svids(5)
        yield made


async def explained(stack: PodStack, pid: int) -> Ran:
    """What ``issuer explain --pid`` says."""
    programs = Programs.of(Stack(stack.folder, stack.server, stack.agent))
    return await programs.issuer("explain", "--pid", str(pid))


@pytest.mark.parametrize(
    ("quality", "namespace"),
    [
        ("besteffort", "host"),
        ("besteffort", "private"),
        ("burstable", "private"),
        ("guaranteed", "private"),
    ],
)
async def test_sec_33_an_svid_by_account(
    engine: Engine, stack: PodStack, quality: str, namespace: str
) -> None:
    """SEC-31, SEC-33: a container of a pod gets what its namespace and account have."""
    pod = a_pod(stack, f"{quality}-{namespace}")
    async with a_pod_workload(
        engine,
        stack,
        pod,
        cgroup=pod_cgroup(pod.uid, quality),
        user=UID,
        options=("--cgroupns", namespace),
    ) as workload:
        assert await workload.fetched() == {"/web"}
        learnt = (await explained(stack, workload.pid)).out
        assert f"k8s:pod-uid:{pod.uid}" in learnt
        assert "k8s:container-name:app" in learnt


async def test_sec_33_a_static_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-33: a pod of the kubelet's own files is known by the hash that its cgroup names."""
    pod = a_pod(stack, "static-n1", namespace="parts", static=True)
    digest = pod.body["metadata"]["annotations"]["kubernetes.io/config.hash"]
    assert digest != pod.uid
    async with a_pod_workload(engine, stack, pod, cgroup=pod_cgroup(digest)) as workload:
        await workload.gets("/app")


async def test_sec_33_two_containers_of_a_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-33: each container of a pod has an identity of its own, and not its neighbour's."""
    pod = a_pod(stack, "pair", namespace="parts", containers=("app", "proxy"))
    async with (
        a_pod_workload(engine, stack, pod, known_as="app") as app,
        a_pod_workload(engine, stack, pod, known_as="proxy") as proxy,
    ):
        assert await app.fetched() == {"/app"}
        assert await proxy.fetched() == {"/proxy"}


async def test_sec_36_a_relabelled_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-36: an open stream loses and gains identities with the labels of its pod, at once."""
    pod = a_pod(stack, "labelled", namespace="labels", labels={"tier": "gold"})
    async with a_pod_workload(engine, stack, pod) as workload:
        await workload.watch()
        await workload.svids("/gold")
        since = workload.seen
        stack.cluster.relabel(pod, {"tier": "silver"})
        await workload.svids("/silver", since=since)
        changed = since, workload.seen
        stack.cluster.relabel(pod, {"tier": "tin"})
        answer = await workload.denied(since=changed[1])
        assert answer["kind"] == "FORBIDDEN"
        stack.cluster.relabel(pod, {"tier": "gold"})
        await workload.svids("/gold", since=changed[1])
        assert "/gold" not in str(workload.player.seen[changed[0] : changed[1]])


async def test_sec_36_a_deleted_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-36: when its pod is deleted a stream ends, although its process runs on."""
    pod = a_pod(stack, "deleted")
    async with a_pod_workload(engine, stack, pod) as workload:
        await workload.watch()
        await workload.svids("/web")
        since = workload.seen
        stack.cluster.delete_pod(pod)
        await workload.denied(since=since)
        assert await workload.fetched() == set()


async def test_sec_33_a_recreated_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-33: a pod made anew under its name is another: the old one's process has nothing."""
    old = a_pod(stack, "db-0", namespace="sets")
    only_old = await stack.add_entry("/old", f"k8s:pod-uid:{old.uid}")
    async with a_pod_workload(engine, stack, old) as before:
        await before.gets("/set", "/old")
        new = stack.cluster.recreate_pod(old)
        assert new.uid != old.uid
        async with a_pod_workload(engine, stack, new) as after:
            await after.gets("/set")
            assert await after.fetched() == {"/set"}
            assert await before.fetched() == set()
    await stack.server.delete_entries(only_old)


async def test_sec_33_a_container_that_starts_before_it_is_known(
    engine: Engine, stack: PodStack
) -> None:
    """SEC-33: who is faster than the API server's news waits for it, and is then served."""
    pod = a_pod(stack, "early")
    async with a_pod_workload(engine, stack, pod, known_as="") as workload:
        await workload.watch()
        stack.cluster.start_container(pod, "app", workload.container.id, scheme="docker")
        await workload.svids("/web")
        assert not [one for one in workload.player.seen if one["event"] == "denied"]


async def test_sec_35_a_container_nobody_knows(engine: Engine, stack: PodStack) -> None:
    """SEC-35: a container that the API server does not know gets nothing; explain says why."""
    pod = a_pod(stack, "silent")
    async with a_pod_workload(engine, stack, pod, known_as="") as workload:
        assert await workload.fetched() == set()
        told = await explained(stack, workload.pid)
        assert told.code == 1
        assert f"has not told of container {workload.container.id[:12]}" in told.out


async def test_sec_33_a_container_of_another_pod(engine: Engine, stack: PodStack) -> None:
    """SEC-33: a container that runs below one pod and is listed in another is in neither."""
    listed = a_pod(stack, "listed")
    elsewhere = a_pod(stack, "elsewhere")
    async with a_pod_workload(
        engine, stack, listed, cgroup=pod_cgroup(elsewhere.uid)
    ) as workload:
        assert await workload.fetched() == set()
        told = (await explained(stack, workload.pid)).out
        assert f"names pod {elsewhere.uid}, its container is one of pod shop/listed" in told


@pytest.mark.parametrize("uid", [0, UID])
async def test_sec_33_children_of_a_container(
    engine: Engine, stack: PodStack, uid: int
) -> None:
    """SEC-33: what a container's processes start, and become, is in it still."""
    pod = a_pod(stack, f"parent-{uid}")
    options = ("--env", f"CODE={CHILD}")
    async with a_pod_workload(engine, stack, pod, options=options) as workload:
        told = await workload.container.run(*python("-c", CHILD), user=str(uid))
        assert told.split() == ["/web"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("{cgroup}", id="perfect-path"),
        pytest.param("kubepods.slice/kubepods-pod{slice}.slice/{scope}", id="perfect-slice"),
    ],
)
async def test_sec_33_a_forger(engine: Engine, stack: PodStack, path: str) -> None:
    """SEC-33: an ordinary user who puts a real pod's path below his own folder gets nothing."""
    pod = a_pod(stack, f"forged-{uuid.uuid4().hex[:6]}")
    async with a_pod_workload(engine, stack, pod) as workload:
        forged = path.format(
            cgroup=f"{pod_cgroup(pod.uid)}/{workload.container.id}",
            slice=pod.uid.replace("-", "_"),
            scope=f"cri-containerd-{workload.container.id}.scope",
        )
        async with a_forger(stack, forged) as forger:
            with open(f"/proc/{forger.pid}/cgroup") as file:
                assert f"user-{UID}.slice/user@{UID}.service/{forged.strip('/')}" in file.read()
            await forger.do("fetch")
            assert (await forger.expect("fetched"))["svids"] == {}
            told = await explained(stack, forger.pid)
            assert told.code == 1
            assert "is below none of the configured prefixes" in told.out
        assert await workload.fetched() == {"/web"}, "the real one goes on"


MOVES = """
import asyncio, ctypes, os, sys
from spiffe_core.errors import SpiffeError
from workload_api.client.client import WorkloadClient
libc = ctypes.CDLL(None, use_errno=True)
for line in open("/proc/self/cgroup"):
    number, controllers, _ = line.rstrip().split(":", 2)
    place, kind = f"/tmp/{number}", b"cgroup" if controllers else b"cgroup2"
    options = controllers.replace("name=", "none,name=").encode() or None
    os.mkdir(place)
    if libc.mount(b"none", place.encode(), kind, 0, options):
        raise OSError(ctypes.get_errno(), line)
    os.makedirs(f"{place}/{sys.argv[1]}")
    with open(f"{place}/{sys.argv[1]}/cgroup.procs", "w") as file:
        file.write("0")
async def ask():
    async with WorkloadClient() as client:
        try:
            context = await client.fetch_x509()
            print(*(one.svid.spiffe_id.path for one in context.identities))
        except SpiffeError as error:
            print(error.kind.name)
asyncio.run(ask())
"""
"""Moves itself, in every hierarchy, to a cgroup below its container's own; then it asks."""


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        pytest.param("init.scope/worker", "/web", id="as-systemd-does"),
        pytest.param("kubepods/besteffort/pod{uid}/{id}", "FORBIDDEN", id="another-pod"),
        pytest.param("pod{uid}/{id}", "FORBIDDEN", id="another-pod-in-short"),
        pytest.param("{id}", "FORBIDDEN", id="another-container"),
    ],
)
async def test_sec_33_a_forger_inside_a_pod(
    engine: Engine, stack: PodStack, path: str, answer: str
) -> None:
    """SEC-33: a pod that may mount can divide its own cgroup, and pass for no other with it."""
    victim = stack.cluster.pod(f"victim-{uuid.uuid4().hex[:6]}", "parts")
    pod = a_pod(stack, f"inside-{uuid.uuid4().hex[:6]}")
    options = ("--cgroupns", "private", "--cap-add", "SYS_ADMIN")
    async with a_pod_workload(engine, stack, pod, options=options) as workload:
        await workload.gets("/web")
        moved = path.format(uid=victim.uid, id=victim.container_id())
        assert await workload.container.run(*python("-c", MOVES, moved)) == answer


async def test_sec_36_a_restarted_container(engine: Engine, stack: PodStack) -> None:
    """SEC-36: when the pod has another container in its place, the old one's stream ends."""
    pod = a_pod(stack, "restarted")
    async with a_pod_workload(engine, stack, pod) as old:
        await old.gets("/web")
        since = old.seen
        async with a_pod_workload(engine, stack, pod) as new:
            await old.denied(since=since)
            await new.gets("/web")


async def test_sec_106_an_agent_that_is_killed(engine: Engine, stack: PodStack) -> None:
    """SEC-106: a pod finds the agent again behind the folder it was given; server or not."""
    pod = a_pod(stack, "patient")
    async with a_pod_workload(engine, stack, pod) as workload:
        await workload.gets("/web")
        stack.agent.process.kill()
        since = workload.seen
        await stack.agent.start()
        await workload.svids("/web", since=since)


async def test_sec_106_an_api_server_that_is_away(engine: Engine, stack: PodStack) -> None:
    """SEC-106: known pods are served on; one that starts meanwhile is when it is back."""
    known, later = a_pod(stack, "known"), a_pod(stack, "later")
    async with a_pod_workload(engine, stack, known) as before:
        await before.gets("/web")
        await stack.cluster.stop()
        try:
            async with a_pod_workload(engine, stack, later) as after:
                await after.watch()
                assert await before.fetched() == {"/web"}
                told = await explained(stack, after.pid)
                assert "has not told of container" in told.out
                await stack.cluster.start()
                await after.svids("/web")
        finally:
            await stack.cluster.start()


@contextlib.asynccontextmanager
async def a_forger(stack: PodStack, path: str) -> AsyncIterator[Player]:
    """A process of an ordinary user that forged *path*, and can reach the agent's socket."""
    with delegated(UID) as folder:
        command = (sys.executable, "-m", "demo.pods.forger", str(UID), str(folder), path)
        role = Role("forger", command, {"PYTHONPATH": str(ROOT)}, None, ())
        async with Player(role, stack.agent.endpoint) as player:
            assert os.stat(f"/proc/{player.pid}").st_uid == UID
            yield player
