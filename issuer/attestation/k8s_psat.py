"""
Kubernetes tokens: an agent's pod proves the node it runs on (SPIRE API 8.5, SEC-53).

The agent sends its projected service-account token.  Whether that is good only the API server
of its cluster can say, and what counts is what it says now: the token's own claims decide
nothing, and pod and node are looked up live, because a review remembers a success for ten
seconds.  The cheap checks come first (SEC-55); whatever happens while an API server is asked
is a refusal within five seconds (SEC-56).  The token is in no message, log or repr (SEC-90).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import ClassVar, Final
from urllib.parse import quote

from issuer.attestation.protocol import AttestedNode, Challenge
from issuer.config import Cluster
from spiffe_core.agent import agent_id
from spiffe_core.errors import ForbiddenError, InternalError, MalformedError, NotReadyError
from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain
from spiffe_core.strictjson import StrictJsonError, b64url_decode, loads
from spiffe_wire.k8s.client import Client, ClusterError, MissingError
from spiffe_wire.k8s.objects import (
    Meta,
    ObjectError,
    Pod,
    TokenReview,
    meta_of,
    pod_of,
    review_of,
)

MAX_TOKEN_BYTES: Final = 16 * 1024
"""A token is about 1 KiB; Kubernetes bounds none."""
MAX_PAYLOAD_BYTES: Final = MAX_TOKEN_BYTES + 4096
PATIENCE: Final = timedelta(seconds=5)  # SEC-56
MAX_ASKING: Final = 8
"""Nodes of one cluster at once: one whose API server hangs leaves slots to the others."""
_REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_EXTRA: Final = "authentication.kubernetes.io/"
_QUOTABLE: Final = re.compile(r"[A-Za-z0-9._-]{1,63}")


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """A cluster of this trust domain, and the way to its API server."""

    settings: Cluster
    client: Client


@dataclass(frozen=True)
class K8sPsatAttestor:
    """Attests agents of every configured cluster; repeatable."""

    type: ClassVar[str] = "k8s_psat"
    trust_domain: TrustDomain
    clusters: Mapping[str, ClusterAccess]
    patience: timedelta = PATIENCE
    _asking: Counter[str] = field(default_factory=Counter, repr=False)

    async def attest(
        self, payload: bytes, *, public_key: bytes, challenge: Challenge
    ) -> AttestedNode:
        """
        See `NodeAttestor`; a token is bound to no key, so that neither is looked at.

        Raises:
            InternalError: the API server gave no answer, or none that makes sense.
            NotReadyError: too many nodes of the cluster attest at once.
        """
        del public_key, challenge
        name, token = _payload_of(payload)
        cluster = self.clusters.get(name)
        if cluster is None:
            shown = f'"{name}"' if _QUOTABLE.fullmatch(name) else "of that name"
            raise MalformedError(f"not configured for cluster {shown}")
        _check_form(token)
        with self._slot(name):
            try:
                async with asyncio.timeout(self.patience.total_seconds()):
                    pod, node = await _looked_up(cluster, token)
            except TimeoutError as error:
                raise InternalError(
                    f'the API server of cluster "{name}" did not answer in time'
                ) from error
            except (ClusterError, ObjectError) as error:
                raise InternalError(
                    f'the API server of cluster "{name}" could not be asked, or answered '
                    "something else: the log of this SPIFFE server says what"
                ) from error
        return AttestedNode(
            self._id_of(cluster.settings, pod, node),
            _selectors(cluster.settings, pod, node),
            can_reattest=True,
        )

    @contextmanager
    def _slot(self, name: str) -> Iterator[None]:
        if self._asking[name] >= MAX_ASKING:
            raise NotReadyError(f'too many nodes of cluster "{name}" attest at once: try again')
        self._asking[name] += 1
        try:
            yield
        finally:
            self._asking[name] -= 1

    def _id_of(self, settings: Cluster, pod: Pod, node: Meta) -> SpiffeId:
        by_pod = settings.use_pod_uid_for_agent_id
        segments = ("pod", pod.uid) if by_pod else (node.uid,)
        try:
            return agent_id(self.trust_domain, self.type, settings.name, *segments)
        except SpiffeIdError as error:  # the API server's words, not the agent's
            raise InternalError("a UID of the cluster cannot stand in a SPIFFE ID") from error


async def _looked_up(cluster: ClusterAccess, token: str) -> tuple[Pod, Meta]:
    """The pod that the token is for, and its node, as they are now."""
    settings, client = cluster.settings, cluster.client
    review = await _reviewed(cluster, token)
    namespace, account = _account_of(review)
    if f"{namespace}:{account}" not in settings.service_account_allow_list:
        raise ForbiddenError(
            f'"{namespace}:{account}" is not an allowed service account: '
            f'service_account_allow_list of cluster "{settings.name}" names those that are'
        )
    # A token of a Secret, which never ends, is for no pod: it has neither.
    pod_name, pod_uid = (review.extra.get(_EXTRA + one) for one in ("pod-name", "pod-uid"))
    if not pod_name or not pod_uid:
        raise InternalError("the token is for no pod: use a projected service-account token")
    try:
        pod = pod_of(await client.get(_path("namespaces", namespace, "pods", pod_name)))
    except MissingError as error:
        raise ForbiddenError("the pod that the token is for is gone") from error
    _check_pod(pod, pod_uid, namespace, account)
    node = meta_of(await client.get(_path("nodes", pod.node_name), metadata_only=True))
    _check_node(node, review)
    return pod, node


async def _reviewed(cluster: ClusterAccess, token: str) -> TokenReview:
    wanted = cluster.settings.audience
    spec = {"token": token, **({"audiences": list(wanted)} if wanted else {})}
    review = review_of(
        await cluster.client.post(
            _REVIEWS,
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec},
        )
    )
    refused = "token not authenticated according to TokenReview API"
    if not review.is_authenticated:
        raise ForbiddenError(refused + _said(review.error, token))
    # One that knows no audiences would take any token of the cluster for ours.
    if wanted and not review.audiences & frozenset(wanted):
        raise ForbiddenError(f"{refused}: it is for none of the audiences asked for")
    return review


def _said(error: str, token: str) -> str:
    """The API server's reason, unless it quotes what it was asked about."""
    text = "".join(one for one in error if one.isprintable())[:200]
    return f": {text}" if text and not any(one in error for one in token.split(".")) else ""


def _account_of(review: TokenReview) -> tuple[str, str]:
    parts = review.user.split(":")
    if len(parts) != 4:
        raise InternalError("the token's user name does not have the form of a service account")
    if parts[:2] != ["system", "serviceaccount"] or not all(parts):
        raise ForbiddenError("the token's user is not a service account")
    return parts[2], parts[3]


def _check_pod(pod: Pod, uid: str, namespace: str, account: str) -> None:
    if pod.uid != uid:
        raise ForbiddenError("the pod that the token is for was replaced by another one")
    if (pod.namespace, pod.service_account) != (namespace, account):
        raise ForbiddenError("the pod that the token is for runs under another account")
    if pod.is_over:
        raise ForbiddenError("the pod that the token is for has ended")
    # The one that follows it on its node may be there already, and would be superseded.
    if pod.is_ending:
        raise ForbiddenError("the pod that the token is for is being deleted")
    if not pod.node_name:
        raise InternalError("the pod that the token is for is on no node")


def _check_node(node: Meta, review: TokenReview) -> None:
    for key, value in (("node-name", node.name), ("node-uid", node.uid)):
        if review.extra.get(_EXTRA + key, value) != value:  # since Kubernetes 1.30
            raise ForbiddenError(
                f"the token is for another node by its {key}: was the node made anew?"
            )


def _selectors(settings: Cluster, pod: Pod, node: Meta) -> SelectorSet:
    facts = {
        "cluster": settings.name,
        "agent_ns": pod.namespace,
        "agent_sa": pod.service_account,
        "agent_pod_name": pod.name,
        "agent_pod_uid": pod.uid,
        "agent_node_ip": pod.host_ip,
        "agent_node_name": node.name,
        "agent_node_uid": node.uid,
    }
    values = [f"{kind}:{value}" for kind, value in facts.items() if value]
    for kind, labels, allowed in (
        ("agent_node_label", node.labels, settings.allowed_node_label_keys),
        ("agent_pod_label", pod.labels, settings.allowed_pod_label_keys),
    ):
        values += [f"{kind}:{key}:{labels[key]}" for key in allowed if key in labels]
    return frozenset(Selector(K8sPsatAttestor.type, one) for one in values)


def _payload_of(payload: bytes) -> tuple[str, str]:
    """Cluster and token, as Go's decoder finds them; a name that is there twice is refused."""
    what = "failed to decode data payload"
    try:
        given = loads(payload, max_bytes=MAX_PAYLOAD_BYTES)
    except StrictJsonError as error:
        raise MalformedError(f"{what}: {error}") from error
    if not isinstance(given, dict):
        raise MalformedError(f"{what}: not a JSON object")
    found: dict[str, str] = {}
    for name, value in given.items():
        known = name.casefold()
        if known not in ("cluster", "token"):
            continue
        if known in found:
            raise MalformedError(f"{what}: {known} is there twice")
        if not isinstance(value, str | None):
            raise MalformedError(f"{what}: {known} is not text")
        found[known] = value or ""
    for known in ("cluster", "token"):
        if not found.get(known):
            raise MalformedError(f"missing {known} in attestation data")
    # The agent sends the whole file; by Go's decoder a line's end at its end changes nothing.
    return found["cluster"], found["token"].rstrip("\r\n")


def _check_form(token: str) -> None:
    """What no API server needs to be asked about."""
    if len(token) > MAX_TOKEN_BYTES:
        raise MalformedError(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        raise MalformedError("the token is not a JWT: three parts, with dots between")
    try:
        for part in parts:
            b64url_decode(part)
    except (StrictJsonError, ValueError):
        raise MalformedError("the token is not a JWT: its parts are not base64url") from None


def _path(*parts: str) -> str:
    return "/api/v1/" + "/".join(quote(one, safe="") for one in parts)
