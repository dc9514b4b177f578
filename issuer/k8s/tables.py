"""
Pods, nodes, namespaces and accounts of one cluster, as its API server told us.

For one event loop.  Whoever waits for something to be known is woken when it comes: nothing
is polled.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

from spiffe_wire.k8s.objects import Meta, Pod

Topic: TypeAlias = tuple[str, str, str]
"""Cluster, kind and name of what somebody waits for."""


class Listener:
    """Waits for several topics, each under a number of the listener's own."""

    def __init__(self, arrivals: "Arrivals") -> None:
        self._arrivals = arrivals
        self._numbers: defaultdict[Topic, set[int]] = defaultdict(set)
        self._fired: set[int] = set()
        self._woken = asyncio.Event()

    def add(self, topic: Topic, number: int) -> None:
        """Listen for *topic* too."""
        self._numbers[topic].add(number)
        self._arrivals.add(topic, self)

    def fire(self, topic: Topic) -> None:
        """It has come, or has changed; whoever wants to hear of it again adds it again."""
        self._fired |= self._numbers.pop(topic, set())
        self._woken.set()

    async def fired(self, seconds: float) -> list[int]:
        """Return the numbers whose topics came, at least one; none after *seconds*."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._woken.wait()
        self._woken.clear()
        fired, self._fired = self._fired, set()
        return sorted(fired)

    def close(self) -> None:
        """Listen no more."""
        for topic in self._numbers:
            self._arrivals.discard(topic, self)


class Arrivals:
    """Who waits for what; one for the process."""

    def __init__(self) -> None:
        self._listeners: dict[Topic, set[Listener]] = {}

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """Give a listener while entered."""
        listener = Listener(self)
        try:
            yield listener
        finally:
            listener.close()

    def add(self, topic: Topic, listener: Listener) -> None:
        """See `Listener.add`."""
        self._listeners.setdefault(topic, set()).add(listener)

    def discard(self, topic: Topic, listener: Listener) -> None:
        """See `Listener.close`."""
        listeners = self._listeners.get(topic, set())
        listeners.discard(listener)
        if not listeners:
            self._listeners.pop(topic, None)

    def fire(self, topic: Topic) -> None:
        """Wake who waits for *topic*."""
        for listener in self._listeners.pop(topic, ()):
            listener.fire(topic)

    def fire_all(self, cluster: str) -> None:
        """Wake who waits for anything of *cluster*: all of it was read anew."""
        for topic in [one for one in self._listeners if one[0] == cluster]:
            self.fire(topic)

    def __len__(self) -> int:
        return len(self._listeners)


@dataclass(frozen=True, slots=True)
class KnownPod:
    """A pod, and when what is known of it changed last, on the monotonic clock."""

    pod: Pod
    changed_at: float


class PodTable:
    """Pods by UID and by the name of their node."""

    def __init__(self, cluster: str, arrivals: Arrivals) -> None:
        self._cluster = cluster
        self._arrivals = arrivals
        self._pods: dict[str, KnownPod] = {}
        self._by_node: dict[str, dict[str, Pod]] = {}
        self._by_hash: dict[str, set[str]] = {}

    def get(self, uid: str) -> KnownPod | None:
        """
        Return the pod of that UID, or None.

        A kubelet knows a static pod by another one than the API server; either will do.
        """
        found = self._pods.get(uid)
        if found is None:
            # Anybody may write another's hash on a pod; where two have it, it says nothing.
            others = self._by_hash.get(uid, set())
            found = self._pods[next(iter(others))] if len(others) == 1 else None
        return found

    def on_node(self, name: str) -> Collection[Pod]:
        """Return the pods of the node of that name."""
        return self._by_node.get(name, {}).values()

    def called(self, namespace: str, name: str) -> list[Pod]:
        """
        Return the pods that *name* may mean: the one of that name, or all that begin so.

        Looks through every pod: for people, who ask now and then.
        """
        inside = [one.pod for one in self._pods.values() if one.pod.namespace == namespace]
        exact = [one for one in inside if one.name == name]
        return exact or sorted(
            (one for one in inside if one.name.startswith(name)), key=lambda pod: pod.name
        )

    def __len__(self) -> int:
        return len(self._pods)

    def replace(self, objects: Iterable[Pod]) -> None:
        """See `Sink`; of a pod that is as it was, nothing has changed."""
        found = {one.uid: one for one in objects}
        for known in list(self._pods.values()):
            if known.pod.uid not in found:
                self._forget(known.pod)
        for pod in found.values():
            self._take(pod)
        self._arrivals.fire_all(self._cluster)

    def put(self, found: Pod) -> None:
        """See `Sink`."""
        if self._take(found):
            self._fire(found)

    def drop(self, found: Pod) -> None:
        """See `Sink`."""
        known = self._pods.get(found.uid)
        if known is not None:
            self._forget(known.pod)
            self._fire(known.pod)

    def _take(self, pod: Pod) -> bool:
        before = self._pods.get(pod.uid)
        if before is not None:
            if before.pod == pod:
                return False
            self._forget(before.pod)
        self._pods[pod.uid] = KnownPod(pod, time.monotonic())
        if pod.node_name:
            self._by_node.setdefault(pod.node_name, {})[pod.uid] = pod
        if pod.config_hash:
            self._by_hash.setdefault(pod.config_hash, set()).add(pod.uid)
        return True

    def _forget(self, pod: Pod) -> None:
        del self._pods[pod.uid]
        there = self._by_node.get(pod.node_name, {})
        there.pop(pod.uid, None)
        if not there:
            self._by_node.pop(pod.node_name, None)
        others = self._by_hash.get(pod.config_hash, set())
        others.discard(pod.uid)
        if not others:
            self._by_hash.pop(pod.config_hash, None)

    def _fire(self, pod: Pod) -> None:
        for uid in pod.cgroup_uids:
            self._arrivals.fire(pod_topic(self._cluster, uid))
        self._arrivals.fire(pods_topic(self._cluster, pod.node_name))


class MetaTable:
    """Nodes, namespaces or accounts: by UID, and by name and namespace."""

    def __init__(self, cluster: str, arrivals: Arrivals) -> None:
        self._cluster = cluster
        self._arrivals = arrivals
        self._by_uid: dict[str, Meta] = {}
        self._by_name: dict[tuple[str, str], Meta] = {}

    def get(self, uid: str) -> Meta | None:
        """Return the object of that UID, or None."""
        return self._by_uid.get(uid)

    def named(self, name: str, namespace: str = "") -> Meta | None:
        """Return the object of that name, or None."""
        return self._by_name.get((namespace, name))

    def replace(self, objects: Iterable[Meta]) -> None:
        """See `Sink`."""
        found = list(objects)
        self._by_uid = {one.uid: one for one in found}
        self._by_name = {(one.namespace, one.name): one for one in found}
        self._arrivals.fire_all(self._cluster)

    def put(self, found: Meta) -> None:
        """See `Sink`; another object of the same name takes the place of the first."""
        before = self._by_name.get((found.namespace, found.name))
        if before is not None and before.uid != found.uid:
            self._by_uid.pop(before.uid, None)
        self._by_uid[found.uid] = found
        self._by_name[found.namespace, found.name] = found
        self._arrivals.fire(meta_topic(self._cluster, found.uid))

    def drop(self, found: Meta) -> None:
        """See `Sink`."""
        self._by_uid.pop(found.uid, None)
        before = self._by_name.get((found.namespace, found.name))
        if before is not None and before.uid == found.uid:
            del self._by_name[found.namespace, found.name]


def pod_topic(cluster: str, uid: str) -> Topic:
    """The pod of that UID."""
    return cluster, "pod", uid


def pods_topic(cluster: str, node_name: str) -> Topic:
    """Any pod of the node of that name."""
    return cluster, "pods", node_name


def meta_topic(cluster: str, uid: str) -> Topic:
    """The node, namespace or account of that UID."""
    return cluster, "meta", uid


def sync_topic(cluster: str) -> Topic:
    """The first list of anything."""
    return cluster, "sync", ""
