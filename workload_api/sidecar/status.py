"""A sidecar's health and metrics; `docs/reference/metrics.md` is made from them."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator

from spiffe_wire.httpstatus import StatusServer
from spiffe_wire.logs import event
from spiffe_wire.metrics import CONTENT_TYPE, Counter, Gauge, Registry
from workload_api.sidecar.actions import Actions
from workload_api.sidecar.config import Status
from workload_api.sidecar.delivery import Delivery

_log = logging.getLogger(__name__)


class SidecarMetrics:
    """Every metric of one sidecar, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.ready = Gauge(
            "sidecar_ready", "1 while every file is there and good", registry=self.registry
        )
        self.expiry = Gauge(
            "sidecar_expiry_seconds",
            "Unix time at which the first of the files expires; 0 while there is none",
            registry=self.registry,
        )
        self.written = Counter(
            "sidecar_sets_written_total", "Sets of files", registry=self.registry
        )
        self.failures = Counter(
            "sidecar_failures_total", "What could not be done: write, on_change", ["what"],
            registry=self.registry,
        )  # fmt: skip

    def take(self, delivery: Delivery, actions: Actions) -> None:
        """Bring them up to date."""
        end = delivery.written.expires_at if delivery.written else None
        self.ready.set(1 if delivery.is_ready else 0)
        self.expiry.set(end.timestamp() if end else 0)
        self.written.labels().set(delivery.sets_written)
        self.failures.labels("write").set(delivery.failures)
        self.failures.labels("on_change").set(actions.failures)


@contextlib.asynccontextmanager
async def serving(
    settings: Status, delivery: Delivery, actions: Actions
) -> AsyncIterator[StatusServer]:
    """Serve /live, /ready and /metrics while entered."""
    metrics = SidecarMetrics()

    def ready() -> tuple[int, str, bytes]:
        end = delivery.written.expires_at if delivery.written else None
        body = json.dumps(
            {
                "ready": delivery.is_ready,
                "problems": delivery.problems,
                "expires_at": end.isoformat() if end else None,
            }
        )
        return (200 if delivery.is_ready else 503), "application/json", body.encode() + b"\n"

    def page() -> tuple[int, str, bytes]:
        metrics.take(delivery, actions)
        return 200, CONTENT_TYPE, metrics.registry.text()

    routes = {
        "/live": lambda: (200, "application/json", b'{"live": true}\n'),
        "/ready": ready,
        "/metrics": page,
    }
    async with StatusServer(settings.host, settings.port, routes) as server:
        event(_log, logging.INFO, "status_ready", port=server.port)
        yield server
