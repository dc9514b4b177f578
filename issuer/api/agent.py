"""``spire.api.server.agent.v1.Agent`` (SPIRE API 5.2)."""

import asyncio
import ipaddress
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from issuer.api.answers import mask_of, selector_match, to_wire
from issuer.api.callers import caller
from issuer.services.agents import AgentFilter, AgentService
from issuer.services.ratelimit import RateLimit
from issuer.services.refusals import RefusalLog
from spiffe_core.agent import AttestedAgent
from spiffe_core.errors import (
    DeadlineError,
    ForbiddenError,
    MalformedError,
    NotReadyError,
    PreconditionError,
)
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid
from spiffe_wire.convert.entry import (
    id_to_wire,
    masked,
    optional_id,
    selectors_to_wire,
)
from spiffe_wire.pb._pool import message
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.types import agent_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import jointoken_pb2, x509svid_pb2

FIRST_MESSAGE_TIMEOUT: Final = 10.0  # security requirements, table 1
ATTEST_TIMEOUT: Final = 30.0
"""Seconds for what follows it: agents set no deadline of their own."""
MAX_ATTESTING: Final = 32  # security requirements, table 1
_EXPIRES_BEFORE: Final = re.compile(
    r"(?P<instant>[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} "
    r"(?P<hours>[+-][0-9]{2})[0-9]{2}) (?P<again>[+-][0-9]{2})"
)
_Empty = message("google.protobuf.Empty")


def x509_svid_to_wire(svid: X509Svid, hint: str = "") -> Any:
    """Return an X509-SVID as the server hands it out."""
    return x509svid_pb2.X509SVID(
        cert_chain=svid.chain,
        id=id_to_wire(svid.spiffe_id),
        expires_at=int(svid.validity.not_after.timestamp()),
        hint=hint,
    )


def agent_to_wire(agent: AttestedAgent) -> Any:
    """Return an agent as a message."""
    return types_pb2.Agent(
        id=id_to_wire(agent.id),
        attestation_type=agent.attestation_type,
        x509svid_serial_number=agent.serial,
        x509svid_expires_at=int(agent.expires_at.timestamp()),
        selectors=selectors_to_wire(agent.selectors),
        banned=agent.banned,
        can_reattest=agent.can_reattest,
        agent_version=agent.agent_version,
    )


@dataclass
class AgentServicer(agent_pb2_grpc.AgentServicer):
    """Thin: parse, ask the service, answer."""

    service: AgentService
    refusals: RefusalLog
    attest_limit: RateLimit
    csr_limit: RateLimit
    status_limit: RateLimit

    def __post_init__(self) -> None:
        self._attesting = asyncio.Semaphore(MAX_ATTESTING)

    async def CountAgents(self, request: Any, context: Any) -> Any:
        return agent_pb2.CountAgentsResponse(
            count=await self.service.count(_filter_of(request.filter))
        )

    async def ListAgents(self, request: Any, context: Any) -> Any:
        page = await self.service.page(
            _filter_of(request.filter), request.page_size, request.page_token
        )
        return agent_pb2.ListAgentsResponse(
            agents=await to_wire(page.items, agent_to_wire, mask_of(request), "id"),
            next_page_token=page.next_token,
        )

    async def GetAgent(self, request: Any, context: Any) -> Any:
        agent = await self.service.get(_agent_id(request))
        return masked(agent_to_wire(agent), mask_of(request), "id")

    async def DeleteAgent(self, request: Any, context: Any) -> Any:
        await self.service.evict(_agent_id(request), actor=caller().name)
        return _Empty()

    async def BanAgent(self, request: Any, context: Any) -> Any:
        await self.service.ban(_agent_id(request), actor=caller().name)
        return _Empty()

    async def CreateJoinToken(self, request: Any, context: Any) -> Any:
        workload = _agent_id(request, "agent_id") if request.HasField("agent_id") else None
        token, expires_at = await self.service.create_join_token(
            timedelta(seconds=request.ttl), request.token, workload, actor=caller().name
        )
        return jointoken_pb2.JoinToken(value=token.text, expires_at=int(expires_at.timestamp()))

    async def AttestAgent(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        address = network_of(caller().address)
        await self.attest_limit.take(address)
        # Challenges to send, then None: the attestation is over, well or not.
        challenges: asyncio.Queue[Any] = asyncio.Queue()
        attesting = asyncio.create_task(self._attest(address, aiter(requests), challenges))
        attesting.add_done_callback(lambda _: challenges.put_nowait(None))
        try:
            while (challenge := await challenges.get()) is not None:
                yield agent_pb2.AttestAgentResponse(challenge=challenge)
            yield await attesting
        finally:
            attesting.cancel()
            await asyncio.gather(attesting, return_exceptions=True)

    async def _attest(
        self, address: str, requests: AsyncIterator[Any], challenges: asyncio.Queue[Any]
    ) -> Any:
        async def challenge(data: bytes) -> bytes:
            await challenges.put(data)
            request = await anext(requests, None)
            if request is None or not request.challenge_response:
                raise MalformedError("a challenge must be answered")
            return bytes(request.challenge_response)

        try:
            async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT):
                first = await anext(requests, None)
            data, csr = _params_of(first)
            if self._attesting.locked():
                raise NotReadyError("too many nodes attest at once: try again")
            async with self._attesting, asyncio.timeout(ATTEST_TIMEOUT):
                signed, node = await self.service.attest(
                    data.type, data.payload, csr, challenge
                )
        except (MalformedError, ForbiddenError, PreconditionError) as error:
            await self.refusals.note(address, "", str(error), action="agent.attest")
            raise
        except TimeoutError:
            raise DeadlineError("attestation took too long") from None
        return agent_pb2.AttestAgentResponse(
            result=agent_pb2.AttestAgentResponse.Result(
                svid=x509_svid_to_wire(signed.svid), reattestable=node.can_reattest
            )
        )

    async def RenewAgent(self, request: Any, context: Any) -> Any:
        agent = caller().require_agent()
        await self.csr_limit.take(agent.id.uri)
        if not request.HasField("params"):
            raise MalformedError("params cannot be nil")
        signed = await self.service.renew(agent, request.params.csr)
        return agent_pb2.RenewAgentResponse(svid=x509_svid_to_wire(signed.svid))

    async def PostStatus(self, request: Any, context: Any) -> Any:
        agent = caller().require_agent()
        await self.status_limit.take(agent.id.uri)
        await self.service.post_status(agent, request.agent_version)
        return agent_pb2.PostStatusResponse()


def _params_of(request: Any) -> tuple[Any, bytes]:
    wanted = "malformed param: "
    if request is None or not request.HasField("params"):
        raise MalformedError(wanted + "missing params")
    params = request.params
    if not params.HasField("data"):
        raise MalformedError(wanted + "missing attestation data")
    if not params.HasField("params"):
        raise MalformedError(wanted + "missing X509-SVID parameters")
    if not params.params.csr:
        raise MalformedError(wanted + "missing CSR")
    if not params.data.type:
        raise MalformedError(wanted + "missing attestation data type")
    if not params.data.payload:
        raise MalformedError(wanted + "missing attestation data payload")
    return params.data, bytes(params.params.csr)


def network_of(address: str) -> str:
    """One IPv4 address, or the /64 that one IPv6 host has to itself (SEC-55)."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _agent_id(request: Any, field: str = "id") -> SpiffeId:
    try:
        return optional_id(request, field)
    except MalformedError as error:
        raise MalformedError(f"invalid agent ID: {error}") from error


def _filter_of(wanted: Any) -> AgentFilter:
    selectors = None
    if wanted.HasField("by_selector_match"):
        selectors = selector_match(wanted.by_selector_match, "failed to parse selectors")
    return AgentFilter(
        wanted.by_attestation_type,
        selectors,
        wanted.by_banned.value if wanted.HasField("by_banned") else None,
        wanted.by_can_reattest.value if wanted.HasField("by_can_reattest") else None,
        _expires_before(wanted.by_expires_before),
    )


def _expires_before(text: str) -> datetime | None:
    """``YYYY-MM-DD HH:MM:SS ±hhmm ±hh``: the offset stands there twice."""
    if not text:
        return None
    parts = _EXPIRES_BEFORE.fullmatch(text)
    try:
        if parts is None or parts["hours"] != parts["again"]:
            raise ValueError("not of the form")
        return datetime.strptime(parts["instant"], "%Y-%m-%d %H:%M:%S %z")
    except ValueError as error:
        raise MalformedError("by_expires_before reads YYYY-MM-DD HH:MM:SS +hhmm +hh") from error
