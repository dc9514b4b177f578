"""
A trust domain on this machine, for `issuer dev` and the demo: server and agent, SQLite.

The server runs in this process, `issuer-agent` as a process of its own that ends with us,
however we end.  Sockets lie in a fresh folder, files in one that may be kept.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import grpc

from issuer.app import Server, serve
from issuer.config import LogStyle, RateLimits, ServerSettings, Status
from spiffe_core.pem import certificates_to_pem
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire import logs
from spiffe_wire.commandline import CommandError, spiffe_id
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 8.0
MAX_BASE: Final = 40
"""Bytes; what is made below it has 61, and a socket's path 107 in all."""
_TOKEN_TTL: Final = timedelta(minutes=10)

# The agent imports from where we do, never from the folder that we were called in; and a
# signal reaches it should we be killed.  1 is PR_SET_PDEATHSIG, 15 SIGTERM.
_AGENT: Final = """
import ctypes, json, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
sys.path[:] = json.loads(sys.argv[2])
from workload_api.agent.cli import main
sys.exit(main(["run", "--config", sys.argv[3]]))
"""


@dataclass(frozen=True, slots=True)
class DevDomain:
    """A trust domain that runs on this machine."""

    server: Server
    agent_id: SpiffeId
    workload_socket: Path
    admin_socket: Path
    agent_admin_socket: Path
    agent_ended: "asyncio.Task[int]"
    log: Path

    @property
    def trust_domain(self) -> TrustDomain:
        """Its name."""
        return self.agent_id.trust_domain

    @property
    def endpoint(self) -> str:
        """What ``SPIFFE_ENDPOINT_SOCKET`` is set to."""
        return f"unix://{self.workload_socket}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What a program needs to use the domain, and our commands to ask it."""
        return {
            "SPIFFE_ISSUER_SOCKET": str(self.admin_socket),
            "SPIFFE_ISSUER_AGENT_SOCKET": str(self.agent_admin_socket),
            ENVIRONMENT_VARIABLE: self.endpoint,
        }

    def last_words(self) -> str:
        """Say that the agent ended, and the end of its log; it has ended."""
        return f"the agent ended by itself, exit code {self.agent_ended.result()}" + "".join(
            f": {line}" for line in _tail(self.log, 1)
        )

    def denied_somebody(self) -> bool:
        """True when the agent told a process that it has no identity."""
        return b" no_identity " in self.log.read_bytes()


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
        workload = sockets / "workload" / "workload.sock"
        admin = sockets / "agent" / "admin.sock"
        log = folder / "agent.log"
        config, token = await _agent_files(server, folder, workload, admin)
        async with _agent(config, log, verbose=verbose) as ended:
            agent_id = await _ready(admin, ended, log)
            token.unlink()  # used, or not needed
            await _move_entries(settings.admin_socket_path, folder / "agent-id", agent_id)
            yield DevDomain(
                server, agent_id, workload, settings.admin_socket_path, admin, ended, log
            )


async def _agent_files(
    server: Server, folder: Path, workload: Path, admin: Path
) -> tuple[Path, Path]:
    """Write the agent's settings, bundle and a fresh join token, for the case it needs one."""
    bundle = folder / "bundle.pem"
    roots = [one.der for one in server.hub.bundle.x509_authorities]
    bundle.write_text(certificates_to_pem(roots))
    token = folder / "join-token"
    made, _ = await server.agents.create_join_token(_TOKEN_TTL, "", None, actor="issuer dev")
    _write_private(token, made.text)
    settings = {
        "trust_domain": server.settings.trust_domain,
        "data_dir": str(folder / "agent"),
        "runtime_dir": str(admin.parent),
        "workload_socket": str(workload),
        "admin_socket": str(admin),
        "join_token_file": str(token),
        "server": {"address": "127.0.0.1", "port": server.port, "trust_bundle": str(bundle)},
        "status": {"port": 0},
        "log_style": "text",
    }
    config = folder / "agent.yaml"
    config.write_text(json.dumps(settings, indent=2))  # JSON is YAML, and quotes every path
    return config, token


@contextlib.contextmanager
def folders(keep: str | None) -> Iterator[tuple[Path, Path]]:
    """A folder for files and one for sockets; both are gone afterwards unless kept."""
    files = Path(keep).absolute() if keep else Path(tempfile.mkdtemp(prefix="issuer-dev-"))
    files.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = _base_of_sockets()
    sockets = Path(tempfile.mkdtemp(prefix="issuer-dev-", dir=base))
    if base == "/run":
        sockets.chmod(0o755)  # workloads of every user reach the socket
    try:
        with _alone(files):
            yield files, sockets
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
        if not keep:
            shutil.rmtree(files, ignore_errors=True)


def _base_of_sockets() -> str:
    """A place with a short name where a folder of ours is safe (SEC-37)."""
    for base in ("/run", os.environ.get("XDG_RUNTIME_DIR", "")):
        if not os.path.isabs(base) or len(base) > MAX_BASE or os.path.realpath(base) != base:
            continue
        with contextlib.suppress(OSError):
            found = os.stat(base)
            closed = not found.st_mode & 0o022
            if found.st_uid == os.geteuid() and closed and os.access(base, os.W_OK | os.X_OK):
                return base
    return "/tmp"  # noqa: S108 the fresh folder in it has mode 0700


@contextlib.contextmanager
def _alone(files: Path) -> Iterator[None]:
    """
    Two domains on the same files would overwrite each other.

    Raises:
        CommandError: another one uses them.
    """
    lock = os.open(files / "dev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CommandError(
                f"another `issuer dev` uses {files}: stop it, or name another folder"
            ) from error
        yield
    finally:
        os.close(lock)


async def _move_entries(admin: Path, earlier: Path, agent_id: SpiffeId) -> None:
    """Let entries follow an agent that had to attest anew, and so has another ID."""
    before = SpiffeId.parse(earlier.read_text()) if earlier.exists() else agent_id
    if before != agent_id:
        async with grpc.aio.insecure_channel(f"unix:{admin}") as channel:
            entries = entry_pb2_grpc.EntryStub(channel)
            below = entry_pb2.ListEntriesRequest.Filter(by_parent_id=id_to_wire(before))
            found = await entries.ListEntries(entry_pb2.ListEntriesRequest(filter=below))
            moved = [
                types_pb2.Entry(id=one.id, parent_id=id_to_wire(agent_id))
                for one in found.entries
            ]
            mask = types_pb2.EntryMask(parent_id=True)
            await entries.BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=moved, input_mask=mask)
            )
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may be gone
                await agent_pb2_grpc.AgentStub(channel).DeleteAgent(
                    agent_pb2.DeleteAgentRequest(id=id_to_wire(before))
                )
    _write_private(earlier, agent_id.uri)


@asynccontextmanager
async def _agent(
    config: Path, log: Path, *, verbose: bool
) -> "AsyncIterator[asyncio.Task[int]]":
    """Run an agent while entered; the task is its end, and its exit code."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _AGENT, str(os.getpid()), json.dumps(sys.path),
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=None if verbose else file,
            start_new_session=True,  # Ctrl-C is for us; we stop it in our own order
        )  # fmt: skip
    ended = asyncio.create_task(process.wait())
    try:
        yield ended
    finally:
        await stop(process)
        await ended


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end; make it after 8 s."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _ready(admin: Path, ended: "asyncio.Task[int]", log: Path) -> SpiffeId:
    """Wait until the agent is in step, and return its ID."""
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(START_SECONDS),
            grpc.aio.insecure_channel(f"unix:{admin}") as channel,
        ):
            stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
            while not ended.done():
                if admin.exists():  # it appears when it listens
                    status = await stub.GetStatus(agentadmin_pb2.GetStatusRequest())
                    if status.connected:
                        return SpiffeId.parse(spiffe_id(status.agent_id))
                await asyncio.sleep(0.01)
    said = " | ".join(_tail(log, 3))
    if ended.done():
        raise CommandError(f"the agent ended at once: {said}")
    raise CommandError(f"the agent is not ready after {START_SECONDS:g} s: {said}")


def _tail(log: Path, count: int) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-count:]


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
