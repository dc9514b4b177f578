"""
Clusters whose nodes join a server: `a_cluster` makes one, `settings_of` tells a server of it.

The server's account there may do what our manifests grant it, and nothing else.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from issuer.config import Cluster
from spiffe_wire.k8s.rbac import SERVER_RULES
from tests.support.callers import Calls, Holder, Running, attest
from tests.support.k8s.cluster import FakeCluster, Pod
from workload_api.keys import make_csr, make_key

TYPE = "k8s_psat"
SERVER, AGENT = "spiffe-server", "spiffe-agent"
NAMESPACE = "spiffe"
ACCOUNT = f"{NAMESPACE}:{AGENT}"
SERVER_USER = f"system:serviceaccount:{NAMESPACE}:{SERVER}"
_numbers = count(1)


def a_cluster(name: str = "prod", **changes: Any) -> FakeCluster:
    """A cluster that lets our server do its work; to be entered."""
    made = FakeCluster(name, **{"algorithm": "ES256", **changes})
    made.service_account(NAMESPACE, SERVER)
    made.grant(SERVER_USER, *server_rules())
    return made


def server_rules(*left_out: str) -> list[dict[str, Any]]:
    """What our manifests grant, without some resources."""
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for group, resource, verbs in SERVER_RULES
        if resource not in left_out
    ]


def settings_of(
    cluster: FakeCluster, folder: Path, name: str = "", user: str = SERVER, **changes: Any
) -> Cluster:
    """How a server is told of *cluster*; its pods are not watched unless asked for."""
    token = cluster.account_token(NAMESPACE, user)
    kubeconfig = cluster.kubeconfig(folder, token=token, name=f"{name or cluster.name}-{user}")
    right: dict[str, Any] = {
        "name": name or cluster.name,
        "kubeconfig": kubeconfig,
        "service_account_allow_list": (ACCOUNT,),
        "verify_pods": False,
    }
    return Cluster(**(right | changes))


def agent_pod(cluster: FakeCluster, node: str = "", **changes: Any) -> Pod:
    """The agent's pod on a node, by default on a new one."""
    node = node or f"node-{next(_numbers)}"
    right = {"name": f"agent-{node}", "namespace": NAMESPACE, "service_account": AGENT}
    return cluster.pod(**(right | {"node": node} | changes))


def node_uid(cluster: FakeCluster, node: str) -> str:
    """The UID of a node."""
    return str(cluster.node(node)["metadata"]["uid"])


def payload_of(cluster: str, token: str, **more: Any) -> str:
    """What an agent sends, as Go's encoder writes it."""
    return json.dumps({"cluster": cluster, "token": token, **more}, separators=(",", ":"))


async def join(
    running: Running, cluster: FakeCluster, pod: Pod, *, name: str = "", key: bytes = b""
) -> Holder:
    """The agent of *pod*, attested, with a connection of its own."""
    key = key or make_key()
    token = cluster.projected_token(pod)
    answer = await sent(running.anonymous.calls, payload_of(name or cluster.name, token), key)
    assert answer.result.reattestable
    return await running.dial(tuple(answer.result.svid.cert_chain), key)


async def sent(calls: Calls, payload: str, key: bytes = b"") -> Any:
    """The answer to an attestation with *payload*."""
    return await attest(calls, payload, make_csr(key or make_key()), TYPE)


async def stored(running: Running) -> tuple[int, int]:
    """How many agents are stored, and how many certificates are on record."""
    return await running.server.store.read(
        lambda repos: (repos.agents.count(), repos.issued.count())
    )


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Everything that was logged: text, fields and errors with what they were raised from."""
    return caplog.text + "".join(repr(vars(record)) for record in caplog.records)
