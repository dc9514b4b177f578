"""
Accepting from a listening socket, without losing a connection and without spinning.

Source: SEC-84.  Not `sock_accept`: a task that is cancelled at the wrong moment forgets the
socket it was just handed.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from spiffe_wire.unixsocket import SocketFile

_BATCH: Final = 64  # accepted at a time, so that a flood leaves the loop to others
_PAUSE_SECONDS: Final = 0.1


class Acceptor:
    """
    Hands every connection of *listener* to *admit* until it is closed.

    When the kernel refuses, as it does when we are out of descriptors, *failed* is told
    and the next try comes a moment later.  *file* is removed at close, if it is ours.
    """

    def __init__(
        self,
        listener: socket.socket,
        admit: Callable[[socket.socket], None],
        failed: Callable[[OSError], None],
        file: SocketFile | None = None,
    ) -> None:
        self.file = file
        self._listener = listener
        self._admit = admit
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Stop; idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            if self.file is not None:
                self.file.remove()
            self._listener.close()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            connection.setblocking(False)
            self._admit(connection)
