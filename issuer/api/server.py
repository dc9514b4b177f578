"""Registers every servicer on a door, and sees that the table of callers is complete."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ca.clock import Clock
from issuer.api import later
from issuer.api.access import check_complete
from issuer.api.agent import AgentServicer
from issuer.api.bundle import BundleServicer
from issuer.api.callers import Callers
from issuer.api.entry import EntryServicer
from issuer.api.explain import ExplainServicer, PodExplainServicer
from issuer.api.ours import AgentWatchServicer, HealthServicer
from issuer.api.podsvid import PodSvidServicer
from issuer.api.svid import SvidServicer
from issuer.services.agents import AgentService
from issuer.services.bundles import BundleService
from issuer.services.entries import EntryService
from issuer.services.explain import PodExplainer
from issuer.services.hub import Hub
from issuer.services.ratelimit import RateLimit
from issuer.services.svids import SvidService
from spiffe_wire.frontdoor.peer import Peer
from spiffe_wire.pb.grpc.health.v1 import health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import (
    explain_pb2_grpc,
    podexplain_pb2_grpc,
    podsvid_pb2_grpc,
    watch_pb2_grpc,
)
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.localauthority.v1 import localauthority_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2_grpc
from spiffe_wire.pb.spire.api.server.trustdomain.v1 import trustdomain_pb2_grpc


@dataclass(frozen=True)
class Api:
    """Everything the servicers need; `register` puts them on a grpcio server."""

    hub: Hub
    clock: Clock
    entries: EntryService
    agents: AgentService
    svids: SvidService
    bundles: BundleService
    callers: Callers
    limits: "ApiLimits"
    is_ready: Callable[[], bool]

    def register(self, server: Any, *, local: bool, cut: Callable[[Peer], object]) -> None:
        """
        Add every service to *server*; health is for the admin socket alone.

        *cut* ends the connection of a peer.

        Raises:
            InternalError: a method is served that nobody is allowed to call.
        """
        seen = _Noting(server)
        limits = self.limits
        agent = AgentServicer(
            self.agents, self.callers.refusals, limits.attest, limits.csr, limits.status
        )
        entry = EntryServicer(self.entries, self.hub, self.callers, self.clock)
        svid = SvidServicer(self.svids, limits.csr, limits.jsr)
        pod_svid = PodSvidServicer(self.svids, self.callers, limits.csr, limits.jsr)
        trust_domain, authority = later.servicers()
        watch = AgentWatchServicer(self.hub, self.callers, self.clock, cut)
        entry_pb2_grpc.add_EntryServicer_to_server(entry, seen)
        agent_pb2_grpc.add_AgentServicer_to_server(agent, seen)
        svid_pb2_grpc.add_SVIDServicer_to_server(svid, seen)
        bundle_pb2_grpc.add_BundleServicer_to_server(BundleServicer(self.bundles), seen)
        trustdomain_pb2_grpc.add_TrustDomainServicer_to_server(trust_domain, seen)
        localauthority_pb2_grpc.add_LocalAuthorityServicer_to_server(authority, seen)
        watch_pb2_grpc.add_AgentWatchServicer_to_server(watch, seen)
        podsvid_pb2_grpc.add_PodSvidServicer_to_server(pod_svid, seen)
        explain = ExplainServicer(self.hub, self.clock)
        explain_pb2_grpc.add_ExplainServicer_to_server(explain, seen)
        explainer = PodExplainer(self.hub, self.svids.pods.clusters, self.clock)
        podexplain_pb2_grpc.add_PodExplainServicer_to_server(
            PodExplainServicer(explainer), seen
        )
        if local:
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.is_ready), seen)
        check_complete(seen.methods)


@dataclass(frozen=True)
class ApiLimits:
    """Rates a second for each caller (SPIRE API 3.6); 0 turns one off."""

    attest: RateLimit
    csr: RateLimit
    jsr: RateLimit
    status: RateLimit


SIGNING_RATE: Final = 500
STATUS_RATE: Final = 10


class _Noting:
    """A grpcio server to those who register, that notes the methods they bring."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.methods: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        for handler in handlers:
            self.methods += list(handler._method_handlers)
        self._server.add_generic_rpc_handlers(handlers)
