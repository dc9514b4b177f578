"""What a person sees: tables and colour on a terminal, plain columns elsewhere."""

import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from spiffe_wire import commandline
from tests.support.stack import ROOT

CODE = """
import sys
from spiffe_wire.commandline import RED, paint, say, show, table
rows = [("[bold]x[/bold]", "unix:path:/a b"), ("esc\\x1b[31m", "two\\nlines")]
table(("NAME", "VALUE"), rows)
print(paint(RED, "no identity"))
show(None, "text", "a\\x1b]0;title\\x07b\\nsecond")
say("went \\x1b[2J wrong")
"""


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def on_a_terminal(**variables: str) -> str:
    """What `CODE` prints where both streams are a terminal."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    with terminal() as (ours, theirs):
        subprocess.run(
            [sys.executable, "-c", CODE], stdout=theirs, stderr=theirs, cwd=ROOT, check=True,
            env={**env, "TERM": "xterm", "COLUMNS": "80", **variables},
        )  # fmt: skip
        return os.read(ours, 65536).decode()


def test_colour_on_a_terminal() -> None:
    """Titles and verdicts are coloured; what others named is shown as it is, never obeyed."""
    seen = on_a_terminal()
    assert "\x1b[31mno identity\x1b[0m" in seen
    assert "\x1b[1;36mNAME" in seen
    assert "[bold]x[/bold]" in seen, "a selector is no markup"
    for attack in ("\x1b[31mesc", "esc\x1b", "\x1b]0;", "\x1b[2J", "\x07"):
        assert attack not in seen
    assert "esc\\x1b[31m" in seen
    assert "two\\x0alines" in seen
    assert "went \\x1b[2J wrong" in seen


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour(variables: dict[str, str]) -> None:
    """NO_COLOR, or a terminal that shows none, means none."""
    seen = on_a_terminal(**variables)
    assert "\x1b[31m" not in seen
    assert "36m" not in seen
    assert "no identity" in seen


def test_plain_columns_elsewhere() -> None:
    """In a pipe there is no colour and no cut: columns that other tools can take apart."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "COLUMNS": "10"},
    )  # fmt: skip
    assert "\x1b" not in ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "NAME            VALUE"
    assert lines[1] == "[bold]x[/bold]  unix:path:/a b"
    assert lines[-2:] == ["a\\x1b]0;title\\x07b", "second"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "never"), (1_000_030, "in 30s"), (1_000_119, "in 119s"), (1_000_120, "in 2m"),
        (1_007_200, "in 2h"), (1_172_800, "in 2d"), (999_970, "30s ago"), (827_200, "2d ago"),
    ],
)  # fmt: skip
def test_relative_times(seconds: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time reads as a distance from now, in the unit that says enough."""
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert commandline.relative(seconds) == text


def test_styles(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and YAML carry the value, text the text."""
    for style, wanted in (("json", '{\n  "a": "é"\n}\n'), ("yaml", "a: é\n"), ("text", "t\n")):
        commandline.show({"a": "é"}, style, "t")
        said = capsys.readouterr().out
        assert said in (wanted, wanted.replace("é", "\\u00e9"), 'a: "\\xE9"\n')


def test_a_full_disk_under_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that cannot be written is a failure, with its reason, and no traceback."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    assert commandline.guarded(lambda: 0) == commandline.REFUSED
    assert error.getvalue() == "cannot write the answer: No space left on device\n"
