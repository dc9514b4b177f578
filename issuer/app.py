"""
The server's composition root: builds every object, and only it does.

Order: store, authorities, index, own SVID, then the doors; ready comes last, and goes first.
"""

import asyncio
import contextlib
import json
import logging
import os
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec

from ca.clock import Clock, SystemClock
from ca.keys.disk import DiskKeyManager
from ca.keys.protocol import pkcs8_of
from ca.lint import check_profile
from ca.rotator import Rotator
from issuer.api.callers import AccessInterceptor, Callers
from issuer.api.server import SIGNING_RATE, STATUS_RATE, Api, ApiLimits
from issuer.attestation.join_token import JoinTokenAttestor
from issuer.attestation.protocol import NodeAttestor
from issuer.config import ServerSettings
from issuer.k8s.tables import Arrivals
from issuer.k8s.verify import PodVerifier
from issuer.services.agents import AgentService
from issuer.services.bundles import BundleService
from issuer.services.entries import EntryService
from issuer.services.hub import Hub
from issuer.services.ratelimit import RateLimit
from issuer.services.refusals import RefusalLog
from issuer.services.svids import SvidService
from issuer.store.engine import StoreError, unusable
from issuer.store.rows import PRUNE_ROWS
from issuer.store.store import Repositories, SqlJournal, Store
from issuer.telemetry.metrics import ServerMetrics
from spiffe_core.errors import PreconditionError, SpiffeError
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import renew_at
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.exclusive import held, without_leftovers
from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.frontdoor.peer import Peer
from spiffe_wire.frontdoor.tls import server_context
from spiffe_wire.httpstatus import StatusServer
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.logs import event
from spiffe_wire.metrics import CONTENT_TYPE

if TYPE_CHECKING:  # an HTTP client, which only a server with clusters needs
    from spiffe_wire.k8s.client import Client

_log = logging.getLogger(__name__)
MAX_CONNECTION_AGE: Final = timedelta(minutes=3)  # SEC-17
STOP_GRACE: Final = timedelta(seconds=5)  # SEC-108: all of it within 10 s
KEEP_EVENTS: Final = timedelta(hours=24)
KEEP_ISSUED: Final = timedelta(hours=24)  # after it expired
KEEP_EXPIRED: Final = timedelta(hours=1)  # so that `issuer explain` can say what it was
KEEP_GONE: Final = timedelta(days=30)  # no cache holds an entry that went so long ago
HEAL_INTERVAL: Final = timedelta(seconds=2)
PRUNE_INTERVAL: Final = timedelta(minutes=10)


@dataclass
class OwnSvid:
    """The server's own X509-SVID, renewed by itself, and the TLS context made of it."""

    svids: SvidService
    hub: Hub
    clock: Clock
    server_id: SpiffeId
    ttl: timedelta
    svid: X509Svid | None = None
    _key: bytes = field(default=b"", repr=False)
    _context: tuple[tuple[int, int], ssl.SSLContext] | None = None

    async def renew(self) -> None:
        """Get a new key and SVID."""
        private = ec.generate_private_key(ec.SECP256R1())
        signed = await self.svids.sign_own(
            self.server_id, spki_of(private.public_key()), self.ttl
        )
        self.svid, self._key = signed.svid, pkcs8_of(private)

    def context(self) -> ssl.SSLContext:
        """The context for the next connection: made anew when SVID or bundle changed."""
        assert self.svid is not None  # noqa: S101 renewed before any door opens
        version = (self.svid.serial_number, self.hub.bundle.sequence_number)
        if self._context is None or self._context[0] != version:
            roots = [one.der for one in self.hub.bundle.x509_authorities]
            self._context = version, server_context(self.svid.chain, self._key, roots)
        return self._context[1]

    async def run(self) -> None:
        """Renew at half-life until cancelled; a failed try is made again in seconds."""
        while True:
            assert self.svid is not None  # noqa: S101
            due = renew_at(self.svid.validity) - self.clock.now()
            await self.clock.sleep(max(min(due, timedelta(minutes=1)), timedelta(seconds=1)))
            if self.clock.now() >= renew_at(self.svid.validity):
                try:
                    await self.renew()
                except SpiffeError as error:
                    event(_log, logging.ERROR, "own_svid_not_renewed", exc_info=error)


@dataclass
class Server:
    """A running server."""

    settings: ServerSettings
    store: Store
    rotator: Rotator
    hub: Hub
    own: OwnSvid
    metrics: ServerMetrics
    entries: EntryService
    agents: AgentService
    refusals: RefusalLog
    pods: PodVerifier
    port: int = 0
    status_port: int = 0
    ready: bool = False

    def problems(self) -> list[str]:
        """What keeps this server from being ready; empty when nothing does (SEC-114)."""
        found = [] if self.ready else ["starting or stopping"]
        found += [
            one for one in (self.store.problem, self.rotator.problem, self.hub.problem) if one
        ]
        if self.own.svid is not None and not self.own.svid.validity.covers(
            self.own.clock.now()
        ):
            found.append("the server's own SVID has expired")
        return found

    def cluster_problems(self) -> dict[str, str]:
        """Why pods of a cluster are known from before, or not at all; by cluster."""
        return {name: one.problem for name, one in self.pods.clusters.items() if one.problem}

    def is_ready(self) -> bool:
        """True when agents and operators can be served."""
        return not self.problems()


@asynccontextmanager
async def serve(
    settings: ServerSettings,
    clock: Clock | None = None,
    *,
    die: Callable[[int], object] = os._exit,
) -> AsyncIterator[Server]:
    """
    Run a server while entered; it is ready when this yields.

    *die* ends the process when a part fails that nothing can be served safely without.

    Raises:
        SpiffeError: says what keeps it from starting, and what to do.
    """
    clock = clock or SystemClock()
    os.umask(0o077)
    # Threads of the store run Python too: without this the loop waits 5 ms for its turn.
    sys.setswitchinterval(0.001)
    trust_domain = TrustDomain(settings.trust_domain)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(held(settings.data_dir, "data_dir"))
        stack.enter_context(held(settings.runtime_dir, "runtime_dir"))
        store = await Store.open(settings.database, trust_domain, clock)
        stack.push_async_callback(store.close)
        rotator = Rotator(
            SqlJournal(store),
            DiskKeyManager(settings.data_dir / "keys"),
            settings.rotation,
            clock,
            trust_domain,
        )
        hub = Hub(store, trust_domain)
        try:
            await rotator.start()
            await hub.hydrate()
        except StoreError as error:
            raise unusable(settings.database) from error
        metrics = ServerMetrics()
        running: list[Server] = []
        clients = _clients(stack, settings)
        api = _api(
            settings, store, hub, rotator, clock, metrics, _attestors(settings, clients),
            _pods(settings, clients, metrics), lambda: running[0].is_ready(),
        )  # fmt: skip
        own = OwnSvid(api.svids, hub, clock, trust_domain.server_id, settings.svids.agent_ttl)
        await own.renew()
        refusals = api.callers.refusals
        server = Server(
            settings, store, rotator, hub, own, metrics, api.entries, api.agents, refusals,
            api.svids.pods,
        )  # fmt: skip
        running.append(server)
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "rotate": rotator.run,
            "fold": hub.run,
            "own-svid": own.run,
            "refusals": refusals.run,
            "prune": partial(_prune, store, api.agents, api.entries, clock),
            "heal": partial(_heal, store, clock),
            **{f"cluster {name}": one.run for name, one in server.pods.clusters.items()},
        }
        await stack.enter_async_context(_background(server, loops, die))
        await _open_doors(stack, server, api)
        server.ready = True
        event(_log, logging.INFO, "server_ready", trust_domain=trust_domain, port=server.port)
        try:
            yield server
        finally:
            server.ready = False
            hub.stop()
            event(_log, logging.INFO, "server_stopping")


def _clients(
    stack: contextlib.AsyncExitStack, settings: ServerSettings
) -> "Mapping[str, Client]":
    """One for each cluster; a server without a cluster has no HTTP client in it."""
    if not settings.clusters:
        return {}
    from spiffe_wire.k8s.client import Client
    from spiffe_wire.k8s.credentials import CredentialsError, access_of

    made: dict[str, Client] = {}
    for one in settings.clusters:
        try:
            made[one.name] = Client(access_of(one.kubeconfig, one.context, os.environ))
        except CredentialsError as error:
            raise PreconditionError(f"cluster {one.name}: {error}") from error
        stack.push_async_callback(made[one.name].close)
    return made


def _attestors(
    settings: ServerSettings, clients: "Mapping[str, Client]"
) -> Mapping[str, NodeAttestor]:
    trust_domain = TrustDomain(settings.trust_domain)
    made: dict[str, NodeAttestor] = {JoinTokenAttestor.type: JoinTokenAttestor(trust_domain)}
    if settings.clusters:
        from issuer.attestation.k8s_psat import ClusterAccess, K8sPsatAttestor

        clusters = {
            one.name: ClusterAccess(one, clients[one.name]) for one in settings.clusters
        }
        made[K8sPsatAttestor.type] = K8sPsatAttestor(trust_domain, clusters)
    return made


def _pods(
    settings: ServerSettings, clients: "Mapping[str, Client]", metrics: ServerMetrics
) -> PodVerifier:
    if not settings.clusters:
        return PodVerifier()
    from issuer.k8s.cluster import ClusterWatch

    arrivals = Arrivals()
    clusters = {
        one.name: ClusterWatch(one, clients[one.name], arrivals)
        for one in settings.clusters
        if one.verify_pods
    }
    return PodVerifier(clusters, arrivals, metrics.on_pod_checked, metrics.on_pod_refused)


def _api(
    settings: ServerSettings,
    store: Store,
    hub: Hub,
    rotator: Rotator,
    clock: Clock,
    metrics: ServerMetrics,
    attestors: Mapping[str, NodeAttestor],
    pods: PodVerifier,
    is_ready: Callable[[], bool],
) -> Api:
    trust_domain = TrustDomain(settings.trust_domain)
    refusals = RefusalLog(store)
    svids = SvidService(
        store,
        hub,
        rotator,
        clock,
        check_profile(settings.x509_profile, clock.now()),
        settings.jwt_profile,
        trust_domain,
        refusals,
        metrics.on_issued,
        pods,
    )
    agents = AgentService(
        store, hub, svids, clock, trust_domain, attestors, settings.svids.agent_ttl
    )
    admin_ids = frozenset(SpiffeId.parse(one) for one in settings.admin_ids)
    signing = SIGNING_RATE if settings.rate_limits.signing else 0
    return Api(
        hub,
        clock,
        EntryService(store, hub, trust_domain),
        agents,
        svids,
        BundleService(store, hub, trust_domain),
        Callers(hub, agents, refusals, clock, admin_ids),
        ApiLimits(
            RateLimit("attest agent", 1 if settings.rate_limits.attestation else 0),
            RateLimit("certificate signing", signing),
            RateLimit("JWT signing request", signing),
            RateLimit("post status", STATUS_RATE),
        ),
        is_ready,
    )


async def _open_doors(stack: contextlib.AsyncExitStack, server: Server, api: Api) -> None:
    settings = server.settings
    interceptors = [ErrorInterceptor(server.metrics.on_call), AccessInterceptor(api.callers)]
    inner = without_leftovers(settings.runtime_dir / "inner")

    def door(*, local: bool, max_age: timedelta | None = None) -> FrontDoor:
        def cut(peer: Peer) -> None:
            made.disconnect(lambda one: one is peer)

        made = FrontDoor(
            lambda grpc_server: api.register(grpc_server, local=local, cut=cut),
            runtime_dir=inner,
            interceptors=interceptors,
            max_age=max_age,
        )
        return made

    tcp = await stack.enter_async_context(door(local=False, max_age=MAX_CONNECTION_AGE))
    admin = await stack.enter_async_context(door(local=True))

    def identify(chain: tuple[bytes, ...]) -> X509Svid:
        return verify_x509_svid(chain, server.hub.own_roots(), at=server.own.clock.now())

    uids = frozenset({0, os.geteuid(), *settings.admin_uids})
    mode = 0o600 if not settings.admin_uids else 0o666  # the list of uids decides then
    await admin.listen_unix(settings.admin_socket_path, mode=mode, allowed_uids=uids)
    server.port = await tcp.listen_tls(
        settings.bind_address, settings.bind_port, context=server.own.context, identify=identify
    )
    if settings.status.port or settings.bind_port == 0:
        status = await stack.enter_async_context(_status(server))
        server.status_port = status.port

    async def close() -> None:
        await asyncio.gather(admin.close(STOP_GRACE), tcp.close(STOP_GRACE))

    stack.push_async_callback(close)


def _status(server: Server) -> StatusServer:
    metrics = server.metrics

    def ready() -> tuple[int, str, bytes]:
        problems = server.problems()
        body: dict[str, object] = {"ready": not problems, "problems": problems}
        if away := server.cluster_problems():
            body["clusters"] = away
        data = json.dumps(body).encode() + b"\n"
        return (503 if problems else 200), "application/json", data

    def page() -> tuple[int, str, bytes]:
        metrics.entries.set(len(server.hub.index))
        metrics.agents.set(server.hub.index.agent_count)
        metrics.watchers.set(server.hub.watchers)
        metrics.event_seq.set(server.hub.seq)
        ends = server.rotator.x509.authority.validity.not_after
        metrics.authority_expiry.labels("x509").set(ends.timestamp())
        metrics.authority_expiry.labels("jwt").set(
            server.rotator.jwt.validity.not_after.timestamp()
        )
        for name, cluster in server.pods.clusters.items():
            metrics.cluster_pods.labels(name).set(len(cluster.pods))
            metrics.cluster_in_step.labels(name).set(0 if cluster.problem else 1)
            metrics.cluster_away.labels(name).set(cluster.away.total_seconds())
        return 200, CONTENT_TYPE, metrics.registry.text()

    routes = {
        "/live": lambda: (200, "application/json", b'{"live": true}\n'),
        "/ready": ready,
        "/metrics": page,
    }
    return StatusServer(server.settings.status.host, server.settings.status.port, routes)


@asynccontextmanager
async def _background(
    server: Server,
    loops: Mapping[str, Callable[[], Awaitable[None]]],
    die: Callable[[int], object],
) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(_watched(name, loop, server, die), name=name)
        for name, loop in loops.items()
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watched(
    name: str,
    loop: Callable[[], Awaitable[None]],
    server: Server,
    die: Callable[[int], object],
) -> None:
    """
    Run a loop that a server must not be without.

    Without the feed bans would not be heard of, without the rotation nothing would be
    signed one day: so this ends the process, and a supervisor starts it again from what is
    durable.
    """
    try:
        await loop()
    except Exception as error:  # noqa: BLE001 whatever it is, the loop is over
        server.ready = False
        event(_log, logging.CRITICAL, "background_failed", loop=name, exc_info=error)
        die(1)


async def _heal(store: Store, clock: Clock) -> None:
    """Find out by ourselves that a full disk has room again (SEC-102, SEC-114)."""
    while True:
        await clock.sleep(HEAL_INTERVAL)
        if store.problem:
            with contextlib.suppress(SpiffeError):
                await store.probe()


async def _prune(
    store: Store, agents: AgentService, entries: EntryService, clock: Clock
) -> None:
    """Drop what nobody will ask for any more, in steps that keep no writer waiting."""

    def step(repos: Repositories) -> bool:
        now = clock.now()
        agents.prune_tokens(repos)
        more = entries.forget_expired(repos, now - KEEP_EXPIRED)
        most = max(
            repos.events.prune(now - KEEP_EVENTS),
            repos.issued.prune(now - KEEP_ISSUED),
            repos.entries.forget_gone(now - KEEP_GONE),
        )
        return more or most == PRUNE_ROWS

    while True:
        await clock.sleep(PRUNE_INTERVAL)
        try:
            while await store.write(step):
                pass
        except SpiffeError as error:
            event(_log, logging.WARNING, "prune_failed", exc_info=error)
