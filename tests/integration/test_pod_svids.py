"""
From a pod to its SVID, verified on both sides (architecture A5).

Server and agents run in this loop, and agents prove their nodes by their pods' tokens; the
processes are real, and the test writes what ``/proc/<pid>/cgroup`` says of each.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from spiffe_core.x509svid import X509Svid
from spiffe_wire.k8s.rbac import AGENT_RULES, KUBELET_RULES
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.callers import an_id, below, eventually
from tests.support.endpoint import fetch, read
from tests.support.k8s.cluster import Container, Pod
from tests.support.placed import AGENT, ClusterStack, ServerHere, rules_of
from tests.support.psat import agent_pod, node_uid
from tests.support.stack import TRUST_DOMAIN, a_folder
from tests.support.verifying import WATCHES, Verified, a_place
from workload_api.agent import config
from workload_api.agent.app import serve

WEB = ("k8s:cluster:prod", "k8s:ns:shop", "k8s:sa:web")


@dataclass
class Here:
    """A server, its cluster, and the agents of nodes."""

    place: Verified
    stack: contextlib.AsyncExitStack

    @property
    def cluster(self) -> Any:
        """The cluster."""
        return self.place.cluster

    async def agent(self, node: str = "n1", *, kubelet: bool = False) -> ClusterStack:
        """The agent of a node, in step with its server and the node's pods."""
        folder = self.stack.enter_context(a_folder())
        server = self.place.running.server
        here = ServerHere(server.settings.admin_socket_path, server.port)
        made = ClusterStack(folder, self.cluster, here)
        token = folder / "token"
        token.write_text(self.cluster.projected_token(agent_pod(self.cluster, node)))
        (folder / "bundle.pem").write_text(await here.bundle_pem())
        pods: dict[str, Any] = {}
        if kubelet:
            port = (await self.cluster.kubelet(node)).port
            pods = {
                "pods_from": config.PodSource.KUBELET,
                "kubelet_host": "127.0.0.1",
                "kubelet_port": port,
            }
        settings = config.AgentSettings(
            trust_domain=TRUST_DOMAIN,
            data_dir=folder / "agent",
            runtime_dir=folder / "a",
            workload_socket=folder / "w" / "workload.sock",
            admin_socket=folder / "a" / "admin.sock",
            node_attestor=config.NodeAttestor.K8S_PSAT,
            kubernetes=config.Kubernetes(
                cluster=self.cluster.name,
                token_path=token,
                workloads=True,
                node_name=node,
                kubeconfig=self.cluster.kubeconfig(
                    folder, token=self.cluster.account_token("spiffe", "spiffe-agent")
                ),
                **pods,
            ),
            server=config.Server(port=server.port, trust_bundle=folder / "bundle.pem"),
            status=config.Status(port=0),
        )
        made.agent = await self.stack.enter_async_context(
            serve(settings, read_cgroup=made.read_cgroup)
        )
        await eventually(lambda: made.agent.syncer.state.connected)
        uid = node_uid(self.cluster, node)
        made.agent_id = f"spiffe://{TRUST_DOMAIN}/spire/agent/k8s_psat/prod/{uid}"
        return made

    async def pod_of(self, entry: Any) -> set[str]:
        """The pods for which SVIDs of an entry are on record."""
        return {row[2] for row in await self.place.issued() if row[0] == entry.id}


@contextlib.asynccontextmanager
async def all_of_it(**changes: Any) -> AsyncIterator[Here]:
    """A server that verifies the pods of a cluster; agents come as they are asked for."""
    async with contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(a_place(**changes))
        place.cluster.grant(AGENT, *rules_of(AGENT_RULES | KUBELET_RULES))
        yield Here(place, stack)


async def identity(stack: ClusterStack, pod: Pod) -> str:
    """Who a process of *pod* is."""
    async with stack.process(pod) as one:
        message = await read(fetch(one.stub))
        return str(message.svids[0].spiffe_id.removeprefix(f"spiffe://{TRUST_DOMAIN}"))


async def test_sec_21_an_identity_is_signed_for_its_pod() -> None:
    """SEC-21: what a process gets was signed for its pod, and stands on record so."""
    async with all_of_it() as here:
        node = await here.agent()
        entry = await node.add_entry("/web", *WEB)
        elsewhere = await node.add_entry("/pay", "k8s:ns:payments", "k8s:sa:pay")
        plain = await node.add_entry("/plain", "unix:uid:1")
        pod = here.cluster.pod()
        assert await identity(node, pod) == "/web"
        async with node.process(pod) as one:
            answer = await one.stub.FetchJWTSVID(
                pb.JWTSVIDRequest(audience=["a"]), metadata=METADATA
            )
            assert answer.svids[0].spiffe_id.endswith("/web")
        rows = [row for row in await here.place.issued() if row[0] == entry.id]
        assert rows == [(entry.id, node.agent_id, pod.uid)] * 2
        # Nothing is signed ahead for pods that are not here; the rest is.
        await eventually(lambda: plain.id in node.agent.cache.svids)
        assert elsewhere.id not in node.agent.cache.svids
        assert await here.pod_of(elsewhere) == set() and await here.pod_of(plain) == {""}


async def test_signed_before_the_process_is_there() -> None:
    """A pod that is scheduled to a node has its SVID before a container of it has started."""
    async with all_of_it() as here:
        node = await here.agent()
        entry = await node.add_entry("/web", *WEB)
        here.cluster.pod(containers=[Container("app", waits=True)])
        await eventually(lambda: entry.id in node.agent.cache.svids)


async def test_each_node_signs_for_its_own_pods() -> None:
    """Below an alias of the cluster, each agent asks for what runs on it, and gets it."""
    async with all_of_it() as here:
        first, second = await here.agent("n1"), await here.agent("n2")
        server = here.place.running.server.hub.trust_domain.server_id
        _, web, pay = await here.place.running.add(
            below(server, "/prod", "k8s_psat:cluster:prod"),
            below(an_id("/prod"), "/web", *WEB),
            below(an_id("/prod"), "/pay", "k8s:ns:payments", "k8s:sa:pay"),
        )
        pod = here.cluster.pod("web-1", node="n1")
        other = here.cluster.pod("pay-1", "payments", "pay", "n2")
        assert await identity(first, pod) == "/web"
        assert await identity(second, other) == "/pay"
        assert await here.pod_of(web) == {pod.uid} and await here.pod_of(pay) == {other.uid}
        assert not here.place.running.server.metrics.pod_refusals._values


async def test_an_agent_that_is_ahead_of_the_server_is_waited_for() -> None:
    """A kubelet tells its agent first: the server's watch is 300 ms behind, and all is well."""
    async with all_of_it() as here:
        node = await here.agent(kubelet=True)
        entry = await node.add_entry("/web", *WEB)
        plain = await node.add_entry("/plain", "unix:uid:1")
        await eventually(lambda: plain.id in node.agent.cache.svids)
        here.cluster.hold_watches()
        pod = here.cluster.pod()
        async with node.process(pod) as one:
            call = fetch(one.stub)
            await eventually(lambda: len(here.place.pods.arrivals) == 1)
            # Meanwhile others are signed.
            late = await node.add_entry("/late", "unix:uid:2")
            await eventually(lambda: late.id in node.agent.cache.svids)
            assert entry.id not in node.agent.cache.svids
            here.cluster.release_watches()
            message = await read(call)
        assert message.svids[0].spiffe_id.endswith("/web")
        assert await here.pod_of(entry) == {pod.uid}


async def test_sec_106_renewed_while_the_api_server_is_away() -> None:
    """SEC-106: away for longer than an SVID lives, known pods have their SVIDs renewed."""
    async with all_of_it() as here:
        node = await here.agent()
        entry = await node.add_entry("/web", *WEB, x509_svid_ttl=2)
        pod = here.cluster.pod()
        async with node.process(pod) as one:
            call = fetch(one.stub)
            first = X509Svid.from_chain(((await read(call)).svids[0].x509_svid,))
            await here.cluster.settled(count=WATCHES)
            await here.cluster.stop()
            last, clock = first, here.place.running.server.own.clock
            while clock.now() <= first.validity.not_after:
                last = X509Svid.from_chain(((await read(call, 10)).svids[0].x509_svid,))
            assert last.validity.covers(clock.now())
        assert here.place.running.server.cluster_problems()
        assert await here.pod_of(entry) == {pod.uid}


async def test_a_pod_made_anew_is_another_on_record() -> None:
    """The same name again is another pod: what is signed from then on is for that one."""
    async with all_of_it() as here:
        node = await here.agent()
        entry = await node.add_entry("/web", *WEB)
        pod = here.cluster.pod()
        assert await identity(node, pod) == "/web"
        again = here.cluster.recreate_pod(pod)
        pods = node.agent.attestors.pods
        await eventually(lambda: pods is not None and pods.pod_for(
            node.agent.cache.index.get(entry.id).selectors) == again.uid)  # fmt: skip
        assert await node.agent.syncer.renew(None) == 1
        assert await identity(node, again) == "/web"
        assert await here.pod_of(entry) == {pod.uid, again.uid}


async def test_a_server_without_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of an earlier release is asked as SPIRE's is, and verifies by any pod."""
    monkeypatch.setattr(podsvid_pb2_grpc, "add_PodSvidServicer_to_server", lambda *_: None)
    async with all_of_it() as here:
        node = await here.agent()
        entry = await node.add_entry("/web", *WEB)
        pod = here.cluster.pod()
        assert await identity(node, pod) == "/web"
        assert not node.agent.syncer.calls.names_pods
        assert await here.pod_of(entry) == {""}
        assert here.place.metric("pod_checks", "prod", "any-pod") >= 1


async def test_a_pod_that_is_no_longer_what_an_entry_wants_is_not_hammered() -> None:
    """SEC-107: what the server refuses is asked for ever more seldom, and the rest goes on."""
    async with all_of_it() as here:
        object.__setattr__(here.place.pods, "patience", 0.05)
        node = await here.agent(kubelet=True)
        entry = await node.add_entry("/web", *WEB, "k8s:pod-label:app:web")
        pod = here.cluster.pod(labels={"app": "db"})
        await here.place.knows(pod)
        here.cluster.hold_watches()
        here.cluster.relabel(pod, {"app": "web"})  # the kubelet knows, the server does not
        async with node.process(pod) as one:
            call = fetch(one.stub)
            refusals = lambda: here.place.metric("pod_refusals", "prod", "pod-differs")  # noqa: E731
            await eventually(lambda: refusals() >= 2)
            await asyncio.sleep(0.5)
            assert refusals() < 12
            assert entry.id not in node.agent.cache.svids
            here.cluster.release_watches()
            message = await read(call, 10)
        assert message.svids[0].spiffe_id.endswith("/web")
