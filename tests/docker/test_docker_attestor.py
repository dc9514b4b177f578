"""The attestor `docker` and the engines it asks, both real."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from itertools import product
from typing import Any

import pytest

from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer
from tests.support.children import a_child
from tests.support.contained import a_workload
from tests.support.containers import IMAGE, Container, Engine, hierarchies
from tests.support.podstack import QUICK
from tests.support.programs import Programs
from tests.support.stack import a_stack
from workload_api.attestors.docker import DockerAttestor
from workload_api.attestors.protocol import AttestationError

pytestmark = pytest.mark.docker

LABELS = ("--label", "app=web", "--label", "tier=a:b")


def peer_of(pid: int) -> UnixPeer:
    """A process as a front door would have proved it."""
    return UnixPeer(pid, 0, 0, PeerProof.PIDFD, PidFd(os.pidfd_open(pid)))


@contextlib.contextmanager
def attesting(engine: Engine, **settings: Any) -> Iterator[DockerAttestor]:
    """The attestor, on the socket of *engine*."""
    attestor = DockerAttestor(socket=engine.socket, **settings)
    try:
        yield attestor
    finally:
        attestor.close()


@contextlib.asynccontextmanager
async def sleeping(engine: Engine, *options: str) -> AsyncIterator[tuple[Container, UnixPeer]]:
    """A container that sleeps, and its process."""
    container = await engine.create("sleep", "60", options=options)
    try:
        await container.start()
        yield container, peer_of(await container.pid())
    finally:
        await container.remove()


@contextlib.contextmanager
def placed(path: str) -> Iterator[UnixPeer]:
    """A process of the host, put into a cgroup of this *path* in every hierarchy."""
    folders = [one / path for one in hierarchies()]
    made = [one for one in folders if not one.exists()]
    with contextlib.ExitStack() as stack:
        for one in made:
            one.mkdir(parents=True)
            stack.callback(one.rmdir)
            if (one / "cpuset.cpus").exists():  # empty, which lets no process in
                for folder, name in product((one.parent, one), ("cpuset.cpus", "cpuset.mems")):
                    (folder / name).write_text((folder.parent / name).read_text())
        with a_child() as child:
            for one in folders:
                (one / "cgroup.procs").write_text(str(child.pid))
            yield peer_of(child.pid)


async def selectors_of(attestor: DockerAttestor, peer: UnixPeer) -> set[str]:
    """What it learns, as text."""
    return {str(one) for one in (await attestor.attest(peer)).selectors}


@pytest.fixture(params=["docker", "podman"])
def either(request: pytest.FixtureRequest) -> Engine:
    """Each engine."""
    engine: Engine = request.getfixturevalue(
        "engine" if request.param == "docker" else "podman"
    )
    return engine


async def test_sec_33_what_the_engine_says(either: Engine) -> None:
    """SEC-33: a live container's process is described by what the engine confirms of it."""
    with attesting(either) as attestor:
        async with sleeping(either, *LABELS, "--env", "SECRET=1") as (container, peer):
            image = (await container.inspect())["Config"]["Image"]
            digest = (await either.docker("inspect", "--format", "{{.Id}}", IMAGE)).strip()
            assert await selectors_of(attestor, peer) == {
                "docker:label:app:web",
                "docker:label:tier:a:b",
                f"docker:image_id:{image}",
                f"docker:image_config_digest:sha256:{digest.removeprefix('sha256:')}",
                f"docker:container_id:{container.id}",
            }


async def test_sec_35_environment_only_when_asked_for(engine: Engine) -> None:
    """SEC-35: variables, which whoever starts a container chooses, count by setting alone."""
    async with sleeping(engine, "--env", "ROLE=db") as (_, peer):
        with attesting(engine) as attestor:
            found = await selectors_of(attestor, peer)
            assert not [one for one in found if one.startswith("docker:env:")]
        with attesting(engine, env=True) as attestor:
            assert "docker:env:ROLE=db" in await selectors_of(attestor, peer)


async def test_sec_33_a_container_that_stopped(engine: Engine) -> None:
    """SEC-33: a process in the cgroup of a container that does not run is not vouched for."""
    async with sleeping(engine) as (container, _):
        await container.kill()
        with attesting(engine) as attestor, placed(f"docker/{container.id}") as peer:
            with pytest.raises(AttestationError, match="is not running"):
                await attestor.attest(peer)


async def test_sec_33_a_container_nobody_started(engine: Engine) -> None:
    """SEC-33: a process in the cgroup of a container unknown to the engine is refused."""
    with attesting(engine) as attestor, placed(f"docker/{64 * 'a'}") as peer:
        with pytest.raises(AttestationError, match="none of this ID"):
            await attestor.attest(peer)


async def test_no_container_is_nothing(engine: Engine) -> None:
    """A process of the host is none of the engine's: no selectors, and no error."""
    with attesting(engine) as attestor, a_child() as child:
        assert await selectors_of(attestor, peer_of(child.pid)) == set()


async def test_sec_35_an_identity_by_label(engine: Engine) -> None:
    """SEC-35: from connect() in a container to an SVID by its label; without it the reason."""
    settings = {
        "docker": {"workloads": True, "socket": str(engine.socket)},
        "workloads": QUICK,
    }
    async with a_stack(agent_changes=settings) as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, "docker:label:app:web")
        await stack.agent.until_svids(1)
        sockets = stack.agent.workload_socket.parent
        async with (
            a_workload(engine, sockets, options=LABELS, user=61_234) as web,
            a_workload(engine, sockets, options=("--label", "app=db")) as other,
        ):
            assert await web.fetched() == {"/web"}
            assert await other.fetched() == set()
            told = await Programs.of(stack).issuer("explain", "--pid", str(other.pid))
            assert "docker:label:app:db" in told.out
            assert "the entry wants docker:label:app:web" in told.out
