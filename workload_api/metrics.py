"""The agent's metrics; `docs/reference/metrics.md` is made from them."""

import time

from spiffe_wire.metrics import Counter, Gauge, Histogram, Registry


class AgentMetrics:
    """Every metric of one agent, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.calls = Counter(
            "agent_calls_total", "Finished calls", ["method", "code"], registry=self.registry
        )
        self.call_seconds = Histogram(
            "agent_call_seconds", "How long unary calls took", ["method"],
            registry=self.registry, bounds=(0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5),
        )  # fmt: skip
        self.delivery_seconds = Histogram(
            "agent_change_delivery_seconds",
            "From the commit of a change to its message on a workload's stream",
            registry=self.registry,
            bounds=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5),
        )
        self.denials = Counter(
            "agent_denials_total",
            "Calls of processes without an identity",
            registry=self.registry,
        )
        self.entries = Gauge("agent_entries", "Entries of this agent", registry=self.registry)
        self.svids = Gauge("agent_x509_svids", "X509-SVIDs held", registry=self.registry)
        self.streams = Gauge("agent_streams", "Open workload streams", registry=self.registry)
        self.sds_streams = Gauge(
            "agent_sds_streams", "Open SDS streams", registry=self.registry
        )
        self.sds_refusals = Counter(
            "agent_sds_refusals_total",
            "Answers that an Envoy did not take; the log says why",
            registry=self.registry,
        )
        self.connected = Gauge(
            "agent_connected", "1 while in step with the server", registry=self.registry
        )
        self.pods = Gauge("agent_pods", "Pods of this node", registry=self.registry)
        self.pods_awaited = Gauge(
            "agent_pods_awaited",
            "Pods that processes are in and of whose containers nobody has told",
            registry=self.registry,
        )
        self.pods_away = Gauge(
            "agent_pods_source_away_seconds",
            "For how long nobody has told of this node's pods; 0 while in step",
            registry=self.registry,
        )
        self.own_expiry = Gauge(
            "agent_own_svid_expiry_seconds", "Unix time at which the agent's SVID ends",
            registry=self.registry,
        )  # fmt: skip

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Note one finished call."""
        self.calls.labels(method, code).inc()
        self.call_seconds.labels(method).observe(seconds)

    def on_delivered(self, committed_at_micros: int) -> None:
        """Note a change that reached a stream; clocks of server and agent may differ."""
        if committed_at_micros:
            self.delivery_seconds.observe(max(0.0, time.time() - committed_at_micros / 1e6))
