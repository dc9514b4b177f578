"""What is done after a change, with real programs, signals and HTTP calls."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.running import NO_COMMAND, NO_PROGRAM
from tests.support.children import a_python
from tests.support.clock import DrivenClock
from workload_api.sidecar.actions import Actions
from workload_api.sidecar.children import Children, ProgramError
from workload_api.sidecar.config import Action, Kind
from workload_api.sidecar.program import Program

ALL = frozenset(Kind)
ENDLESS = "import time; time.sleep(60)"
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath)}
HANDLES = """
import signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: open(sys.argv[1], "a").write("HUP\\n"))
time.sleep(60)
"""


class HurriedClock(DrivenClock):
    """Time passes as soon as somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = timedelta(0)

    async def sleep(self, span: timedelta) -> None:
        """Return at once."""
        self.slept += span
        await asyncio.sleep(0)


@pytest.fixture
async def children() -> AsyncIterator[Children]:
    """A reaper in the test's loop."""
    with Children() as made:
        yield made


def actions(children: Children, *wanted: Action, program: Program | None = None) -> Actions:
    """Actions that wait for nothing between tries."""
    return Actions(wanted, children, program, ENVIRONMENT, HurriedClock())


@contextlib.asynccontextmanager
async def a_program(children: Children, *arguments: str) -> AsyncIterator[Program]:
    """A command of ours, started, and ended at the end."""
    program = Program(children, arguments, ENVIRONMENT)
    program.start()
    try:
        yield program
    finally:
        await program.close()


@contextlib.asynccontextmanager
async def http_server(*answers: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that gives these answers, one after the other; its URL and what it was asked."""
    left, asked = list(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        asked.append(request.split(b"\r\n")[0].decode())
        status = left.pop(0) if len(left) > 1 else left[0]
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/reload", asked


async def until_text(file: Path, text: str) -> None:
    """Wait until *file* holds *text*."""
    async with asyncio.timeout(10):
        while not file.exists() or file.read_text() != text:
            await asyncio.sleep(0.01)


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The number of a process that a signal ends."""
    with a_python("import time; time.sleep(60)") as child:
        yield child.pid


@pytest.mark.parametrize("rest", ["", "\n", "\n/var/lib/data\n5432\n"])
async def test_a_signal_by_pid_file(
    children: Children, tmp_path: Path, sleeper: int, rest: str
) -> None:
    """The process whose number is the file's first line is signalled."""
    (tmp_path / "pid").write_text(f"{sleeper}{rest}")
    done = actions(children, Action(signal="TERM", pid_file=tmp_path / "pid"))
    await done.after(ALL)
    assert (done.done, done.failures) == (1, 0)
    assert os.waitid(os.P_PID, sleeper, os.WEXITED | os.WNOWAIT).si_status == signal.SIGTERM


@pytest.mark.parametrize(
    ("content", "failures"),
    [
        (None, 0),
        ("999999999\n", 0),
        ("0", 1),
        ("1", 1),
        ("-1", 1),
        ("x", 1),
        ("", 1),
        ("\n999999999\n", 1),
    ],
    ids=["missing", "ended", "own-group", "first", "all", "text", "empty", "second-line"],
)
async def test_a_pid_file_that_names_nobody(
    content: str | None, failures: int, children: Children, tmp_path: Path
) -> None:
    """Nobody there is no failure; a number that is not one process is, and gets no signal."""
    if content is not None:
        (tmp_path / "pid").write_text(content)
    done = actions(children, Action(signal="TERM", pid_file=tmp_path / "pid", tries=2))
    await done.after(ALL)
    assert (done.done, done.failures) == (0, failures)


async def test_sec_96_a_command_is_an_argument_vector(
    children: Children, tmp_path: Path
) -> None:
    """SEC-96: what a shell would obey reaches the program as the one word that it is."""
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    word = "$(touch x); `id` > y & *"
    command = (sys.executable, "-c", code, str(tmp_path / "out"), word)
    done = actions(children, Action(command=command))
    await done.after(ALL)
    assert (done.done, done.failures) == (1, 0)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("out", word)]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), "it ended with 3"),
        (("/nonexistent/program",), "no such command"),
    ],
    ids=["fails", "missing"],
)
async def test_a_command_that_fails(
    command: tuple[str, ...], why: str, children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried as often as is set, and the log says why each time."""
    done = actions(children, Action(command=command, tries=2))
    await done.after(ALL)
    assert (done.done, done.failures) == (0, 1)
    fields = [one.event_fields for one in caplog.records if one.msg == "on_change_failed"]
    assert [one["tries_left"] for one in fields] == [1, 0]
    assert all(why in str(one["why"]) for one in fields)


async def test_a_command_that_hangs(children: Children, tmp_path: Path) -> None:
    """It is ended after its time, and nothing of it is left."""
    code = f"import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n{ENDLESS}"
    command = (sys.executable, "-S", "-c", code, str(tmp_path / "pid"))
    done = actions(children, Action(command=command, tries=1, timeout=timedelta(seconds=0.5)))
    await asyncio.wait_for(done.after(ALL), 10)
    assert done.failures == 1
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


async def test_an_http_call(children: Children) -> None:
    """It is made with its method, and again while the answer is no success."""
    async with http_server(503, 404, 204) as (url, asked):
        done = actions(children, Action(url=url, method="PUT", tries=3))
        await done.after(ALL)
    assert asked == ["PUT /reload HTTP/1.1"] * 3
    assert (done.done, done.failures) == (1, 0)


async def test_an_http_call_that_nobody_answers(children: Children) -> None:
    """It fails when its tries are used up."""
    async with http_server(200) as (url, _):
        pass
    done = actions(children, Action(url=url, tries=2))
    await done.after(ALL)
    assert (done.done, done.failures) == (0, 1)


async def test_only_after_changes_of_its_kind(children: Children, tmp_path: Path) -> None:
    """An action is done after the changes that it is for, and no other."""
    touch = (sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(tmp_path / "out"))
    done = actions(children, Action(command=touch, on=("jwt",)))
    await done.after(frozenset({Kind.X509, Kind.BUNDLES}))
    assert done.done == 0
    await done.after(frozenset({Kind.JWT}))
    assert done.done == 1
    assert (tmp_path / "out").exists()


async def test_our_command_hears_a_signal(children: Children, tmp_path: Path) -> None:
    """A signal waits until the command has its handler: one that begins is not ended by it."""
    heard = tmp_path / "heard"
    slow = f"import time; time.sleep(0.3)\n{HANDLES}"
    async with a_program(children, sys.executable, "-c", slow, str(heard)) as program:
        done = actions(children, Action(signal="HUP"), program=program)
        await done.after(ALL)
        assert (done.done, done.failures) == (1, 0)
        await until_text(heard, "HUP\n")
        assert not program.ended.done()


async def test_our_command_that_would_end(children: Children) -> None:
    """A signal that the command does not handle is not sent, and that is a failure."""
    async with a_program(children, sys.executable, "-c", ENDLESS) as program:
        wanted = Action(signal="USR1", tries=1, timeout=timedelta(seconds=0.2))
        done = actions(children, wanted, program=program)
        await done.after(ALL)
        assert (done.done, done.failures) == (0, 1)
        assert not program.ended.done()


async def test_a_restart(children: Children, tmp_path: Path) -> None:
    """The command is ended and started again, and that is not its end."""
    started = tmp_path / "started"
    code = f"import os, sys; open(sys.argv[1], 'a').write('+')\n{ENDLESS}"
    async with a_program(children, sys.executable, "-c", code, str(started)) as program:
        await until_text(started, "+")
        done = actions(children, Action(restart=True), program=program)
        await done.after(ALL)
        await until_text(started, "++")
        assert not program.ended.done()
        program.send(signal.SIGTERM)
        assert await asyncio.wait_for(program.ended, 10) == -signal.SIGTERM
        await done.after(ALL)
    assert started.read_text() == "++", "what has ended is not started again"


async def test_told_to_end_during_a_restart(children: Children, tmp_path: Path) -> None:
    """Who is told to end while it is restarted is not started again."""
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(4)))
open(sys.argv[1], "w").write("up")
time.sleep(60)
"""
    up = tmp_path / "up"
    async with a_program(children, sys.executable, "-c", code, str(up)) as program:
        await until_text(up, "up")
        restarting = asyncio.create_task(program.restart())
        await asyncio.sleep(0)
        program.send(signal.SIGTERM)
        await restarting
        assert await asyncio.wait_for(program.ended, 10) == 4


async def test_a_restart_of_what_is_gone(children: Children, tmp_path: Path) -> None:
    """A command that cannot be started again has ended, with a shell's code for that."""
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\n{ENDLESS}")
    script.chmod(0o755)
    async with a_program(children, str(script)) as program:
        script.unlink()
        with pytest.raises(ProgramError, match="no such command"):
            await program.restart()
        assert program.ended.result() == NO_COMMAND


@pytest.mark.parametrize(
    ("name", "code"), [("no-such-program", NO_COMMAND), (__file__, NO_PROGRAM)]
)
async def test_no_program(name: str, code: int, children: Children) -> None:
    """It is known before anything is waited for, with a shell's exit code."""
    with pytest.raises(ProgramError) as refused:
        Program(children, (name,), {})
    assert refused.value.code == code


async def test_many_that_end_at_once(children: Children) -> None:
    """Each child's end is seen, though one signal may stand for several."""
    started = [children.start(("sh", "-c", f"exit {code}"), ENVIRONMENT) for code in range(20)]
    codes: Any = await asyncio.wait_for(asyncio.gather(*(one.ended for one in started)), 10)
    assert codes == list(range(20))
