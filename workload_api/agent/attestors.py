"""
Builds the attestors that the settings ask for.

What reads cgroups or speaks HTTP is imported only here, and only when it is asked for: an
agent that attests nothing but local processes loads neither (A14).
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spiffe_wire.settings import SettingsError
from workload_api.agent.config import AgentSettings, Docker, Kubernetes, PodSource
from workload_api.attestors.protocol import WorkloadAttestor
from workload_api.attestors.unix import UnixAttestor

if TYPE_CHECKING:
    from spiffe_wire.k8s.client import Client
    from workload_api.attestors import k8s
    from workload_api.attestors.cgroup import CgroupView
    from workload_api.attestors.pods import PodTable


@dataclass(frozen=True, slots=True)
class Attestors:
    """The attestors of this agent, and what keeps them knowing."""

    all: list[WorkloadAttestor]
    pods: "PodTable | None" = None
    source: "k8s.PodSource | None" = None

    @property
    def problems(self) -> list[str]:
        """What keeps one from learning of what is new; what it knows it goes on with."""
        return [] if self.source is None else self.source.problems


@asynccontextmanager
async def build_attestors(
    settings: AgentSettings, *, read: Callable[[int], bytes] | None = None
) -> AsyncIterator[Attestors]:
    """
    Yield the attestors, kept in step while entered; *read* takes the place of ``/proc``.

    Raises:
        CredentialsError: there is no way to the cluster that the settings name.
        SettingsError: a cgroup prefix can match nothing.
    """
    found: list[WorkloadAttestor] = [
        UnixAttestor(hash_executables=settings.workloads.hash_executables)
    ]
    async with contextlib.AsyncExitStack() as stack:
        made = Attestors(found)
        if settings.kubernetes.workloads or settings.docker.workloads:
            from workload_api.attestors.cgroup import HOST
            from workload_api.attestors.cgroupns import own_view

            # Texts that are given are taken as the node's own.
            view = await asyncio.to_thread(own_view) if read is None else HOST
            if settings.kubernetes.workloads:
                with _prefixes_of("kubernetes"):
                    made = await _with_pods(stack, settings.kubernetes, found, view, read)
            if settings.docker.workloads:
                with _prefixes_of("docker"):
                    found.append(_docker(settings.docker, view, read))
        yield made


@contextlib.contextmanager
def _prefixes_of(section: str) -> Iterator[None]:
    from workload_api.attestors.cgroup import PrefixError

    try:
        yield
    except PrefixError as error:
        raise SettingsError(f"{section}.cgroup_prefixes: {error}") from error


async def _with_pods(
    stack: contextlib.AsyncExitStack,
    settings: Kubernetes,
    found: list[WorkloadAttestor],
    view: "CgroupView",
    read: Callable[[int], bytes] | None,
) -> Attestors:
    from workload_api.attestors.cgroup import POD_PREFIXES, CgroupLayout, read_cgroup
    from workload_api.attestors.k8s import K8sAttestor
    from workload_api.attestors.pods import PodTable

    layout = CgroupLayout.pods(settings.cgroup_prefixes or POD_PREFIXES)
    by_api_server = settings.pods_from is PodSource.API_SERVER
    pods = PodTable(
        cluster=settings.cluster,
        container_selectors=settings.container_selectors,
        namespaces=by_api_server and settings.object_uids,
        namespace_labels=by_api_server and settings.namespace_labels,
        accounts=by_api_server and settings.object_uids,
    )
    client, source = _source(settings, pods)
    stack.push_async_callback(client.close)
    stack.push_async_callback(_cancel, asyncio.create_task(source.run()))
    found.append(
        K8sAttestor(
            pods,
            source,
            layout=layout,
            view=view,
            stale_limit=settings.stale_limit,
            read=read or read_cgroup,
        )
    )
    return Attestors(found, pods, source)


def _docker(
    settings: Docker, view: "CgroupView", read: Callable[[int], bytes] | None
) -> WorkloadAttestor:
    from workload_api.attestors.cgroup import ENGINE_PREFIXES, read_cgroup
    from workload_api.attestors.docker import DockerAttestor

    return DockerAttestor(
        socket=settings.socket,
        prefixes=settings.cgroup_prefixes or ENGINE_PREFIXES,
        env=settings.environment,
        view=view,
        read=read or read_cgroup,
    )


def _source(settings: Kubernetes, pods: "PodTable") -> "tuple[Client, k8s.PodSource]":
    from spiffe_wire.k8s.client import Client
    from spiffe_wire.k8s.credentials import access_of

    access = access_of(settings.kubeconfig, "", os.environ)
    if settings.pods_from is PodSource.API_SERVER:
        from workload_api.attestors.apiserver import ApiServerPods

        client = Client(access)
        return client, ApiServerPods(
            client,
            pods,
            settings.node_name,
            namespaces=settings.object_uids or settings.namespace_labels,
            accounts=settings.object_uids,
            cluster=settings.cluster,
        )
    from workload_api.attestors.kubelet import KubeletPods, kubelet_access

    host = settings.kubelet_host or settings.node_name
    client = Client(kubelet_access(access, host, settings.kubelet_port, settings.kubelet_ca))
    return client, KubeletPods(client, pods)


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
