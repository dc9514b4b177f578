"""How an API server is asked, and what its answers and failures mean."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.k8s import client as module
from spiffe_wire.k8s.client import Client, ClusterError, GoneError, MissingError
from spiffe_wire.k8s.credentials import access_of, in_cluster
from tests.support.k8s.cluster import FakeCluster
from tests.support.k8s.files import project

PODS = "/api/v1/pods"
SOON = timedelta(seconds=0.3)


@asynccontextmanager
async def a_client(
    cluster: FakeCluster, folder: Path, *, timeout: timedelta = SOON, **config: Any
) -> AsyncIterator[Client]:
    """A client of *cluster*, an administrator's unless *config* says otherwise."""
    client = Client(access_of(cluster.kubeconfig(folder, **config), "", {}), timeout=timeout)
    try:
        yield client
    finally:
        await client.close()


async def test_the_verbs(tmp_path: Path) -> None:
    """One object, a list by selector, metadata alone, and something that is created."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        pod = cluster.pod()
        cluster.pod("web-2", node="n2")
        found = await client.get("/api/v1/namespaces/shop/pods/web-1")
        assert found["metadata"]["uid"] == pod.uid
        page = await client.page(PODS, {"fieldSelector": "spec.nodeName=n1"})
        assert [one["metadata"]["name"] for one in page["items"]] == ["web-1"]
        page = await client.page(PODS, metadata_only=True)
        assert page["kind"] == "PartialObjectMetadataList"
        assert "spec" not in page["items"][0]
        review = await client.post(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            {"spec": {"token": cluster.account_token("shop", "web")}},
        )
        assert review["status"]["authenticated"]


async def test_a_path_before_every_other(tmp_path: Path) -> None:
    """An API server behind a gateway has a path of its own, which is kept."""
    async with FakeCluster() as cluster:
        config = {"server": f"{cluster.url}/api"}
        async with a_client(cluster, tmp_path, **config) as client:
            assert (await client.page("/v1/namespaces"))["items"]


async def test_one_connection_serves_many_requests(tmp_path: Path) -> None:
    """Connections are kept, and all are ended when the client is."""
    async with FakeCluster() as cluster:
        async with a_client(cluster, tmp_path) as client:
            for _ in range(5):
                await client.page(PODS)
            assert client._pool is not None
            assert len(client._pool.connections) == 1
        assert client._pool is None


# Refusals


async def test_rbac(tmp_path: Path) -> None:
    """Who may not is told the server's own words, and what to do."""
    async with FakeCluster() as cluster:
        token = cluster.account_token("shop", "weak")
        async with a_client(cluster, tmp_path, token=token) as client:
            with pytest.raises(
                ClusterError, match=r"pods is forbidden.*grant it by RBAC"
            ) as no:
                await client.page(PODS)
    assert no.value.status == 403


async def test_sec_34_nobody_is_not_let_in(tmp_path: Path) -> None:
    """SEC-34: a token that is not good is refused, and the token is in no message."""
    async with FakeCluster() as cluster:
        async with a_client(cluster, tmp_path, token="wrong.token.value") as client:
            with pytest.raises(ClusterError, match="is the token good") as raised:
                await client.page(PODS)
    assert raised.value.status == 401
    assert "wrong.token" not in str(raised.value)


async def test_what_is_not_there(tmp_path: Path) -> None:
    """An object that is missing is an error of its own."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        with pytest.raises(MissingError, match=r'pods "x" not found'):
            await client.get("/api/v1/namespaces/shop/pods/x")


async def test_what_is_no_longer_kept(tmp_path: Path) -> None:
    """A version from too long ago is an error of its own, at once or within a watch."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        cluster.pod()
        cluster.compact()
        asked = {"watch": "1", "resourceVersion": "1"}
        with pytest.raises(GoneError):
            async with client.watch(PODS, asked, silence=SOON) as events:
                async for one in events:
                    if one["type"] == "ERROR":  # a real one says it either way
                        raise GoneError("too old", one["object"]["code"])
        cluster.faults.fail(410, times=1)
        with pytest.raises(GoneError):
            await client.page(PODS)


FAILURES: dict[str, tuple[Callable[[FakeCluster], Any], str]] = {
    "500": (lambda c: c.faults.fail(500), "it answered 500: Internal error occurred"),
    "503": (lambda c: c.faults.fail(503), "it answered 503"),
    "429": (lambda c: c.faults.fail(429), "it answered 429"),
    "redirect": (lambda c: c.faults.fail(302), "it answered 302"),
    "no content": (lambda c: c.faults.garbage(body=b""), "not JSON"),
    "garbage": (lambda c: c.faults.garbage(), "not JSON"),
    "a list": (lambda c: c.faults.garbage(body=b"[]"), "not a JSON object"),
    "deep": (lambda c: c.faults.garbage(body=b'{"a":' + b"[" * 90_000), "not JSON"),
    "hang": (lambda c: c.faults.hang(), "did not answer in time"),
    "slow": (lambda c: c.faults.delay(3), "did not answer in time"),
    "reset": (lambda c: c.faults.reset(), "cannot be reached"),
    "truncated": (lambda c: c.faults.truncate(), "cannot be reached"),
    "another CA": (lambda c: c.present("wrong-ca"), "is not who it should be"),
    "another name": (lambda c: c.present("wrong-name"), "is not who it should be"),
    "expired": (lambda c: c.present("expired"), "is not who it should be"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_sec_34_failures(tmp_path: Path, name: str) -> None:
    """SEC-34: whatever goes wrong is one error of ours that says what; nothing is believed."""
    fail, why = FAILURES[name]
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        fail(cluster)
        with pytest.raises(ClusterError, match=why):
            await client.page(PODS)
        cluster.faults.clear()
        cluster.present("right")
        assert (await client.get("/version"))["major"]


async def test_a_server_that_is_away(tmp_path: Path) -> None:
    """Says where it was looked for, and that address alone."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        await cluster.stop()
        with pytest.raises(ClusterError, match=f"127.0.0.1:{cluster.port} cannot be reached"):
            await client.page(PODS)
        await cluster.start()
        assert await client.page(PODS)


async def test_sec_80_an_answer_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: an answer is read up to a limit, and no further."""
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 200_000)
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        cluster.faults.huge(1 << 30)
        with pytest.raises(ClusterError, match="longer than 64 MiB"):
            await client.page(PODS)
        cluster.faults.clear()
        assert await client.page(PODS)


def test_what_a_server_says_is_cut_and_printable() -> None:
    """A server's words go into logs: only so many, and no control characters."""
    refused = str(module._refused(500, b'{"message": "a\\u001b[31m\\n' + b"x" * 9000 + b'"}'))
    assert refused.startswith("it answered 500: a[31mxx")
    assert len(refused) < 600
    assert str(module._refused(502, b" <html>")) == "it answered 502: HTTP 502"
    assert str(module._refused(503, b"plain\n\xff")).startswith("it answered 503: plain")


# Watches


async def test_a_watch(tmp_path: Path) -> None:
    """Events as they happen, until the server ends it."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        page = await client.page(PODS)
        asked = {"watch": "1", "resourceVersion": page["metadata"]["resourceVersion"]}
        seen = []
        async with client.watch(PODS, asked, silence=timedelta(seconds=5)) as events:
            pod = cluster.pod()
            cluster.relabel(pod, {"a": "b"})
            cluster.delete_pod(pod)
            cluster.cut_watches(broken=False)
            async for one in events:
                seen.append(one["type"])
        assert (seen[:2], seen[-1]) == (["ADDED", "MODIFIED"], "DELETED")
        assert await client.page(PODS)


async def test_a_watch_of_metadata(tmp_path: Path) -> None:
    """Watched by metadata alone, an object has nothing else."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        page = await client.page("/api/v1/namespaces", metadata_only=True)
        asked = {"watch": "1", "resourceVersion": page["metadata"]["resourceVersion"]}
        async with client.watch(
            "/api/v1/namespaces", asked, silence=SOON, metadata_only=True
        ) as events:
            cluster.namespace("shop")
            one = await anext(events)
        assert one["object"]["kind"] == "PartialObjectMetadata"
        assert set(one["object"]) == {"kind", "apiVersion", "metadata"}


WATCH_FAILURES: dict[str, tuple[Callable[[FakeCluster], Any], str]] = {
    "cut": (lambda c: c.cut_watches(), "cannot be reached"),
    "garbage": (lambda c: c.write_on_watches(b"\x00{nonsense\n"), "not JSON"),
    "no object": (lambda c: c.write_on_watches(b"7\n"), "not a JSON object"),
    "half an event": (
        lambda c: (c.write_on_watches(b'{"type":"ADD'), c.cut_watches(broken=False)),
        "in the middle of an event",
    ),
    "silence": (lambda c: c.silence(), "did not answer in time"),
    "an event without end": (
        lambda c: c.write_on_watches(b'{"a":"' + b"x" * 300_000), "longer than 4 MiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WATCH_FAILURES)
async def test_how_watches_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A watch that breaks, lies or falls silent is one error of ours; the next one works."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 200_000)
    fail, why = WATCH_FAILURES[name]
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        asked = {"watch": "1", "resourceVersion": str(cluster.store.version)}
        with pytest.raises(ClusterError, match=why):
            async with client.watch(PODS, asked, silence=SOON) as events:
                fail(cluster)
                async for _ in events:
                    pass
        assert await client.page(PODS)


async def test_a_watch_that_is_never_answered(tmp_path: Path) -> None:
    """Silence is for a watch that was begun: a server that hangs is noticed as ever."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        cluster.faults.hang()
        with pytest.raises(ClusterError, match="did not answer in time"):
            async with client.watch(PODS, {"watch": "1"}, silence=timedelta(hours=1)):
                raise AssertionError
        cluster.faults.clear()
        assert await client.page(PODS)


@pytest.mark.parametrize("how", ["get", "watch", "cancelled"])
async def test_a_handshake_that_is_never_answered(tmp_path: Path, how: str) -> None:
    """Given up in its middle, by time or by whoever asked, a connection is closed."""
    hung: list[asyncio.StreamWriter] = []
    ended = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.append(writer)
        while await reader.read(4096):
            pass
        ended.set()

    listener = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with FakeCluster() as cluster:
        config = {"server": f"https://127.0.0.1:{port}"}
        async with a_client(cluster, tmp_path, **config) as client:
            if how == "get":
                with pytest.raises(ClusterError, match="did not answer in time"):
                    await client.get("/version")
            elif how == "watch":
                with pytest.raises(ClusterError, match="did not answer in time"):
                    async with client.watch(PODS, {}, silence=SOON):
                        raise AssertionError
            else:
                asking = asyncio.create_task(client.get("/version"))
                while not hung:
                    await asyncio.sleep(0.005)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            await asyncio.wait_for(ended.wait(), 5)
    for writer in hung:
        writer.close()
    listener.close()
    await listener.wait_closed()


async def test_lines_that_come_in_pieces(tmp_path: Path) -> None:
    """An event may come in any number of pieces, and several at once; empty lines are none."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        asked = {"watch": "1", "resourceVersion": str(cluster.store.version)}
        async with client.watch(PODS, asked, silence=timedelta(seconds=5)) as events:
            for piece in (b'{"n"', b": 1}\n{", b'"n": 2}\n\n  \n{"n":', b" 3", b'}\n{"n":4}\n'):
                cluster.write_on_watches(piece)
                await asyncio.sleep(0.01)
            assert [(await anext(events))["n"] for _ in range(4)] == [1, 2, 3, 4]


async def test_a_watch_that_is_left_early_leaves_nothing_behind(tmp_path: Path) -> None:
    """Who stops looking ends the connection: it cannot serve another request."""
    async with FakeCluster() as cluster, a_client(cluster, tmp_path) as client:
        asked = {"watch": "1", "resourceVersion": str(cluster.store.version)}
        async with client.watch(PODS, asked, silence=SOON) as events:
            cluster.pod()
            await anext(events)
        assert client._pool is not None
        assert not client._pool.connections


# Credentials that rotate


async def test_a_ca_that_is_replaced(tmp_path: Path) -> None:
    """A new CA is taken over with the next request; a watch over the old one goes on."""
    async with FakeCluster() as cluster:
        cluster.grant("system:serviceaccount:shop:web", ALL)
        token = cluster.account_token("shop", "web")
        environment = cluster.in_cluster(tmp_path, token)
        client = Client(in_cluster(environment, tmp_path), timeout=SOON)
        await client.page(PODS)
        asked = {"watch": "1", "resourceVersion": str(cluster.store.version)}
        async with client.watch(PODS, asked, silence=timedelta(seconds=5)) as events:
            first = client._pool
            project(tmp_path, {"token": token, "ca.crt": cluster.ca.pem.decode() + "\n"})
            await client.page(PODS)
            assert client._pool is not first
            cluster.pod()
            assert (await anext(events))["type"] == "ADDED"
        project(tmp_path, {"token": token, "ca.crt": cluster.ca.pem.decode() + "\n\n"})
        await client.page(PODS)
        assert not client._retired  # nobody uses them any more
        (tmp_path / "token").unlink()
        with pytest.raises(ClusterError, match="cannot read"):
            await client.page(PODS)
        await client.close()


ALL = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
