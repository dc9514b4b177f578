"""
Real servers and agents for tests: as processes of their own, or in the test's own loop.

`a_folder` gives a short private place (a socket path holds 107 bytes).  `ServerProcess` and
`AgentProcess` run ``python -m issuer`` and ``python -m workload_api.agent`` on files in such a
folder; killed and started again they go on from them.  `serving` runs a server in this loop.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import grpc
import yaml

from issuer.app import Server, serve
from issuer.config import RateLimits, ServerSettings, Status
from spiffe_core.bundle import Bundle
from spiffe_core.pem import certificates_to_pem
from spiffe_wire.convert.bundle import bundle_to_wire
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import spiffeid_pb2

ROOT = Path(__file__).resolve().parents[2]
TRUST_DOMAIN = "example.org"
PATIENCE = 20.0
"""Seconds after which a process that is not ready has failed the test."""


@contextlib.contextmanager
def a_folder(*, open_to_all: bool = False) -> Iterator[Path]:
    """A fresh folder with a short name, gone afterwards; others enter if *open_to_all*."""
    folder = Path(tempfile.mkdtemp(prefix="si-"))
    if open_to_all:
        folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def server_settings(folder: Path, **changes: Any) -> ServerSettings:
    """Settings of a server in *folder*: a free port, no HTTP, no rate limits."""
    settings = ServerSettings(
        trust_domain=TRUST_DOMAIN,
        bind_address="127.0.0.1",
        bind_port=0,
        data_dir=folder / "server",
        runtime_dir=folder / "run",
        rate_limits=RateLimits(attestation=False, signing=False),
        status=Status(port=0),
    )
    return replace(settings, **changes)


@contextlib.asynccontextmanager
async def serving(folder: Path, clock: Any = None, **changes: Any) -> AsyncIterator[Server]:
    """Run a server in this event loop."""
    async with serve(server_settings(folder, **changes), clock) as server:
        yield server


@contextlib.asynccontextmanager
async def channel_to(socket: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A plain gRPC channel to a Unix socket."""
    async with grpc.aio.insecure_channel(
        f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield channel


class Process:
    """A process of ours that is started, ready, killed or stopped, and started again."""

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = command
        self.log = log
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process ID; it must run."""
        assert self._process is not None
        return self._process.pid

    def start(self, **environment: str) -> Self:
        """Start it; the log is appended to."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, **self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def stop(self, timeout: float = 15) -> int:
        """Ask it to end, and return its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout)

    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    async def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until it ends by itself, and return its exit code."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, timeout)

    def close(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def events(self) -> list[dict[str, Any]]:
        """Every line of its JSON log that is one."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    async def until(self, ready: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """Wait until *ready* returns something true, and return that."""
        end = time.monotonic() + timeout
        while True:
            answer = ready()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return answer
            if self.ended() is not None:
                raise AssertionError(f"{self._command} ended: {self.log.read_text()[-2000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"not ready in time: {self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.01)


class ServerCalls:
    """What is asked of a running server over its admin socket."""

    admin_socket: Path
    port: int

    def channel(self) -> Any:
        """A channel to its admin socket, as an async context manager."""
        return channel_to(self.admin_socket)

    async def join_token(self) -> str:
        """A fresh join token."""
        async with self.channel() as channel:
            answer = await agent_pb2_grpc.AgentStub(channel).CreateJoinToken(
                agent_pb2.CreateJoinTokenRequest(ttl=600)
            )
        return str(answer.value)

    async def bundle_pem(self) -> str:
        """Its bundle, as an agent gets it by hand."""
        async with self.channel() as channel:
            bundle = await bundle_pb2_grpc.BundleStub(channel).GetBundle(
                bundle_pb2.GetBundleRequest()
            )
        return certificates_to_pem([one.asn1 for one in bundle.x509_authorities])

    async def add_entry(self, path: str, parent: str, *selectors: str, **fields: Any) -> Any:
        """Add an entry, and return it as the server stored it."""
        async with self.channel() as channel:
            answer = await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(
                entry_pb2.BatchCreateEntryRequest(
                    entries=[entry_message(path, parent, *selectors, **fields)]
                )
            )
        (result,) = answer.results
        assert result.status.code == 0, result.status.message
        return result.entry

    async def entries(self, path: str = "") -> list[Any]:
        """Its entries, or those for the SPIFFE ID of *path*."""
        async with self.channel() as channel:
            answer = await entry_pb2_grpc.EntryStub(channel).ListEntries(
                entry_pb2.ListEntriesRequest()
            )
        return [one for one in answer.entries if path in ("", one.spiffe_id.path)]

    async def update_entry(self, entry: Any) -> Any:
        """Make the entry of this ID what *entry* says, and return it as it is stored now."""
        async with self.channel() as channel:
            answer = await entry_pb2_grpc.EntryStub(channel).BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=[entry])
            )
        (result,) = answer.results
        assert result.status.code == 0, result.status.message
        return result.entry

    async def delete_entries(self, *entries: Any) -> None:
        """Delete entries."""
        async with self.channel() as channel:
            answer = await entry_pb2_grpc.EntryStub(channel).BatchDeleteEntry(
                entry_pb2.BatchDeleteEntryRequest(ids=[one.id for one in entries])
            )
        assert all(one.status.code == 0 for one in answer.results)

    async def set_bundle(self, bundle: Bundle) -> None:
        """Add or replace the bundle of another trust domain."""
        async with self.channel() as channel:
            answer = await bundle_pb2_grpc.BundleStub(channel).BatchSetFederatedBundle(
                bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle_to_wire(bundle)])
            )
        assert answer.results[0].status.code == 0, answer.results[0].status.message

    async def serial_of(self, agent_id: str) -> str:
        """The serial number of the SVID that an agent used last."""
        async with self.channel() as channel:
            agent = await agent_pb2_grpc.AgentStub(channel).GetAgent(
                agent_pb2.GetAgentRequest(id=_id_message(agent_id))
            )
        return str(agent.x509svid_serial_number)

    async def ban(self, agent_id: str) -> None:
        """Ban an agent."""
        async with self.channel() as channel:
            await agent_pb2_grpc.AgentStub(channel).BanAgent(
                agent_pb2.BanAgentRequest(id=_id_message(agent_id))
            )

    async def evict(self, agent_id: str) -> None:
        """Forget an agent."""
        async with self.channel() as channel:
            await agent_pb2_grpc.AgentStub(channel).DeleteAgent(
                agent_pb2.DeleteAgentRequest(id=_id_message(agent_id))
            )


@dataclass
class ServerProcess(ServerCalls):
    """``issuer server run`` on files in *folder*; *changes* go into its YAML settings."""

    folder: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    port: int = 0

    def __post_init__(self) -> None:
        self.config = self.folder / "server.yaml"
        self.admin_socket = self.folder / "run" / "admin.sock"
        self._write()
        self.process = Process(
            [sys.executable, "-m", "issuer", "server", "run", "-c", str(self.config)],
            self.folder / "server.log",
        )

    def _write(self) -> None:
        settings = {
            "trust_domain": TRUST_DOMAIN,
            "bind_address": "127.0.0.1",
            "bind_port": self.port,
            "data_dir": str(self.folder / "server"),
            "runtime_dir": str(self.folder / "run"),
            "rate_limits": {"attestation": False, "signing": False},
            "status": {"port": 0},
            **self.changes,
        }
        self.config.write_text(yaml.safe_dump(settings))

    async def start(self, **environment: str) -> Self:
        """Start it and wait until it is ready; started again it keeps its port."""
        before = len(self._ready_events()) if self.process.log.exists() else 0
        self.process.start(**environment)
        ready = await self.process.until(lambda: self._ready_events()[before:])
        if not self.port:
            self.port = int(ready[-1]["port"])
            self._write()
        return self

    def _ready_events(self) -> list[dict[str, Any]]:
        return [one for one in self.process.events() if one.get("event") == "server_ready"]


def _id_message(spiffe_id: str) -> Any:
    path = spiffe_id.removeprefix(f"spiffe://{TRUST_DOMAIN}")
    return spiffeid_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path)


def entry_message(path: str, parent: str, *selectors: str, **fields: Any) -> Any:
    """An entry for ``spiffe://example.org`` + *path* below the agent (a full ID) *parent*."""
    made = types_pb2.Entry(**fields)
    made.spiffe_id.trust_domain = TRUST_DOMAIN
    made.spiffe_id.path = path
    made.parent_id.trust_domain = TRUST_DOMAIN
    made.parent_id.path = parent.removeprefix(f"spiffe://{TRUST_DOMAIN}")
    for text in selectors:
        type_, _, value = text.partition(":")
        made.selectors.add(type=type_, value=value)
    return made


@dataclass
class AgentProcess:
    """``issuer-agent run`` of *server*, on files in *folder*."""

    folder: Path
    server: ServerProcess
    changes: Mapping[str, Any] = field(default_factory=dict)
    agent_id: str = ""

    def __post_init__(self) -> None:
        self.config = self.folder / "agent.yaml"
        self.workload_socket = self.folder / "w" / "workload.sock"
        self.admin_socket = self.folder / "a" / "admin.sock"
        self.sds_socket = self.folder / "w" / "sds.sock"
        self.endpoint = f"unix://{self.workload_socket}"
        self.process = Process(
            [sys.executable, "-m", "workload_api.agent", "run", "-c", str(self.config)],
            self.folder / "agent.log",
        )

    async def join(self) -> Self:
        """Write its settings with a fresh token, start it, and wait until it is in step."""
        await self.configure()
        return await self.start()

    async def configure(self) -> Self:
        """Write its settings, with a fresh token and the server's bundle."""
        token, bundle = self.folder / "token", self.folder / "bundle.pem"
        token.write_text(await self.server.join_token())
        bundle.write_text(await self.server.bundle_pem())
        settings = {
            "trust_domain": TRUST_DOMAIN,
            "data_dir": str(self.folder / "agent"),
            "runtime_dir": str(self.folder / "a"),
            "workload_socket": str(self.workload_socket),
            "admin_socket": str(self.admin_socket),
            "join_token_file": str(token),
            "server": {
                "address": "127.0.0.1",
                "port": self.server.port,
                "trust_bundle": str(bundle),
            },
            "status": {"port": 0},
            **self.changes,
        }
        self.config.write_text(yaml.safe_dump(settings))
        return self

    async def start(self, *, connected: bool = True, **environment: str) -> Self:
        """Start it and wait until its sockets answer; *connected*: and it is in step."""
        self.process.start(**environment)

        async def ready() -> bool:
            status = await self.status()
            return status is not None and (status.connected or not connected)

        await self.process.until(ready)
        status = await self.status()
        self.agent_id = f"spiffe://{TRUST_DOMAIN}{status.agent_id.path}"
        return self

    async def status(self) -> Any:
        """What ``GetStatus`` says, or None when it does not answer."""
        if not self.admin_socket.exists():
            return None
        try:
            async with self.admin() as channel:
                return await agentadmin_pb2_grpc.AgentAdminStub(channel).GetStatus(
                    agentadmin_pb2.GetStatusRequest(), timeout=5
                )
        except grpc.aio.AioRpcError:
            return None

    def admin(self) -> Any:
        """A channel to its admin socket, as an async context manager."""
        return channel_to(self.admin_socket)

    def workload(self) -> Any:
        """A channel to its workload socket, as an async context manager."""
        return channel_to(self.workload_socket)

    async def explain(self, pid: int) -> Any:
        """What ``ExplainProcess`` says of a process."""
        async with self.admin() as channel:
            return await agentadmin_pb2_grpc.AgentAdminStub(channel).ExplainProcess(
                agentadmin_pb2.ExplainProcessRequest(pid=pid)
            )

    async def renew(self) -> int:
        """Have every SVID signed anew; return how many there were."""
        async with self.admin() as channel:
            answer = await agentadmin_pb2_grpc.AgentAdminStub(channel).RenewSvids(
                agentadmin_pb2.RenewSvidsRequest()
            )
        return int(answer.renewed)

    async def until_svids(self, count: int) -> None:
        """Wait until it holds *count* SVIDs."""

        async def enough() -> bool:
            status = await self.status()
            return status is not None and status.x509_svids >= count

        await self.process.until(enough)


@dataclass
class Stack:
    """A server and an agent, both processes."""

    folder: Path
    server: ServerProcess
    agent: AgentProcess


@contextlib.asynccontextmanager
async def a_server(**changes: Any) -> AsyncIterator[ServerProcess]:
    """A running server process in a folder of its own."""
    with a_folder() as folder:
        server = ServerProcess(folder, changes)
        try:
            yield await server.start()
        finally:
            server.process.close()


@contextlib.asynccontextmanager
async def a_stack(
    *,
    server_changes: Mapping[str, Any] | None = None,
    agent_changes: Mapping[str, Any] | None = None,
    open_to_all: bool = False,
) -> AsyncIterator[Stack]:
    """A running server and an agent that joined it, in a folder of their own."""
    with a_folder(open_to_all=open_to_all) as folder:
        server = ServerProcess(folder, server_changes or {})
        agent = AgentProcess(folder, server, agent_changes or {})
        try:
            await server.start()
            await agent.join()
            yield Stack(folder, server, agent)
        finally:
            agent.process.close()
            server.process.close()
