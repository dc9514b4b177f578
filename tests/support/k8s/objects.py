"""Objects as a real cluster holds them: nodes, pods with their containers, service accounts."""

import copy
import hashlib
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Body = dict[str, Any]


def instant(at: datetime) -> str:
    """A time as Kubernetes writes it: whole seconds, UTC."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def copied(body: Body) -> Body:
    """A copy that may be changed."""
    return copy.deepcopy(body)


def a_uid() -> str:
    """A new UID."""
    return str(uuid.uuid4())


def a_container_id() -> str:
    """A new container id: 64 hexadecimal digits, without its scheme."""
    return secrets.token_hex(32)


def digest_of(image: str) -> str:
    """A digest that is always the same for one image."""
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


def canonical(image: str) -> str:
    """An image's whole name, as containerd reports it: ``docker.io/library/nginx:latest``."""
    host = image.split("/", 1)[0]
    if "/" not in image:
        image = f"docker.io/library/{image}"
    elif "." not in host and ":" not in host and host != "localhost":
        image = f"docker.io/{image}"
    return image if ":" in image.rsplit("/", 1)[1] or "@" in image else f"{image}:latest"


@dataclass(frozen=True)
class Container:
    """A container of a pod to be; *id* empty is a new one, and it runs unless it waits."""

    name: str = "app"
    image: str = "registry.example/shop/app:1.2"
    id: str = ""
    kind: str = "containers"
    """Or ``initContainers``, ``ephemeralContainers``."""
    waits: bool = False
    image_id: str | None = None
    scheme: str = "containerd"


@dataclass(frozen=True)
class Owner:
    """The controller that made a pod."""

    kind: str = "ReplicaSet"
    name: str = "web-5d9c7b8f6d"
    uid: str = field(default_factory=a_uid)
    api_version: str = "apps/v1"

    def body(self) -> Body:
        """As `ownerReferences` holds it."""
        return {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


STATUSES = {
    "containers": "containerStatuses",
    "initContainers": "initContainerStatuses",
    "ephemeralContainers": "ephemeralContainerStatuses",
}


def node(name: str, uid: str, address: str, labels: Mapping[str, str], version: str) -> Body:
    """A node that is ready."""
    return {
        "metadata": {
            "name": name,
            "uid": uid,
            "labels": {
                "beta.kubernetes.io/arch": "amd64",
                "beta.kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                **labels,
            },
            "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
        },
        "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": address},
                {"type": "Hostname", "address": name},
            ],
            "capacity": {"cpu": "2", "memory": "8148172Ki", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {
                "machineID": uuid.uuid5(uuid.NAMESPACE_DNS, name).hex,
                "systemUUID": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
                "kernelVersion": "6.1.0",
                "osImage": "Debian GNU/Linux 12 (bookworm)",
                "containerRuntimeVersion": "containerd://1.6.20",
                "kubeletVersion": version,
                "operatingSystem": "linux",
                "architecture": "amd64",
            },
        },
    }


def pod(
    name: str,
    namespace: str,
    *,
    uid: str,
    account: str,
    node_name: str,
    labels: Mapping[str, str],
    containers: Sequence[Container],
    owners: Sequence[Body],
    host_address: str,
    now: datetime,
) -> Body:
    """A pod; on a node its containers run, without one it waits for the scheduler."""
    spec: Body = {
        "containers": [],
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": account,
        "serviceAccount": account,
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{condition}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 300,
            }
            for condition in ("not-ready", "unreachable")
        ],
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    status: Body = {"phase": "Pending", "qosClass": "BestEffort"}
    if node_name:
        spec["nodeName"] = node_name
        status |= {"hostIP": host_address, "startTime": instant(now)}
    meta: Body = {"name": name, "namespace": namespace, "uid": uid}
    if labels:
        meta["labels"] = dict(labels)
    if owners:
        meta["ownerReferences"] = list(owners)
        meta["generateName"] = f"{owners[0]['name']}-"
    meta["managedFields"] = managed_fields(labels, containers, now)
    made: Body = {"metadata": meta, "spec": spec, "status": status}
    for one in containers:
        add_container(made, one)
        if node_name and not one.waits:
            identifier = f"{one.scheme}://{one.id or a_container_id()}"
            run_container(made, one.name, identifier, now, one.image_id)
    settle(made)
    return made


def managed_fields(
    labels: Mapping[str, str], containers: Sequence[Container], now: datetime
) -> list[Body]:
    """Who set what: a third of a real pod's bytes, and nothing that we read."""
    named = [
        "image",
        "imagePullPolicy",
        "name",
        "resources",
        "terminationMessagePath",
        "terminationMessagePolicy",
    ]
    general = [
        "dnsPolicy",
        "enableServiceLinks",
        "restartPolicy",
        "schedulerName",
        "securityContext",
        "serviceAccount",
        "terminationGracePeriodSeconds",
    ]
    each = {f'k:{{"name":"{one.name}"}}': _fields(*named) for one in containers}
    spec = {"f:containers": each} | _fields(*general)
    wanted = {"f:metadata": {"f:labels": {".": {}} | _fields(*labels)}, "f:spec": spec}
    timed = ("lastProbeTime", "lastTransitionTime", "message", "reason", "status", "type")
    conditions: Body = {
        f'k:{{"type":"{kind}"}}': {".": {}} | _fields(*timed)
        for kind in ("ContainersReady", "Initialized", "Ready")
    }
    seen = _fields("containerStatuses", "hostIP", "phase", "podIP", "podIPs", "startTime")
    found = {"f:status": {"f:conditions": conditions} | seen}
    common = {"operation": "Update", "apiVersion": "v1", "time": instant(now)}
    return [
        {"manager": manager, **common, "fieldsType": "FieldsV1", "fieldsV1": fields}
        for manager, fields in (("kube-controller-manager", wanted), ("kubelet", found))
    ]


def _fields(*names: str) -> Body:
    return {f"f:{name}": {} for name in names}


def add_container(body: Body, container: Container) -> None:
    """Put a container into the spec, and into the status as one that is being made."""
    entry = {
        "name": container.name,
        "image": container.image,
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
    }
    body["spec"].setdefault(container.kind, []).append(entry)
    if not body["spec"].get("nodeName"):
        return
    status = {
        "name": container.name,
        "state": {"waiting": {"reason": "ContainerCreating"}},
        "lastState": {},
        "ready": False,
        "restartCount": 0,
        "image": container.image,
        "imageID": "",
        "started": False,
    }
    body["status"].setdefault(STATUSES[container.kind], []).append(status)


def reported(image: str) -> str:
    """The image ID that a runtime reports for an image it pulled."""
    if "@" in image:
        return canonical(image)
    name = canonical(image)
    return f"{name[: name.rindex(':')]}@{digest_of(image)}"


def status_of(body: Body, container: str) -> Body:
    """A container's status, whichever kind it is of."""
    for kind in STATUSES.values():
        for status in body["status"].get(kind, []):
            if status["name"] == container:
                return status
    raise KeyError(container)


def run_container(
    body: Body, name: str, identifier: str, now: datetime, image_id: str | None = None
) -> None:
    """A container starts: for the first time, or again with another id (with its scheme)."""
    status = status_of(body, name)
    if status.get("containerID") and "running" in status["state"]:
        stop_container(body, name, 1, now)
    if "terminated" in status["state"]:
        status["lastState"] = status["state"]
        status["restartCount"] += 1
    status |= {
        "state": {"running": {"startedAt": instant(now)}},
        "ready": True,
        "started": True,
        "containerID": identifier,
        "image": canonical(status["image"]),
        "imageID": image_id
        if image_id is not None
        else status["imageID"] or reported(status["image"]),
    }
    settle(body)


def stop_container(body: Body, name: str, code: int, now: datetime) -> None:
    """A container ends; its id stays, and stands in its end as well."""
    status = status_of(body, name)
    started = status["state"].get("running", {}).get("startedAt", instant(now))
    status["state"] = {
        "terminated": {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "startedAt": started,
            "finishedAt": instant(now),
            "containerID": status["containerID"],
        }
    }
    status |= {"ready": False, "started": False}
    settle(body)


def ended(body: Body, now: datetime) -> Body:
    """The pod with all its containers at an end."""
    made = copied(body)
    for kind in STATUSES.values():
        for status in made["status"].get(kind, []):
            if "running" in status["state"]:
                stop_container(made, status["name"], 0, now)
    return made


def settle(body: Body) -> None:
    """The pod's phase and conditions as its containers are."""
    status = body["status"]
    main = status.get("containerStatuses", [])
    runs = any("running" in one["state"] for one in main)
    ready = bool(main) and all(one["ready"] for one in main)
    if runs:
        status["phase"] = "Running"
        status.setdefault("podIP", "10.244.0.5")
        status.setdefault("podIPs", [{"ip": status["podIP"]}])
    elif main and all("terminated" in one["state"] for one in main):
        failed = any(one["state"]["terminated"]["exitCode"] for one in main)
        if body["spec"].get("restartPolicy") != "Always":
            status["phase"] = "Failed" if failed else "Succeeded"
    status["conditions"] = [
        {"type": kind, "status": "True" if holds else "False"}
        for kind, holds in (
            ("Initialized", True),
            ("Ready", ready),
            ("ContainersReady", ready),
            ("PodScheduled", bool(body["spec"].get("nodeName"))),
        )
    ]
