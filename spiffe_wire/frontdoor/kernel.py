"""
Asking the kernel who connected (SEC-31; transport, rules for the Unix sockets).

Everything here happens at accept, before a byte of the peer is read.
"""

import enum
import errno
import functools
import os
import socket
import struct
from typing import Final

from spiffe_core.errors import UnauthenticatedError
from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer

SO_PEERPIDFD: Final = 77  # Linux 6.5; not in the socket module
NO_ID: Final = 2**32 - 1
_CREDENTIALS: Final = struct.Struct("iII")


class PeerPolicy(enum.Enum):
    """What to do on a kernel that cannot hand out the peer's pidfd."""

    ALLOW_FALLBACK = "allow-fallback"
    REQUIRE_PIDFD = "require-pidfd"


def prove(
    connection: socket.socket, policy: PeerPolicy, *, old_kernel: bool = False
) -> UnixPeer:
    """
    Return the process at the other end of an accepted Unix *connection*.

    *old_kernel* takes the road of kernels before 6.5, for tests.

    Raises:
        UnauthenticatedError: the kernel does not say, or says something we don't accept.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    if pid <= 0:
        raise UnauthenticatedError("the caller lives in a PID namespace out of our sight")
    if not _known(uid, "uid") or not _known(gid, "gid"):
        raise UnauthenticatedError("the caller's uid or gid has no meaning here")
    try:
        if old_kernel:
            raise OSError(errno.ENOPROTOOPT, "as on a kernel before 6.5")
        pidfd = PidFd(connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            # ESRCH, EINVAL: it was reaped; EMFILE: our own limit.  Never the fall-back.
            raise UnauthenticatedError("the kernel has no pidfd for the caller") from error
    else:
        # Newer kernels hand out a pidfd of a process that was reaped.
        if not pidfd.alive():
            raise UnauthenticatedError("the caller has ended already")
        return UnixPeer(pid, uid, gid, PeerProof.PIDFD, pidfd)
    if policy is PeerPolicy.REQUIRE_PIDFD:
        raise UnauthenticatedError(
            "this kernel (before 6.5) can't prove callers, and the settings demand proof"
        )
    return _pin(pid, uid, gid)


def _known(number: int, kind: str) -> bool:
    """
    False for an ID that stands for "none", or for all that our user namespace can't name.

    Where every ID has a name, as on a plain host, the overflow ID is the user `nobody`.
    """
    if number == NO_ID:
        return False
    return number != _overflow_id(kind) or _names_all(kind)


@functools.cache
def _overflow_id(kind: str) -> int:
    with open(f"/proc/sys/kernel/overflow{kind}", "rb") as file:
        return int(file.read())


@functools.cache
def _names_all(kind: str) -> bool:
    with open(f"/proc/self/{kind}_map", "rb") as file:
        return sum(int(line.split()[2]) for line in file) == NO_ID


def _pin(pid: int, uid: int, gid: int) -> UnixPeer:
    """Before Linux 6.5: open a pidfd by number and see that the process fits what it sent."""
    try:
        started = start_time(pid)
        pidfd = PidFd(os.pidfd_open(pid))
        # Not the owner of /proc/<pid>: that is root for all who once dropped a privilege.
        if _effective_ids(pid) != (uid, gid) or start_time(pid) != started:
            raise UnauthenticatedError("the caller is not who connected")
        if not pidfd.alive():
            raise UnauthenticatedError("the caller has ended already")
    except OSError as error:
        raise UnauthenticatedError("the caller has ended already") from error
    return UnixPeer(pid, uid, gid, PeerProof.FALLBACK, pidfd)


def _effective_ids(pid: int) -> tuple[int, int]:
    with open(f"/proc/{pid}/status", "rb") as file:
        found = dict(line.split(b":", 1) for line in file if line[:4] in (b"Uid:", b"Gid:"))
    return int(found[b"Uid"].split()[1]), int(found[b"Gid"].split()[1])


def start_time(pid: int) -> int:
    """Return a process's start in clock ticks since boot; no proof of identity by itself."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name may hold spaces and parentheses: split behind the last one.
        return int(file.read().rpartition(b")")[2].split()[19])
