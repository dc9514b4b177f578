"""A container engine's API on a Unix socket: what Docker answers, and every way to fail."""

import asyncio
import contextlib
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.cgroups import CONTAINER

IMAGE_ID = f"sha256:{hashlib.sha256(b'an image').hexdigest()}"


def a_container(**changes: Any) -> dict[str, Any]:
    """What an engine says of a running container; *changes* by name, a dot in it as ``__``."""
    found: dict[str, Any] = {
        "Id": CONTAINER,
        "Name": "/web",
        "State": {"Status": "running", "Running": True, "Paused": False, "Pid": 4711},
        "Image": IMAGE_ID,
        "Config": {
            "Image": "registry.example/web:1.4",
            "Labels": {"app": "web", "tier": "front"},
            "Env": ["ROLE=web", "PATH=/bin"],
        },
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = found
        for one in parents:
            place = place[one]
        place[last] = value
    return found


@dataclass
class FakeEngine:
    """
    An engine; `containers` and `images` by ID are what it knows.

    *raw* is sent instead of an answer to a path that contains its key; *hold* keeps answers
    back until it is set.
    """

    socket: Path
    containers: dict[str, Any] = field(default_factory=lambda: {CONTAINER: a_container()})
    images: dict[str, Any] = field(default_factory=lambda: {IMAGE_ID: {"Id": IMAGE_ID}})
    raw: dict[str, web.Response] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    holds: str = ""
    """Answers to paths that contain this wait for `release`."""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a question came that is held."""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one question."""
        path = request.path
        self.asked[path] += 1
        if self.holds and self.holds in path:
            self.arrived.set()
            await self.release.wait()
        for key, response in self.raw.items():
            if key in path:
                return response
        _, kind, name, verb = path.split("/")
        known: Mapping[str, Any] = {"containers": self.containers, "images": self.images}[kind]
        if request.method != "GET" or verb != "json" or name not in known:
            return web.json_response({"message": f"No such thing: {name}"}, status=404)
        return web.json_response(known[name])


@contextlib.asynccontextmanager
async def a_fake_engine(**changes: Any) -> AsyncIterator[FakeEngine]:
    """An engine that runs while entered, in a private folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="si-"))
    engine = FakeEngine(folder / "engine.sock", **changes)
    runner = web.ServerRunner(web.Server(engine.answer, access_log=None))
    try:
        await runner.setup()
        await web.UnixSite(runner, str(engine.socket)).start()
        yield engine
    finally:
        engine.release.set()
        await runner.cleanup()
        shutil.rmtree(folder)
