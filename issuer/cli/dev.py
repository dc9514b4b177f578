"""
``issuer dev``: one trust domain on this machine, for trying things and for tests.

The server runs in this process, `issuer-agent` as a process of its own.  Everything lies in a
private folder that goes with the command, unless ``--keep`` names one.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop

from issuer.app import Server, serve
from issuer.cli import AGENT_SOCKET_VARIABLE, SOCKET_VARIABLE
from issuer.cli.calls import CommandError, say
from issuer.cli.output import spiffe_id
from issuer.config import LogStyle, RateLimits, ServerSettings, Status
from spiffe_core.entry import RegistrationEntry
from spiffe_core.pem import certificates_to_pem
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire import logs
from spiffe_wire.convert.entry import selectors_from_wire
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc

START_SECONDS: Final = 20.0
_TOKEN_TTL: Final = timedelta(minutes=10)
COMMAND_PATH: Final = "/dev/command"


@dataclass(frozen=True, slots=True)
class DevDomain:
    """A trust domain that runs on this machine."""

    server: Server
    agent_id: SpiffeId
    workload_socket: Path
    admin_socket: Path
    agent_admin_socket: Path

    @property
    def trust_domain(self) -> TrustDomain:
        """Its name."""
        return self.agent_id.trust_domain

    @property
    def environment(self) -> dict[str, str]:
        """What workloads and our own commands need to find it."""
        return {
            "SPIFFE_ENDPOINT_SOCKET": self.endpoint,
            SOCKET_VARIABLE: str(self.admin_socket),
            AGENT_SOCKET_VARIABLE: str(self.agent_admin_socket),
        }

    @property
    def endpoint(self) -> str:
        """What ``SPIFFE_ENDPOINT_SOCKET`` is set to."""
        return f"unix://{self.workload_socket}"


@asynccontextmanager
async def domain(
    name: str, folder: Path, sockets: Path, *, verbose: bool = False
) -> AsyncIterator[DevDomain]:
    """
    Run server and agent while entered; files in *folder*, sockets in *sockets*.

    Raises:
        CommandError: the agent does not come up; with the end of its log.
    """
    logs.set_up("text", "info" if verbose else "critical")
    settings = ServerSettings(
        trust_domain=name,
        bind_address="127.0.0.1",
        bind_port=0,
        data_dir=folder / "server",
        runtime_dir=sockets / "server",
        rate_limits=RateLimits(attestation=False),
        status=Status(port=0),
        log_style=LogStyle.TEXT,
    )
    async with serve(settings) as server:
        bundle = folder / "bundle.pem"
        roots = [one.der for one in server.hub.bundle.x509_authorities]
        bundle.write_text(certificates_to_pem(roots))
        token = folder / "join-token"
        made, _ = await server.agents.create_join_token(
            _TOKEN_TTL, "", None, actor="issuer dev"
        )
        _write_private(token, made.text)
        workload = sockets / "workload" / "workload.sock"
        admin = sockets / "agent" / "admin.sock"
        config = folder / "agent.yaml"
        config.write_text(
            f"trust_domain: {name}\n"
            f"data_dir: {folder / 'agent'}\n"
            f"runtime_dir: {sockets / 'agent'}\n"
            f"workload_socket: {workload}\n"
            f"admin_socket: {admin}\n"
            f"join_token_file: {token}\n"
            f"server: {{address: 127.0.0.1, port: {server.port}, trust_bundle: {bundle}}}\n"
            "status: {port: 0}\n"
            "log_style: text\n"
        )
        async with _agent(config, folder / "agent.log", verbose=verbose) as process:
            agent_id = await _ready(admin, process, folder / "agent.log")
            yield DevDomain(server, agent_id, workload, settings.admin_socket_path, admin)


@contextlib.contextmanager
def folders(keep: str | None) -> Any:
    """A folder for files and one for sockets; both are gone afterwards unless kept."""
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else "/tmp")  # noqa: S108
    if not os.access(base, os.W_OK):
        base = "/tmp"  # noqa: S108 a fresh folder of mode 0700 is made in it
    sockets = Path(tempfile.mkdtemp(prefix="issuer-dev-", dir=base))
    if os.geteuid() == 0 and base == "/run":
        sockets.chmod(0o755)  # workloads of every user reach the socket
    files = Path(keep).absolute() if keep else Path(tempfile.mkdtemp(prefix="issuer-dev-"))
    files.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield files, sockets
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
        if not keep:
            shutil.rmtree(files, ignore_errors=True)


def run(arguments: argparse.Namespace) -> int:
    """Run a trust domain in the foreground, or for as long as a command runs."""
    with folders(arguments.keep) as (files, sockets):
        return uvloop.run(_run(arguments, files, sockets))


async def _run(arguments: argparse.Namespace, files: Path, sockets: Path) -> int:
    stop = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    async with domain(arguments.trust_domain, files, sockets, verbose=arguments.verbose) as dev:
        if arguments.command_line:
            return await _command(dev, arguments.command_line, stop)
        exports = [f"{name}={value}" for name, value in dev.environment.items()]
        print("export", *_path(), *exports)
        print(
            f"issuer entry create --spiffe-id spiffe://{dev.trust_domain}/me "
            f"--parent-id {dev.agent_id} --selector unix:uid:{os.getuid()}"
        )
        print("issuer-agent fetch x509", flush=True)
        print(
            f"\ntrust domain {dev.trust_domain} runs; paste the three lines into another "
            "terminal; Ctrl-C stops it",
            file=sys.stderr,
        )
        await stop.wait()
    return 0


async def _command(dev: DevDomain, command: Sequence[str], stop: asyncio.Event) -> int:
    """
    Run *command* with an identity registered from its real attestation.

    The child waits behind a pipe, as the program it will be started by; what differs once it
    has become *command* is the executable, so the entry asks for the user alone.
    """
    gate_read, gate_write = os.pipe()
    program = shutil.which(command[0])
    if program is None:
        raise CommandError(f"{command[0]}: no such command", 127)
    # `sh -c` would be a shell; python -c keeps argument vectors (SEC-96).
    waiter = (
        "import os, sys; fd = int(sys.argv[1]); os.read(fd, 1); os.close(fd); "
        "os.execv(sys.argv[2], sys.argv[3:])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", waiter, str(gate_read), program, *command,
        pass_fds=(gate_read,),
        env={**os.environ, **dev.environment},
    )  # fmt: skip
    os.close(gate_read)
    try:
        await _register(dev, process.pid)
    finally:
        os.close(gate_write)
    stopping = asyncio.create_task(stop.wait())
    ending = asyncio.create_task(process.wait())
    await asyncio.wait({stopping, ending}, return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await ending
    stopping.cancel()
    code = ending.result()
    return 128 - code if code < 0 else code


async def _register(dev: DevDomain, pid: int) -> None:
    async with grpc.aio.insecure_channel(f"unix:{dev.agent_admin_socket}") as channel:
        request = agentadmin_pb2.ExplainProcessRequest(pid=pid)
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        learnt = selectors_from_wire((await stub.ExplainProcess(request)).selectors)
        chosen = frozenset(one for one in learnt if one.value.startswith("uid:"))
        if not chosen:
            raise CommandError("the agent could not attest the command")
        entry = RegistrationEntry(
            SpiffeId(dev.trust_domain, COMMAND_PATH), dev.agent_id, chosen
        )
        known = {(one.spiffe_id, one.selectors) for one in dev.server.hub.index.entries()}
        if (entry.spiffe_id, entry.selectors) not in known:
            await dev.server.entries.create(entry, actor="issuer dev")
        for _ in range(500):
            status = await stub.GetStatus(agentadmin_pb2.GetStatusRequest())
            if status.x509_svids >= 1:
                return
            await asyncio.sleep(0.01)
    raise CommandError("the command's identity did not arrive")


@asynccontextmanager
async def _agent(
    config: Path, log: Path, *, verbose: bool
) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "workload_api.agent", "run", "-c", str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=None if verbose else file,
            start_new_session=True,  # Ctrl-C is for us; we stop it in our own order
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 8)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _ready(admin: Path, process: asyncio.subprocess.Process, log: Path) -> SpiffeId:
    """Wait until the agent is in step, and return its ID."""
    loop = asyncio.get_running_loop()
    until = loop.time() + START_SECONDS
    while loop.time() < until:
        if process.returncode is not None:
            tail = log.read_text(errors="replace").splitlines()[-3:]
            raise CommandError("the agent ended at once: " + " | ".join(tail))
        if _listens(admin):
            async with grpc.aio.insecure_channel(f"unix:{admin}") as channel:
                stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
                status = await stub.GetStatus(agentadmin_pb2.GetStatusRequest())
                if status.connected:
                    return SpiffeId.parse(spiffe_id(status.agent_id))
        await asyncio.sleep(0.01)
    say(log.read_text(errors="replace")[-2000:])
    raise CommandError(f"the agent is not ready after {START_SECONDS:g} s; its log is above")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _path() -> list[str]:
    """What makes our commands found in another terminal, with no environment active."""
    if shutil.which("issuer"):
        return []
    return [f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
