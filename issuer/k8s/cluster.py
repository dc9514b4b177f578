"""
Watches one cluster: pods, nodes, namespaces and service accounts (architecture A5).

Of all but pods the metadata alone is asked for.  The server does not wait for an API server
to start, and goes on from what it knows while one is away.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from issuer.config import Cluster
from issuer.k8s.tables import Arrivals, MetaTable, PodTable
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.objects import Container, Meta, Pod, meta_of, pod_of
from spiffe_wire.k8s.selectors import Surroundings, container_selectors, pod_selectors
from spiffe_wire.k8s.watch import Kind, Watch

VALUES_KEPT: Final = 4096
"""Pods whose selectors are kept: about 16 MB, and a node's 500 pods eight times over."""
PODS: Final = Kind("/api/v1/pods", pod_of)
NODES: Final = Kind("/api/v1/nodes", meta_of, metadata_only=True)
NAMESPACES: Final = Kind("/api/v1/namespaces", meta_of, metadata_only=True)
ACCOUNTS: Final = Kind("/api/v1/serviceaccounts", meta_of, metadata_only=True)


@dataclass(frozen=True, slots=True)
class PodValues:
    """The values of a pod's ``k8s`` selectors: what all its containers have, and each."""

    pod: frozenset[str]
    containers: tuple[frozenset[str], ...]

    def lacking(self, wanted: frozenset[str]) -> frozenset[str]:
        """Return what no single container has of *wanted*; nothing when one has it all."""
        rest = wanted - self.pod
        if not rest:
            return rest
        return min((rest - one for one in self.containers), key=len, default=rest)


class ClusterWatch:
    """What is known of one cluster; `run` keeps it in step."""

    def __init__(self, settings: Cluster, client: Client, arrivals: Arrivals) -> None:
        self.settings = settings
        self.name = settings.name
        self.pods = PodTable(self.name, arrivals)
        self.nodes = MetaTable(self.name, arrivals)
        self.namespaces = MetaTable(self.name, arrivals)
        self.accounts = MetaTable(self.name, arrivals)
        self._pods = Watch(client, PODS, self.pods, cluster=self.name)
        self._nodes = Watch(client, NODES, self.nodes, cluster=self.name)
        self._namespaces = Watch(client, NAMESPACES, self.namespaces, cluster=self.name)
        self._accounts = Watch(client, ACCOUNTS, self.accounts, cluster=self.name)
        self._values: OrderedDict[str, tuple[Pod, Meta | None, Meta | None, PodValues]]
        self._values = OrderedDict()

    async def run(self) -> None:
        """Stay in step until cancelled."""
        async with asyncio.TaskGroup() as group:
            for watch in self._all:
                group.create_task(watch.run())

    @property
    def problem(self) -> str:
        """Why it is not in step now; empty when it is."""
        return next((one.problem for one in self._all if one.problem), "")

    @property
    def away(self) -> timedelta:
        """For how long a part of it has not been in step."""
        return max(one.away for one in self._all)

    def unknown(self, wanted: frozenset[str]) -> str:
        """Return why *wanted* cannot be looked for yet; empty when it can."""
        needed = self._needed(wanted)
        return next((one.problem for one in needed if not one.synced.is_set()), "")

    def stale(self, wanted: frozenset[str]) -> str:
        """Return why what is known is too old to sign by; empty when it is not."""
        limit = self.settings.stale_limit
        needed = self._needed(wanted) if limit else []
        return next((one.problem for one in needed if one.away > limit), "")

    def values_of(self, pod: Pod) -> PodValues:
        """Return what *pod* is known by, from our own watches alone."""
        namespace = self.namespaces.named(pod.namespace)
        account = self.accounts.named(pod.service_account, pod.namespace)
        held = self._values.get(pod.uid)
        if held is not None and held[0] is pod and held[1] is namespace and held[2] is account:
            self._values.move_to_end(pod.uid)
            return held[3]
        around = Surroundings(self.name, namespace, account, self.settings.namespace_labels)
        made = PodValues(
            frozenset(one.value for one in pod_selectors(pod, around)),
            tuple(_values_of(one) for one in pod.containers),
        )
        self._values[pod.uid] = pod, namespace, account, made
        while len(self._values) > VALUES_KEPT:
            self._values.popitem(last=False)
        return made

    @property
    def _all(self) -> tuple[Watch[Any], ...]:
        return self._pods, self._nodes, self._namespaces, self._accounts

    def _needed(self, wanted: frozenset[str]) -> list[Watch[Any]]:
        needed: list[Watch[Any]] = [self._pods, self._nodes]
        kinds = {one.partition(":")[0] for one in wanted}
        if kinds & {"ns-uid", "ns-label"}:
            needed.append(self._namespaces)
        if "sa-uid" in kinds:
            needed.append(self._accounts)
        return needed


def _values_of(container: Container) -> frozenset[str]:
    return frozenset(one.value for one in container_selectors(container))
