"""``spiffe_issuer.v1.PodSvid``: SVIDs for pods that the agent names (architecture A5)."""

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from issuer.api.agent import x509_svid_to_wire
from issuer.api.answers import OK, check_batch, failure
from issuer.api.callers import Callers, caller
from issuer.api.svid import jwt_svid_to_wire
from issuer.services.ratelimit import RateLimit
from issuer.services.svids import SvidService, WantedX509
from spiffe_core.errors import MalformedError, SpiffeError
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2, podsvid_pb2_grpc

_UID: Final = re.compile(r"[-0-9A-Za-z]{0,64}")


@dataclass
class PodSvidServicer(podsvid_pb2_grpc.PodSvidServicer):
    """As SPIRE's service of SVIDs, with its limits and rates."""

    service: SvidService
    callers: Callers
    csr_limit: RateLimit
    jsr_limit: RateLimit

    async def BatchNewX509SVID(self, request: Any, context: Any) -> AsyncIterator[Any]:
        me = caller()
        agent = me.require_agent()
        if not request.params:
            raise MalformedError("missing parameters")
        check_batch(len(request.params))
        wanted = [
            WantedX509(one.entry_id, one.csr, _checked(one.pod_uid)) for one in request.params
        ]
        await self.csr_limit.take(agent.id.uri, len(wanted))
        decided = self.service.issue_x509_in_turn(wanted, agent=agent.id)
        async with contextlib.aclosing(decided) as parts:
            async for part in parts:
                self.callers.check_still(me)  # it may have been banned while we waited
                yield podsvid_pb2.BatchNewX509SVIDResponse(
                    results=[_result(number, answer) for number, answer in part.items()]
                )

    async def NewJWTSVID(self, request: Any, context: Any) -> Any:
        me = caller()
        agent = me.require_agent()
        pod_uid = _checked(request.pod_uid)
        await self.jsr_limit.take(agent.id.uri)
        signed = await self.service.issue_jwt(
            request.entry_id, tuple(request.audience), agent=agent.id, pod_uid=pod_uid
        )
        self.callers.check_still(me)
        return podsvid_pb2.NewJWTSVIDResponse(svid=jwt_svid_to_wire(signed))


def _result(number: int, answer: Any) -> Any:
    made = podsvid_pb2.BatchNewX509SVIDResponse.Result(number=number)
    if isinstance(answer, SpiffeError):
        made.status.CopyFrom(failure(answer))
    else:
        made.status.CopyFrom(OK)
        made.svid.CopyFrom(x509_svid_to_wire(answer.svid))
    return made


def _checked(pod_uid: str) -> str:
    if _UID.fullmatch(pod_uid) is None:
        raise MalformedError("pod_uid is no UID of Kubernetes")
    return pod_uid
