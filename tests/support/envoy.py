"""
Real Envoys: started on a configuration, looked at through their admin port, and stopped.

Each runs from a name of its own of the one program, a hard link where the file system allows
it, so that the agent tells apart two Envoys of one user: a link of that kind is a path of its
own to the kernel, which is what `unix:path` says.  What goes into a configuration is in
`tests.support.envoyconfig`.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web

from tests.support.envoyconfig import Json, bootstrap
from tests.support.stack import ROOT, TRUST_DOMAIN, Process, Stack, a_stack

PLACE = ROOT / ".venv-envoy"
PROGRAM = next(iter(PLACE.glob("lib/python*/site-packages/envoy/_bin/envoy")), None)


def _why_none() -> str:
    told = PLACE / "left-out"
    return told.read_text() if told.exists() else "run `python3 tools/bootstrap.py dev`"


needs_envoy = pytest.mark.skipif(PROGRAM is None, reason=f"no Envoy here: {_why_none()}")


def put_program(at: Path) -> Path:
    """Give Envoy's program another name, *at*."""
    assert PROGRAM is not None
    try:
        os.link(PROGRAM, at)
    except OSError:  # another file system, or another owner's file
        shutil.copy2(PROGRAM, at)
    return at


class Envoy:
    """One Envoy, on files ``NAME*`` in *folder*."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.program = put_program(folder / f"{name}-envoy")
        self.config = folder / f"{name}.json"
        self.access_log = folder / f"{name}.access"
        self._admin = folder / f"{name}.admin"
        self.process = Process(
            [
                str(self.program), "-c", str(self.config), "--disable-hot-restart",
                "--concurrency", "1", "--file-flush-interval-msec", "50",
                "--admin-address-path", str(self._admin), "-l", "info",
            ],
            folder / f"{name}.log",
        )  # fmt: skip

    @property
    def id(self) -> str:
        """The SPIFFE ID that `Mesh.entry` gives it."""
        return f"spiffe://{TRUST_DOMAIN}/{self.name}"

    async def start(self, config: Json) -> Self:
        """Start it on *config*, without waiting for secrets; it picks an admin port itself."""
        admin = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
        self.config.write_text(json.dumps({"admin": admin, **config}))
        return await self.start_again()

    async def start_again(self) -> Self:
        """Start it on the configuration of before."""
        self._admin.unlink(missing_ok=True)
        self.process.start()
        await self.until(lambda: self._answers("/ready", ""))
        return self

    async def ready(self) -> Self:
        """Wait until it serves: every secret it waits for is there."""
        await self.until(lambda: self._answers("/ready", "LIVE"))
        return self

    async def waits(self) -> bool:
        """True while it does not serve, because a secret is not there."""
        return await self._answers("/ready", "INITIALIZING")

    async def until(self, condition: Any) -> Any:
        """Wait until *condition*, which may be asynchronous, is true of it while it runs."""
        return await self.process.until(condition)

    async def until_stat(self, name: str, at_least: int = 1) -> int:
        """Wait until one of its figures has reached *at_least*."""

        async def reached() -> int:
            value = (await self.stats(name)).get(name, 0)
            return value if value >= at_least else 0

        return int(await self.until(reached))

    async def stats(self, containing: str = "") -> dict[str, int]:
        """Its figures whose name contains a text, by name."""
        text = await self.ask("/stats?format=json")
        found = {
            one["name"]: one["value"] for one in json.loads(text)["stats"] if "name" in one
        }
        return {name: value for name, value in found.items() if containing in name}

    async def serials(self) -> set[int]:
        """The serial numbers of the certificates it presents at this moment."""
        held = json.loads(await self.ask("/certs")).get("certificates", [])
        return {
            int(chain["serial_number"], 16)
            for one in held
            for chain in one.get("cert_chain", [])[:1]
        }

    async def port(self, listener: str) -> int:
        """The port that the listener of this name got."""
        found = json.loads(await self.ask("/listeners?format=json"))["listener_statuses"]
        (one,) = (each for each in found if each["name"] == listener)
        return int(one["local_address"]["socket_address"]["port_value"])

    def accesses(self) -> list[dict[str, Any]]:
        """Its access log, a JSON line for each request."""
        if not self.access_log.exists():
            return []
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]

    async def ask(self, path: str) -> str:
        """Ask its admin port."""
        base = f"http://{self._admin.read_text().strip()}"
        async with aiohttp.ClientSession() as session, session.get(base + path) as answer:
            return await answer.text()

    async def _answers(self, path: str, text: str) -> bool:
        if not self._admin.exists() or not self._admin.read_text():
            return False
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return text in await self.ask(path)
        return False

    def close(self) -> None:
        """End it."""
        self.process.close()


@dataclass
class Mesh:
    """A server, an agent, a plain service, and the Envoys that a test puts around it."""

    stack: Stack
    service: int
    """The port of the service."""
    socket: Path
    """Where the agent serves SDS."""
    envoys: dict[str, Envoy] = field(default_factory=dict)

    def envoy(self, name: str) -> Envoy:
        """An Envoy that is not started yet, and that no entry is for."""
        self.envoys[name] = Envoy(self.stack.folder, name)
        return self.envoys[name]

    async def entry(self, envoy: Envoy, **fields: Any) -> Any:
        """Give *envoy*, and no other process, the SPIFFE ID of its name."""
        selectors = (f"unix:uid:{os.geteuid()}", f"unix:path:{envoy.program}")
        server, agent = self.stack.server, self.stack.agent
        return await server.add_entry(f"/{envoy.name}", agent.agent_id, *selectors, **fields)

    async def start(
        self, envoy: Envoy, listeners: Sequence[Json], clusters: Sequence[Json] = ()
    ) -> Envoy:
        """Start it with these, and the agent's cluster."""
        return await envoy.start(bootstrap(envoy.name, self.socket, [*listeners], [*clusters]))


@contextlib.asynccontextmanager
async def a_mesh(
    server_changes: Mapping[str, Any] | None = None, **agent_changes: Any
) -> AsyncIterator[Mesh]:
    """All of it but the Envoys, running; they are ended with it."""
    async with (
        a_stack(server_changes=server_changes, agent_changes=agent_changes) as stack,
        an_upstream() as service,
    ):
        mesh = Mesh(stack, service, stack.agent.sds_socket)
        try:
            yield mesh
        finally:
            for envoy in mesh.envoys.values():
                envoy.close()


@contextlib.asynccontextmanager
async def an_upstream() -> AsyncIterator[int]:
    """A plain HTTP service that says who Envoy says is calling; its port."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"peer": request.headers.get("x-forwarded-client-cert", "")})

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Answer:
    """What a request through the Envoys came to."""

    status: int
    headers: dict[str, str]
    text: str

    @cached_property
    def serials(self) -> tuple[str, str]:
        """The serial numbers that each of the two Envoys saw of the other."""
        return self.headers.get("x-client-serial", ""), self.headers.get("x-server-serial", "")


async def get(port: int, path: str = "/") -> Answer:
    """One request over a connection of its own."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
            return Answer(answer.status, dict(answer.headers), await answer.text())


@dataclass
class Load:
    """Requests one after the other, some at a time, for as long as it is entered."""

    port: int
    answers: list[Answer] = field(default_factory=list)
    at_once: int = 3
    pause: float = 0
    """Seconds between two requests of each, where a test is about time and not about many."""

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self.at_once)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended

    async def more(self, count: int) -> list[Answer]:
        """Wait for *count* answers to requests that were sent after this call."""
        before = len(self.answers) + self.at_once  # so many may be under way
        while len(self.answers) < before + count:
            for task in self._tasks:
                assert not task.done(), task.exception()
            await asyncio.sleep(0.005)
        return self.answers[before:]

    @property
    def failed(self) -> list[Answer]:
        """Those that were not 200."""
        return [one for one in self.answers if one.status != 200]

    async def _run(self) -> None:
        while True:
            self.answers.append(await get(self.port))
            await asyncio.sleep(self.pause)
