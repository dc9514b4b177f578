"""``issuer dev``: what a newcomer types first."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.programs import DONE, REFUSED, Ran, environment, ran
from tests.support.stack import ROOT, a_folder

DEV = (sys.executable, "-m", "issuer", "dev")
AGENT = f"{sys.executable} -m workload_api.agent"
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture
def files() -> Iterator[dict[str, str]]:
    """An environment in which temporary files lie in a folder that must be empty at the end."""
    with a_folder() as folder:
        yield {"TMPDIR": str(folder)}
        assert list(folder.iterdir()) == []


async def dev(*arguments: str | Path, **changes: Any) -> Ran:
    """Run ``issuer dev`` to its end."""
    return await ran(*DEV, *arguments, **changes)


def nothing_is_left(out: str) -> None:
    """The sockets' folder, which the command printed as its first line, is gone."""
    socket = Path(out.splitlines()[0].removeprefix("unix://"))
    assert socket.name == "workload.sock"
    assert not socket.parents[1].exists()


PY_SPIFFE = """
import os, signal, sys, subprocess
from spiffe import WorkloadApiClient
print(os.environ["SPIFFE_ENDPOINT_SOCKET"])
with WorkloadApiClient() as client:
    print(client.fetch_x509_svid().spiffe_id)
    print(client.fetch_jwt_svid(audience={"db"}).spiffe_id)
mask = os.umask(0); os.umask(mask)
print(oct(mask), sys.stdin.read(), os.path.basename(os.getcwd()))
status = open("/proc/self/status").read()
print([line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")])
show = [sys.executable, "-m", "issuer", "entry", "show", "-o", "json"]
print(subprocess.run(show, capture_output=True, text=True).stdout)
sys.exit(7)
"""


async def test_a_command_with_an_identity(files: dict[str, str], tmp_path: Path) -> None:
    """py-spiffe in the command gets its identity; stdin, mask, folder and code are its own."""
    before = os.umask(0o027)
    try:
        ended = await dev(
            "--trust-domain", "dev.example", "--", sys.executable, "-c", PY_SPIFFE,
            stdin="typed", cwd=tmp_path, env=files,
        )  # fmt: skip
    finally:
        os.umask(before)
    assert ended.code == 7
    assert ended.err == ""
    lines = ended.out.split("\n", 5)
    assert lines[1:3] == ["spiffe://dev.example/dev/command"] * 2
    assert lines[3] == f"0o27 typed {tmp_path.name}"
    assert lines[4] == "['0000000000000000']"
    (entry,) = json.loads(lines[5])["entries"]
    digest = hashlib.sha256(Path(PYTHON).read_bytes()).hexdigest()
    assert entry["selectors"] == [
        {"type": "unix", "value": f"path:{PYTHON}"},
        {"type": "unix", "value": f"sha256:{digest}"},
        {"type": "unix", "value": f"uid:{os.geteuid()}"},
    ]  # fmt: skip
    nothing_is_left(ended.out)


async def test_a_script(files: dict[str, str], tmp_path: Path) -> None:
    """A script's identity is its interpreter's, and the script gets it."""
    script = tmp_path / "job"
    script.write_text(
        f"#!{sys.executable}\nimport os\nfrom workload_api.agent.cli import main\n"
        "print(os.environ['SPIFFE_ENDPOINT_SOCKET'])\nmain(['whoami', '-o', 'json'])\n"
    )
    script.chmod(0o755)
    ended = await dev("--", script, env=files)
    assert ended.code == DONE, ended.err
    facts = json.loads(ended.out.partition("\n")[2])
    assert facts["spiffe_ids"] == ["spiffe://example.org/dev/command"]
    assert f"unix:path:{PYTHON}" in facts["selectors"]
    nothing_is_left(ended.out)


async def test_a_shell_and_a_signal(files: dict[str, str]) -> None:
    """What a shell starts has the identity, and SIGPIPE; ended by signal 9 it is 137."""
    line = (
        f"echo $SPIFFE_ENDPOINT_SOCKET; {AGENT} fetch x509; grep SigIgn /proc/self/status; "
        "kill -9 $$"
    )
    ended = await dev("--", "sh", "-c", line, env=files)
    assert ended.code == 137
    lines = ended.out.splitlines()
    assert lines[1] == "spiffe://example.org/dev/command"
    assert int(lines[-1].split()[1], 16) & 1 << (signal.SIGPIPE - 1) == 0
    nothing_is_left(ended.out)


async def test_another_program_of_the_command(files: dict[str, str]) -> None:
    """A program that the command starts has no identity, and dev says how to give it one."""
    copy = Path(files["TMPDIR"]) / "python-copy"
    shutil.copy(PYTHON, copy)
    line = (
        "import os, subprocess, sys; print(os.environ['SPIFFE_ENDPOINT_SOCKET'], flush=True); "
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    # The copy imports what the original does, from where it lies.
    paths = os.pathsep.join(["", *filter(None, sys.path)])
    asks = [copy, "-m", "workload_api.agent", "fetch", "x509"]
    env = {**files, "PYTHONHOME": sys.base_prefix, "PYTHONPATH": f"{ROOT}{paths}"}
    refused = await dev("--", sys.executable, "-c", line, *asks, env=env)
    assert refused.code == REFUSED
    assert "`issuer dev --any-program -- …`" in refused.err
    served = await dev("--any-program", "--", sys.executable, "-c", line, *asks, env=env)
    assert served.code == DONE, served.err
    assert "spiffe://example.org/dev/command" in served.out
    copy.unlink()


async def test_commands_that_cannot_be_run(tmp_path: Path) -> None:
    """A shell's codes, 127 and 126, before anything is started; for a broken one, after."""
    missing = await dev("--", "no-such-command-here")
    assert (missing.code, missing.err) == (127, "no-such-command-here: no such command\n")
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    for path, mode in ((plain, 0o644), (broken, 0o755)):
        path.write_text("neither a script nor a program\n")
        path.chmod(mode)
    refused = await dev("--", plain)
    assert refused.code == 126
    assert "is not a program that can be run" in refused.err
    other = await dev("--", broken)
    assert (other.code, other.err) == (126, f"{broken}: Exec format error\n")


@dataclass
class Running:
    """An ``issuer dev`` that runs."""

    process: asyncio.subprocess.Process
    first_lines: list[str]

    @property
    def agent(self) -> psutil.Process:
        """Its agent."""
        for one in psutil.Process(self.process.pid).children():
            if "workload_api.agent.cli" in " ".join(one.cmdline()):
                return one
        raise AssertionError("no agent runs")

    def signal(self, number: int) -> None:
        """Send a signal to dev alone."""
        self.process.send_signal(number)

    async def end(self) -> Ran:
        """Wait for its end."""
        out, err = await asyncio.wait_for(self.process.communicate(), 20)
        assert self.process.returncode is not None
        return Ran(self.process.returncode, out.decode(), err.decode())


@contextlib.asynccontextmanager
async def running(*arguments: str, lines: int, **variables: str) -> AsyncIterator[Running]:
    """``issuer dev`` that has printed its first *lines*."""
    process = await asyncio.create_subprocess_exec(
        *DEV, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, cwd=ROOT, env=environment(variables),
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        first = [
            (await asyncio.wait_for(process.stdout.readline(), 20)).decode().rstrip("\n")
            for _ in range(lines)
        ]
        if not all(first):
            _, err = await process.communicate()
            raise AssertionError(f"it ended with {process.returncode}: {err.decode()}")
        yield Running(process, first)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_three_lines(files: dict[str, str]) -> None:
    """Pasted into a shell where nothing is set up, they give an SVID; Ctrl-C ends it well."""
    async with running(lines=3, **files) as dev:
        pasted = await ran("env", "-i", "bash", "-c", "\n".join(dev.first_lines), cwd=Path("/"))
        assert pasted.code == DONE, pasted.err
        assert "\nspiffe://example.org/me\n" in pasted.out
        more = [dev.first_lines[0], "issuer-agent status", "issuer explain --pid $$"]
        after = await ran("env", "-i", "bash", "-c", "\n".join(more), cwd=Path("/"))
        assert "x509 svids      1" in after.out, "the line is enough for every other command"
        assert "gets    spiffe://example.org/me" in after.out
        agent = dev.agent
        dev.signal(signal.SIGINT)
        ended = await dev.end()
        assert ended.code == DONE
        assert not agent.is_running()
    assert dev.first_lines[0].startswith("export ")
    nothing_is_left(dev.first_lines[0].partition("SPIFFE_ENDPOINT_SOCKET=")[2])
    assert "Ctrl-C stops it" in ended.err


# Their handlers write past the buffer of `print`, which may be busy when the signal comes.
PASSES = """
import os, signal, sys
def caught(number, frame):
    os.write(1, f"{number}\\n".encode())
    if number == signal.SIGTERM:
        sys.exit(5)
for one in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(one, caught)
os.write(1, os.environ["SPIFFE_ENDPOINT_SOCKET"].encode() + b"\\n")
while True:
    signal.pause()
"""


async def test_signals_are_passed_on(files: dict[str, str]) -> None:
    """The command hears what dev is sent, and decides; its exit code is dev's."""
    async with running("--", sys.executable, "-c", PASSES, lines=1, **files) as dev:
        assert dev.process.stdout is not None
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            dev.signal(number)
            heard = await asyncio.wait_for(dev.process.stdout.readline(), 10)
            assert int(heard) == number
        ended = await dev.end()
    assert (ended.code, ended.err) == (5, "")
    nothing_is_left(dev.first_lines[0])


ON_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
COUNTS = """
import os, signal, sys
heard = []
def caught(number, frame):
    heard.append(number)
    os.write(1, b"caught\\n")
signal.signal(signal.SIGINT, caught)
os.write(1, b"ready\\n")
line = sys.stdin.readline()
print("heard", len(heard), "read", line, flush=True)
sys.exit(5)
"""


async def test_ctrl_c_is_the_commands(files: dict[str, str]) -> None:
    """At a terminal a key's signal reaches the command once, from the terminal, and not dev."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ON_A_TERMINAL, *DEV, "--", sys.executable, "-c", COUNTS,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
        env=environment(files),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    seen: list[bytes] = []
    try:
        for typed, wanted in (
            (b"", b"ready"),
            (b"\x03", b"caught"),
            (b"x\n", b"heard 1 read x"),
        ):
            process.stdin.write(typed)
            line = b""
            while wanted not in line:
                line = await asyncio.wait_for(process.stdout.readline(), 20)
                assert line, f"it ended, waiting for {wanted!r} after {seen}"
                seen.append(line)
        assert await asyncio.wait_for(process.wait(), 20) == 5
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


SLEEPS = (
    "import os, time; print(os.environ['SPIFFE_ENDPOINT_SOCKET'], os.getpid(), flush=True); "
    "time.sleep(60)"
)


async def test_an_agent_that_dies(files: dict[str, str]) -> None:
    """Dev says so, stops the command, and ends with 1; nothing is left."""
    async with running("--", sys.executable, "-c", SLEEPS, lines=1, **files) as dev:
        socket, _, pid = dev.first_lines[0].partition(" ")
        command = psutil.Process(int(pid))
        dev.agent.kill()
        ended = await dev.end()
    assert ended.code == REFUSED
    assert ended.err.startswith("the agent ended by itself, exit code -9")
    assert "; the command is stopped\n" in ended.err
    assert not command.is_running()
    nothing_is_left(socket)

    async with running(lines=3, **files) as dev:
        dev.agent.kill()
        ended = await dev.end()
    assert ended.code == REFUSED
    assert "the agent ended by itself" in ended.err


async def test_dev_that_is_killed(tmp_path: Path) -> None:
    """Its agent ends too: no process outlives it, even when it cannot say good-bye."""
    async with running(lines=3, TMPDIR=str(tmp_path)) as dev:
        agent = dev.agent
        sockets = Path(dev.first_lines[0].partition("unix://")[2]).parents[1]
        dev.signal(signal.SIGKILL)
        await dev.end()
        await until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)
    shutil.rmtree(sockets)  # this is what it cannot take away itself


async def until(holds: Callable[[], bool]) -> None:
    """Wait until *holds*, for at most ten seconds."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


async def test_sec_106_keep(files: dict[str, str]) -> None:
    """SEC-106: a kept domain goes on: authority, agent, entries; also when the agent is new."""
    with a_folder() as folder:
        kept = folder / "kept folder: #1"
        facts = f"{sys.executable} -m issuer agent list -o json; {sys.executable} -m issuer "
        show = ("--keep", kept, "--", "sh", "-c", f"{facts} entry show -o json")

        first = await dev(*show, env=files)
        assert first.code == DONE, first.err
        assert not list(kept.rglob("join-token"))
        second = await dev(*show, env=files)
        assert second.out == first.out, "one agent, one entry, the same revision"

        (kept / "agent" / "node.json").unlink()  # as when its SVID has expired meanwhile
        third = await dev(*show, env=files)
        agents, entries = objects(third.out)
        (agent,) = agents["agents"]
        (entry,) = entries["entries"]
        assert agent["id"] != objects(first.out)[0]["agents"][0]["id"]
        assert entry["parent_id"] == agent["id"]
        assert entry["id"] == objects(first.out)[1]["entries"][0]["id"]

        other = await dev(
            "--keep", kept, "--trust-domain", "other.org", "--", "true", env=files
        )
        assert other.code == REFUSED
        assert "belongs to trust domain example.org" in other.err


def objects(text: str) -> list[Any]:
    """Every JSON object in *text*, one after another."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, at = decoder.raw_decode(text)
        found.append(value)
        text = text[at:]
    return found


async def test_two_on_one_folder(files: dict[str, str]) -> None:
    """A second dev on a kept folder that is in use is refused, and the first goes on."""
    with a_folder() as folder:
        async with running("--keep", str(folder), "-o", "json", lines=7, **files) as first:
            second = await dev("--keep", folder, "--", "true", env=files)
            assert second.code == REFUSED
            assert f"another `issuer dev` uses {folder}" in second.err
            # What -o json prints is enough for a script to use the domain.
            facts = json.loads("".join(first.first_lines))
            assert set(facts) == {
                "trust_domain", "agent_id", "spiffe_endpoint_socket", "admin_socket",
                "agent_admin_socket",
            }  # fmt: skip
            well = await ran(
                sys.executable, "-m", "issuer", "doctor", "--socket", facts["admin_socket"],
                "--agent-socket", facts["agent_admin_socket"],
            )  # fmt: skip
            assert well.code == DONE
            first.signal(signal.SIGHUP)  # its terminal was closed
            assert (await first.end()).code == DONE
