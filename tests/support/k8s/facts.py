"""
An API server to state facts about: the fake, or a real one that KUBECONFIG names.

Plain httpcore and ssl, so that what is proved here does not lean on our own client.
"""

import asyncio
import base64
import json
import os
import ssl
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpcore
import yaml

from tests.support.clock import DrivenClock
from tests.support.k8s.cluster import FakeCluster

Body = dict[str, Any]
KUBECONFIG = "KUBECONFIG"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Body:
        """The content as JSON."""
        return json.loads(self.content)

    @property
    def message(self) -> str:
        """What a Status says."""
        return str(self.body["message"])


@dataclass
class Api:
    """One API server, an administrator's credential, and a namespace of one's own."""

    url: str
    context: ssl.SSLContext
    anonymous: ssl.SSLContext
    token: str
    namespace: str
    cluster: FakeCluster | None
    _pools: dict[bool, httpcore.AsyncConnectionPool] = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """Whether this is a real cluster."""
        return self.cluster is None

    @property
    def here(self) -> str:
        """The path of the own namespace."""
        return f"/api/v1/namespaces/{self.namespace}"

    def _pool(self, is_admin: bool) -> httpcore.AsyncConnectionPool:
        if is_admin not in self._pools:
            context = self.context if is_admin else self.anonymous
            self._pools[is_admin] = httpcore.AsyncConnectionPool(ssl_context=context)
        return self._pools[is_admin]

    async def close(self) -> None:
        """Close its connections."""
        for pool in self._pools.values():
            await pool.aclose()

    def _headers(self, token: str | None, more: dict[str, str]) -> dict[Any, Any]:
        given = self.token if token is None else token
        credential = {"Authorization": f"Bearer {given}"} if given else {}
        return {"Accept": "application/json"} | credential | more

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        content_type: str = "application/json",
        **headers: str,
    ) -> Answer:
        """One request: an administrator's, or with *token* (empty for nobody) another's."""
        sent = self._headers(token, headers)
        content = None
        if body is not None:
            sent["Content-Type"] = content_type
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
        pool = self._pool(token is None)
        answer = await pool.request(method, self.url + path, headers=sent, content=content)
        headers = {key.decode().lower(): value.decode() for key, value in answer.headers}
        return Answer(answer.status, headers, answer.content)

    async def made(self, path: str, body: Body) -> Body:
        """Create an object; it must succeed."""
        answer = await self.ask("POST", path, body)
        assert answer.status == 201, answer.content
        return answer.body

    @asynccontextmanager
    async def watch(
        self, path: str, *, token: str | None = None, accept: str = "application/json"
    ) -> AsyncIterator[AsyncIterator[Body]]:
        """The events of a watch."""
        sent = self._headers(token, {"Accept": accept})
        pool = self._pool(token is None)
        async with pool.stream("GET", self.url + path, headers=sent) as answer:
            assert answer.status == 200, await answer.aread()
            yield _events(answer)

    async def patch(self, path: str, change: Body) -> Answer:
        """A JSON merge patch."""
        kind = "application/merge-patch+json"
        return await self.ask("PATCH", path, change, content_type=kind)

    async def account(self, name: str = "web") -> Body:
        """A service account in the own namespace."""
        meta = {"name": name}
        return await self.made(f"{self.here}/serviceaccounts", {"metadata": meta})

    async def pod(self, name: str = "web-1", account: str = "default", **labels: str) -> Body:
        """A pod that no scheduler will ever place."""
        spec = {
            "schedulerName": "nobody",
            "serviceAccountName": account,
            "containers": [{"name": "app", "image": "registry.example/none:1"}],
        }
        body = {"metadata": {"name": name, "labels": labels}, "spec": spec}
        return await self.made(f"{self.here}/pods", body)

    async def ask_token(self, account: str = "web", **spec: Any) -> Answer:
        """A TokenRequest."""
        return await self.ask(
            "POST", f"{self.here}/serviceaccounts/{account}/token", {"spec": spec}
        )

    async def bound_token(self, account: str, pod: Body, *audiences: str) -> str:
        """A token bound to a pod, for *audiences*."""
        meta = pod["metadata"]
        ref = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        answer = await self.ask_token(
            account, audiences=list(audiences), boundObjectRef=ref, expirationSeconds=600
        )
        assert answer.status == 201, answer.content
        return str(answer.body["status"]["token"])

    async def review(self, token: str, *audiences: str, by: str | None = None) -> Answer:
        """A TokenReview."""
        spec = {"token": token, "audiences": list(audiences)}
        kind = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        return await self.ask("POST", path, {**kind, "spec": spec}, token=by)

    async def kubelet(self, node: str) -> "Api":
        """The kubelet of a node, asked without a look at its certificate."""
        if self.cluster is not None and node not in self.cluster.kubelets:
            await self.cluster.kubelet(node)
        status = (await self.ask("GET", f"/api/v1/nodes/{node}")).body["status"]
        port = status["daemonEndpoints"]["kubeletEndpoint"]["Port"]
        kinds = {one["type"]: one["address"] for one in status["addresses"]}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        url = f"https://{kinds['InternalIP']}:{port}"
        return Api(url, context, context, "", self.namespace, self.cluster)

    async def pass_by(self, span: timedelta) -> None:
        """Let time go by: at once where the clock is ours."""
        if self.cluster is None:
            await asyncio.sleep(span.total_seconds())
        else:
            assert isinstance(self.cluster.clock, DrivenClock)
            self.cluster.clock.advance(span)


async def _events(answer: httpcore.Response) -> AsyncIterator[Body]:
    held = b""
    async for chunk in answer.aiter_stream():
        held += chunk
        while b"\n" in held:
            line, held = held.split(b"\n", 1)
            yield json.loads(line)
    assert held == b"", "a watch ends with a whole line"


async def take(events: AsyncIterator[Body], count: int) -> list[Body]:
    """The next *count* events that are no bookmark."""
    found: list[Body] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            event = await anext(events)
            if event["type"] != "BOOKMARK":
                found.append(event)
    return found


@asynccontextmanager
async def fake_api() -> AsyncIterator[Api]:
    """The fake, with its clock in our hands."""
    async with FakeCluster(clock=DrivenClock()) as cluster:
        with tempfile.TemporaryDirectory() as folder:
            path = cluster.kubeconfig(Path(folder))
            async with _opened(path, cluster) as api:
                yield api


@asynccontextmanager
async def real_api() -> AsyncIterator[Api]:
    """The cluster that KUBECONFIG names."""
    async with _opened(Path(os.environ[KUBECONFIG]), None) as api:
        yield api


@asynccontextmanager
async def _opened(path: Path, cluster: FakeCluster | None) -> AsyncIterator[Api]:
    read = yaml.safe_load(path.read_text())
    name = read.get("current-context", "")
    context = next(one for one in read["contexts"] if one["name"] == name)["context"]
    target = next(one for one in read["clusters"] if one["name"] == context["cluster"])
    user = next(one for one in read["users"] if one["name"] == context["user"])["user"]
    ca = _content(path, target["cluster"], "certificate-authority").decode()
    admin = ssl.create_default_context(cadata=ca)
    if certificate := _content(path, user, "client-certificate"):
        with tempfile.NamedTemporaryFile() as file:
            file.write(certificate + b"\n" + _content(path, user, "client-key"))
            file.flush()
            admin.load_cert_chain(file.name)
    namespace = f"facts-{uuid.uuid4().hex[:10]}"
    api = Api(
        target["cluster"]["server"],
        admin,
        ssl.create_default_context(cadata=ca),
        user.get("token", ""),
        namespace,
        cluster,
    )
    try:
        await api.made("/api/v1/namespaces", {"metadata": {"name": namespace}})
        try:
            await _wait_for_account(api)
            yield api
        finally:
            await api.ask("DELETE", f"/api/v1/namespaces/{namespace}")
    finally:
        await api.close()


async def _wait_for_account(api: Api) -> None:
    # Controllers make the default account; until then no pod is let in.
    async with asyncio.timeout(20):
        path = f"{api.here}/serviceaccounts"
        async with api.watch(f"{path}?watch=1&fieldSelector=metadata.name%3Ddefault") as events:
            await take(events, 1)


def _content(path: Path, entry: Body, field: str) -> bytes:
    if inline := entry.get(f"{field}-data"):
        return base64.b64decode(inline)
    return (path.parent / entry[field]).read_bytes() if field in entry else b""
