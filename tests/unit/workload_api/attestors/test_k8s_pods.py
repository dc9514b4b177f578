"""
The table of a node's pods: what it finds, whom it tells, and what it forgets.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import gc
import random
from dataclasses import replace

import pytest

from spiffe_core.selector import Selector
from spiffe_wire.k8s.objects import Meta, Owner, Pod
from spiffe_wire.k8s.selectors import Surroundings, container_selectors, pod_selectors
from tests.support.pods import (
    HASH,
    a_container,
    a_meta,
    a_pod,
    a_table,
    a_uid,
    an_id,
    its_id,
    values,
)
from tests.support.store import some
from workload_api.attestors import pods as module
from workload_api.attestors.pods import KnownContainer, PodError, PodTable

UNKNOWN = an_id(0xFFFF_FFFF)


def found(table: PodTable, pod: Pod, name: str = "app") -> KnownContainer:
    """What the table says of a pod's container; it must be known."""
    known = table.find(its_id(pod, name), pod.uid)
    assert known is not None
    return known


async def test_a_container_has_its_pods_selectors_and_its_own() -> None:
    """A process is known by its pod and by its own container, and not by the one beside."""
    pod = a_pod(1, containers=(a_container("app"), a_container("proxy")))
    known = found(a_table(pod), pod, "proxy")
    assert known.selectors == pod_selectors(pod, Surroundings("demo")) | container_selectors(
        pod.containers[1]
    )
    assert "container-name:app" not in values(known.selectors)
    assert not known.changed.done()


async def test_nothing_is_known_of_a_container_that_nobody_told_of() -> None:
    """What is not in the table is not there, whatever its path says of a pod that is."""
    pod = a_pod(1)
    table = a_table(pod)
    assert table.find(UNKNOWN, a_uid(99)) is None
    assert table.find(UNKNOWN, pod.uid) is None


# Refusals


@pytest.mark.parametrize("other", [a_uid(2), a_uid(77), HASH])
async def test_sec_33_the_cgroup_names_another_pod(other: str) -> None:
    """SEC-33: a container is believed only in the cgroup of its own pod, known or not."""
    pod = a_pod(1)
    table = a_table(pod, a_pod(2))
    with pytest.raises(PodError, match=f"names pod {other}, its container is one of pod shop"):
        table.find(its_id(pod), other)


async def test_sec_33_a_pod_that_is_over_vouches_for_nobody() -> None:
    """SEC-33: a pod that is over has no live container, whatever is left of it."""
    pod = a_pod(1, is_over=True)
    table = a_table(pod)
    with pytest.raises(PodError, match="pod shop/web-1 is over"):
        table.find(its_id(pod), pod.uid)
    with pytest.raises(PodError, match="is over"):
        table.find(UNKNOWN, pod.uid)
    assert table.pod_for(some("k8s:ns:shop")) == ""


async def test_sec_33_a_container_that_has_ended_vouches_for_nobody() -> None:
    """SEC-33: the last run's ID stays in the status, and is no live container's."""
    pod = a_pod(1, containers=(a_container(is_ended=True),))
    with pytest.raises(PodError, match="has ended"):
        a_table(pod).find(its_id(pod), pod.uid)


async def test_sec_33_a_deleted_pod_is_refused_at_once() -> None:
    """SEC-33: what is left of a deleted pod fails with that reason, and waits for nothing."""
    pod = a_pod(1, config_hash=HASH)
    table = a_table(pod)
    table.drop(pod)
    for uid in (pod.uid, HASH):
        with pytest.raises(PodError, match="pod shop/web-1 was deleted"):
            table.find(its_id(pod), uid)
    assert table.pod_for(some("k8s:ns:shop")) == ""
    table.put(pod)  # a list that came late had left it out
    assert found(table, pod).selectors


async def test_sec_33_a_pod_of_the_same_name_is_another() -> None:
    """SEC-33: a pod made anew under the same name is known by its own UID alone."""
    old = a_pod(1)
    new = replace(a_pod(2), name=old.name)
    table = a_table(old)
    table.replace([new])
    with pytest.raises(PodError, match="was deleted"):
        table.find(its_id(old), old.uid)
    with pytest.raises(PodError, match="names pod"):
        table.find(its_id(new), old.uid)
    assert f"pod-uid:{new.uid}" in values(found(table, new).selectors)


async def test_a_debugging_container_gets_nothing() -> None:
    """Who may attach a debugging container to a pod does not get the pod's identities."""
    pod = a_pod(1, ephemeral_ids=frozenset({UNKNOWN}))
    for settings in ({}, {"container_selectors": False}):
        with pytest.raises(PodError, match="debugging container of pod shop/web-1"):
            a_table(pod, **settings).find(UNKNOWN, pod.uid)


async def test_deleted_pods_are_forgotten_in_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SEC-80: only so many deleted pods are remembered, the latest."""
    monkeypatch.setattr(module, "TOMBSTONES", 3)
    pods = [a_pod(number) for number in range(5)]
    table = a_table(*pods)
    table.replace([])
    assert table.find(UNKNOWN, pods[1].uid) is None
    for pod in pods[2:]:
        with pytest.raises(PodError):
            table.find(UNKNOWN, pod.uid)


# Static pods


async def test_a_static_pod_is_known_by_its_files_hash() -> None:
    """A pod of the kubelet's files has one name in its cgroup and another in the list."""
    pod = a_pod(1, config_hash=HASH)
    known = a_table(pod).find(its_id(pod), HASH)
    assert known is not None
    assert f"pod-uid:{pod.uid}" in values(known.selectors)


async def test_two_pods_with_one_hash_are_told_apart_by_their_containers() -> None:
    """Anybody may write another's hash on his pod: it then names no pod by itself."""
    mirror, thief = a_pod(1, config_hash=HASH), a_pod(2, config_hash=HASH)
    table = a_table(mirror, thief, container_selectors=False)
    assert table.find(UNKNOWN, HASH) is None
    assert found(table, mirror).selectors != found(table, thief).selectors
    table.drop(thief)
    known = table.find(UNKNOWN, HASH)
    assert known is not None
    assert "pod-name:web-1" in values(known.selectors)


# Containers that need not be listed


async def test_without_container_selectors_the_pod_is_enough() -> None:
    """With them off, a container that is not listed yet has the selectors of its pod."""
    pod = a_pod(1)
    table = a_table(pod, container_selectors=False)
    known = table.find(UNKNOWN, pod.uid)
    assert known is not None
    assert known.selectors == pod_selectors(pod, Surroundings("demo"))
    assert not [one for one in found(table, pod).selectors if "container-" in one.value]
    assert table.pod_for(some("k8s:ns:shop")) == pod.uid
    assert table.pod_for(some("k8s:container-name:app")) == ""


# Who is told


async def test_who_waits_for_a_pod_is_told_of_each_step() -> None:
    """One future for all who wait for one pod; done whenever there is more to find."""
    pod, other = a_pod(1), a_pod(2)
    waits = replace(pod, containers=(a_container(id=""),))
    table = a_table()
    for is_known, step in [
        (False, lambda: table.put(waits)),
        (True, lambda: table.put(pod)),
        (True, lambda: table.put(replace(pod, ephemeral_ids=frozenset({UNKNOWN})))),
        (None, lambda: table.drop(pod)),
    ]:
        arrived, is_new = table.arrival(pod.uid)
        again, is_new_again = table.arrival(pod.uid)
        assert (is_new, is_new_again, again is arrived) == (True, False, True)
        table.put(replace(other, labels={"step": str(is_known)}))
        assert not arrived.done()
        step()
        assert arrived.done()
        assert not table.awaited
        if is_known is not None:
            assert (table.find(its_id(pod), pod.uid) is not None) is is_known
    with pytest.raises(PodError, match="was deleted"):
        table.find(its_id(pod), pod.uid)


async def test_who_waits_for_a_static_pod_is_told() -> None:
    """A pod of the kubelet's files is waited for by the name that its cgroup has."""
    table = a_table()
    arrived, _ = table.arrival(HASH)
    table.put(a_pod(1, config_hash=HASH))
    assert arrived.done()


async def test_without_container_selectors_the_pod_is_waited_for() -> None:
    """With them off, who waits is told of the pod, whose containers need not be listed."""
    pod = a_pod(1, containers=(a_container(id=""),))
    table = a_table(container_selectors=False)
    arrived, _ = table.arrival(pod.uid)
    table.put(pod)
    assert arrived.done()
    assert table.find(UNKNOWN, pod.uid) is not None


async def test_nothing_is_kept_for_those_who_left() -> None:
    """SEC-80: a pod that nobody waits for any more takes no room."""
    table = a_table()
    waiting = [table.arrival(a_uid(one))[0] for one in range(100)]
    assert table.awaited == 100
    del waiting[1:]
    gc.collect()
    assert table.awaited == 1


async def test_only_so_many_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-80: one over the limit is refused, and one that is waited for already is not."""
    monkeypatch.setattr(module, "MAX_AWAITED", 3)
    table = a_table()
    waiting = [table.arrival(a_uid(one))[0] for one in range(3)]
    with pytest.raises(PodError, match="too many"):
        table.arrival(a_uid(3))
    assert table.arrival(a_uid(0))[0] is waiting[0]


CHANGES = {
    "label": {"labels": {"app": "api"}},
    "no label": {"labels": {}},
    "owner": {"owners": (Owner("Job", "j", "u"),)},
    "account": {"service_account": "api"},
    "container started anew": {"containers": (a_container(),)},
    "container added": {"containers": (a_container("app", an_id(1)), a_container("proxy"))},
    "image": {"containers": (a_container("app", an_id(1), image="registry.example/app:2"),)},
    "container ended": {"containers": (a_container("app", an_id(1), is_ended=True),)},
    "debugging container": {"ephemeral_ids": frozenset({UNKNOWN})},
    "over": {"is_over": True},
}
NO_CHANGES = {
    "nothing": {},
    "host address": {"host_ip": "10.9.9.9"},
    "ending": {"is_ending": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_tells_those_whom_it_concerns(change: dict[str, object]) -> None:
    """SEC-36: a change of what is said of a pod is told at once, to its own processes alone."""
    pod, other = a_pod(1, containers=(a_container("app", an_id(1)),)), a_pod(2)
    table = a_table(pod, other)
    known, spared = found(table, pod), found(table, other)
    heard = []
    table.on_change(lambda: heard.append(known.changed.done()))
    table.put(replace(pod, **change))
    assert known.changed.done()
    assert not spared.changed.done()
    assert heard == [True]


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
async def test_what_changes_nothing_tells_nobody(change: dict[str, object]) -> None:
    """A pod's status changes all the time; who is not concerned is not told."""
    pod = a_pod(1)
    table = a_table(pod)
    known = found(table, pod)
    heard: list[None] = []
    table.on_change(lambda: heard.append(None))
    table.put(replace(pod, **change))
    table.replace([replace(pod, **change)])
    assert not known.changed.done()
    assert found(table, pod).changed is known.changed
    assert not heard


async def test_what_is_learnt_after_a_change_has_a_future_of_its_own() -> None:
    """SEC-36: each look is told of the changes after it."""
    pod = a_pod(1)
    table = a_table(pod)
    first = found(table, pod)
    pod = replace(pod, labels={"app": "api"})
    table.put(pod)
    second = found(table, pod)
    assert (first.changed.done(), second.changed.done()) == (True, False)
    table.drop(pod)
    assert second.changed.done()


async def test_a_list_is_taken_over_whole_before_anybody_is_told() -> None:
    """Who is told of one pod's change finds all the others changed too."""
    old, new = a_pod(1), a_pod(2)
    table = a_table(old)
    seen: list[tuple[int, str, str]] = []
    table.on_change(
        lambda: seen.append(
            (len(table), table.pod_for(some("k8s:pod-name:web-1")), table.pod_for(NAME_2))
        )
    )
    table.replace([new])
    assert seen == [(1, "", new.uid)]


NAME_2 = some("k8s:pod-name:web-2")


# What surrounds a pod


async def test_namespaces_and_accounts() -> None:
    """UIDs of namespace and account, and labels of the namespace where they are asked for."""
    pod = a_pod(1)
    table = a_table(pod, namespaces=True, namespace_labels=True, accounts=True)
    before = found(table, pod)
    assert before.lacking == "namespace shop and service account shop/web"
    table.namespaces.replace([a_meta("shop", team="a"), a_meta("other", team="b")])
    assert before.changed.done()
    table.accounts.put(a_meta("web", "shop", team="c"))
    known = found(table, pod)
    assert known.lacking == ""
    extra = values(known.selectors) - values(before.selectors)
    assert extra == {"ns-uid:uid-of-shop", "sa-uid:uid-of-web", "ns-label:team:a"}


async def test_labels_of_a_namespace_are_ignored_unless_asked_for() -> None:
    """Who may label a namespace chooses nothing unless the operator allowed it."""
    pod = a_pod(1)
    table = a_table(pod, namespaces=True)
    table.namespaces.put(a_meta("shop", team="a"))
    known = found(table, pod)
    assert "ns-label:team:a" not in values(known.selectors)
    table.namespaces.put(a_meta("shop", team="b"))
    assert not known.changed.done()


@pytest.mark.parametrize("kind", ["namespaces", "accounts"])
async def test_what_surrounds_a_pod_is_followed(kind: str) -> None:
    """SEC-36: another namespace or account of the same name is told, and so is its end."""
    pod = a_pod(1)
    table = a_table(pod, namespaces=True, accounts=True)
    sink = getattr(table, kind)
    first = a_meta("shop") if kind == "namespaces" else a_meta("web", "shop")
    other = Meta("another", "else", first.namespace, {})
    sink.replace([first, other])
    known = found(table, pod)
    sink.put(replace(other, uid="changed"))
    sink.drop(other)
    sink.drop(replace(first, uid="of one before it"))
    assert not known.changed.done()
    sink.put(replace(first, uid="anew"))
    assert known.changed.done()
    again = found(table, pod)
    assert "anew" in str(again.selectors)
    sink.drop(replace(first, uid="anew"))
    assert again.changed.done()
    assert found(table, pod).lacking


async def test_a_static_pod_lacks_no_account() -> None:
    """A pod without an account does not wait for one."""
    pod = a_pod(1, service_account="")
    table = a_table(pod, accounts=True)
    assert found(table, pod).lacking == ""
    assert "sa:default" not in values(found(table, pod).selectors)


async def test_since_when_something_lacks() -> None:
    """How long something lacks counts from when the pod came, or from when it was lost."""
    now = 100.0
    pod = a_pod(1)
    table = a_table(pod, namespaces=True, clock=lambda: now)
    now = 200.0
    table.put(replace(pod, labels={}))
    assert found(table, pod).lacks_since == 100.0
    table.namespaces.put(a_meta("shop"))
    now = 300.0
    table.namespaces.drop(a_meta("shop"))
    assert found(table, pod).lacks_since == 300.0


# For whom may be signed


async def test_a_pod_for_an_entry() -> None:
    """A pod of which one container has all that an entry asks of pods."""
    one = a_pod(1, containers=(a_container("app"), a_container("proxy")))
    two = a_pod(2, service_account="api")
    table = a_table(one, two)
    for selectors, wanted in [
        (("k8s:ns:shop", "k8s:sa:web"), one.uid),
        (("k8s:ns:shop", "k8s:sa:api", "unix:uid:1000"), two.uid),
        (("k8s:container-name:proxy",), one.uid),
        (("k8s:container-name:app", "k8s:container-name:proxy"), ""),  # no one has both
        (("k8s:sa:api", "k8s:container-name:proxy"), ""),
        (("k8s:ns:other",), ""),
        (("unix:uid:1000",), ""),
        ((f"k8s:pod-uid:{two.uid}",), two.uid),
        (("k8s:cluster:demo", "k8s:node-name:n1", "k8s:pod-name:web-2"), two.uid),
    ]:
        assert table.pod_for(some(*selectors)) == wanted, selectors


async def test_a_pod_counts_before_its_containers_start() -> None:
    """What will match is signed before the process connects, and what runs comes first."""
    waits = a_pod(1, containers=(a_container("app", id=""),))
    wanted = some("k8s:ns:shop", "k8s:container-name:app")
    table = a_table(waits)
    assert table.pod_for(wanted) == waits.uid
    runs = a_pod(2)
    table.put(runs)
    assert table.pod_for(wanted) == runs.uid
    table.put(replace(runs, is_ending=True))
    assert table.pod_for(wanted) == waits.uid


# Against a model


class Model:
    """What a table should say, worked out anew from everything each time."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}

    def selectors_of(self, pod: Pod, container_id: str) -> "frozenset[Selector] | None":
        if pod.is_over or container_id in pod.ephemeral_ids:
            return None
        container = pod.container_with(container_id)
        if container is None or container.is_ended:
            return None
        return pod_selectors(pod, Surroundings("demo")) | container_selectors(container)

    def all(self) -> "dict[tuple[str, str], frozenset[Selector] | None]":
        return {
            (pod.uid, one): self.selectors_of(pod, one)
            for pod in self.pods.values()
            for container in pod.containers
            for one in sorted(container.ids)
        }

    def said(self, uid: str) -> object:
        """All that is said of one pod; another value is a change."""
        pod = self.pods.get(uid)
        if pod is None:
            return None
        parts = pod_selectors(pod, Surroundings("demo")), pod.ephemeral_ids, pod.is_over
        runs = [(container_selectors(one), one.ids, one.is_ended) for one in pod.containers]
        return (*parts, tuple(runs))


def churned(rng: random.Random, pod: Pod) -> Pod:
    """A pod as it may be next."""
    app, *others = pod.containers
    changes = [
        {},
        {"host_ip": f"10.0.0.{rng.randrange(9)}"},
        {"labels": {"app": rng.choice("abc")}},
        {"containers": (replace(app, ids=frozenset({an_id(rng.getrandbits(200))})), *others)},
        {"containers": (replace(app, is_ended=not app.is_ended), *others)},
        {"containers": (app, a_container("proxy"))},
        {"is_over": rng.random() < 0.3},
        {"is_ending": True},
        {"ephemeral_ids": frozenset({an_id(rng.getrandbits(200))})},
        {"service_account": rng.choice(["web", "api"])},
    ]
    return replace(pod, **rng.choice(changes))


@pytest.mark.parametrize("seed", range(2))
async def test_sec_36_five_hundred_pods_that_change_at_random(seed: int) -> None:
    """SEC-36: the table says what its pods say, and tells those whom a change concerns."""
    rng = random.Random(seed)
    table, model = a_table(), Model()
    # Of fixed UIDs, so that a deleted one comes back.
    for number in range(500):
        pod = a_pod(number)
        model.pods[pod.uid] = pod
    table.replace(model.pods.values())
    for _ in range(40):
        before = {uid: model.said(uid) for uid in model.pods}
        watching = {
            uid: known.changed
            for uid, pod in model.pods.items()
            if (known := safely(table, pod)) is not None
        }
        is_list = rng.random() < 0.3
        for _ in range(rng.randrange(1, 20)):
            uid = a_uid(rng.randrange(510))
            pod = model.pods.get(uid)
            if pod is None:
                pod = a_pod(int(uid[-12:], 16))
            elif rng.random() < 0.1:
                del model.pods[uid]
                if not is_list:
                    table.drop(pod)
                continue
            model.pods[uid] = churned(rng, pod)
            if not is_list:
                table.put(model.pods[uid])
        if is_list:
            table.replace(rng.sample(list(model.pods.values()), len(model.pods)))
        told = {uid for uid, one in watching.items() if one.done()}
        really = {uid for uid in watching if model.said(uid) != before[uid]}
        assert really <= told
        if is_list:  # one by one, a change may have been undone by the next
            assert told == really
        assert len(table) == len(model.pods)
    for (uid, container_id), selectors in model.all().items():
        if selectors is None:
            with pytest.raises(PodError):
                table.find(container_id, uid)
        else:
            known = table.find(container_id, uid)
            assert known is not None
            assert known.selectors == selectors
            own = next(iter(sorted(one for one in selectors if "pod-uid" in one.value)))
            assert table.pod_for(frozenset({own})) == uid
    for pod in list(model.pods.values()):
        table.drop(pod)
    assert not table._by_container
    assert not table._postings
    assert not table._by_hash
    await asyncio.sleep(0)


def safely(table: PodTable, pod: Pod) -> KnownContainer | None:
    """What is known of a pod's first container, unless it is refused."""
    try:
        return table.find(next(iter(pod.containers[0].ids)), pod.uid)
    except PodError:
        return None
