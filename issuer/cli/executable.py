"""
What executable a command becomes, known before it runs.

Source: SEC-32; execve(2).  The kernel runs a script's interpreter, so that is what
``/proc/<pid>/exe`` will name, and what an attestor will see.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from typing import Final

from spiffe_core.text import utf8_bytes

MAX_SCRIPTS: Final = 5  # Linux follows an interpreter that is itself a script this often
_HEAD_BYTES: Final = 256  # BINPRM_BUF_SIZE: of a script's first line the kernel reads no more
MAX_HASHED_BYTES: Final = 512 * 1024 * 1024  # SEC-32: the attestor hashes no larger ones

LAUNCHERS: Final = frozenset(
    {
        "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh",
        "chroot", "chrt", "coreutils", "doas", "env", "gdb", "gmake", "ionice", "make", "nice",
        "nohup", "nsenter", "parallel", "prlimit", "runuser", "screen", "script", "setpriv",
        "setsid", "stdbuf", "strace", "su", "sudo", "taskset", "time", "timeout", "tmux",
        "unshare", "watch", "xargs",
    }
)  # fmt: skip
"""Programs that are run to run others: who needs the identity is another executable."""


@dataclass(frozen=True, slots=True)
class Executable:
    """The file a process will execute, links resolved, and its SHA-256 in hex."""

    path: str
    sha256: str


def executable_of(program: str) -> Executable | None:
    """
    Return what *program* becomes, or None where that cannot be known before it runs.

    Unknown is: a shell or another launcher, a file that is neither ELF nor a script (the
    kernel may have a handler for it), an interpreter that is not there, or one we can't read.
    """
    for _ in range(MAX_SCRIPTS + 1):
        path = os.path.realpath(program)
        try:
            with open(path, "rb") as file:
                head = file.read(_HEAD_BYTES)
                if head.startswith(b"\x7fELF"):
                    if os.path.basename(path) in LAUNCHERS or utf8_bytes(path) is None:
                        return None
                    if os.fstat(file.fileno()).st_size > MAX_HASHED_BYTES:
                        return None
                    file.seek(0)
                    return Executable(path, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            return None
        interpreter = _interpreter(head)
        if interpreter is None:
            return None
        program = interpreter
    return None


def _interpreter(head: bytes) -> str | None:
    if not head.startswith(b"#!"):
        return None
    words = os.fsdecode(head[2:].split(b"\n", 1)[0]).split()
    if not words:
        return None
    if os.path.basename(words[0]) != "env":
        return words[0]
    # `#!/usr/bin/env NAME`: env becomes what NAME is on the PATH; -S splits, as the kernel
    # does not.  Anything else (NAME=value, other options) is for env alone to understand.
    rest = words[1:]
    if rest[:1] == ["-S"]:
        rest = rest[1:]
    if not rest or rest[0].startswith("-") or "=" in rest[0]:
        return None
    return shutil.which(rest[0])
