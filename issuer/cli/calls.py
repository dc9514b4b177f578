"""Calling the admin sockets, and turning what goes wrong into an exit code and a next step."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

DONE: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3

_T = TypeVar("_T")


class CommandError(Exception):
    """A command cannot go on; the text says what to do next."""

    def __init__(self, text: str, code: int = REFUSED) -> None:
        super().__init__(text)
        self.code = code


def guarded(run: Callable[[], int]) -> int:
    """Run a command; print what went wrong, and return its exit code."""
    from spiffe_core.errors import SpiffeError

    try:
        return run()
    except CommandError as error:
        say(str(error))
        return error.code
    except SpiffeError as error:
        say(str(error))
        return REFUSED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def say(text: str) -> None:
    """Say what went wrong, on standard error, in red on a terminal."""
    if sys.stderr.isatty():
        text = f"\x1b[31m{text}\x1b[0m"
    print(text, file=sys.stderr)


def call(socket: str, ask: Callable[[Any], Awaitable[_T]], what: str = "server") -> _T:
    """
    Run *ask* on a channel to the admin socket at *socket*.

    Raises:
        CommandError: nobody is there, or the answer is no.
    """
    import grpc

    async def ask_it() -> _T:
        if not os.path.exists(socket):
            raise CommandError(_not_there(socket, what), UNREACHABLE)
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            return await ask(channel)

    try:
        return asyncio.run(ask_it())
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise CommandError(_not_there(socket, what), UNREACHABLE) from error
        raise CommandError(error.details() or error.code().name) from error


def _not_there(socket: str, what: str) -> str:
    flag = "--socket" if what == "server" else "--agent-socket"
    if os.path.exists(socket) and not os.access(socket, os.W_OK):
        return f"not allowed to use {socket}: run as the {what}'s user, or as root"
    return (
        f"no {what} answers at {socket}: is it running? name its admin socket with {flag}, "
        "or start a trust domain with `issuer dev`"
    )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """
    Turn a parse error into wrong usage of the argument *what*.

    Raises:
        CommandError: with exit code 2.
    """
    from spiffe_core.errors import MalformedError

    try:
        yield
    except MalformedError as error:
        raise CommandError(f"{what}: {error}", USAGE) from error
