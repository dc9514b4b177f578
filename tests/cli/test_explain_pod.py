"""``issuer explain --pod``: what a pod's processes get, by what the server knows of the pod."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support.k8s.cluster import Pod
from tests.support.programs import DONE, REFUSED, USAGE, Programs
from tests.support.stack import entry_message
from tests.support.verifying import Verified, a_place

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOP = ("k8s:cluster:prod", "k8s:ns:shop", "k8s:sa:web")


@dataclass
class Desk:
    """A server that watches one cluster of two nodes, one of which has an agent."""

    place: Verified
    issuer: Programs
    web: Pod
    far: Pod


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk() -> AsyncIterator[Desk]:
    """A pod with two containers on the agent's node, others like it, one on another node."""
    async with a_place() as place:
        cluster = place.cluster
        agent = await place.agent("n1")
        web = cluster.pod("web-7f-abc", labels={"app": "web"}, containers=("app", "proxy"))
        cluster.pod("twin-1")
        cluster.pod("twin-2")
        far = cluster.pod("far", node="n2", labels={"app": "web"})
        await place.knows(web, far)
        parent = agent.id.uri
        await place.running.add(
            entry_message("/web", parent, *SHOP, "k8s:container-name:app"),
            entry_message("/proxy", parent, *SHOP, "k8s:container-name:proxy", "unix:uid:7"),
            entry_message("/payments", parent, *SHOP, "k8s:pod-label:role:payments"),
        )
        socket = str(place.running.server.settings.admin_socket_path)
        yield Desk(place, Programs({"SPIFFE_ISSUER_SOCKET": socket}), web, far)


async def test_each_container_and_why(desk: Desk) -> None:
    """Each container gets its own; what differs is named, and what no server can see."""
    said = await desk.issuer.issuer("explain", "--pod", "shop/web-7f-abc")
    assert said.code == DONE, said.err
    first, agent, *rest = said.out.splitlines()
    assert first == (f"pod shop/web-7f-abc of cluster prod, uid {desk.web.uid}, on node n1")
    assert agent.startswith("agent spiffe://example.org/spire/agent/k8s_psat/prod/")
    app, proxy = "\n".join(rest).split("container ")[1:]
    assert app.startswith("app\n") and "gets    spiffe://example.org/web" in app
    assert "  k8s:pod-label:app:web\n" in app
    assert "k8s:pod-label:role:payments, which the process does not have" in app
    assert "gets" not in proxy
    assert "nearly  spiffe://example.org/proxy" in proxy
    assert "unix:uid:7, for which no attestor could vouch" in proxy


@pytest.mark.parametrize("name", ["shop/web", "shop/web-7f"])
async def test_how_a_name_begins(desk: Desk, name: str) -> None:
    """Where one pod alone begins so, that is enough; its facts as JSON too."""
    said = await desk.issuer.issuer("explain", "--pod", name, "-o", "json")
    facts = said.json
    assert (facts["name"], facts["uid"], facts["cluster"]) == (
        "web-7f-abc", desk.web.uid, "prod",
    )  # fmt: skip
    assert [one["name"] for one in facts["containers"]] == ["app", "proxy"]
    reasons = [one["explanation"]["reason"] for one in facts["containers"]]
    assert reasons == ["identity", "no_match"]


async def test_a_node_without_an_agent(desk: Desk) -> None:
    """Where no agent is attested on the pod's node, that is the reason."""
    said = await desk.issuer.issuer("explain", "--pod", "shop/far")
    assert said.code == REFUSED
    assert "no agent is attested on the pod's node" in said.out
    assert "agent spiffe://" not in said.out


async def test_a_pod_that_follows_its_label(desk: Desk) -> None:
    """What is explained is what the pod is now."""
    desk.place.cluster.relabel(desk.web, {"role": "payments"})
    await desk.place.knows(desk.web)
    said = await desk.issuer.issuer("explain", "--pod", "shop/web")
    assert "gets    spiffe://example.org/payments" in said.out


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("--pod", "shop/none"), REFUSED, "knows no pod shop/none of cluster prod"),
        (("--pod", "elsewhere/web"), REFUSED, "knows no pod elsewhere/web"),
        (("--pod", "shop/twin"), REFUSED, "several pods of shop begin so: twin-1, twin-2"),
        (("--pod", "shop/web", "--cluster", "x"), REFUSED, "there are prod"),
        (("--pod", "web"), USAGE, "takes NAMESPACE/NAME"),
        (("--pod", "shop/"), USAGE, "takes NAMESPACE/NAME"),
        (("--pod", "shop/web", "--pid", "1"), USAGE, "give one of"),
        (("--pid", "1", "--cluster", "prod"), USAGE, "--cluster goes with --pod"),
        ((), USAGE, "give one of"),
    ],
    ids=map(str, range(9)),
)  # fmt: skip
async def test_what_cannot_be_told(
    desk: Desk, arguments: tuple[str, ...], code: int, why: str
) -> None:
    """What cannot be told apart or found is said, with what there is."""
    said = await desk.issuer.issuer("explain", *arguments)
    assert said.code == code
    assert why in said.err


async def test_a_server_without_clusters(programs: Programs) -> None:
    """A server that watches no cluster says which setting is missing."""
    said = await programs.issuer("explain", "--pod", "shop/web")
    assert said.code == REFUSED
    assert "this server watches no cluster: set clusters" in said.err
