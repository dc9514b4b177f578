"""
Make, own and replace a Unix socket safely (SEC-37, IOP-24).

A socket is bound in a private folder, given its mode, then renamed into place: there is no
moment at which somebody else's mode or file is in the way.
"""

import contextlib
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import Final

from spiffe_core.errors import PreconditionError

MAX_PATH_BYTES: Final = 107  # Linux sun_path, less its final NUL
BACKLOG: Final = 1024


class SocketPathError(PreconditionError):
    """A socket cannot safely be made there; the text says what to change."""


def check_socket_path(path: Path) -> Path:
    """
    Return *path* if a socket can be bound there by any client's rules.

    Raises:
        SocketPathError: relative, too long, or needing percent-encoding in a URI.
    """
    text = os.fsencode(path)
    if not path.is_absolute():
        raise SocketPathError(f"socket path must be absolute: {path}")
    if len(text) > MAX_PATH_BYTES:
        raise SocketPathError(f"socket path is longer than {MAX_PATH_BYTES} bytes: {path}")
    if any(byte <= 32 or byte >= 127 or byte in b"%?#" for byte in text):
        raise SocketPathError(f"socket path must be plain ASCII without spaces: {path}")
    return path


def check_ancestors(folder: Path) -> None:
    """
    Refuse a folder that somebody else could swap under us.

    Every ancestor is owned by root or us and writable by nobody else; a sticky folder of
    root's, such as /tmp, is accepted only above a folder of mode 0700 that is ours.

    Raises:
        SocketPathError: names the folder and what is wrong with it.
    """
    us = os.geteuid()
    private_below = False
    for place in (folder, *folder.parents):
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode):
            raise SocketPathError(f"{place} is a symbolic link; name the folder it points to")
        if found.st_uid not in (0, us):
            raise SocketPathError(f"{place} belongs to uid {found.st_uid}, not to root or us")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            sticky = found.st_uid == 0 and found.st_mode & stat.S_ISVTX
            if not (sticky and private_below):
                raise SocketPathError(
                    f"{place} is writable by others; use a folder of your own"
                )
        if found.st_uid == us and stat.S_IMODE(found.st_mode) & 0o077 == 0:
            private_below = True


def bind_unix_socket(path: Path, mode: int) -> socket.socket:
    """
    Return a listening, non-blocking socket at *path* with exactly *mode*.

    A stale socket of ours is replaced in one step; anything else in the way is refused.

    Raises:
        SocketPathError: the path, an ancestor, or what is there already is not acceptable.
    """
    check_socket_path(path)
    try:
        _make_folders(path.parent, 0o755 if mode & 0o066 else 0o700)
        check_ancestors(path.parent)
        _check_replaceable(path)
        return _bind(path, mode)
    except OSError as error:
        raise SocketPathError(f"cannot make the socket {path}: {error.strerror}") from error


def _bind(path: Path, mode: int) -> socket.socket:
    private = path.parent / f".{secrets.token_hex(4)}"
    made = private / "s"
    private.mkdir(mode=0o700)
    private.chmod(0o700)  # the umask may have taken our own rights away
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Through a descriptor: the temporary name may be longer than the final one.
        folder = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{folder}/s")
        finally:
            os.close(folder)
        os.chmod(made, mode)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        os.rename(made, path)
    except BaseException:
        listener.close()
        raise
    finally:
        made.unlink(missing_ok=True)
        private.rmdir()
    return listener


def _make_folders(folder: Path, mode: int) -> None:
    """Make what is missing with exactly *mode*: the umask is never trusted (SEC-37)."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o700)
            one.chmod(mode)


class SocketFile:
    """Which file at *path* is ours: to notice a replacement, and to remove only our own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)

    def is_ours(self) -> bool:
        """False once somebody removed or replaced the file."""
        return _identity(self.path) == self._identity

    def remove(self) -> None:
        """Remove the file, if it is still the one we made."""
        if self.is_ours():
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_replaceable(path: Path) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SocketPathError(f"{path} is there and is no socket; move it away")
    if found.st_uid not in (0, os.geteuid()):
        raise SocketPathError(f"{path} belongs to uid {found.st_uid}; move it away")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1)
        probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        return
    except OSError as error:
        raise SocketPathError(f"{path} is in use: stop the process that serves it") from error
    finally:
        probe.close()
    raise SocketPathError(f"{path} is in use: stop the process that serves it")
