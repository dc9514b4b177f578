"""
Plays the commands of a page of the docs, and sees that they answer as the page says.

A block ``console terminal-N`` is one terminal: lines after ``$ `` are typed, the lines below
are what must be seen, where ``…`` stands for anything.  A command that holds ``…`` is one that
the page asks to paste: it is looked up in what was printed before.  A block of any other kind
whose first line is ``# name`` (or ``// name``) is that file.  ``/srv/spiffe`` is the test's own
folder.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.stack import ROOT

PATIENCE = 20.0
_BLOCK = re.compile(r"^```(\w+)(?: (terminal-\d))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:#|//) ([\w./-]+)")
_MARK = "-=done=-"


class Terminal:
    """A bash that a person could have typed into."""

    def __init__(
        self, folder: Path, become: tuple[str, ...] = (), patience: float = PATIENCE
    ) -> None:
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        environment = {
            "PATH": ":".join([*path, "/usr/sbin", "/sbin"]),
            "HOME": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._bash = subprocess.Popen(
            [*become, "bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._patience = patience
        self.text = ""
        self._read_to = 0
        self._typed = 0

    def type(self, line: str) -> None:
        """Type one line."""
        assert self._bash.stdin is not None
        self._typed += 1
        mark = f"printf '%s %s %s\\n' {_MARK} {self._typed} $?"
        self._bash.stdin.write(f"{line}\n{mark}\n".encode())
        self._bash.stdin.flush()

    def end(self) -> str:
        """Wait until the line typed last is over, and return its exit code."""
        # By number: the end of an earlier line, whose answer was seen, is still to be read.
        return self.see(f"^{_MARK} {self._typed} \\d+$").rpartition(" ")[2]

    def see(self, pattern: str) -> str:
        """Wait until what was printed since the last look matches, and take it as seen."""
        end = time.monotonic() + self._patience
        # What may stand before says nothing in a search, and would make it one of squares.
        wanted = re.compile(pattern.removeprefix(".*?"), re.MULTILINE | re.DOTALL)
        while (found := wanted.search(self.text, self._read_to)) is None:
            assert self._bash.stdout is not None
            left = end - time.monotonic()
            ready, _, _ = select.select([self._bash.stdout], [], [], max(left, 0))
            data = os.read(self._bash.stdout.fileno(), 65536) if ready else b""
            assert data, f"never seen: {pattern}\nsaid: {self.text[self._read_to :]}"
            self.text += data.decode(errors="replace")
        self._read_to = found.end()
        return found[0]

    def close(self) -> None:
        """Press Ctrl-C, and leave."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        # First, or a shell whose program ended well would wait for the next line.
        self._bash.stdin.close()
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self._bash.poll() is not None:
                break
            os.killpg(self._bash.pid, one)
            try:
                self._bash.wait(5)
            except subprocess.TimeoutExpired:
                continue
        self._bash.stdout.close()


@dataclass
class Desk:
    """The terminals of one page, by name."""

    folder: Path
    become: tuple[str, ...] = ()
    patience: float = PATIENCE
    terminals: dict[str, Terminal] = field(default_factory=dict)

    def play(self, name: str, block: str) -> None:
        """Type the commands of one block and see the answers."""
        if name not in self.terminals:
            self.terminals[name] = Terminal(self.folder, self.become, self.patience)
        terminal = self.terminals[name]
        for command, answer in steps_of(block):
            if command is None:
                terminal.see(pattern_of(answer))
                continue
            terminal.type(self.pasted(command) if "…" in command else command)
            # Silence means that it is over; words may be those of one that goes on.
            if answer:
                terminal.see(pattern_of(answer))
            else:
                assert terminal.end() == "0", f"{command}: {terminal.text}"

    def pasted(self, command: str) -> str:
        """The line printed earlier, in any terminal, that *command* abbreviates."""
        wanted = re.compile(f"^{pattern_of([command])}$", re.MULTILINE)
        for terminal in self.terminals.values():
            if found := wanted.search(terminal.text):
                return found[0]
        raise AssertionError(f"nothing was printed that reads {command}")


def steps_of(block: str) -> list[tuple[str | None, list[str]]]:
    """Commands with the lines to be seen after each; None where only output is shown."""
    found: list[tuple[str | None, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line == "(output)":
            found.append((None, []))
        else:
            found[-1][1].append(line)
    return found


def pattern_of(lines: list[str]) -> str:
    """The lines as a pattern; white space between words may be wider."""
    made = []
    for line in lines:
        parts = [
            re.sub(r"(\\ )+", "[ \t]+", re.escape(part).replace("\\\t", "\\ "))
            for part in line.split("…")
        ]
        made.append(".*?".join(parts))
    return "\n".join(made)


def blocks_of(page: str, folder: Path) -> list[tuple[str, str, str]]:
    """The blocks of a page as they stand in *folder*: kind, terminal, text."""
    return _BLOCK.findall((ROOT / page).read_text().replace("/srv/spiffe", str(folder)))


def file_of(kind: str, body: str) -> str:
    """The name of the file that a block is, or nothing."""
    found = _FILE.fullmatch(body.partition("\n")[0])
    return found[1] if found and kind != "console" else ""


def play(
    page: str, folder: Path, become: tuple[str, ...] = (), patience: float = PATIENCE
) -> None:
    """
    Write the files of a page into *folder*, and type its commands.

    *become* is what each shell is started through, to be another user's, or in another place;
    each answer is there after *patience* seconds.
    """
    blocks = blocks_of(page, folder)
    assert any(kind == "console" for kind, _, _ in blocks)
    desk = Desk(folder, become, patience)
    try:
        for kind, name, body in blocks:
            if kind == "console":
                assert name, "a console block names its terminal"
                desk.play(name, body)
            elif file := file_of(kind, body):
                (folder / file).write_text(body)
    finally:
        for terminal in desk.terminals.values():
            terminal.close()
