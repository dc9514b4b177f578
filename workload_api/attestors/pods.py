"""
The pods of this node, as their source tells of them, ready to be asked without waiting.

Source: SEC-33, SEC-35; architecture A4, A5.  By container for whoever connects, by selector for
whoever signs ahead.  What is learnt of a pod carries a future that is done when it is so no
longer, and only then: a heartbeat in a pod's status wakes nobody.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

from spiffe_core.selector import Selector, SelectorSet
from spiffe_wire.k8s.objects import Container, Meta, Pod
from spiffe_wire.k8s.selectors import TYPE, Surroundings, container_selectors, pod_selectors
from workload_api.attestors.protocol import AttestationError

TOMBSTONES: Final = 1024
"""Deleted pods that are remembered, so that what is left of one fails at once, with reason."""
MAX_AWAITED: Final = 4096
"""Pods that somebody waits for; as many as there may be connections."""
_Key: TypeAlias = tuple[str, str]


class PodError(AttestationError):
    """The process is in a container for which its pod does not vouch; says why."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One container, as far as it matters to whoever is in it."""

    selectors: SelectorSet
    ids: frozenset[str]
    is_ended: bool
    is_started: bool


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is said of a pod; another value is a change of it."""

    common: SelectorSet
    runs: tuple[_Run, ...]
    ephemeral_ids: frozenset[str]
    is_over: bool
    lacking: str

    def all_selectors(self) -> Iterator[Selector]:
        yield from self.common
        for run in self.runs:
            yield from run.selectors


@dataclass(eq=False, slots=True)
class _Tracked:
    """A pod as the table has it now."""

    pod: Pod
    facts: _Facts
    lacks_since: float
    changed: "asyncio.Future[None] | None" = None

    @property
    def name(self) -> str:
        return f"{self.pod.namespace}/{self.pod.name}"


@dataclass(frozen=True, slots=True)
class KnownContainer:
    """What is known of a container: enough to attest whoever is in it."""

    selectors: SelectorSet
    changed: "asyncio.Future[None]"
    """Done when this may be true no longer."""
    lacking: str = ""
    """What is not known of its pod's surroundings, for a person; empty when nothing is."""
    lacks_since: float = 0.0
    """Since when, on the table's clock."""


class PodTable:
    """
    For one event loop, not for threads; a sink of `spiffe_wire.k8s.watch`.

    *surroundings*: sinks `namespaces` and `accounts` are fed too, and a pod of which one is
    missing lacks something.
    """

    def __init__(
        self,
        *,
        cluster: str = "",
        container_selectors: bool = True,
        namespaces: bool = False,
        namespace_labels: bool = False,
        accounts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.namespaces = Beside(self._renamed, keep_labels=namespace_labels)
        self.accounts = Beside(self._renamed)
        self._cluster = cluster
        self._with_containers = container_selectors
        self._wants_namespaces = namespaces or namespace_labels
        self._wants_accounts = accounts
        self._namespace_labels = namespace_labels
        self._clock = clock
        self._pods: dict[str, _Tracked] = {}
        self._by_container: dict[str, _Tracked] = {}
        self._by_hash: dict[str, dict[str, _Tracked]] = {}
        self._postings: dict[Selector, dict[str, _Tracked]] = {}
        self._tombstones: OrderedDict[str, str] = OrderedDict()
        # Nobody's when nobody waits: a future lives for as long as whoever was given it.
        self._awaited: WeakValueDictionary[str, asyncio.Future[None]] = WeakValueDictionary()
        self._listeners: list[Callable[[], None]] = []
        self._news: list[asyncio.Future[None]] = []

    # --- asked -------------------------------------------------------------------------------

    def find(self, container_id: str, pod_uid: str) -> KnownContainer | None:
        """
        Return what is known of the container that the kernel calls by these two names.

        None: nothing yet; `arrival` tells when there is.

        Raises:
            PodError: it is known, and is not to be vouched for.
        """
        tracked = self._by_container.get(container_id)
        if tracked is None:
            tracked = self._pod_called(pod_uid)
            if tracked is None and pod_uid in self._tombstones:
                raise PodError(f"pod {self._tombstones[pod_uid]} was deleted")
            if tracked is None or (self._with_containers and not tracked.facts.is_over):
                return None
        elif pod_uid not in tracked.pod.cgroup_uids:
            # The path is the kernel's word and the list is the kubelet's: one of them lies.
            raise PodError(
                f"the process's cgroup names pod {pod_uid}, its container is one of pod "
                f"{tracked.name} ({tracked.pod.uid})"
            )
        return self._known(tracked, container_id)

    def arrival(self, pod_uid: str) -> "tuple[asyncio.Future[None], bool]":
        """
        Return a future that is done once `find` may say more of a pod's containers, and
        whether it is new.  That the pod was deleted is more, too.

        Raises:
            PodError: too many are waited for.
        """
        found = self._awaited.get(pod_uid)
        if found is not None:
            return found, False
        if len(self._awaited) >= MAX_AWAITED:
            raise PodError("too many pods are waited for; try again")
        found = asyncio.get_running_loop().create_future()
        self._awaited[pod_uid] = found
        return found, True

    def pod_for(self, entry_selectors: SelectorSet) -> str:
        """
        Return the UID of a pod here for which an entry with these selectors may be signed.

        That is one that is not over and of which one container, started or not, has all those
        of type ``k8s``; empty when there is none.  One that runs comes first.
        """
        wanted = frozenset(one for one in entry_selectors if one.type == TYPE)
        if not wanted:
            return ""
        postings = [self._postings.get(one, {}) for one in wanted]
        best, rank = "", (True, True)
        for uid, tracked in min(postings, key=len).items():
            facts = tracked.facts
            if facts.is_over:
                continue
            left = wanted - facts.common
            runs = [one for one in facts.runs if left <= one.selectors] if left else facts.runs
            if left and not runs:
                continue
            here = (tracked.pod.is_ending, not any(one.is_started for one in runs))
            if not best or here < rank:
                best, rank = uid, here
            if rank == (False, False):
                break
        return best

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have *listener* called after every change of what `find` or `pod_for` say."""
        self._listeners.append(listener)

    def __len__(self) -> int:
        return len(self._pods)

    @property
    def awaited(self) -> int:
        """Of how many pods somebody waits to hear."""
        return len(self._awaited)

    # --- told --------------------------------------------------------------------------------

    def replace(self, objects: Iterable[Pod]) -> None:
        """See `spiffe_wire.k8s.watch.Sink`."""
        found = {pod.uid: pod for pod in objects}
        for uid in [one for one in self._pods if one not in found]:
            self._drop(uid)
        for pod in found.values():
            self._put(pod)
        self._tell()

    def put(self, found: Pod) -> None:
        """See `Sink`."""
        self._put(found)
        self._tell()

    def drop(self, found: Pod) -> None:
        """See `Sink`."""
        self._drop(found.uid)
        self._tell()

    def _put(self, pod: Pod) -> None:
        tracked = self._pods.get(pod.uid)
        if tracked is not None and tracked.pod == pod:
            return
        facts = self._facts_of(pod)
        if tracked is None:
            tracked = _Tracked(pod, _NOTHING, self._clock())
            self._pods[pod.uid] = tracked
        if pod.config_hash != tracked.pod.config_hash or tracked.facts is _NOTHING:
            self._by_hash.get(tracked.pod.config_hash, {}).pop(pod.uid, None)
            if pod.config_hash:
                self._by_hash.setdefault(pod.config_hash, {})[pod.uid] = tracked
        for uid in pod.cgroup_uids:
            self._tombstones.pop(uid, None)
        tracked.pod = pod
        self._update(tracked, facts)

    def _drop(self, uid: str) -> None:
        tracked = self._pods.pop(uid, None)
        if tracked is None:
            return
        pod = tracked.pod
        self._update(tracked, _NOTHING)
        others = self._by_hash.get(pod.config_hash, {})
        others.pop(uid, None)
        if not others:
            self._by_hash.pop(pod.config_hash, None)
        gone = {uid} if others else pod.cgroup_uids
        for one in gone:
            self._tombstones[one] = tracked.name
        while len(self._tombstones) > TOMBSTONES:
            self._tombstones.popitem(last=False)

    def _renamed(self, key: _Key | None) -> None:
        """A namespace or an account is another; which one, or any."""
        for tracked in self._pods.values():
            pod = tracked.pod
            if key in (None, ("", pod.namespace), (pod.namespace, pod.service_account)):
                self._update(tracked, self._facts_of(pod))
        self._tell()

    def _update(self, tracked: _Tracked, facts: _Facts) -> None:
        before, tracked.facts = tracked.facts, facts
        if before == facts:
            return
        if before.lacking != facts.lacking:
            tracked.lacks_since = self._clock()
        self._file(tracked, before, facts)
        was, now = _ids_of(before), _ids_of(facts)
        for container_id in was - now:
            if self._by_container.get(container_id) is tracked:
                del self._by_container[container_id]
        for container_id in now - was:
            self._by_container[container_id] = tracked
        for uid in tracked.pod.cgroup_uids:
            waiting = self._awaited.pop(uid, None)
            if waiting is not None:
                self._news.append(waiting)
        if tracked.changed is not None:
            self._news.append(tracked.changed)
            tracked.changed = None
        self._changed = True

    def _file(self, tracked: _Tracked, before: _Facts, facts: _Facts) -> None:
        uid = tracked.pod.uid
        was, now = set(before.all_selectors()), set(facts.all_selectors())
        for selector in was - now:
            posting = self._postings[selector]
            del posting[uid]
            if not posting:
                del self._postings[selector]
        for selector in now - was:
            self._postings.setdefault(selector, {})[uid] = tracked

    def _tell(self) -> None:
        """Everything is as it now is: only then is anybody told."""
        if not self._changed:
            return
        self._changed = False
        news, self._news = self._news, []
        for one in news:
            if not one.done():
                one.set_result(None)
        for listener in self._listeners:
            listener()

    _changed = False

    # --- thought -----------------------------------------------------------------------------

    def _pod_called(self, pod_uid: str) -> _Tracked | None:
        found = self._pods.get(pod_uid)
        if found is not None:
            return found
        # Anybody may write another's hash on his own pod; where two have it, it says nothing.
        others = self._by_hash.get(pod_uid, {})
        return next(iter(others.values())) if len(others) == 1 else None

    def _known(self, tracked: _Tracked, container_id: str) -> KnownContainer:
        facts = tracked.facts
        if facts.is_over:
            raise PodError(f"pod {tracked.name} is over")
        if container_id in facts.ephemeral_ids:
            raise PodError(
                f"the process is in a debugging container of pod {tracked.name}, "
                "which has none of the pod's identities"
            )
        run = next((one for one in facts.runs if container_id in one.ids), None)
        if run is not None and run.is_ended:
            raise PodError(f"the process's container in pod {tracked.name} has ended")
        if tracked.changed is None:
            tracked.changed = asyncio.get_running_loop().create_future()
        selectors = facts.common if run is None else facts.common | run.selectors
        return KnownContainer(selectors, tracked.changed, facts.lacking, tracked.lacks_since)

    def _facts_of(self, pod: Pod) -> _Facts:
        namespace = self.namespaces.get("", pod.namespace)
        account = self.accounts.get(pod.namespace, pod.service_account)
        around = Surroundings(self._cluster, namespace, account, self._namespace_labels)
        missing = []
        if self._wants_namespaces and namespace is None:
            missing.append(f"namespace {pod.namespace}")
        if self._wants_accounts and account is None and pod.service_account:
            missing.append(f"service account {pod.namespace}/{pod.service_account}")
        return _Facts(
            pod_selectors(pod, around),
            tuple(self._run_of(one) for one in pod.containers),
            pod.ephemeral_ids,
            pod.is_over,
            f"{' and '.join(missing)}" if missing else "",
        )

    def _run_of(self, container: Container) -> _Run:
        return _Run(
            container_selectors(container) if self._with_containers else frozenset(),
            container.ids,
            container.is_ended,
            bool(container.ids) and not container.is_ended,
        )


_NOTHING: Final = _Facts(frozenset(), (), frozenset(), is_over=True, lacking="")


def _ids_of(facts: _Facts) -> frozenset[str]:
    return facts.ephemeral_ids.union(*(run.ids for run in facts.runs))


@dataclass(slots=True)
class Beside:
    """Namespaces, or service accounts, by name; a sink of `spiffe_wire.k8s.watch`."""

    changed: Callable[[_Key | None], None]
    keep_labels: bool = False
    _found: dict[_Key, Meta] = field(default_factory=dict)

    def get(self, namespace: str, name: str) -> Meta | None:
        """Return one, or None."""
        return self._found.get((namespace, name))

    def replace(self, objects: Iterable[Meta]) -> None:
        """See `Sink`."""
        self._found = {_key(one): self._trimmed(one) for one in objects}
        self.changed(None)

    def put(self, found: Meta) -> None:
        """See `Sink`."""
        kept = self._trimmed(found)
        if self._found.get(_key(found)) != kept:
            self._found[_key(found)] = kept
            self.changed(_key(found))

    def drop(self, found: Meta) -> None:
        """See `Sink`."""
        before = self._found.get(_key(found))
        if before is not None and before.uid == found.uid:
            del self._found[_key(found)]
            self.changed(_key(found))

    def _trimmed(self, found: Meta) -> Meta:
        """Without what nobody asks for: a cluster may have ten thousand accounts."""
        if self.keep_labels or not found.labels:
            return found
        return Meta(found.uid, found.name, found.namespace, _NO_LABELS)


_NO_LABELS: Final[Mapping[str, str]] = {}


def _key(found: Meta) -> _Key:
    return found.namespace, found.name
