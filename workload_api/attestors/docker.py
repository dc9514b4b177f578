"""
The ``docker`` attestor: containers of Docker, or of Podman, on this machine.

Source: SPIRE API 10, SEC-33, SEC-34, SEC-35.  ``label`` and ``env`` are chosen by whoever
starts the container or built its image, ``image_id`` by whoever starts it, and it is a name,
which can be moved.  ``container_id`` and ``image_config_digest`` nobody chooses.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Final

from spiffe_core.selector import Selector
from spiffe_core.text import utf8_bytes
from spiffe_wire.frontdoor.peer import UnixPeer
from workload_api.attestors.cgroup import (
    ENGINE_PREFIXES,
    CgroupLayout,
    CgroupView,
    ContainerRef,
    container_of,
    read_cgroup,
)
from workload_api.attestors.cgroupns import own_view
from workload_api.attestors.engine import TIMEOUT, Engine, Inspected
from workload_api.attestors.protocol import AttestationError, Finding

FRESH: Final = timedelta(seconds=5)  # SEC-35
KEPT: Final = 1024


class DockerAttestor:
    """Names the container of whoever is in one; see `WorkloadAttestor`."""

    type: ClassVar[str] = "docker"

    def __init__(
        self,
        *,
        socket: Path,
        prefixes: Sequence[str] = ENGINE_PREFIXES,
        env: bool = False,
        view: CgroupView | None = None,
        timeout: timedelta = TIMEOUT,
        read: Callable[[int], bytes] = read_cgroup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Without *view* it blocks for milliseconds, to learn how paths read from here.

        Raises:
            PrefixError: one of *prefixes* can match nothing.
        """
        self._engine = Engine(socket, timeout=timeout)
        self._layout = CgroupLayout.engine(prefixes)
        self._view = own_view() if view is None else view
        self._env = env
        self._read = read
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Finding]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Finding]] = {}

    async def attest(self, peer: UnixPeer) -> Finding:
        """See `WorkloadAttestor`; asks the engine once in five seconds for each container."""
        ref = self._container(peer.pid)
        if ref is None:
            return Finding()
        found = await self._finding(ref.container_id)
        if self._container(peer.pid) != ref:
            raise AttestationError("the process was moved to another cgroup meanwhile")
        return found

    def close(self) -> None:
        """Stop whatever is under way."""
        for task in self._asked.values():
            task.cancel()

    def _container(self, pid: int) -> ContainerRef | None:
        return container_of(self._read(pid), self._layout, self._view)

    async def _finding(self, container_id: str) -> Finding:
        known = self._known.get(container_id)
        if known is not None and self._clock() < known[0]:
            return known[1]
        task = self._asked.get(container_id)
        if task is None:
            task = asyncio.ensure_future(self._ask(container_id))
            self._asked[container_id] = task
            task.add_done_callback(lambda done: self._answered(container_id, done))
        # It goes on when the caller's time is up: others wait for the same.
        return await asyncio.shield(task)

    async def _ask(self, container_id: str) -> Finding:
        asked_at = self._clock()  # the answer may be that old when it comes
        inspected = await self._engine.inspect(container_id)
        found = self._described(inspected)
        self._known.pop(container_id, None)
        self._known[container_id] = asked_at + FRESH.total_seconds(), found
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found

    def _answered(self, container_id: str, task: "asyncio.Task[Finding]") -> None:
        del self._asked[container_id]
        if not task.cancelled():
            task.exception()  # whoever waited was told; nobody may have

    def _described(self, inspected: Inspected) -> Finding:
        container = inspected.container
        values = {f"container_id:{container.id}"}
        values |= {f"label:{key}:{value}" for key, value in container.labels.items()}
        if container.image:
            values.add(f"image_id:{container.image}")
        if inspected.image_digest is not None:
            values.add(f"image_config_digest:{inspected.image_digest}")
        if self._env:
            values |= {f"env:{one}" for one in container.env}
        # JSON can carry what is no UTF-8; no entry can name that.
        selectors = frozenset(
            Selector(self.type, one) for one in values if utf8_bytes(one) is not None
        )
        return Finding(selectors, missing=inspected.missing)
