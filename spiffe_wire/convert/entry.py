"""IDs, selectors and registration entries <-> ``spire.api.types`` (SPIRE API 3.7, 3.8, 4)."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from spiffe_core.entry import EntryError, RegistrationEntry
from spiffe_core.errors import MalformedError
from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.pb.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2


def id_to_wire(spiffe_id: SpiffeId) -> Any:
    """Return the two-part form; the trust domain is bare."""
    return spiffeid_pb2.SPIFFEID(trust_domain=spiffe_id.trust_domain.name, path=spiffe_id.path)


def id_from_wire(message: Any) -> SpiffeId:
    """
    Parse the two-part form; a full ``spiffe://`` name is accepted as trust domain.

    Raises:
        SpiffeIdError: one half breaks a rule.
    """
    return SpiffeId(TrustDomain.parse(message.trust_domain), message.path)


def optional_id(message: Any, field: str) -> SpiffeId:
    """
    Return the ID in *field* of *message*.

    Raises:
        MalformedError: it is absent or breaks a rule.
    """
    if not message.HasField(field):
        raise MalformedError("request must specify SPIFFE ID")
    return id_from_wire(getattr(message, field))


def selectors_to_wire(selectors: Iterable[Selector]) -> list[Any]:
    """Return selectors in sorted order, so that equal sets have equal bytes."""
    return [selector_pb2.Selector(type=one.type, value=one.value) for one in sorted(selectors)]


def selectors_from_wire(messages: Iterable[Any]) -> SelectorSet:
    """
    Parse selectors.

    Raises:
        SelectorError: one of them breaks a rule.
    """
    return frozenset(Selector(one.type, one.value) for one in messages)


def entry_to_wire(entry: RegistrationEntry) -> Any:
    """Return the whole entry as a message."""
    message = entry_pb2.Entry(
        id=entry.id,
        spiffe_id=id_to_wire(entry.spiffe_id),
        parent_id=id_to_wire(entry.parent_id),
        selectors=selectors_to_wire(entry.selectors),
        x509_svid_ttl=int(entry.x509_svid_ttl.total_seconds()),
        federates_with=sorted(one.name for one in entry.federates_with),
        admin=entry.admin,
        downstream=entry.downstream,
        expires_at=_seconds(entry.expires_at),
        dns_names=entry.dns_names,
        revision_number=entry.revision_number,
        store_svid=entry.store_svid,
        jwt_svid_ttl=int(entry.jwt_svid_ttl.total_seconds()),
        hint=entry.hint,
        created_at=_seconds(entry.created_at),
    )
    if entry.disable_x509_svid_prefetch or entry.jwt_svid_include_jti:
        message.additional_attributes.disable_x509_svid_prefetch = (
            entry.disable_x509_svid_prefetch
        )
        message.additional_attributes.jwt_svid_include_jti = entry.jwt_svid_include_jti
    return message


def entry_from_wire(message: Any) -> RegistrationEntry:
    """
    Parse an entry; names are checked for form here, for membership by `check_names`.

    Raises:
        MalformedError: says which part breaks which rule.
    """
    attributes = message.additional_attributes
    return RegistrationEntry(
        id=message.id,
        spiffe_id=_named("spiffe ID", message, "spiffe_id"),
        parent_id=_named("parent ID", message, "parent_id"),
        selectors=selectors_from_wire(message.selectors),
        x509_svid_ttl=timedelta(seconds=message.x509_svid_ttl),
        jwt_svid_ttl=timedelta(seconds=message.jwt_svid_ttl),
        federates_with=frozenset(_domain(name) for name in message.federates_with),
        admin=message.admin,
        downstream=message.downstream,
        expires_at=_instant(message.expires_at),
        dns_names=tuple(message.dns_names),
        hint=message.hint,
        store_svid=message.store_svid,
        disable_x509_svid_prefetch=attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti=attributes.jwt_svid_include_jti,
        revision_number=message.revision_number,
        created_at=_instant(message.created_at),
    )


def masked(message: Any, mask: Any | None, always: str) -> Any:
    """Return *message* with only the fields that *mask* names, and *always* (SPIRE API 3.4)."""
    if mask is None:
        return message
    kept = type(message)()
    kept.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.name != always and not getattr(mask, field.name, False):
            kept.ClearField(field.name)
    return kept


def _named(what: str, message: Any, field: str) -> SpiffeId:
    try:
        return optional_id(message, field)
    except MalformedError as error:
        raise EntryError(f"invalid {what}: {error}") from error


def _domain(name: str) -> TrustDomain:
    try:
        return TrustDomain.parse(name)
    except MalformedError as error:
        raise EntryError(f"invalid federated trust domain: {error}") from error


def _seconds(at: datetime | None) -> int:
    return 0 if at is None else int(at.timestamp())


def _instant(seconds: int) -> datetime | None:
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise EntryError("an instant is out of range") from error
