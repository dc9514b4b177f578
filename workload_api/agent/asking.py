"""How the commands of ``issuer-agent`` ask: a workload the agent, and an operator its admin."""

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from spiffe_core.errors import SpiffeError
from spiffe_wire.commandline import UNREACHABLE, USAGE, CommandError, explained
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from spiffe_wire.status import error_of, never_answered
from workload_api.client.client import WorkloadClient

PATIENCE: Final = 30.0
"""Seconds for one answer; an agent that is well holds a caller back for 5 at most."""

_T = TypeVar("_T")


def address_of(option: str | None) -> str:
    """
    Return the address of the Workload API: of the option, else of the variable.

    Raises:
        CommandError: neither names one.
    """
    address = option or os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not address:
        raise CommandError(
            f"name the Workload API: set {ENVIRONMENT_VARIABLE}=unix:///path/to/socket, or "
            "use --endpoint",
            USAGE,
        )
    return f"unix://{address}" if address.startswith("/") else address


def with_client(
    arguments: argparse.Namespace,
    ask: Callable[[WorkloadClient], Awaitable[_T]],
    *,
    patience: float | None = PATIENCE,
) -> _T:
    """
    Run *ask* on a client of the Workload API.

    Raises:
        CommandError: no address or a bad one, nobody there, or no answer in time.
        SpiffeError: the agent's refusal.
    """
    address = address_of(arguments.endpoint)
    with explained("--endpoint" if arguments.endpoint else ENVIRONMENT_VARIABLE):
        client = WorkloadClient(address)

    async def go() -> _T:
        async with client:
            return await asyncio.wait_for(ask(client), patience)

    return _reached(go, f"no agent answers at {address}: is it running?", address)


def with_admin(arguments: argparse.Namespace, ask: Callable[[Any], Awaitable[_T]]) -> _T:
    async def go() -> _T:
        target = f"unix:{os.path.abspath(arguments.admin)}"
        async with grpc.aio.insecure_channel(target) as channel:
            try:
                return await asyncio.wait_for(ask(channel), PATIENCE)
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    problem = (
        f"no agent answers at {arguments.admin}: is it running, and may uid {os.geteuid()} ask "
        "it? name its admin socket with --socket"
    )
    return _reached(go, problem, arguments.admin)


def _reached(go: Callable[[], Any], problem: str, where: str) -> Any:
    try:
        return asyncio.run(go())
    except TimeoutError as error:
        text = f"the agent at {where} does not answer within {PATIENCE:g} s: see its log"
        raise CommandError(text, UNREACHABLE) from error
    except SpiffeError as error:
        cause = error.__cause__
        if isinstance(cause, grpc.aio.AioRpcError) and never_answered(cause):
            raise CommandError(problem, UNREACHABLE) from error
        raise
