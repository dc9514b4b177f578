"""The write-ahead log, judged before SQLite reads it; SQLite itself is the oracle (SEC-103)."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from issuer.store.wal import is_whole

ROWS = 24
HEADER_BYTES = 32
FRAME_BYTES = 24 + 4096


def write(path: Path, rows: int, blob: int = 6000) -> sqlite3.Connection:
    """Commit *rows* rows of several pages each, one by one; the log stays as it is."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, blob BLOB)")
    for _ in range(rows):
        connection.execute("INSERT INTO t (blob) VALUES (randomblob(?))", (blob,))
    return connection


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database and its log, as a process that was killed leaves them."""
    folder = tmp_path_factory.mktemp("wal")
    with closing(write(folder / "live.db", ROWS)):
        for end in ("", "-wal"):
            shutil.copy(folder / f"live.db{end}", folder / f"a.db{end}")
        yield folder / "a.db"


def copied(database: Path, folder: Path, log: bytes) -> Path:
    """The database with another log."""
    made = folder / "b.db"
    shutil.copy(database, made)
    made.with_name("b.db-wal").write_bytes(log)
    made.with_name("b.db-shm").unlink(missing_ok=True)
    return made


def recovered(database: Path) -> int:
    """How many rows SQLite finds; it changes the files."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def log_of(database: Path) -> Path:
    return database.with_name(f"{database.name}-wal")


def test_sec_103_no_log_and_whole_logs(killed: Path, tmp_path: Path) -> None:
    """SEC-103: a log that is absent, empty, begun or complete is whole."""
    assert is_whole(log_of(killed))
    assert is_whole(tmp_path / "nothing-wal")
    for length in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1):
        cut = copied(killed, tmp_path, log_of(killed).read_bytes()[:length])
        assert is_whole(log_of(cut)), length


def test_sec_101_a_torn_end_is_whole(killed: Path, tmp_path: Path) -> None:
    """SEC-101: a log cut anywhere, as kill and power cuts leave it, is whole."""
    data = log_of(killed).read_bytes()
    chance = random.Random(1)
    for _ in range(60):
        made = copied(killed, tmp_path, data[: chance.randrange(len(data))])
        assert is_whole(log_of(made))


def test_sec_103_no_flipped_bit_loses_a_commit_unseen(killed: Path, tmp_path: Path) -> None:
    """
    SEC-103: wherever a bit flips, either the log is judged damaged, or SQLite still finds
    every commit but the last, which a power cut could have torn as well.
    """
    data = log_of(killed).read_bytes()
    chance = random.Random(2)
    seen = 0
    for _ in range(150):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        made = copied(killed, tmp_path, bytes(flipped))
        if is_whole(log_of(made)):
            assert recovered(made) >= ROWS - 1
        else:
            assert recovered(made) < ROWS, "what is called damaged is"
            seen += 1
    assert seen > 100


def test_sec_103_every_bit_of_the_header_counts(killed: Path, tmp_path: Path) -> None:
    """SEC-103: a damaged header, after which SQLite ignores the whole log, is seen."""
    data = log_of(killed).read_bytes()
    for bit in range(HEADER_BYTES * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        made = copied(killed, tmp_path, bytes(flipped))
        assert not is_whole(log_of(made)), bit


def test_sec_101_a_last_commit_with_a_hole_is_whole(killed: Path, tmp_path: Path) -> None:
    """SEC-101: any page of a last commit may be missing after a power cut: nobody was told."""
    with closing(write(tmp_path / "live.db", 2, blob=60_000)):
        data = (tmp_path / "live.db-wal").read_bytes()
    frames = (len(data) - HEADER_BYTES) // FRAME_BYTES
    for frame in range(frames - 10, frames):
        torn = bytearray(data)
        start = HEADER_BYTES + frame * FRAME_BYTES
        torn[start : start + FRAME_BYTES] = bytes(FRAME_BYTES)
        made = copied(killed, tmp_path, bytes(torn))
        assert is_whole(log_of(made)), frame


def test_sec_103_older_frames_behind_the_end(tmp_path: Path) -> None:
    """SEC-103: a log that SQLite began to write from the front again is whole at every step."""
    path = tmp_path / "live.db"
    with closing(write(path, 8)) as connection:
        length = log_of(path).stat().st_size
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        for _ in range(5):
            connection.execute("INSERT INTO t (blob) VALUES (randomblob(6000))")
            assert log_of(path).stat().st_size == length, "the old frames are still behind"
            assert is_whole(log_of(path))
