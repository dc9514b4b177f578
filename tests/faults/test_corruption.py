"""
Damaged files of server and agent (SEC-103; F-17 to F-19, sampled).

Whatever is damaged, a process refuses with a cause and a next step, or goes on with everything
that it had; it never begins anew in silence.
"""

import asyncio
import os
import random
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from ca.keys.protocol import pkcs8_of
from issuer.store.wal import is_whole
from tests.faults.workloads import FreshClient, ids, saved
from tests.support.forked import a_forked_server, a_forked_stack
from tests.support.records import Records, raw, records
from tests.support.stack import Process, Stack, a_folder

ENTRIES = 20
AT_ONCE = 3
ME = f"unix:uid:{os.getuid()}"
NEXT_STEP = re.compile(
    r"restore|chmod|move |remove |start again|set `?\w+`? back|run the newer release|`data_dir`"
)


@dataclass(frozen=True)
class Template:
    """Files of a server that has entries, and what was durable in them."""

    folder: Path
    before: Records

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """A folder with a copy of them, for one variant."""
        with a_folder() as folder:
            shutil.copytree(self.folder, folder / "server")
            yield folder


@dataclass(frozen=True)
class Outcome:
    """How a start went: refused with a text, or ready with these records."""

    text: str = ""
    after: Records | None = None


async def start(folder: Path, **changes: Any) -> Outcome:
    """Start a server on the files in *folder*, see how that goes, and kill it."""
    server = a_forked_server(folder, **changes)
    server.process.log.unlink(missing_ok=True)
    before = files(folder)
    server.process.start()
    try:
        while server.process.ended() is None:
            if server._ready_events():
                return Outcome(after=records(folder / "server"))
            await asyncio.sleep(0.01)
        assert server.process.ended() == 1, server.process.log.read_text()
        text = last_words(server.process)
        assert NEXT_STEP.search(text), text
        after = files(folder)
        if "left as it was" not in text:
            after, before = keys_of(after), keys_of(before)
        assert after == before, text
        return Outcome(text)
    finally:
        server.process.close()


def last_words(process: Process) -> str:
    """What a process said on standard error beside its log, in one line."""
    log = process.log.read_text()
    assert "Traceback" not in log, log
    words = [line for line in log.splitlines() if not line.startswith("{")]
    assert len(words) == 1, log
    return words[0]


def files(folder: Path) -> dict[str, bytes]:
    """The database, its log and the keys; an empty log is as good as none."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "server").rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }
    return {name: data for name, data in found.items() if data or not name.endswith("-wal")}


def keys_of(found: dict[str, bytes]) -> dict[str, bytes]:
    """The keys among them."""
    return {name: data for name, data in found.items() if "/keys/" in name}


def is_unchanged(outcome: Outcome, before: Records) -> bool:
    """Everything that gives identities is as it was."""
    after = outcome.after
    assert after is not None
    same = after.authorities == before.authorities and after.keys == before.keys
    return same and identities(after) == identities(before)


def identities(found: Records) -> set[tuple[Any, ...]]:
    """Who may be what."""
    return {(one.spiffe_id, one.parent_id, one.selectors) for one in found.entries.values()}


async def each(
    template: Template,
    variants: list[Any],
    spoil: Callable[[Path, Any], None],
    judge: Callable[[Outcome, Any], None],
) -> int:
    """Start a server on every variant, some at once; return how many were refused."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(variant: Any) -> bool:
        async with turn:
            with template.copied() as folder:
                spoil(folder / "server", variant)
                outcome = await start(folder)
                judge(outcome, variant)
                return outcome.after is None

    return sum(await asyncio.gather(*[one(variant) for variant in variants]))


async def made(folder: Path) -> AsyncIterator[Any]:
    server = a_forked_server(folder)
    await server.start()
    for number in range(ENTRIES):
        await server.add_entry(
            f"/w{number}", "/spire/agent/join_token/a", f"unix:uid:{number}", hint=f"h{number}"
        )
    yield server


@pytest.fixture(scope="module")
def stopped() -> Iterator[Template]:
    """Files of a server that was stopped in good order: one database file."""
    yield from _template(lambda process: process.stop())


@pytest.fixture(scope="module")
def killed() -> Iterator[Template]:
    """Files of a server that was killed: nearly all of it is in the write-ahead log."""
    yield from _template(lambda process: process.kill())


def _template(end: Callable[[Process], Any]) -> Iterator[Template]:
    async def run(folder: Path) -> None:
        async for server in made(folder):
            end(server.process)
            server.process.close()

    with a_folder() as folder:
        asyncio.run(run(folder))
        shutil.copytree(folder / "server", folder / "read")
        yield Template(folder / "server", records(folder / "read"))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    """Keep the first *length* bytes of a file."""
    os.truncate(path, length)


async def test_sec_103_flipped_bits_in_the_database(stopped: Template) -> None:
    """SEC-103, SEC-61: a flipped bit anywhere gives nobody another identity, nor a new CA."""
    size = (stopped.folder / "issuer.db").stat().st_size * 8
    chance = random.Random(3)

    def judge(outcome: Outcome, bit: int) -> None:
        assert outcome.after is None or is_unchanged(outcome, stopped.before), bit

    bits = [chance.randrange(size) for _ in range(24)]
    refused = await each(stopped, bits, lambda data, bit: flip(data / "issuer.db", bit), judge)
    assert refused, "some of them are found"


async def test_sec_103_a_flipped_bit_in_what_gives_identities(stopped: Template) -> None:
    """SEC-103: in a selector, in an ID, in an authority's life: always found, and named."""
    data = (stopped.folder / "issuer.db").read_bytes()
    needles = [b'[["unix","uid:7"]]', b"spiffe://example.org/w7", b"x509-", b"jwt-"]
    bits = [(data.index(one) + len(one) - 1) * 8 for one in needles]
    not_after = stopped.before.authorities[0].validity.not_after
    stored = round(not_after.timestamp() * 1e6).to_bytes(8, "big")
    bits += [(data.index(stored) + 2) * 8]

    def judge(outcome: Outcome, _: int) -> None:
        assert "damaged" in outcome.text

    assert len(bits) == await each(
        stopped, bits, lambda folder, bit: flip(folder / "issuer.db", bit), judge
    )


async def test_sec_103_a_database_cut_short(stopped: Template) -> None:
    """SEC-103, SEC-61: a database that lost its end, or everything, is never begun anew."""
    size = (stopped.folder / "issuer.db").stat().st_size
    chance = random.Random(4)
    lengths = [0, 1, 100, 4096, size - 1, *(chance.randrange(size) for _ in range(4))]

    def judge(outcome: Outcome, length: int) -> None:
        # The last byte of the last page may well belong to nothing.
        is_whole_enough = length == size - 1 and outcome.after is not None
        assert outcome.after is None or is_whole_enough, length
        assert outcome.after is None or is_unchanged(outcome, stopped.before)

    await each(stopped, lengths, lambda data, length: cut(data / "issuer.db", length), judge)


async def test_sec_103_flipped_bits_in_the_log(killed: Template) -> None:
    """
    SEC-103, SEC-61: a flipped bit in the write-ahead log is found, though SQLite would go on
    without everything behind it; in the last change alone it may pass for a torn end.
    """
    size = (killed.folder / "issuer.db-wal").stat().st_size * 8
    chance = random.Random(5)

    def judge(outcome: Outcome, bit: int) -> None:
        if bit < size - size // 20:
            assert "damaged" in outcome.text, bit
        elif outcome.after is not None:
            assert len(identities(killed.before) - identities(outcome.after)) <= 1, bit
            assert outcome.after.authorities == killed.before.authorities

    bits = [chance.randrange(size) for _ in range(6)] + [size - 99, size - 9999]
    await each(killed, bits, lambda data, bit: flip(data / "issuer.db-wal", bit), judge)


async def test_sec_103_a_log_cut_short(killed: Template) -> None:
    """
    SEC-103, SEC-61: a log that lost its end costs the changes in it, whole ones, and no other;
    one that takes the authorities along is refused.
    """
    size = (killed.folder / "issuer.db-wal").stat().st_size
    chance = random.Random(6)
    lengths = [0, size // 40, *(chance.randrange(size // 3, size) for _ in range(6))]

    def judge(outcome: Outcome, length: int) -> None:
        if outcome.after is None:
            assert "no record of them" in outcome.text
            return
        outcome.after.check()
        assert outcome.after.authorities == killed.before.authorities
        assert identities(outcome.after) <= identities(killed.before), length

    refused = await each(
        killed, lengths, lambda data, length: cut(data / "issuer.db-wal", length), judge
    )
    assert refused and is_whole(killed.folder / "issuer.db-wal")


KEYS: dict[str, Callable[[Path, Path], None]] = {
    "empty": lambda path, _: cut(path, 0),
    "cut": lambda path, _: cut(path, 70),
    "one byte less": lambda path, _: cut(path, path.stat().st_size - 1),
    "no key": lambda path, _: path.write_bytes(b"hello"),
    "too long": lambda path, _: path.write_bytes(b"x" * 20_000),
    "open to others": lambda path, _: path.chmod(0o640),
    "gone": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir())[0],
    "a link": lambda path, _: (path.rename(path.with_suffix(".real")),
                               path.symlink_to(path.with_suffix(".real")))[0],
    "the other key": lambda path, other: shutil.copyfile(other, path) and None,
    "another kind": lambda path, _: path.write_bytes(
        pkcs8_of(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    ) and None,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["x509", "jwt"])
async def test_sec_61_spoilt_keys(stopped: Template, kind: str) -> None:
    """SEC-61, SEC-103: whatever happened to a key, it is named, and no new one is made."""

    def spoil(data: Path, name: str) -> None:
        (path,) = (data / "keys").glob(f"{kind}-*")
        (other,) = set((data / "keys").iterdir()) - {path}
        KEYS[name](path, other)

    def judge(outcome: Outcome, name: str) -> None:
        assert outcome.after is None and f"{kind}-" in outcome.text, (name, outcome)

    await each(stopped, list(KEYS), spoil, judge)


async def test_sec_61_flipped_bits_in_keys(stopped: Template) -> None:
    """SEC-61, SEC-103: a flipped bit in a key is found, or changes nothing that it signs."""
    size = min(path.stat().st_size for path in (stopped.folder / "keys").iterdir()) * 8
    chance = random.Random(7)

    def spoil(data: Path, bit: int) -> None:
        flip(sorted((data / "keys").iterdir())[bit % 2], bit)

    def judge(outcome: Outcome, bit: int) -> None:
        assert outcome.after is None or is_unchanged(outcome, stopped.before), bit

    bits = [chance.randrange(size) for _ in range(10)]
    assert await each(stopped, bits, spoil, judge) > len(bits) // 2


async def test_sec_95_files_of_others(stopped: Template) -> None:
    """SEC-95, SEC-103: a newer schema, another trust domain, another program: each is named."""
    with stopped.copied() as folder:
        with raw(folder / "server") as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        assert "newer" in (await start(folder)).text
        # And no crash loop: a supervisor that tries again gets the same answer.
        assert "newer" in (await start(folder)).text
    with stopped.copied() as folder:
        refused = await start(folder, trust_domain="other.org")
        assert "example.org" in refused.text and "other.org" in refused.text
    with stopped.copied() as folder:
        (folder / "server" / "issuer.db").write_bytes(b"not a database at all" * 1000)
        assert "issuer.db" in (await start(folder)).text
    with stopped.copied() as folder:
        (folder / "server" / "issuer.db").unlink()
        assert "no record of them" in (await start_from_nothing(folder)).text
    with stopped.copied() as folder:
        with raw(folder / "server") as connection:
            connection.execute("DROP TABLE entries")
        outcome = await start(folder)
        assert outcome.after is None and "issuer.db" in outcome.text


async def start_from_nothing(folder: Path) -> Outcome:
    """As `start`, with no database, so that one is made before it is refused."""
    server = a_forked_server(folder)
    keys = sorted((folder / "server" / "keys").iterdir())
    server.process.start()
    try:
        assert await server.process.wait() == 1
        assert sorted((folder / "server" / "keys").iterdir()) == keys
        return Outcome(last_words(server.process))
    finally:
        server.process.close()


@asynccontextmanager
async def a_stack_with_an_svid() -> AsyncIterator[Stack]:
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        await saved(stack.agent, 1)
        yield stack


async def test_sec_103_an_agents_damaged_cache() -> None:
    """SEC-103: with a cache or a seal that is damaged the agent starts, says so, syncs anew."""
    chance = random.Random(8)
    async with a_stack_with_an_svid() as stack:
        data, cache = stack.folder / "agent", stack.folder / "agent" / "cache.json"
        size = cache.stat().st_size
        spoilt: list[Callable[[], None]] = [
            lambda: flip(cache, chance.randrange(size * 8)),
            lambda: cut(cache, chance.randrange(size)),
            lambda: flip(stack.folder / "a" / "seal.key", 7),
            lambda: (stack.folder / "a" / "seal.key").unlink(),
        ]
        for spoil in spoilt:
            assert await asyncio.to_thread(stack.agent.process.stop) == 0
            (data / "cache.damaged").unlink(missing_ok=True)
            spoil()
            await stack.agent.start()
            await stack.agent.until_svids(1)
            async with FreshClient(stack.agent.endpoint) as client:
                assert ids(await client.fetch_x509()) == {"/w"}
            await saved(stack.agent, 1)
        found = records(stack.folder / "server")
        assert found.audited("agent.attest", stack.agent.agent_id) == 1
        damaged = [
            one for one in stack.agent.process.events() if one["event"] == "cache_damaged"
        ]
        assert len(damaged) == 2


async def test_sec_103_an_agents_damaged_identity() -> None:
    """SEC-103, SEC-54: an agent whose own key is damaged says so, and does not join anew."""
    async with a_stack_with_an_svid() as stack:
        node = stack.folder / "agent" / "node.json"
        good = node.read_bytes()
        for bad in (b"", good.replace(b'"key"', b'"kez"')):
            assert await asyncio.to_thread(stack.agent.process.stop) in (0, 1)
            node.write_bytes(bad)
            log = stack.agent.process.log
            log.unlink()
            stack.agent.process.start()
            assert await stack.agent.process.wait() == 1
            text = last_words(stack.agent.process)
            assert "node.json" in text and NEXT_STEP.search(text)
            assert node.read_bytes() == bad, "left for whoever mends it"
        node.write_bytes(good)
        await stack.agent.start()
        found = records(stack.folder / "server")
        assert found.audited("agent.attest", stack.agent.agent_id) == 1
