"""Threads for what may hang, and names from a directory that may."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from workload_api.attestors.names import Names, group_name, user_name
from workload_api.attestors.protocol import AttestationError
from workload_api.attestors.workers import Workers


class Gate:
    """A blocking call that comes back when it is let."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls = 0

    def __call__(self, number: int = 0) -> str:
        self.calls += 1
        assert self.open.wait(10)
        return f"name-{number}"


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is opened in the end, so that no thread stays behind."""
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Four threads, three of them for one owner."""
    workers = Workers(4, 3)
    yield workers
    workers.close()


async def test_one_whose_threads_hang_is_refused(workers: Workers, gate: Gate) -> None:
    """SEC-81: a user whose files never answer uses up his own threads, and nobody else's."""
    hung = [asyncio.create_task(workers.run(1, gate)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(AttestationError, match="not come back"):
        await workers.run(1, int)
    assert await workers.run(2, int) == 0
    gate.open.set()
    await asyncio.gather(*hung)


async def test_giving_up_does_not_free_a_thread(workers: Workers, gate: Gate) -> None:
    """A thread that still hangs counts, though nobody waits for it any more."""
    hung = [asyncio.create_task(workers.run(1, gate)) for _ in range(3)]
    while gate.calls < 3:
        await asyncio.sleep(0.001)
    for task in hung:
        task.cancel()
    await asyncio.gather(*hung, return_exceptions=True)
    with pytest.raises(AttestationError):
        await workers.run(1, int)
    gate.open.set()
    async with asyncio.timeout(5):
        while True:
            try:
                assert await workers.run(1, int) == 0
                break
            except AttestationError:
                await asyncio.sleep(0.001)


async def test_what_a_function_raises_is_raised(workers: Workers) -> None:
    """An error in the thread is the caller's, and frees the thread."""
    for _ in range(5):
        with pytest.raises(ValueError):
            await workers.run(1, int, "x")


async def test_names_are_asked_for_once(workers: Workers, gate: Gate) -> None:
    """Many who want one name at once ask the directory once, and later ones not at all."""
    names = Names(gate, workers)
    asked = [asyncio.create_task(names.of(7)) for _ in range(20)]
    await asyncio.sleep(0)
    gate.open.set()
    assert await asyncio.gather(*asked) == ["name-7"] * 20
    assert await names.of(7) == "name-7"
    assert gate.calls == 1


async def test_a_directory_that_hangs(
    workers: Workers, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-35: a directory that never answered is said to be what is missing."""
    monkeypatch.setattr("workload_api.attestors.names.PATIENCE", 0.01)
    names = Names(gate, workers)
    with pytest.raises(AttestationError, match="directory"):
        await names.of(7)
    gate.open.set()
    async with asyncio.timeout(5):
        while names._asked:
            await asyncio.sleep(0.001)
    assert await names.of(7) == "name-7"


async def test_a_name_that_was_known_serves_on(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that hangs later takes no name away that it gave."""
    monkeypatch.setattr("workload_api.attestors.names.PATIENCE", 0.01)
    monkeypatch.setattr("workload_api.attestors.names.FRESH_SECONDS", 0.0)
    gate = Gate()
    gate.open.set()
    names = Names(gate, workers)
    assert await names.of(7) == "name-7"
    gate.open.clear()
    assert await names.of(7) == "name-7"
    assert gate.calls == 2
    gate.open.set()


def test_names_of_this_machine() -> None:
    """Root has its name, and a number that nobody has has none."""
    assert user_name(0) == "root" and group_name(0) == "root"
    assert user_name(4_000_000_000) is None and group_name(4_000_000_000) is None
