"""``spire.api.server.entry.v1.Entry`` (SPIRE API 5.1)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from ca.clock import Clock
from issuer.api.callers import caller
from issuer.services.entries import EntryFilter, EntryService
from issuer.services.hub import Hub
from issuer.store.entries import SimilarEntryError
from spiffe_core.entry import EntryError, RegistrationEntry
from spiffe_core.errors import AlreadyExistsError, ExhaustedError, MalformedError, SpiffeError
from spiffe_core.selector import SetMatch
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.convert.entry import (
    entry_from_wire,
    entry_to_wire,
    id_from_wire,
    masked,
    selectors_from_wire,
)
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import status_pb2
from spiffe_wire.status import status_of

SYNC_PAGE: Final = 500  # SPIRE API 5.1.1
MAX_BATCH: Final = 1000  # security requirements, table 1
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024 - 64 * 1024

OK: Final = status_pb2.Status(code=0, message="OK")


def failure(error: SpiffeError, context: str = "") -> Any:
    """Return the status of one batch item that failed."""
    outcome = status_of(error)
    text = f"{context}: {outcome.text}" if context else outcome.text
    return status_pb2.Status(code=outcome.number, message=text)


def check_batch(size: int) -> None:
    """
    Refuse a batch over the limit.

    Raises:
        ExhaustedError: more than 1000 items.
    """
    if size > MAX_BATCH:
        raise ExhaustedError(f"a batch holds at most {MAX_BATCH} items: send several")


def check_size(answer: Any) -> Any:
    """
    Return *answer* if a client can receive it (SEC-62).

    Raises:
        ExhaustedError: it is over the message limit.
    """
    if answer.ByteSize() > MAX_MESSAGE_BYTES:
        raise ExhaustedError("the answer is too large: ask for pages with page_size")
    return answer


@dataclass
class EntryServicer(entry_pb2_grpc.EntryServicer):
    """Thin: parse, ask the service, answer."""

    service: EntryService
    hub: Hub
    clock: Clock

    async def CountEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        count = await self.service.count(_filter_of(request.filter))
        return entry_pb2.CountEntriesResponse(count=count)

    async def ListEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        page = await self.service.page(
            _filter_of(request.filter), request.page_size, request.page_token
        )
        mask = request.output_mask if request.HasField("output_mask") else None
        return check_size(
            entry_pb2.ListEntriesResponse(
                entries=[masked(entry_to_wire(one), mask, "id") for one in page.items],
                next_page_token=page.next_token,
            )
        )

    async def GetEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1."""
        entry = await self.service.get(request.id)
        mask = request.output_mask if request.HasField("output_mask") else None
        return masked(entry_to_wire(entry), mask, "id")

    async def BatchCreateEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: an item that is similar to an entry answers 6 and that entry."""
        actor = caller().name

        async def create(message: Any) -> RegistrationEntry:
            return await self.service.create(_parsed(message), actor=actor)

        return entry_pb2.BatchCreateEntryResponse(
            results=await self._batch(
                request,
                create,
                "failed to create entry",
                entry_pb2.BatchCreateEntryResponse.Result,
            )
        )

    async def BatchUpdateEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: no mask means every field, absent ones cleared."""
        actor = caller().name
        mask = request.input_mask if request.HasField("input_mask") else None

        async def update(message: Any) -> RegistrationEntry:
            merged = message
            if mask is not None:
                before = await self.service.get(message.id)
                merged = _merged(entry_to_wire(before), message, mask)
            return await self.service.update(_parsed(merged), actor=actor)

        return entry_pb2.BatchUpdateEntryResponse(
            results=await self._batch(
                request,
                update,
                "failed to update entry",
                entry_pb2.BatchUpdateEntryResponse.Result,
            )
        )

    async def BatchDeleteEntry(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1: the id is echoed in every result."""
        check_batch(len(request.ids))
        actor = caller().name
        results = []
        for entry_id in request.ids:
            status = OK
            try:
                await self.service.delete(entry_id, actor=actor)
            except SpiffeError as error:
                status = failure(error)
            results.append(
                entry_pb2.BatchDeleteEntryResponse.Result(status=status, id=entry_id)
            )
        return entry_pb2.BatchDeleteEntryResponse(results=results)

    async def GetAuthorizedEntries(self, request: Any, context: Any) -> Any:
        """See SPIRE API 5.1.1."""
        mask = request.output_mask if request.HasField("output_mask") else None
        return check_size(
            entry_pb2.GetAuthorizedEntriesResponse(
                entries=[masked(entry_to_wire(one), mask, "id") for one in self._authorized()]
            )
        )

    async def SyncAuthorizedEntries(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """See SPIRE API 5.1.1: whole entries when they are few, else revisions first."""
        first = await anext(aiter(requests), None)
        if first is None:
            return
        if first.ids:
            raise MalformedError("specifying IDs on initial request is not supported")
        mask = first.output_mask if first.HasField("output_mask") else None
        if mask is not None and not mask.revision_number:
            raise MalformedError("revision number cannot be masked")
        response = entry_pb2.SyncAuthorizedEntriesResponse
        entries = {one.id: one for one in self._authorized()}

        def whole(some: list[RegistrationEntry]) -> list[Any]:
            return [masked(entry_to_wire(one), mask, "id") for one in some]

        if len(entries) <= SYNC_PAGE:
            yield response(entries=whole(list(entries.values())), more=False)
            return
        everything = list(entries.values())
        for at in range(0, len(everything), SYNC_PAGE):
            yield response(
                entry_revisions=[
                    entry_pb2.EntryRevision(
                        id=one.id,
                        revision_number=one.revision_number,
                        created_at=int(one.created_at.timestamp()) if one.created_at else 0,
                    )
                    for one in everything[at : at + SYNC_PAGE]
                ],
                more=at + SYNC_PAGE < len(everything),
            )
        async for request in requests:
            check_batch(len(request.ids))
            wanted = [entries[id_] for id_ in request.ids if id_ in entries]
            for at in range(0, max(len(wanted), 1), SYNC_PAGE):
                yield response(
                    entries=whole(wanted[at : at + SYNC_PAGE]),
                    more=at + SYNC_PAGE < len(wanted),
                )

    def _authorized(self) -> list[RegistrationEntry]:
        agent = caller().require_agent()
        return self.hub.index.entries_of(agent.id, self.clock.now())

    async def _batch(
        self,
        request: Any,
        change: Callable[[Any], Awaitable[RegistrationEntry]],
        what: str,
        result: Callable[..., Any],
    ) -> list[Any]:
        check_batch(len(request.entries))
        mask = request.output_mask if request.HasField("output_mask") else None
        results = []
        for message in request.entries:
            try:
                made = await change(message)
                results.append(result(status=OK, entry=masked(entry_to_wire(made), mask, "id")))
            except SimilarEntryError as error:
                existing = masked(entry_to_wire(error.existing), mask, "id")
                results.append(result(status=failure(error), entry=existing))
            except EntryError as error:
                results.append(result(status=failure(error, "failed to convert entry")))
            except AlreadyExistsError as error:
                results.append(result(status=failure(error, what)))
            except SpiffeError as error:
                results.append(result(status=failure(error, what)))
        return results


def _parsed(message: Any) -> RegistrationEntry:
    """Output-only fields are the store's business (SPIRE API 3.4)."""
    try:
        return replace(entry_from_wire(message), revision_number=0, created_at=None)
    except EntryError:
        raise
    except MalformedError as error:
        raise EntryError(str(error)) from error


def _merged(before: Any, given: Any, mask: Any) -> Any:
    merged = types_pb2.Entry()
    merged.CopyFrom(before)
    for field in types_pb2.EntryMask.DESCRIPTOR.fields:
        if not getattr(mask, field.name):
            continue
        merged.ClearField(field.name)
        one = types_pb2.Entry.DESCRIPTOR.fields_by_name[field.name]
        if one.message_type is not None and not one.is_repeated:
            if given.HasField(field.name):
                getattr(merged, field.name).CopyFrom(getattr(given, field.name))
        elif one.is_repeated:
            getattr(merged, field.name).extend(getattr(given, field.name))
        else:
            setattr(merged, field.name, getattr(given, field.name))
    return merged


def _filter_of(message: Any) -> EntryFilter:
    spiffe_id = parent_id = selectors = federates_with = None
    if message.HasField("by_spiffe_id"):
        spiffe_id = _explained("malformed SPIFFE ID filter", message.by_spiffe_id)
    if message.HasField("by_parent_id"):
        parent_id = _explained("malformed parent ID filter", message.by_parent_id)
    if message.HasField("by_selectors"):
        selectors = selector_match(message.by_selectors, "malformed selectors filter")
    if message.HasField("by_federates_with"):
        names = message.by_federates_with.trust_domains
        if not names:
            raise MalformedError("malformed federates with filter: empty trust domain set")
        domains = frozenset(TrustDomain.parse(name) for name in names)
        federates_with = (domains, SetMatch(message.by_federates_with.match))
    return EntryFilter(
        spiffe_id,
        parent_id,
        selectors,
        federates_with,
        message.by_hint.value,
        message.by_downstream.value,
    )


def selector_match(message: Any, what: str) -> Any:
    """
    Parse a ``SelectorMatch``.

    Raises:
        MalformedError: empty, or a selector breaks a rule.
    """
    try:
        selectors = selectors_from_wire(message.selectors)
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
    if not selectors:
        raise MalformedError(f"{what}: empty selector set")
    return selectors, SetMatch(message.match)


def _explained(what: str, message: Any) -> Any:
    try:
        return id_from_wire(message)
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
