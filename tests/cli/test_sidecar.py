"""``issuer-agent sidecar``: files as the settings say, and who is told when they change."""

import asyncio
import json
import logging
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from spiffe_core.pem import certificates_from_pem
from tests.support.children import a_python
from tests.support.programs import (
    DONE,
    REFUSED,
    USAGE,
    Ran,
    called,
    openssl_key_fits,
    openssl_verifies,
)
from tests.support.stack import Process, a_folder
from workload_api.agent.cli import main
from workload_api.client.testing import FakeIdentity, FakeWorkloadApi

SIDECAR = [sys.executable, "-m", "workload_api.agent", "sidecar"]
# It writes past the buffer of `print`, which may be busy when the signal comes.
COUNTS = """
import os, signal, sys
heard = 0
def count(*_):
    global heard
    heard += 1
    os.write(1, f"{heard}\\n".encode())
signal.signal(signal.SIGUSR1, count)
os.write(1, b"up\\n")
while True:
    signal.pause()
"""
"""A program that says how often it was signalled."""


@dataclass
class Sidecar:
    """A sidecar of *fake* that runs as a process, on files in *folder*."""

    folder: Path
    fake: FakeWorkloadApi
    changes: Mapping[str, Any] = field(default_factory=dict)
    wrapped_in: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.dir = self.folder / "svids"
        self.config = self.folder / "sidecar.yaml"
        made = {"dir": str(self.dir), "x509": [{}], "settle": "20ms", **self.changes}
        self.config.write_text(yaml.safe_dump(made))
        self.process = Process(
            [*self.wrapped_in, *SIDECAR, "-c", str(self.config)],
            self.folder / "sidecar.log", self.fake.environment,
        )  # fmt: skip

    async def written(self, sets: int = 1) -> dict[str, Any]:
        """Wait until it has written so many sets of files; return the event of the last."""

        def enough() -> Any:
            found = self.events("files_written")
            return found[-1] if len(found) >= sets else None

        event: dict[str, Any] = await self.process.until(enough)
        return event

    async def said(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait until it logs an event of this name with these fields."""

        def found() -> Any:
            return next((e for e in self.events(name) if fields.items() <= e.items()), None)

        event: dict[str, Any] = await self.process.until(found)
        return event

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its events of one name."""
        return [one for one in self.process.events() if one.get("event") == name]

    def names(self) -> set[str]:
        """The files that are there for others."""
        return {one.name for one in self.dir.glob("[!.]*") if one.exists()}

    async def status(self, path: str) -> tuple[int, str]:
        """What its status port says of *path*."""
        port = (await self.said("status_ready"))["port"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split()[1]), body


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name."""
    with a_folder() as made:
        yield made


@pytest.fixture
def fake() -> Iterator[FakeWorkloadApi]:
    """An agent for which we are ``/web``, and ``/api`` by the hint ``api``."""
    with FakeWorkloadApi("/web", FakeIdentity("/api", "api"), federated=["p.test"]) as made:
        yield made


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What runs in this process sets up its log; the next test has its own."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


Start = Callable[..., Sidecar]


@pytest.fixture
def start(folder: Path, fake: FakeWorkloadApi) -> Iterator[Start]:
    """Start a sidecar; it is ended with the test."""
    started: list[Sidecar] = []

    def begin(wrapped_in: tuple[str, ...] = (), **changes: Any) -> Sidecar:
        made = Sidecar(folder, fake, changes, wrapped_in)
        made.process.start()
        started.append(made)
        return made

    yield begin
    for one in started:
        one.process.close()
        log = one.process.log.read_text()
        assert "Traceback" not in log, log
        assert "PRIVATE KEY" not in log


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command of ours in this process."""
    return lambda *arguments: called(main, capsys, "sidecar", *arguments)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_its_settings(run: Callable[..., Ran], folder: Path) -> None:
    """The example is valid by --check and by --schema; a mistake is refused with its path."""
    file = folder / "sidecar.yaml"
    file.write_text(run("--example").out)
    answer = run("-c", file, "--check")
    assert (answer.code, answer.out) == (DONE, f"{file} is valid\n")
    schema = json.loads(run("--schema").out)
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    file.write_text("dir: /x\nx509: [{hnt: a}]\n")
    wrong = run("-c", file, "--check")
    assert (wrong.code, wrong.out) == (REFUSED, "")
    assert wrong.err.startswith("x509[0].hnt: no such setting; known here: ")


def test_without_settings(run: Callable[..., Ran], folder: Path) -> None:
    """A file must be named, and be there; the message says how to get one."""
    assert run().code == USAGE
    assert "--example prints some" in run().err
    missing = run("-c", folder / "none.yaml")
    assert missing.code == REFUSED
    assert "`issuer-agent sidecar --example` prints one" in missing.err


def test_no_address(
    run: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an address of the Workload API it says where one is named."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    (folder / "s.yaml").write_text(f"dir: {folder}/svids\nx509: [{{}}]\n")
    answer = run("-c", folder / "s.yaml")
    assert answer.code == REFUSED
    assert "SPIFFE_ENDPOINT_SOCKET=unix:///path" in answer.err


async def test_sec_11_everything_at_once(
    start: Start, fake: FakeWorkloadApi, folder: Path
) -> None:
    """SEC-11, SEC-90: each domain has its own file, modes hold under umask 0, nothing leaks."""
    (folder / "password").write_text("canary-password\n")
    sidecar = start(
        ("sh", "-c", 'umask 0; exec "$@"', "-"),
        x509=[
            {"name": "web", "combined": True},
            {"name": "api", "hint": "api", "pkcs12": True},
        ],
        jwt=[{"audience": ["db", "mail"]}, {"audience": ["x"], "file": "x.jwt"}],
        bundles={"jwt": True},
        files={"key_mode": "0640"},
        pkcs12_password_file=str(folder / "password"),
        log_level="debug",
    )
    written = await sidecar.written()
    secret = {"web.key", "web.combined.pem", "api.key", "api.p12"}
    tokens = {"jwt.db+mail.token", "x.jwt"}
    public = {
        "web.pem", "api.pem", "bundle.example.org.pem", "bundle.p.test.pem",
        "bundle.example.org.p12", "bundle.p.test.p12", "bundle.example.org.jwks.json",
        "bundle.p.test.jwks.json",
    }  # fmt: skip
    await sidecar.process.until(lambda: sidecar.names() == secret | tokens | public)
    assert written["files"] == ",".join(sorted(secret | tokens | public))
    modes = {
        name: stat.S_IMODE((sidecar.dir / name).stat().st_mode) for name in sidecar.names()
    }
    wanted = {**dict.fromkeys(secret, 0o640), **dict.fromkeys(tokens, 0o600)}
    assert modes == {**dict.fromkeys(public, 0o644), **wanted}
    assert stat.S_IMODE(sidecar.dir.stat().st_mode) == 0o700
    for name in ("web", "api"):
        openssl_verifies(sidecar.dir / "bundle.example.org.pem", sidecar.dir / f"{name}.pem")
        openssl_key_fits(sidecar.dir / f"{name}.key", sidecar.dir / f"{name}.pem")
    ours, theirs = (
        set(certificates_from_pem((sidecar.dir / f"bundle.{one}.pem").read_text()))
        for one in ("example.org", "p.test")
    )
    assert ours
    assert theirs
    assert not ours & theirs
    log = sidecar.process.log.read_text()
    for name in tokens:
        assert (sidecar.dir / name).read_text() not in log
    assert "canary-password" not in log


async def test_once(start: Start, fake: FakeWorkloadApi, folder: Path) -> None:
    """With --once it ends when all is there, and tells nobody; the files stay."""
    sidecar = Sidecar(folder, fake, {"on_change": [{"command": ["touch", f"{folder}/told"]}]})
    process = Process([*SIDECAR, "-c", str(sidecar.config), "--once"], folder / "log",
                      fake.environment).start()  # fmt: skip
    assert await process.wait() == DONE
    assert {"svid.pem", "svid.key"} < sidecar.names()
    assert not (folder / "told").exists()


async def test_once_and_told_to_end(fake: FakeWorkloadApi, folder: Path) -> None:
    """Told to end before all is there, it does not pass for having done its work."""
    fake.deny()
    sidecar = Sidecar(folder, fake)
    process = Process([*SIDECAR, "-c", str(sidecar.config), "--once"], folder / "log",
                      fake.environment).start()  # fmt: skip
    await process.until(lambda: [one for one in process.events() if "stream" in one])
    assert process.stop() == 128 + signal.SIGTERM


async def test_one_writer_a_folder(start: Start) -> None:
    """A second sidecar in the same folder is refused, and told which setting to change."""
    first = start()
    await first.written()
    second = Process([*SIDECAR, "-c", str(first.config)], first.folder / "second.log",
                     first.fake.environment).start()  # fmt: skip
    assert await second.wait() == REFUSED
    assert "is in use by another process" in second.log.read_text()
    assert "set `dir` to another folder" in second.log.read_text()


async def test_who_is_told(start: Start, fake: FakeWorkloadApi, folder: Path) -> None:
    """The process of the pid file, an HTTP server and a command hear of each change."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with a_python(COUNTS) as child:
            assert child.hear() == "up"
            (folder / "pid").write_text(str(child.pid))
            sidecar = start(
                on_change=[
                    {"signal": "USR1", "pid_file": f"{folder}/pid"},
                    {"url": f"http://127.0.0.1:{port}/reload"},
                    {
                        "command": ["sh", "-c", f"echo $SVID >> {folder}/told"],
                        "on": ["bundles"],
                    },
                ]
            )
            await sidecar.written()
            assert await asyncio.to_thread(child.hear) == "1"
            await sidecar.said("on_change_done", action="command sh")
            fake.rotate()
            assert await asyncio.to_thread(child.hear) == "2"
            fake.federate("new.test")
            assert await asyncio.to_thread(child.hear) == "3"
            await sidecar.process.until(lambda: len(asked) == 3)
    assert asked == ["POST /reload HTTP/1.1"] * 3
    await sidecar.process.until(lambda: (folder / "told").read_text() == "\n\n")


async def test_bundles_come_and_go(start: Start, fake: FakeWorkloadApi) -> None:
    """The file of a trust domain appears when we are federated with it, and goes again."""
    sidecar = start()
    await sidecar.written()
    fake.federate("new.test")
    await sidecar.process.until(lambda: "bundle.new.test.pem" in sidecar.names())
    fake.unfederate("new.test")
    await sidecar.process.until(lambda: "bundle.new.test.pem" not in sidecar.names())
    assert not (sidecar.dir / "bundle.new.test.pem").is_symlink()


@pytest.mark.parametrize("when", ["keep", "remove"])
async def test_when_denied(when: str, start: Start, fake: FakeWorkloadApi) -> None:
    """Denied, it is not ready; the files stay or go as is set, and are renewed again later."""
    sidecar = start(
        when_denied=when,
        status={"port": free_port()},
        x509=[{"spiffe_id": "spiffe://example.org/web"}],
    )
    await sidecar.written()
    assert (await sidecar.status("/live"))[0] == (await sidecar.status("/ready"))[0] == 200
    fake.deny()
    await sidecar.said("not_renewed")
    await sidecar.process.until(lambda: bool(sidecar.names()) == (when == "keep"))
    code, body = await sidecar.status("/ready")
    assert (code, json.loads(body)["ready"]) == (503, False)
    assert "no identity issued" in body
    fake.allow()
    await sidecar.process.until(lambda: "svid.pem" in sidecar.names())

    async def ready() -> bool:
        return (await sidecar.status("/ready"))[0] == 200

    await sidecar.process.until(ready)


async def test_one_identity_goes(start: Start, fake: FakeWorkloadApi) -> None:
    """An identity that is taken away does not keep the others from being renewed."""
    sidecar = start(x509=[{"name": "web"}, {"name": "api", "hint": "api"}])
    await sidecar.written()
    web, api = ((sidecar.dir / f"{name}.pem").read_text() for name in ("web", "api"))
    fake.set_identities("/web")
    await sidecar.said("not_renewed")
    await sidecar.process.until(lambda: (sidecar.dir / "web.pem").read_text() != web)
    assert (sidecar.dir / "api.pem").read_text() == api
    openssl_key_fits(sidecar.dir / "web.key", sidecar.dir / "web.pem")


async def test_killed_and_started_again(start: Start, fake: FakeWorkloadApi) -> None:
    """kill -9 leaves a set that fits, and the next start goes on in the same folder."""
    sidecar = start()
    await sidecar.written()
    sidecar.process.kill()
    openssl_key_fits(sidecar.dir / "svid.key", sidecar.dir / "svid.pem")
    fake.rotate()
    sidecar.process.start()
    await sidecar.written(2)
    openssl_key_fits(sidecar.dir / "svid.key", sidecar.dir / "svid.pem")
    await sidecar.process.until(lambda: len(list(sidecar.dir.glob("..*"))) == 2)
    assert sidecar.process.stop() == DONE


async def test_a_command_of_its_own(start: Start, fake: FakeWorkloadApi, folder: Path) -> None:
    """It is started once the files are there, hears of changes, and its end is ours."""
    told = folder / "told"
    code = """
import os, signal, sys
assert os.path.exists(sys.argv[1] + "/svid.key")
log = open(sys.argv[2], "ab", buffering=0)
signal.signal(signal.SIGHUP, lambda *_: log.write(b"HUP "))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
log.write(b"up ")
while True:
    signal.pause()
"""
    sidecar = start(
        command=[sys.executable, "-c", code, f"{folder}/svids", str(told)],
        on_change=[{"signal": "HUP"}],
    )
    await sidecar.process.until(lambda: told.exists() and told.read_text() == "up ")
    fake.rotate()
    await sidecar.process.until(lambda: told.read_text() == "up HUP ")
    assert sidecar.process.stop() == 7


async def test_its_command_is_not_there(start: Start) -> None:
    """It ends at once, with a shell's exit code, and says which."""
    sidecar = start(command=["no-such-command"])
    assert await sidecar.process.wait() == 127
    assert "no-such-command: no such command" in sidecar.process.log.read_text()


async def test_unsafe_settings_are_said(start: Start) -> None:
    """A setting that is called unsafe is warned of at each start."""
    sidecar = start(bundles={"unsafe_merged_file": "all.pem"})
    await sidecar.written()
    (warning,) = sidecar.events("unsafe_setting")
    assert warning["setting"] == "bundles.unsafe_merged_file"
    assert warning["level"] == "warning"


async def test_what_its_metrics_say(start: Start, fake: FakeWorkloadApi) -> None:
    """Before there is an identity it is alive and not ready; the metrics count what it did."""
    fake.deny()
    sidecar = start(
        status={"port": free_port()}, on_change=[{"command": ["false"], "tries": 1}]
    )
    assert (await sidecar.status("/live"))[0] == 200
    assert (await sidecar.status("/ready"))[0] == 503
    fake.allow()
    await sidecar.said("on_change_failed", tries_left=0)
    page = (await sidecar.status("/metrics"))[1]
    assert "sidecar_ready 1" in page
    assert "sidecar_sets_written_total 1" in page
    assert 'sidecar_failures_total{what="on_change"} 1' in page
    expiry = fake.identities[0].svid.validity.not_after.timestamp()
    assert f"sidecar_expiry_seconds {expiry:.0f}" in page
