"""The server's metrics; `docs/reference/metrics.md` is made from them."""

from spiffe_wire.metrics import Counter, Gauge, Histogram, Registry


class ServerMetrics:
    """Every metric of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.calls = Counter(
            "issuer_calls_total", "Finished calls", ["method", "code"], registry=self.registry
        )
        self.call_seconds = Histogram(
            "issuer_call_seconds", "How long calls took", ["method"], registry=self.registry,
            bounds=(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
        )  # fmt: skip
        self.issued = Counter(
            "issuer_svids_issued_total",
            "SVIDs signed and on record",
            ["kind"],
            registry=self.registry,
        )
        self.entries = Gauge(
            "issuer_entries", "Registration entries held", registry=self.registry
        )
        self.agents = Gauge("issuer_agents", "Attested agents", registry=self.registry)
        self.watchers = Gauge(
            "issuer_watch_streams", "Agents that hold a watch stream", registry=self.registry
        )
        self.authority_expiry = Gauge(
            "issuer_authority_expiry_seconds", "Unix time at which the signing authority ends",
            ["kind"], registry=self.registry,
        )  # fmt: skip
        self.event_seq = Gauge(
            "issuer_event_sequence", "Last change folded into memory", registry=self.registry
        )
        self.cluster_pods = Gauge(
            "issuer_cluster_pods", "Pods known of a cluster", ["cluster"],
            registry=self.registry,
        )  # fmt: skip
        self.cluster_in_step = Gauge(
            "issuer_cluster_in_step", "1 while all that is watched of a cluster is in step",
            ["cluster"], registry=self.registry,
        )  # fmt: skip
        self.cluster_away = Gauge(
            "issuer_cluster_away_seconds", "For how long a part of it has not been in step",
            ["cluster"], registry=self.registry,
        )  # fmt: skip
        self.pod_checks = Counter(
            "issuer_pod_checks_total",
            "Entries with selectors of pods that were signed for, by what was verified",
            ["cluster", "outcome"], registry=self.registry,
        )  # fmt: skip
        self.pod_refusals = Counter(
            "issuer_pod_refusals_total",
            "Entries with selectors of pods that were not signed for",
            ["cluster", "why"], registry=self.registry,
        )  # fmt: skip

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Note one finished call."""
        self.calls.labels(method, code).inc()
        self.call_seconds.labels(method).observe(seconds)

    def on_issued(self, kind: str, count: int) -> None:
        """Note SVIDs that were signed and recorded."""
        self.issued.labels(kind).inc(count)

    def on_pod_checked(self, cluster: str, outcome: str) -> None:
        """Note an entry that may be signed for."""
        self.pod_checks.labels(cluster, outcome).inc()

    def on_pod_refused(self, cluster: str, why: str) -> None:
        """Note an entry that was not signed for."""
        self.pod_refusals.labels(cluster, why).inc()
