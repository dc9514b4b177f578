"""A kubelet's own HTTPS server: the pods of its node, to whom the API server lets ask."""

import asyncio
from dataclasses import replace

from aiohttp import web

from tests.support.k8s import objects, rbac
from tests.support.k8s.answers import (
    broken_answer,
    dumped,
    failure,
    reset,
    text_answer,
)
from tests.support.k8s.calls import Call, Calls
from tests.support.k8s.faults import Faults
from tests.support.k8s.listening import Listener
from tests.support.k8s.pki import ClusterCa, Pair, server_context
from tests.support.k8s.resources import PODS
from tests.support.k8s.server import ApiServer
from tests.support.k8s.store import Body
from tests.support.k8s.users import User

MIRROR = "kubernetes.io/config.mirror"


class FakeKubelet:
    """
    The kubelet of one node, with webhook authentication and authorisation.

    It asks the API server's own check of tokens and its RBAC: `nodes/proxy` for this node.
    (A real one remembers what it heard: a refusal for half a minute, all else for longer.)
    """

    def __init__(
        self, api: ApiServer, node: str, pair: Pair, client_ca: ClusterCa, host: str
    ) -> None:
        self._api = api
        self.node = node
        self._context = server_context(pair, client_ca)
        self._listener = Listener(self._handle, self._context, host)
        self.faults = Faults()
        self.calls = Calls()
        self._frozen: list[Body] | None = None

    @property
    def port(self) -> int:
        """Its port, the same from the beginning to the end."""
        return self._listener.port

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://{self._listener.host}:{self.port}"

    async def start(self) -> None:
        """Listen."""
        await self._listener.start()

    async def stop(self) -> None:
        """Break all connections and refuse new ones."""
        await self._listener.stop()

    async def close(self) -> None:
        """Stop for good."""
        self.faults.clear()
        await self.stop()
        self._listener.close()

    def present(self, pair: Pair) -> None:
        """Show another certificate in handshakes from now on."""
        pair.load_into(self._context)

    def freeze(self) -> None:
        """Answer from now on with the pods of now: the list lags."""
        self._frozen = self._pods()

    def thaw(self) -> None:
        """Answer with what is there again."""
        self._frozen = None

    def _pods(self) -> list[Body]:
        found = []
        for body in self._api.store.objects(PODS):
            if body["spec"].get("nodeName") == self.node:
                found.append(self._own_view(body))
        return found

    @staticmethod
    def _own_view(body: Body) -> Body:
        """A pod as its kubelet lists it: no kind, and a static pod under its own UID."""
        shown = objects.copied({key: body[key] for key in ("metadata", "spec", "status")})
        meta = shown["metadata"]
        notes = meta.setdefault("annotations", {})
        if mirrored := notes.pop(MIRROR, ""):
            meta["uid"] = mirrored
            meta.pop("ownerReferences", None)
        notes.setdefault("kubernetes.io/config.seen", meta["creationTimestamp"])
        notes.setdefault("kubernetes.io/config.source", "api")
        return shown

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        user = self._api.authenticate(request)
        who = user.name if user else ""
        call = Call(who, "get", "", "nodes", "proxy", "", self.node, request.path)
        try:
            answer = await self._answer(request, user, call)
        except asyncio.CancelledError:
            self.calls.add(call)
            raise
        self.calls.add(replace(call, status=answer.status))
        return answer

    async def _answer(
        self, request: web.BaseRequest, user: User | None, call: Call
    ) -> web.StreamResponse:
        fault = self.faults.meeting(call)
        if fault is not None:
            if fault.kind == "delay":
                await asyncio.sleep(fault.seconds)
            elif fault.kind == "hang":
                await fault.ended.wait()
            elif fault.kind == "fail":
                return failure(request, fault)
            elif fault.kind == "reset":
                return reset(request)
            else:
                return await broken_answer(request, fault, is_watch=False)
        if user is None:
            return text_answer("Unauthorized", 401)
        verb = "get" if request.method in ("GET", "HEAD") else "create"
        asked = rbac.Attributes(user, verb, "", "nodes", "proxy", "", self.node)
        if not rbac.allows(self._api.store, asked)[0]:
            where = (
                "subresource(s)=[proxy]"
                if self._api.tokens.release >= (1, 32)
                else "subresource=proxy"
            )
            text = f"Forbidden (user={user.name}, verb={verb}, resource=nodes, {where})"
            return text_answer(text, 403)
        if request.path == "/healthz":
            return text_answer("ok")
        if request.path.rstrip("/") not in ("/pods", "/runningpods"):
            return text_answer("404 page not found\n", 404)
        items = self._pods() if self._frozen is None else self._frozen
        body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
        return web.Response(
            body=dumped(body).rstrip(), headers={"Content-Type": "application/json"}
        )
