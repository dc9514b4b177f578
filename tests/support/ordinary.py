"""
An ordinary user for tests that run as root: PostgreSQL refuses root, and proxies change users.

The user is made by a user namespace in which root is called by another number.  Becoming
``nobody`` would not do: the checkout, or Python itself, may lie where only root may go.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

UID = 1
"""``daemon`` or ``bin``: a number that has a name everywhere, which `initdb` wants."""
_BECOME = ("unshare", "--user", f"--map-user={UID}", f"--map-group={UID}")


def prefix() -> tuple[str, ...]:
    """What stands before a command that is to run as an ordinary user; nothing if we are."""
    return _BECOME if os.geteuid() == 0 else ()


@contextlib.contextmanager
def a_user() -> Iterator[tuple[str, ...]]:
    """
    What stands before several commands that are to be of one ordinary user.

    Processes of two namespaces may not look at each other, and an agent looks at its callers.
    """
    if not prefix():
        yield ()
        return
    holder = subprocess.Popen([*prefix(), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write(b".")
        holder.stdin.flush()
        assert holder.stdout.read(1) == b"."  # `cat` runs, so the namespace is there
        yield ("nsenter", f"--user=/proc/{holder.pid}/ns/user", "--preserve-credentials")
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


@cache
def _works() -> bool:
    command = (*prefix(), "true")
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


def needs_ordinary_user() -> pytest.MarkDecorator:
    """Skips where root cannot become anybody else, as in some containers."""
    why = "root may make no user namespace here, and an ordinary user is needed: run as one"
    return pytest.mark.skipif(not _works(), reason=why)


@contextlib.contextmanager
def a_home() -> Iterator[Path]:
    """
    A fresh folder with a short name, gone afterwards.

    Root's lie in /run: seen from the namespace, /tmp is another ordinary user's, and our own
    sockets refuse to lie below that (SEC-37).
    """
    where = "/run" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="si-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
