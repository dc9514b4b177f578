"""``issuer-agent run-with``: a command, its files, its signals, and its end."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import (
    DONE,
    REFUSED,
    USAGE,
    Ran,
    called,
    environment,
    openssl_key_fits,
    openssl_verifies,
    ran,
)
from tests.support.stack import ROOT
from workload_api.agent.cli import main
from workload_api.client.testing import FakeIdentity, FakeWorkloadApi
from workload_api.sidecar.run_with import PREFIX, private_folder

RUN_WITH = (sys.executable, "-m", "workload_api.agent", "run-with")
VARIABLES = ("SVID_DIR", "SVID_FILE", "SVID_KEY_FILE", "BUNDLE_FILE", "JWT_SVID_FILE")
SHOWS = f"""
import json, os, ssl, stat
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(os.environ["SVID_FILE"], os.environ["SVID_KEY_FILE"])
context.load_verify_locations(os.environ["BUNDLE_FILE"])
folder = os.environ["SVID_DIR"]
print(json.dumps({{
    "variables": {{name: os.environ.get(name) for name in {VARIABLES}}},
    "endpoint": os.environ["SPIFFE_ENDPOINT_SOCKET"],
    "files": sorted(name for name in os.listdir(folder) if name[0] != "."),
    "mode": stat.S_IMODE(os.stat(folder).st_mode),
    "key_mode": stat.S_IMODE(os.stat(os.environ["SVID_KEY_FILE"]).st_mode),
    "token": open(os.environ["JWT_SVID_FILE"]).read() if "JWT_SVID_FILE" in os.environ else "",
}}), flush=True)
"""
"""A program that loads its files, and says what it found."""
# Their handlers write past the buffer of `print`, which may be busy when the signal comes.
RELOADS = """
import os, signal, sys
signal.signal(signal.SIGHUP, lambda *_: os.write(1, b"HUP\\n"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
os.write(1, f"up {os.stat(os.environ['SVID_FILE']).st_ino}\\n".encode())
while True:
    signal.pause()
"""
"""A program that says which signals it hears, and ends with 9 at TERM."""


ON_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
COUNTS = """
import os, signal, sys
heard = []
signal.signal(signal.SIGINT, lambda *_: (heard.append(1), os.write(1, b"caught\\n")))
os.write(1, b"ready\\n")
line = sys.stdin.readline()
print("heard", len(heard), "read", line, flush=True)
sys.exit(5)
"""
"""Says how often it was interrupted before somebody typed a line."""


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


async def run_with(fake: FakeWorkloadApi, *arguments: str | Path, **options: Any) -> Ran:
    """Run it to its end."""
    return await ran(*RUN_WITH, *arguments, env=fake.environment, **options)


@contextlib.asynccontextmanager
async def running(
    fake: FakeWorkloadApi, *arguments: str | Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run it while entered."""
    process = await asyncio.create_subprocess_exec(
        *RUN_WITH, *map(str, arguments), env=environment(fake.environment), cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.communicate(), 10)
        except TimeoutError:
            process.kill()
            await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    """The next line that the command prints."""
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 15)).decode().rstrip("\n")


async def said(process: asyncio.subprocess.Process, pattern: str) -> str:
    """The next line on standard error that has *pattern* in it."""
    assert process.stderr is not None
    while True:
        line = (await asyncio.wait_for(process.stderr.readline(), 15)).decode()
        assert line, f"never said: {pattern}"
        if re.search(pattern, line):
            return line


async def test_the_command_finds_its_files(fake: FakeWorkloadApi) -> None:
    """They are named by variables, fit each other, are private, and are gone at the end."""
    done = await run_with(
        fake, "--audience", "db", "--audience", "mail", "--", sys.executable, "-c", SHOWS
    )
    assert (done.code, done.err) == (DONE, "")
    folder = Path(done.json["variables"]["SVID_DIR"])
    assert done.json["variables"] == {
        "SVID_DIR": str(folder), "SVID_FILE": f"{folder}/svid.pem",
        "SVID_KEY_FILE": f"{folder}/svid.key", "BUNDLE_FILE": f"{folder}/bundle.pem",
        "JWT_SVID_FILE": f"{folder}/jwt.db.token",
    }  # fmt: skip
    assert done.json["endpoint"] == fake.address
    assert done.json["files"] == [
        "bundle.example.org.pem", "bundle.p.test.pem", "bundle.pem", "jwt.db.token",
        "jwt.mail.token", "svid.key", "svid.pem",
    ]  # fmt: skip
    assert (done.json["mode"], done.json["key_mode"]) == (0o700, 0o600)
    assert done.json["token"].count(".") == 2
    assert not folder.exists()


async def test_a_folder_of_ones_own(fake: FakeWorkloadApi, tmp_path: Path) -> None:
    """With --dir the files stay, of the identity that was asked for, and openssl is content."""
    asked = {
        "first": ((), "/web"),
        "hint": (("--hint", "api"), "/api"),
        "id": (("--spiffe-id", "spiffe://example.org/api"), "/api"),
    }

    async def one(name: str) -> None:
        option, path = asked[name]
        folder = tmp_path / name
        shown = ("-noout", "-ext", "subjectAltName")
        done = await run_with(
            fake, "--dir", folder, *option, "--", "openssl", "x509", "-in",
            folder / "svid.pem", *shown,
        )  # fmt: skip
        assert done.code == DONE
        assert f"URI:spiffe://example.org{path}" in done.out
        openssl_verifies(folder / "bundle.pem", folder / "svid.pem")
        openssl_key_fits(folder / "svid.key", folder / "svid.pem")

    await asyncio.gather(*map(one, asked))


async def test_its_exit_code(fake: FakeWorkloadApi) -> None:
    """The command's exit code is ours; 128 + n when signal n ended it."""
    scripts = ("exit 0", "exit 37", "kill -9 $$")
    done = await asyncio.gather(*(run_with(fake, "--", "sh", "-c", one) for one in scripts))
    assert [one.code for one in done] == [0, 37, 137]


@pytest.mark.parametrize(
    ("command", "code", "why"),
    [
        ("no-such-command", 127, "no-such-command: no such command\n"),
        (str(ROOT), 126, "is not a program that can be run\n"),
    ],
    ids=["missing", "folder"],
)
def test_no_command(
    command: str, code: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said at once, with a shell's exit code, though no agent answers."""
    done = called(main, capsys, "run-with", "--endpoint", "/nonexistent/s", "--", command)
    assert (done.code, done.out) == (code, "")
    assert done.err.endswith(why)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "issuer-agent run-with -- COMMAND"),
        (("--",), "issuer-agent run-with -- COMMAND"),
        (
            ("sh", "-c", "a b"),
            "put -- before the command: issuer-agent run-with -- sh -c 'a b'",
        ),
        (("--on-renew", "reload", "--", "true"), "--on-renew reads signal:HUP, restart, none"),
        (("--on-renew", "run:", "--", "true"), "--on-renew reads"),
        (("--on-renew", "run:'a", "--", "true"), "no closing quotation"),
        (("--on-renew", "signal:HOP", "--", "true"), "'HOP' is none"),
        (("--spiffe-id", "x", "--", "true"), "scheme must be spiffe://"),
        (("--audience", "", "--", "true"), "must name who is to accept it"),
        (("--hint", "h", "--spiffe-id", "spiffe://a/b", "--", "true"), "says which one"),
        (("--endpoint", "http://x", "--", "true"), "--endpoint: an endpoint reads"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_wrong_usage(
    arguments: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What cannot be is said with code 2, before anything is asked."""
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///nonexistent/s")
    done = called(main, capsys, "run-with", *arguments)
    assert done.code == USAGE
    assert why in done.err


async def test_sec_96_what_the_shell_would_obey(fake: FakeWorkloadApi) -> None:
    """SEC-96: the command's words reach it as they are."""
    word = "$(id) `id` ; * \\"
    done = await run_with(fake, "--", "printf", "%s", word)
    assert done.out == word


async def test_signals(fake: FakeWorkloadApi) -> None:
    """They are passed on to the command, and it decides what becomes of them."""
    async with running(fake, "--", sys.executable, "-c", RELOADS) as process:
        assert (await line_of(process)).startswith("up ")
        process.send_signal(signal.SIGHUP)
        assert await line_of(process) == "HUP"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 9


async def test_ctrl_c_is_the_commands(fake: FakeWorkloadApi) -> None:
    """At a terminal a key's signal reaches the command once, from the terminal alone."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ON_A_TERMINAL, *RUN_WITH, "--", sys.executable, "-c", COUNTS,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
        env=environment(fake.environment),
    )  # fmt: skip
    try:
        assert process.stdin is not None
        for typed, wanted in ((b"", "ready"), (b"\x03", "caught"), (b"x\n", "heard 1 read x")):
            process.stdin.write(typed)
            while wanted not in (line := await line_of(process)):
                assert line, f"it ended, waiting for {wanted}"
        assert await asyncio.wait_for(process.wait(), 20) == 5
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_on_renew_signal(fake: FakeWorkloadApi) -> None:
    """After a renewal the command hears the signal; the files are in place before."""
    options = ("--on-renew", "signal:HUP", "--", sys.executable, "-c", RELOADS)
    async with running(fake, *options) as process:
        await line_of(process)
        fake.rotate()
        assert await line_of(process) == "HUP"
        fake.rotate()
        assert await line_of(process) == "HUP"


async def test_on_renew_restart(fake: FakeWorkloadApi) -> None:
    """After a renewal the command is ended and started again, on the new files."""
    options = ("--on-renew", "restart", "--", sys.executable, "-c", RELOADS)
    async with running(fake, *options) as process:
        first = await line_of(process)
        fake.rotate()
        second = await line_of(process)
        assert second.startswith("up ")
        assert first != second


async def test_on_renew_command(fake: FakeWorkloadApi, tmp_path: Path) -> None:
    """After a renewal the program is run, with the words as quoted, and with our variables."""
    code = "import os, sys; print(sys.argv[1:], os.environ['SVID_FILE'][-8:], flush=True)"
    script = tmp_path / "reload.py"
    script.write_text(code)
    told = f"run:{sys.executable} {script} 'two words' $HOME"
    async with running(
        fake, "--on-renew", told, "--", sys.executable, "-c", RELOADS
    ) as process:
        await line_of(process)
        fake.rotate()
        assert await line_of(process) == "['two words', '$HOME'] svid.pem"


async def test_it_waits_for_an_identity(fake: FakeWorkloadApi) -> None:
    """Without an identity nothing is started, and it is said why; then the command runs."""
    fake.deny()
    async with running(fake, "--", "echo", "started") as process:
        assert "no identity issued" in await said(process, "FetchX509SVID")
        fake.allow()
        assert await line_of(process) == "started"
        assert await asyncio.wait_for(process.wait(), 10) == DONE


async def test_it_waits_for_the_one_that_was_asked_for(fake: FakeWorkloadApi) -> None:
    """An identity that is not ours yet is waited for by its name."""
    wanted = "spiffe://example.org/late"
    async with running(fake, "--spiffe-id", wanted, "--", "echo", "started") as process:
        line = await said(process, "waiting")
        assert f"waiting for the identity {wanted}; the agent gives us spiffe://" in line
        fake.set_identities("/web", "/late")
        assert await line_of(process) == "started"


async def test_it_waits_for_an_agent(fake: FakeWorkloadApi) -> None:
    """An agent that is not there yet is waited for; TERM ends that, with a shell's code."""
    fake.stop()
    async with running(fake, "--", "echo", "started") as process:
        await said(process, "FetchX509SVID")
        fake.start()
        assert await line_of(process) == "started"
    fake.stop()
    async with running(fake, "--", "echo", "started") as process:
        await said(process, "FetchX509SVID")
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 128 + signal.SIGTERM


async def test_the_agent_goes_and_comes(fake: FakeWorkloadApi) -> None:
    """While the agent is away the command and its files stay; then renewals go on."""
    options = ("--on-renew", "signal:HUP", "--", sys.executable, "-c", RELOADS)
    async with running(fake, *options) as process:
        await line_of(process)
        fake.stop()
        await said(process, "FetchX509SVID")
        assert process.returncode is None
        fake.rotate()
        fake.start()
        assert await line_of(process) == "HUP"


async def test_a_folder_that_is_taken(fake: FakeWorkloadApi, tmp_path: Path) -> None:
    """Two commands in one folder are refused; the second one is told which option to change."""
    folder = tmp_path / "svids"
    async with running(fake, "--dir", folder, "--", sys.executable, "-c", RELOADS) as process:
        await line_of(process)
        second = await run_with(fake, "--dir", folder, "--", "true")
    assert (second.code, second.out) == (REFUSED, "")
    assert "is in use by another process" in second.err
    assert "`--dir`" in second.err


def test_what_a_killed_one_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start removes it; what is in use, or is not ours to judge, stays."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr("workload_api.sidecar.run_with._place", lambda: place)
    (place / "other").mkdir(mode=0o700)
    (place / f"{PREFIX}open").mkdir(mode=0o755)
    (place / f"{PREFIX}link").symlink_to(place / "other")
    with private_folder() as used:
        descriptor = os.open(used, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            left = place / f"{PREFIX}left"
            left.mkdir(mode=0o700)
            (left / "svid.key").write_text("secret")
            with private_folder() as mine:
                assert stat.S_IMODE(mine.stat().st_mode) == 0o700
                assert sorted(place.iterdir()) == sorted(
                    [mine, used, place / "other", place / f"{PREFIX}open",
                     place / f"{PREFIX}link"]
                )  # fmt: skip
        finally:
            os.close(descriptor)
    assert not used.exists()


async def test_in_memory_where_there_is_such_a_place(fake: FakeWorkloadApi) -> None:
    """The private folder is on a tmpfs, so that no disk holds the key."""
    with open("/proc/self/mounts") as mounts:
        if not any(line.split()[1:3] == ["/dev/shm", "tmpfs"] for line in mounts):
            pytest.skip("there is no tmpfs at /dev/shm here")
    done = await run_with(fake, "--", sys.executable, "-c", SHOWS)
    folder = json.loads(done.out)["variables"]["SVID_DIR"]
    assert folder.startswith(f"/dev/shm/{PREFIX}")
