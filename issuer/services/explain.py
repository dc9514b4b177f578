"""
Why a pod's processes get an identity or do not, by what the server itself knows.

The server sees pods and no processes: what an entry asks of a process beside its pod
(``unix:uid``, say) it can neither confirm nor deny, and says so.  Asking the agent by
`issuer explain --pid` on the node tells the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ca.clock import Clock
from issuer.k8s.verify import home_of
from issuer.services.hub import Hub
from spiffe_core.agent import AttestedAgent
from spiffe_core.decision import Decision, decide
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import MalformedError, NotFoundError, PreconditionError
from spiffe_core.selector import Selector
from spiffe_wire.k8s.objects import Pod
from spiffe_wire.k8s.selectors import TYPE

if TYPE_CHECKING:  # it loads an HTTP client, which only a server with clusters needs
    from issuer.k8s.cluster import ClusterWatch

_UNSEEN = "the server sees pods, not processes; ask on the node: issuer explain --pid"
_NAMED = 5


@dataclass(frozen=True, slots=True)
class PodExplanation:
    """What is known of one pod, and what each of its containers would get."""

    cluster: str
    pod: Pod
    agent: AttestedAgent | None
    """Of its node; None when no agent is attested there."""
    containers: tuple[tuple[str, Decision], ...]
    problem: str


@dataclass(frozen=True)
class PodExplainer:
    """Asked by operators."""

    hub: Hub
    clusters: "Mapping[str, ClusterWatch]"
    clock: Clock

    def explain(self, cluster: str, namespace: str, name: str) -> PodExplanation:
        """
        Explain the one pod that is called *name*, or whose name begins so.

        Raises:
            PreconditionError: the server watches no cluster.
            MalformedError: which cluster, or which pod, cannot be told.
            NotFoundError: no such cluster or pod is known.
        """
        watch = self._cluster(cluster)
        found = watch.pods.called(namespace, name)
        if not found:
            raise NotFoundError(
                f"the server knows no pod {namespace}/{name} of cluster {watch.name}"
                + (f": {watch.problem}" if watch.problem else "")
            )
        if len(found) > 1:
            names = ", ".join(one.name for one in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise MalformedError(f"several pods of {namespace} begin so: {names}{more}")
        (pod,) = found
        agent = self._agent_of(watch, pod)
        candidates = self._candidates(agent)
        values = watch.values_of(pod)
        decisions = tuple(
            (container.name, self._decide(values.pod | own, candidates))
            for container, own in zip(pod.containers, values.containers, strict=True)
        )
        return PodExplanation(watch.name, pod, agent, decisions, watch.problem)

    def _cluster(self, name: str) -> "ClusterWatch":
        if not self.clusters:
            raise PreconditionError(
                "this server watches no cluster: set clusters, with verify_pods"
            )
        if not name and len(self.clusters) == 1:
            return next(iter(self.clusters.values()))
        if not name:
            raise MalformedError(f"name the cluster: {', '.join(sorted(self.clusters))}")
        if name not in self.clusters:
            raise NotFoundError(
                f"no cluster {name} is watched; there are {', '.join(sorted(self.clusters))}"
            )
        return self.clusters[name]

    def _agent_of(self, watch: "ClusterWatch", pod: Pod) -> AttestedAgent | None:
        node = watch.nodes.named(pod.node_name)
        if node is None:
            return None
        for agent in self.hub.index.agents():
            home = home_of(agent)
            if home is not None and (home.cluster, home.node_uid) == (watch.name, node.uid):
                return agent
        return None

    def _candidates(self, agent: AttestedAgent | None) -> list[RegistrationEntry]:
        if agent is None:
            return []
        return self.hub.index.entries_of(agent.id, self.clock.now())

    def _decide(self, values: frozenset[str], candidates: list[RegistrationEntry]) -> Decision:
        selectors = frozenset(Selector(TYPE, one) for one in values)
        others = {one.type for entry in candidates for one in entry.selectors} - {TYPE}
        return decide(
            selectors, candidates, at=self.clock.now(), partial=dict.fromkeys(others, _UNSEEN)
        )
