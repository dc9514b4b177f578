"""
Who is at the other end of a connection, and how that was proved.

Source: SEC-17, SEC-31, SEC-36.  A `Peer` belongs to one connection; `peer_of` finds it for
an RPC by the secret name that its connection was relayed under.
"""

import asyncio
import enum
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from spiffe_core.errors import ForbiddenError, UnauthenticatedError
from spiffe_core.x509svid import X509Svid


class PeerGoneError(ForbiddenError):
    """The process that opened the connection has ended; nobody inherits its identity."""


class PeerProof(enum.Enum):
    """How a process was pinned."""

    PIDFD = "pidfd"
    """The kernel handed us a pidfd of the peer: PID reuse cannot fool it."""
    FALLBACK = "fallback"
    """Kernel before 6.5: `pidfd_open` at once, start time and owner compared; weaker."""


class PidFd:
    """Owns one pidfd; closed with the last reference, so that nobody polls a reused number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def alive(self) -> bool:
        """True while the process lives (0.3 µs)."""
        return not self._poll.poll(0)

    def __del__(self) -> None:
        os.close(self.fd)


def _nothing() -> None:
    pass


@dataclass(eq=False, slots=True)
class UnixPeer:
    """A process of this machine, as the kernel knew it when it connected."""

    pid: int
    uid: int
    gid: int
    proof: PeerProof
    pidfd: PidFd = field(repr=False)
    cut: Callable[[], None] = field(default=_nothing, repr=False)
    """Ends its connection at once."""
    _exited: "asyncio.Future[None] | None" = field(default=None, repr=False)
    _closed: bool = field(default=False, repr=False)

    def alive(self) -> bool:
        """True while the process that connected lives."""
        return self.pidfd.alive()

    def check_alive(self) -> None:
        """
        Refuse to go on once the process is gone.

        Raises:
            PeerGoneError: it is.
        """
        if not self.pidfd.alive():
            raise PeerGoneError("the calling process has ended")

    def exited(self) -> "asyncio.Future[None]":
        """
        Return a future that is done when the process ends; shared by all who wait.

        It is cancelled when the connection closes: nobody is left to be told then.
        """
        if self._exited is None:
            loop = asyncio.get_running_loop()
            self._exited = loop.create_future()
            if self._closed:
                self._exited.cancel()
            else:
                loop.add_reader(self.pidfd.fd, self._on_exit)
        return self._exited

    def connection_closed(self) -> None:
        """Forget the reader; the pidfd itself closes with the last holder of this peer."""
        self._closed = True
        if self._exited is not None:
            self._exited.get_loop().remove_reader(self.pidfd.fd)
            self._exited.cancel()

    def _on_exit(self) -> None:
        if self._exited is not None and not self._exited.done():
            self._exited.get_loop().remove_reader(self.pidfd.fd)
            self._exited.set_result(None)


@dataclass(eq=False, slots=True)
class TlsPeer:
    """A peer over TLS: *svid* is what it proved, or None when it sent no certificate."""

    svid: X509Svid | None
    address: str
    cut: Callable[[], None] = field(default=_nothing, repr=False)
    """Ends its connection at once."""

    def connection_closed(self) -> None:
        """Nothing is held open for it."""


Peer: TypeAlias = UnixPeer | TlsPeer

# Secret inner name to peer.  One table for the process: the names are 128 random bits.
REGISTRY: dict[str, Peer] = {}


def peer_of(context: Any) -> Peer:
    """
    Return the proven peer of an RPC.

    Raises:
        UnauthenticatedError: the connection did not come through a front door.
    """
    peer = REGISTRY.get(context.peer())
    if peer is None:
        raise UnauthenticatedError("the caller cannot be identified")
    return peer


def unix_peer_of(context: Any) -> UnixPeer:
    """
    Return the calling process of an RPC, which is alive at this moment.

    Raises:
        UnauthenticatedError: no such connection, or not one over a Unix socket.
        PeerGoneError: it has ended.
    """
    peer = peer_of(context)
    if not isinstance(peer, UnixPeer):
        raise UnauthenticatedError("this is served on a Unix socket alone")
    peer.check_alive()
    return peer
