"""
Server and agent as `deploy/kubernetes` runs them: in containers, with no more rights.

Their security contexts are the manifests', and so is who runs them.  The agent's cgroup
namespace is its own or the node's; the pods that it serves are containers of the same engine.
"""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest

from tests.support import manifests
from tests.support.containers import Engine, pod_cgroup, python
from tests.support.netns import reachable
from tests.support.podstack import PodStack, a_cluster, a_pod, a_pod_workload
from tests.support.stack import AgentProcess, Process, ServerProcess

pytestmark = pytest.mark.docker
UID = 61_234
SERVER_UID = 65_532


def rights(name: str) -> tuple[str, ...]:
    """What the manifest lets the container of *name* do, as an engine takes it."""
    objects = manifests.written("base")
    pod = manifests.pod(objects, name)
    context = pod["securityContext"] | manifests.container(objects, name)["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context.get("privileged")
    assert not context["allowPrivilegeEscalation"] and "hostNetwork" not in pod
    words = ["--read-only", "--security-opt", "no-new-privileges"]
    words += ["--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
    words += ["--pid", "host"] if pod.get("hostPID") else []
    for one in context["capabilities"]["drop"]:
        words += ["--cap-drop", one]
    for one in context["capabilities"].get("add", ()):
        words += ["--cap-add", one]
    return tuple(words)


@contextlib.asynccontextmanager
async def deployed(engine: Engine, *options: str) -> AsyncIterator[PodStack]:
    """A stack that runs in containers, the agent's with these *options* beside its rights."""
    async with a_cluster(admin_uids=[0]) as stack, AsyncExitStack() as ending:
        server = stack.server
        command = python("-m", "issuer", "server", "run", "-c", str(server.config))
        for one in (server.folder, *server.folder.iterdir()):
            os.chown(one, SERVER_UID, SERVER_UID)
        # Operators ask from inside; a PID namespace of its own would not show it who these are.
        visible = ("--pid", "host")
        server.process = await contained(engine, ending, server, command, visible)
        await ending.enter_async_context(reachable(engine.pid, stack.cluster.port))
        await server.start()
        agent = await stack.new_agent("n1")
        command = python("-m", "workload_api.agent", "run", "-c", str(agent.config))
        agent.process = await contained(engine, ending, agent, command, options)
        await agent.start()
        yield stack
        for one in (agent, server):
            assert one.process.stop() == 0, "it ends in good order"


async def contained(
    engine: Engine,
    ending: AsyncExitStack,
    what: ServerProcess | AgentProcess,
    command: Sequence[str],
    options: Sequence[str],
) -> Process:
    """The same process, in a container with the rights of its manifest."""
    name = "spiffe-issuer-server" if isinstance(what, ServerProcess) else "spiffe-issuer-agent"
    container = await engine.create(
        *command,
        cgroup=pod_cgroup(str(uuid.uuid4()), "burstable"),
        folders=[what.folder],
        network="host",
        options=(*rights(name), *options),
    )
    ending.push_async_callback(container.remove)
    process = Process(list(container.attached()), what.process.log, engine.environment)
    ending.callback(process.close)
    return process


CGROUPS = "type=bind,src=/sys/fs/cgroup,dst=/sys/fs/cgroup,readonly"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--cgroupns", "host"), id="namespace-of-the-node"),
        pytest.param(("--cgroupns", "private"), id="own-namespace"),
        pytest.param(
            ("--cgroupns", "private", "--mount", CGROUPS), id="own-namespace-and-tree"
        ),
    ],
)
async def test_sec_33_with_the_rights_of_the_manifests(
    engine: Engine, options: tuple[str, ...]
) -> None:
    """SEC-33: with the manifest's rights alone it names pods, also from a cgroup namespace."""
    if "private" in options and CGROUPS not in options:
        try:
            os.readlink("/proc/1/root")
        except PermissionError:
            pytest.skip(
                "the first process of this machine is closed to root: no agent can look"
            )
    async with deployed(engine, *options) as stack:
        await stack.add_entry("/web", "k8s:ns:shop", "k8s:sa:web")
        pod = a_pod(stack)
        async with a_pod_workload(engine, stack, pod, user=UID) as workload:
            await workload.gets("/web")
            told = (await stack.agent.explain(workload.pid)).text
            assert f"k8s:pod-uid:{pod.uid}" in told
            assert f"unix:uid:{UID}" in told
            assert "unix:sha256:" in told, "of a process of another user, in another container"
            assert "could not vouch" not in told
