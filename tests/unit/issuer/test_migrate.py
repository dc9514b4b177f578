"""Migrations: where they are, what they make, what they refuse (SEC-95)."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from issuer.store import migrate
from issuer.store.engine import make_engine, prepare
from issuer.store.tables import metadata
from spiffe_core.errors import PreconditionError
from spiffe_core.spiffeid import TrustDomain
from tests.support.store import TD


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    """What the migrations make and what the code expects are the same."""
    engine = make_engine(tmp_path / "issuer.db")
    before = migrate.status(engine)
    assert before.current is None and not before.is_current
    assert migrate.upgrade(engine).is_current
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        found = inspect(connection)
        for table in metadata.sorted_tables:
            made = {(one["name"], bool(one["unique"])) for one in found.get_indexes(table.name)}
            assert made == {(str(one.name), one.unique) for one in table.indexes}
            kept = {
                tuple(one["column_names"]) for one in found.get_unique_constraints(table.name)
            }
            assert len(kept) == len(
                [one for one in table.constraints if type(one).__name__ == "UniqueConstraint"]
            )
    engine.dispose()


def test_upgrading_twice_does_nothing(tmp_path: Path) -> None:
    """A database of this release is left as it is."""
    for _ in range(2):
        prepare(tmp_path / "issuer.db", TD).dispose()
    with closing(sqlite3.connect(tmp_path / "issuer.db")) as connection:
        (epochs,) = connection.execute("SELECT count(*) FROM meta").fetchone()
    assert epochs == 1


def test_there_is_one_head() -> None:
    """Migrations are one line, numbered, each behind the other."""
    names = sorted(path.stem for path in (migrate.locate() / "versions").glob("*.py"))
    assert [name[:4] for name in names] == [f"{n:04}" for n in range(1, len(names) + 1)]


def test_numbers_are_what_alembic_reads() -> None:
    """The numbers in the file names are the revisions, in Alembic's own order."""
    config = Config()
    config.set_main_option("script_location", str(migrate.locate()))
    found = ScriptDirectory.from_config(config).walk_revisions()
    assert [one.revision for one in found][::-1] == migrate.revisions()


def test_a_current_database_opens_without_alembic(tmp_path: Path) -> None:
    """An ordinary start loads no migration tool."""
    prepare(tmp_path / "issuer.db", TD).dispose()
    code = (
        "import sys; from pathlib import Path; from issuer.store.engine import prepare; "
        "from spiffe_core.spiffeid import TrustDomain; "
        f"prepare(Path({str(tmp_path / 'issuer.db')!r}), TrustDomain({TD.name!r})).dispose(); "
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_issued_before_pods_were_recorded(tmp_path: Path) -> None:
    """A database of the first release keeps its record, and its release can write on."""
    path = tmp_path / "issuer.db"
    insert = (
        "INSERT INTO issued (kind, serial, spiffe_id, entry_id, authority_id, caller, "
        "issued_at, expires_at) VALUES ('x509', ?, 'spiffe://a.org/a', '', 'a', 'b', 1, 2)"
    )
    config = Config()
    config.set_main_option("script_location", str(migrate.locate()))
    engine = make_engine(path)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(insert, ("before",))
    assert migrate.status(engine).current == "0001"
    assert migrate.upgrade(engine).is_current
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(insert, ("after",))
        found = connection.execute("SELECT serial, pod_uid FROM issued ORDER BY row").fetchall()
    assert found == [("before", ""), ("after", "")]
    engine.dispose()


def test_several_schemas_are_refused(tmp_path: Path) -> None:
    """A database that names two schemas is left alone."""
    path = tmp_path / "issuer.db"
    prepare(path, TD).dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    with pytest.raises(PreconditionError, match="several schemas"):
        prepare(path, TD)


def test_sec_95_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """SEC-95: a database of a newer release is left alone, and the text says what to do."""
    path = tmp_path / "issuer.db"
    prepare(path, TD).dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(PreconditionError, match="schema 9999, newer than this release's"):
        prepare(path, TD)
    assert path.read_bytes() == before


def test_sec_95_another_trust_domain_is_refused(tmp_path: Path) -> None:
    """SEC-95: a changed trust domain on an existing database is refused with a way out."""
    path = tmp_path / "issuer.db"
    prepare(path, TD).dispose()
    with pytest.raises(
        PreconditionError, match=r"belongs to trust domain example\.org"
    ) as caught:
        prepare(path, TrustDomain("other.org"))
    assert "`data_dir`" in str(caught.value)
    prepare(path, TD).dispose()


def test_the_epoch_stays(tmp_path: Path) -> None:
    """Opening a database again does not begin a new epoch; two databases have two."""
    epochs = []
    for name in ("a", "a", "b"):
        prepare(tmp_path / name, TD).dispose()
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            epochs += connection.execute("SELECT epoch FROM meta").fetchone()
    assert epochs[0] == epochs[1] != epochs[2]
