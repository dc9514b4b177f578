"""``issuer explain``: what was learnt, what matched, what nearly did, and what differs."""

import argparse
from typing import Any

from issuer.cli.calls import call
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import (
    DONE,
    GREEN,
    RED,
    REFUSED,
    USAGE,
    YELLOW,
    CommandError,
    explained,
    message,
    paint,
    plain,
    show,
    spiffe_id,
)
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.convert.explanation import sds_text_of
from spiffe_wire.pb.spiffe_issuer.v1 import (
    agentadmin_pb2,
    agentadmin_pb2_grpc,
    explain_pb2,
    explain_pb2_grpc,
    podexplain_pb2,
    podexplain_pb2_grpc,
)


def run(arguments: argparse.Namespace) -> int:
    """Explain a process, a pod or a set of selectors; exit 1 when there is no identity."""
    given = (arguments.pid is not None, bool(arguments.selectors), bool(arguments.pod))
    if sum(given) != 1:
        raise CommandError(
            "give one of --pid N, --pod NAMESPACE/NAME and --selectors TYPE:VALUE…", USAGE
        )
    if arguments.agent_id and not arguments.selectors:
        raise CommandError("--agent-id goes with --selectors", USAGE)
    if arguments.cluster and not arguments.pod:
        raise CommandError("--cluster goes with --pod", USAGE)
    if arguments.pod:
        return _pod(arguments)
    if arguments.pid is not None:
        answer = call(arguments.agent_socket, lambda ch: _process(ch, arguments.pid), "agent")
    else:
        request = _request_of(arguments)
        answer = call(
            arguments.socket,
            lambda ch: explain_pb2_grpc.ExplainStub(ch).ExplainSelectors(request),
            if_missing=": `issuer agent list` shows who is there",
        )
    if arguments.output == "text":
        _print(answer)
    else:
        show(message(answer), arguments.output)
    return DONE if answer.matched else REFUSED


def _pod(arguments: argparse.Namespace) -> int:
    namespace, slash, name = arguments.pod.partition("/")
    if not (namespace and slash and name):
        raise CommandError("--pod takes NAMESPACE/NAME, such as shop/web", USAGE)
    request = podexplain_pb2.ExplainPodRequest(
        cluster=arguments.cluster or "", namespace=namespace, name=name
    )
    answer = call(
        arguments.socket,
        lambda ch: podexplain_pb2_grpc.PodExplainStub(ch).ExplainPod(request),
    )
    if arguments.output == "text":
        _print_pod(answer)
    else:
        show(message(answer), arguments.output)
    found = any(one.explanation.matched for one in answer.containers)
    return DONE if found else REFUSED


def _print_pod(answer: Any) -> None:
    where = f"on node {plain(answer.node_name)}" if answer.node_name else "on no node yet"
    print(
        f"pod {plain(answer.namespace)}/{plain(answer.name)} of cluster "
        f"{plain(answer.cluster)}, uid {plain(answer.uid)}, {where}"
    )
    if answer.HasField("agent_id"):
        print(f"agent {spiffe_id(answer.agent_id)}")
    if answer.problem:
        print(paint(YELLOW, f"known from before: {plain(answer.problem)}"))
    for one in answer.containers:
        print(f"\ncontainer {plain(one.name)}")
        _print(one.explanation)


async def _process(channel: Any, pid: int) -> Any:
    request = agentadmin_pb2.ExplainProcessRequest(pid=pid)
    return await agentadmin_pb2_grpc.AgentAdminStub(channel).ExplainProcess(request)


def _request_of(arguments: argparse.Namespace) -> Any:
    request = explain_pb2.ExplainSelectorsRequest()
    with explained("--selectors"):
        for text in arguments.selectors:
            one = Selector.parse(text)
            request.selectors.add(type=one.type, value=one.value)
    if arguments.agent_id:
        with explained("--agent-id"):
            request.agent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.agent_id)))
    return request


def _print(answer: Any) -> None:
    if answer.HasField("process"):
        one = answer.process
        print(f"process {one.pid}, uid {one.uid}, gid {one.gid}, {plain(one.path)}")
    if answer.reason == "attestation_failed":
        print(paint(RED, f"no identity: {plain(answer.text.partition(chr(10))[0])}"))
    else:
        _print_decision(answer)
    for one in answer.sds_streams:
        colour = GREEN if one.state == "accepted" else YELLOW
        print(paint(colour, plain(sds_text_of(one))))


def _print_decision(answer: Any) -> None:
    print("learnt")
    for one in answer.selectors:
        print(f"  {plain(one.type)}:{plain(one.value)}")
    for one in answer.partial:
        print(paint(YELLOW, f"  {plain(one.attestor)} could not vouch: {plain(one.reason)}"))
    for entry in answer.matched:
        print(paint(GREEN, f"gets    {spiffe_id(entry.spiffe_id)}") + f"  (entry {entry.id})")
    if not answer.matched:
        print(paint(RED, _why_not(answer)))
    for miss in answer.near_misses[:3]:
        print(f"nearly  {spiffe_id(miss.entry.spiffe_id)}  (entry {miss.entry.id})")
        print(paint(YELLOW, f"        {plain(miss.difference)}"))
    if not answer.matched and answer.reason in ("no_match", "no_entries"):
        print("to give it one: issuer entry create --spiffe-id … --parent-id … --selector …")


def _why_not(answer: Any) -> str:
    if answer.reason == "not_synced":
        return "no identity: the agent has not heard from its server yet"
    if answer.reason == "no_agent":
        return "no identity: no agent is attested on the pod's node"
    if answer.reason == "no_entries":
        return "no identity: no entry is registered for this node"
    return f"no identity: none of {answer.considered} entries matches"
