"""
Which file a process runs: its identity, its path, its hash (SEC-32).

Everything here may block: the file lies where the process's user likes.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Final

from workload_api.attestors.protocol import AttestationError

MAX_EXECUTABLE_BYTES: Final = 512 * 1024 * 1024  # SEC-32
_CHUNK: Final = 1024 * 1024
_DELETED: Final = " (deleted)"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Changes whenever the content does: the inode's change time cannot be set back."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    regular: bool

    @classmethod
    def of(cls, found: os.stat_result) -> "FileIdentity":
        """The identity in a stat result."""
        return cls(
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            stat.S_ISREG(found.st_mode),
        )


@dataclass(frozen=True, slots=True)
class Executable:
    """What a process runs; *path* is None when no file of that name is it any more."""

    identity: FileIdentity
    path: str | None


def executable_of(pid: int) -> Executable:
    """
    Return what process *pid* runs now.

    Raises:
        AttestationError: it cannot be read, or was exchanged meanwhile.
    """
    link = f"/proc/{pid}/exe"
    try:
        before = FileIdentity.of(os.stat(link))
        path = os.readlink(link)
        after = FileIdentity.of(os.stat(link))
    except OSError as error:
        raise AttestationError("the process's executable cannot be read") from error
    if before != after:
        raise AttestationError("the process changed its executable meanwhile")
    return Executable(before, path if _is_true(pid, path, before) else None)


def digest_of(pid: int, identity: FileIdentity) -> str:
    """
    Return the SHA-256 of what process *pid* runs, in hex.

    Raises:
        AttestationError: that is not *identity*, was written to meanwhile, or is too large.
    """
    if not identity.regular or identity.size > MAX_EXECUTABLE_BYTES:
        raise AttestationError("the executable is too large to hash")
    digest = hashlib.sha256()
    try:
        with open(f"/proc/{pid}/exe", "rb", buffering=0) as file:
            same = FileIdentity.of(os.fstat(file.fileno())) == identity
            while same and (data := file.read(_CHUNK)):
                digest.update(data)
                same = file.tell() <= identity.size
            same = same and FileIdentity.of(os.fstat(file.fileno())) == identity
    except OSError as error:
        raise AttestationError("the process's executable cannot be read") from error
    if not same:
        raise AttestationError("the process changed its executable meanwhile")
    return digest.hexdigest()


def _is_true(pid: int, path: str, identity: FileIdentity) -> bool:
    # The kernel writes " (deleted)" behind the name of a file that is gone, and a file may
    # really be called so: what ran from a deleted "app" must not pass for "app (deleted)".
    if not path.endswith(_DELETED):
        return True
    try:
        found = os.stat(f"/proc/{pid}/root{path}")
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (identity.device, identity.inode)
