"""
Clients that write without a pause while somebody kills the server, and keep a tally.

Each knows what was acknowledged to it.  A call that got no answer leaves two possibilities,
which the next server settles: what was before, or what was asked.  Anything else fails.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509

from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.status import error_of
from tests.support.node import Node, a_node
from tests.support.records import Records
from tests.support.stack import ServerProcess, channel_to, entry_message

_PARENT: Final = "/spire/agent/join_token/load"
ABSENT: Final = -1
LAST_REVISION: Final = 2
GONE: Final = LAST_REVISION + 1


class NoAnswerError(Exception):
    """It may have been carried out, or not."""


async def answered(call: Awaitable[Any]) -> Any:
    """The answer; `NoAnswerError` when the server went away, any other refusal as it is."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        problem: SpiffeError = error_of(error)
    except SpiffeError as error:
        problem = error
    if problem.kind is ErrorKind.NOT_READY:
        raise NoAnswerError from problem
    raise problem


@dataclass
class Load:
    """The clients and what they know."""

    server: ServerProcess
    folder: Path
    bundle_pem: str
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there is a server to call."""
    entries: dict[str, int] = field(default_factory=dict)
    """Id to revision, `GONE` when deleted: acknowledged, or settled after a crash."""
    serials: set[str] = field(default_factory=set)
    nodes: dict[str, str] = field(default_factory=dict)
    """Public id of a token to the serial that its node holds."""
    done: int = 0
    unanswered: int = 0

    async def run(self) -> None:
        """Load the server until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for client in range(4):
                tasks.create_task(self._change_entries(client))
            tasks.create_task(self._mint())
            tasks.create_task(self._join())

    def check(self, found: Records) -> None:
        """Every acknowledged change is there, whole; call it while `up` is not set."""
        wanted = {id_: at for id_, at in self.entries.items() if at not in (ABSENT, GONE)}
        there = {
            id_: entry.revision_number
            for id_, entry in found.entries.items()
            if id_.startswith("load-")
        }
        # The one change of each client that is under way may be there, or not.
        for id_ in set(wanted) ^ set(there):
            assert self.entries.get(id_, ABSENT) in (ABSENT, LAST_REVISION), id_
        for id_ in set(wanted) & set(there):
            assert there[id_] in (wanted[id_], wanted[id_] + 1), id_
            assert found.entries[id_].hint == str(there[id_])
        assert self.serials <= found.issued, "SEC-24: nothing is handed out off the record"
        for public_id, serial in self.nodes.items():
            agent = found.agents[f"spiffe://example.org/spire/agent/join_token/{public_id}"]
            assert agent.serial == serial

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[Any]:
        """A channel to a running server; left when that does not answer any more."""
        await self.up.wait()
        try:
            async with channel_to(self.server.admin_socket) as channel:
                yield channel
        except NoAnswerError:
            self.unanswered += 1
            await asyncio.sleep(0.01)

    async def _change_entries(self, client: int) -> None:
        """Create an entry, update it twice, delete every other one; then the next."""
        number = 0
        while True:
            async with self._admin() as channel:
                stub = entry_pb2_grpc.EntryStub(channel)
                await self._settle(stub, f"load-{client}-{number}")
                while True:
                    id_ = f"load-{client}-{number}"
                    at = self.entries.get(id_, ABSENT)
                    if at == GONE or (at == LAST_REVISION and number % 2):
                        number += 1
                        continue
                    await self._next(stub, id_, at)
                    self.entries[id_] = at + 1
                    self.done += 1

    async def _next(self, stub: Any, id_: str, at: int) -> None:
        made = entry_message(f"/{id_}", _PARENT, f"unix:user:{id_}", id=id_, hint=str(at + 1))
        if at == ABSENT:
            answer = await answered(
                stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=[made]))
            )
        elif at < LAST_REVISION:
            answer = await answered(
                stub.BatchUpdateEntry(entry_pb2.BatchUpdateEntryRequest(entries=[made]))
            )
        else:
            answer = await answered(
                stub.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[id_]))
            )
        (result,) = answer.results
        if result.status.code == grpc.StatusCode.UNAVAILABLE.value[0]:
            raise NoAnswerError
        assert result.status.code == 0, answer

    async def _settle(self, stub: Any, id_: str) -> None:
        """See that what was under way happened wholly, or not at all."""
        before = self.entries.get(id_, ABSENT)
        try:
            found = await answered(stub.GetEntry(entry_pb2.GetEntryRequest(id=id_)))
            now = int(found.revision_number)
            assert found.hint == str(now), "an update is whole"
        except SpiffeError as error:
            assert error.kind is ErrorKind.NOT_FOUND
            now = ABSENT if before == ABSENT else GONE
        assert now in (before, before + 1), (id_, before, now)
        self.entries[id_] = now

    async def _mint(self) -> None:
        """An operator who signs by hand."""
        request = svid_pb2.MintJWTSVIDRequest(audience=["load"], ttl=60)
        request.id.trust_domain, request.id.path = "example.org", "/minted"
        while True:
            async with self._admin() as channel:
                stub = svid_pb2_grpc.SVIDStub(channel)
                while True:
                    answer = await answered(stub.MintJWTSVID(request))
                    token = JwtSvid.parse_unverified(answer.svid.token)
                    self.serials.add(str(token.claims["jti"]))
                    self.done += 1

    async def _join(self) -> None:
        """Nodes that join, one after another, and sign for an entry of theirs."""
        number = 0
        while True:
            number += 1
            token = await self._at_last(self.server.join_token)
            folder = self.folder / f"n{number}"
            while not await self._worked(folder, token):
                self.unanswered += 1
                await self.up.wait()

    async def _worked(self, folder: Path, token: str) -> bool:
        """Join, if that is not done, and sign; False when the server went away meanwhile."""
        async with a_node(folder, self.server, self.bundle_pem) as node:
            try:
                if node.identity.svid is None:
                    await answered(node.attest(token))
                await self._sign(node, token.partition(".")[0])
            except NoAnswerError:
                return False
            return True

    async def _at_last(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What *ask* answers, asked again until a server lives long enough."""
        while True:
            await self.up.wait()
            try:
                return await answered(ask())
            except NoAnswerError:
                self.unanswered += 1
                await asyncio.sleep(0.02)

    async def _sign(self, node: Node, public_id: str) -> None:
        assert node.identity.svid is not None
        self.nodes[public_id] = node.identity.svid.serial
        self.serials.add(node.identity.svid.serial)
        id_ = f"of-{public_id}"

        made = entry_message(f"/{id_}", node.agent_id, "unix:uid:1", id=id_)
        async with channel_to(self.server.admin_socket) as channel:
            await answered(
                entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(
                    entry_pb2.BatchCreateEntryRequest(entries=[made])
                )
            )
        signed = 0
        while signed < 4:
            for result in await answered(node.sign(id_, id_)):
                # The index hears of the entry a moment after it is acknowledged.
                assert result.status.code in (0, grpc.StatusCode.NOT_FOUND.value[0])
                if result.status.code == 0:
                    signed += 1
                    leaf = x509.load_der_x509_certificate(result.svid.cert_chain[0])
                    self.serials.add(str(leaf.serial_number))
                    self.done += 1
