"""A table that stays in step with an API server, whatever happens to either."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.backoff import Backoff
from spiffe_wire.k8s import watch as module
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import access_of
from spiffe_wire.k8s.objects import Pod, pod_of
from spiffe_wire.k8s.rbac import AGENT_RULES
from spiffe_wire.k8s.watch import Kind, Watch
from tests.support.k8s.cluster import FakeCluster
from tests.support.k8s.resources import CLUSTER_ROLE_BINDINGS as BINDINGS
from tests.support.k8s.resources import PODS as PODS_RESOURCE
from tests.support.placed import AGENT, rules_of

PODS = "/api/v1/pods"


@dataclass
class Table:
    """A sink that keeps what it is told, and can be told to fail."""

    pods: dict[str, Pod] = field(default_factory=dict)
    replaced: int = 0
    error: Exception | None = None

    def replace(self, objects: Iterable[Pod]) -> None:
        self.pods = {one.uid: one for one in objects}
        self.replaced += 1

    def put(self, found: Pod) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.pods[found.uid] = found

    def drop(self, found: Pod) -> None:
        self.pods.pop(found.uid, None)


@dataclass
class Watched:
    """A cluster, and a table of the pods of its node n1."""

    cluster: FakeCluster
    table: Table
    watch: Watch[Pod]
    client: Client

    @property
    def real(self) -> dict[str, Pod]:
        """What a fresh list of the node would be."""
        bodies = self.cluster.api.store.objects(PODS_RESOURCE)
        found = [pod_of(one) for one in bodies if one["spec"].get("nodeName") == "n1"]
        return {one.uid: one for one in found}

    async def right(self, within: float = 8) -> None:
        """Return once the table says what the cluster has, and says that it is in step."""
        async with asyncio.timeout(within):
            while self.table.pods != self.real or self.watch.problem:
                await asyncio.sleep(0.003)

    async def until(self, ready: Callable[[], Any], within: float = 8) -> None:
        """Return once it is so."""
        async with asyncio.timeout(within):
            while not ready():
                await asyncio.sleep(0.003)

    def lists(self) -> int:
        """How often pods were listed."""
        return self.cluster.calls.count(verb="list", plural="pods")


@asynccontextmanager
async def watched(folder: Path, pods: int = 3) -> AsyncIterator[Watched]:
    """A table in step, of a cluster with some pods here and one elsewhere."""
    async with FakeCluster() as cluster:
        cluster.grant(AGENT, *rules_of(AGENT_RULES))
        for number in range(pods):
            cluster.pod(f"web-{number}")
        cluster.pod("elsewhere", node="n2")
        token = cluster.account_token("spiffe", "spiffe-agent")
        client = Client(
            access_of(cluster.kubeconfig(folder, token=token), "", {}),
            timeout=timedelta(seconds=0.4),
        )
        table = Table()
        watch = Watch(client, Kind(PODS, pod_of, "spec.nodeName=n1"), table, cluster="demo")
        made = Watched(cluster, table, watch, client)
        running = asyncio.create_task(watch.run())
        try:
            yield made
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await client.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can wait out."""
    monkeypatch.setattr(module, "FIRST_PAUSE", timedelta(seconds=0.02))
    monkeypatch.setattr(module, "LONGEST_PAUSE", timedelta(seconds=0.1))


async def test_a_table_in_step(tmp_path: Path) -> None:
    """Listed once, and from there by events: what comes, changes, leaves and is deleted."""
    async with watched(tmp_path) as made:
        await made.right()
        assert made.watch.synced.is_set()
        assert (len(made.table.pods), made.table.replaced) == (3, 1)
        assert made.watch.away == timedelta(0)
        pod = made.cluster.pod("new", labels={"a": "1"})
        await made.right()
        made.cluster.relabel(pod, {"a": "2"})
        await made.right()
        assert made.table.pods[pod.uid].labels == {"a": "2"}
        made.cluster.delete_pod(pod)
        await made.right()
        waits = made.cluster.pod("waits", node="")
        made.cluster.schedule(waits, "n1")
        await made.right()
        assert waits.uid in made.table.pods
        assert (made.table.replaced, made.lists()) == (1, 1)


async def test_a_long_list_comes_in_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is read page by page, and taken over as one."""
    monkeypatch.setattr(module, "PAGE", 2)
    monkeypatch.setattr(module, "AT_A_STRETCH", 1)
    async with watched(tmp_path, pods=7) as made:
        await made.right()
        assert (made.table.replaced, made.lists()) == (1, 4)


async def test_a_page_that_is_asked_for_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that was given up by the server in its middle is begun anew."""
    monkeypatch.setattr(module, "PAGE", 2)
    async with watched(tmp_path, pods=3) as made:
        made.cluster.faults.delay(0.15, verb="list")
        await made.until(lambda: made.lists() == 1)
        made.cluster.compact()
        await made.right()
        assert [one.status for one in made.cluster.calls.of(verb="list")] == [
            200,
            410,
            200,
            200,
        ]
        assert made.table.replaced == 1


def forgotten(made: Watched) -> None:
    """Watches are cut, and what happened since is no longer kept: a deletion among it."""
    made.cluster.faults.fail(503, times=2, verb="watch")
    made.cluster.cut_watches()
    made.cluster.delete_pod(made.cluster.pod("short-lived"))
    made.cluster.compact()


DISTURBANCES: dict[str, Callable[[Watched], Any]] = {
    "cut": lambda made: made.cluster.cut_watches(),
    "ended": lambda made: made.cluster.cut_watches(broken=False),
    "expired within": lambda made: made.cluster.expire_watches(),
    "expired since": forgotten,
    "garbage": lambda made: made.cluster.write_on_watches(b"\x00nonsense\n"),
    "half an event": lambda made: (
        made.cluster.write_on_watches(b'{"type":"MODIFIED","object":{"meta'),
        made.cluster.cut_watches(broken=False),
    ),
    "an event without object": lambda made: made.cluster.write_on_watches(
        b'{"type":"MODIFIED"}\n'
    ),
    "metadata that is none": lambda made: made.cluster.write_on_watches(
        b'{"type":"MODIFIED","object":{"metadata":[1]}}\n'
    ),
    "an error": lambda made: made.cluster.write_on_watches(
        b'{"type":"ERROR","object":{"kind":"Status","code":500}}\n'
    ),
    "an error that says nothing": lambda made: made.cluster.write_on_watches(
        b'{"type":"ERROR","object":"x"}\n'
    ),
    "500": lambda made: (made.cluster.faults.fail(500, times=2), made.cluster.cut_watches()),
    "429": lambda made: (made.cluster.faults.fail(429, times=2), made.cluster.cut_watches()),
    "hang": lambda made: (made.cluster.faults.hang(times=1), made.cluster.cut_watches()),
    "slow": lambda made: (
        made.cluster.faults.delay(0.2, times=2),
        made.cluster.cut_watches(),
    ),
    "reset": lambda made: (made.cluster.faults.reset(times=2), made.cluster.cut_watches()),
    "truncated": lambda made: (
        made.cluster.faults.truncate(times=2),
        made.cluster.cut_watches(),
    ),
    "a list of garbage": lambda made: (
        made.cluster.faults.garbage(times=2, verb="list"),
        made.cluster.expire_watches(),
    ),
    "a list that is none": lambda made: (
        made.cluster.faults.garbage(times=1, verb="list", body=b'{"items":{"a":1}}'),
        made.cluster.expire_watches(),
    ),
    "a list without a version": lambda made: (
        made.cluster.faults.garbage(times=1, verb="list", body=b'{"items":null,"metadata":{}}'),
        made.cluster.expire_watches(),
    ),
    "a sink that fails": lambda made: (
        setattr(made.table, "error", ZeroDivisionError("ours")),
        made.cluster.pod("unlucky"),
    ),
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
async def test_sec_107_after_a_disturbance_the_table_is_right(
    tmp_path: Path, disturb: Callable[[Watched], Any]
) -> None:
    """SEC-107: whatever breaks, the table is as a fresh list is, and no event was missed."""
    async with watched(tmp_path) as made:
        await made.right()
        before = list(made.table.pods)
        disturb(made)
        made.cluster.pod("came-meanwhile")
        made.cluster.delete("pods", "web-0", "shop")
        await made.right()
        assert set(made.table.pods) != set(before)
        made.cluster.pod("after")
        await made.right()


async def test_a_disturbance_of_hours_is_no_new_list(tmp_path: Path) -> None:
    """A bookmark moves a quiet watch on, so that it can go on where older changes are gone."""
    async with watched(tmp_path) as made:
        await made.right()
        for number in range(5):
            made.cluster.pod(f"elsewhere-{number}", node="n2")
        made.cluster.bookmark()
        await made.until(lambda: made.watch._version == str(made.cluster.store.version))
        made.cluster.store.compact()
        made.cluster.cut_watches()
        await made.until(lambda: made.cluster.watching == 0 or made.watch.problem)
        made.cluster.pod("after")
        await made.right()
        assert made.lists() == 1


async def test_sec_35_a_server_that_hangs_is_noticed_by_its_bookmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-35: one that told of nothing for long, and used to say so, is asked anew."""
    monkeypatch.setattr(module, "BOOKMARKED_SILENCE", timedelta(seconds=0.2))
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.silence()
        made.cluster.pod("unseen")
        await asyncio.sleep(0.3)
        assert len(made.table.pods) == 3  # it never sent any, so that it may just be quiet
        assert made.cluster.calls.count(verb="watch") == 1
        made.cluster.bookmark()
        await made.until(lambda: made.cluster.calls.count(verb="watch") == 2)
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.bookmark()
        await made.until(lambda: made.watch._version == str(made.cluster.store.version))
        made.cluster.silence()
        made.cluster.pod("unseen")
        await made.right()
        assert made.lists() == 1


async def test_a_server_started_anew_may_send_no_bookmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one connection brought is not expected of the next: the server may be another."""
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.bookmark()
        await made.until(lambda: made.watch._version == str(made.cluster.store.version))
        monkeypatch.setattr(module, "BOOKMARKED_SILENCE", timedelta(seconds=0.1))
        made.cluster.cut_watches()
        await made.until(lambda: made.cluster.calls.count(verb="watch") == 2)
        await asyncio.sleep(0.3)
        assert made.cluster.calls.count(verb="watch") == 2 and not made.watch.problem


async def test_rbac_withdrawn_and_given_back(tmp_path: Path) -> None:
    """Who may no longer ask keeps what is known, says why, and goes on when he may again."""
    async with watched(tmp_path) as made:
        await made.right()
        (binding,) = [
            one["metadata"]["name"]
            for one in made.cluster.api.store.objects(BINDINGS)
            if one["metadata"]["name"].startswith("grant-")
        ]
        made.cluster.delete("clusterrolebindings", binding)
        made.cluster.cut_watches()
        await made.until(lambda: "grant it by RBAC" in made.watch.problem)
        assert len(made.table.pods) == 3
        made.cluster.pod("meanwhile")
        made.cluster.grant(AGENT, *rules_of(AGENT_RULES))
        await made.right()
        assert len(made.table.pods) == 4


async def test_another_ca(tmp_path: Path) -> None:
    """SEC-34: a server that shows another CA's certificate is told nothing and not believed."""
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.present("wrong-ca")
        made.cluster.cut_watches()
        await made.until(lambda: "is not who it should be" in made.watch.problem)
        assert len(made.table.pods) == 3
        made.cluster.present("right")
        made.cluster.pod("meanwhile")
        await made.right()


async def test_what_cannot_be_read_keeps_nobody_else_out(tmp_path: Path) -> None:
    """What is no object is skipped, and the others are there."""
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.write_on_watches(
            b'{"type":"ADDED","object":{"metadata":{"name":"no-uid","namespace":"a"}}}\n'
        )
        made.cluster.pod("after")
        await made.right()
        assert made.lists() == 1


async def test_away_is_counted(tmp_path: Path) -> None:
    """How long the table is out of step is known, and why; before the first list too."""
    async with watched(tmp_path) as made:
        assert made.watch.problem == "not asked yet"
        await made.right()
        await made.cluster.stop()
        await made.until(lambda: made.watch.problem)
        first = made.watch.away
        await made.until(lambda: made.watch.away > first + timedelta(seconds=0.05))
        assert "cannot be reached" in made.watch.problem
        await made.cluster.start()
        await made.right()
        assert made.watch.away == timedelta(0)


async def test_sec_107_a_server_that_ends_watches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-107: it is asked again no sooner than one that fails."""
    monkeypatch.setattr(module, "FIRST_PAUSE", timedelta(seconds=0.1))
    monkeypatch.setattr(module, "LONGEST_PAUSE", timedelta(seconds=5))
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.faults.garbage(body=b"", verb="watch")
        made.cluster.cut_watches()
        await asyncio.sleep(0.6)
        assert made.cluster.calls.count(verb="watch") < 15


@pytest.mark.parametrize("is_old", [True, False], ids=["old", "just-listed"])
async def test_sec_107_a_place_that_is_gone_is_left_at_once_but_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_old: bool
) -> None:
    """
    SEC-107: an API server that comes back without its past is listed anew without the long
    pause that its absence has led to; one that never keeps what it has just listed is not.
    """

    class Most(random.Random):
        """The longest pause that there can be."""

        def random(self) -> float:
            return 0.999

    pause = timedelta(0) if is_old else timedelta(minutes=1)
    async with watched(tmp_path) as made:
        await made.right()
        monkeypatch.setattr(module, "LONGEST_PAUSE", pause)
        made.watch._backoff = Backoff(timedelta(seconds=0.02), timedelta(minutes=1), Most())
        for _ in range(12):
            made.watch._backoff.next()
        made.cluster.expire_watches()
        await made.until(lambda: made.watch.problem)
        if is_old:
            await made.until(lambda: made.lists() == 2)
            await made.right()
        else:
            await asyncio.sleep(0.3)
            assert made.lists() == 1


async def test_sec_107_who_waits_shortens_a_long_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-107: a server that was given up for long is asked soon when somebody waits."""
    monkeypatch.setattr(module, "LONGEST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(module, "FIRST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(module, "HURRIED_PAUSE", timedelta(seconds=0.01))
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.cut_watches()
        await made.until(lambda: made.watch.problem)
        made.cluster.faults.fail(503, times=3)  # and again, for as long as somebody waits
        made.cluster.pod("awaited")
        made.watch.hurry()
        await made.right()


async def test_sec_107_nobody_is_in_a_hurry_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-107: once those who waited have given up, pauses are as long as before."""
    monkeypatch.setattr(module, "LONGEST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(module, "FIRST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(module, "HURRIED_PAUSE", timedelta(seconds=0.01))
    monkeypatch.setattr(module, "HURRIED_FOR", timedelta(seconds=0.1))
    async with watched(tmp_path) as made:
        await made.right()
        made.cluster.faults.fail(503)
        made.cluster.cut_watches()
        await made.until(lambda: made.watch.problem)
        before = len(made.cluster.calls.made)
        made.watch.hurry()
        await asyncio.sleep(0.4)
        asked = len(made.cluster.calls.made)
        assert asked > before
        await asyncio.sleep(0.1)
        assert len(made.cluster.calls.made) == asked
