"""``spire.api.server.svid.v1.SVID`` (SPIRE API 5.3)."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ca.jwt import SignedJwt
from issuer.api.agent import x509_svid_to_wire
from issuer.api.answers import OK, check_batch, failure
from issuer.api.callers import caller
from issuer.services.ratelimit import RateLimit
from issuer.services.svids import SvidService, WantedX509
from spiffe_core.errors import MalformedError, SpiffeError, UnsupportedError
from spiffe_wire.convert.entry import id_to_wire, optional_id
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.pb.spire.api.types import jwtsvid_pb2

NO_WIT = "WIT functionality is disabled: this release issues X509- and JWT-SVIDs"


def jwt_svid_to_wire(signed: SignedJwt) -> Any:
    """Return a JWT-SVID as the server hands it out."""
    svid = signed.svid
    issued_at = svid.issued_at or svid.expires_at
    return jwtsvid_pb2.JWTSVID(
        token=svid.token,
        id=id_to_wire(svid.spiffe_id),
        expires_at=int(svid.expires_at.timestamp()),
        issued_at=int(issued_at.timestamp()),
    )


@dataclass
class SvidServicer(svid_pb2_grpc.SVIDServicer):
    """Thin: parse, ask the service, answer."""

    service: SvidService
    csr_limit: RateLimit
    jsr_limit: RateLimit

    async def MintX509SVID(self, request: Any, context: Any) -> Any:
        signed = await self.service.mint_x509(
            request.csr, timedelta(seconds=request.ttl), actor=caller().name
        )
        return svid_pb2.MintX509SVIDResponse(svid=x509_svid_to_wire(signed.svid))

    async def MintJWTSVID(self, request: Any, context: Any) -> Any:
        try:
            wanted = optional_id(request, "id")
        except MalformedError as error:
            raise MalformedError(f"invalid SPIFFE ID: {error}") from error
        signed = await self.service.mint_jwt(
            wanted,
            tuple(request.audience),
            timedelta(seconds=request.ttl),
            actor=caller().name,
        )
        return svid_pb2.MintJWTSVIDResponse(svid=jwt_svid_to_wire(signed))

    async def BatchNewX509SVID(self, request: Any, context: Any) -> Any:
        agent = caller().require_agent()
        if not request.params:
            raise MalformedError("missing parameters")
        check_batch(len(request.params))
        await self.csr_limit.take(agent.id.uri, len(request.params))
        wanted = [WantedX509(one.entry_id, one.csr) for one in request.params]
        result = svid_pb2.BatchNewX509SVIDResponse.Result
        return svid_pb2.BatchNewX509SVIDResponse(
            results=[
                result(status=failure(one))
                if isinstance(one, SpiffeError)
                else result(status=OK, svid=x509_svid_to_wire(one.svid))
                for one in await self.service.issue_x509(wanted, agent=agent.id)
            ]
        )

    async def NewJWTSVID(self, request: Any, context: Any) -> Any:
        agent = caller().require_agent()
        await self.jsr_limit.take(agent.id.uri)
        signed = await self.service.issue_jwt(
            request.entry_id, tuple(request.audience), agent=agent.id
        )
        return svid_pb2.NewJWTSVIDResponse(svid=jwt_svid_to_wire(signed))

    async def MintWITSVID(self, request: Any, context: Any) -> Any:
        raise UnsupportedError(NO_WIT)

    async def BatchNewWITSVID(self, request: Any, context: Any) -> Any:
        raise UnsupportedError(NO_WIT)

    async def NewDownstreamX509CA(self, request: Any, context: Any) -> Any:
        raise UnsupportedError("downstream authorities are not issued by this release")
