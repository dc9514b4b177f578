"""``issuer entry``: registration entries."""

import argparse
from collections.abc import Iterator
from typing import Any, Final

from issuer.cli.calls import answered, call
from issuer.cli.entry_file import entries_of_file
from spiffe_core.entry import check_dns_name
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.commandline import (
    DONE,
    USAGE,
    CommandError,
    details,
    explained,
    message,
    relative,
    spiffe_id,
    table,
)
from spiffe_wire.commandline import (
    show as print_value,
)
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2

PAGE: Final = 500
BATCH: Final = 500  # the server takes 1000 and 4 MiB
NOT_FOUND: Final = 5  # the gRPC code, in a batch's results
_IF_MISSING: Final = ": `issuer entry show` lists what is there"
MATCH: Final = {"exact": 0, "subset": 1, "superset": 2, "any": 3}


def create(arguments: argparse.Namespace) -> int:
    """Add entries."""
    return _change(
        arguments, "BatchCreateEntry", entry_pb2.BatchCreateEntryRequest,
        entry_pb2.BatchCreateEntryResponse(),
    )  # fmt: skip


def update(arguments: argparse.Namespace) -> int:
    """Replace entries."""
    if not arguments.file and not arguments.entry_id:
        raise CommandError("--entry-id says which: `issuer entry show` lists them", USAGE)
    return _change(
        arguments, "BatchUpdateEntry", entry_pb2.BatchUpdateEntryRequest,
        entry_pb2.BatchUpdateEntryResponse(),
    )  # fmt: skip


def show(arguments: argparse.Namespace) -> int:
    """List entries."""
    wanted = entry_pb2.ListEntriesRequest.Filter()
    _fill(wanted, arguments)
    found = call(
        arguments.socket,
        lambda channel: _found(channel, arguments.entry_id, wanted),
        if_missing=_IF_MISSING,
    )
    if arguments.quiet:
        print_value(None, "text", "\n".join(one.id for one in found))
    elif arguments.output != "text":
        print_value({"entries": [message(one) for one in found]}, arguments.output)
    elif not found:
        print_value(None, "text", "no entry matches: `issuer entry create` adds one")
    elif arguments.entry_id:
        print_value(None, "text", _in_full(found[0]))
    else:
        table(
            ("ID", "SPIFFE ID", "PARENT", "SELECTORS", "REVISION", "CREATED"),
            [
                (
                    one.id, spiffe_id(one.spiffe_id), spiffe_id(one.parent_id),
                    _selectors(one), str(one.revision_number), relative(one.created_at),
                )
                for one in found
            ],
        )  # fmt: skip
    return DONE


def delete(arguments: argparse.Namespace) -> int:
    """Remove entries."""
    ids = [*arguments.entry_ids, *arguments.more_ids]
    if not ids:
        raise CommandError("name at least one entry ID; `issuer entry show` lists them", USAGE)
    answer = entry_pb2.BatchDeleteEntryResponse()

    async def ask(channel: Any) -> None:
        for some in _chunks(ids):
            request = entry_pb2.BatchDeleteEntryRequest(ids=some)
            part = await entry_pb2_grpc.EntryStub(channel).BatchDeleteEntry(request)
            answer.results.extend(part.results)

    call(arguments.socket, ask)

    def said(one: Any) -> str:
        return f"{one.id}: {_refusal(one)}" if one.status.code else f"deleted {one.id}"

    return answered(answer, arguments.output, said)


def count(arguments: argparse.Namespace) -> int:
    """Count entries."""
    request = entry_pb2.CountEntriesRequest()
    _fill(request.filter, arguments)

    async def ask(channel: Any) -> Any:
        return await entry_pb2_grpc.EntryStub(channel).CountEntries(request)

    answer = call(arguments.socket, ask)
    print_value(message(answer), arguments.output, f"{answer.count} entries")
    return DONE


def selector_match(match: Any, arguments: argparse.Namespace) -> None:
    """Fill a ``SelectorMatch`` from ``--selector`` and ``--match-selectors-on``."""
    with explained("--selector"):
        for text in arguments.selector:
            one = Selector.parse(text)
            match.selectors.add(type=one.type, value=one.value)
    match.match = MATCH[arguments.match_selectors_on]


def _change(arguments: argparse.Namespace, method: str, request: Any, answer: Any) -> int:
    made = _given(arguments)

    async def ask(channel: Any) -> None:
        if arguments.node:
            await _set_server_parent(channel, made[0])
        for some in _chunks(made):
            part = await getattr(entry_pb2_grpc.EntryStub(channel), method)(
                request(entries=some)
            )
            answer.results.extend(part.results)

    call(arguments.socket, ask)
    return answered(answer, arguments.output, _said)


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    for at in range(0, len(items), BATCH):
        yield items[at : at + BATCH]


async def _found(channel: Any, entry_id: str | None, wanted: Any) -> list[Any]:
    stub = entry_pb2_grpc.EntryStub(channel)
    if entry_id:
        return [await stub.GetEntry(entry_pb2.GetEntryRequest(id=entry_id))]
    found: list[Any] = []
    token = ""
    while True:
        request = entry_pb2.ListEntriesRequest(filter=wanted, page_size=PAGE, page_token=token)
        answer = await stub.ListEntries(request)
        found += answer.entries
        token = answer.next_page_token
        if not token:
            return found


def _fill(wanted: Any, arguments: argparse.Namespace) -> None:
    with explained("--spiffe-id"):
        if arguments.spiffe_id:
            wanted.by_spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))
    with explained("--parent-id"):
        if arguments.parent_id:
            wanted.by_parent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.parent_id)))
    if arguments.selector:
        selector_match(wanted.by_selectors, arguments)
    if arguments.federates_with:
        wanted.by_federates_with.trust_domains.extend(_domains(arguments))
        wanted.by_federates_with.match = MATCH[arguments.match_federates_with_on]
    if arguments.hint:
        wanted.by_hint.value = arguments.hint
    if arguments.downstream:
        wanted.by_downstream.value = True


def _domains(arguments: argparse.Namespace) -> list[str]:
    with explained("--federates-with"):
        return [TrustDomain.parse(one).name for one in arguments.federates_with]


def _given(arguments: argparse.Namespace) -> list[Any]:
    """The entries that the options, or the file, describe."""
    if not arguments.file:
        return [_of_options(arguments)]
    if arguments.spiffe_id or arguments.parent_id or arguments.selector or arguments.entry_id:
        raise CommandError("give either --file or the entry's options, not both", USAGE)
    return entries_of_file(arguments.file)


def _of_options(arguments: argparse.Namespace) -> Any:
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
        federates_with=_domains(arguments),
        admin=arguments.admin,
        downstream=arguments.downstream,
        expires_at=_instant(arguments.expires_at),
        store_svid=arguments.store_svid,
        hint=arguments.hint,
    )
    with explained("--dns"):
        made.dns_names.extend(check_dns_name(name) for name in arguments.dns)
    with explained("--spiffe-id"):
        made.spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))
    if arguments.parent_id:
        with explained("--parent-id"):
            made.parent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.parent_id)))
    with explained("--selector"):
        for text in arguments.selector:
            one = Selector.parse(text)
            made.selectors.add(type=one.type, value=one.value)
    return made


def _instant(text: str) -> int:
    from datetime import datetime

    try:
        if text.isascii() and text.isdigit():
            at = int(text)
        else:
            parsed = datetime.fromisoformat(text)
            if parsed.tzinfo is None:
                raise ValueError(text)
            at = int(parsed.timestamp())
    except (ValueError, OverflowError):
        at = -1
    if not 0 <= at < 2**38:  # the year 10680; datetime ends before
        raise CommandError(
            "--expires-at reads 2030-01-31T12:00:00Z, with its offset, or Unix seconds", USAGE
        )
    return at


async def _set_server_parent(channel: Any, made: Any) -> None:
    bundle = await bundle_pb2_grpc.BundleStub(channel).GetBundle(bundle_pb2.GetBundleRequest())
    made.parent_id.trust_domain = bundle.trust_domain
    made.parent_id.path = "/spire/server"


def _said(result: Any) -> str:
    """Say what became of one entry of a batch."""
    if result.status.code:
        known = f": entry {result.entry.id}" if result.HasField("entry") else ""
        return _refusal(result) + known
    entry = result.entry
    return (
        f"entry {entry.id}, revision {entry.revision_number}\n"
        f"  {spiffe_id(entry.spiffe_id)}\n"
        f"  below {spiffe_id(entry.parent_id)}\n"
        f"  for   {_selectors(entry)}"
    )


def _refusal(result: Any) -> str:
    hint = _IF_MISSING if result.status.code == NOT_FOUND else ""
    return f"{result.status.message}{hint}"


def _in_full(one: Any) -> str:
    flags = [name for name in ("admin", "downstream", "store_svid") if getattr(one, name)]
    return details(
        (
            ("entry", one.id),
            ("SPIFFE ID", spiffe_id(one.spiffe_id)),
            ("parent", spiffe_id(one.parent_id)),
            *(("selector", f"{each.type}:{each.value}") for each in one.selectors),
            ("X509-SVID life", f"{one.x509_svid_ttl} s" if one.x509_svid_ttl else ""),
            ("JWT-SVID life", f"{one.jwt_svid_ttl} s" if one.jwt_svid_ttl else ""),
            ("DNS names", " ".join(one.dns_names)),
            ("federates with", " ".join(one.federates_with)),
            ("hint", one.hint),
            ("flags", " ".join(flags)),
            ("expires", relative(one.expires_at) if one.expires_at else ""),
            ("revision", str(one.revision_number)),
            ("created", relative(one.created_at)),
        )
    )


def _selectors(one: Any) -> str:
    return " ".join(f"{each.type}:{each.value}" for each in one.selectors)
