"""Calling the admin sockets, and turning what goes wrong into an exit code and a next step."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from spiffe_wire.commandline import DONE, REFUSED, UNREACHABLE, CommandError, message, say, show

__all__ = ["CommandError", "answered", "call"]

PATIENCE: Final = 60.0
"""Seconds for everything a command asks; a server that is well takes milliseconds."""

_T = TypeVar("_T")


def call(
    path: str,
    ask: Callable[[Any], Awaitable[_T]],
    what: str = "server",
    *,
    if_missing: str = "",
) -> _T:
    """
    Run *ask* on a channel to the admin socket at *path*.

    *if_missing* says what to do when what was asked for is not there.

    Raises:
        CommandError: nobody is there, or the answer is no.
    """
    import grpc

    from spiffe_wire.status import never_answered

    async def ask_it() -> _T:
        async with grpc.aio.insecure_channel(f"unix:{os.path.abspath(path)}") as channel:
            return await asyncio.wait_for(ask(channel), PATIENCE)

    if not os.path.exists(path) and (problem := _unreachable(path, what)):
        raise CommandError(problem, UNREACHABLE)
    try:
        return asyncio.run(ask_it())
    except TimeoutError as error:
        text = f"the {what} at {path} does not answer within {PATIENCE:g} s: see its log"
        raise CommandError(text, UNREACHABLE) from error
    except grpc.aio.AioRpcError as error:
        if never_answered(error):
            text = (
                f"the {what} at {path} closed the connection: it is stopping, or uid "
                f"{os.geteuid()} is not among its admin_uids"
            )
            raise CommandError(_unreachable(path, what) or text, UNREACHABLE) from error
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise CommandError(f"the {what} at {path} does not offer this") from error
        hint = if_missing if error.code() is grpc.StatusCode.NOT_FOUND else ""
        raise CommandError((error.details() or error.code().name) + hint) from error


def answered(answer: Any, style: str, text_of: Callable[[Any], str]) -> int:
    """
    Print the answer to a batch, and return the exit code: refused when any item was.

    The code is the same in every output style; refusals go to standard error as well.
    """
    if style != "text":
        show(message(answer), style)
    refused = 0
    for one in answer.results:
        if one.status.code:
            refused += 1
            say(text_of(one))
        elif style == "text":
            show(None, style, text_of(one))
    return REFUSED if refused else DONE


def _unreachable(path: str, what: str) -> str:
    """
    Say why nobody can be reached at *path*; empty when somebody can.

    For who was not answered, or cannot be: a daemon logs each caller that says nothing.
    """
    flag = "--socket" if what == "server" else "--agent-socket"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except PermissionError:
            return f"not allowed to use {path}: run as the {what}'s user, or as root"
        except (OSError, ValueError):
            return (
                f"no {what} answers at {path}: is it running? name its admin socket with "
                f"{flag}, or start a trust domain with `issuer dev`"
            )
    return ""
