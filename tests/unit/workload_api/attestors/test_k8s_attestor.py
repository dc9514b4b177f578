"""The ``k8s`` attestor: from a process's cgroup to its pod, and what it says when it can't."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.children import a_child
from tests.support.pods import (
    HASH,
    NOWHERE,
    SourceOfPods,
    a_meta,
    a_pod,
    a_table,
    a_uid,
    an_id,
    cgroup_of,
    its_id,
    values,
)
from workload_api.attestors.cgroup import CgroupError, CgroupLayout
from workload_api.attestors.k8s import K8sAttestor
from workload_api.attestors.pods import PodError, PodTable
from workload_api.attestors.protocol import AttestationError, Finding, NotYetError
from workload_api.attestors.registry import Attestation

PEER: Any = SimpleNamespace(pid=4242)
"""All that this attestor asks of a caller."""
UNKNOWN = an_id(0xFFFF_FFFF)
POD = a_pod(1)
IN_POD = cgroup_of(POD.uid, its_id(POD))


def an_attestor(
    *texts: bytes, pods: PodTable | None = None, source: Any = None, **changes: Any
) -> K8sAttestor:
    """One that reads *texts* one after the other, the last for ever."""
    left = list(texts or [IN_POD])

    def read(_: int) -> bytes:
        return left.pop(0) if len(left) > 1 else left[0]

    return K8sAttestor(
        a_table(POD) if pods is None else pods,
        source or SourceOfPods(),
        layout=CgroupLayout.pods(),
        read=read,
        **changes,
    )


def at_once(attestor: K8sAttestor) -> Finding:
    """What it says without giving anybody else a turn."""
    coroutine = attestor.attest(PEER)
    try:
        coroutine.send(None)
    except StopIteration as done:
        assert isinstance(done.value, Finding)
        return done.value
    finally:
        coroutine.close()
    raise AssertionError("it waits for something")


async def test_sec_33_a_known_container_is_attested_without_waiting() -> None:
    """SEC-33: by cgroup and table alone; nothing is asked, and nothing is waited for."""
    source = SourceOfPods()
    found = at_once(an_attestor(source=source))
    assert {"ns:shop", "sa:web", "container-name:app", "cluster:demo"} <= values(
        found.selectors
    )
    assert (found.missing, source.wanted) == ("", 0)
    assert found.changed is not None
    assert not found.changed.done()


async def test_a_process_in_no_container_is_not_one_of_ours() -> None:
    """What runs on the node itself has no pod, which is no failure."""
    assert at_once(an_attestor(NOWHERE)) == Finding()


async def test_sec_33_a_process_that_is_moved_meanwhile() -> None:
    """SEC-33: where a process was when it was looked at first is where it must be after."""
    other = a_pod(2)
    attestor = an_attestor(
        IN_POD, cgroup_of(other.uid, its_id(other)), pods=a_table(POD, other)
    )
    with pytest.raises(AttestationError, match="moved to another cgroup"):
        await attestor.attest(PEER)
    with pytest.raises(AttestationError, match="moved to another cgroup"):
        await an_attestor(IN_POD, NOWHERE).attest(PEER)


async def test_a_process_that_moves_within_its_container() -> None:
    """An init that sorts its processes into groups of its own stays in its container."""
    deeper = IN_POD.rstrip() + b"/init.scope\n"
    assert at_once(an_attestor(IN_POD, deeper)).selectors


FORGED: dict[str, bytes] = {
    "another pod's container": cgroup_of(a_uid(2), its_id(POD)),
    "a hash for a UID": cgroup_of(HASH, its_id(POD)),
    "a second container below": IN_POD.rstrip() + b"/" + UNKNOWN.encode() + b"\n",
    "a user's own slice": b"0::/user.slice/user-1000.slice/user@1000.service" + IN_POD[3:],
    "hierarchies that differ": b"1:cpu:/kubepods/burstable/pod"
    + f"{a_uid(2)}/{UNKNOWN}\n".encode()
    + IN_POD,
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
async def test_sec_33_forged_cgroups(text: bytes) -> None:
    """SEC-33: a cgroup that looks made up is an error with its reason, never a pod."""
    with pytest.raises((CgroupError, PodError)):
        await an_attestor(text).attest(PEER)


# On their way


async def test_a_container_that_is_not_there_yet() -> None:
    """Who is too early waits for the list, and is told when the container is in it."""
    pods, source = a_table(), SourceOfPods()
    attestor = an_attestor(pods=pods, source=source)
    with pytest.raises(NotYetError) as raised:
        await attestor.attest(PEER)
    name = f"container {its_id(POD)[:12]} of pod {POD.uid}"
    assert str(raised.value) == f"the API server has not told of {name}"
    assert source.wanted == 1
    with pytest.raises(NotYetError):
        await attestor.attest(PEER)
    assert source.wanted == 1  # it is being asked after already
    pods.put(POD)
    assert raised.value.arrived.done()
    assert at_once(attestor).selectors


async def test_sec_33_a_pod_that_is_deleted_is_not_waited_for() -> None:
    """SEC-33: who waits for a container is refused as soon as its pod is deleted."""
    pods = a_table(replace(POD, containers=()))
    attestor = an_attestor(pods=pods)
    with pytest.raises(NotYetError) as raised:
        await attestor.attest(PEER)
    pods.drop(POD)
    assert raised.value.arrived.done()
    with pytest.raises(PodError, match="was deleted"):
        await attestor.attest(PEER)


async def test_sec_35_the_reason_names_what_is_wrong_with_the_source() -> None:
    """SEC-35: whoever is refused for what nobody told us finds out why nobody did."""
    source = SourceOfPods()
    source.problem = "10.0.0.1:443 cannot be reached"
    attestation = Attestation(
        [an_attestor(NOWHERE), an_attestor(pods=a_table(), source=source)],
        timeout=timedelta(seconds=0.5),
    )
    with a_child() as child:
        found = await attestation.attest(child.peer())
    assert not found.selectors
    assert "has not told of container" in found.partial["k8s"]
    assert found.partial["k8s"].endswith(": 10.0.0.1:443 cannot be reached")


async def test_who_waits_holds_no_slot() -> None:
    """SEC-81: processes in unknown containers keep nobody else from being attested."""
    pods = a_table()
    attestation = Attestation([an_attestor(pods=pods)])
    with a_child() as child:
        waiting = [asyncio.create_task(attestation.attest(child.peer())) for _ in range(50)]
        while pods.awaited < 1 or attestation.slots.held:
            await asyncio.sleep(0)
        pods.put(POD)
        assert all(one.selectors for one in await asyncio.gather(*waiting))


# Partly known


@pytest.mark.parametrize(
    ("feed", "missing"),
    [
        (lambda _: None, "namespace shop and service account shop/web is not known"),
        (lambda t: t.accounts.put(a_meta("web", "shop")), "namespace shop is not known"),
        (
            lambda t: t.namespaces.put(a_meta("shop")),
            "service account shop/web is not known",
        ),
    ],
    ids=["both", "namespace", "account"],
)
async def test_sec_35_what_is_not_known_is_said(
    feed: Callable[[PodTable], None], missing: str
) -> None:
    """SEC-35: UIDs on their way are waited for; later, the rest goes on, as partial."""
    now = 100.0
    pods = a_table(POD, namespaces=True, accounts=True, clock=lambda: now)
    feed(pods)
    attestor = an_attestor(pods=pods, clock=lambda: now)
    with pytest.raises(NotYetError, match=missing) as raised:
        await attestor.attest(PEER)
    assert raised.value.so_far.selectors
    assert raised.value.so_far.missing == missing
    now += 6
    later = at_once(attestor)
    assert later.missing == missing
    assert later.selectors == raised.value.so_far.selectors
    assert not {"ns-uid:uid-of-shop", "sa-uid:uid-of-web"} <= values(later.selectors)
    pods.namespaces.put(a_meta("shop"))
    pods.accounts.put(a_meta("web", "shop"))
    assert raised.value.arrived.done()
    whole = at_once(attestor)
    assert not whole.missing
    assert {"ns-uid:uid-of-shop", "sa-uid:uid-of-web"} <= values(whole.selectors)


async def test_sec_35_the_rest_counts_when_the_time_is_up() -> None:
    """SEC-35: who waited in vain for a UID goes on with what is known, marked partial."""
    pods = a_table(POD, namespaces=True)
    attestation = Attestation([an_attestor(pods=pods)], timeout=timedelta(seconds=0.5))
    with a_child() as child:
        found = await attestation.attest(child.peer())
    assert "ns:shop" in values(found.selectors)
    assert found.partial == {"k8s": "namespace shop is not known"}
    pods.namespaces.put(a_meta("shop"))
    assert all(one.done() for one in found.changed)


async def test_sec_35_nobody_waits_for_what_does_not_come() -> None:
    """SEC-35: a UID that may not be learnt is absent at once, and the reason says why."""
    source = SourceOfPods()
    source.beside_problem = "it does not let us"
    pods = a_table(POD, namespaces=True)
    found = at_once(an_attestor(pods=pods, source=source))
    assert "ns:shop" in values(found.selectors)
    assert found.missing == "namespace shop is not known: it does not let us"


# Stale


async def test_sec_35_pods_are_known_on_while_their_source_is_away() -> None:
    """SEC-35: a container that was known stays so, and the result says since when."""
    source = SourceOfPods()
    attestor = an_attestor(source=source)
    source.problem, source.age = "it does not answer", timedelta(seconds=2)
    assert at_once(attestor).missing == ""  # no older than what a kubelet's list may be
    source.age = timedelta(seconds=7200)
    found = at_once(attestor)
    assert found.selectors
    assert found.missing == (
        "the API server has told nothing of pods for 7200 s: it does not answer"
    )


async def test_sec_35_not_for_longer_than_is_allowed() -> None:
    """SEC-35: a limit on how long pods are believed is kept, to the second."""
    source = SourceOfPods()
    attestor = an_attestor(source=source, stale_limit=timedelta(seconds=60))
    source.problem, source.age = "it does not answer", timedelta(seconds=60)
    assert at_once(attestor).selectors
    source.age = timedelta(seconds=60.001)
    with pytest.raises(AttestationError, match=r"for 60 s, which is too long: it does not"):
        await attestor.attest(PEER)
    source.problem = ""
    assert at_once(attestor).selectors


async def test_what_is_missing_and_stale_says_both() -> None:
    """SEC-35: one reason does not hide another."""
    now = 100.0
    source = SourceOfPods()
    source.problem, source.age = "away", timedelta(seconds=9)
    pods = a_table(POD, namespaces=True, clock=lambda: now)
    attestor = an_attestor(pods=pods, source=source, clock=lambda: now + 6)
    assert at_once(attestor).missing == (
        "namespace shop is not known; the API server has told nothing of pods for 9 s: away"
    )


async def test_a_relabelled_pod_is_another_finding() -> None:
    """SEC-36: who was attested is told, and attested anew has the new labels alone."""
    pods = a_table(POD)
    attestor = an_attestor(pods=pods)
    first = at_once(attestor)
    pods.put(replace(POD, labels={"app": "api"}))
    assert first.changed is not None
    assert first.changed.done()
    labels = {one for one in values(at_once(attestor).selectors) if "pod-label" in one}
    assert labels == {"pod-label:app:api"}
