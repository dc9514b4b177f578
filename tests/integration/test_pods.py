"""
Identity by pod: from a process's `connect()` to its SVID, and what changes it.

Processes are real and prove themselves; the test writes what ``/proc/<pid>/cgroup`` says of
each, and a stand-in answers as API server and kubelet (see `tests.support.placed`).
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import grpc
import pytest

from spiffe_wire.k8s import watch
from spiffe_wire.k8s.rbac import AGENT_RULES
from tests.faults.pages import Pages, a_free_port
from tests.support.endpoint import ending, fetch, read, says_nothing
from tests.support.k8s.objects import Container
from tests.support.placed import AGENT, ClusterStack, a_cluster_stack
from tests.support.stack import ROOT, TRUST_DOMAIN
from workload_api.attestors.registry import Attestation

DENIED = grpc.StatusCode.PERMISSION_DENIED
WEB = ("k8s:cluster:demo", "k8s:ns:shop", "k8s:sa:web")


def ids(message: Any) -> list[str]:
    """The paths of the SPIFFE IDs of a message."""
    return [one.spiffe_id.removeprefix(f"spiffe://{TRUST_DOMAIN}") for one in message.svids]


def waiting(name: str = "app") -> Container:
    """A container that is yet to start."""
    return Container(name, waits=True)


async def first(stub: Any) -> list[str]:
    """Who a process is, when it is somebody."""
    return ids(await read(fetch(stub)))


async def refused(stub: Any) -> str:
    """What a process without an identity is told."""
    code, said = await ending(fetch(stub))
    assert code is DENIED, (code, said)
    return said


async def reason(stack: ClusterStack, pid: int) -> str:
    """Why the operator is told that pods have no say in who this process is."""
    explained = await stack.explain(pid)
    (partial,) = [one for one in explained.partial if one.attestor == "k8s"]
    return str(partial.reason)


async def pending(call: Any, for_: float = 0.15) -> "asyncio.Task[Any]":
    """The next message of a stream, which does not come by itself."""
    reading = asyncio.create_task(call.read())
    await asyncio.wait([reading], timeout=for_)
    assert not reading.done()
    return reading


async def denied(reading: "asyncio.Task[Any]") -> None:
    """The stream of *reading* ends because the process is nobody any more."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(reading, 5)
    assert raised.value.code() is DENIED


async def until(ready: Any, within: float = 10) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(within):
        while not ready():
            await asyncio.sleep(0.005)


# Who is who


async def test_a_process_is_who_its_pod_is() -> None:
    """By namespace and account; another account's pod is another, and no pod is nobody."""
    async with a_cluster_stack() as stack:
        web, api = stack.cluster.pod(), stack.cluster.pod("api-1", service_account="api")
        await stack.add_entry("/web", *WEB)
        await stack.add_entry("/api", "k8s:ns:shop", "k8s:sa:api")
        async with (
            stack.process(web) as one,
            stack.process(api) as two,
            stack.process() as outside,
        ):
            assert await first(one.stub) == ["/web"]
            assert await first(two.stub) == ["/api"]
            await refused(outside.stub)


async def test_each_container_may_have_an_identity_of_its_own() -> None:
    """Two containers of one pod, told apart by name, and an init container by its image."""
    async with a_cluster_stack() as stack:
        setup = Container("setup", "registry.example/setup:1", kind="initContainers")
        pod = stack.cluster.pod(containers=[setup, "app", "proxy"])
        await stack.add_entry("/app", *WEB, "k8s:container-name:app")
        await stack.add_entry("/proxy", *WEB, "k8s:container-name:proxy")
        await stack.add_entry("/setup", *WEB, "k8s:container-image:registry.example/setup:1")
        for name in ("app", "proxy", "setup"):
            async with stack.process(pod, name) as caller:
                assert await first(caller.stub) == [f"/{name}"]


async def test_uids_of_pod_account_and_namespace() -> None:
    """The strongest selectors: a pod, account or namespace of the same name is another."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        account = stack.cluster.find("serviceaccounts", "web", "shop")["metadata"]["uid"]
        namespace = stack.cluster.find("namespaces", "shop")["metadata"]["uid"]
        await stack.add_entry(
            "/strong",
            f"k8s:pod-uid:{pod.uid}",
            f"k8s:sa-uid:{account}",
            f"k8s:ns-uid:{namespace}",
        )
        async with stack.process(pod) as caller:
            call = fetch(caller.stub)
            assert ids(await read(call)) == ["/strong"]
            stack.cluster.recreate("serviceaccounts", "web", "shop")
            assert (await ending(call))[0] is DENIED


async def test_sec_33_a_pods_cgroup_that_is_not_ones_own() -> None:
    """SEC-33: forged paths get nothing of a pod, and the operator is told why."""
    async with a_cluster_stack() as stack:
        pod, other = stack.cluster.pod(), stack.cluster.pod("web-2", "bank", "teller")
        await stack.add_entry("/web", *WEB)
        own = f"/user.slice/user-1000.slice/user@1000.service{pod.cgroup()}"
        swapped = pod.cgroup().replace(pod.uid, other.uid)
        for text, why in [
            (own, "below none of the configured prefixes"),
            (swapped, f"its container is one of pod shop/web-1 ({pod.uid})"),
            (f"{pod.cgroup()}{other.cgroup()}", "a second pod or container"),
        ]:
            async with stack.process(text=f"0::{text}\n".encode()) as caller:
                await refused(caller.stub)
                assert why in await reason(stack, caller.pid)


# Changes


async def test_sec_36_a_relabelled_pod_loses_and_gains_identities() -> None:
    """SEC-36: a change of labels reaches the pod's open streams, and no other's, at once."""
    async with a_cluster_stack() as stack:
        pod, other = (stack.cluster.pod(one, labels={"tier": "gold"}) for one in ("a", "b"))
        await stack.add_entry("/gold", *WEB, "k8s:pod-label:tier:gold")
        await stack.add_entry("/lead", *WEB, "k8s:pod-label:tier:gold", "k8s:pod-label:lead:1")
        async with stack.process(pod) as caller, stack.process(other) as spared:
            call, still = fetch(caller.stub), fetch(spared.stub)
            assert ids(await read(call)) == ids(await read(still)) == ["/gold"]
            took = {}
            for name, labels, wanted in [
                ("gained", {"tier": "gold", "lead": "1"}, ["/gold", "/lead"]),
                ("lost one", {"tier": "gold"}, ["/gold"]),
            ]:
                started = time.perf_counter()
                stack.cluster.relabel(pod, labels)
                assert ids(await read(call)) == wanted
                took[name] = time.perf_counter() - started
            started = time.perf_counter()
            stack.cluster.relabel(pod, {})
            assert (await ending(call))[0] is DENIED
            took["lost all"] = time.perf_counter() - started
            print("label to stream:", {name: f"{1000 * s:.1f} ms" for name, s in took.items()})
            assert await says_nothing(still)


async def test_sec_36_what_changes_no_identity_is_not_sent() -> None:
    """SEC-36: a pod's status and annotations change all the time, and streams stay quiet."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod(containers=["app", waiting("late")])
        await stack.add_entry("/web", *WEB)
        async with stack.process(pod) as caller:
            call = fetch(caller.stub)
            await read(call)
            stack.cluster.annotate(pod, beat="1")
            stack.cluster.start_container(pod, "late")
            stack.cluster.relabel(pod, {"irrelevant": "1"})
            assert await says_nothing(call)


async def test_sec_36_a_deleted_pod_ends_its_streams_and_its_name_is_no_claim() -> None:
    """SEC-36: a deleted pod's streams end; one made anew of the same name is another UID."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/old", *WEB, f"k8s:pod-uid:{pod.uid}")
        async with stack.process(pod) as caller:
            call = fetch(caller.stub)
            assert ids(await read(call)) == ["/old"]
            stack.cluster.terminate_pod(pod)  # it serves on until its time is over
            reading = await pending(call)
            new = stack.cluster.recreate_pod(pod)
            await denied(reading)
            await refused(caller.stub)
            assert await reason(stack, caller.pid) == "pod shop/web-1 was deleted"
        assert (new.name, new.uid != pod.uid) == (pod.name, True)
        async with stack.process(new) as caller:
            await refused(caller.stub)
            await stack.add_entry("/new", *WEB, f"k8s:pod-uid:{new.uid}")
            assert await first(caller.stub) == ["/new"]


async def test_a_process_that_is_earlier_than_its_pods_status() -> None:
    """Who connects before the kubelet has told of its container waits, and is then served."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod(containers=[waiting()])
        await stack.add_entry("/web", *WEB, "k8s:container-name:app")
        started = "ab" * 32
        text = f"0::/kubepods/burstable/pod{pod.uid}/{started}\n".encode()
        async with stack.process(text=text) as caller:
            reading = await pending(fetch(caller.stub))
            lists = stack.cluster.calls.count(verb="list")
            stack.cluster.start_container(pod, id=started)
            assert ids(await asyncio.wait_for(reading, 5)) == ["/web"]
            assert stack.cluster.calls.count(verb="list") == lists  # nothing was polled


@pytest.mark.parametrize("is_told", [True, False], ids=["told-at-last", "never-told"])
async def test_a_kubelet_that_is_late_denies_nobody(
    monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """
    Who calls long before its container is told of is held until it is, though it was attested
    without it; one that is never told of is refused in the end.
    """
    kwargs = Attestation.__init__.__kwdefaults__
    monkeypatch.setitem(kwargs, "timeout", timedelta(seconds=0.2))
    grace = timedelta(seconds=1 if is_told else 0.04)
    async with a_cluster_stack(grace=grace) as stack:
        pod = stack.cluster.pod(containers=[waiting()])
        await stack.add_entry("/web", *WEB)
        started = "ef" * 32
        text = f"0::/kubepods/burstable/pod{pod.uid}/{started}\n".encode()
        async with stack.process(text=text) as caller:
            reading = await pending(fetch(caller.stub), for_=0.5)
            if is_told:
                await asyncio.sleep(grace.total_seconds())
                assert not reading.done(), "held for longer than who is merely nobody"
                stack.cluster.start_container(pod, id=started)
                assert ids(await asyncio.wait_for(reading, 5)) == ["/web"]
            else:
                await denied(reading)


async def test_a_container_started_anew_is_another_container() -> None:
    """The process of a container's last run is nobody once the next run is there."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/web", *WEB)
        async with stack.process(pod) as caller:
            call = fetch(caller.stub)
            await read(call)
            stack.cluster.start_container(pod)
            assert (await ending(call))[0] is DENIED
        async with stack.process(pod) as caller:
            assert await first(caller.stub) == ["/web"]


async def test_a_debugging_container_has_no_identity() -> None:
    """Who may debug a pod does not become it."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/web", *WEB)
        debug = Container("debug", "registry.example/tools:1", kind="ephemeralContainers")
        stack.cluster.add_container(pod, debug)
        async with stack.process(pod, "debug") as caller:
            await refused(caller.stub)
            assert "debugging container" in await reason(stack, caller.pid)


async def test_a_static_pod() -> None:
    """A pod of the kubelet's own files: its cgroup has the file's hash for a UID."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod("etcd-n1", "kube-system", static=True)
        digest = pod.body["metadata"]["annotations"]["kubernetes.io/config.hash"]
        await stack.add_entry("/etcd", "k8s:ns:kube-system", f"k8s:pod-uid:{pod.uid}")
        text = f"0::{pod.cgroup()}\n".replace(pod.uid, digest).encode()
        async with stack.process(text=text) as caller:
            assert await first(caller.stub) == ["/etcd"]


async def test_py_spiffe_in_a_pod() -> None:
    """py-spiffe as it is, in a process of its own, gets the SVID of its pod."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/web", *WEB)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "tests" / "interop" / "workload.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"SPIFFE_ENDPOINT_SOCKET": f"unix://{stack.socket}"},
        )
        assert process.stdin is not None
        try:
            stack.place(process.pid, pod)
            out, _ = await asyncio.wait_for(
                process.communicate(json.dumps(["x509_svid", {}]).encode() + b"\n"), 20
            )
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert json.loads(out)["answer"]["id"] == f"spiffe://{TRUST_DOMAIN}/web"


# What is asked


async def test_what_an_agent_asks_of_a_cluster() -> None:
    """A known container costs no call; what is asked is declared, and of this node alone."""
    async with a_cluster_stack() as stack:
        pod = stack.cluster.pod()
        stack.cluster.pod("elsewhere", node="n2")
        await stack.add_entry("/web", *WEB)
        await stack.cluster.settled(count=3)
        await until(lambda: len(stack.agent.attestors.pods or ()) == 1)
        stack.cluster.calls.clear()
        async with stack.process(pod) as caller:
            for _ in range(5):
                assert await first(caller.stub) == ["/web"]
        assert not stack.cluster.calls.made
        allowed = {(verb, *one[:2]) for one in AGENT_RULES for verb in one[2]}
        stack.cluster.cut_watches()
        await stack.cluster.settled(count=3)
        assert stack.cluster.calls.grants(AGENT) <= allowed


# The API server goes away


async def test_sec_106_the_api_server_is_away_for_longer_than_an_svid_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SEC-106: known pods keep their identity and have it renewed; a new one gets it later."""
    monkeypatch.setattr(watch, "LONGEST_PAUSE", timedelta(seconds=0.5))
    async with a_cluster_stack() as stack:
        pod, later = stack.cluster.pod(), stack.cluster.pod("web-2", containers=[waiting()])
        await stack.add_entry("/web", *WEB, x509_svid_ttl=3)
        await stack.add_entry("/any", f"unix:uid:{os.geteuid()}")
        started = "cd" * 32
        text = f"0::/kubepods/burstable/pod{later.uid}/{started}\n".encode()
        async with stack.process(pod) as caller, stack.process(text=text) as new:
            call = fetch(caller.stub)
            before = web_svid(await read(call))
            await stack.cluster.stop()
            new_call = fetch(new.stub)
            waits = asyncio.create_task(new_call.read())
            ends = asyncio.get_running_loop().time() + 3.2
            renewed = set()
            while asyncio.get_running_loop().time() < ends:
                renewed.add(web_svid(await read(call)))
            assert len(renewed - {before}) >= 2
            assert ids(await asyncio.wait_for(waits, 5)) == ["/any"]
            explained = await reason(stack, new.pid)
            assert f"has not told of container {started[:12]}" in explained
            assert "cannot be reached" in explained
            stack.cluster.start_container(later, id=started)
            await stack.cluster.start()
            assert sorted(ids(await read(new_call))) == ["/any", "/web"]
            assert "/web" in await first(caller.stub)


def web_svid(message: Any) -> bytes:
    """The certificate of /web."""
    (found,) = (one for one in message.svids if one.spiffe_id.endswith("/web"))
    return bytes(found.x509_svid)


async def test_an_agent_that_starts_before_its_api_server() -> None:
    """Who connects meanwhile waits, and is served with the first list; others never waited."""
    async with a_cluster_stack(start_cluster=False) as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/web", *WEB)
        await stack.add_entry("/any", f"unix:uid:{os.geteuid()}")
        async with stack.process() as outside, stack.process(pod) as caller:
            assert await first(outside.stub) == ["/any"]
            reading = asyncio.create_task(fetch(caller.stub).read())
            await until(lambda: stack.agent.attestors.pods.awaited == 1)
            await stack.cluster.start()
            assert sorted(ids(await asyncio.wait_for(reading, 8))) == ["/any", "/web"]


async def test_sec_114_an_agent_says_what_it_cannot_learn() -> None:
    """SEC-114: without its API server an agent stays ready, and says what it lacks."""
    port = a_free_port()
    async with a_cluster_stack(status_port=port) as stack:
        pages = Pages(port)
        pod = stack.cluster.pod()
        await until(lambda: len(stack.agent.attestors.pods) == 1)
        await until(lambda: not stack.agent.attestors.problems)
        code, ready = await pages.ready()
        assert (code, ready["attestor_problems"]) == (200, [])
        assert await pages.metric("agent_pods") == 1
        assert await pages.metric("agent_pods_source_away_seconds") == 0
        await stack.cluster.stop()
        await until(lambda: stack.agent.attestors.problems)
        code, ready = await pages.ready()
        assert (code, ready["ready"]) == (200, True)
        assert "cannot be reached" in ready["attestor_problems"][0]
        assert await pages.metric("agent_pods_source_away_seconds") > 0
        async with stack.process(pod) as caller:
            explained = await stack.explain(caller.pid)
            assert "k8s:pod-name:web-1" in explained.text
            assert "k8s:container-name:app" in explained.text


async def test_sec_35_pods_are_not_believed_for_longer_than_is_said() -> None:
    """SEC-35: past the limit that an operator set, pods of before are nobody's identity."""
    async with a_cluster_stack(stale_limit=timedelta(seconds=0.3)) as stack:
        pod = stack.cluster.pod()
        await stack.add_entry("/web", *WEB)
        async with stack.process(pod) as caller:
            assert await first(caller.stub) == ["/web"]
            await stack.cluster.stop()
            source = stack.agent.attestors.source
            await until(lambda: source.away > timedelta(seconds=0.3))
            await refused(caller.stub)
            assert "which is too long: 127.0.0.1" in await reason(stack, caller.pid)


async def test_sec_35_rights_on_namespaces_that_were_not_granted() -> None:
    """SEC-35: UIDs that may not be learnt are absent; the result is partial, and says why."""
    async with a_cluster_stack(rights=[("", "pods", frozenset({"list", "watch"}))]) as stack:
        pod = stack.cluster.pod()
        await until(lambda: len(stack.agent.attestors.problems) == 2)
        await stack.add_entry("/web", *WEB)
        uid = stack.cluster.find("namespaces", "shop")["metadata"]["uid"]
        await stack.add_entry("/strong", f"k8s:ns-uid:{uid}")
        async with stack.process(pod) as caller:
            assert await first(caller.stub) == ["/web"]
            missing = "namespace shop and service account shop/web is not known: "
            said = await reason(stack, caller.pid)
            assert said.startswith(missing)
            assert "cannot list resource" in said
            near = (await stack.explain(caller.pid)).near_misses[0]
            assert near.entry.spiffe_id.path == "/strong"
            assert "for which no attestor could vouch" in near.difference
        assert all("grant it by RBAC" in one for one in stack.agent.attestors.problems)


# By the kubelet alone


async def test_by_the_kubelets_word() -> None:
    """With no way to the API server: late lists are waited for, and changes are noticed."""
    async with a_cluster_stack(kubelet=True) as stack:
        pod = stack.cluster.pod("web-0", labels={"tier": "gold"})
        await stack.add_entry("/gold", *WEB, "k8s:pod-label:tier:gold")
        async with stack.process(pod) as caller:
            call = fetch(caller.stub)
            assert ids(await read(call)) == ["/gold"]
            kubelet = stack.cluster.kubelets["n1"]
            kubelet.freeze()
            late = stack.cluster.pod("web-1", labels={"tier": "gold"})
            async with stack.process(late) as early:
                reading = await pending(fetch(early.stub))
                kubelet.thaw()
                assert ids(await asyncio.wait_for(reading, 5)) == ["/gold"]
            stack.cluster.relabel(pod, {})
            code, _ = await ending(call, within=8)
            assert code is DENIED
        asked = stack.cluster.calls.grants(AGENT)
        assert not asked, "the API server was asked"
        assert kubelet.calls.grants(AGENT) == {("get", "", "nodes/proxy")}
