"""Whoever has the key of one node's agent, and what the server lets him have with it."""

import shutil
import sqlite3
import time
from contextlib import closing
from typing import Any

from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2, podsvid_pb2_grpc
from tests.support.node import Node, a_node
from tests.support.podstack import PodStack
from workload_api.keys import make_csr, make_key

EVENT = "svid_of_foreign_pod_refused"
ACTION = "svid.pod_refused"


async def steal(
    stack: PodStack, node: str, entry_id: str, foreign_pod: str, own_pod: str
) -> dict[str, Any]:
    """
    Take the identity of the agent of *node*, and ask for an entry with it.

    First for *own_pod*, of that node, which shows that the key is good; then for *foreign_pod*.
    The agent itself is stopped, as one whose machine was taken over would not mind.
    """
    agent = stack.agents[node]
    agent.process.stop()
    folder = stack.folder / "thief"
    (folder / "data").mkdir(mode=0o700, parents=True)
    shutil.copy(agent.folder / "agent" / "node.json", folder / "data")
    before = len(stack.server.process.events())
    async with a_node(folder, stack.server, await stack.server.bundle_pem()) as thief:
        good = await _ask(thief, entry_id, own_pod)
        began = time.monotonic()
        refused = await _ask(thief, entry_id, foreign_pod)
        took = time.monotonic() - began
    noted = [one for one in stack.server.process.events()[before:] if one["event"] == EVENT]
    return {
        "agent": agent.agent_id,
        "own_pod_signed": good.status.code == 0,
        "refused": refused.status.code != 0 and not refused.svid.cert_chain,
        "code": refused.status.code,
        "text": refused.status.message,
        "ms": round(took * 1000, 2),
        "event": EVENT,
        "why": noted[-1]["why"] if noted else "",
        "audited": audited(stack, agent.agent_id, foreign_pod),
    }


def audited(stack: PodStack, agent_id: str, pod: str) -> bool:
    """Whether the server's record, which only grows, holds the refusal."""
    path = stack.server.folder / "server" / "issuer.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT target FROM audit WHERE action = ? AND actor = ?", (ACTION, agent_id)
        ).fetchall()
    return any(pod in target for (target,) in rows)


async def _ask(thief: Node, entry_id: str, pod_uid: str) -> Any:
    """What the server answers to one request for an SVID."""
    params = podsvid_pb2.BatchNewX509SVIDRequest.Params(
        entry_id=entry_id, csr=make_csr(make_key()), pod_uid=pod_uid
    )
    request = podsvid_pb2.BatchNewX509SVIDRequest(params=[params])
    stub = podsvid_pb2_grpc.PodSvidStub(thief.dialer.channel)
    async for answer in stub.BatchNewX509SVID(request, timeout=10):
        for result in answer.results:
            return result
    raise ConnectionError("the server ended the call without an answer")
