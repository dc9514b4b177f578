"""Between the network of this test and that of an engine, which has its own."""

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.asynccontextmanager
async def reachable(pid: int, *ports: int) -> AsyncIterator[None]:
    """
    While entered, what listens on 127.0.0.1 here is there for the network of process *pid*.

    At the same address and *ports*: names in certificates and settings hold on both sides.
    """
    async with contextlib.AsyncExitStack() as stack:
        for port in ports:
            listener = await asyncio.to_thread(_listener, pid, port)
            relay = _Relay(port)
            server = await asyncio.start_server(relay.join, sock=listener)
            stack.push_async_callback(relay.close)
            stack.callback(server.close)
        yield


def raise_loopback(pid: int) -> None:
    """Have 127.0.0.1 in the network of process *pid*, which nobody has brought up yet."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_raise_loopback, pid).result()


class _Relay:
    """Joins each connection to one of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on both ways until one side ends."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                near, far = await asyncio.open_connection("127.0.0.1", self._port)
                with contextlib.closing(far):
                    await asyncio.gather(_pipe(reader, far), _pipe(near, writer))
        except asyncio.CancelledError:
            pass  # the end of the test
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


def _listener(pid: int, port: int) -> socket.socket:
    """A socket that listens in the network of *pid*; made by a thread that goes there alone."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_listen, pid, port).result()


def _listen(pid: int, port: int) -> socket.socket:
    _raise_loopback(pid)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def _raise_loopback(pid: int) -> None:
    """Take this thread to the network of *pid*, for good, and bring up what is local there."""
    place = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if _libc.setns(place, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(place)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
