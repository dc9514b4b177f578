"""``spire.api.server.entry.v1.Entry`` (SPIRE API 5.1)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ca.clock import Clock
from issuer.api.answers import (
    OK,
    check_batch,
    failure,
    mask_of,
    selector_match,
    set_match,
    to_wire,
)
from issuer.api.callers import Callers, caller
from issuer.services.entries import EntryFilter, EntryService
from issuer.services.hub import Hub
from issuer.store.entries import SimilarEntryError
from spiffe_core.entry import EntryError, RegistrationEntry
from spiffe_core.errors import DeadlineError, ExhaustedError, MalformedError, SpiffeError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.convert.entry import entry_from_wire, entry_to_wire, id_from_wire, masked
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2

SYNC_PAGE: Final = 500  # SPIRE API 5.1.1
SYNC_IDLE_SECONDS: Final = 30.0  # spire-agent's deadline for a whole sync (SPIRE API 9)
MAX_ENTRY_BYTES: Final = 256 * 1024
"""On the wire: an entry must fit into an answer, with many others (SEC-80)."""
TURN: Final = 8
"""Items of a batch that are begun between two turns of the event loop: below 1 ms."""
PART_BYTES: Final = 1024 * 1024


@dataclass
class EntryServicer(entry_pb2_grpc.EntryServicer):
    """Thin: parse, ask the service, answer."""

    service: EntryService
    hub: Hub
    callers: Callers
    clock: Clock

    async def CountEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        wanted = _filter_of(request.filter, self.hub.trust_domain)
        return entry_pb2.CountEntriesResponse(count=await self.service.count(wanted))

    async def ListEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        wanted = _filter_of(request.filter, self.hub.trust_domain)
        page = await self.service.page(wanted, request.page_size, request.page_token)
        return entry_pb2.ListEntriesResponse(
            entries=await to_wire(page.items, entry_to_wire, mask_of(request), "id"),
            next_page_token=page.next_token,
        )

    async def GetEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        entry = await self.service.get(request.id)
        return masked(entry_to_wire(entry), mask_of(request), "id")

    async def BatchCreateEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: an item that is similar to an entry answers 6 and that entry."""
        actor = caller().name
        mask = mask_of(request)
        result = entry_pb2.BatchCreateEntryResponse.Result

        async def create(message: Any) -> Any:
            try:
                made = await self.service.create(_parsed(message), actor=actor)
            except SimilarEntryError as error:
                existing = masked(entry_to_wire(error.existing), mask, "id")
                return result(status=failure(error), entry=existing)
            return result(status=OK, entry=masked(entry_to_wire(made), mask, "id"))

        return entry_pb2.BatchCreateEntryResponse(
            results=await _batch(request.entries, create, "failed to create entry", result)
        )

    async def BatchUpdateEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: no mask means every field, absent ones cleared."""
        actor = caller().name
        given, mask = mask_of(request, "input_mask"), mask_of(request)
        result = entry_pb2.BatchUpdateEntryResponse.Result

        async def update(message: Any) -> Any:
            whole = None if given is not None else _parsed(message)

            def change(before: RegistrationEntry) -> RegistrationEntry:
                if whole is not None:
                    return whole
                return _parsed(_merged(entry_to_wire(before), message, given))

            made = await self.service.update(message.id, change, actor=actor)
            return result(status=OK, entry=masked(entry_to_wire(made), mask, "id"))

        return entry_pb2.BatchUpdateEntryResponse(
            results=await _batch(request.entries, update, "failed to update entry", result)
        )

    async def BatchDeleteEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: the id is echoed in every result."""
        actor = caller().name
        result = entry_pb2.BatchDeleteEntryResponse.Result

        async def delete(entry_id: str) -> Any:
            try:
                await self.service.delete(entry_id, actor=actor)
            except SpiffeError as error:
                return result(status=failure(error), id=entry_id)
            return result(status=OK, id=entry_id)

        return entry_pb2.BatchDeleteEntryResponse(
            results=await _batch(request.ids, delete, "failed to delete entry", result)
        )

    async def GetAuthorizedEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1.1."""
        return entry_pb2.GetAuthorizedEntriesResponse(
            entries=await to_wire(self._authorized(), entry_to_wire, mask_of(request), "id")
        )

    async def SyncAuthorizedEntries(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """See SPIRE API 5.1.1: whole entries when they are few, else revisions first."""
        me = caller()
        stream = aiter(requests)
        first = await _next_request(stream)
        if first is None:
            return
        if first.ids:
            raise MalformedError("specifying IDs on initial request is not supported")
        mask = mask_of(first)
        if mask is not None and not mask.revision_number:
            raise MalformedError("revision number cannot be masked")
        response = entry_pb2.SyncAuthorizedEntriesResponse
        entries = self._authorized()
        if len(entries) <= SYNC_PAGE:
            try:
                whole = await to_wire(entries, entry_to_wire, mask, "id")
            except ExhaustedError:
                pass  # few, and large: the client fetches them in parts
            else:
                yield response(entries=whole, more=False)
                return
        for at in range(0, len(entries), SYNC_PAGE):
            yield response(
                entry_revisions=[_revision_of(one) for one in entries[at : at + SYNC_PAGE]],
                more=at + SYNC_PAGE < len(entries),
            )
        while (request := await _next_request(stream)) is not None:
            check_batch(len(request.ids))
            self.callers.check_still(me)
            # What is authorized now, not what was when the stream began.
            now, agent_id = self.clock.now(), me.require_agent().id
            found = (self.hub.index.entry_for(agent_id, one, now) for one in request.ids)
            for part, more in _parts([one for one in found if one is not None], mask):
                yield response(entries=part, more=more)

    def _authorized(self) -> Sequence[RegistrationEntry]:
        agent = caller().require_agent()
        return self.hub.index.view_of(agent.id, self.clock.now()).entries


async def _next_request(stream: AsyncIterator[Any]) -> Any | None:
    try:
        async with asyncio.timeout(SYNC_IDLE_SECONDS):
            return await anext(stream, None)
    except TimeoutError:
        raise DeadlineError("nothing more was asked: begin a new sync") from None


def _revision_of(entry: RegistrationEntry) -> Any:
    return entry_pb2.EntryRevision(
        id=entry.id,
        revision_number=entry.revision_number,
        created_at=int(entry.created_at.timestamp()) if entry.created_at else 0,
    )


def _parts(wanted: Sequence[RegistrationEntry], mask: Any) -> Iterator[tuple[list[Any], bool]]:
    """*wanted* in messages a client can receive, and whether more follow; one at least."""
    part: list[Any] = []
    size = 0
    for entry in wanted:
        message = masked(entry_to_wire(entry), mask, "id")
        size += message.ByteSize()
        if part and (len(part) == SYNC_PAGE or size > PART_BYTES):
            yield part, True
            part, size = [], message.ByteSize()
        part.append(message)
    yield part, False


async def _batch(
    items: Sequence[Any],
    change: Callable[[Any], Awaitable[Any]],
    what: str,
    result: Callable[..., Any],
) -> list[Any]:
    """
    One result for each item, at its place.

    All items wait for their commit together, in their order: the store's queue keeps it,
    and each joins it before it first waits for anything.
    """
    check_batch(len(items))

    async def one(item: Any) -> Any:
        try:
            return await change(item)
        except EntryError as error:
            return result(status=failure(error, "failed to convert entry"))
        except SpiffeError as error:
            return result(status=failure(error, what))

    async with asyncio.TaskGroup() as group:
        answers = []
        for number, item in enumerate(items, 1):
            answers.append(group.create_task(one(item)))
            if number % TURN == 0:  # those begun so far have put in their change by then
                await asyncio.sleep(0)
    return [one.result() for one in answers]


def _parsed(message: Any) -> RegistrationEntry:
    """
    Parse an entry that somebody wants stored; output-only fields are ignored (3.4).

    Raises:
        EntryError: says what is wrong with it.
    """
    if message.ByteSize() > MAX_ENTRY_BYTES:
        raise EntryError(f"an entry is longer than {MAX_ENTRY_BYTES} bytes")
    for name in ("revision_number", "created_at"):
        message.ClearField(name)
    try:
        return entry_from_wire(message)
    except EntryError:
        raise
    except MalformedError as error:
        raise EntryError(str(error)) from error


def _merged(before: Any, given: Any, mask: Any) -> Any:
    for field in types_pb2.EntryMask.DESCRIPTOR.fields:
        if not getattr(mask, field.name):
            continue
        before.ClearField(field.name)
        one = types_pb2.Entry.DESCRIPTOR.fields_by_name[field.name]
        if one.is_repeated:
            getattr(before, field.name).extend(getattr(given, field.name))
        elif one.message_type is None:
            setattr(before, field.name, getattr(given, field.name))
        elif given.HasField(field.name):
            getattr(before, field.name).CopyFrom(getattr(given, field.name))
    return before


def _filter_of(message: Any, trust_domain: TrustDomain) -> EntryFilter:
    spiffe_id = parent_id = selectors = federates_with = None
    if message.HasField("by_spiffe_id"):
        with _explained("malformed SPIFFE ID filter"):
            spiffe_id = id_from_wire(message.by_spiffe_id).require_workload(trust_domain)
    if message.HasField("by_parent_id"):
        with _explained("malformed parent ID filter"):
            parent_id = id_from_wire(message.by_parent_id).require_member(trust_domain)
    if message.HasField("by_selectors"):
        selectors = selector_match(message.by_selectors, "malformed selectors filter")
    if message.HasField("by_federates_with"):
        what = "malformed federates with filter"
        given = message.by_federates_with
        with _explained(what):
            domains = frozenset(TrustDomain.parse(name) for name in given.trust_domains)
        if not domains:
            raise MalformedError(f"{what}: empty trust domain set")
        federates_with = domains, set_match(given.match, what)
    return EntryFilter(
        spiffe_id,
        parent_id,
        selectors,
        federates_with,
        message.by_hint.value,
        message.by_downstream.value,
    )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
