"""
``issuer dev``: one trust domain on this machine, for trying things and for tests.

Alone it prints three lines to paste; with a command it runs that, with an identity, and ends
with it: its exit code, its signals, and nothing left behind.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from issuer.cli.domain import DevDomain, domain, folders, stop
from issuer.cli.executable import Executable, executable_of
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import AlreadyExistsError
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.commandline import DONE, REFUSED, USAGE, CommandError, explained, say, show
from spiffe_wire.convert.entry import selectors_from_wire, selectors_to_wire
from spiffe_wire.pb.spiffe_issuer.v1 import (
    agentadmin_pb2,
    agentadmin_pb2_grpc,
    explain_pb2,
    explain_pb2_grpc,
)
from spiffe_wire.running import NO_COMMAND, NO_PROGRAM, heard_already

__all__ = ["DevDomain", "domain", "folders", "run"]

COMMAND_PATH: Final = "/dev/command"
STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON: Final = (*STOPPING, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(arguments: argparse.Namespace) -> int:
    """Run a trust domain in the foreground, or for as long as a command runs."""
    with explained("--trust-domain"):
        TrustDomain(arguments.trust_domain)
    if arguments.words:
        given = shlex.join(arguments.words)
        raise CommandError(f"put -- before the command: issuer dev -- {given}", USAGE)
    command = arguments.command_line
    # The command finds ours too, behind everything that its caller has.
    ours = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), ours])
    program = _program_of(command[0]) if command else ""
    umask = os.umask(0o077)
    # Not uvloop: it forks with grpc's threads running, and grpc says so on standard error.
    return asyncio.run(_run(arguments, program, umask))


def _program_of(name: str) -> str:
    """
    Find the command as a shell does, before anything is started.

    Raises:
        CommandError: with a shell's exit code, 127 or 126.
    """
    found = shutil.which(name)
    if found is None and not os.path.exists(name):
        raise CommandError(f"{name}: no such command", NO_COMMAND)
    if found is None:
        raise CommandError(f"{name}: is not a program that can be run", NO_PROGRAM)
    return found


async def _run(arguments: argparse.Namespace, program: str, umask: int) -> int:
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    passed_on = PASSED_ON if program else STOPPING
    for one in passed_on:
        loop.add_signal_handler(one, signals.put_nowait, one)
    with folders(arguments.keep) as (files, sockets):
        async with domain(
            arguments.trust_domain, files, sockets, verbose=arguments.verbose
        ) as dev:
            if program:
                command = Command(
                    program, arguments.command_line, umask, any_program=arguments.any_program
                )
                return await _command(dev, command, signals)
            _announce(dev, arguments.output)
            stop = asyncio.create_task(signals.get())
            if await _first(stop, dev.agent_ended) is dev.agent_ended:
                stop.cancel()
                raise CommandError(dev.last_words())
    return DONE


def _announce(dev: DevDomain, style: str) -> None:
    """Print how to use the domain from another terminal, where nothing of ours is set up."""
    facts = {
        "trust_domain": dev.trust_domain.name,
        "agent_id": dev.agent_id.uri,
        "spiffe_endpoint_socket": dev.endpoint,
        "admin_socket": str(dev.admin_socket),
        "agent_admin_socket": str(dev.agent_admin_socket),
    }
    variables = " ".join(f"{name}={shlex.quote(one)}" for name, one in dev.environment.items())
    path, issuer, agent = _programs()
    lines = [
        f"export {path}{variables}",
        f"{issuer} entry create --spiffe-id spiffe://{dev.trust_domain}/me --parent-id "
        f"{dev.agent_id} --selector unix:uid:$(id -u)",
        f"{agent} fetch x509",
    ]
    show(facts, style, "\n".join(lines))
    sys.stdout.flush()
    paste = "paste the three lines into another terminal; " if style == "text" else ""
    print(
        f"trust domain {dev.trust_domain} runs; {paste}Ctrl-C stops it",
        file=sys.stderr,
        flush=True,
    )


@dataclass(frozen=True, slots=True)
class Command:
    """What to run in the domain, and the file mode mask that it gets."""

    program: str
    arguments: Sequence[str]
    umask: int
    any_program: bool = False


async def _command(dev: DevDomain, command: Command, signals: "asyncio.Queue[int]") -> int:
    """Run *command* with an identity; return its exit code, 128 + n when a signal ended it."""
    executable = None
    if not command.any_program:
        executable = await asyncio.to_thread(executable_of, command.program)
    await _register(dev, executable)
    try:
        process = await asyncio.create_subprocess_exec(
            *command.arguments,
            executable=command.program,
            umask=command.umask,
            env={**os.environ, **dev.environment},
        )
    except OSError as error:
        raise CommandError(f"{command.arguments[0]}: {error.strerror}", NO_PROGRAM) from error
    ending = asyncio.create_task(process.wait())
    passing = asyncio.create_task(_pass_on(signals, process))
    try:
        if await _first(ending, dev.agent_ended) is dev.agent_ended:
            say(f"{dev.last_words()}; the command is stopped")
            await stop(process)
            return REFUSED
    finally:
        passing.cancel()
    code = ending.result()
    if executable is not None and dev.denied_somebody():
        say(
            f"a program other than {executable.path} asked for an identity and was refused: "
            "`issuer dev --any-program -- …` gives it to every program of this user"
        )
    return 128 - code if code < 0 else code


async def _first(*waited: "asyncio.Task[Any]") -> "asyncio.Task[Any]":
    """Wait until one of them is done, and return it; the earlier one named wins."""
    done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    return next(one for one in waited if one in done)


async def _pass_on(signals: "asyncio.Queue[int]", process: asyncio.subprocess.Process) -> None:
    while True:
        number = await signals.get()
        # Of a key at the terminal the command has heard itself: it is in the foreground too.
        if not heard_already(number):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


async def _register(dev: DevDomain, executable: Executable | None) -> None:
    """
    Give the command its identity: by what the agent attests of us, who will start it.

    The user is the one the agent sees.  The executable is the command's own, where it is
    known; it does not keep apart programs of one user (SEC-32), but shows what an entry is.

    Raises:
        CommandError: the agent cannot vouch for us, or the entry does not reach it.
    """
    async with grpc.aio.insecure_channel(f"unix:{dev.agent_admin_socket}") as channel:
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        request = agentadmin_pb2.ExplainProcessRequest(pid=os.getpid())
        answer = await stub.ExplainProcess(request)
        learnt = selectors_from_wire(answer.selectors)
        chosen = {one for one in learnt if one.value.startswith("uid:")}
        if not chosen:
            raise CommandError(f"the agent cannot vouch for processes here: {answer.text}")
        if executable is not None:
            chosen |= {
                Selector("unix", f"path:{executable.path}"),
                Selector("unix", f"sha256:{executable.sha256}"),
            }
        entry = RegistrationEntry(
            SpiffeId(dev.trust_domain, COMMAND_PATH), dev.agent_id, frozenset(chosen)
        )
        with contextlib.suppress(AlreadyExistsError):  # of an earlier life
            await dev.server.entries.create(entry, actor="issuer dev")
        wanted = explain_pb2.ExplainSelectorsRequest(
            selectors=selectors_to_wire(entry.selectors)
        )
        asking = explain_pb2_grpc.ExplainStub(channel)
        for _ in range(500):
            if (await asking.ExplainSelectors(wanted)).matched:
                return
            await asyncio.sleep(0.01)
    raise CommandError("the command's identity did not arrive at the agent in 5 s")


def _programs() -> tuple[str, str, str]:
    """
    How to call our programs from a terminal where nothing of ours is set up.

    First what to put before the variables; behind the rest of the PATH, since the folder of
    a virtual environment has a `python` too.
    """
    folder = Path(sys.executable).parent
    if not all((folder / name).exists() for name in ("issuer", "issuer-agent")):
        python = shlex.quote(sys.executable)
        return "", f"{python} -m issuer", f"{python} -m workload_api.agent"
    if str(folder) in os.defpath.split(":"):
        return "", "issuer", "issuer-agent"
    return f'PATH="$PATH":{shlex.quote(str(folder))} ', "issuer", "issuer-agent"
