"""
Does this agent's node run a pod that an entry is for?  Asked before anything is signed.

Source: architecture A5, SEC-21.  Which node an agent is on comes from its attestation, and
what runs there from our own watch of the API server: of what an agent says, only the pod's
UID is taken, and that is looked up.  So a stolen node speaks for its own pods alone.

Whether a refusal is a violation: an agent that is well can be ahead of our watch, or behind
it, by moments.  It never names a pod of another node, nor for long one that an entry is not
for.  Those two are noted as security events; the rest is refused and counted.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from issuer.config import WithoutPod
from issuer.k8s.tables import Arrivals, Topic, meta_topic, pod_topic, pods_topic, sync_topic
from spiffe_core.agent import AttestedAgent
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import ForbiddenError, NotReadyError, SpiffeError
from spiffe_wire.k8s.objects import Meta
from spiffe_wire.k8s.selectors import TYPE

if TYPE_CHECKING:  # it loads an HTTP client, which only a server with clusters needs
    from issuer.k8s.cluster import ClusterWatch

NODE_ATTESTOR: Final = "k8s_psat"
PATIENCE: Final = 2.0
"""Seconds for which our watch may be behind the agent's."""
SETTLED: Final = 30.0
"""A pod that has not changed for so many seconds is known to its agent as it is."""


class PodError(SpiffeError):
    """Nothing is signed by an entry, because of what is known of pods."""

    def __init__(
        self,
        message: str,
        why: str,
        *,
        cluster: str = "",
        topic: Topic | None = None,
        detail: str = "",
        is_violation: bool = False,
    ) -> None:
        super().__init__(message)
        self.why = why
        """The reason as metrics count it."""
        self.cluster = cluster
        self.topic = topic
        """What may change the answer within moments."""
        self.detail = detail
        """What the log says beside the message, and the agent is not told."""
        self.is_violation = is_violation


class PodRefusedError(PodError, ForbiddenError):
    """No pod of this agent's node is one that the entry is for."""


class PodNotReadyError(PodError, NotReadyError):
    """It cannot be told yet."""


@dataclass(frozen=True)
class PodVerifier:
    """For one event loop.  Without clusters it knows nothing, and checks nothing."""

    clusters: "Mapping[str, ClusterWatch]" = field(default_factory=dict)
    """Those whose pods are verified, by name."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    on_checked: Callable[[str, str], None] = lambda *_: None
    """Called with cluster and outcome."""
    on_refused: Callable[[str, str], None] = lambda *_: None
    """Called with cluster and reason."""
    patience: float = PATIENCE
    settled: float = SETTLED

    def check(
        self,
        agent: AttestedAgent,
        entry: RegistrationEntry,
        pod_uid: str,
        *,
        is_on_demand: bool = False,
    ) -> str:
        """
        See that *entry* may be signed for *agent*; return the pod that is behind it.

        The pod is empty when the agent named none, or nothing could be verified: the entry
        has no selectors of pods, or the agent is of no cluster that is watched.  With
        *is_on_demand* an agent that names no pod asks because a process of one is there.

        Raises:
            PodRefusedError: no; with a topic it may be yes in a moment.
            PodNotReadyError: not known yet.
        """
        wanted = frozenset(one.value for one in entry.selectors if one.type == TYPE)
        if not wanted:
            return ""
        home = home_of(agent)
        cluster = home.cluster if home else ""
        self._check_cluster(wanted, cluster)
        watch = self.clusters.get(cluster)
        if home is None or watch is None:
            self.on_checked(cluster, "unchecked")
            return ""
        if not pod_uid and watch.settings.agents_without_pod is not WithoutPod.ANY_POD_OF_NODE:
            return self._without_pod(watch)
        node = _known_node(watch, home, wanted)
        if pod_uid:
            found = self._check_pod(watch, node, wanted, pod_uid)
            self.on_checked(cluster, "verified")
            return found
        topic = pods_topic(cluster, node.name) if is_on_demand else None
        _check_any(watch, node, wanted, topic)
        self.on_checked(cluster, "any-pod")
        return ""

    def _check_cluster(self, wanted: frozenset[str], cluster: str) -> None:
        for value in wanted:
            kind, _, name = value.partition(":")
            if kind == "cluster" and name != cluster and (cluster or name in self.clusters):
                raise PodRefusedError(
                    f"the entry is for pods of cluster {name}, and this agent is not "
                    "attested there",
                    "other-cluster",
                    cluster=cluster,
                )

    def _without_pod(self, watch: "ClusterWatch") -> str:
        if watch.settings.agents_without_pod is WithoutPod.ALLOW:
            self.on_checked(watch.name, "allowed")
            return ""
        raise PodRefusedError(
            "this agent does not say for which pod it asks: run issuer-agent there, or set "
            f"agents_without_pod of cluster {watch.name} on the server",
            "no-pod-named",
            cluster=watch.name,
        )

    def _check_pod(
        self, watch: "ClusterWatch", node: Meta, wanted: frozenset[str], pod_uid: str
    ) -> str:
        topic = pod_topic(watch.name, pod_uid)
        known = watch.pods.get(pod_uid)
        if known is None or not known.pod.node_name:
            raise PodNotReadyError(
                f"pod {pod_uid} is not known to the server yet{_because(watch)}",
                "pod-unknown",
                cluster=watch.name,
                topic=topic,
            )
        pod = known.pod
        if pod.node_name != node.name:
            raise PodRefusedError(
                f"pod {pod_uid} does not run on this agent's node",
                "other-node",
                cluster=watch.name,
                detail=f"it runs on {pod.node_name}, and the agent on {node.name}",
                is_violation=True,
            )
        if pod.is_over:
            raise PodRefusedError(f"pod {pod_uid} is over", "pod-over", cluster=watch.name)
        lacking = watch.values_of(pod).lacking(wanted)
        if lacking:
            raise PodRefusedError(
                f"pod {pod_uid} is not one that the entry is for: it has no "
                f"{TYPE}:{min(lacking)}{_hint(watch, lacking)}",
                "pod-differs",
                cluster=watch.name,
                topic=topic,
                detail=f"it is {pod.namespace}/{pod.name}",
                is_violation=(
                    not watch.problem
                    and time.monotonic() - known.changed_at > self.settled
                    and not any(one.startswith("ns-label:") for one in lacking)  # no pod's own
                ),
            )
        return pod.uid


@dataclass(frozen=True, slots=True)
class Home:
    """Where an agent runs, as its attestation proved it."""

    cluster: str
    node_uid: str
    node_name: str


def home_of(agent: AttestedAgent) -> Home | None:
    """Where the agent is, by what its attestation proved; never by what it says."""
    if agent.attestation_type != NODE_ATTESTOR:
        return None
    found = dict(
        one.value.split(":", 1)
        for one in agent.selectors
        if one.type == NODE_ATTESTOR and ":" in one.value
    )
    return Home(
        found.get("cluster", ""),
        found.get("agent_node_uid", ""),
        found.get("agent_node_name", ""),
    )


def _known_node(watch: "ClusterWatch", home: Home, wanted: frozenset[str]) -> Meta:
    if why := watch.unknown(wanted):
        raise PodNotReadyError(
            f"cluster {watch.name} is not known to the server yet: {why}",
            "not-synced",
            cluster=watch.name,
            topic=sync_topic(watch.name),
        )
    if why := watch.stale(wanted):
        raise PodNotReadyError(
            f"cluster {watch.name} has been away for longer than its stale_limit: {why}",
            "stale",
            cluster=watch.name,
        )
    node = watch.nodes.get(home.node_uid)
    if node is not None:
        return node
    if watch.nodes.named(home.node_name) is not None:
        raise PodRefusedError(
            "another node has this agent's node's name now: it must attest again",
            "node-replaced",
            cluster=watch.name,
        )
    raise PodNotReadyError(
        f"this agent's node is not known to the server{_because(watch)}",
        "node-unknown",
        cluster=watch.name,
        topic=meta_topic(watch.name, home.node_uid),
    )


def _check_any(
    watch: "ClusterWatch", node: Meta, wanted: frozenset[str], topic: Topic | None
) -> None:
    # Most entries name a namespace, and most pods are in another: cheaper than to compare all.
    namespaces = {one.removeprefix("ns:") for one in wanted if one.startswith("ns:")}
    for pod in watch.pods.on_node(node.name):
        if pod.is_over or (namespaces and pod.namespace not in namespaces):
            continue
        if not watch.values_of(pod).lacking(wanted):
            return
    raise PodRefusedError(
        "no pod of this agent's node is one that the entry is for",
        "no-such-pod",
        cluster=watch.name,
        topic=topic,
    )


def _because(watch: "ClusterWatch") -> str:
    return f": cluster {watch.name} is away: {watch.problem}" if watch.problem else ""


def _hint(watch: "ClusterWatch", lacking: frozenset[str]) -> str:
    if not watch.settings.namespace_labels and any(
        one.startswith("ns-label:") for one in lacking
    ):
        return f" (namespace_labels of cluster {watch.name} is off on the server)"
    return ""
