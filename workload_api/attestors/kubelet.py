"""
This node's pods by asking its kubelet, for a node that has no way to the API server.

Source: SEC-34, SEC-35 (what is known of pods is at most 5 s old); components 4.4.  Over TLS, as
somebody, and verified; the read-only port is not spoken to.  A kubelet cannot be watched, and
its list is late: while somebody waits for a container it is asked again and again, at most four
times a second.  It knows neither namespaces nor accounts, so there is no ns-uid and no sa-uid.
"""

import asyncio
import logging
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from spiffe_core.errors import SpiffeError
from spiffe_wire.k8s.client import Client, ClusterError
from spiffe_wire.k8s.credentials import Access, Source
from spiffe_wire.k8s.objects import ObjectError, Pod, pod_of
from spiffe_wire.k8s.watch import AT_A_STRETCH, NOT_ASKED
from spiffe_wire.logs import event
from workload_api.attestors.pods import PodTable

_log = logging.getLogger(__name__)
INTERVAL: Final = timedelta(seconds=5)  # SEC-35
LEAST_PAUSE: Final = timedelta(milliseconds=250)
WANTED_FOR: Final = timedelta(seconds=5)
"""For how long a container that somebody waits for is asked after; so long is he waited for."""


def kubelet_access(access: Access, host: str, port: int, authorities: Path | None) -> Access:
    """Return the way to a kubelet at which we are who we are at the API server."""
    made = replace(access, host=host, port=port, path="", server_name="")
    if authorities is None:
        return made
    return replace(made, authorities=Source(authorities), described=str(authorities))


class KubeletPods:
    """Keeps *table* in step; see `PodSource`."""

    name = "the kubelet"

    def __init__(
        self, client: Client, table: PodTable, *, interval: timedelta = INTERVAL
    ) -> None:
        self._client = client
        self._table = table
        self._interval = interval.total_seconds()
        self._wanted = asyncio.Event()
        self._wanted_until = 0.0
        self.problem = NOT_ASKED
        """Why the table is not in step; empty while it is."""
        self._said = ""
        self._heard_at = time.monotonic()

    beside_problem = ""
    """It knows of nothing beside pods, and so nothing of that can fail."""

    @property
    def problems(self) -> list[str]:
        """As `problem`."""
        return [self.problem] if self.problem else []

    @property
    def away(self) -> timedelta:
        """For how long it has not been in step."""
        return timedelta(seconds=time.monotonic() - self._heard_at if self.problem else 0)

    def want(self) -> None:
        """Somebody waits for a container: ask at once, and until it is there."""
        self._wanted_until = time.monotonic() + WANTED_FOR.total_seconds()
        self._wanted.set()

    async def run(self) -> None:
        """Keep the table in step until cancelled."""
        while True:
            self._wanted.clear()
            try:
                await self._ask()
            except SpiffeError as error:
                self._failed(str(error))
            except Exception as error:  # noqa: BLE001 a mistake of ours, and no end of it
                event(_log, logging.ERROR, "kubelet_crashed", exc_info=error)
                self._failed("asking the kubelet failed; the log says why")
            await asyncio.sleep(LEAST_PAUSE.total_seconds())
            if self._table.awaited and time.monotonic() < self._wanted_until:
                continue
            try:
                async with asyncio.timeout(self._interval - LEAST_PAUSE.total_seconds()):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _ask(self) -> None:
        answer = await self._client.get("/pods")
        items = answer.get("items") or []  # none is `null`, as Go writes it
        if not isinstance(items, list):
            raise ClusterError("the kubelet's list of pods is not one")
        found: list[Pod] = []
        for number, item in enumerate(items, 1):
            self._parse(item, found)
            if number % AT_A_STRETCH == 0:
                await asyncio.sleep(0)
        self._table.replace(found)
        if self.problem:
            event(_log, logging.INFO, "kubelet_told", pods=len(found))
        self.problem, self._said, self._heard_at = "", "", time.monotonic()

    def _parse(self, item: Any, found: list[Pod]) -> None:
        try:
            found.append(pod_of(item))
        except ObjectError as error:
            event(_log, logging.ERROR, "object_skipped", of="/pods", why=str(error))

    def _failed(self, why: str) -> None:
        self.problem = why
        if why != self._said:
            self._said = why
            event(_log, logging.WARNING, "kubelet_failed", why=why)
