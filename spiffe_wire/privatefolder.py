"""
Folders of a process's own, for sockets that nobody else is to reach.

Not by `tempfile` and `shutil`, which cost every agent half a megabyte.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make(parent: Path, prefix: str) -> Path:
    """
    Make a folder of mode 0700 and an unguessable name in *parent*, which is made too.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = parent / (prefix + secrets.token_hex(6))
    folder.mkdir(mode=0o700)
    return folder


def remove(folder: Path) -> None:
    """Remove *folder* and all that is in it; what cannot be stays; no link is followed."""
    with contextlib.suppress(OSError):
        _empty(os.open(folder, _FOLDER))
        os.rmdir(folder)


def _empty(folder: int) -> None:
    """Remove what is in the folder of a descriptor, and close that."""
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                try:
                    os.unlink(name, dir_fd=folder)
                except IsADirectoryError:
                    _empty(os.open(name, _FOLDER, dir_fd=folder))
                    os.rmdir(name, dir_fd=folder)
    finally:
        os.close(folder)
