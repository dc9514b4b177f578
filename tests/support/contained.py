"""A workload inside a real container, which does what it is told and says what it saw."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.casting import Role
from demo.player import Event, Player
from tests.support.containers import INSIDE, Container, Engine, python

PROGRAM = python("-m", "demo.pods.workload")
ENDPOINT = f"unix://{INSIDE}/workload.sock"


@dataclass(frozen=True)
class Workload:
    """A running container, and the program in it."""

    container: Container
    player: Player
    pid: int
    """As this machine numbers it."""

    async def watch(self) -> None:
        """Have it follow its identities; `svids` and `denied` then tell what it saw."""
        await self.player.do("watch")

    async def svids(self, *paths: str, since: int = 0) -> Event:
        """Wait until it holds exactly the identities of *paths*."""
        wanted = {f"spiffe://example.org{one}" for one in paths}
        return await self.player.expect(
            "svids", lambda one: set(one["svids"]) == wanted, since=since
        )

    async def gets(self, *paths: str) -> Event:
        """Have it follow its identities, and wait until those are the ones of *paths*."""
        await self.watch()
        return await self.svids(*paths)

    async def denied(self, *, since: int = 0) -> Event:
        """Wait until its stream is ended with an error."""
        return await self.player.expect("denied", since=since)

    @property
    def seen(self) -> int:
        """How much it has said so far; what comes then is after that."""
        return len(self.player.seen)

    async def fetched(self) -> set[str]:
        """Have it ask once: the paths of its identities, none when it is refused."""
        since = self.seen
        await self.player.do("fetch")
        answer = await self.player.expect("fetched", since=since)
        return {one.removeprefix("spiffe://example.org") for one in answer["svids"]}


async def a_container(
    engine: Engine,
    sockets: Path,
    *,
    user: int = 0,
    options: Sequence[str] = (),
    **how: Any,
) -> Container:
    """A container with the workload's program, not started; *how* as in `Engine.create`."""
    words = ("--user", str(user), *options)
    return await engine.create(*PROGRAM, sockets=sockets, options=words, **how)


@contextlib.asynccontextmanager
async def running(container: Container) -> AsyncIterator[Workload]:
    """Start *container*, talk to its program, and remove it at the end."""
    role = Role(container.id[:12], container.attached(), container.engine.environment, None, ())
    try:
        async with Player(role, ENDPOINT) as player:
            yield Workload(container, player, await container.pid())
    finally:
        await container.remove()


@contextlib.asynccontextmanager
async def a_workload(engine: Engine, sockets: Path, **how: Any) -> AsyncIterator[Workload]:
    """Both at once."""
    async with running(await a_container(engine, sockets, **how)) as workload:
        yield workload
