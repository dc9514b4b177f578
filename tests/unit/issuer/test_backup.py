"""Copies of the database, and the way back (SEC-64, BUNDLE-08)."""

import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from issuer.store import backup
from issuer.store.agents import TokenError
from issuer.store.store import Repositories
from spiffe_core.errors import AlreadyExistsError, PreconditionError
from tests.support.store import NOW, StoppedClock, a_store, an_agent, an_entry, node_id


def seed(repos: Repositories) -> None:
    """Something of each kind that a restore has to think of."""
    repos.entries.create(an_entry(id="e"))
    repos.agents.attested(an_agent())
    repos.tokens.add("tok", "secret" * 4, NOW + timedelta(minutes=10))
    repos.audit.add("entry.create", "e")


def epoch_of(path: Path) -> str:
    """The epoch of the database at *path*."""
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT epoch FROM meta").fetchone()[0])


async def test_sec_64_a_restored_database_is_not_taken_for_the_present(tmp_path: Path) -> None:
    """SEC-64, BUNDLE-08: new epoch, no token to use again, higher numbers, all the rest."""
    copy = tmp_path / "copy.db"
    async with a_store(tmp_path / "old") as store:
        await store.write(seed)
        backup.backup(store.path, copy)  # while it is in use
        await store.write(lambda repos: repos.tokens.consume("tok", "secret" * 4, b"key"))
        await store.write(lambda repos: repos.entries.update(an_entry(hint="later", id="e")))
        old = await store.read(lambda repos: repos.authorities.bundle().sequence_number)
    path = tmp_path / "new" / "store" / "issuer.db"
    done = backup.restore(copy, path, now=NOW, actor="root")
    assert done.tokens_dropped == 1 and done.epoch == epoch_of(path) != epoch_of(copy)
    assert path.stat().st_mode & 0o777 == copy.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["issuer.db"]
    async with a_store(tmp_path / "new") as store:
        with pytest.raises(TokenError):
            await store.write(lambda repos: repos.tokens.consume("tok", "secret" * 4, b"k"))
        entry = await store.read(lambda repos: repos.entries.get("e"))
        assert entry.revision_number > 1
        assert await store.read(lambda repos: repos.agents.get(node_id("a"))) == an_agent()
        assert old < await store.read(lambda r: r.authorities.bundle().sequence_number)
        rows = await store.read(lambda repos: repos.audit.rows())
        assert [(one.actor, one.action) for one in rows][-1] == ("root", "store.restore")
        assert await store.read(lambda repos: repos.audit.broken_at()) is None


async def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Neither a copy nor a restore replaces a file, or meets what is left of a database."""
    async with a_store(tmp_path) as store:
        path = store.path
    copy = tmp_path / "copy.db"
    backup.backup(path, copy)
    with pytest.raises(AlreadyExistsError):
        backup.backup(path, copy)
    with pytest.raises(AlreadyExistsError, match="move it away"):
        backup.restore(copy, path, now=NOW, actor="root")
    path.rename(tmp_path / "away.db")
    Path(f"{path}-wal").write_bytes(b"left")
    with pytest.raises(AlreadyExistsError, match="-wal"):
        backup.restore(copy, path, now=NOW, actor="root")


def test_sec_103_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    """SEC-103: what is no database, or is not there, is neither copied nor restored."""
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    path = tmp_path / "new.db"
    with pytest.raises(PreconditionError):
        backup.restore(bad, path, now=NOW, actor="root")
    with pytest.raises(PreconditionError):
        backup.restore(tmp_path / "none.db", path, now=NOW, actor="root")
    with pytest.raises(PreconditionError):
        backup.backup(tmp_path / "none.db", tmp_path / "copy.db")
    assert not path.exists() and not (tmp_path / "copy.db").exists()


async def test_a_stopped_restore_can_be_done_again(tmp_path: Path) -> None:
    """What a killed restore left in the way is cleared."""
    async with a_store(tmp_path, StoppedClock()) as store:
        path = store.path
    (tmp_path / "new.db.restoring").write_bytes(b"half")
    (tmp_path / "new.db.restoring-wal").write_bytes(b"half")
    backup.restore(path, tmp_path / "new.db", now=NOW, actor="root")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new.db", "store"]
