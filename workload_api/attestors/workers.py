"""
Threads for what may block: file systems that the caller chose, and directory services.

A user can run a program from a file system of his own that never answers.  What hangs in it
hangs in a thread here, not in the event loop, and a user whose threads all hang is refused
until one comes back: the others go on.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from workload_api.attestors.protocol import AttestationError

_T = TypeVar("_T")


class Workers:
    """At most *at_once* threads, and *per_owner* for one owner; `close` waits for none."""

    def __init__(self, at_once: int, per_owner: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="attest")
        self._per_owner = per_owner
        self._busy: Counter[int] = Counter()

    async def run(self, owner: int, function: Callable[..., _T], *arguments: Any) -> _T:
        """
        Return what *function* returns, called in a thread on behalf of *owner*.

        Raises:
            AttestationError: all threads of *owner* are busy, which they are when they hang.
        """
        if self._busy[owner] >= self._per_owner:
            raise AttestationError("too many reads for this user have not come back")
        loop = asyncio.get_running_loop()

        def done(_: Future[_T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have closed meanwhile
                loop.call_soon_threadsafe(self._free, owner)

        self._busy[owner] += 1
        future = self._pool.submit(function, *arguments)
        # Freed when the thread is, not when the caller stops waiting for it.
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _free(self, owner: int) -> None:
        self._busy[owner] -= 1
        if not self._busy[owner]:
            del self._busy[owner]
