"""
The agent's composition root: builds every object, and only it does.

Order: cache from disk, own identity, syncing, then the sockets.  What an earlier life left on
disk is served at once, whether or not the server answers (SEC-106).
"""

import asyncio
import contextlib
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from spiffe_core.errors import ErrorKind, NotReadyError, SpiffeError
from spiffe_core.permission import AgentDeniedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.version import VERSION
from spiffe_wire.backoff import Backoff
from spiffe_wire.exclusive import held, without_leftovers
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.door import DoorLimits, FrontDoor
from spiffe_wire.httpstatus import StatusServer
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.logs import event
from spiffe_wire.metrics import CONTENT_TYPE
from spiffe_wire.pb.grpc.health.v1 import health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import (
    agentadmin_pb2_grpc,
    explain_pb2_grpc,
    whoami_pb2_grpc,
)
from spiffe_wire.security_header import SecurityHeaderInterceptor
from spiffe_wire.settings import unsafe_in_use
from workload_api.agent.attestors import Attestors, build_attestors
from workload_api.agent.config import AgentSettings, NodeAttestor, Sds
from workload_api.attestors.registry import Attestation
from workload_api.cache.cache import WorkloadCache
from workload_api.endpoint import reflection
from workload_api.endpoint.admin import AdminServicer, AgentHealthServicer, WhoAmIServicer
from workload_api.endpoint.following import Callers
from workload_api.endpoint.responses import Responses
from workload_api.endpoint.workload import WorkloadServicer, register
from workload_api.metrics import AgentMetrics
from workload_api.node.identity import NodeIdentity, read_trust_bundle
from workload_api.node.join_token import JoinTokenProof
from workload_api.node.k8s_psat import K8sPsatProof
from workload_api.node.proof import NodeProof, NoWayToAttestError
from workload_api.storage import AgentStorage
from workload_api.sync.membership import PASSING
from workload_api.sync.syncer import Syncer

if TYPE_CHECKING:
    from workload_api.sds.stream import SdsServicer

_log = logging.getLogger(__name__)
WORKLOAD_MESSAGE_BYTES: Final = 64 * 1024  # security requirements, table 1
STOP_GRACE: Final = timedelta(seconds=3)


@dataclass
class Agent:
    """A running agent; `ended` is done when it cannot go on."""

    settings: AgentSettings
    cache: WorkloadCache
    node: NodeIdentity
    syncer: Syncer
    metrics: AgentMetrics
    attestors: Attestors
    ended: "asyncio.Task[None]"
    status_port: int = 0
    is_stopping: bool = False

    def problems(self) -> list[str]:
        """What keeps workloads from being served; empty when nothing does (SEC-114)."""
        if self.is_stopping:
            return ["stopping"]
        return [] if self.cache.ready else [self.syncer.problem or "starting"]


def _now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def serve(
    settings: AgentSettings,
    join_token: str = "",
    *,
    read_cgroup: Callable[[int], bytes] | None = None,
) -> AsyncIterator[Agent]:
    """
    Run an agent while entered; its sockets are open when this yields.

    *read_cgroup* takes the place of ``/proc/<pid>/cgroup``.

    Raises:
        SpiffeError: says what keeps it from starting, and what to do.
    """
    os.umask(0o077)
    for path in unsafe_in_use(settings):
        event(_log, logging.WARNING, "unsafe_setting", setting=path)
    trust_domain = TrustDomain(settings.trust_domain)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(held(settings.data_dir, "data_dir"))
        stack.enter_context(held(settings.runtime_dir, "runtime_dir"))
        storage = AgentStorage(settings.data_dir, settings.runtime_dir)
        cache = WorkloadCache(trust_domain)
        served_before = await asyncio.to_thread(storage.load_cache, cache, _now())
        if trust_domain not in cache.bundles and settings.server.trust_bundle:
            bundle = read_trust_bundle(settings.server.trust_bundle, trust_domain)
            cache.bundles[trust_domain] = bundle
        node = NodeIdentity(trust_domain, storage, cache, _now)
        proof = _proof_of(settings, join_token)
        known = await node.load()
        if known and proof.can_repeat and not node.is_proved_by(proof.type):
            # Its settings name another proof since: it is to be another agent.
            event(_log, logging.WARNING, "node_attestor_changed", to=proof.type)
            known = False
        if not known and not proof.is_given and not served_before:
            raise NoWayToAttestError(proof.what_to_do(node.expired_at))
        inner = without_leftovers(settings.runtime_dir / "inner")

        def dialling(context: Callable[[], ssl.SSLContext]) -> Dialer:
            server = settings.server
            return Dialer(
                server.address,
                server.port,
                context=context,
                check=node.check_server,
                runtime_dir=inner,
            )

        async def attest_anew() -> None:
            async with dialling(node.anonymous_context) as fresh:
                try:
                    await node.attest(fresh.channel, proof)
                except SpiffeError as error:
                    if fresh.problem:
                        raise NotReadyError(fresh.problem) from error
                    raise

        dialer = await stack.enter_async_context(dialling(node.context))
        attestors = await stack.enter_async_context(build_attestors(settings, read=read_cgroup))
        syncer = Syncer(
            cache,
            node,
            dialer,
            storage,
            _now,
            settings.workloads.key_type,
            settings.server.sync_interval,
            VERSION,
            attest_anew if proof.can_repeat else None,
            attestors.pods,
        )
        metrics = AgentMetrics()
        running = asyncio.create_task(_run(node, dialer, syncer, proof, known=known))
        stack.push_async_callback(_cancel, running)
        stack.callback(syncer.tokens.clear)
        agent = Agent(settings, cache, node, syncer, metrics, attestors, running)
        await _open_sockets(stack, agent)
        event(_log, logging.INFO, "agent_serving", socket=settings.workload_socket)
        yield agent


def _proof_of(settings: AgentSettings, join_token: str) -> NodeProof:
    if settings.node_attestor is NodeAttestor.K8S_PSAT:
        return K8sPsatProof(settings.kubernetes.cluster, settings.kubernetes.token_path)
    return JoinTokenProof(join_token)


async def _run(
    node: NodeIdentity, dialer: Dialer, syncer: Syncer, proof: NodeProof, *, known: bool
) -> None:
    backoff = Backoff(timedelta(milliseconds=200), timedelta(seconds=30))
    while not known:
        try:
            await node.attest(dialer.channel, proof)
            known = True
            dialer.cut()  # from here on with our own certificate
        except SpiffeError as error:
            syncer.state.problem = dialer.problem or str(error)
            event(_log, logging.WARNING, "attestation_failed", why=syncer.state.problem)
            if not dialer.problem and error.kind not in PASSING:
                await _refused(node, syncer, proof, error)
            await asyncio.sleep(backoff.next().total_seconds())
    await syncer.run()


async def _refused(
    node: NodeIdentity, syncer: Syncer, proof: NodeProof, error: SpiffeError
) -> None:
    """End, saying what to do; what a server does not want is no longer served (SEC-52)."""
    said = error
    tried = proof.is_given and not isinstance(error, NoWayToAttestError | AgentDeniedError)
    if tried and (proof.can_repeat or node.expired_at is not None):
        said = NoWayToAttestError(f"{error}; {proof.what_to_do(node.expired_at)}")
    if error.kind is ErrorKind.FORBIDDEN:
        await syncer.membership.end(said)
    raise said from error


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, SpiffeError):
        await task


async def _open_sockets(stack: contextlib.AsyncExitStack, agent: Agent) -> None:
    settings, cache, metrics = agent.settings, agent.cache, agent.metrics
    attestation = Attestation(agent.attestors.all)
    stack.callback(attestation.close)
    callers = Callers(cache, attestation, _now)
    workload = WorkloadServicer(
        callers,
        agent.syncer.tokens,
        Responses(cache.trust_domain),
        metrics,
        settings.workloads.no_identity_grace,
    )

    sds = _sds_of(settings.sds, callers, metrics) if settings.sds.is_on else None
    on_both = sds if settings.sds.on_workload_socket else None

    def register_public(server: Any) -> None:
        register(workload, server)
        if on_both is not None:
            on_both.register(server)
        whoami_pb2_grpc.add_WhoAmIServicer_to_server(WhoAmIServicer(callers), server)
        health_pb2_grpc.add_HealthServicer_to_server(
            AgentHealthServicer(lambda: not agent.problems()), server
        )
        reflection.register(server)

    public = await stack.enter_async_context(
        FrontDoor(
            register_public,
            runtime_dir=settings.runtime_dir / "inner",
            interceptors=[
                SecurityHeaderInterceptor(
                    on_both.methods if on_both and settings.sds.unsafe_without_header else ()
                ),
                ErrorInterceptor(metrics.on_call),
            ],
            limits=DoorLimits(),
            max_message_bytes=on_both.max_request_bytes if on_both else WORKLOAD_MESSAGE_BYTES,
        )
    )
    doors = [public]
    servicer = AdminServicer(callers, agent.node, agent.syncer, lambda: public.proof, VERSION)
    if sds is not None:
        servicer.sds_streams = sds.exchanges.of

    def register_admin(server: Any) -> None:
        agentadmin_pb2_grpc.add_AgentAdminServicer_to_server(servicer, server)
        explain_pb2_grpc.add_ExplainServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(
            AgentHealthServicer(lambda: not agent.problems()), server
        )

    admin = await stack.enter_async_context(
        FrontDoor(
            register_admin,
            runtime_dir=settings.runtime_dir / "inner",
            interceptors=[ErrorInterceptor(metrics.on_call)],
        )
    )
    uids = frozenset({0, os.geteuid(), *settings.admin_uids})
    mode = 0o600 if not settings.admin_uids else 0o666
    policy = settings.workloads.peer_proof
    # Health is asked on the admin socket: when that answers, workloads can call.
    await public.listen_unix(settings.workload_socket, mode=0o777, policy=policy)
    if sds is not None and settings.sds_socket is not None:
        envoys = await stack.enter_async_context(_sds_door(sds, settings, metrics))
        await envoys.listen_unix(settings.sds_socket, mode=0o777, policy=policy)
        doors.append(envoys)
    await admin.listen_unix(settings.admin_socket, mode=mode, allowed_uids=uids)
    if settings.status.port:
        status = await stack.enter_async_context(_status(agent, sds))
        agent.status_port = status.port

    async def stop() -> None:
        agent.is_stopping = True
        callers.stop()
        await asyncio.sleep(0.05)
        await asyncio.gather(*(door.close(STOP_GRACE) for door in doors))

    stack.push_async_callback(stop)


def _sds_of(settings: Sds, callers: Callers, metrics: AgentMetrics) -> "SdsServicer":
    # Loaded where it is on: other agents are spared Envoy's messages.
    from workload_api.sds.resources import Terms
    from workload_api.sds.stream import SdsServicer

    terms = Terms(
        settings.default_svid_name,
        settings.default_bundle_name,
        settings.default_all_bundles_name,
        settings.disable_spiffe_cert_validation,
    )
    return SdsServicer(callers, metrics, terms, settings.refuse_unknown_names)


def _sds_door(sds: "SdsServicer", settings: AgentSettings, metrics: AgentMetrics) -> FrontDoor:
    return FrontDoor(
        sds.register,
        runtime_dir=settings.runtime_dir / "inner",
        # Nothing else is served here; for whatever else is asked, the header stays in force.
        interceptors=[
            SecurityHeaderInterceptor(sds.methods),
            ErrorInterceptor(metrics.on_call),
        ],
        limits=DoorLimits(),
        max_message_bytes=sds.max_request_bytes,
    )


def _status(agent: Agent, sds: "SdsServicer | None") -> StatusServer:
    metrics = agent.metrics

    def ready() -> tuple[int, str, bytes]:
        problems = agent.problems()
        state = agent.syncer.state
        body = json.dumps(
            {
                "ready": not problems,
                "problems": problems,
                "connected": state.connected,
                "sync_mode": state.mode,
                "server_problem": agent.syncer.problem,
                "attestor_problems": agent.attestors.problems,
            }
        )
        return (503 if problems else 200), "application/json", body.encode() + b"\n"

    def page() -> tuple[int, str, bytes]:
        metrics.entries.set(len(agent.cache.index))
        metrics.svids.set(len(agent.cache.svids))
        metrics.streams.set(agent.cache.streams)
        metrics.sds_streams.set(len(sds.exchanges) if sds else 0)
        pods, source = agent.attestors.pods, agent.attestors.source
        if pods is not None and source is not None:
            metrics.pods.set(len(pods))
            metrics.pods_awaited.set(pods.awaited)
            metrics.pods_away.set(source.away.total_seconds())
        metrics.connected.set(1 if agent.syncer.state.connected else 0)
        if agent.node.svid is not None:
            metrics.own_expiry.set(agent.node.svid.validity.not_after.timestamp())
        return 200, CONTENT_TYPE, metrics.registry.text()

    routes: dict[str, Callable[[], tuple[int, str, bytes]]] = {
        "/live": lambda: (200, "application/json", b'{"live": true}\n'),
        "/ready": ready,
        "/metrics": page,
    }
    return StatusServer(agent.settings.status.host, agent.settings.status.port, routes)
