"""The API server itself: who asks, what, whether they may, and the answer."""

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from tests.support.k8s import admission, discovery, listing, rbac
from tests.support.k8s.answers import (
    PARTIAL,
    broken_answer,
    error_answer,
    failure,
    json_answer,
    partial,
    reset,
    text_answer,
    wanted_form,
)
from tests.support.k8s.calls import Call, Calls
from tests.support.k8s.faults import Faults
from tests.support.k8s.resources import (
    ACCESS_REVIEWS,
    NAMESPACES,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    TOKEN_REVIEWS,
    Catalogue,
    PageNotFound,
    Resource,
    Target,
    target_of,
)
from tests.support.k8s.selecting import fields_test, labels_test, required_name
from tests.support.k8s.status import (
    ApiError,
    bad_request,
    conflict,
    forbidden,
    not_acceptable,
    not_allowed,
    not_found,
    unauthorized,
    unsupported_media_type,
    unsupported_patch,
)
from tests.support.k8s.store import Body, Store
from tests.support.k8s.token_requests import requested
from tests.support.k8s.tokens import Clock, TokenAuthority
from tests.support.k8s.users import ANONYMOUS, User, person
from tests.support.k8s.watching import Watch

_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch",
          "DELETE": "delete"}  # fmt: skip
MAX_BODY_BYTES = 1 << 20  # a real server reads three times as much
SECRET_TYPE = "kubernetes.io/service-account-token"
_TOKEN_REQUEST = ("serviceaccounts", "token", "create")
MERGE_PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")


@dataclass(frozen=True)
class Asked:
    """One request, read."""

    request: web.BaseRequest
    target: Target
    verb: str
    user: User

    @property
    def query(self) -> Any:
        """The URL's parameters."""
        return self.request.query


class ApiServer:
    """Answers requests over one store."""

    def __init__(
        self,
        store: Store,
        tokens: TokenAuthority,
        clock: Clock,
        catalogue: Catalogue,
        *,
        version: str,
        ca_pem: str,
        base_url: Callable[[], str],
    ) -> None:
        self.store = store
        self.tokens = tokens
        self.clock = clock
        self.version = version
        self.ca_pem = ca_pem
        self.base_url = base_url
        self.catalogue = catalogue
        self.calls = Calls()
        self.faults = Faults()
        self.watches: set[Watch] = set()
        self.anonymous = False
        """Let in who brings no credential, as `system:anonymous`."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.reviewing: Callable[[Body, Body], Any] = lambda spec, status: status
        """May change the status of a TokenReview: it gets the spec and what would be right."""
        self.gone_as_status = False
        """Say 410 to a watch as HTTP status instead of an ERROR event, as some servers do."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; what it was and how it ended is on record."""
        target = target_of(request.path) or Target()
        verb = self._verb(request, target)
        name = target.name or (
            required_name(request.query.get("fieldSelector", ""))
            if verb in ("list", "watch")
            else ""
        )
        target = replace(target, name=name)
        user = self.authenticate(request)
        call = Call(
            user.name if user else "",
            verb,
            target.group,
            target.plural,
            target.subresource,
            target.namespace,
            target.name,
            request.path,
        )
        asked = Asked(request, target, verb, user or ANONYMOUS)
        try:
            answer = await self._answer(asked, call, is_known=user is not None)
        except PageNotFound:
            answer = text_answer("404 page not found\n", 404)
        except ApiError as error:
            answer = error_answer(request, error)
        except web.HTTPRequestEntityTooLarge:
            message = f"Request entity too large: limit is {MAX_BODY_BYTES}"
            too_large = ApiError(413, "RequestEntityTooLarge", message)
            answer = error_answer(request, too_large)
        except asyncio.CancelledError:
            self.calls.add(call)
            raise
        if not isinstance(answer, _Noted):
            self.calls.add(replace(call, status=answer.status))
        return answer

    @staticmethod
    def _verb(request: web.BaseRequest, target: Target) -> str:
        verb = _VERBS.get(request.method, request.method.lower())
        if not target.plural:
            return request.method.lower()
        if verb == "get" and not target.name:
            return "watch" if request.query.get("watch") in ("1", "true") else "list"
        if verb == "delete" and not target.name:
            return "deletecollection"
        return verb

    def authenticate(self, request: web.BaseRequest) -> User | None:
        """The user of a client certificate or else of a bearer token; None is nobody."""
        certificate = request.transport and request.transport.get_extra_info("peercert")
        if certificate:
            parts = [pair for rdn in certificate["subject"] for pair in rdn]
            name = next((value for key, value in parts if key == "commonName"), "")
            groups = [value for key, value in parts if key == "organizationName"]
            return person(name, *groups)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return None
        return self.tokens.check(token.strip()).user

    async def _answer(self, asked: Asked, call: Call, *, is_known: bool) -> web.StreamResponse:
        request = asked.request
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
                return await broken_answer(request, fault, asked.verb == "watch")
        if not is_known and (not self.anonymous or "Authorization" in request.headers):
            raise unauthorized()
        self._authorise(asked)
        if not asked.target.plural:
            return self._page(asked)
        resource = self.catalogue.find(asked.target)
        is_of_one = asked.verb in ("get", "update", "patch", "delete")
        fits = asked.verb in ("list", "watch") or is_of_one == bool(asked.target.name)
        if not asked.target.subresource and (asked.verb not in resource.verbs or not fits):
            raise not_allowed()
        if asked.verb == "watch":
            return await self._watch(asked, resource, call)
        if asked.target.subresource:
            return await self._subresource(asked)
        if resource is TOKEN_REVIEWS:
            return await self._review(asked)
        if resource is ACCESS_REVIEWS:
            return await self._own_access(asked)
        return await getattr(self, f"_{asked.verb}")(asked, resource)

    def _authorise(self, asked: Asked) -> None:
        target, path = asked.target, asked.request.path
        what = rbac.Attributes(
            asked.user,
            asked.verb,
            target.group,
            target.plural,
            target.subresource,
            target.namespace,
            target.name,
            path,
        )
        allowed, missing = rbac.allows(self.store, what)
        if not allowed:
            why = what.sentence() + (f": {missing}" if missing else "")
            raise forbidden(target.group, target.plural, target.name, why)

    # Paths that are no resource.

    def _page(self, asked: Asked) -> web.Response:
        path = asked.request.path
        if path in ("/livez", "/readyz", "/healthz"):
            return text_answer("ok", 200, **{"X-Content-Type-Options": "nosniff"})
        if path == "/openid/v1/jwks":
            answer = json_answer(asked.request, self.tokens.jwks())
            if asked.request.headers.get("Accept") != "application/json":
                answer.content_type = "application/jwk-set+json"
        elif path == "/.well-known/openid-configuration":
            body = discovery.openid(self.tokens.issuer, self.base_url(), self.tokens.algorithm)
            answer = json_answer(asked.request, body)
        else:
            found = discovery.page(path, self.catalogue, self.version)
            if found is None:
                paths = sorted(rbac.DISCOVERY)
                return json_answer(asked.request, {"paths": paths}, 404)
            return json_answer(asked.request, found)
        answer.headers["Cache-Control"] = "public, max-age=3600"
        return answer

    # Reading.

    def _found(self, asked: Asked, resource: Resource) -> Body:
        target = asked.target
        found = self.store.get(admission.key_of(resource, target.namespace, target.name))
        if found is None:
            raise not_found(target.group, target.plural, target.name)
        return found

    async def _get(self, asked: Asked, resource: Resource) -> web.Response:
        form = wanted_form(asked.request)
        found = self._found(asked, resource)
        if form == f"{PARTIAL}List":
            raise not_acceptable(
                f"you requested {form}, but the requested object is not a list "
                f"(*core.{resource.kind})"
            )
        return json_answer(asked.request, partial(found) if form else found)

    def _selection(self, asked: Asked, resource: Resource) -> Callable[[Body], bool]:
        by_label = labels_test(asked.query.get("labelSelector", ""))
        by_field = fields_test(asked.query.get("fieldSelector", ""), resource)
        namespace = asked.target.namespace if resource.namespaced else ""

        def sees(body: Body) -> bool:
            here = namespace in ("", body["metadata"].get("namespace", ""))
            return here and by_label(body) and by_field(body)

        return sees

    async def _list(self, asked: Asked, resource: Resource) -> web.Response:
        form = wanted_form(asked.request)
        if form == PARTIAL:
            raise not_acceptable(
                f"you requested {form}, but the requested object is a list "
                f"(*core.{resource.kind}List)"
            )
        sees = self._selection(asked, resource)
        page = listing.page_of(self.store, asked.query)
        bodies = listing.bodies(self.store, resource, page)
        body = listing.listed(resource, [one for one in bodies if sees(one)], page, form)
        return json_answer(asked.request, body)

    async def _watch(self, asked: Asked, resource: Resource, call: Call) -> web.StreamResponse:
        form = wanted_form(asked.request)
        sees = self._selection(asked, resource)
        since = listing.version_of(asked.query) or None  # "0" means any state, as none does
        if self.gone_as_status and since is not None:
            self.store.changes_after(since)
        watch = Watch(
            self.store,
            resource,
            sees,
            is_partial=bool(form),
            bookmarks=asked.query.get("allowWatchBookmarks") in ("1", "true"),
            user=asked.user.name,
            gate=self.gate,
        )
        answer = _Noted(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache"}
        )
        answer.enable_chunked_encoding()
        seconds = float(asked.query.get("timeoutSeconds") or 1800)
        self.watches.add(watch)
        watch.begin(since)
        self.calls.add(replace(call, status=200))
        timer = asyncio.get_running_loop().call_later(seconds, _end, watch)
        try:
            await answer.prepare(asked.request)
            await watch.serve(asked.request, answer)
        except ConnectionError:
            pass  # the client went: nothing is left to tell it
        finally:
            timer.cancel()
            watch.close()
            self.watches.discard(watch)
        return answer

    # Writing.

    async def _body(self, asked: Asked, kind: str, *patches: str) -> Body:
        kinds = patches or ("application/json",)
        if "Content-Type" in asked.request.headers and asked.request.content_type not in kinds:
            raise unsupported_patch() if patches else unsupported_media_type()
        try:
            read = json.loads(await asked.request.read())
        except ValueError as error:
            raise bad_request(
                "the object provided is unrecognized (must be of type "
                f"{kind}): couldn't get version/kind; json parse error: {error}"
            ) from error
        if not isinstance(read, dict):
            raise bad_request(
                f"the object provided is unrecognized (must be of type {kind}): couldn't get "
                "version/kind; json parse error: it is no object"
            )
        return read

    async def _create(self, asked: Asked, resource: Resource) -> web.Response:
        body = await self._body(asked, resource.kind)
        namespace = asked.target.namespace
        now = self.clock.now()
        if resource is SECRETS:
            body = self._with_token(namespace, body)
        made = admission.created(self.store, resource, namespace, body, now, self.ca_pem)
        return json_answer(asked.request, made, 201)

    def _with_token(self, namespace: str, body: Body) -> Body:
        """A secret for a service account's token, filled as its controller does it."""
        notes = (body.get("metadata") or {}).get("annotations") or {}
        name = notes.get("kubernetes.io/service-account.name", "")
        account = self.store.get(admission.key_of(SERVICE_ACCOUNTS, namespace, name))
        if body.get("type") != SECRET_TYPE or account is None:
            return body
        token = self.tokens.legacy(account, body["metadata"]["name"])
        plain = {"token": token, "ca.crt": self.ca_pem, "namespace": namespace}
        data = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
        return body | {"data": data}

    async def _update(self, asked: Asked, resource: Resource) -> web.Response:
        body = await self._body(asked, resource.kind)
        before = self._found(asked, resource)
        version = body["metadata"].get("resourceVersion")
        admission.must_be_current(resource, before, version)
        meta = before["metadata"] | {
            key: value
            for key, value in body["metadata"].items()
            if key in ("labels", "annotations", "ownerReferences", "finalizers")
        }
        return json_answer(
            asked.request, self._keep(resource, before | body | {"metadata": meta})
        )

    async def _patch(self, asked: Asked, resource: Resource) -> web.Response:
        change = await self._body(asked, resource.kind, *MERGE_PATCHES)
        before = self._found(asked, resource)
        return json_answer(
            asked.request, self._keep(resource, admission.merged(resource, before, change))
        )

    def _keep(self, resource: Resource, body: Body) -> Body:
        meta = body["metadata"]
        key = admission.key_of(resource, meta.get("namespace", ""), meta["name"])
        return self.store.put(resource, key, body)

    async def _delete(self, asked: Asked, resource: Resource) -> web.Response:
        found = self._found(asked, resource)
        sent = await asked.request.read()
        options = json.loads(sent) if sent[:1] == b"{" else {}
        uid = (options.get("preconditions") or {}).get("uid")
        meta = found["metadata"]
        if uid and uid != meta["uid"]:
            why = (
                f"Precondition failed: UID in precondition: {uid}, "
                f"UID in object meta: {meta['uid']}"
            )
            raise conflict(resource.group, resource.plural, meta["name"], why)
        graceful = options.get("gracePeriodSeconds") != 0
        leaving = admission.removed(
            self.store, self.catalogue, resource, found, self.clock.now(), graceful=graceful
        )
        if resource in (PODS, NAMESPACES, SERVICE_ACCOUNTS):
            return json_answer(asked.request, leaving)
        details = {"name": meta["name"], "kind": resource.plural, "uid": meta["uid"]}
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return json_answer(asked.request, body | {"details": details})

    # Tokens.

    async def _review(self, asked: Asked) -> web.Response:
        wanted_form(asked.request)
        body = await self._body(asked, TOKEN_REVIEWS.kind)
        admission.must_be(TOKEN_REVIEWS, body)
        spec = body.get("spec") or {}
        token = spec.get("token", "")
        if not token:
            raise bad_request("token is required for TokenReview in authentication")
        status = self.tokens.review(token, tuple(spec.get("audiences") or ()))
        made = {
            "kind": "TokenReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"creationTimestamp": None} | (body.get("metadata") or {}),
            "spec": spec,
            "status": self.reviewing(spec, status),
        }
        return json_answer(asked.request, made, 201)

    async def _own_access(self, asked: Asked) -> web.Response:
        body = await self._body(asked, ACCESS_REVIEWS.kind)
        admission.must_be(ACCESS_REVIEWS, body)
        spec = body.get("spec") or {}
        wanted = spec.get("resourceAttributes") or {}
        names = ("verb", "group", "resource", "subresource", "namespace", "name")
        what = rbac.Attributes(asked.user, *(wanted.get(one, "") for one in names))
        allowed, _ = rbac.allows(self.store, what)
        made = {
            "kind": ACCESS_REVIEWS.kind,
            "apiVersion": f"{ACCESS_REVIEWS.group}/v1",
            "metadata": {"creationTimestamp": None},
            "spec": spec,
            "status": {"allowed": allowed},
        }
        return json_answer(asked.request, made, 201)

    async def _subresource(self, asked: Asked) -> web.Response:
        target = asked.target
        if (target.plural, target.subresource, asked.verb) == _TOKEN_REQUEST:
            account = self._found(asked, SERVICE_ACCOUNTS)
            body = await self._body(asked, "TokenRequest")
            made = requested(self.store, self.tokens, self.clock.now(), account, body)
            return json_answer(asked.request, made, 201)
        if (target.plural, target.subresource, asked.verb) == ("pods", "status", "patch"):
            return await self._patch(asked, PODS)
        raise not_allowed()


class _Noted(web.StreamResponse):
    """An answer whose call is on record already."""


def _end(watch: Watch) -> None:
    watch.bookmark()
    watch.end()
