"""
A whole cluster: its API server, kubelets, objects, tokens and the files that clients need.

``async with FakeCluster() as cluster:`` serves on loopback.  Objects are made by methods, at
once and without HTTP; clients see them as watch events.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from tests.support.k8s import admission, files, objects, rbac
from tests.support.k8s.calls import Calls
from tests.support.k8s.faults import Faults
from tests.support.k8s.kubelet import FakeKubelet
from tests.support.k8s.listening import Listener
from tests.support.k8s.objects import Container, Owner
from tests.support.k8s.pki import ClusterCa, Pair, server_context
from tests.support.k8s.resources import (
    CONFIG_MAPS,
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    Resource,
)
from tests.support.k8s.server import ApiServer
from tests.support.k8s.status import gone
from tests.support.k8s.store import Body, Store
from tests.support.k8s.tokens import Clock, TokenAuthority, WallClock
from tests.support.k8s.users import AUTHENTICATED, MASTERS, User

ISSUER = "https://kubernetes.default.svc"
NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
         "kubernetes.default.svc.cluster.local")  # fmt: skip


@dataclass(frozen=True)
class Pod:
    """A handle on one pod: the same name made anew is another."""

    cluster: "FakeCluster"
    namespace: str
    name: str
    uid: str

    @property
    def body(self) -> Body:
        """The object as it is; of a pod that is gone, as it was last seen."""
        return self.cluster.last_seen[self.uid]

    @property
    def node(self) -> str:
        """The name of its node, or nothing."""
        return str(self.body["spec"].get("nodeName", ""))

    @property
    def account(self) -> str:
        """The name of its service account."""
        return str(self.body["spec"]["serviceAccountName"])

    def container_id(self, name: str = "app") -> str:
        """A container's id without its scheme: the last part of its cgroup's path."""
        identifier = objects.status_of(self.body, name)["containerID"]
        return str(identifier).partition("://")[2]

    def cgroup(self, container: str = "app", qos: str = "besteffort") -> str:
        """The cgroup path that a kubelet with the cgroupfs driver gives a container."""
        parts = ["kubepods", qos, f"pod{self.uid}", self.container_id(container)]
        return "/" + "/".join(part for part in parts if part)


class FakeCluster:
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
        self.name = name
        self.version = version
        self.host = host
        self.clock: Clock = clock or WallClock()
        self.ca = ClusterCa(f"{name}-ca")
        self.store = Store(history=history)
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
            version=version,
            ca_pem=self.ca.pem.decode(),
            base_url=lambda: self.url,
        )
        self._names = (*NAMES, host)
        self._context = server_context(self.ca.serving(self._names), self.ca)
        self._listener = Listener(self.api.handle, self._context, host)
        self.kubelets: dict[str, FakeKubelet] = {}
        self.last_seen: dict[str, Body] = {}
        self.store.subscribe(self._remember)
        for resource, body in rbac.bootstrap():
            self.apply({"kind": resource.kind} | body)
        for one in ("default", "kube-node-lease", "kube-public", "kube-system"):
            self.namespace(one)

    def _remember(self, change: Any) -> None:
        if change.resource is PODS:
            body = change.after or change.before
            self.last_seen[body["metadata"]["uid"]] = body

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

    def silence(self, is_silent: bool = True) -> None:
        """Let open watches miss what happens, as a connection that died unnoticed does."""
        for watch in self.api.watches:
            watch.silent = is_silent

    # Objects.

    def apply(self, *manifests: Body) -> None:
        """Create or replace objects as manifests write them, RBAC above all."""
        kinds = {one.kind: one for one in self.api.catalogue}
        for body in manifests:
            resource = kinds[body["kind"]]
            meta = body["metadata"]
            namespace = meta.get("namespace", "default") if resource.namespaced else ""
            if resource is NAMESPACES:
                self.namespace(meta["name"], labels=meta.get("labels") or {})
                continue
            key = admission.key_of(resource, namespace, meta["name"])
            before = self.store.get(key)
            if before is None:
                now = self.clock.now()
                self.store.put(resource, key, admission.stamped(resource, namespace, body, now))
            else:
                self.store.put(
                    resource, key, before | body | {"metadata": before["metadata"] | meta}
                )

    def grant(self, subject: str, *rules: Body, namespace: str = "") -> None:
        """
        Allow rules to a user (its whole name, service accounts too) or ``group:NAME``.

        A role and a binding of one random name; with *namespace* they hold there alone.
        """
        name = f"grant-{objects.a_uid()[:8]}"
        kind, _, group = subject.rpartition("group:")
        who = {"kind": "Group" if "group:" in subject else "User", "name": group or kind}
        meta: Body = {"name": name} | ({"namespace": namespace} if namespace else {})
        prefix = "" if namespace else "Cluster"
        self.apply(
            {"kind": f"{prefix}Role", "metadata": meta, "rules": list(rules)},
            {
                "kind": f"{prefix}RoleBinding",
                "metadata": meta,
                "roleRef": {"kind": f"{prefix}Role", "name": name},
                "subjects": [who],
            },
        )

    def serve(self, resource: Resource) -> None:
        """Serve one more kind of object."""
        self.api.catalogue.add(resource)

    def find(self, plural: str, name: str, namespace: str = "") -> Body:
        """An object as it is."""
        resource = next(one for one in self.api.catalogue if one.plural == plural)
        found = self.store.get(admission.key_of(resource, namespace, name))
        if found is None:
            raise KeyError(f"{plural} {namespace}/{name}")
        return found

    def _create(self, resource: Resource, namespace: str, body: Body) -> Body:
        ca = self.api.ca_pem
        return admission.created(self.store, resource, namespace, body, self.clock.now(), ca)

    def namespace(
        self, name: str, *, labels: Mapping[str, str] | None = None, uid: str = ""
    ) -> Body:
        """A namespace with its default service account; one that exists is returned."""
        existing = self.store.get(admission.key_of(NAMESPACES, "", name))
        if existing is not None:
            return existing
        named = {"kubernetes.io/metadata.name": name, **(labels or {})}
        meta = {"name": name, "uid": uid or objects.a_uid(), "labels": named}
        return self._create(NAMESPACES, "", {"metadata": meta})

    def service_account(self, namespace: str, name: str, *, uid: str = "") -> Body:
        """A service account, with its namespace if need be; one that exists is returned."""
        self.namespace(namespace)
        existing = self.store.get(admission.key_of(SERVICE_ACCOUNTS, namespace, name))
        if existing is not None:
            return existing
        meta = {"name": name, "uid": uid or objects.a_uid()}
        return self._create(SERVICE_ACCOUNTS, namespace, {"metadata": meta})

    def config_map(self, namespace: str, name: str, data: Mapping[str, str]) -> Body:
        """A configuration map."""
        self.namespace(namespace)
        body = {"metadata": {"name": name}, "data": dict(data)}
        return self._create(CONFIG_MAPS, namespace, body)

    def node(
        self,
        name: str = "n1",
        *,
        uid: str = "",
        address: str = "127.0.0.1",
        labels: Mapping[str, str] | None = None,
    ) -> Body:
        """A node that is ready; one that exists is returned."""
        existing = self.store.get(admission.key_of(NODES, "", name))
        if existing is not None:
            return existing
        body = objects.node(name, uid or objects.a_uid(), address, labels or {}, self.version)
        return self._create(NODES, "", body)

    def delete(self, plural: str, name: str, namespace: str = "") -> None:
        """Delete an object of any kind at once."""
        resource = next(one for one in self.api.catalogue if one.plural == plural)
        self.api.remove(resource, self.find(plural, name, namespace), graceful=False)

    def recreate(self, plural: str, name: str, namespace: str = "") -> Body:
        """Delete an object and make it again: the same but for its UID."""
        before = self.find(plural, name, namespace)
        resource = next(one for one in self.api.catalogue if one.plural == plural)
        self.api.remove(resource, before, graceful=False)
        meta = {
            key: value
            for key, value in before["metadata"].items()
            if key not in ("uid", "resourceVersion", "creationTimestamp")
        }
        return self._create(resource, namespace, before | {"metadata": meta})

    # Pods.

    def pod(
        self,
        name: str = "web-1",
        namespace: str = "shop",
        service_account: str = "web",
        node: str = "n1",
        *,
        labels: Mapping[str, str] | None = None,
        containers: Sequence[Container | str] = ("app",),
        owner: Owner | None = None,
        owners: Sequence[Owner] = (),
        uid: str = "",
        static: bool = False,
        annotations: Mapping[str, str] | None = None,
    ) -> Pod:
        """
        A pod whose containers run; its namespace, account and node are made if need be.

        Without a node it is Pending.  *static*: one from a file on its node, whose UID at the
        API server (of its mirror) is not the one that the kubelet and cgroups know.
        """
        self.service_account(namespace, service_account)
        address = ""
        if node:
            address = self.node(node)["status"]["addresses"][0]["address"]
        listed = [one if isinstance(one, Container) else Container(one) for one in containers]
        references = [one.body() for one in ((owner,) if owner else ()) + tuple(owners)]
        if static:
            controller = {"apiVersion": "v1", "kind": "Node", "name": node, "controller": True}
            references = [controller | {"uid": self.node(node)["metadata"]["uid"]}]
        body = objects.pod(
            name,
            namespace,
            uid=uid or objects.a_uid(),
            account=service_account,
            node_name=node,
            labels=labels or {},
            containers=listed,
            owners=references,
            host_address=address,
            now=self.clock.now(),
        )
        notes = dict(annotations or {})
        if static:
            digest = objects.a_uid().replace("-", "")
            notes |= {
                "kubernetes.io/config.hash": digest,
                "kubernetes.io/config.mirror": digest,
                "kubernetes.io/config.seen": objects.instant(self.clock.now()),
                "kubernetes.io/config.source": "file",
            }
        if notes:
            body["metadata"]["annotations"] = notes
        made = self._create(PODS, namespace, body)
        return Pod(self, namespace, name, made["metadata"]["uid"])

    def _change(self, pod: Pod) -> Body:
        found = self.find("pods", pod.name, pod.namespace)
        if found["metadata"]["uid"] != pod.uid:
            raise KeyError(f"pod {pod.namespace}/{pod.name} of UID {pod.uid} is gone")
        return objects.copied(found)

    def put_pod(self, body: Body) -> None:
        """Keep a changed copy of a pod's object."""
        meta = body["metadata"]
        self.store.put(PODS, admission.key_of(PODS, meta["namespace"], meta["name"]), body)

    def start_container(
        self,
        pod: Pod,
        name: str = "app",
        id: str = "",
        *,
        scheme: str = "containerd",
        image_id: str | None = None,
    ) -> str:
        """Start a container, or start it again; return its id without scheme."""
        identifier = id or objects.a_container_id()
        body = self._change(pod)
        now = self.clock.now()
        objects.run_container(body, name, f"{scheme}://{identifier}", now, image_id)
        self.put_pod(body)
        return identifier

    def stop_container(self, pod: Pod, name: str = "app", code: int = 0) -> None:
        """A container ends."""
        body = self._change(pod)
        objects.stop_container(body, name, code, self.clock.now())
        self.put_pod(body)

    def add_container(self, pod: Pod, container: Container) -> str:
        """An ephemeral container, as `kubectl debug` adds it; return its id."""
        body = self._change(pod)
        objects.add_container(body, container)
        self.put_pod(body)
        if container.waits:
            return ""
        return self.start_container(pod, container.name, container.id, scheme=container.scheme)

    def relabel(self, pod: Pod, labels: Mapping[str, str]) -> None:
        """Replace all labels of a pod."""
        body = self._change(pod)
        body["metadata"]["labels"] = dict(labels)
        self.put_pod(body)

    def annotate(self, pod: Pod, **annotations: str) -> None:
        """Set annotations: a change that says nothing about identity."""
        body = self._change(pod)
        body["metadata"].setdefault("annotations", {}).update(annotations)
        self.put_pod(body)

    def schedule(self, pod: Pod, node: str) -> None:
        """Bind a pod that waits to a node; its containers are yet to start."""
        body = self._change(pod)
        body["spec"]["nodeName"] = node
        body["status"]["hostIP"] = self.node(node)["status"]["addresses"][0]["address"]
        waiting = {kind: body["spec"].pop(kind, []) for kind in objects.STATUSES}
        for kind, listed in waiting.items():
            for one in listed:
                objects.add_container(body, Container(one["name"], one["image"], kind=kind))
        objects.settle(body)
        self.put_pod(body)

    def terminate_pod(self, pod: Pod) -> None:
        """Mark a pod as leaving: its containers run on until `delete_pod`."""
        self.api.terminate(PODS, self._change(pod))

    def delete_pod(self, pod: Pod, *, graceful: bool = False) -> None:
        """Delete a pod at once; *graceful* shows it as Terminating first."""
        self.api.remove(PODS, self._change(pod), graceful=graceful)

    def recreate_pod(self, pod: Pod) -> Pod:
        """The same pod again, with a new UID and new containers, as a StatefulSet makes it."""
        before = self.last_seen[pod.uid]
        key = admission.key_of(PODS, pod.namespace, pod.name)
        found = self.store.get(key)
        if found is not None:
            self.api.remove(PODS, found, graceful=False)
        listed = [
            Container(one["name"], one["image"], kind=kind)
            for kind in objects.STATUSES
            for one in before["spec"].get(kind, [])
        ]
        meta = before["metadata"]
        body = objects.pod(
            pod.name,
            pod.namespace,
            uid=objects.a_uid(),
            account=pod.account,
            node_name=pod.node,
            labels=meta.get("labels", {}),
            containers=listed,
            owners=meta.get("ownerReferences", []),
            host_address=before["status"].get("hostIP", ""),
            now=self.clock.now(),
        )
        made = self._create(PODS, pod.namespace, body)
        return Pod(self, pod.namespace, pod.name, made["metadata"]["uid"])

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
        self._create(SECRETS, namespace, body)
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
        name and address unless *names* are others.
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
