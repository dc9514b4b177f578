"""
A stolen node speaks for its own pods alone (architecture A5, SEC-21, SEC-91).

A thief has the certificate and key of node a's agent and calls the server with clients of its
own.  An alias lets every agent of the cluster have every entry, as it is with SPIRE; what runs
where, only the server's own watch tells.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.services.refusals import MAX_ROWS
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2
from tests.support.callers import Code, Holder, Running, an_id, below, codes, eventually
from tests.support.k8s.cluster import Pod
from tests.support.k8s.objects import copied
from tests.support.verifying import (
    Verified,
    a_place,
    ask,
    ask_as_spire,
    ask_jwt,
    ask_jwt_as_spire,
    stub,
    svid_of,
)
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")
ACTION = "svid.pod_refused"
SETTLED_PATIENCE = 0.1


@dataclass
class Theft:
    """Two nodes, a pod on each, and an entry for each pod that both agents may act for."""

    place: Verified
    thief: Holder
    honest: Holder
    mine: Pod
    other: Pod
    for_mine: Any
    for_other: Any

    @property
    def running(self) -> Running:
        return self.place.running

    async def gained(self, during: Callable[[], Awaitable[Any]]) -> int:
        """How many SVIDs *during* put on record: none is handed out that is not there."""
        before = len(await self.place.issued())
        await during()
        return len(await self.place.issued()) - before


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theft() -> AsyncIterator[Theft]:
    """The server knows both pods, and has known them for long enough."""
    async with a_place() as place:
        object.__setattr__(place.pods, "patience", SETTLED_PATIENCE)
        object.__setattr__(place.pods, "settled", 0.0)
        thief, honest = await place.agent("a"), await place.agent("b")
        mine = place.cluster.pod("web-1", "shop", "web", "a")
        other = place.cluster.pod("pay-1", "payments", "pay", "b")
        await place.knows(mine, other)
        server = place.running.server.hub.trust_domain.server_id
        _, for_mine, for_other = await place.running.add(
            below(server, "/cluster/prod", "k8s_psat:cluster:prod"),
            below(an_id("/cluster/prod"), "/web", "k8s:ns:shop", "k8s:sa:web"),
            below(an_id("/cluster/prod"), "/pay", "k8s:ns:payments", "k8s:sa:pay"),
        )
        yield Theft(place, thief, honest, mine, other, for_mine, for_other)


async def denied(call: Awaitable[Any]) -> None:
    """A unary call that the server answers with PERMISSION_DENIED."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is Code.PERMISSION_DENIED, caught.value.details()


async def denied_x509(node: Holder, entry: Any, pod: Pod | str) -> None:
    """The same of one X509-SVID; there is none in the answer."""
    (result,) = await ask(node, (entry, pod))
    assert result.status.code == 7, result.status.message
    assert not result.HasField("svid")


async def test_both_nodes_get_what_runs_on_them(theft: Theft) -> None:
    """The alias gives both agents both entries; each gets the one whose pod it runs."""
    for node, entry, pod in (
        (theft.thief, theft.for_mine, theft.mine),
        (theft.honest, theft.for_other, theft.other),
    ):
        svid_of((await ask(node, (entry, pod)))[0])
        assert (await ask_jwt(node, entry, pod)).id == entry.spiffe_id
        assert codes(await ask_as_spire(node, entry)) == [0]
        assert (await ask_jwt_as_spire(node, entry)).id == entry.spiffe_id


CLAIMS = {
    "the other's pod": lambda one: (one.for_other, one.other),
    "the other's pod for its own entry": lambda one: (one.for_mine, one.other),
    "its own pod for the other's entry": lambda one: (one.for_other, one.mine),
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("kind", ["x509", "jwt"])
async def test_sec_21_a_stolen_node_gets_nothing_for_other_pods(
    theft: Theft, claim: str, kind: str
) -> None:
    """SEC-21: whatever pod a stolen node names, nothing is signed that is not for its own."""
    entry, pod = CLAIMS[claim](theft)
    ask_for = {
        "x509": lambda: denied_x509(theft.thief, entry, pod),
        "jwt": lambda: denied(ask_jwt(theft.thief, entry, pod)),
    }[kind]
    assert await theft.gained(ask_for) == 0


async def test_sec_21_nor_through_spires_service(theft: Theft) -> None:
    """SEC-21: SPIRE's calls name no pod, and are verified against all pods of the node."""

    async def attempts() -> None:
        (result,) = await ask_as_spire(theft.thief, theft.for_other)
        assert result.status.code == 7 and not result.HasField("svid")
        await denied(ask_jwt_as_spire(theft.thief, theft.for_other))
        await denied_x509(theft.thief, theft.for_other, "")
        await denied(ask_jwt(theft.thief, theft.for_other, ""))

    assert await theft.gained(attempts) == 0


async def test_sec_21_a_batch_yields_only_its_own(theft: Theft) -> None:
    """SEC-21: mixed with what it may have, the other's pod is still refused."""
    wanted = [(theft.for_mine, theft.mine), (theft.for_other, theft.other)] * 20
    results: list[Any] = []

    async def attempt() -> None:
        results.extend(await ask(theft.thief, *wanted))

    assert await theft.gained(attempt) == 20
    assert codes(results) == [0, 7] * 20
    assert {svid_of(one).spiffe_id for one in results[::2]} == {an_id("/web")}


async def test_sec_91_it_is_a_security_event(
    theft: Theft, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-91: who asked for which pod is on record, in the log, and counted."""
    await theft.running.server.refusals.end_window()
    before = theft.place.metric("pod_refusals", "prod", "other-node")
    with caplog.at_level(logging.WARNING):
        rows = await theft.running.audited(
            lambda: denied_x509(theft.thief, theft.for_other, theft.other)
        )
    assert rows == [(ACTION, f"entry {theft.for_other.id} pod {theft.other.uid}", "refused")]
    last = (await theft.running.audit())[-1]
    assert last.actor == theft.thief.id.uri
    assert theft.place.metric("pod_refusals", "prod", "other-node") == before + 1
    said = [one for one in caplog.records if "svid_of_foreign_pod_refused" in one.getMessage()
            or getattr(one, "event", "") == "svid_of_foreign_pod_refused"]  # fmt: skip
    assert len(said) == 1
    text = json.dumps({key: str(value) for key, value in vars(said[0]).items()})
    assert "it runs on b, and the agent on a" in text and theft.thief.id.uri in text


async def test_sec_91_a_thief_cannot_fill_the_record(theft: Theft) -> None:
    """SEC-91, SEC-80: however often it asks, a minute has a bounded number of rows."""
    refusals = theft.running.server.refusals
    await refusals.end_window()
    others = [
        theft.place.cluster.pod(f"many-{n}", "many", "pay", "b") for n in range(MAX_ROWS + 40)
    ]
    await theft.place.knows(*others)

    async def attempts() -> None:
        wanted = [(theft.for_other, one) for one in others]
        assert set(codes(await ask(theft.thief, *wanted))) == {7}
        assert set(codes(await ask(theft.thief, *wanted))) == {7}

    rows = await theft.running.audited(attempts)
    assert len(rows) == MAX_ROWS and {row[0] for row in rows} == {ACTION}
    rows = await theft.running.audited(refusals.end_window)
    assert (ACTION, "", "refused 80 times more") in rows
    assert len(rows) == MAX_ROWS + 1


async def test_sec_21_what_it_says_of_itself_counts_for_nothing(theft: Theft) -> None:
    """SEC-21: metadata that names another node or agent changes nothing."""
    request = podsvid_pb2.BatchNewX509SVIDRequest()
    request.params.add(
        entry_id=theft.for_other.id, csr=make_csr(make_key()), pod_uid=theft.other.uid
    )
    metadata = (
        ("x-node", "b"), ("agent_node_uid", str(theft.honest.id)), ("node-name", "b"),
    )  # fmt: skip
    answer = await stub(theft.thief).BatchNewX509SVID(request, metadata=metadata).read()
    assert codes(answer.results) == [7]


async def test_sec_21_a_pod_that_the_thief_starts_is_its_own(theft: Theft) -> None:
    """SEC-21: an annotation that claims a foreign pod's UID makes nobody that pod."""
    liar = theft.place.cluster.pod(
        "liar", "shop", "web", "a",
        annotations={"kubernetes.io/config.hash": theft.other.uid.replace("-", "")},
        labels={"uid": theft.other.uid},
    )  # fmt: skip
    await theft.place.knows(liar)
    for uid in (theft.other.uid, theft.other.uid.replace("-", "")):
        assert (
            await theft.gained(lambda uid=uid: denied_x509(theft.thief, theft.for_other, uid))
            == 0
        )


async def test_sec_21_a_mirror_pod_has_no_account(theft: Theft) -> None:
    """SEC-21: a kubelet can show static pods of any namespace; none of them has an account."""
    mirror = theft.place.cluster.pod("pay-2", "payments", "pay", "a", static=True)
    body = copied(mirror.body)
    del body["spec"]["serviceAccountName"]  # the API server takes no mirror pod with one
    theft.place.cluster.put_pod(body)
    table = theft.place.pods.clusters["prod"].pods
    await eventually(lambda: (found := table.get(mirror.uid)) and not found.pod.service_account)
    digest = body["metadata"]["annotations"]["kubernetes.io/config.hash"]

    async def attempts() -> None:
        for uid in (mirror.uid, digest, ""):
            await denied_x509(theft.thief, theft.for_other, uid)

    assert await theft.gained(attempts) == 0
