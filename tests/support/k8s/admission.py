"""What the API server and the controllers fill in when objects are made over REST."""

import uuid
from datetime import datetime, timedelta

from tests.support.k8s.objects import ended, instant
from tests.support.k8s.resources import (
    CONFIG_MAPS,
    NAMESPACES,
    PODS,
    SERVICE_ACCOUNTS,
    Catalogue,
    Resource,
)
from tests.support.k8s.status import (
    bad_request,
    conflict,
    exists,
    forbidden,
    not_found,
    required,
)
from tests.support.k8s.store import Body, Key, Store


def key_of(resource: Resource, namespace: str, name: str) -> Key:
    """Where an object is kept."""
    return resource.group, resource.plural, namespace if resource.namespaced else "", name


def stamped(resource: Resource, namespace: str, body: Body, now: datetime) -> Body:
    """The object with its kind, UID and birth, unless it has them."""
    meta = dict(body.get("metadata") or {})
    if not meta.get("name") and (begin := meta.get("generateName")):
        meta["name"] = begin + uuid.uuid4().hex[:5]
    if resource.namespaced:
        meta["namespace"] = namespace
    meta.setdefault("uid", str(uuid.uuid4()))
    meta.setdefault("creationTimestamp", instant(now))
    if not meta.get("labels", True):
        del meta["labels"]
    kinds = {"kind": resource.kind, "apiVersion": resource.api_version}
    return kinds | body | kinds | {"metadata": meta}


def created(
    store: Store, resource: Resource, namespace: str, body: Body, now: datetime, ca: str = ""
) -> Body:
    """
    Create an object, and what controllers make with it.

    Raises:
        ApiError: the name is taken, the namespace unknown, the account not there.
    """
    must_be(resource, body)
    own = (body.get("metadata") or {}).get("namespace", namespace)
    if resource.namespaced and own != namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the "
            "request"
        )
    body = stamped(resource, namespace, body, now)
    name = body["metadata"].get("name", "")
    if not name:
        why = "name or generateName is required"
        raise required(resource.group, resource.kind, "", "metadata.name", why)
    if resource.namespaced and store.get(key_of(NAMESPACES, "", namespace)) is None:
        raise not_found("", "namespaces", namespace)
    key = key_of(resource, namespace, name)
    if store.get(key) is not None:
        raise exists(resource.group, resource.plural, name)
    if resource is PODS:
        body = _pod(store, namespace, body)
    if resource is NAMESPACES:
        body |= {"spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    kept = store.put(resource, key, body)
    if resource is NAMESPACES:
        _fill_namespace(store, name, now, ca)
    return kept


def must_be(resource: Resource, body: Body) -> None:
    """
    Refuse an object of another kind or version; one that names neither is of the URL's.

    Raises:
        ApiError: 400.
    """
    version = body.get("apiVersion", resource.api_version)
    kind = body.get("kind", resource.kind)
    if version != resource.api_version and kind == resource.kind:
        raise bad_request(
            f"the API version in the data ({version}) does not match the expected API version "
            f"({resource.api_version})"
        )
    if (version, kind) != (resource.api_version, resource.kind):
        internal = f"{resource.group.partition('.')[0] or 'core'}.{resource.kind}"
        raise bad_request(
            f'{kind} in version "{version}" cannot be handled as a {resource.kind}: converting '
            f"({version}.{kind}) to ({internal}): unknown conversion"
        )


def _fill_namespace(store: Store, name: str, now: datetime, ca: str) -> None:
    account: Body = {"metadata": {"name": "default"}}
    created(store, SERVICE_ACCOUNTS, name, account, now)
    roots: Body = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": ca}}
    created(store, CONFIG_MAPS, name, roots, now)


def _pod(store: Store, namespace: str, body: Body) -> Body:
    name = body["metadata"]["name"]
    spec = {
        "serviceAccountName": "default",
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
    } | body["spec"]
    spec["serviceAccount"] = spec["serviceAccountName"]
    account = spec["serviceAccountName"]
    if store.get(key_of(SERVICE_ACCOUNTS, namespace, account)) is None:
        why = (
            f"error looking up service account {namespace}/{account}: "
            f'serviceaccount "{account}" not found'
        )
        raise forbidden("", "pods", name, why)
    status = {"phase": "Pending", "qosClass": "BestEffort"} | (body.get("status") or {})
    return body | {"spec": spec, "status": status}


def merged(resource: Resource, before: Body, change: Body) -> Body:
    """
    A JSON merge patch applied.

    Raises:
        ApiError: 409, it names another version than the object has.
    """
    wanted = (change.get("metadata") or {}).get("resourceVersion")
    must_be_current(resource, before, wanted)
    made = _merge(before, change)
    kept = {key: before["metadata"].get(key) for key in ("uid", "name", "namespace")}
    made["metadata"] |= {key: value for key, value in kept.items() if value is not None}
    return made


def must_be_current(resource: Resource, before: Body, version: str | None) -> None:
    """
    Refuse a write that was made from an older version.

    Raises:
        ApiError: 409.
    """
    if version and version != before["metadata"]["resourceVersion"]:
        why = (
            "the object has been modified; please apply your changes to the latest version "
            "and try again"
        )
        raise conflict(resource.group, resource.plural, before["metadata"]["name"], why)


def _merge(before: Body, change: Body) -> Body:
    made = dict(before)
    for key, value in change.items():
        if value is None:
            made.pop(key, None)
        elif isinstance(value, dict):
            inner = made.get(key)
            made[key] = _merge(inner if isinstance(inner, dict) else {}, value)
        else:
            made[key] = value
    return made


def removed(
    store: Store,
    catalogue: Catalogue,
    resource: Resource,
    body: Body,
    now: datetime,
    *,
    graceful: bool = True,
) -> Body:
    """
    Take an object out; return it as it was first seen to be leaving.

    A pod on a node leaves in four steps, as a kubelet ends it: it is marked, its containers
    end, it is marked again with no grace, it is gone.  Without grace, or without a node, the
    first two fall out.  A namespace empties itself before it goes.
    """
    meta = body["metadata"]
    key = key_of(resource, meta.get("namespace", ""), meta["name"])
    leaving: Body | None = None
    if resource is PODS:
        grace = body["spec"].get("terminationGracePeriodSeconds", 30)
        if graceful and grace and body["spec"].get("nodeName"):
            leaving = terminated(store, resource, body, now, grace)
            body = store.put(resource, key, ended(leaving, now))
        last = terminated(store, resource, body, now, 0)
        leaving = leaving or last
    elif resource is NAMESPACES:
        leaving = terminated(store, resource, body, now, 0)
        for kind in catalogue:
            if kind.namespaced:
                for inner in store.objects(kind, meta["name"]):
                    removed(store, catalogue, kind, inner, now, graceful=False)
    store.remove(resource, key)
    return leaving or body


def terminated(store: Store, resource: Resource, body: Body, now: datetime, grace: int) -> Body:
    """Mark an object as leaving in *grace* seconds."""
    meta = body["metadata"] | {"deletionTimestamp": instant(now + timedelta(seconds=grace))}
    if resource is PODS:
        meta["deletionGracePeriodSeconds"] = grace
    changed = body | {"metadata": meta}
    if resource is NAMESPACES:
        changed["status"] = {"phase": "Terminating"}
    key = key_of(resource, meta.get("namespace", ""), meta["name"])
    return store.put(resource, key, changed)
