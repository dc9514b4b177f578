"""
Asking the kernel who connected (SEC-31; transport, rules for the Unix sockets).

Everything here happens at accept, before a byte of the peer is read.
"""

import enum
import errno
import os
import socket
import struct
from typing import Final

from spiffe_core.errors import UnauthenticatedError
from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer

SO_PEERPIDFD: Final = 77  # Linux 6.5; not in the socket module
OVERFLOW_ID: Final = 65534  # an ID that has no name in our user namespace
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
    if uid == NO_ID or gid == NO_ID:
        raise UnauthenticatedError("the caller's uid or gid has no meaning here")
    try:
        if old_kernel:
            raise OSError(errno.ENOPROTOOPT, "as on a kernel before 6.5")
        fd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        return UnixPeer(pid, uid, gid, PeerProof.PIDFD, PidFd(fd))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise UnauthenticatedError("the caller has ended already") from error
    if policy is PeerPolicy.REQUIRE_PIDFD:
        raise UnauthenticatedError(
            "this kernel (before 6.5) can't prove callers, and the settings demand proof"
        )
    return _pin(pid, uid, gid)


def _pin(pid: int, uid: int, gid: int) -> UnixPeer:
    """Before Linux 6.5: open a pidfd by number and see that the process fits what it sent."""
    try:
        started = start_time(pid)
        pidfd = PidFd(os.pidfd_open(pid))
        owner = os.stat(f"/proc/{pid}").st_uid
        if start_time(pid) != started or owner != uid or not pidfd.alive():
            raise UnauthenticatedError("the caller has ended already")
    except OSError as error:
        raise UnauthenticatedError("the caller has ended already") from error
    return UnixPeer(pid, uid, gid, PeerProof.FALLBACK, pidfd)


def start_time(pid: int) -> int:
    """Return a process's start in clock ticks since boot; no proof of identity by itself."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name may hold spaces and parentheses: split behind the last one.
        return int(file.read().rpartition(b")")[2].split()[19])
