"""The agent's own services: WhoAmI for workloads; explanations and more for operators."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from spiffe_core.errors import (
    MalformedError,
    NotFoundError,
    NotReadyError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_wire.convert.entry import (
    id_from_wire,
    id_to_wire,
    selectors_from_wire,
    selectors_to_wire,
)
from spiffe_wire.convert.explanation import add_sds_streams, explanation_of
from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer, unix_peer_of
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import (
    agentadmin_pb2,
    agentadmin_pb2_grpc,
    explain_pb2,
    explain_pb2_grpc,
    whoami_pb2,
    whoami_pb2_grpc,
)
from workload_api.attestors.procfs import read_status
from workload_api.endpoint.following import Callers
from workload_api.node.identity import NodeIdentity
from workload_api.sync.syncer import Syncer


def _partials(partial: Any) -> list[Any]:
    return [
        explain_pb2.Partial(attestor=name, reason=why) for name, why in sorted(partial.items())
    ]


@dataclass
class WhoAmIServicer(whoami_pb2_grpc.WhoAmIServicer):
    """Tells a process what was learnt of it, and of nobody else."""

    callers: Callers

    async def Get(self, request: Any, context: Any) -> Any:
        peer = unix_peer_of(context)
        attested = await self.callers.attestation.attest(peer)
        view = self.callers.look(attested)
        return whoami_pb2.WhoAmIResponse(
            pid=peer.pid,
            uid=peer.uid,
            gid=peer.gid,
            selectors=selectors_to_wire(attested.selectors),
            spiffe_ids=[entry.spiffe_id.uri for entry in view.decision.matched],
            partial=_partials(attested.partial),
        )


@dataclass
class AdminServicer(agentadmin_pb2_grpc.AgentAdminServicer, explain_pb2_grpc.ExplainServicer):
    """For operators on the admin socket."""

    callers: Callers
    node: NodeIdentity
    syncer: Syncer
    proof: Callable[[], PeerProof]
    version: str
    sds_streams: Callable[[int], list[Any]] = lambda _: []
    """What the process of this number asks for by SDS, as messages."""

    async def ExplainProcess(self, request: Any, context: Any) -> Any:
        peer = await asyncio.to_thread(_process, request.pid)
        process = explain_pb2.Process(pid=peer.pid, uid=peer.uid, gid=peer.gid)
        try:
            process.path = os.readlink(f"/proc/{peer.pid}/exe")
        except OSError:
            process.path = ""
        try:
            attested = await self.callers.attestation.attest(peer, patient=False)
        except NotReadyError as error:
            answer = explain_pb2.Explanation(reason="attestation_failed", text=str(error))
        else:
            answer = self._explain(attested.selectors, attested.partial)
        answer.process.CopyFrom(process)
        add_sds_streams(answer, self.sds_streams(peer.pid))
        return answer

    async def ExplainSelectors(self, request: Any, context: Any) -> Any:
        selectors = selectors_from_wire(request.selectors)
        if not selectors:
            raise MalformedError("name at least one selector, such as unix:uid:1000")
        return self._explain(selectors, {})

    def _explain(self, selectors: Any, partial: Any) -> Any:
        cache = self.callers.cache
        decision = cache.explain(selectors, partial, self.callers.now())
        return explanation_of(decision, reason="" if cache.ready else "not_synced")

    async def GetStatus(self, request: Any, context: Any) -> Any:
        state, svid, cache = self.syncer.state, self.node.svid, self.callers.cache
        status = agentadmin_pb2.AgentStatus(
            trust_domain=cache.trust_domain.name,
            ready=cache.ready,
            connected=state.connected,
            sync_mode=state.mode,
            last_sync_at=int(state.last_sync_at.timestamp()) if state.last_sync_at else 0,
            entries=len(cache.index),
            x509_svids=len(cache.svids),
            streams=cache.streams,
            peer_proof=self.proof().value,
            problem=self.syncer.problem,
            version=self.version,
        )
        if svid is not None:
            status.agent_id.CopyFrom(id_to_wire(svid.spiffe_id))
            status.svid_expires_at = int(svid.validity.not_after.timestamp())
        return status

    async def RenewSvids(self, request: Any, context: Any) -> Any:
        wanted = id_from_wire(request.spiffe_id) if request.HasField("spiffe_id") else None
        return agentadmin_pb2.RenewSvidsResponse(renewed=await self.syncer.renew(wanted))


@dataclass
class AgentHealthServicer(health_pb2_grpc.HealthServicer):
    """gRPC health: serving once the cache has something to serve from."""

    is_ready: Callable[[], bool]

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service:
            raise MalformedError("per-service health is not supported")
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        word = "SERVING" if self.is_ready() else "NOT_SERVING"
        return health_pb2.HealthCheckResponse(status=statuses.Value(word))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise UnsupportedError("health is asked with Check")
        yield


def _process(pid: int) -> UnixPeer:
    """
    Pin a process that an operator named.

    Raises:
        NotFoundError: there is none of that number.
    """
    if pid <= 0:
        raise MalformedError("a process ID is above 0")
    try:
        pidfd = PidFd(os.pidfd_open(pid))
        status = read_status(pid)
    except (OSError, SpiffeError) as error:
        raise NotFoundError(f"no process {pid} on this node") from error
    return UnixPeer(pid, status.uid, status.gid, PeerProof.PIDFD, pidfd)
