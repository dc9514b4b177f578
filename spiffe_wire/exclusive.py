"""One process a folder: what two would do to its files, no crash could (SEC-100)."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from spiffe_core.errors import PreconditionError
from spiffe_wire import privatefolder


@contextlib.contextmanager
def held(folder: Path, setting: str) -> Iterator[None]:
    """
    Hold *folder*, which is made if it is not there, for this process while entered.

    The kernel lets go of it however the process ends.

    Raises:
        PreconditionError: another process holds it, or it cannot be opened.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(
            f"{folder} cannot be opened: {error.strerror}; set `{setting}` to a folder of "
            "this user"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreconditionError(
                f"{folder} is in use by another process: stop that first, or set `{setting}` "
                "to another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def without_leftovers(folder: Path) -> Path:
    """Return *folder*, emptied of what processes that were killed have left in it."""
    privatefolder.remove(folder)
    return folder
