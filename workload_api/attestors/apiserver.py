"""
This node's pods by watching the API server, and what they are surrounded by (SEC-35).

The watch asks for the pods of one node alone.  Namespaces and service accounts are watched by
their metadata, and only for the selectors that need them.
"""

import asyncio
from datetime import timedelta

from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.objects import Meta, Pod, meta_of, pod_of
from spiffe_wire.k8s.watch import NOT_ASKED, Kind, Watch
from workload_api.attestors.pods import PodTable


class ApiServerPods:
    """Keeps *table* in step; see `PodSource`."""

    name = "the API server"

    def __init__(
        self,
        client: Client,
        table: PodTable,
        node_name: str,
        *,
        namespaces: bool = False,
        accounts: bool = False,
        cluster: str = "",
    ) -> None:
        pods = Kind("/api/v1/pods", pod_of, f"spec.nodeName={node_name}")
        self._pods = Watch(client, pods, table, cluster=cluster)
        self._all: list[Watch[Pod] | Watch[Meta]] = [self._pods]
        for path, sink, wanted in (
            ("/api/v1/namespaces", table.namespaces, namespaces),
            ("/api/v1/serviceaccounts", table.accounts, accounts),
        ):
            if wanted:
                kind = Kind(path, meta_of, metadata_only=True)
                self._all.append(Watch(client, kind, sink, cluster=cluster))

    @property
    def problem(self) -> str:
        """Why the table is not in step; what surrounds pods is not counted."""
        return self._pods.problem

    @property
    def beside_problem(self) -> str:
        """Why what surrounds pods is not known, and will not be just now."""
        found = (one.problem for one in self._all[1:])
        return "; ".join(dict.fromkeys(one for one in found if one not in ("", NOT_ASKED)))

    @property
    def problems(self) -> list[str]:
        """The same of everything that is watched, for whoever minds this agent."""
        return list(dict.fromkeys(one.problem for one in self._all if one.problem))

    @property
    def away(self) -> timedelta:
        """For how long it has not been."""
        return self._pods.away

    def want(self) -> None:
        """What comes, comes by itself; unless the API server was given up for a while."""
        if self._pods.problem:
            self._pods.hurry()

    async def run(self) -> None:
        """Keep the table in step until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for watch in self._all:
                tasks.create_task(watch.run())
