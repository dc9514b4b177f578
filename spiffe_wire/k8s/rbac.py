"""
What we ask of a cluster, as RBAC names it: the manifests grant this and no more.

Each row is (API group, resource, verbs).
"""

from typing import Final, TypeAlias

Rules: TypeAlias = frozenset[tuple[str, str, frozenset[str]]]

SERVER_RULES: Final[Rules] = frozenset(
    {
        ("authentication.k8s.io", "tokenreviews", frozenset({"create"})),
        ("", "pods", frozenset({"get", "list", "watch"})),
        ("", "nodes", frozenset({"get", "list", "watch"})),
        ("", "namespaces", frozenset({"list", "watch"})),
        ("", "serviceaccounts", frozenset({"list", "watch"})),
    }
)
"""Node attestation looks a pod and its node up; verification watches the rest."""

AGENT_RULES: Final[Rules] = frozenset(
    {
        ("", "pods", frozenset({"list", "watch"})),
        ("", "namespaces", frozenset({"list", "watch"})),
        ("", "serviceaccounts", frozenset({"list", "watch"})),
    }
)
"""Of these, namespaces and accounts only for the UIDs of both and for ``ns-label``."""

KUBELET_RULES: Final[Rules] = frozenset({("", "nodes/proxy", frozenset({"get"}))})
"""Of an agent that asks its kubelet instead."""
