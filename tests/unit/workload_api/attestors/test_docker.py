"""
The ``docker`` attestor, on an engine of ours that serves a real socket.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from spiffe_wire.frontdoor.peer import UnixPeer
from tests.support.cgroups import CONTAINER, OTHER_CONTAINER, cgroup_text
from tests.support.children import a_child, open_files
from tests.support.door import on_uvloop
from tests.support.engine import IMAGE_ID, FakeEngine, a_container, a_fake_engine
from workload_api.attestors.cgroup import HOST, CgroupError, PrefixError
from workload_api.attestors.docker import KEPT, DockerAttestor
from workload_api.attestors.engine import (
    MAX_ANSWER_BYTES,
    TIMEOUT,
    EngineError,
    running_container,
)
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.registry import Attestation
from workload_api.attestors.unix import UnixAttestor

INSIDE = cgroup_text("0::/docker/{id}")
ELSEWHERE = cgroup_text("0::/docker/{id2}")
OUTSIDE = cgroup_text("0::/system.slice/ssh.service")
EVERYTHING = {
    f"container_id:{CONTAINER}",
    "label:app:web",
    "label:tier:front",
    "image_id:registry.example/web:1.4",
    f"image_config_digest:{IMAGE_ID}",
}
CONTAINER_PATH = f"/containers/{CONTAINER}/json"
IMAGE_PATH = f"/images/{IMAGE_ID}/json"


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    """An engine that knows one running container."""
    async with a_fake_engine() as engine:
        yield engine


@pytest.fixture
def peer() -> Iterator[UnixPeer]:
    """A process; which container it is in, each test says."""
    with a_child() as child:
        yield child.peer()


@contextlib.contextmanager
def attesting(
    engine: "FakeEngine | Path",
    reads: "bytes | Callable[[int], bytes]" = INSIDE,
    **settings: Any,
) -> Iterator[DockerAttestor]:
    """The attestor; every process's cgroups are what *reads* says."""
    attestor = DockerAttestor(
        socket=engine if isinstance(engine, Path) else engine.socket,
        view=HOST,
        read=reads if callable(reads) else lambda _: reads,
        **settings,
    )
    try:
        yield attestor
    finally:
        attestor.close()


async def values(attestor: DockerAttestor, peer: UnixPeer) -> set[str]:
    """What is learnt of *peer*, without the type."""
    found = (await attestor.attest(peer)).selectors
    assert {one.type for one in found} <= {"docker"}
    return {one.value for one in found}


# --- what is learnt --------------------------------------------------------------------------


async def test_everything_that_is_learnt(engine: FakeEngine, peer: UnixPeer) -> None:
    """A process in a container gets labels, image and ID, and nothing else is said of it."""
    with attesting(engine) as attestor:
        found = await attestor.attest(peer)
    assert {one.value for one in found.selectors} == EVERYTHING
    assert (found.changed, found.missing) == (None, "")
    assert engine.asked == {CONTAINER_PATH: 1, IMAGE_PATH: 1}


async def test_sec_35_environment_only_by_setting(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-35: variables, which whoever starts the container chooses, are off by default."""
    with attesting(engine, env=True) as attestor:
        assert await values(attestor, peer) == EVERYTHING | {"env:ROLE=web", "env:PATH=/bin"}
    with attesting(engine) as attestor:
        assert not any(one.startswith("env:") for one in await values(attestor, peer))


async def test_sec_33_a_process_in_no_container(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-33: of a process in no container nothing is said, and the engine is not asked."""
    with attesting(engine, OUTSIDE) as attestor:
        found = await attestor.attest(peer)
    assert (found.selectors, found.missing, sum(engine.asked.values())) == (frozenset(), "", 0)


async def test_a_real_process_of_the_host(engine: FakeEngine, peer: UnixPeer) -> None:
    """It reads this machine's cgroups by default: a child of ours is in no container."""
    attestor = DockerAttestor(socket=engine.socket)
    assert await values(attestor, peer) == set()
    attestor.close()


@on_uvloop
async def test_on_the_agents_own_loop(peer: UnixPeer) -> None:
    """On uvloop, as in the agent, sockets are others, and the answer is the same."""
    async with a_fake_engine() as engine:
        with attesting(engine) as attestor:
            assert await values(attestor, peer) == EVERYTHING


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"Config__Image": ""}, {"image_id:registry.example/web:1.4"}),
        ({"Config__Labels": None}, {"label:app:web", "label:tier:front"}),
        ({"Config__Labels": {}}, {"label:app:web", "label:tier:front"}),
        ({"Config__Env": None}, set()),
    ],
    ids=["no-image-name", "null-labels", "no-labels", "null-env"],
)
async def test_what_is_empty_is_left_out(
    engine: FakeEngine, peer: UnixPeer, changes: dict[str, Any], gone: set[str]
) -> None:
    """A container without labels or name of an image is described by the rest."""
    engine.containers[CONTAINER] = a_container(**changes)
    with attesting(engine, env=True) as attestor:
        found = {one for one in await values(attestor, peer) if not one.startswith("env:")}
    assert found == EVERYTHING - gone


async def test_labels_of_every_kind(engine: FakeEngine, peer: UnixPeer) -> None:
    """Labels may be empty or hold colons and any text; what is no UTF-8 no entry can name."""
    labels = {"a": "", "b": "x:y", "c:d": "e", "é": "ü\n", "half": "\ud800", "": "z"}
    engine.containers[CONTAINER] = a_container(Config__Labels=labels)
    with attesting(engine) as attestor:
        found = {one for one in await values(attestor, peer) if one.startswith("label:")}
    assert found == {"label:a:", "label:b:x:y", "label:c:d:e", "label:é:ü\n", "label::z"}


async def test_the_image_that_runs_and_not_the_one_of_its_name(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """The digest is the image's that was started, wherever its name points to now."""
    engine.images["registry.example/web:1.4"] = {"Id": "sha256:" + "0" * 64}
    with attesting(engine) as attestor:
        assert f"image_config_digest:{IMAGE_ID}" in await values(attestor, peer)


async def test_podman_writes_ids_without_the_algorithm(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """An image's ID without ``sha256:`` is the same ID, and the selector has it."""
    bare = IMAGE_ID.removeprefix("sha256:")
    engine.containers[CONTAINER] = a_container(Image=bare)
    engine.images = {bare: {"Id": bare}}
    with attesting(engine) as attestor:
        assert await values(attestor, peer) == EVERYTHING


@pytest.mark.parametrize(
    ("changes", "images", "reason"),
    [
        ({}, {}, "knows none of this ID"),
        ({}, {IMAGE_ID: {}}, "no ID"),
        ({}, {IMAGE_ID: {"Id": "latest"}}, "no ID"),
        ({}, {IMAGE_ID: ["x"]}, "not a JSON object"),
        ({"Image": ""}, {}, "names none"),
        ({"Image": "../containers/x"}, {}, "names none"),
    ],
    ids=["removed", "without-id", "strange-id", "no-object", "none", "a-path"],
)
async def test_sec_35_without_its_image(
    engine: FakeEngine, peer: UnixPeer, changes: dict[str, Any], images: Any, reason: str
) -> None:
    """SEC-35: when the image cannot be inspected the rest holds, and it says so."""
    engine.containers[CONTAINER] = a_container(**changes)
    engine.images = images
    with attesting(engine) as attestor:
        found = await attestor.attest(peer)
    assert {one.value for one in found.selectors} == EVERYTHING - {
        f"image_config_digest:{IMAGE_ID}"
    }
    assert reason in found.missing
    assert set(engine.asked) <= {CONTAINER_PATH, IMAGE_PATH}


async def test_sec_35_an_image_that_takes_too_long(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-35: an engine that answers about the container alone still names the container."""
    engine.holds = "/images/"
    with attesting(engine, timeout=timedelta(milliseconds=100)) as attestor:
        found = await attestor.attest(peer)
    assert len(found.selectors) == len(EVERYTHING) - 1
    assert "in time" in found.missing


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Id": OTHER_CONTAINER}, "another container"),
        ({"Id": CONTAINER[:12]}, "another container"),
        ({"Id": None}, "another container"),
        ({"State__Running": False}, "not running"),
        ({"State__Running": None}, "not running"),
        ({"State__Running": "true"}, "not running"),
        ({"State__Running": 1}, "not running"),
        ({"State__Pid": 0}, "not running"),
        ({"State__Pid": -1}, "not running"),
        ({"State__Pid": True}, "not running"),
        ({"State__Pid": None}, "not running"),
        ({"State": None}, "malformed"),
        ({"Config": []}, "malformed"),
        ({"Config__Labels": ["a"]}, "malformed"),
        ({"Config__Labels": {"a": 1}}, "malformed"),
        ({"Config__Env": {"a": "b"}}, "malformed"),
        ({"Config__Env": [1]}, "malformed"),
        ({"Config__Image": 7}, "malformed"),
        ({"Image": {}}, "malformed"),
    ],
    ids=str,
)
def test_sec_34_an_answer_that_is_not_as_it_should_be(
    changes: dict[str, Any], reason: str
) -> None:
    """SEC-34: another container, one that does not run, and what is malformed are refused."""
    running_container(CONTAINER, a_container())
    with pytest.raises(EngineError, match=reason):
        running_container(CONTAINER, a_container(**changes))


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (web.Response(status=404), "knows none of this ID"),
        (web.Response(status=500, text="{}"), "answered 500"),
        (web.Response(status=301, headers={"Location": "http://x/"}), "answered 301"),
        (web.Response(text=""), "not JSON"),
        (web.Response(text="{"), "not JSON"),
        (web.Response(body=b"\xff\xfe"), "not JSON"),
        (web.Response(text="[" * 100_000), "not JSON"),
        (web.Response(text="[]"), "not a JSON object"),
        (web.Response(text="{}"), "malformed"),
        (web.Response(body=b" " * (MAX_ANSWER_BYTES + 1)), "longer than 4 MiB"),
    ],
    ids=["404", "500", "301", "empty", "cut", "bytes", "deep", "list", "nothing", "huge"],
)
async def test_sec_34_an_engine_that_answers_something_else(
    engine: FakeEngine, peer: UnixPeer, response: web.Response, reason: str
) -> None:
    """SEC-34: whatever the engine answers instead, the attestor says why it vouches not."""
    engine.raw[CONTAINER_PATH] = response
    with attesting(engine) as attestor:
        with pytest.raises(AttestationError, match=reason):
            await attestor.attest(peer)


async def test_an_answer_as_long_as_is_allowed(engine: FakeEngine, peer: UnixPeer) -> None:
    """The limit of 4 MiB is what may be sent, not one byte less."""
    body = json.dumps(a_container()).encode()
    engine.raw[CONTAINER_PATH] = web.Response(body=body.ljust(MAX_ANSWER_BYTES))
    with attesting(engine) as attestor:
        assert await values(attestor, peer) == EVERYTHING


async def test_an_engine_that_hangs(engine: FakeEngine, peer: UnixPeer) -> None:
    """An engine that does not answer in time costs its selectors, and nothing stays open."""
    engine.holds = "/containers/"
    assert timedelta(seconds=2) == TIMEOUT
    with attesting(engine, timeout=timedelta(milliseconds=100)) as attestor:
        async with asyncio.timeout(1.5):
            with pytest.raises(AttestationError, match="did not answer in time"):
                await attestor.attest(peer)
        engine.release.set()
        assert await values(attestor, peer) == EVERYTHING  # asked anew: failures are not kept


@pytest.mark.parametrize(
    ("said", "reason"),
    [(b"", "speaks no HTTP"), (b"hello\r\n\r\n", "speaks no HTTP")],
    ids=["nothing", "garbage"],
)
async def test_a_socket_that_speaks_no_http(
    engine: FakeEngine, peer: UnixPeer, said: bytes, reason: str
) -> None:
    """What serves the socket may be no engine at all: it says so."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    path = engine.socket.with_name("other")
    async with await asyncio.start_unix_server(serve, path):
        with attesting(path) as attestor:
            with pytest.raises(AttestationError, match=reason):
                await attestor.attest(peer)


# --- whose socket ----------------------------------------------------------------------------


async def test_sec_34_no_socket(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-34: a socket that is not there, or nobody serves, is said to be so."""
    folder = engine.socket.parent
    with attesting(folder / "missing") as attestor:
        with pytest.raises(AttestationError, match="there is no engine's socket"):
            await attestor.attest(peer)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(folder / "stale"))
    with attesting(folder / "stale") as attestor:
        with pytest.raises(AttestationError, match="cannot be reached"):
            await attestor.attest(peer)


async def test_sec_34_a_file_in_its_place(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-34: what is no socket is not connected to."""
    path = engine.socket.with_name("file")
    path.touch(mode=0o600)
    with attesting(path) as attestor:
        with pytest.raises(AttestationError, match="is no socket"):
            await attestor.attest(peer)


async def test_sec_34_by_a_link(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-34: /var/run is a link on most systems: the place that it leads to is checked."""
    link = engine.socket.with_name("link")
    link.symlink_to(engine.socket)
    folder = engine.socket.with_name("run")
    folder.symlink_to(engine.socket.parent)
    for path in (link, folder / engine.socket.name, folder / "link"):
        with attesting(path) as attestor:
            assert await values(attestor, peer) == EVERYTHING
    public = engine.socket.with_name("public")
    public.mkdir()
    public.chmod(0o777)
    engine.socket.rename(public / "engine.sock")
    link.unlink()
    link.symlink_to(public / "engine.sock")
    with attesting(link) as attestor:
        with pytest.raises(AttestationError, match="writable by others"):
            await attestor.attest(peer)
    loop = engine.socket.with_name("loop")
    loop.symlink_to(loop)
    with attesting(loop) as attestor:
        with pytest.raises(AttestationError, match="there is no engine's socket"):
            await attestor.attest(peer)


async def test_sec_34_a_folder_that_others_may_write_to(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """SEC-34: where others could put a socket of theirs, none is believed at that time."""
    folder = engine.socket.parent
    with attesting(engine, clock=iter(range(0, 1000, 100)).__next__) as attestor:
        assert await values(attestor, peer) == EVERYTHING
        folder.chmod(0o777)
        with pytest.raises(AttestationError, match="writable by others"):
            await attestor.attest(peer)
        folder.chmod(0o700)
        assert await values(attestor, peer) == EVERYTHING


# --- once, and not again ---------------------------------------------------------------------


async def test_sec_35_one_question_for_many(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-35: however many processes of a container ask at once, the engine is asked once."""
    engine.holds = "/containers/"
    with attesting(engine) as attestor:
        asking = [asyncio.create_task(values(attestor, peer)) for _ in range(50)]
        await engine.arrived.wait()
        engine.release.set()
        assert await asyncio.gather(*asking) == [EVERYTHING] * 50
    assert engine.asked == {CONTAINER_PATH: 1, IMAGE_PATH: 1}


async def test_sec_35_five_seconds(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-35: an answer serves for five seconds from when it was asked for, not longer."""
    now = 100.0
    with attesting(engine, clock=lambda: now) as attestor:
        assert await values(attestor, peer) == EVERYTHING
        engine.containers[CONTAINER] = a_container(State__Running=False)
        now += 4.99
        assert await values(attestor, peer) == EVERYTHING
        assert engine.asked[CONTAINER_PATH] == 1
        now += 0.01
        with pytest.raises(AttestationError, match="not running"):
            await attestor.attest(peer)


async def test_sec_35_an_answer_is_for_its_container(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """SEC-35: what is known of one container is never said of another."""
    reads = [INSIDE]
    other = a_container(Id=OTHER_CONTAINER, Config__Labels={"app": "db"})
    engine.containers[OTHER_CONTAINER] = other
    with attesting(engine, lambda _: reads[0]) as attestor:
        assert await values(attestor, peer) == EVERYTHING
        reads[0] = ELSEWHERE
        found = await values(attestor, peer)
    assert {"label:app:db", f"container_id:{OTHER_CONTAINER}"} <= found
    assert "label:app:web" not in found


async def test_what_is_kept_is_bounded(
    engine: FakeEngine, peer: UnixPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: of containers that come and go only the last are kept."""
    assert KEPT == 1024
    monkeypatch.setattr("workload_api.attestors.docker.KEPT", 2)
    names = [f"{one:064x}" for one in range(4)]
    engine.containers = {one: a_container(Id=one) for one in names}
    reads = [b""]
    with attesting(engine, lambda _: reads[0]) as attestor:
        for name in (*names, names[3], names[2], names[0]):
            reads[0] = cgroup_text(f"0::/docker/{name}")
            assert f"container_id:{name}" in await values(attestor, peer)
    assert [engine.asked[f"/containers/{one}/json"] for one in names] == [2, 1, 1, 1]


async def test_the_question_goes_on_without_who_asked(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """A caller that goes away does not take the answer from others that wait for it."""
    engine.holds = "/containers/"
    with attesting(engine) as attestor:
        first = asyncio.create_task(values(attestor, peer))
        await engine.arrived.wait()
        second = asyncio.create_task(values(attestor, peer))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        engine.release.set()
        assert await second == EVERYTHING
    assert engine.asked[CONTAINER_PATH] == 1


async def test_closing_stops_what_is_under_way(engine: FakeEngine, peer: UnixPeer) -> None:
    """The agent ends while the engine is asked: the question ends, nothing stays open."""
    before = open_files()
    engine.holds = "/containers/"
    with attesting(engine) as attestor:
        asking = asyncio.create_task(attestor.attest(peer))
        await engine.arrived.wait()
    with pytest.raises(asyncio.CancelledError):
        await asking
    engine.release.set()
    async with asyncio.timeout(5):
        while open_files() > before:
            await asyncio.sleep(0)


# --- together with the kernel ----------------------------------------------------------------


async def test_sec_33_a_process_that_is_moved_meanwhile(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """SEC-33: who was in another container when the engine had answered is in neither."""
    for after in (ELSEWHERE, OUTSIDE):
        reads = iter([INSIDE, after])
        with attesting(engine, lambda _, reads=reads: next(reads)) as attestor:
            with pytest.raises(AttestationError, match="moved to another cgroup"):
                await attestor.attest(peer)


async def test_sec_33_a_forged_path_asks_nobody(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-33: what the cgroup file does not say plainly is never put to the engine."""
    for path in ("/docker/{id}/{id2}", "/docker/{ID}", "/docker/{id}/../{id2}"):
        with attesting(engine, cgroup_text("0::" + path)) as attestor:
            with pytest.raises(CgroupError):
                await attestor.attest(peer)
    assert sum(engine.asked.values()) == 0


async def test_prefixes_are_settings(engine: FakeEngine, peer: UnixPeer) -> None:
    """SEC-33: containers are looked for below the configured prefixes alone."""
    lab = cgroup_text("0::/lab/{id}")
    with attesting(engine, lab) as attestor:
        assert await values(attestor, peer) == set()
    with attesting(engine, lab, prefixes=("/lab",)) as attestor:
        assert await values(attestor, peer) == EVERYTHING
    with pytest.raises(PrefixError):
        DockerAttestor(socket=engine.socket, prefixes=("lab",))


async def test_sec_35_the_engines_failure_is_visible(
    engine: FakeEngine, peer: UnixPeer
) -> None:
    """SEC-35: beside another attestor the result is partial, with the engine's reason."""
    engine.raw[CONTAINER_PATH] = web.Response(status=500)

    with attesting(engine) as failing, contextlib.closing(UnixAttestor()) as unix:
        attested = await Attestation([unix, failing]).attest(peer)
    assert {one.type for one in attested.selectors} == {"unix"}
    assert set(attested.partial) == {"docker"}
    assert "answered 500" in attested.partial["docker"]
