"""
Addresses of a host name, looked up where a resolver that hangs holds up nobody.

The loop's own look-ups cannot be given up: asyncio waits for their thread at its end, uvloop
for libuv's (seen: 10 s to stop an agent whose name server was gone).
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading


class Names:
    """The addresses of one host; one look-up at a time, however many wait for it."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._looking: asyncio.Future[list[str]] | None = None

    async def addresses(self) -> list[str]:
        """
        Return the addresses to try, the best first; an address is its own.

        Raises:
            OSError: there are none, or the resolver cannot be asked.
        """
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(self._host))]
        if self._looking is None:
            self._looking = self._look()
        # Who stops waiting leaves it to the next one.
        return await asyncio.shield(self._looking)

    def _look(self) -> "asyncio.Future[list[str]]":
        loop = asyncio.get_running_loop()
        looking: asyncio.Future[list[str]] = loop.create_future()

        def tell(found: list[str] | OSError) -> None:
            self._looking = None
            if isinstance(found, list):
                looking.set_result(found)
            else:
                looking.set_exception(found)
                looking.exception()  # also if nobody waits for it any more

        def look() -> None:
            found: list[str] | OSError
            try:
                answers = socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
                found = list(dict.fromkeys(str(one[4][0]) for one in answers))
            except OSError as error:
                found = error
            except UnicodeError:
                found = OSError("not a host name")
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, found)

        # A daemon: neither the loop nor the interpreter waits for it.
        threading.Thread(target=look, name="look-up", daemon=True).start()
        return looking
