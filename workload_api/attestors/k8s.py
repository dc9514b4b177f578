"""
The ``k8s`` attestor: a process's pod and container, by its cgroup and by this node's pods.

Source: SPIRE API 10, SEC-33, SEC-35.  The kernel says which container it is, the API server or
the kubelet says whose.  A container that is known costs no call and no wait.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from typing import ClassVar, Final, Protocol

from spiffe_wire.frontdoor.peer import UnixPeer
from workload_api.attestors.cgroup import (
    HOST,
    CgroupLayout,
    CgroupView,
    container_of,
    read_cgroup,
)
from workload_api.attestors.pods import KnownContainer, PodTable
from workload_api.attestors.protocol import AttestationError, Finding, NotYetError

LAG: Final = timedelta(seconds=5)
"""For how long what is not known of a pod may yet be on its way; SEC-35 has the same."""


TEXTS_KEPT: Final = 1024
"""Texts of `/proc/<pid>/cgroup` that were parsed before: of two nodes' full of containers."""


class PodSource(Protocol):
    """Who tells of this node's pods, and keeps a `PodTable` in step until cancelled."""

    @property
    def name(self) -> str:
        """For messages, such as ``the API server``."""
        ...

    @property
    def problem(self) -> str:
        """Why the table is not in step; empty while it is."""
        ...

    @property
    def beside_problem(self) -> str:
        """Why namespaces and accounts are not known, and will not be just now; or empty."""
        ...

    @property
    def problems(self) -> list[str]:
        """The same of all that is asked for, for whoever minds this agent."""
        ...

    @property
    def away(self) -> timedelta:
        """For how long the table has not been in step."""
        ...

    def want(self) -> None:
        """Somebody waits for a container that is not in the table."""
        ...

    async def run(self) -> None:
        """Keep the table in step until cancelled."""
        ...


class K8sAttestor:
    """Names pod and container of whoever is in one; see `WorkloadAttestor`."""

    type: ClassVar[str] = "k8s"

    def __init__(
        self,
        pods: PodTable,
        source: PodSource,
        *,
        layout: CgroupLayout,
        view: CgroupView = HOST,
        stale_limit: timedelta = timedelta(0),
        read: Callable[[int], bytes] = read_cgroup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*stale_limit*: for how long pods are believed while their source is away; 0: ever."""
        self._pods = pods
        self._source = source
        # The same text places whoever has it in the same container, for as long as we live.
        self._container_of = lru_cache(TEXTS_KEPT)(
            partial(container_of, layout=layout, view=view)
        )
        self._stale_limit = stale_limit
        self._read = read
        self._clock = clock

    async def attest(self, peer: UnixPeer) -> Finding:
        """See `WorkloadAttestor`; what is known is answered without waiting for anything."""
        text = self._read(peer.pid)
        ref = self._container_of(text)
        if ref is None or ref.pod_uid is None:
            return Finding()
        known = self._pods.find(ref.container_id, ref.pod_uid)
        # Nothing is waited for between the two, but the kernel may move a process at any time.
        again = self._read(peer.pid)
        if again != text and self._container_of(again) != ref:
            raise AttestationError("the process was moved to another cgroup meanwhile")
        if known is None:
            raise self._not_yet(ref.container_id, ref.pod_uid)
        return self._finding(known)

    def close(self) -> None:
        """Nothing is under way."""

    def _not_yet(self, container_id: str, pod_uid: str) -> NotYetError:
        arrived, is_new = self._pods.arrival(pod_uid)
        if is_new:
            self._source.want()
        name = f"container {container_id[:12]} of pod {pod_uid}"
        problem = f": {self._source.problem}" if self._source.problem else ""
        return NotYetError(f"{self._source.name} has not told of {name}{problem}", arrived)

    def _finding(self, known: KnownContainer) -> Finding:
        stale = self._stale()
        if not known.lacking:
            return Finding(known.selectors, known.changed, stale)
        problem = self._source.beside_problem
        missing = f"{known.lacking} is not known" + (f": {problem}" if problem else "")
        so_far = Finding(
            known.selectors, known.changed, f"{missing}; {stale}" if stale else missing
        )
        # Where it is known not to come, nobody waits for it.
        if not problem and self._clock() - known.lacks_since < LAG.total_seconds():
            raise NotYetError(so_far.missing, known.changed, so_far)
        return so_far

    def _stale(self) -> str:
        """
        Why pods may have changed without our knowing; empty while they can't have.

        Raises:
            AttestationError: for longer than is allowed.
        """
        source = self._source
        if not source.problem:
            return ""
        age = source.away
        said = f"{source.name} has told nothing of pods for {age.total_seconds():.0f} s"
        if self._stale_limit and age > self._stale_limit:
            raise AttestationError(f"{said}, which is too long: {source.problem}")
        return f"{said}: {source.problem}" if age > LAG else ""
