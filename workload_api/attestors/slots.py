"""Who is attested next: a few at once, and no user at the cost of another (SEC-80, SEC-81)."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """
    At most *at_once* holders, and *per_uid* of one user; who waits is served user by user.

    A plain semaphore is first come, first served: a user with ten thousand calls would be
    ten thousand turns ahead of everybody else.
    """

    def __init__(self, at_once: int, per_uid: int) -> None:
        self._at_once = at_once
        self._per_uid = per_uid
        self._held: Counter[int] = Counter()
        self._waiting: OrderedDict[int, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def slot(self, uid: int) -> AsyncIterator[None]:
        """Hold a slot of *uid* while entered."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given, and nobody is there to take it
                self._give_back(uid)
            raise
        try:
            yield
        finally:
            self._give_back(uid)

    @property
    def held(self) -> int:
        """How many slots are held."""
        return self._held.total()

    def _give_back(self, uid: int) -> None:
        self._held[uid] -= 1
        if not self._held[uid]:
            del self._held[uid]
        self._hand_out()

    def _hand_out(self) -> None:
        for uid in list(self._waiting):
            if self._held.total() >= self._at_once:
                return
            if self._held[uid] < self._per_uid:
                self._serve(uid)

    def _serve(self, uid: int) -> None:
        queue = self._waiting.pop(uid)
        while queue:
            turn = queue.popleft()
            if not turn.done():
                self._held[uid] += 1
                turn.set_result(None)
                break
        if queue:
            self._waiting[uid] = queue  # behind everybody else
