"""``spire.api.server.agent.v1.Agent`` (SPIRE API 5.2)."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from issuer.api.callers import caller
from issuer.api.entry import check_size, selector_match
from issuer.services.agents import AgentFilter, AgentService
from issuer.services.ratelimit import RateLimit
from issuer.store.store import Store
from spiffe_core.agent import AttestedAgent
from spiffe_core.errors import DeadlineError, MalformedError
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid
from spiffe_wire.convert.entry import (
    id_from_wire,
    id_to_wire,
    masked,
    optional_id,
    selectors_to_wire,
)
from spiffe_wire.pb._pool import message
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.types import agent_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import jointoken_pb2, x509svid_pb2

ATTEST_TIMEOUT: Final = 30.0
"""Seconds for a whole attestation: agents set no deadline of their own."""
_EXPIRES_LAYOUT: Final = "%Y-%m-%d %H:%M:%S %z"
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
    store: Store
    attest_limit: RateLimit
    csr_limit: RateLimit
    status_limit: RateLimit

    async def CountAgents(self, request: Any, context: Any) -> Any:
        return agent_pb2.CountAgentsResponse(
            count=await self.service.count(_filter_of(request.filter))
        )

    async def ListAgents(self, request: Any, context: Any) -> Any:
        page = await self.service.page(
            _filter_of(request.filter), request.page_size, request.page_token
        )
        mask = request.output_mask if request.HasField("output_mask") else None
        return check_size(
            agent_pb2.ListAgentsResponse(
                agents=[masked(agent_to_wire(one), mask, "id") for one in page.items],
                next_page_token=page.next_token,
            )
        )

    async def GetAgent(self, request: Any, context: Any) -> Any:
        agent = await self.service.get(_agent_id(request))
        mask = request.output_mask if request.HasField("output_mask") else None
        return masked(agent_to_wire(agent), mask, "id")

    async def DeleteAgent(self, request: Any, context: Any) -> Any:
        await self.service.evict(_agent_id(request), actor=caller().name)
        return _Empty()

    async def BanAgent(self, request: Any, context: Any) -> Any:
        await self.service.ban(_agent_id(request), actor=caller().name)
        return _Empty()

    async def CreateJoinToken(self, request: Any, context: Any) -> Any:
        workload = id_from_wire(request.agent_id) if request.HasField("agent_id") else None
        token, expires_at = await self.service.create_join_token(
            timedelta(seconds=request.ttl), request.token, workload, actor=caller().name
        )
        return jointoken_pb2.JoinToken(value=token.text, expires_at=int(expires_at.timestamp()))

    async def AttestAgent(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        address = caller().address
        await self.attest_limit.take(address)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        stream = aiter(requests)

        async def challenge(data: bytes) -> bytes:
            await answers.put(agent_pb2.AttestAgentResponse(challenge=data))
            request = await anext(stream, None)
            if request is None or not request.challenge_response:
                raise MalformedError("a challenge must be answered")
            return bytes(request.challenge_response)

        async def attest() -> Any:
            data, csr = _params_of(await anext(stream, None))
            signed, node = await self.service.attest(data.type, data.payload, csr, challenge)
            result = agent_pb2.AttestAgentResponse.Result(
                svid=x509_svid_to_wire(signed.svid), reattestable=node.can_reattest
            )
            return agent_pb2.AttestAgentResponse(result=result)

        attesting = asyncio.create_task(asyncio.wait_for(attest(), ATTEST_TIMEOUT))
        try:
            while True:
                asked = asyncio.create_task(answers.get())
                await asyncio.wait({attesting, asked}, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    yield asked.result()
                    continue
                asked.cancel()
                break
            yield await attesting
        except TimeoutError:
            raise DeadlineError("attestation took too long") from None
        finally:
            attesting.cancel()

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


def _agent_id(request: Any) -> SpiffeId:
    try:
        return optional_id(request, "id")
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
    try:
        return datetime.strptime(text.rpartition(" ")[0], _EXPIRES_LAYOUT)
    except ValueError as error:
        raise MalformedError("by_expires_before reads YYYY-MM-DD HH:MM:SS +hhmm +hh") from error
