"""The objects of a cluster, made and changed by methods at once; watchers see each change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.support.k8s import admission, objects, rbac
from tests.support.k8s.objects import Container, Owner
from tests.support.k8s.pki import ClusterCa
from tests.support.k8s.resources import (
    CONFIG_MAPS,
    NAMESPACES,
    NODES,
    PODS,
    SERVICE_ACCOUNTS,
    Catalogue,
    Resource,
)
from tests.support.k8s.store import Body, Change, Store
from tests.support.k8s.tokens import Clock


@dataclass(frozen=True)
class Pod:
    """A handle on one pod: the same name made anew is another."""

    cluster: "Inventory"
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


class Inventory:
    """What a cluster holds; a new one has its bootstrap roles and four namespaces."""

    def __init__(self, name: str, clock: Clock, version: str, history: int, host: str) -> None:
        self.name = name
        self.host = host
        self.clock = clock
        self.version = version
        self.ca = ClusterCa(f"{name}-ca")
        self.store = Store(history=history)
        self.catalogue = Catalogue()
        self.last_seen: dict[str, Body] = {}
        self.store.subscribe(self._remember)
        for resource, body in rbac.bootstrap():
            self.apply({"kind": resource.kind} | body)
        for one in ("default", "kube-node-lease", "kube-public", "kube-system"):
            self.namespace(one)

    def _remember(self, change: Change) -> None:
        body = change.after or change.before
        if change.resource is PODS and body is not None:
            self.last_seen[body["metadata"]["uid"]] = body

    def apply(self, *manifests: Body) -> None:
        """
        Create or replace objects as manifests write them, RBAC above all.

        Kinds that are not served here, such as a DaemonSet, are passed over.
        """
        kinds = {one.kind: one for one in self.catalogue}
        for body in manifests:
            if body["kind"] not in kinds:
                continue
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
        self.catalogue.add(resource)

    def find(self, plural: str, name: str, namespace: str = "") -> Body:
        """An object as it is."""
        resource = next(one for one in self.catalogue if one.plural == plural)
        found = self.store.get(admission.key_of(resource, namespace, name))
        if found is None:
            raise KeyError(f"{plural} {namespace}/{name}")
        return found

    def _remove(self, resource: Resource, body: Body, *, graceful: bool = False) -> None:
        now = self.clock.now()
        admission.removed(self.store, self.catalogue, resource, body, now, graceful=graceful)

    def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        """Create an object of any kind, as the API server does it."""
        ca = self.ca.pem.decode()
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
        return self.create(NAMESPACES, "", {"metadata": meta})

    def service_account(self, namespace: str, name: str, *, uid: str = "") -> Body:
        """A service account, with its namespace if need be; one that exists is returned."""
        self.namespace(namespace)
        existing = self.store.get(admission.key_of(SERVICE_ACCOUNTS, namespace, name))
        if existing is not None:
            return existing
        meta = {"name": name, "uid": uid or objects.a_uid()}
        return self.create(SERVICE_ACCOUNTS, namespace, {"metadata": meta})

    def config_map(self, namespace: str, name: str, data: Mapping[str, str]) -> Body:
        """A configuration map."""
        self.namespace(namespace)
        body = {"metadata": {"name": name}, "data": dict(data)}
        return self.create(CONFIG_MAPS, namespace, body)

    def node(
        self,
        name: str = "n1",
        *,
        uid: str = "",
        address: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Body:
        """A node that is ready, at the cluster's address; one that exists is returned."""
        existing = self.store.get(admission.key_of(NODES, "", name))
        if existing is not None:
            return existing
        body = objects.node(
            name, uid or objects.a_uid(), address or self.host, labels or {}, self.version
        )
        return self.create(NODES, "", body)

    def delete(self, plural: str, name: str, namespace: str = "") -> None:
        """Delete an object of any kind at once."""
        resource = next(one for one in self.catalogue if one.plural == plural)
        self._remove(resource, self.find(plural, name, namespace))

    def recreate(self, plural: str, name: str, namespace: str = "") -> Body:
        """Delete an object and make it again: the same but for its UID."""
        before = self.find(plural, name, namespace)
        resource = next(one for one in self.catalogue if one.plural == plural)
        self._remove(resource, before)
        meta = {
            key: value
            for key, value in before["metadata"].items()
            if key not in ("uid", "resourceVersion", "creationTimestamp")
        }
        return self.create(resource, namespace, before | {"metadata": meta})

    def heartbeat(self, name: str = "n1") -> None:
        """A node's status is renewed, as its kubelet does it every few minutes."""
        body = objects.copied(self.find("nodes", name))
        for condition in body["status"]["conditions"]:
            condition["lastHeartbeatTime"] = objects.instant(self.clock.now())
        self.store.put(NODES, admission.key_of(NODES, "", name), body)

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
        made = self.create(PODS, namespace, body)
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
        admission.terminated(self.store, PODS, self._change(pod), self.clock.now(), 30)

    def delete_pod(self, pod: Pod, *, graceful: bool = False) -> None:
        """Delete a pod at once; *graceful* as a kubelet does it, step by step."""
        self._remove(PODS, self._change(pod), graceful=graceful)

    def recreate_pod(self, pod: Pod) -> Pod:
        """The same pod again, with a new UID and new containers, as a StatefulSet makes it."""
        before = self.last_seen[pod.uid]
        key = admission.key_of(PODS, pod.namespace, pod.name)
        found = self.store.get(key)
        if found is not None:
            self._remove(PODS, found)
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
        made = self.create(PODS, pod.namespace, body)
        return Pod(self, pod.namespace, pod.name, made["metadata"]["uid"])
