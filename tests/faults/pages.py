"""The status pages of a process, asked over HTTP as a probe does."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def a_free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Pages:
    """The status pages of one process."""

    port: int

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page."""

        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.port}{path}", timeout=10
                ) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(ask)

    async def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and facts of /ready."""
        status, body = await self.get("/ready")
        return status, json.loads(body)

    async def is_live(self) -> bool:
        """What /live says."""
        return await self.get("/live") == (200, '{"live": true}\n')

    async def metric(self, name: str) -> float:
        """The value of one sample."""
        status, body = await self.get("/metrics")
        assert status == 200
        for line in body.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no {name} in {body}")

    async def until(self, good: Callable[[int, dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until /ready is *good*, and return its facts."""
        async with asyncio.timeout(30):
            while True:
                status, facts = await self.ready()
                if good(status, facts):
                    return facts
                await asyncio.sleep(0.05)
