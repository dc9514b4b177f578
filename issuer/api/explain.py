"""Explanations for operators: of selectors, and of pods."""

from dataclasses import dataclass
from typing import Any

from ca.clock import Clock
from issuer.services.explain import PodExplainer
from issuer.services.hub import Hub
from spiffe_core.decision import decide
from spiffe_core.errors import MalformedError
from spiffe_wire.convert.entry import id_from_wire, id_to_wire, selectors_from_wire
from spiffe_wire.convert.explanation import explanation_of
from spiffe_wire.pb.spiffe_issuer.v1 import (
    explain_pb2_grpc,
    podexplain_pb2,
    podexplain_pb2_grpc,
)


@dataclass
class ExplainServicer(explain_pb2_grpc.ExplainServicer):
    """Says what a set of selectors would get, and why."""

    hub: Hub
    clock: Clock

    async def ExplainSelectors(self, request: Any, context: Any) -> Any:
        selectors = selectors_from_wire(request.selectors)
        if not selectors:
            raise MalformedError("name at least one selector, such as unix:uid:1000")
        now = self.clock.now()
        candidates = self.hub.index.entries()
        if request.HasField("agent_id"):
            candidates = self.hub.index.entries_of(id_from_wire(request.agent_id), now)
        return explanation_of(
            decide(selectors, [one for one in candidates if not one.is_node_alias], at=now)
        )


@dataclass
class PodExplainServicer(podexplain_pb2_grpc.PodExplainServicer):
    """Says what the processes of a pod would get, and why."""

    service: PodExplainer

    async def ExplainPod(self, request: Any, context: Any) -> Any:
        if not request.namespace or not request.name:
            raise MalformedError("name a pod as NAMESPACE/NAME")
        found = self.service.explain(request.cluster, request.namespace, request.name)
        reason = "" if found.agent is not None else "no_agent"
        answer = podexplain_pb2.ExplainPodResponse(
            cluster=found.cluster,
            namespace=found.pod.namespace,
            name=found.pod.name,
            uid=found.pod.uid,
            node_name=found.pod.node_name,
            problem=found.problem,
            containers=[
                podexplain_pb2.ContainerExplanation(
                    name=name, explanation=explanation_of(decision, reason=reason)
                )
                for name, decision in found.containers
            ],
        )
        if found.agent is not None:
            answer.agent_id.CopyFrom(id_to_wire(found.agent.id))
        return answer
