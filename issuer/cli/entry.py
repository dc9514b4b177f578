"""``issuer entry``: registration entries."""

import argparse
from typing import Any

from issuer.cli.calls import DONE, REFUSED, USAGE, CommandError, call, explained, say
from issuer.cli.output import message, relative, spiffe_id, table
from issuer.cli.output import show as print_value
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import selector_pb2

PAGE = 500


def create(arguments: argparse.Namespace) -> int:
    """Add an entry."""
    made = _entry_of(arguments)

    async def ask(channel: Any) -> Any:
        if arguments.node:
            await _set_server_parent(channel, made)
        request = entry_pb2.BatchCreateEntryRequest(entries=[made])
        return await entry_pb2_grpc.EntryStub(channel).BatchCreateEntry(request)

    return _report(call(arguments.socket, ask), arguments.output)


def update(arguments: argparse.Namespace) -> int:
    """Replace an entry."""
    made = _entry_of(arguments)

    async def ask(channel: Any) -> Any:
        if arguments.node:
            await _set_server_parent(channel, made)
        request = entry_pb2.BatchUpdateEntryRequest(entries=[made])
        return await entry_pb2_grpc.EntryStub(channel).BatchUpdateEntry(request)

    return _report(call(arguments.socket, ask), arguments.output)


def show(arguments: argparse.Namespace) -> int:
    """List entries."""
    found = call(arguments.socket, lambda channel: _found(channel, arguments))
    if arguments.output != "text":
        print_value({"entries": [message(one) for one in found]}, arguments.output)
        return DONE
    if not found:
        print("no entry matches")
        return DONE
    rows = [
        (
            one.id,
            spiffe_id(one.spiffe_id),
            spiffe_id(one.parent_id),
            " ".join(f"{each.type}:{each.value}" for each in one.selectors),
            str(one.revision_number),
            relative(one.created_at),
        )
        for one in found
    ]
    table(("ID", "SPIFFE ID", "PARENT", "SELECTORS", "REVISION", "CREATED"), rows)
    return DONE


def delete(arguments: argparse.Namespace) -> int:
    """Remove entries."""
    ids = [*arguments.entry_ids, *arguments.entry_ids_flag]
    if not ids:
        raise CommandError("name at least one entry ID; `issuer entry show` lists them", USAGE)

    async def ask(channel: Any) -> Any:
        request = entry_pb2.BatchDeleteEntryRequest(ids=ids)
        return await entry_pb2_grpc.EntryStub(channel).BatchDeleteEntry(request)

    answer = call(arguments.socket, ask)
    if arguments.output != "text":
        print_value(message(answer), arguments.output)
    failed = 0
    for one in answer.results:
        if one.status.code:
            failed += 1
            say(f"{one.id}: {one.status.message}")
        elif arguments.output == "text":
            print(f"deleted {one.id}")
    return REFUSED if failed else DONE


def count(arguments: argparse.Namespace) -> int:
    """Count entries."""

    async def ask(channel: Any) -> Any:
        request = entry_pb2.CountEntriesRequest()
        return await entry_pb2_grpc.EntryStub(channel).CountEntries(request)

    answer = call(arguments.socket, ask)
    print_value(message(answer), arguments.output, f"{answer.count} entries")
    return DONE


async def _found(channel: Any, arguments: argparse.Namespace) -> list[Any]:
    stub = entry_pb2_grpc.EntryStub(channel)
    if arguments.entry_id:
        return [await stub.GetEntry(entry_pb2.GetEntryRequest(id=arguments.entry_id))]
    wanted = entry_pb2.ListEntriesRequest.Filter()
    with explained("filter"):
        if arguments.spiffe_id:
            wanted.by_spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))
        if arguments.parent_id:
            wanted.by_parent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.parent_id)))
        for text in arguments.selector:
            one = Selector.parse(text)
            wanted.by_selectors.selectors.add(type=one.type, value=one.value)
        if arguments.selector:
            wanted.by_selectors.match = 2  # superset: every selector named is among them
    if arguments.hint:
        wanted.by_hint.value = arguments.hint
    if arguments.downstream:
        wanted.by_downstream.value = True
    found: list[Any] = []
    token = ""
    while True:
        request = entry_pb2.ListEntriesRequest(filter=wanted, page_size=PAGE, page_token=token)
        answer = await stub.ListEntries(request)
        found += answer.entries
        token = answer.next_page_token
        if not token:
            return found


def _entry_of(arguments: argparse.Namespace) -> Any:
    if not arguments.spiffe_id:
        raise CommandError("--spiffe-id says who it is to be", USAGE)
    if not arguments.parent_id and not arguments.node:
        raise CommandError(
            "--parent-id names the agent it lives below: `issuer agent list` shows them", USAGE
        )
    if not arguments.selector:
        raise CommandError("--selector names at least one fact, such as unix:uid:1000", USAGE)
    made = types_pb2.Entry(
        id=arguments.entry_id,
        x509_svid_ttl=arguments.x509_svid_ttl,
        jwt_svid_ttl=arguments.jwt_svid_ttl,
        federates_with=arguments.federates_with,
        admin=arguments.admin,
        downstream=arguments.downstream,
        expires_at=arguments.expires_at,
        dns_names=arguments.dns,
        store_svid=arguments.store_svid,
        hint=arguments.hint,
    )
    with explained("--spiffe-id"):
        made.spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))
    if arguments.parent_id:
        with explained("--parent-id"):
            made.parent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.parent_id)))
    with explained("--selector"):
        for text in arguments.selector:
            one = Selector.parse(text)
            made.selectors.append(selector_pb2.Selector(type=one.type, value=one.value))
    return made


async def _set_server_parent(channel: Any, made: Any) -> None:
    bundle = await bundle_pb2_grpc.BundleStub(channel).GetBundle(bundle_pb2.GetBundleRequest())
    made.parent_id.trust_domain = bundle.trust_domain
    made.parent_id.path = "/spire/server"


def _report(answer: Any, style: str) -> int:
    (result,) = answer.results
    if style != "text":
        print_value(message(answer), style)
        return DONE
    if result.status.code:
        text = result.status.message
        if result.HasField("entry"):
            text += f": entry {result.entry.id}"
        say(text)
        return REFUSED
    entry = result.entry
    print(f"entry {entry.id}, revision {entry.revision_number}")
    print(f"  {spiffe_id(entry.spiffe_id)}")
    print(f"  below {spiffe_id(entry.parent_id)}")
    print("  for   " + " ".join(f"{one.type}:{one.value}" for one in entry.selectors))
    return DONE
