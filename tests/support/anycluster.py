"""One API server as tests see it: the stand-in, or the real one that KUBECONFIG names."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpcore

from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import Access, Source, from_kubeconfig

ACCOUNT = "tester"
MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class AnyCluster:
    """Changes a cluster over REST as an administrator; the same calls whichever it is."""

    access: Access
    namespace: str
    """Made for this test, and deleted after it, with all that is in it."""
    node: str
    pool: httpcore.AsyncConnectionPool

    async def call(
        self, method: str, path: str, body: Any = None, kind: str = "application/json"
    ) -> Any:
        """Ask as the administrator; the answer must be a good one."""
        headers = [("Host", self.access.host), ("Content-Type", kind)]
        if bearer := self.access.bearer():
            headers.append(("Authorization", f"Bearer {bearer}"))
        answer = await self.pool.request(
            method,
            f"https://{self.access.host}:{self.access.port}{self.access.path}{path}",
            headers=headers,
            content=None if body is None else json.dumps(body).encode(),
        )
        assert answer.status in (200, 201, 202), (answer.status, answer.content[:500])
        return json.loads(answer.content)

    def path(self, plural: str, *name: str) -> str:
        """Where things of the test's namespace are."""
        return "/".join((f"/api/v1/namespaces/{self.namespace}/{plural}", *name))

    async def make_pod(self, name: str, **labels: str) -> Mapping[str, Any]:
        """A pod on the node, whose image is nowhere: it needs not run to be known."""
        spec = {
            "serviceAccountName": ACCOUNT,
            "automountServiceAccountToken": False,
            "nodeName": self.node,
            "tolerations": [{"operator": "Exists"}],
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {"name": "app", "image": "nowhere.invalid/app:1", "imagePullPolicy": "Never"}
            ],
        }
        metadata = {"name": name, "labels": labels}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        return dict(await self.call("POST", self.path("pods"), body))

    async def relabel(self, name: str, **labels: str | None) -> None:
        """Change labels of a pod."""
        await self.call(
            "PATCH", self.path("pods", name), {"metadata": {"labels": labels}}, MERGE
        )

    async def delete_pod(self, name: str) -> None:
        """Delete a pod at once."""
        await self.call("DELETE", self.path("pods", name), {"gracePeriodSeconds": 0})

    async def token(
        self, audience: str = "", pod: Mapping[str, Any] | None = None, seconds: int = 3600
    ) -> str:
        """A token of the test's account, for a pod if one is given."""
        spec: dict[str, Any] = {"expirationSeconds": seconds}
        spec["audiences"] = [audience] if audience else []
        if pod is not None:
            meta = pod["metadata"]
            spec["boundObjectRef"] = {
                "kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"],
            }  # fmt: skip
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = await self.call("POST", self.path("serviceaccounts", ACCOUNT, "token"), body)
        return str(answer["status"]["token"])

    def client(self, token: str | None = None) -> Client:
        """Our client, as the administrator or as the holder of *token*."""
        if token is None:
            return Client(self.access)
        return Client(
            replace(self.access, token=Source(data=token.encode()), certificate=None, key=None)
        )


@asynccontextmanager
async def any_cluster(kubeconfig: Path, node: str = "") -> AsyncIterator[AnyCluster]:
    """A namespace of our own in the cluster that *kubeconfig* is an administrator's for."""
    access = from_kubeconfig(kubeconfig)
    async with httpcore.AsyncConnectionPool(access.context()) as pool:
        made = AnyCluster(access, f"spiffe-issuer-{secrets.token_hex(4)}", node, pool)
        if not node:
            nodes = await made.call("GET", "/api/v1/nodes")
            made = replace(made, node=nodes["items"][0]["metadata"]["name"])
        metadata = {"name": made.namespace}
        await made.call(
            "POST",
            "/api/v1/namespaces",
            {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata},
        )
        try:
            account = {
                "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT},
            }  # fmt: skip
            await made.call("POST", made.path("serviceaccounts"), account)
            yield made
        finally:
            await made.call("DELETE", f"/api/v1/namespaces/{made.namespace}")
