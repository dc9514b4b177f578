"""Which resources the fake serves, and what a URL asks of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.k8s.status import ApiError, no_resource


@dataclass(frozen=True)
class Resource:
    """One kind of object."""

    plural: str
    kind: str
    namespaced: bool = True
    group: str = ""
    version: str = "v1"
    fields: tuple[str, ...] = ()
    """What a field selector may name, beside metadata.name and metadata.namespace."""
    verbs: tuple[str, ...] = ("create", "delete", "get", "list", "patch", "update", "watch")
    short: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """As objects and lists carry it."""
        return f"{self.group}/{self.version}" if self.group else self.version


NODES = Resource("nodes", "Node", False, fields=("spec.unschedulable",), short=("no",))
NAMESPACES = Resource("namespaces", "Namespace", False, fields=("status.phase",), short=("ns",))
PODS = Resource(
    "pods",
    "Pod",
    fields=(
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ),
    short=("po",),
)
SERVICE_ACCOUNTS = Resource("serviceaccounts", "ServiceAccount", short=("sa",))
CONFIG_MAPS = Resource("configmaps", "ConfigMap", short=("cm",))
SECRETS = Resource("secrets", "Secret", fields=("type",))
TOKEN_REVIEWS = Resource(
    "tokenreviews", "TokenReview", False, "authentication.k8s.io", verbs=("create",)
)
ACCESS_REVIEWS = Resource(
    "selfsubjectaccessreviews",
    "SelfSubjectAccessReview",
    False,
    "authorization.k8s.io",
    verbs=("create",),
)
RBAC_GROUP = "rbac.authorization.k8s.io"
CLUSTER_ROLES = Resource("clusterroles", "ClusterRole", False, RBAC_GROUP)
CLUSTER_ROLE_BINDINGS = Resource("clusterrolebindings", "ClusterRoleBinding", False, RBAC_GROUP)
ROLES = Resource("roles", "Role", True, RBAC_GROUP)
ROLE_BINDINGS = Resource("rolebindings", "RoleBinding", True, RBAC_GROUP)

BUILTIN = (
    NODES,
    NAMESPACES,
    PODS,
    SERVICE_ACCOUNTS,
    CONFIG_MAPS,
    SECRETS,
    TOKEN_REVIEWS,
    ACCESS_REVIEWS,
    CLUSTER_ROLES,
    CLUSTER_ROLE_BINDINGS,
    ROLES,
    ROLE_BINDINGS,
)
SUBRESOURCES = {
    ("", "serviceaccounts"): ("token",),
    ("", "pods"): ("status", "ephemeralcontainers", "log"),
    ("", "nodes"): ("status", "proxy"),
    ("", "namespaces"): ("status", "finalize"),
}


@dataclass(frozen=True)
class Target:
    """What a URL names: the API server's RequestInfo."""

    group: str = ""
    version: str = ""
    namespace: str = ""
    plural: str = ""
    name: str = ""
    subresource: str = ""


def target_of(path: str) -> Target | None:
    """Read a path; None when it is not one of a resource."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 2:
        namespace = rest[1]
        if len(rest) >= 3 and rest[2] not in ("status", "finalize"):
            rest = rest[2:]
    padded = [*rest, "", "", ""]
    return Target(group, version, namespace, padded[0], padded[1], padded[2])


class Catalogue:
    """The resources of one API server."""

    def __init__(self, resources: tuple[Resource, ...] = BUILTIN) -> None:
        self._by_name = {(one.group, one.plural): one for one in resources}

    def add(self, resource: Resource) -> None:
        """Serve one more, as a custom resource definition does."""
        self._by_name[resource.group, resource.plural] = resource

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._by_name.values())

    def find(self, target: Target) -> Resource:
        """
        The resource of a URL.

        Raises:
            ApiError: there is none; in an unknown group it is not even a Status.
        """
        known = {(one.group, one.version) for one in self}
        if (target.group, target.version) not in known:
            raise PageNotFound()
        found = self._by_name.get((target.group, target.plural))
        if found is None or found.version != target.version:
            raise no_resource()
        allowed = SUBRESOURCES.get((target.group, target.plural), ())
        if target.subresource and target.subresource not in allowed:
            raise no_resource()
        if found.namespaced and not target.namespace and target.name:
            raise no_resource()
        return found


class PageNotFound(ApiError):
    """No such path: the answer is plain text."""

    def __init__(self) -> None:
        super().__init__(404, "NotFound", "404 page not found")
