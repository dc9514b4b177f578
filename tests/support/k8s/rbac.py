"""Authorisation as RBAC decides it, from roles and bindings as manifests write them."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.support.k8s.resources import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    ROLE_BINDINGS,
    ROLES,
    Resource,
)
from tests.support.k8s.store import Body, Store
from tests.support.k8s.users import AUTHENTICATED, MASTERS, User, account_name

DISCOVERY = ("/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi",
              "/openapi/*", "/readyz", "/version", "/version/")  # fmt: skip
_PUBLIC = ["/healthz", "/livez", "/readyz", "/version", "/version/"]
_KEYS = ("/.well-known/openid-configuration", "/openid/v1/jwks")


@dataclass(frozen=True)
class Attributes:
    """What is to be decided: a verb on a resource, or on a path."""

    user: User
    verb: str
    group: str = ""
    plural: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    def sentence(self) -> str:
        """What the user cannot do, as a 403 says it."""
        who = f'User "{self.user.name}" cannot {self.verb}'
        if not self.plural:
            return f'{who} path "{self.path}"'
        what = f"{self.plural}/{self.subresource}" if self.subresource else self.plural
        scope = (
            f'in the namespace "{self.namespace}"' if self.namespace else "at the cluster scope"
        )
        return f'{who} resource "{what}" in API group "{self.group}" {scope}'


def allows(store: Store, asked: Attributes) -> tuple[bool, str]:
    """Whether RBAC allows it, and what it says about roles that it could not find."""
    if MASTERS in asked.user.groups:
        return True, ""
    missing: list[str] = []
    for binding in store.objects(CLUSTER_ROLE_BINDINGS):
        if _is_bound(binding, asked.user, "") and _grants(
            _rules(store, binding, "", missing), asked
        ):
            return True, ""
    if asked.namespace:
        for binding in store.objects(ROLE_BINDINGS, asked.namespace):
            if _is_bound(binding, asked.user, asked.namespace) and _grants(
                _rules(store, binding, asked.namespace, missing), asked
            ):
                return True, ""
    return False, f"RBAC: {', '.join(missing)}" if missing else ""


def _is_bound(binding: Body, user: User, namespace: str) -> bool:
    for subject in binding.get("subjects") or []:
        kind, name = subject["kind"], subject["name"]
        if kind == "User" and name == user.name:
            return True
        if kind == "Group" and name in user.groups:
            return True
        where = subject.get("namespace", namespace)
        if kind == "ServiceAccount" and account_name(where, name) == user.name:
            return True
    return False


def _rules(store: Store, binding: Body, namespace: str, missing: list[str]) -> list[Body]:
    ref = binding["roleRef"]
    resource, where = (
        (CLUSTER_ROLES, "") if ref["kind"] == "ClusterRole" else (ROLES, namespace)
    )
    role = store.get((resource.group, resource.plural, where, ref["name"]))
    if role is None:
        kind = resource.kind.lower()
        missing.append(f'{kind}.rbac.authorization.k8s.io "{ref["name"]}" not found')
        return []
    return role.get("rules") or []


def _grants(rules: Iterable[Body], asked: Attributes) -> bool:
    return any(_rule_grants(rule, asked) for rule in rules)


def _rule_grants(rule: Body, asked: Attributes) -> bool:
    if not _has(rule, "verbs", asked.verb):
        return False
    if not asked.plural:
        return any(
            path in ("*", asked.path)
            or (path.endswith("*") and asked.path.startswith(path[:-1]))
            for path in rule.get("nonResourceURLs") or []
        )
    if not _has(rule, "apiGroups", asked.group):
        return False
    listed = rule.get("resources") or []
    wanted = f"{asked.plural}/{asked.subresource}" if asked.subresource else asked.plural
    everywhere = bool(asked.subresource) and f"*/{asked.subresource}" in listed
    if not ("*" in listed or wanted in listed or everywhere):
        return False
    names = rule.get("resourceNames") or []
    return not names or asked.name in names


def _has(rule: Body, field: str, value: str) -> bool:
    listed = rule.get(field) or []
    return "*" in listed or value in listed


def _role(name: str, *rules: Body) -> Body:
    return {"metadata": {"name": name}, "rules": list(rules)}


def _to_group(role: str, group: str) -> Body:
    return {
        "metadata": {"name": role},
        "roleRef": {"apiGroup": CLUSTER_ROLES.group, "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "Group", "name": group, "apiGroup": CLUSTER_ROLES.group}],
    }


def bootstrap() -> list[tuple[Resource, Body]]:
    """The roles and bindings that a new cluster has and that matter to its clients."""
    everything = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}
    reviews = {
        "apiGroups": ["authentication.k8s.io"],
        "resources": ["tokenreviews"],
        "verbs": ["create"],
    }
    about_oneself = {
        "apiGroups": ["authorization.k8s.io"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
        "verbs": ["create"],
    }
    kubelet = {
        "apiGroups": [""],
        "resources": [f"nodes/{one}" for one in ("proxy", "stats", "log", "spec", "metrics")],
        "verbs": ["*"],
    }
    roles = [
        _role("cluster-admin", everything, {"nonResourceURLs": ["*"], "verbs": ["*"]}),
        _role("system:discovery", {"nonResourceURLs": list(DISCOVERY), "verbs": ["get"]}),
        _role("system:public-info-viewer", {"nonResourceURLs": _PUBLIC, "verbs": ["get"]}),
        _role("system:basic-user", about_oneself),
        _role("system:auth-delegator", reviews),
        _role("system:kubelet-api-admin", kubelet),
        _role(
            "system:service-account-issuer-discovery",
            {"nonResourceURLs": list(_KEYS), "verbs": ["get"]},
        ),
    ]
    bindings = [
        _to_group("system:discovery", AUTHENTICATED),
        _to_group("system:basic-user", AUTHENTICATED),
        _to_group("system:public-info-viewer", "system:unauthenticated"),
        _to_group("system:service-account-issuer-discovery", "system:serviceaccounts"),
    ]
    return [(CLUSTER_ROLES, role) for role in roles] + [
        (CLUSTER_ROLE_BINDINGS, binding) for binding in bindings
    ]
