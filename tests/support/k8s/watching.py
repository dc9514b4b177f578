"""Watches: events of what a selector sees, bookmarks, and the ways in which they end."""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.support.k8s.answers import META, PARTIAL, abort, dumped, partial
from tests.support.k8s.resources import Resource
from tests.support.k8s.status import ApiError
from tests.support.k8s.store import Body, Change, Store

END = object()
ABORT = object()


class Watch:
    """One open watch."""

    def __init__(
        self,
        store: Store,
        resource: Resource,
        sees: Callable[[Body], bool],
        *,
        is_partial: bool,
        bookmarks: bool,
        user: str,
        gate: asyncio.Event,
    ) -> None:
        self.store = store
        self.resource = resource
        self.user = user
        self._gate = gate
        self._sees = sees
        self._is_partial = is_partial
        self._bookmarks = bookmarks
        self._lines: asyncio.Queue[Any] = asyncio.Queue()
        self._unsubscribe: Callable[[], None] = lambda: None
        self.silent = False

    def begin(self, since: int | None) -> None:
        """
        Take up all changes after *since*; without it what is there comes first, as ADDED.

        A version that is compacted away makes an ERROR event: by then the answer has begun.
        """
        try:
            if since is None:
                for body in self.store.objects(self.resource):
                    if self._sees(body):
                        self._send("ADDED", body)
            else:
                for change in self.store.changes_after(since):
                    self._tell(change)
        except ApiError as error:
            self.fail(error)
            return
        self._unsubscribe = self.store.subscribe(self._tell)

    def end(self) -> None:
        """End the answer well, as the API server does when the time is over."""
        self._lines.put_nowait(END)

    def abort(self) -> None:
        """Break the connection."""
        self._lines.put_nowait(ABORT)

    def fail(self, error: ApiError) -> None:
        """Send an ERROR event and end."""
        self._lines.put_nowait(dumped({"type": "ERROR", "object": error.body}))
        self.end()

    def bookmark(self, version: int | None = None) -> None:
        """Say which version all that was sent so far is of, if the client asked for that."""
        if not self._bookmarks:
            return
        meta = {
            "resourceVersion": str(version or self.store.version),
            "creationTimestamp": None,
        }
        if self._is_partial:
            body: Body = {"kind": PARTIAL, **META, "metadata": meta}
        else:
            kinds = {"kind": self.resource.kind, "apiVersion": self.resource.api_version}
            body = {**kinds, "metadata": meta}
            if self.resource.plural == "pods":
                body |= {"spec": {"containers": None}, "status": {}}
        self._lines.put_nowait(dumped({"type": "BOOKMARK", "object": body}))

    def raw(self, line: bytes) -> None:
        """Send bytes as they are, such as half a line."""
        self._lines.put_nowait(line)

    def close(self) -> None:
        """Hear no more."""
        self._unsubscribe()

    def _tell(self, change: Change) -> None:
        if change.resource.plural != self.resource.plural or self.silent:
            return
        if change.resource.group != self.resource.group:
            return
        before = change.before is not None and self._sees(change.before)
        after = change.after is not None and self._sees(change.after)
        if after:
            self._send("MODIFIED" if before else "ADDED", change.after or {})
        elif before:
            # It left the selector or the cluster: what it was, with the version of the change.
            gone = change.before or {}
            meta = gone["metadata"] | {"resourceVersion": str(change.version)}
            self._send("DELETED", gone | {"metadata": meta})

    def _send(self, kind: str, body: Body) -> None:
        shown = partial(body) if self._is_partial else body
        self._lines.put_nowait(dumped({"type": kind, "object": shown}))

    async def serve(self, request: web.BaseRequest, answer: web.StreamResponse) -> None:
        """Write lines, while the gate is open, until something ends it."""
        while True:
            line = await self._lines.get()
            await self._gate.wait()
            if line is END:
                await answer.write_eof()
                return
            if line is ABORT:
                abort(request)
                return
            await answer.write(line)
