"""Workloads that ask an agent which may die, each as a process of its own would."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self

import grpc

from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_wire.pb import workloadapi_pb2_grpc
from tests.support.stack import AgentProcess
from workload_api.client.client import WorkloadClient, X509Context


class FreshClient(WorkloadClient):
    """Shares no connection, and so no back-off, with the other clients of the test."""

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(
            self._target, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(self._channel)
        return self


async def until_end(client: WorkloadClient) -> SpiffeError:
    """How the agent ends the stream."""
    try:
        async for _ in client.watch_x509():
            pass
    except SpiffeError as error:
        return error
    raise AssertionError("a stream never ends well (IOP-10)")


def ids(context: X509Context) -> set[str]:
    """The paths of all SPIFFE IDs."""
    return {one.svid.spiffe_id.path for one in context.identities}


async def saved(agent: AgentProcess, svids: int) -> None:
    """Wait until the agent has *svids* SVIDs on its disk."""

    def there() -> bool:
        try:
            data = (agent.folder / "agent" / "cache.json").read_bytes()
        except FileNotFoundError:
            return False
        return len(json.loads(data.partition(b"\n")[2])["svids"]) >= svids

    await agent.process.until(there)


class Tally:
    """Workloads that ask without a pause, and what they were told."""

    def __init__(self) -> None:
        self.served = 0
        self.unavailable = 0

    def clients(self, endpoint: str) -> list[Any]:
        """Three of them."""
        return [
            self._ask(endpoint, lambda client: client.fetch_x509()),
            self._ask(endpoint, lambda client: client.fetch_jwt(("a",))),
            self._ask(endpoint, until_end),
        ]

    async def _ask(
        self, endpoint: str, ask: Callable[[WorkloadClient], Awaitable[Any]]
    ) -> None:
        while True:
            async with FreshClient(endpoint) as client:
                try:
                    while True:
                        answer = await ask(client)
                        if isinstance(answer, SpiffeError):
                            raise answer
                        self.served += 1
                        await asyncio.sleep(0.005)
                except SpiffeError as error:
                    assert error.kind is ErrorKind.NOT_READY, error
                    self.unavailable += 1
            await asyncio.sleep(0.01)
