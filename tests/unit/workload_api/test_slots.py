"""Slots of attestation: a few at once, and in turn, user by user."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workload_api.attestors.slots import Slots


class Crowd:
    """Callers that hold a slot until they are told to leave."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.inside: list[int] = []
        self.order: list[int] = []
        self._tasks: list[tuple[int, asyncio.Task[None], asyncio.Event]] = []

    async def come(self, *uids: int) -> None:
        for uid in uids:
            leave = asyncio.Event()
            self._tasks.append((uid, asyncio.create_task(self._stay(uid, leave)), leave))
        await settle()

    async def leave(self, uid: int) -> None:
        """One of *uid* that is inside goes."""
        for _, task, leave in self._tasks:
            if task.get_name() == f"in-{uid}" and not leave.is_set() and not task.done():
                leave.set()
                await settle()
                return
        raise AssertionError(f"nobody of {uid} is inside")

    async def give_up(self, index: int) -> None:
        """A caller, inside or waiting, is cancelled."""
        _, task, _ = self._tasks[index]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await settle()

    async def end(self) -> None:
        for _, task, _ in self._tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task, _ in self._tasks), return_exceptions=True)

    async def _stay(self, uid: int, leave: asyncio.Event) -> None:
        async with self.slots.slot(uid):
            asyncio.current_task().set_name(f"in-{uid}")
            self.inside.append(uid)
            self.order.append(uid)
            try:
                await leave.wait()
            finally:
                self.inside.remove(uid)


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_than_the_limit_is_inside() -> None:
    """SEC-80: 32 are attested at once, and the 33rd waits until one is done."""
    crowd = Crowd(Slots(32, 32))
    await crowd.come(*range(33))
    assert len(crowd.inside) == 32
    await crowd.leave(0)
    assert len(crowd.inside) == 32 and 32 in crowd.inside
    await crowd.end()


async def test_one_user_leaves_room_for_the_others() -> None:
    """SEC-81: a user with a thousand calls holds his share, and another is served at once."""
    crowd = Crowd(Slots(32, 24))
    await crowd.come(*[1000] * 1000)
    assert crowd.inside == [1000] * 24
    await crowd.come(1001)
    assert 1001 in crowd.inside
    await crowd.end()


async def test_who_waits_is_served_user_by_user() -> None:
    """SEC-81: with every slot taken, the next ones go round the users, not down one queue."""
    crowd = Crowd(Slots(1, 1))
    await crowd.come(1, 1, 1, 1, 2, 2, 3)
    for _ in range(6):
        await crowd.leave(crowd.inside[0])
    assert crowd.order == [1, 1, 2, 3, 1, 2, 1]
    await crowd.end()


async def test_a_caller_who_gives_up_takes_no_slot_along() -> None:
    """A slot that was given to a caller who went away meanwhile goes to the next one."""
    slots = Slots(1, 1)
    async with slots.slot(1):
        first = asyncio.create_task(_hold(slots, 1))
        second = asyncio.create_task(_hold(slots, 2))
        await settle()
    first.cancel()  # given its turn in this very step, and never runs
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.wait_for(second, 1)
    assert slots.held == 0


async def _hold(slots: Slots, uid: int) -> None:
    async with slots.slot(uid):
        await asyncio.sleep(0)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("give up"), st.integers(0, 30)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_nobody_waits_while_he_could_go(steps: list[tuple[str, int]]) -> None:
    """SEC-81: whatever happens, limits hold, and a free slot is never kept from a waiter."""

    async def run() -> None:
        crowd = Crowd(Slots(4, 3))
        for step, number in steps:
            if step == "come":
                await crowd.come(number)
            elif step == "leave" and crowd.inside:
                await crowd.leave(crowd.inside[number % len(crowd.inside)])
            elif step == "give up" and crowd._tasks:
                await crowd.give_up(number % len(crowd._tasks))
            assert len(crowd.inside) == crowd.slots.held <= 4
            assert max((crowd.inside.count(uid) for uid in crowd.inside), default=0) <= 3
            waiting = [
                uid for uid, task, _ in crowd._tasks
                if not task.done() and not task.get_name().startswith("in-")
            ]  # fmt: skip
            if len(crowd.inside) < 4:
                assert all(crowd.inside.count(uid) == 3 for uid in waiting)
        await crowd.end()
        assert crowd.slots.held == 0 and not crowd.slots._waiting

    asyncio.run(run())
