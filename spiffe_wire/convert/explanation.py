"""Decisions as ``spiffe_issuer.v1.Explanation``, and the text a person reads."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from spiffe_core.decision import Decision
from spiffe_wire.convert.entry import entry_to_wire, selectors_to_wire
from spiffe_wire.pb.spiffe_issuer.v1 import explain_pb2


def explanation_of(decision: Decision, *, reason: str = "") -> Any:
    """Return *decision* as a message; *reason* overrides its own word."""
    reason = reason or decision.reason
    return explain_pb2.Explanation(
        selectors=selectors_to_wire(decision.selectors),
        partial=[
            explain_pb2.Partial(attestor=attestor, reason=why)
            for attestor, why in sorted(decision.partial.items())
        ],
        matched=[entry_to_wire(entry) for entry in decision.matched],
        near_misses=[
            explain_pb2.NearMiss(
                entry=entry_to_wire(miss.entry),
                missing=selectors_to_wire(miss.missing),
                have=selectors_to_wire(miss.have),
                expired=miss.expired,
                difference=miss.difference,
            )
            for miss in decision.near_misses
        ],
        considered=decision.considered,
        reason=reason,
        text=text_of(decision, reason),
    )


def text_of(decision: Decision, reason: str) -> str:
    """Say the decision in a few lines: what was learnt, what matched, what nearly did."""
    learnt = " ".join(map(str, sorted(decision.selectors))) or "nothing"
    lines = [f"learnt: {learnt}"]
    lines += [
        f"could not vouch: {name}: {why}" for name, why in sorted(decision.partial.items())
    ]
    lines += [f"matched: {one.spiffe_id} (entry {one.id})" for one in decision.matched]
    lines += [
        f"matched, but an older entry has its hint: {one.spiffe_id} (entry {one.id})"
        for one in decision.dropped_hints
    ]
    if reason == "not_synced":
        lines.append("the agent has not heard from the server yet")
    elif reason == "no_agent":
        lines.append("no agent is attested on the pod's node")
    elif reason == "no_entries":
        lines.append("no entry is registered for this node: `issuer entry create` adds one")
    elif not decision.matched:
        lines.append(f"no entry matched, of {decision.considered}")
        lines += [
            f"nearest: {miss.entry.spiffe_id} (entry {miss.entry.id}): {miss.difference}"
            for miss in decision.near_misses[:3]
        ]
    return "\n".join(lines)


def add_sds_streams(explanation: Any, streams: Iterable[Any]) -> None:
    """Say what a process asks for by SDS, in the message and in its text."""
    for stream in streams:
        explanation.sds_streams.append(stream)
        explanation.text += "\n" + sds_text_of(stream)


def sds_text_of(stream: Any) -> str:
    """Say in a line what one ``SdsStream`` asks for, and how far it is."""
    names = ", ".join(stream.names) or "everything"
    said = {
        "sent": f"sent version {stream.version}",
        "accepted": f"Envoy has accepted version {stream.version}",
        "refused": f"Envoy has refused version {stream.version}",
    }.get(stream.state, "awaited")
    if stream.state != "accepted" and stream.accepted_version:
        said += f" and goes on with {stream.accepted_version}"
    at = datetime.fromtimestamp(stream.since, UTC).isoformat().replace("+00:00", "Z")
    return f"sds {names}: {said}, since {at}" + (f": {stream.reason}" if stream.reason else "")
