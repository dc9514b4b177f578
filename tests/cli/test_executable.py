"""What a command becomes when it runs, told before it does."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from issuer.cli.executable import LAUNCHERS, Executable, executable_of

PYTHON = os.path.realpath(sys.executable)
TRUE = os.path.realpath(shutil.which("true") or "true")


def digest(path: str) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A place for a script, outside the PATH."""
    return tmp_path / "script"


def test_a_program() -> None:
    """A program is itself, with its links resolved."""
    assert executable_of(sys.executable) == Executable(PYTHON, digest(PYTHON))


@pytest.mark.parametrize(
    "first",
    [f"#!{PYTHON}", f"#! {PYTHON} -I -u", f"#!\t{sys.executable}", "#!/usr/bin/env python-here",
     "#!/usr/bin/env -S python-here -I"],
)  # fmt: skip
def test_a_script_is_its_interpreter(
    first: str, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs what the first line names; env runs what it finds on the PATH."""
    (script.parent / "python-here").symlink_to(PYTHON)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    script.write_text(f"{first}\nprint()\n")
    assert executable_of(str(script)) == Executable(PYTHON, digest(PYTHON))


def test_a_script_of_a_script(tmp_path: Path) -> None:
    """The kernel follows five interpreters that are scripts themselves, and so do we."""
    below = PYTHON
    for number in range(7):
        one = tmp_path / f"s{number}"
        one.write_text(f"#!{below}\n")
        below = str(one)
        known = executable_of(below)
        assert (known is not None) == (number < 5), number


@pytest.mark.parametrize(
    "content",
    [b"", b"echo hello\n", b"#!\n", b"#!/nonexistent/interpreter\n", b"#!/usr/bin/env\n",
     b"#!/usr/bin/env -i python\n", b"#!/usr/bin/env A=b python\n", b"#!/usr/bin/env no-such\n",
     b"#!/bin/sh\n", b"\x7fEL"],
)  # fmt: skip
def test_what_cannot_be_known(content: bytes, script: Path) -> None:
    """Then nothing is claimed: the entry asks for the user alone, and locks nobody out."""
    script.write_bytes(content)
    assert executable_of(str(script)) is None


@pytest.mark.parametrize("name", ["sh", "make", "env", "timeout"])
def test_launchers(name: str, tmp_path: Path) -> None:
    """A program that runs others gets no entry of its own: the others need the identity."""
    assert name in LAUNCHERS
    copy = tmp_path / name
    shutil.copy(TRUE, copy)
    assert executable_of(str(copy)) is None
    (tmp_path / "other").symlink_to(copy)
    assert executable_of(str(tmp_path / "other")) is None
    renamed = copy.rename(tmp_path / "mine")
    assert executable_of(str(renamed)) == Executable(str(renamed), digest(TRUE))


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """No entry can name it."""
    odd = os.fsencode(tmp_path) + b"/\xff"
    shutil.copy(TRUE, odd)
    assert executable_of(os.fsdecode(odd)) is None


def test_one_that_is_not_there() -> None:
    """Nothing is known of a file that cannot be read."""
    assert executable_of("/nonexistent") is None
