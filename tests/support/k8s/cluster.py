"""
A whole cluster: its API server, kubelets, objects, tokens and the files that clients need.

``async with FakeCluster() as cluster:`` serves on loopback.  Objects are made by methods, at
once and without HTTP; clients see them as watch events.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from tests.support.k8s import admission, files, objects
from tests.support.k8s.calls import Calls
from tests.support.k8s.faults import Faults
from tests.support.k8s.inventory import Inventory, Pod
from tests.support.k8s.kubelet import FakeKubelet
from tests.support.k8s.listening import Listener
from tests.support.k8s.objects import Container, Owner
from tests.support.k8s.pki import ClusterCa, Pair, server_context
from tests.support.k8s.resources import (
    NODES,
    SECRETS,
)
from tests.support.k8s.server import ApiServer
from tests.support.k8s.status import gone
from tests.support.k8s.tokens import Clock, TokenAuthority, WallClock
from tests.support.k8s.users import AUTHENTICATED, MASTERS, User

ISSUER = "https://kubernetes.default.svc"
NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
         "kubernetes.default.svc.cluster.local")  # fmt: skip


class FakeCluster(Inventory):
    """One cluster; what is not said is as `kubeadm` sets it up."""

    def __init__(
        self,
        name: str = "demo",
        *,
        clock: Clock | None = None,
        host: str = "127.0.0.1",
        version: str = "v1.20.2",
        algorithm: Literal["RS256", "ES256"] = "RS256",
        issuer: str = ISSUER,
        audiences: tuple[str, ...] | None = None,
        history: int = 20_000,
    ) -> None:
        super().__init__(name, clock or WallClock(), version, history, host)
        self.tokens = TokenAuthority(
            self.store,
            self.clock,
            issuer=issuer,
            audiences=audiences,
            algorithm=algorithm,
            which=name,
            version=version,
        )
        self.api = ApiServer(
            self.store,
            self.tokens,
            self.clock,
            self.catalogue,
            version=version,
            ca_pem=self.ca.pem.decode(),
            base_url=lambda: self.url,
        )
        self._names = (*NAMES, host)
        self._context = server_context(self.ca.serving(self._names), self.ca)
        self._listener = Listener(self.api.handle, self._context, host)
        self.kubelets: dict[str, FakeKubelet] = {}

    # Life.

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.faults.clear()
        for kubelet in self.kubelets.values():
            await kubelet.close()
        await self.stop()
        self._listener.close()

    async def start(self) -> None:
        """Listen, again on the port it had."""
        await self._listener.start()

    async def stop(self) -> None:
        """Break all connections; from now on they are refused.  Objects stay."""
        await self._listener.stop()

    async def deafen(self) -> None:
        """Break all connections; new ones get no TLS handshake until `start` or `stop`."""
        await self._listener.deafen()

    @property
    def port(self) -> int:
        """The port, the same from the beginning to the end."""
        return self._listener.port

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    @property
    def faults(self) -> Faults:
        """What goes wrong at the API server."""
        return self.api.faults

    @property
    def calls(self) -> Calls:
        """What the API server was asked."""
        return self.api.calls

    def present(self, which: Literal["right", "wrong-ca", "wrong-name", "expired"]) -> None:
        """Which certificate the API server shows in handshakes from now on."""
        pairs = {
            "right": lambda: self.ca.serving(self._names),
            "wrong-ca": lambda: ClusterCa(f"{self.name}-ca").serving(self._names),
            "wrong-name": lambda: self.ca.serving(["elsewhere.example"]),
            "expired": lambda: self.ca.serving(self._names, expired=True),
        }
        pairs[which]().load_into(self._context)

    @property
    def connections(self) -> int:
        """How many clients are connected to the API server."""
        return self._listener.connections

    def cut(self) -> None:
        """Break all connections; new ones are welcome."""
        self._listener.cut()

    # Watches.

    @property
    def watching(self) -> int:
        """How many watches are open."""
        return len(self.api.watches)

    def cut_watches(self, *, broken: bool = True, plural: str = "") -> int:
        """End all open watches, by a broken connection or well; say how many."""
        chosen = [one for one in self.api.watches if plural in ("", one.resource.plural)]
        for watch in chosen:
            if broken:
                watch.abort()
            else:
                watch.end()
        return len(chosen)

    def bookmark(self) -> None:
        """Send a bookmark on every watch that asked for them."""
        for watch in self.api.watches:
            watch.bookmark()

    def compact(self) -> int:
        """Forget all older versions: asked for, they are 410 Gone; return the last."""
        self.store.bump()
        return self.store.compact()

    def expire_watches(self) -> None:
        """Send ERROR 410 on every open watch, as when the watch cache fell behind."""
        for watch in self.api.watches:
            watch.fail(gone(f"too old resource version: {self.store.version}"))

    def write_on_watches(self, line: bytes, *, plural: str = "") -> None:
        """Send bytes as they are on every open watch."""
        for watch in self.api.watches:
            if plural in ("", watch.resource.plural):
                watch.raw(line)

    def hold_watches(self) -> None:
        """Let all watches lag: what happens from now on is told at `release_watches`."""
        self.api.gate.clear()

    def release_watches(self) -> None:
        """Tell what was held."""
        self.api.gate.set()

    def silence(self, is_silent: bool = True) -> None:
        """Let open watches miss what happens, as a connection that died unnoticed does."""
        for watch in self.api.watches:
            watch.silent = is_silent

    # Credentials.

    def projected_token(
        self,
        pod: Pod,
        audience: str | Sequence[str] = "spire-server",
        lifetime: timedelta = timedelta(hours=1),
        **claims: Any,
    ) -> str:
        """The token a kubelet projects into a pod; *claims* replace what would be right."""
        account = self.find("serviceaccounts", pod.account, pod.namespace)
        audiences = (audience,) if isinstance(audience, str) else tuple(audience)
        right = self.tokens.claims(
            account, pod=pod.body, audiences=audiences, lifetime=lifetime
        )
        return self.tokens.seal(right | claims)

    def account_token(self, namespace: str, name: str, audience: str = "") -> str:
        """A token of a service account, bound to no pod; for the API server by default."""
        account = self.service_account(namespace, name)
        audiences = (audience,) if audience else ()
        return self.tokens.seal(self.tokens.claims(account, audiences=audiences))

    def legacy_token(self, namespace: str, name: str) -> str:
        """A token from a Secret, as accounts had before 1.24: no pod, no end, no audience."""
        account = self.service_account(namespace, name)
        secret = f"{name}-token-{objects.a_uid()[:5]}"
        meta = {"name": secret, "annotations": {"kubernetes.io/service-account.name": name}}
        token = self.tokens.legacy(account, secret)
        body = {"metadata": meta, "type": "kubernetes.io/service-account-token"}
        self.create(SECRETS, namespace, body)
        return token

    def static_token(self, user: str, *groups: str, token: str = "") -> str:
        """A person's token, which names no audience."""
        made = token or f"static-{objects.a_uid()}"
        self.tokens.static[made] = User(user, (*groups, AUTHENTICATED))
        return made

    def client_certificate(self, user: str, *groups: str) -> Pair:
        """A client's certificate."""
        return self.ca.client(user, groups)

    def kubeconfig(
        self,
        folder: Path,
        *,
        user: str = "",
        groups: Sequence[str] = (),
        token: str = "",
        token_file: Path | None = None,
        inline: bool = True,
        name: str = "",
        **changes: Any,
    ) -> Path:
        """
        Write a kubeconfig into *folder*; its path.  An administrator's unless told otherwise.

        *user* and *groups* make a client certificate; *token* or *token_file* take its place.
        *changes* replace members of the cluster entry (``server``, ``tls-server-name`` ...).
        """
        pair = None
        if not token and token_file is None:
            groups = groups if user else (MASTERS,)
            pair = self.ca.client(user or "kubernetes-admin", groups)
        return files.kubeconfig(
            folder,
            name or self.name,
            {"server": self.url} | changes,
            self.ca.pem,
            pair=pair,
            token=token,
            token_file=token_file,
            inline=inline,
        )

    def in_cluster(
        self, folder: Path, token: str, namespace: str = "default"
    ) -> dict[str, str]:
        """Write what a pod finds about its account; return the environment it has."""
        content = {"token": token, "ca.crt": self.ca.pem.decode(), "namespace": namespace}
        files.project(folder, content)
        return {"KUBERNETES_SERVICE_HOST": self.host, "KUBERNETES_SERVICE_PORT": str(self.port)}

    # Kubelets.

    async def kubelet(
        self, node: str = "n1", *, ca: ClusterCa | None = None, names: Sequence[str] = ()
    ) -> FakeKubelet:
        """
        Start the kubelet of a node; it ends with the cluster.

        Its certificate is of the cluster's CA unless *ca* is another, and for the node's
        name and address unless *names* are others.  (One that a real kubelet made for
        itself has a CA of its own and the node's name alone.)
        """
        body = objects.copied(self.node(node))
        address = body["status"]["addresses"][0]["address"]
        pair = (ca or self.ca).serving(names or (node, address), f"system:node:{node}")
        kubelet = FakeKubelet(self.api, node, pair, self.ca, address)
        await kubelet.start()
        self.kubelets[node] = kubelet
        body["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = kubelet.port
        self.store.put(NODES, admission.key_of(NODES, "", node), body)
        return kubelet

    async def settled(self, plural: str = "", count: int = 1) -> None:
        """Return once *count* watches are open."""
        async with asyncio.timeout(10):
            while sum(plural in ("", one.resource.plural) for one in self.api.watches) < count:
                await asyncio.sleep(0.005)


__all__ = ["Container", "FakeCluster", "Owner", "Pod"]
