"""
``k8s_psat``: every token that a stand-in API server can be asked about (SPIRE API 8.5).

One server knows one cluster under several names, each with other settings, and a second one.
Each case of the tables changes one thing that is right in `test_a_node_joins`; a node of its
own keeps it apart from the others.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from issuer.attestation.k8s_psat import (
    MAX_ASKING,
    MAX_TOKEN_BYTES,
    PATIENCE,
    ClusterAccess,
    K8sPsatAttestor,
)
from spiffe_core.errors import InternalError, NotReadyError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import access_of
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from tests.support.callers import Code, Running, a_running_server, id_message, refused
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.psat import (
    ACCOUNT,
    AGENT,
    NAMESPACE,
    a_cluster,
    agent_pod,
    join,
    logged,
    node_uid,
    payload_of,
    sent,
    server_rules,
    settings_of,
    stored,
)
from tests.support.stack import a_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOUR = timedelta(hours=1)
SECOND = "spiffe:second-agent"
DENIED, FAILED, MALFORMED = Code.PERMISSION_DENIED, Code.INTERNAL, Code.INVALID_ARGUMENT
REVIEW, POD, NODE = ("create", "tokenreviews"), ("get", "pods"), ("get", "nodes")


@dataclass
class Place:
    """A server, the cluster ``prod`` with its other names, and the cluster ``other``."""

    running: Running
    cluster: FakeCluster
    other: FakeCluster

    def since(self, before: int = 0) -> list[tuple[str, str, int]]:
        """Verb, resource and status of the calls to the first cluster after that many."""
        made = self.cluster.calls.made[before:]
        return [(one.verb, one.plural, one.status) for one in made]

    async def send(self, payload: str) -> Any:
        """Attest with *payload*."""
        return await sent(self.running.anonymous.calls, payload)

    async def agent(self, path: str) -> Any:
        """An agent, as operators see it."""
        return await self.running.local.agent.GetAgent(
            agent_pb2.GetAgentRequest(id=id_message(path))
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    """See the module."""
    async with a_cluster(version="v1.30.0") as prod, a_cluster("other") as other:
        with a_folder() as folder:
            prod.service_account(NAMESPACE, "nobody")
            for account, left_out in (("no-pods", "pods"), ("no-nodes", "nodes")):
                prod.service_account(NAMESPACE, account)
                user = f"system:serviceaccount:{NAMESPACE}:{account}"
                prod.grant(user, *server_rules(left_out))
            names: dict[str, dict[str, Any]] = {
                "prod": {"service_account_allow_list": (ACCOUNT, SECOND)},
                "two-audiences": {"audience": ("x", "spire-server")},
                "own-audience": {"audience": ()},
                "empty-list": {"service_account_allow_list": ()},
                "other-list": {"service_account_allow_list": ("shop:spiffe-agent",)},
                "no-rbac": {"user": "nobody"},
                "no-pods": {"user": "no-pods"},
                "no-nodes": {"user": "no-nodes"},
                "by-pod": {"use_pod_uid_for_agent_id": True},
                "labels": {
                    "allowed_node_label_keys": ("zone", "empty", "absent"),
                    "allowed_pod_label_keys": ("app",),
                },
            }
            settings = [
                settings_of(prod, folder, name=name, **changes)
                for name, changes in names.items()
            ]
            settings.append(settings_of(other, folder))
            async with a_running_server(clusters=tuple(settings)) as running:
                yield Place(running, prod, other)


# What is right


async def test_a_node_joins(place: Place) -> None:
    """SPIRE API 8.5, SEC-53: the pod's token yields its node's ID and SPIRE's selectors."""
    pod = agent_pod(place.cluster)
    before = len(place.cluster.calls.made)
    holder = await join(place.running, place.cluster, pod)
    uid = node_uid(place.cluster, pod.node)
    assert holder.id.path == f"/spire/agent/k8s_psat/prod/{uid}"
    agent = await place.agent(holder.id.path)
    assert {one.type for one in agent.selectors} == {"k8s_psat"}
    assert {one.value for one in agent.selectors} == {
        "cluster:prod",
        f"agent_ns:{NAMESPACE}",
        f"agent_sa:{AGENT}",
        f"agent_pod_name:{pod.name}",
        f"agent_pod_uid:{pod.uid}",
        "agent_node_ip:127.0.0.1",
        f"agent_node_name:{pod.node}",
        f"agent_node_uid:{uid}",
    }
    assert agent.can_reattest and not agent.banned and agent.attestation_type == "k8s_psat"
    assert agent.x509svid_serial_number == holder.svid.serial
    # Nothing is asked but what is needed, and that in this order.
    assert place.since(before) == [(*REVIEW, 201), (*POD, 200), (*NODE, 200)]


@pytest.mark.parametrize(
    "form",
    [
        '{"Cluster":"prod","TOKEN":"%s"}',
        '{"cluster":"prod","token":"%s","more":[1,{"a":null}],"cluster2":1}',
        ' {"token" : "%s" ,\n"cluster":"\\u0070rod"} ',
        '{"cluster":"prod","token":"%s\\n"}',
    ],
    ids=["capitals", "unknown fields", "spaces and escapes", "a line's end"],
)
async def test_payloads_as_go_reads_them(place: Place, form: str) -> None:
    """SPIRE API 8: names in any case, unknown fields, and a file that ends in a new line."""
    token = place.cluster.projected_token(agent_pod(place.cluster))
    assert (await place.send(form % token)).result.reattestable


@pytest.mark.parametrize("name", ["two-audiences", "own-audience"])
async def test_audiences(place: Place, name: str) -> None:
    """SEC-53: one of our audiences is enough; with none set the API server's own is meant."""
    audience = "spire-server" if name == "two-audiences" else place.cluster.tokens.issuer
    token = place.cluster.projected_token(agent_pod(place.cluster), audience)
    assert (await place.send(payload_of(name, token))).result.svid.cert_chain


async def test_named_by_the_pod(place: Place) -> None:
    """SPIRE API 8.5: with `use_pod_uid_for_agent_id` each pod of a node is an agent."""
    pods = [agent_pod(place.cluster, "shared", name=f"agent-{one}") for one in "ab"]
    holders = [await join(place.running, place.cluster, pod, name="by-pod") for pod in pods]
    assert [one.id.path for one in holders] == [
        f"/spire/agent/k8s_psat/by-pod/pod/{pod.uid}" for pod in pods
    ]


async def test_labels(place: Place) -> None:
    """SPIRE API 8.5: labels become selectors for the keys that are allowed, and no others."""
    labels = {"zone": "a:1", "empty": "", "secret": "x"}
    place.cluster.node("labelled", labels=labels)
    pod = agent_pod(place.cluster, "labelled", labels={"app": "agent", "team": "y"})
    holder = await join(place.running, place.cluster, pod, name="labels")
    agent = await place.agent(holder.id.path)
    found = {one.value for one in agent.selectors if "_label:" in one.value}
    assert found == {
        "agent_node_label:zone:a:1", "agent_node_label:empty:", "agent_pod_label:app:agent",
    }  # fmt: skip


async def test_a_node_that_was_made_anew(place: Place) -> None:
    """SEC-53: a node of the same name with another UID is another agent."""
    pod = agent_pod(place.cluster)
    first = await join(place.running, place.cluster, pod)
    place.cluster.recreate("nodes", pod.node)
    second = await join(place.running, place.cluster, place.cluster.recreate_pod(pod))
    assert first.id != second.id
    assert second.id.path.endswith(node_uid(place.cluster, pod.node))


# What an agent may send


def _token(middle: str = "e30", *, size: int = 0) -> str:
    return f"e30.{middle}.{'A' * size if size else 'c2ln'}"


PAYLOADS = {
    "nothing that is JSON": ("x", "not JSON"),
    "not an object": ("[]", "not a JSON object"),
    "text": ('"cluster"', "not a JSON object"),
    "no cluster": ('{"token":"e30.e30.c2ln"}', "missing cluster in attestation data"),
    "an empty cluster": (payload_of("", _token()), "missing cluster in attestation data"),
    "no token": ('{"cluster":"prod"}', "missing token in attestation data"),
    "an empty token": (payload_of("prod", ""), "missing token in attestation data"),
    "a token of null": ('{"cluster":"prod","token":null}', "missing token in attestation data"),
    "a token that is a number": ('{"cluster":"prod","token":1}', "token is not text"),
    "a cluster that is a list": ('{"cluster":["prod"],"token":"a"}', "cluster is not text"),
    "two clusters": (
        '{"cluster":"prod","cluster":"other","token":"e30.e30.c2ln"}', "two members",
    ),
    "two clusters in capitals": (
        '{"cluster":"other","Cluster":"prod","token":"e30.e30.c2ln"}', "is there twice",
    ),
    "another cluster": (
        payload_of("nowhere", _token()), 'not configured for cluster "nowhere"',
    ),
    "a cluster that is no name": (
        payload_of("a\nb" * 99, _token()), "not configured for cluster of that name",
    ),
    "a token of two parts": (payload_of("prod", "e30.e30"), "not a JWT"),
    "a token of four parts": (payload_of("prod", _token() + ".x"), "not a JWT"),
    "a token with an empty part": (payload_of("prod", "e30..c2ln"), "not a JWT"),
    "a token that is not base64url": (payload_of("prod", _token("a+b/")), "not base64url"),
    "a token with a header in it": (payload_of("prod", _token("e30\r\nX: y")), "not base64url"),
    "a token beyond ASCII": (payload_of("prod", _token("é")), "not base64url"),
    "a person's token": (payload_of("prod", "0123456789abcdef"), "not a JWT"),
    "a token that is too long": (
        payload_of("prod", _token(size=MAX_TOKEN_BYTES)), "longer than 16384 bytes",
    ),
    "a payload that is too long": (payload_of("prod", _token(size=99999)), "JSON is longer"),
    "half a character": ('{"cluster":"\\ud83d","token":"a"}', "half a surrogate pair"),
    "too deep": ('{"cluster":"prod","token":"a","x":%s}' % ("[" * 99), "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAYLOADS)
async def test_sec_55_what_no_api_server_is_asked_about(place: Place, case: str) -> None:
    """SEC-55: what is not of the form is INVALID_ARGUMENT; no API server hears of it."""
    payload, text = PAYLOADS[case]
    before, kept = len(place.cluster.calls.made), await stored(place.running)
    async with refused(MALFORMED, text):
        await place.send(payload)
    assert place.since(before) == [] and await stored(place.running) == kept


# What an API server may say


@dataclass(frozen=True)
class Case:
    """One defect: what is sent after *prepare*, and how it is refused."""

    prepare: Callable[[Place, Pod], str]
    """Breaks one thing; returns the token."""
    code: Any
    text: str
    cluster: str = "prod"
    asked: tuple[tuple[str, str], ...] = (REVIEW,)


def _token_with(**changes: Any) -> Callable[[Place, Pod], str]:
    return lambda place, pod: place.cluster.projected_token(pod, **changes)


def _after(change: Callable[[FakeCluster, Pod], object]) -> Callable[[Place, Pod], str]:
    """A token that was reviewed well before *change*, so that its success is remembered."""

    def prepare(place: Place, pod: Pod) -> str:
        token = place.cluster.projected_token(pod)
        assert place.cluster.tokens.review(token, ("spire-server",))["authenticated"]
        change(place.cluster, pod)
        assert place.cluster.tokens.review(token, ("spire-server",))["authenticated"]
        return token

    return prepare


def _said(**status: Any) -> Callable[[Place, Pod], str]:
    """A token whose review comes back with these members instead; None removes one."""

    def prepare(place: Place, pod: Pod) -> str:
        def changed(_: Any, right: dict[str, Any]) -> dict[str, Any]:
            made = right | status
            return {key: value for key, value in made.items() if value is not None}

        place.cluster.api.reviewing = changed
        return place.cluster.projected_token(pod)

    return prepare


def _user(name: str, **extra: list[str]) -> Callable[[Place, Pod], str]:
    """A token that the API server takes for that of another user."""

    def prepare(place: Place, pod: Pod) -> str:
        def changed(_: Any, right: dict[str, Any]) -> dict[str, Any]:
            user = right["user"] | ({"username": name} if name else {})
            more = {f"authentication.kubernetes.io/{k.replace('_', '-')}": v
                    for k, v in extra.items()}  # fmt: skip
            return right | {"user": user | {"extra": user["extra"] | more}}

        place.cluster.api.reviewing = changed
        return place.cluster.projected_token(pod)

    return prepare


def _changed_pod(change: Callable[[dict[str, Any]], object]) -> Callable[[Place, Pod], str]:
    def on(cluster: FakeCluster, pod: Pod) -> None:
        body = json.loads(json.dumps(pod.body))
        change(body)
        cluster.put_pod(body)

    return _after(on)


def _tampered(place: Place, pod: Pod) -> str:
    head, middle, signature = place.cluster.projected_token(pod).split(".")
    claims = json.loads(base64.urlsafe_b64decode(middle + "==="))
    claims["kubernetes.io"]["pod"]["uid"] = "another"
    text = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"{head}.{text}.{signature}"


def _of_the_other_cluster(place: Place, pod: Pod) -> str:
    return place.other.projected_token(agent_pod(place.other, pod.node))


def _of_another_account(place: Place, pod: Pod) -> str:
    cluster = place.cluster
    account = cluster.service_account(NAMESPACE, "second-agent")
    claims = cluster.tokens.claims(account, pod=pod.body, audiences=("spire-server",))
    return cluster.tokens.seal(claims)


BOTH, ALL = (REVIEW, POD), (REVIEW, POD, NODE)
NOT_OURS = "not authenticated according to TokenReview API"
CASES = {
    "another audience": Case(_token_with(audience="vault"), DENIED, "audiences"),
    "the API server's audience": Case(
        _token_with(audience="https://kubernetes.default.svc"), DENIED, "audiences"
    ),
    "our audience where the API server's is wanted": Case(
        _token_with(), DENIED, "audiences", "own-audience"
    ),
    "an API server that knows no audiences": Case(
        _said(audiences=None), DENIED, "none of the audiences"
    ),
    "an empty intersection": Case(_said(audiences=[]), DENIED, "none of the audiences"),
    "another audience in the answer": Case(
        _said(audiences=["vault"]), DENIED, "none of the audiences"
    ),
    "an ended token": Case(_token_with(lifetime=-HOUR), DENIED, "expired"),
    "a token of the future": Case(_token_with(nbf=2**33), DENIED, "not valid yet"),
    "a changed token": Case(_tampered, DENIED, "cryptographic primitive"),
    "nonsense of the right form": Case(lambda *_: _token(), DENIED, NOT_OURS),
    "another issuer's": Case(_token_with(iss="https://x"), DENIED, NOT_OURS),
    "the other cluster's": Case(_of_the_other_cluster, DENIED, NOT_OURS),
    "no word on authentication": Case(_said(authenticated=None), DENIED, NOT_OURS),
    "not authenticated": Case(_said(authenticated=False), DENIED, NOT_OURS),
    "authenticated, as text": Case(_said(authenticated="true"), DENIED, NOT_OURS),
    "a user without an account": Case(_said(user={}), FAILED, "form of a service account"),
    "a person": Case(_user("alice"), FAILED, "form of a service account"),
    "a name of five parts": Case(
        _user("system:serviceaccount:a:b:c"), FAILED, "form of a service account"
    ),
    "a node's user": Case(_user("system:node:n1:x"), DENIED, "not a service account"),
    "no namespace": Case(_user(f"system:serviceaccount::{AGENT}"), DENIED, "not a service"),
    "an account that is not listed": Case(
        _user("system:serviceaccount:shop:web"), DENIED, '"shop:web" is not an allowed'
    ),
    "that name in another namespace": Case(
        _user(f"system:serviceaccount:shop:{AGENT}"), DENIED, "is not an allowed service"
    ),
    "that account in capitals": Case(
        _user(f"system:serviceaccount:{NAMESPACE}:{AGENT.upper()}"), DENIED, "is not an allowed"
    ),
    "a list without it": Case(
        _token_with(), DENIED, f'"{ACCOUNT}" is not an allowed', "other-list"
    ),
    "an empty list": Case(
        _token_with(), DENIED, f'"{ACCOUNT}" is not an allowed', "empty-list"
    ),
    "a token of a Secret": Case(
        lambda place, _: place.cluster.legacy_token(NAMESPACE, AGENT),
        FAILED, "for no pod", "own-audience",
    ),
    "a token for no pod": Case(
        lambda place, _: place.cluster.account_token(NAMESPACE, AGENT, "spire-server"),
        FAILED, "for no pod",
    ),
    "no pod's UID": Case(_user("", pod_uid=[]), FAILED, "for no pod"),
    "two pods' names": Case(_user("", pod_name=["a", "b"]), FAILED, "for no pod"),
    "a pod that was deleted, in the cache of reviews": Case(
        _after(lambda cluster, pod: cluster.delete_pod(pod)), DENIED, "is gone", asked=BOTH
    ),
    "a pod of the same name": Case(
        _after(lambda cluster, pod: cluster.recreate_pod(pod)), DENIED, "replaced", asked=BOTH
    ),
    "a pod that is being deleted": Case(
        _after(lambda cluster, pod: cluster.terminate_pod(pod)), DENIED, "being deleted",
        asked=BOTH,
    ),
    "a pod that has ended": Case(
        _changed_pod(lambda pod: pod["status"].update(phase="Succeeded")), DENIED, "has ended",
        asked=BOTH,
    ),
    "a pod on no node": Case(
        _changed_pod(lambda pod: pod["spec"].pop("nodeName")), FAILED, "on no node", asked=BOTH
    ),
    "a pod of another account": Case(
        _of_another_account, DENIED, "under another account", asked=BOTH
    ),
    "a node that is gone": Case(
        _after(lambda cluster, pod: cluster.delete("nodes", pod.node)), FAILED,
        "could not be asked", asked=ALL,
    ),
    "a node that was made anew": Case(
        _after(lambda cluster, pod: cluster.recreate("nodes", pod.node)), DENIED,
        "another node by its node-uid", asked=ALL,
    ),
    "another node's name": Case(
        _user("", node_name=["n2"]), DENIED, "another node by its node-name", asked=ALL
    ),
    "no right to review": Case(_token_with(), FAILED, "could not be asked", "no-rbac"),
    "no right to see pods": Case(
        _token_with(), FAILED, "could not be asked", "no-pods", asked=BOTH
    ),
    "no right to see nodes": Case(
        _token_with(), FAILED, "could not be asked", "no-nodes", asked=ALL
    ),
    "an answer of another form": Case(
        _said(audiences="spire-server"), FAILED, "could not be asked"
    ),
    "a user that is text": Case(_said(user="x"), FAILED, "could not be asked"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_sec_53_a_token_that_does_not_do(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-53, SEC-90: each defect alone is refused; nothing is stored, the token is nowhere."""
    case = CASES[name]
    pod = agent_pod(place.cluster)
    token = case.prepare(place, pod)
    before, kept = len(place.cluster.calls.made), await stored(place.running)
    try:
        async with refused(case.code, case.text) as seen:
            await place.send(payload_of(case.cluster, token))
    finally:
        place.cluster.api.reviewing = lambda _, status: status
    assert await stored(place.running) == kept
    assert tuple(one[:2] for one in place.since(before)) == case.asked
    for secret in token.split("."):
        assert secret not in seen[0].details()
        assert len(secret) < 9 or secret not in logged(caplog)


async def test_a_token_that_the_server_quotes(place: Place) -> None:
    """SEC-90: where an API server quotes the token, its words are kept from the agent."""
    pod = agent_pod(place.cluster)
    place.cluster.api.reviewing = lambda spec, _: {"error": f"bad: {spec['token']}"}
    try:
        async with refused(DENIED) as seen:
            token = place.cluster.projected_token(pod)
            await place.send(payload_of("prod", token))
    finally:
        place.cluster.api.reviewing = lambda _, status: status
    assert seen[0].details() == "token not authenticated according to TokenReview API"


# An API server that fails


@pytest.mark.parametrize("kind", ["fail", "reset", "garbage", "truncate"])
@pytest.mark.parametrize("where", ["tokenreviews", "pods", "nodes"])
async def test_sec_56_an_api_server_that_fails(
    place: Place, kind: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-56: whatever it answers is INTERNAL, which agents try again; the log says more."""
    token = place.cluster.projected_token(agent_pod(place.cluster))
    kept = await stored(place.running)
    with getattr(place.cluster.faults, kind)(plural=where):
        async with refused(FAILED, 'API server of cluster "prod"') as seen:
            await place.send(payload_of("prod", token))
    assert str(place.cluster.port) not in seen[0].details()
    assert "ClusterError" in caplog.text and token not in logged(caplog)
    assert await stored(place.running) == kept
    assert (await place.send(payload_of("prod", token))).result.reattestable


@pytest.mark.parametrize("certificate", ["wrong-ca", "wrong-name", "expired"])
async def test_sec_34_another_api_server(place: Place, certificate: Any) -> None:
    """SEC-34: a server that is not the cluster's API server is told no token."""
    place.other.present(certificate)
    try:
        await place.other.stop()
        await place.other.start()
        before = len(place.other.calls.made)
        token = place.other.projected_token(agent_pod(place.other))
        async with refused(FAILED, 'API server of cluster "other"'):
            await place.send(payload_of("other", token))
        assert len(place.other.calls.made) == before
    finally:
        place.other.present("right")
        await place.other.stop()
        await place.other.start()
    assert (await place.send(payload_of("other", token))).result.reattestable


async def test_an_api_server_that_is_away(place: Place) -> None:
    """SEC-56: with the API server of one cluster away, those of the others join."""
    token = place.other.projected_token(agent_pod(place.other))
    await place.other.stop()
    try:
        async with refused(FAILED, 'API server of cluster "other"'):
            await place.send(payload_of("other", token))
        await join(place.running, place.cluster, agent_pod(place.cluster))
    finally:
        await place.other.start()
    assert (await place.send(payload_of("other", token))).result.reattestable


@asynccontextmanager
async def an_attestor(
    folder: Path, *clusters: FakeCluster, patience: timedelta
) -> AsyncIterator[K8sPsatAttestor]:
    """The attestor alone, with another patience."""
    async with AsyncExitStack() as stack:
        known = {}
        for one in clusters:
            settings = settings_of(one, folder)
            client = Client(access_of(settings.kubeconfig, "", {}))
            stack.push_async_callback(client.close)
            known[one.name] = ClusterAccess(settings, client)
        yield K8sPsatAttestor(TrustDomain("example.org"), known, patience)


async def _attested(attestor: K8sPsatAttestor, cluster: FakeCluster) -> Any:
    token = cluster.projected_token(agent_pod(cluster))
    payload = payload_of(cluster.name, token).encode()
    return await attestor.attest(payload, public_key=b"", challenge=None)  # type: ignore


@pytest.mark.parametrize("where", ["tokenreviews", "pods", "nodes"])
async def test_sec_56_an_api_server_that_hangs(
    place: Place, where: str, tmp_path: Path
) -> None:
    """SEC-56: an API server that hangs is a refusal when the time for all of it is over."""
    assert timedelta(seconds=5) == PATIENCE
    patience = timedelta(milliseconds=100)
    async with an_attestor(tmp_path, place.cluster, patience=patience) as attestor:
        with place.cluster.faults.hang(plural=where):
            with pytest.raises(InternalError, match="did not answer in time"):
                await _attested(attestor, place.cluster)
    async with an_attestor(tmp_path, place.cluster, patience=PATIENCE) as attestor:
        assert (await _attested(attestor, place.cluster)).can_reattest


async def test_sec_56_a_cluster_that_hangs_holds_no_other(place: Place, tmp_path: Path) -> None:
    """SEC-56: of a cluster that hangs so many nodes wait and no more; another's are served."""
    clusters = place.cluster, place.other
    async with an_attestor(tmp_path, *clusters, patience=HOUR) as attestor:
        with place.cluster.faults.hang(plural="tokenreviews") as fault:
            waiting = [
                asyncio.create_task(_attested(attestor, place.cluster))
                for _ in range(MAX_ASKING)
            ]
            while fault.met < MAX_ASKING:
                await asyncio.sleep(0.005)
            with pytest.raises(NotReadyError, match="too many nodes of cluster"):
                await _attested(attestor, place.cluster)
            assert await _attested(attestor, place.other)
        assert len({one.agent_id for one in await asyncio.gather(*waiting)}) == MAX_ASKING
