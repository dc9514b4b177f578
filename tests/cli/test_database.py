"""``issuer db`` and ``issuer config``: the files of a server, while it runs and while not."""

import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import yaml

from issuer.cli import main
from tests.support.programs import DONE, REFUSED, Programs, Ran, called
from tests.support.stack import ServerProcess, a_folder, a_server

ISSUER = Programs().issuer


Issuer = Callable[..., Ran]


@pytest.fixture
def issuer(capsys: pytest.CaptureFixture[str]) -> Issuer:
    """``issuer`` in this process, for tests that need no server."""
    return partial(called, main, capsys)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name."""
    with a_folder() as made:
        yield made


@pytest.fixture
def server(folder: Path) -> ServerProcess:
    """A server that was not started: its settings are written."""
    return ServerProcess(folder)


def database_of(server: ServerProcess) -> Path:
    """The one database in the server's folder."""
    (found,) = (server.folder / "server").glob("*.db")
    return found


def test_status_and_upgrade(server: ServerProcess, issuer: Issuer) -> None:
    """No database is said so; upgrade makes it, private; then it is up to date."""
    none = issuer("db", "status", "-c", server.config)
    assert none.code == REFUSED
    assert "the server makes it, or `issuer db upgrade`" in none.err
    made = issuer("db", "upgrade", "-c", server.config, "-o", "json")
    assert made.code == DONE
    assert made.json["is_current"] is True
    assert stat.S_IMODE(database_of(server).stat().st_mode) == 0o600
    text = issuer("db", "status", "-c", server.config)
    assert (text.code, text.out.rpartition(": ")[2]) == (DONE, "up to date\n")


def test_sec_95_a_newer_schema(server: ServerProcess, issuer: Issuer) -> None:
    """SEC-95: a database of a newer release is refused, and the way out is named."""
    issuer("db", "upgrade", "-c", server.config)
    with sqlite3.connect(database_of(server)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    status = issuer("db", "status", "-c", server.config, "-o", "json")
    assert (status.code, status.json["current"]) == (REFUSED, "9999")
    upgrade = issuer("db", "upgrade", "-c", server.config)
    assert upgrade.code == REFUSED
    assert "run the newer release, or restore an older backup" in upgrade.err


def test_sec_103_what_is_no_database(server: ServerProcess, issuer: Issuer) -> None:
    """SEC-103: a damaged database is left as it is, and `issuer db restore` is named."""
    issuer("db", "upgrade", "-c", server.config)
    database = database_of(server)
    for beside in ("-wal", "-shm"):
        Path(f"{database}{beside}").unlink(missing_ok=True)
    database.write_bytes(b"x" * 8192)
    for command in ("status", "upgrade", "backup"):
        more = [server.folder / "copy"] if command == "backup" else []
        answer = issuer("db", command, "-c", server.config, *more)
        assert answer.code == REFUSED, command
        assert "`issuer db restore`" in answer.err or command == "backup"
    assert database.read_bytes() == b"x" * 8192


async def test_backup_and_restore() -> None:
    """A copy made while the server runs brings it back: entries, authority, a new epoch."""
    async with a_server() as server:
        await server.add_entry("/kept", "spiffe://example.org/spire/agent/x/y", "unix:uid:1")
        copy = server.folder / "copy.db"
        done = await ISSUER("db", "backup", "-c", server.config, copy)
        assert done.code == DONE
        assert done.out.startswith(f"copied to {copy}, ")
        assert f"keep a copy of {server.folder}/server/keys" in done.out
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        again = await ISSUER("db", "backup", "-c", server.config, copy, "-o", "json")
        assert (again.code, again.out) == (REFUSED, "")
        assert "is there already; nothing was changed" in again.err

        await server.add_entry("/later", "spiffe://example.org/spire/agent/x/y", "unix:uid:1")
        await server.join_token()
        in_use = await ISSUER("db", "restore", "-c", server.config, copy)
        assert in_use.code == REFUSED
        assert "stop the server and move it away first" in in_use.err
        before = await server.bundle_pem()
        server.process.stop()
        for one in (server.folder / "server").glob("*.db*"):
            one.rename(server.folder / one.name)

        restored = await ISSUER("db", "restore", "-c", server.config, copy, "-o", "json")
        assert restored.code == DONE, restored.err
        assert restored.json["tokens_dropped"] == 0
        await server.start()
        assert await server.bundle_pem() == before
        asked = Programs({"SPIFFE_ISSUER_SOCKET": str(server.admin_socket)})
        entries = (await asked.issuer("entry", "show", "-o", "json")).json["entries"]
        assert [one["spiffe_id"]["path"] for one in entries] == ["/kept"]
        assert int(entries[0]["revision_number"]) > 1_000_000


def test_restoring_what_is_not_ours(server: ServerProcess, issuer: Issuer) -> None:
    """Another domain's copy, or none at all, is refused, and no database is left behind."""
    issuer("db", "upgrade", "-c", server.config)
    database, copy = database_of(server), server.folder / "copy"
    assert list(database.parent.glob("*.db*")) == [database], "nothing is left lying about"
    issuer("db", "backup", "-c", server.config, copy)
    for one in database.parent.glob("*.db*"):
        one.unlink()
    other = yaml.safe_load(server.config.read_text())
    server.config.write_text(yaml.safe_dump({**other, "trust_domain": "other.org"}))
    (server.folder / "junk").write_bytes(b"x" * 4096)
    for source, why in (
        (copy, "belongs to trust domain example.org"),
        (server.folder / "junk", "cannot be restored: it is damaged"),
        (server.folder / "none", "there is no file"),
    ):
        answer = issuer("db", "restore", "-c", server.config, source)
        assert answer.code == REFUSED
        assert why in answer.err
        assert list(database.parent.glob("*.db*")) == []


async def test_two_servers_on_one_port(folder: Path) -> None:
    """A server that cannot have its port ends with 1 and names it, with no traceback."""
    async with a_server() as running:
        second = ServerProcess(folder, port=running.port)
        answer = await ISSUER("server", "run", "-c", second.config)
    assert answer.code == REFUSED
    assert str(running.port) in answer.err


def test_config_example_and_schema(tmp_path: Path, issuer: Issuer) -> None:
    """The example validates, and the schema accepts it, and refuses what the server refuses."""
    example, config = (issuer("config", "example")).out, tmp_path / "server.yaml"
    config.write_text(example)
    valid = issuer("config", "validate", "-c", config)
    assert (valid.code, valid.out) == (DONE, f"{config} is valid\n")
    schema = json.loads((issuer("config", "schema")).out)
    tree = yaml.safe_load(example)
    jsonschema.validate(tree, schema)
    for wrong in (
        {**tree, "no_such_key": 1},
        {**tree, "svids": {**tree["svids"], "x509_ttl": "soon"}},
        {**tree, "log_style": "loud"},
        {key: value for key, value in tree.items() if key != "trust_domain"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("trust_domain: example.org\nsvids: {x509_tl: 1h}\n", "svids.x509_tl: no such setting"),
        ("trust_domain: example.org\nsvids: {x509_ttl: soon}\n", "svids.x509_ttl: a duration"),
        ("trust_domain: a\ntrust_domain: b\n", "trust_domain: the key is there twice"),
        ("{}", "trust_domain: must be set"),
        ("- a\n", "settings must be keys and values"),
        ("a: [", "settings are not YAML"),
        ("trust_domain: !!python/object/apply:os.system [id]\n", "settings are not YAML"),
    ],
)
def test_sec_95_settings_that_cannot_be(
    tmp_path: Path, text: str, why: str, issuer: Issuer
) -> None:
    """SEC-95: settings are refused with the path of the key, by validate and by run alike."""
    config = tmp_path / "server.yaml"
    config.write_text(text)
    answer = issuer("config", "validate", "-c", config, "-o", "json")
    assert (answer.code, answer.out) == (REFUSED, "")
    assert why in answer.err


def test_settings_that_cannot_be_read(server: ServerProcess, issuer: Issuer) -> None:
    """Settings that are not there, or not text, are refused, and a start is offered."""
    missing = issuer("server", "run", "-c", server.folder / "none.yaml")
    assert missing.code == REFUSED
    assert "`issuer config example` prints one to start from" in missing.err
    server.config.write_bytes(os.urandom(64) + b"\xff")
    binary = issuer("config", "validate", "-c", server.config)
    assert binary.code == REFUSED
    assert "it is not UTF-8 text" in binary.err
