"""
What every Kubernetes API server says: recorded from a real 1.20.2, asked of the fake.

With KUBECONFIG set the same is asked of the cluster that it names, in a namespace which is made
for each test and deleted after it.

Over 500 lines: the tables of one subject stay together.
"""

import base64
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import jwt
import pytest

from tests.support.k8s.facts import KUBECONFIG, Api, Body, fake_api, real_api, take

PARTIAL = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
PARTIAL_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
AUDIENCE = "spire-server"


IS_REAL = KUBECONFIG in os.environ


@pytest.fixture(params=["fake", "real"] if IS_REAL else ["fake"])
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """The fake, and the real cluster if there is one."""
    async with real_api() if request.param == "real" else fake_api() as made:
        yield made


@pytest.mark.skipif(not IS_REAL, reason="no real cluster is asked: KUBECONFIG is not set")
async def test_a_real_cluster_is_asked() -> None:
    """The cluster of KUBECONFIG answers, so the facts below are asked of it too."""
    async with real_api() as api:
        assert (await api.ask("GET", "/version")).status == 200


async def weak_token(api: Api, name: str = "weak") -> str:
    """A token for the API server, of an account that may do nothing."""
    await api.account(name)
    return str((await api.ask_token(name)).body["status"]["token"])


async def allow(api: Api, name: str, *rules: Body) -> None:
    """Let an account of the own namespace do something there."""
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{api.namespace}"
    await api.made(f"{path}/roles", {"metadata": {"name": name}, "rules": list(rules)})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": api.namespace}
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    binding = {"metadata": {"name": name}, "roleRef": ref, "subjects": [subject]}
    await api.made(f"{path}/rolebindings", binding)


# TokenReview.


async def test_a_good_token(api: Api) -> None:
    """A bound token of the right audience tells account, groups and pod by name and UID."""
    account = await api.account()
    pod = await api.pod(account="web")
    token = await api.bound_token("web", pod, AUDIENCE)
    answer = await api.review(token, AUDIENCE)
    status = answer.body["status"]
    assert (answer.status, status["authenticated"]) == (201, True)
    assert status["audiences"] == [AUDIENCE]
    assert status["user"]["username"] == f"system:serviceaccount:{api.namespace}:web"
    assert status["user"]["uid"] == account["metadata"]["uid"]
    assert status["user"]["groups"] == [
        "system:serviceaccounts",
        f"system:serviceaccounts:{api.namespace}",
        "system:authenticated",
    ]
    extra = status["user"]["extra"]
    assert extra["authentication.kubernetes.io/pod-name"] == ["web-1"]
    assert extra["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]
    assert "error" not in status


async def test_the_review_says_what_was_asked(api: Api) -> None:
    """The answer is a TokenReview that repeats its spec."""
    answer = await api.review("garbage", AUDIENCE)
    assert answer.body["kind"] == "TokenReview"
    assert answer.body["apiVersion"] == "authentication.k8s.io/v1"
    assert answer.body["spec"] == {"token": "garbage", "audiences": [AUDIENCE]}


@pytest.mark.parametrize(
    ("meant", "asked", "common"),
    [
        ([AUDIENCE], ["x", AUDIENCE], [AUDIENCE]),
        (["a", "b", "c"], ["c", "a"], {"a", "c"}),
        (["a", "b"], ["a", "b"], {"a", "b"}),
    ],
    ids=["one-of-two", "two-of-three", "all"],
)
async def test_audiences_are_the_intersection(
    api: Api, meant: list[str], asked: list[str], common: Any
) -> None:
    """`audiences` holds those that were asked and that the token is for."""
    await api.account()
    token = await api.bound_token("web", await api.pod(account="web"), *meant)
    status = (await api.review(token, *asked)).body["status"]
    assert set(status["audiences"]) == set(common)


@pytest.mark.parametrize("asked", [("x",), ()], ids=["another", "none-asked"])
async def test_a_wrong_audience(api: Api, asked: tuple[str, ...]) -> None:
    """For another audience, or for the API server's own, it is not authenticated."""
    await api.account()
    token = await api.bound_token("web", await api.pod(account="web"), AUDIENCE)
    answer = await api.review(token, *asked)
    status = answer.body["status"]
    assert answer.status == 201
    assert "authenticated" not in status
    assert status["user"] == {}
    beginning = (
        f'[invalid bearer token, token audiences ["{AUDIENCE}"] is invalid for the target'
    )
    assert status["error"].startswith(beginning)


async def test_a_token_for_the_api_server(api: Api) -> None:
    """A token of no audience is the API server's; a review that asks none means that."""
    await api.account()
    token = (await api.ask_token("web")).body["status"]["token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    status = (await api.review(token)).body["status"]
    assert status["authenticated"] is True
    assert set(status["audiences"]) == set(claims["aud"])
    assert "authentication.kubernetes.io/pod-name" not in status["user"].get("extra", {})


def with_other_signature(token: str) -> str:
    """The token with one bit of its signature changed."""
    head, claims, signature = token.split(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    raw[5] ^= 1
    return f"{head}.{claims}.{base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"


def with_other_pod(token: str) -> str:
    """The token with another pod's UID in its claims, under the old signature."""
    head, _, signature = token.split(".")
    claims = jwt.decode(token, options={"verify_signature": False})
    claims["kubernetes.io"]["pod"]["uid"] = "00000000-0000-0000-0000-000000000000"
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{head}.{middle}.{signature}"


@pytest.mark.parametrize("tamper", [with_other_signature, with_other_pod])
async def test_a_tampered_token(api: Api, tamper: Any) -> None:
    """A token that the cluster did not sign so is invalid, by its cryptography."""
    await api.account()
    token = await api.bound_token("web", await api.pod(account="web"), AUDIENCE)
    status = (await api.review(tamper(token), AUDIENCE)).body["status"]
    assert "authenticated" not in status
    assert re.fullmatch(
        r"\[invalid bearer token, (square|go-jose)/go-jose: error in cryptographic primitive\]",
        status["error"],
    )


@pytest.mark.parametrize("token", ["garbage", "a.b.c", "e30.e30.e30"])
async def test_garbage(api: Api, token: str) -> None:
    """What is no token of this cluster is invalid, and the server says no more."""
    status = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in status
    assert "invalid bearer token" in status["error"]


async def test_another_clusters_token(api: Api) -> None:
    """A token of another issuer is invalid."""
    claims = {"iss": "https://elsewhere.example", "aud": [AUDIENCE], "sub": "x", "exp": 9e9}
    token = jwt.encode(claims, "k" * 32, algorithm="HS256")
    status = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in status
    assert "invalid bearer token" in status["error"]


async def test_no_token(api: Api) -> None:
    """A review of nothing is a bad request."""
    answer = await api.review("", AUDIENCE)
    assert answer.status == 400
    assert answer.message == "token is required for TokenReview in authentication"
    assert answer.body["reason"] == "BadRequest"


async def test_a_reviewer_without_permission(api: Api) -> None:
    """Who may not review is told so: 403 with verb, resource and group."""
    answer = await api.review("x", AUDIENCE, by=await weak_token(api))
    assert answer.status == 403
    assert answer.message == (
        'tokenreviews.authentication.k8s.io is forbidden: User "system:serviceaccount:'
        f'{api.namespace}:weak" cannot create resource "tokenreviews" in API group '
        '"authentication.k8s.io" at the cluster scope'
    )
    assert answer.body["details"] == {
        "group": "authentication.k8s.io",
        "kind": "tokenreviews",
    }


async def test_a_token_whose_pod_is_deleted(api: Api) -> None:
    """A token that was reviewed before lives on for ten seconds, and is then invalidated."""
    await api.account()
    token = await api.bound_token("web", await api.pod(account="web"), AUDIENCE)
    assert (await api.review(token, AUDIENCE)).body["status"]["authenticated"]
    await api.ask("DELETE", f"{api.here}/pods/web-1", {"gracePeriodSeconds": 0})
    assert (await api.review(token, AUDIENCE)).body["status"]["authenticated"]
    await api.pass_by(timedelta(seconds=11))
    status = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in status
    assert "oken has been invalidated" in status["error"]


async def test_a_token_whose_pod_is_another(api: Api) -> None:
    """A pod that was made again under the same name is not the pod of the token."""
    await api.account()
    pod = await api.pod(account="web")
    token = await api.bound_token("web", pod, AUDIENCE)
    await api.ask("DELETE", f"{api.here}/pods/web-1", {"gracePeriodSeconds": 0})
    await api.pod(account="web")
    status = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in status
    uid = f"claim ({pod['metadata']['uid']})"
    assert f"does not match {uid}" in status["error"]


async def test_a_token_whose_account_is_deleted(api: Api) -> None:
    """A token does not outlive its service account, not even with one of its name."""
    await api.account()
    token = (await api.ask_token("web", audiences=[AUDIENCE])).body["status"]["token"]
    await api.ask("DELETE", f"{api.here}/serviceaccounts/web")
    status = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in status
    assert 'serviceaccounts "web" not found' in status["error"]
    account = await api.account()
    status = (await api.review(token, AUDIENCE)).body["status"]
    uid = account["metadata"]["uid"]
    assert f"ServiceAccount UID ({uid}) does not match claim" in status["error"]


async def test_a_legacy_token(api: Api) -> None:
    """A token from a Secret names no pod, and is for the API server."""
    await api.account()
    meta = {"name": "old", "annotations": {"kubernetes.io/service-account.name": "web"}}
    kind = "kubernetes.io/service-account-token"
    await api.made(f"{api.here}/secrets", {"metadata": meta, "type": kind})
    path = f"{api.here}/secrets?watch=1&fieldSelector=metadata.name%3Dold"
    data: Body = {}
    async with api.watch(path) as events:
        while "token" not in data:  # a controller fills it
            data = (await take(events, 1))[0]["object"].get("data") or {}
    token = base64.b64decode(data["token"]).decode()
    status = (await api.review(token)).body["status"]
    assert status["authenticated"] is True
    extra = status["user"].get("extra", {})
    assert not [key for key in extra if "pod" in key]
    wrong = (await api.review(token, AUDIENCE)).body["status"]
    assert "authenticated" not in wrong


# TokenRequest.


@pytest.mark.parametrize("seconds", [599, 1, 0, -1])
async def test_a_token_must_live_ten_minutes(api: Api, seconds: int) -> None:
    """A shorter life is refused: 422."""
    await api.account()
    answer = await api.ask_token("web", audiences=["x"], expirationSeconds=seconds)
    assert answer.status == 422
    assert "may not specify a duration less than 10 minutes" in answer.message
    assert answer.body["details"]["causes"][0]["field"] == "spec.expirationSeconds"


async def test_a_token_for_another_pod_uid(api: Api) -> None:
    """A token is not bound to a pod of another UID: 409."""
    await api.account()
    await api.pod(account="web")
    ref = {"kind": "Pod", "apiVersion": "v1", "name": "web-1", "uid": "no"}
    answer = await api.ask_token("web", boundObjectRef=ref)
    assert (answer.status, answer.body["reason"]) == (409, "Conflict")


async def test_a_token_for_a_pod_that_is_not_there(api: Api) -> None:
    """A token is not bound to a pod that does not exist: 404."""
    await api.account()
    ref = {"kind": "Pod", "apiVersion": "v1", "name": "nix"}
    answer = await api.ask_token("web", boundObjectRef=ref)
    assert (answer.status, answer.message) == (404, 'pods "nix" not found')


async def test_a_token_for_another_accounts_pod(api: Api) -> None:
    """A token is not bound to a pod of another service account: 400."""
    await api.account()
    pod = await api.pod(account="default")
    ref = {"kind": "Pod", "apiVersion": "v1", "name": "web-1", "uid": pod["metadata"]["uid"]}
    answer = await api.ask_token("web", boundObjectRef=ref)
    assert answer.status == 400
    assert "different serviceaccount name" in answer.message


async def test_a_token_of_an_unknown_account(api: Api) -> None:
    """There is no token of an account that does not exist: 404."""
    answer = await api.ask_token("nix", audiences=["x"])
    assert (answer.status, answer.message) == (404, 'serviceaccounts "nix" not found')


async def test_the_claims_of_a_bound_token(api: Api) -> None:
    """A bound token names audience, times, subject, namespace, and pod and account by UID."""
    account = await api.account()
    pod = await api.pod(account="web")
    token = await api.bound_token("web", pod, AUDIENCE)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["aud"] == [AUDIENCE]
    assert claims["exp"] - claims["iat"] == 600
    assert claims["nbf"] == claims["iat"]
    assert claims["sub"] == f"system:serviceaccount:{api.namespace}:web"
    bound = claims["kubernetes.io"]
    assert bound["namespace"] == api.namespace
    assert bound["pod"] == {"name": "web-1", "uid": pod["metadata"]["uid"]}
    assert bound["serviceaccount"] == {"name": "web", "uid": account["metadata"]["uid"]}


async def test_the_clusters_keys(api: Api) -> None:
    """Tokens verify with the key of their `kid` in the key set that discovery points to."""
    await api.account()
    token = (await api.ask_token("web", audiences=[AUDIENCE])).body["status"]["token"]
    about = await api.ask("GET", "/.well-known/openid-configuration")
    assert about.headers["content-type"] == "application/json"
    assert about.body["jwks_uri"].endswith("/openid/v1/jwks")
    assert about.body["response_types_supported"] == ["id_token"]
    keys = await api.ask("GET", "/openid/v1/jwks", Accept="*/*")
    assert keys.headers["content-type"] == "application/jwk-set+json"
    header = jwt.get_unverified_header(token)
    assert set(header) == {"alg", "kid"}
    key = jwt.PyJWKSet.from_dict(keys.body)[header["kid"]]
    options: Any = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
    claims = jwt.decode(token, key, audience=AUDIENCE, options=options)
    assert claims["iss"] == about.body["issuer"]


# Who may ask.


async def test_a_wrong_token_is_nobody(api: Api) -> None:
    """A bearer token that does not hold gets 401, as a Status that says no more."""
    answer = await api.ask("GET", f"{api.here}/pods", token="garbage")
    assert answer.status == 401
    assert answer.body == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "Unauthorized",
        "reason": "Unauthorized",
        "code": 401,
    }


async def test_a_token_for_others_opens_nothing(api: Api) -> None:
    """A token of another audience is no credential at the API server."""
    await api.account()
    token = (await api.ask_token("web", audiences=[AUDIENCE])).body["status"]["token"]
    assert (await api.ask("GET", "/version", token=token)).status == 401


async def test_nobody(api: Api) -> None:
    """Without a credential there is nothing to see."""
    answer = await api.ask("GET", f"{api.here}/pods", token="")
    assert answer.status in ((401, 403) if api.is_real else (401,))


REFUSALS = {
    "list": ("GET", "{here}/pods", 'pods is forbidden: User "{user}" cannot list resource '
             '"pods" in API group "" in the namespace "{namespace}"'),
    "watch": ("GET", "{here}/pods?watch=1", 'pods is forbidden: User "{user}" cannot watch '
              'resource "pods" in API group "" in the namespace "{namespace}"'),
    "get": ("GET", "{here}/pods/web-1", 'pods "web-1" is forbidden: User "{user}" cannot get '
            'resource "pods" in API group "" in the namespace "{namespace}"'),
    "cluster": ("GET", "/api/v1/pods", 'pods is forbidden: User "{user}" cannot list resource '
                '"pods" in API group "" at the cluster scope'),
    "node": ("GET", "/api/v1/nodes/n1", 'nodes "n1" is forbidden: User "{user}" cannot get '
             'resource "nodes" in API group "" at the cluster scope'),
    "namespace": ("GET", "{here}", 'namespaces "{namespace}" is forbidden: User "{user}" '
                  'cannot get resource "namespaces" in API group "" in the namespace '
                  '"{namespace}"'),
    "by-name": ("GET", "{here}/configmaps?fieldSelector=metadata.name%3Dx",
                'configmaps "x" is forbidden: User "{user}" cannot list resource "configmaps" '
                'in API group "" in the namespace "{namespace}"'),
    "subresource": ("POST", "{here}/serviceaccounts/default/token",
                    'serviceaccounts "default" is forbidden: User "{user}" cannot create '
                    'resource "serviceaccounts/token" in API group "" in the namespace '
                    '"{namespace}"'),
    "delete": ("DELETE", "{here}/pods/web-1", 'pods "web-1" is forbidden: User "{user}" cannot '
               'delete resource "pods" in API group "" in the namespace "{namespace}"'),
    "path": ("GET", "/metrics", 'forbidden: User "{user}" cannot get path "/metrics"'),
    "unknown-group": ("GET", "/apis/x.example/v1/things", "things.x.example is forbidden: User "
                      '"{user}" cannot list resource "things" in API group "x.example" at the '
                      "cluster scope"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
async def test_refusals(api: Api, case: str) -> None:
    """A 403 names user, verb, resource, group and place, and so what to grant."""
    token = await weak_token(api)
    method, path, message = REFUSALS[case]
    user = f"system:serviceaccount:{api.namespace}:weak"
    values = {"here": api.here, "namespace": api.namespace, "user": user}
    body = {} if method == "POST" else None
    answer = await api.ask(method, path.format(**values), body, token=token)
    assert answer.status == 403
    assert answer.message == message.format(**values)
    assert (answer.body["reason"], answer.body["status"]) == ("Forbidden", "Failure")


async def test_a_grant_by_name(api: Api) -> None:
    """A rule with resource names allows these alone, also in a list that selects by name."""
    token = await weak_token(api)
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["yes"]}
    await allow(api, "weak", rule | {"verbs": ["get", "list"]})
    for name in ("yes", "no"):
        await api.made(f"{api.here}/configmaps", {"metadata": {"name": name}, "data": {}})
    path = f"{api.here}/configmaps"
    assert (await api.ask("GET", f"{path}/yes", token=token)).status == 200
    assert (await api.ask("GET", f"{path}/no", token=token)).status == 403
    assert (await api.ask("GET", path, token=token)).status == 403
    only = await api.ask("GET", f"{path}?fieldSelector=metadata.name%3Dyes", token=token)
    assert [one["metadata"]["name"] for one in only.body["items"]] == ["yes"]


async def test_a_grant_in_one_namespace(api: Api) -> None:
    """A role of a namespace opens that namespace, not the cluster."""
    token = await weak_token(api)
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    await allow(api, "weak", rule)
    assert (await api.ask("GET", f"{api.here}/pods", token=token)).status == 200
    assert (await api.ask("GET", "/api/v1/pods", token=token)).status == 403
    elsewhere = "/api/v1/namespaces/kube-system/pods"
    assert (await api.ask("GET", elsewhere, token=token)).status == 403


# Kubelets.


@asynccontextmanager
async def a_kubelet(api: Api) -> AsyncIterator[Api]:
    """A node's kubelet; with a pod there, if the cluster is ours."""
    if api.cluster is not None:
        api.cluster.pod(node="n1")
    nodes = (await api.ask("GET", "/api/v1/nodes")).body["items"]
    kubelet = await api.kubelet(nodes[0]["metadata"]["name"])
    try:
        yield kubelet
    finally:
        await kubelet.close()


async def test_a_kubelet_and_nobody(api: Api) -> None:
    """A kubelet knows nobody without a credential, nor with one for others: 401."""
    await api.account()
    other = (await api.ask_token("web", audiences=[AUDIENCE])).body["status"]["token"]
    async with a_kubelet(api) as kubelet:
        for token in ("", "garbage", other):
            answer = await kubelet.ask("GET", "/pods", token=token)
            assert (answer.status, answer.content.strip()) == (401, b"Unauthorized")


async def test_a_kubelet_and_permission(api: Api) -> None:
    """Without permission a kubelet says 403 and what lacks; with it, it lists its pods."""
    token = await weak_token(api)
    name, group = f"{api.namespace}-kubelet", "rbac.authorization.k8s.io"
    path = f"/apis/{group}/v1"
    rule = {"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]}
    subject = {"kind": "ServiceAccount", "name": "weak", "namespace": api.namespace}
    ref = {"apiGroup": group, "kind": "ClusterRole", "name": name}
    async with a_kubelet(api) as kubelet:
        refused = await kubelet.ask("GET", "/pods", token=token)
        assert refused.status == 403
        user = re.escape(f"system:serviceaccount:{api.namespace}:weak")
        begin = rf"Forbidden \(user={user}, verb=get, resource=nodes, subresource"
        assert re.match(begin, refused.content.decode())
        meta = {"metadata": {"name": name}}
        try:
            await api.made(f"{path}/clusterroles", meta | {"rules": [rule]})
            binding = meta | {"roleRef": ref, "subjects": [subject]}
            await api.made(f"{path}/clusterrolebindings", binding)
            answer = await kubelet.ask("GET", "/pods", token=token)
            if api.is_real and answer.status == 403:  # it remembers that for half a minute
                await api.pass_by(timedelta(seconds=31))
                answer = await kubelet.ask("GET", "/pods", token=token)
        finally:
            for plural in ("clusterrolebindings", "clusterroles"):
                await api.ask("DELETE", f"{path}/{plural}/{name}")
    assert (answer.status, answer.body["kind"]) == (200, "PodList")
    assert all("kind" not in one for one in answer.body["items"] or ())  # none is null


# Reading objects.


async def test_an_object(api: Api) -> None:
    """An object alone has its kind, a UID, a version, a birth."""
    made = await api.pod()
    answer = await api.ask("GET", f"{api.here}/pods/web-1")
    body = answer.body
    assert answer.headers["content-type"] == "application/json"
    assert (body["kind"], body["apiVersion"]) == ("Pod", "v1")
    assert body["metadata"]["uid"] == made["metadata"]["uid"]
    assert body["metadata"]["resourceVersion"].isdecimal()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["metadata"]["creationTimestamp"]
    )
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body["metadata"]["uid"])
    assert body["spec"]["serviceAccountName"] == "default"
    assert body["status"]["phase"] == "Pending"
    assert "nodeName" not in body["spec"]


async def test_a_list(api: Api) -> None:
    """A list has a version; its items have no kind, and are in the order of their names."""
    for name in ("b", "a"):
        await api.pod(name)
    body = (await api.ask("GET", f"{api.here}/pods")).body
    assert (body["kind"], body["apiVersion"]) == ("PodList", "v1")
    assert [one["metadata"]["name"] for one in body["items"]] == ["a", "b"]
    assert all("kind" not in one and "apiVersion" not in one for one in body["items"])
    assert body["metadata"]["resourceVersion"].isdecimal()


async def test_pages(api: Api) -> None:
    """A list with a limit goes on where it ended, and is of one version throughout."""
    for name in ("a", "b", "c"):
        await api.pod(name)
    first = (await api.ask("GET", f"{api.here}/pods?limit=2")).body
    assert [one["metadata"]["name"] for one in first["items"]] == ["a", "b"]
    assert first["metadata"]["remainingItemCount"] == 1
    await api.ask("DELETE", f"{api.here}/pods/c", {"gracePeriodSeconds": 0})
    more = first["metadata"]["continue"]
    second = (await api.ask("GET", f"{api.here}/pods?limit=2&continue={more}")).body
    assert [one["metadata"]["name"] for one in second["items"]] == ["c"]
    assert "continue" not in second["metadata"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


SELECTIONS = [
    ("labelSelector=app%3Dweb", {"a", "b"}),
    ("labelSelector=app%3D%3Dweb", {"a", "b"}),
    ("labelSelector=app!%3Dweb", {"c"}),
    ("labelSelector=tier", {"b"}),
    ("labelSelector=!tier", {"a", "c"}),
    ("labelSelector=tier%20in%20(x,y)", {"b"}),
    ("labelSelector=app%20in%20(web),tier%20notin%20(x)", {"a"}),
    ("fieldSelector=metadata.name%3Da", {"a"}),
    ("fieldSelector=metadata.name!%3Da", {"b", "c"}),
    ("fieldSelector=spec.nodeName%3D", {"a", "b", "c"}),
    ("fieldSelector=spec.nodeName%3Dn9", set()),
    ("fieldSelector=status.phase%3DPending,metadata.name%3Dc", {"c"}),
]


@pytest.mark.parametrize(("query", "names"), SELECTIONS, ids=[one for one, _ in SELECTIONS])
async def test_selectors(api: Api, query: str, names: set[str]) -> None:
    """Label and field selectors select."""
    await api.pod("a", app="web")
    await api.pod("b", app="web", tier="x")
    await api.pod("c", app="db")
    body = (await api.ask("GET", f"{api.here}/pods?{query}")).body
    assert {one["metadata"]["name"] for one in body["items"]} == names


YOUNG = "this API server has forgotten nothing yet: it does five minutes after its start"
ODD = {
    "version": ("GET", "{here}/pods?resourceVersion=abc", 500, "invalid syntax"),
    "watch-version": ("GET", "{here}/pods?watch=1&resourceVersion=abc", 500, "invalid syntax"),
    "limit": ("GET", "{here}/pods?limit=abc", 400, "invalid syntax"),
    "continue": ("GET", "{here}/pods?continue=abc", 400, "continue key is not valid"),
    "exactly": ("GET", "{here}/pods?resourceVersion=1&resourceVersionMatch=Exact", 410,
                "The resourceVersion for the provided list is too old."),
    "future": ("GET", "{here}/pods?resourceVersion=99999999", 504,
               "Too large resource version: 99999999"),
    "labels": ("GET", "{here}/pods?labelSelector=%3D%3D%3D", 400, "expected"),
    "fields": ("GET", "{here}/pods?fieldSelector=foo", 400, "invalid selector: 'foo'"),
    "patch-all": ("PATCH", "{here}/pods", 405, "does not allow this method"),
    "put-all": ("PUT", "{here}/pods", 405, "does not allow this method"),
    "post-one": ("POST", "{here}/pods/x", 405, "does not allow this method"),
    "reviews": ("GET", "/apis/authentication.k8s.io/v1/tokenreviews", 405, "does not allow"),
    "get-token": ("GET", "{here}/serviceaccounts/default/token", 405, "does not allow"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
async def test_odd_requests(api: Api, case: str) -> None:
    """What makes no sense has its code and a Status that says why."""
    method, path, status, message = ODD[case]
    if api.cluster is not None:
        api.cluster.compact()
    body = {} if method != "GET" else None
    answer = await api.ask(method, path.format(here=api.here), body)
    if api.is_real and status == 410 and answer.status == 200:
        pytest.skip(YOUNG)
    assert (answer.status, answer.body["code"], answer.body["kind"]) == (
        status,
        status,
        "Status",
    )
    assert message in answer.message


ODD_BODIES: dict[str, tuple[Any, str, int, str]] = {
    "text": (b"x", "text/plain", 415, "the body of the request was in an unknown format"),
    "broken": (b"{x", "application/json", 400,
               "the object provided is unrecognized (must be of type TokenReview)"),
    "kind": ({"kind": "Pod", "apiVersion": "v1"}, "application/json", 400,
             'Pod in version "v1" cannot be handled as a TokenReview'),
    "api-version": ({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1beta1"},
                    "application/json", 400, "does not match the expected API version"),
    "nothing": ({}, "application/json", 400, "token is required for TokenReview"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_BODIES)
async def test_odd_reviews(api: Api, case: str) -> None:
    """A body that is no TokenReview is refused with its reason."""
    body, kind, status, message = ODD_BODIES[case]
    path = "/apis/authentication.k8s.io/v1/tokenreviews"
    answer = await api.ask("POST", path, body, content_type=kind)
    assert (answer.status, answer.body["code"]) == (status, status)
    assert message in answer.message


async def test_a_pod_without_a_name(api: Api) -> None:
    """An object needs a name: 422."""
    spec = {"containers": [{"name": "a", "image": "x"}]}
    answer = await api.ask("POST", f"{api.here}/pods", {"metadata": {}, "spec": spec})
    assert (answer.status, answer.body["reason"]) == (422, "Invalid")
    assert answer.body["details"]["causes"][0]["field"] == "metadata.name"


async def test_a_field_that_does_not_select(api: Api) -> None:
    """A field selector of another field is a bad request."""
    answer = await api.ask("GET", f"{api.here}/pods?fieldSelector=spec.hostname%3Dx")
    assert answer.status == 400
    assert "field label not supported: spec.hostname" in answer.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{here}/pods/nix", 'pods "nix" not found'),
        ("/api/v1/nodes/nix", 'nodes "nix" not found'),
        ("/api/v1/namespaces/nix-x", 'namespaces "nix-x" not found'),
        ("/api/v1/things", "the server could not find the requested resource"),
    ],
    ids=["pod", "node", "namespace", "resource"],
)
async def test_not_there(api: Api, path: str, message: str) -> None:
    """What does not exist is a 404 Status with a text that says what."""
    answer = await api.ask("GET", path.format(here=api.here))
    assert (answer.status, answer.message) == (404, message)
    assert answer.body["reason"] == "NotFound"


async def test_no_such_path(api: Api) -> None:
    """A group that does not exist is a plain 404."""
    answer = await api.ask("GET", "/apis/nix.example/v1/things")
    assert answer.status == 404
    assert answer.content.strip() == b"404 page not found"


async def test_metadata_alone(api: Api) -> None:
    """With partial metadata asked for, there is no spec and no status."""
    made = await api.pod(app="web")
    one = (await api.ask("GET", f"{api.here}/pods/web-1", Accept=PARTIAL)).body
    assert (one["kind"], one["apiVersion"]) == ("PartialObjectMetadata", "meta.k8s.io/v1")
    assert one["metadata"]["uid"] == made["metadata"]["uid"]
    assert not {"spec", "status"} & set(one)
    many = (await api.ask("GET", f"{api.here}/pods", Accept=PARTIAL_LIST)).body
    assert (many["kind"], many["apiVersion"]) == ("PartialObjectMetadataList", "meta.k8s.io/v1")
    assert many["metadata"]["resourceVersion"].isdecimal()
    [item] = many["items"]
    assert item["metadata"]["labels"] == {"app": "web"}
    assert not {"spec", "status"} & set(item)


@pytest.mark.parametrize(
    ("path", "accept"),
    [("/pods", PARTIAL), ("/pods/web-1", PARTIAL_LIST), ("/pods", "text/html")],
    ids=["list-as-one", "one-as-list", "html"],
)
async def test_a_form_that_cannot_be_had(api: Api, path: str, accept: str) -> None:
    """A list is not had as one object's metadata, nor one object as a list: 406."""
    await api.pod()
    answer = await api.ask("GET", f"{api.here}{path}", Accept=accept)
    assert (answer.status, answer.body["reason"]) == (406, "NotAcceptable")


async def test_the_first_form_that_can_be_had(api: Api) -> None:
    """Accept is a list of wishes, the first that can be had is taken."""
    body = (await api.ask("GET", f"{api.here}/pods", Accept=f"{PARTIAL_LIST},*/*")).body
    assert body["kind"] == "PartialObjectMetadataList"
    body = (await api.ask("GET", f"{api.here}/pods", Accept="text/html,application/json")).body
    assert body["kind"] == "PodList"


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_health(api: Api, path: str) -> None:
    """A server that lives says ok."""
    answer = await api.ask("GET", path)
    assert (answer.status, answer.content) == (200, b"ok")


async def test_version(api: Api) -> None:
    """A server names its version, to anybody whom it knows."""
    body = (await api.ask("GET", "/version", token=await weak_token(api))).body
    assert re.match(r"v\d+\.\d+\.\d+", body["gitVersion"])
    assert {"major", "minor", "platform"} <= set(body)


async def test_the_clusters_own_uid(api: Api) -> None:
    """`kube-system` has a UID, which names the cluster."""
    body = (await api.ask("GET", "/api/v1/namespaces/kube-system")).body
    assert re.fullmatch(r"[0-9a-f-]{36}", body["metadata"]["uid"])


# Writing objects.


async def test_a_name_is_taken(api: Api) -> None:
    """Two objects of one name are not to be had: 409."""
    await api.account()
    answer = await api.ask("POST", f"{api.here}/serviceaccounts", {"metadata": {"name": "web"}})
    assert (answer.status, answer.body["reason"]) == (409, "AlreadyExists")
    assert answer.message == 'serviceaccounts "web" already exists'


async def test_a_pod_of_no_account(api: Api) -> None:
    """A pod whose service account does not exist is not let in."""
    spec = {"serviceAccountName": "nix", "containers": [{"name": "a", "image": "x"}]}
    body = {"metadata": {"name": "p"}, "spec": spec}
    answer = await api.ask("POST", f"{api.here}/pods", body)
    assert answer.status == 403
    assert answer.message.endswith('serviceaccount "nix" not found')


async def test_an_older_version_does_not_overwrite(api: Api) -> None:
    """A write that was made from an older version is refused: 409."""
    made = await api.pod()
    path = f"{api.here}/pods/web-1"
    assert (await api.patch(path, {"metadata": {"labels": {"a": "b"}}})).status == 200
    old = {"resourceVersion": made["metadata"]["resourceVersion"], "labels": {"a": "c"}}
    answer = await api.patch(path, {"metadata": old})
    assert (answer.status, answer.body["reason"]) == (409, "Conflict")
    assert "the object has been modified" in answer.message


async def test_a_delete_of_another_uid(api: Api) -> None:
    """A delete for one UID does not hit another: 409."""
    await api.pod()
    options = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    answer = await api.ask("DELETE", f"{api.here}/pods/web-1", options)
    assert (answer.status, answer.body["reason"]) == (409, "Conflict")


async def test_the_same_name_anew(api: Api) -> None:
    """A pod made again under its name has a new UID."""
    first = await api.pod()
    await api.ask("DELETE", f"{api.here}/pods/web-1", {"gracePeriodSeconds": 0})
    assert (await api.pod())["metadata"]["uid"] != first["metadata"]["uid"]


async def test_a_namespaces_own_objects(api: Api) -> None:
    """A namespace has its default account, and from 1.20 on the cluster's CA."""
    path = f"{api.here}/configmaps?watch=1&fieldSelector=metadata.name%3Dkube-root-ca.crt"
    async with api.watch(path) as events:
        [event] = await take(events, 1)
    assert event["object"]["data"]["ca.crt"].startswith("-----BEGIN CERTIFICATE-----")


# Watching.


def told(events: list[Body]) -> list[tuple[str, str]]:
    """Type and name of each event."""
    return [(one["type"], one["object"]["metadata"]["name"]) for one in events]


async def version_of(api: Api) -> str:
    """The version of now."""
    body = (await api.ask("GET", f"{api.here}/pods")).body
    return str(body["metadata"]["resourceVersion"])


async def test_a_watch_from_a_version(api: Api) -> None:
    """A watch from a list's version tells each change after it, in order, with its version."""
    await api.pod("a")
    since = await version_of(api)
    path = f"{api.here}/pods?watch=1&resourceVersion={since}"
    async with api.watch(path) as events:
        await api.patch(f"{api.here}/pods/a", {"metadata": {"labels": {"x": "y"}}})
        await api.pod("b")
        await api.ask("DELETE", f"{api.here}/pods/a", {"gracePeriodSeconds": 0})
        found = await take(events, 4)
    seen = [("MODIFIED", "a"), ("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "a")]
    assert told(found) == seen
    versions = [int(one["object"]["metadata"]["resourceVersion"]) for one in found]
    assert versions == sorted(versions)
    assert versions[0] > int(since)
    assert all(one["object"]["kind"] == "Pod" for one in found)


async def test_a_pod_is_seen_to_be_leaving(api: Api) -> None:
    """Before a pod is gone it has a time of deletion, and has it still in the last event."""
    await api.pod("a")
    since = await version_of(api)
    async with api.watch(f"{api.here}/pods?watch=1&resourceVersion={since}") as events:
        answer = await api.ask("DELETE", f"{api.here}/pods/a")
        leaving, gone = await take(events, 2)
    assert answer.body["metadata"]["deletionTimestamp"]
    for event in (leaving, gone):
        meta = event["object"]["metadata"]
        assert meta["deletionTimestamp"] == answer.body["metadata"]["deletionTimestamp"]
        assert meta["deletionGracePeriodSeconds"] == 0  # no node has to end it
    assert int(gone["object"]["metadata"]["resourceVersion"]) > int(
        leaving["object"]["metadata"]["resourceVersion"]
    )


async def test_a_watch_sees_what_it_missed(api: Api) -> None:
    """A watch that comes back with its version is told what happened meanwhile."""
    since = await version_of(api)
    await api.pod("a")
    await api.ask("DELETE", f"{api.here}/pods/a", {"gracePeriodSeconds": 0})
    async with api.watch(f"{api.here}/pods?watch=1&resourceVersion={since}") as events:
        seen = [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
        assert told(await take(events, 3)) == seen


@pytest.mark.parametrize("version", ["", "&resourceVersion=0"], ids=["none", "zero"])
async def test_a_watch_from_anywhere(api: Api, version: str) -> None:
    """A watch from no version begins with what is there, as ADDED."""
    for name in ("a", "b"):
        await api.pod(name)
    async with api.watch(f"{api.here}/pods?watch=1{version}") as events:
        assert sorted(told(await take(events, 2))) == [("ADDED", "a"), ("ADDED", "b")]


async def test_a_watch_with_a_selector(api: Api) -> None:
    """What enters a selector is ADDED; what leaves it is DELETED, as it was."""
    await api.pod("a")
    since = await version_of(api)
    query = f"watch=true&resourceVersion={since}&labelSelector=app%3Dweb"
    async with api.watch(f"{api.here}/pods?{query}") as events:
        path = f"{api.here}/pods/a"
        await api.patch(path, {"metadata": {"labels": {"app": "web"}}})
        left = await api.patch(path, {"metadata": {"labels": {"app": "db"}}})
        entered, gone = await take(events, 2)
    assert (entered["type"], gone["type"]) == ("ADDED", "DELETED")
    meta = gone["object"]["metadata"]
    assert meta["labels"] == {"app": "web"}
    assert meta["resourceVersion"] == left.body["metadata"]["resourceVersion"]


async def test_a_watch_of_metadata(api: Api) -> None:
    """A watch tells metadata alone when that is asked for."""
    await api.pod("a")
    async with api.watch(f"{api.here}/pods?watch=1", accept=PARTIAL) as events:
        [event] = await take(events, 1)
    assert event["object"]["kind"] == "PartialObjectMetadata"
    assert event["object"]["apiVersion"] == "meta.k8s.io/v1"
    assert "spec" not in event["object"]


async def test_a_watch_of_a_version_that_is_gone(api: Api) -> None:
    """The answer is 200 and then one ERROR event, 410 Expired, and the end."""
    if api.cluster is not None:
        api.cluster.compact()
    query = "watch=1&resourceVersion=1&timeoutSeconds=5"
    async with api.watch(f"{api.here}/pods?{query}") as events:
        found = [event async for event in events]
    if api.is_real and (not found or found[0]["type"] != "ERROR"):
        pytest.skip(YOUNG)
    [event] = found
    assert event["type"] == "ERROR"
    status = event["object"]
    assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired")
    assert re.fullmatch(r"too old resource version: 1 \(\d+\)", status["message"])


async def test_a_watch_ends_in_time_with_a_bookmark(api: Api) -> None:
    """A watch ends well after its timeout; a bookmark names the version that was reached."""
    await api.pod("a")
    seconds = 10 if api.is_real else 1
    query = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}"
    async with api.watch(f"{api.here}/pods?{query}") as events:
        found = [event async for event in events]
    assert found[0]["type"] == "ADDED"
    last = found[-1]
    if api.is_real and len(found) == 1:
        pytest.skip("a server that has seen no change of a kind since its start sends none")
    assert last["type"] == "BOOKMARK"
    assert last["object"]["kind"] == "Pod"
    version = int(last["object"]["metadata"]["resourceVersion"])
    assert version >= int(found[0]["object"]["metadata"]["resourceVersion"])
    assert "name" not in last["object"]["metadata"]


async def test_a_watch_that_may_not(api: Api) -> None:
    """Permission to list is not permission to watch."""
    token = await weak_token(api)
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}
    await allow(api, "weak", rule)
    answer = await api.ask("GET", f"{api.here}/pods?watch=1", token=token)
    assert answer.status == 403
