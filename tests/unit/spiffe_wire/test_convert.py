"""Domain values as messages and back: nothing is lost, and nothing but our errors comes out."""

import string
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle
from spiffe_core.decision import Decision
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import MalformedError, SpiffeError
from spiffe_core.keys import spki_of
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.convert.entry import (
    entry_from_wire,
    entry_to_wire,
    id_from_wire,
    id_to_wire,
    masked,
    optional_id,
    selectors_from_wire,
    selectors_to_wire,
)
from spiffe_wire.convert.explanation import explanation_of
from spiffe_wire.pb.spire.api.types import bundle_pb2, entry_pb2, selector_pb2, spiffeid_pb2
from tests.support.authorities import a_key
from tests.support.ca import FakeCa
from tests.support.store import an_entry

patient = hypothesis_settings(deadline=None)  # the machine may be busy

ODD = 2**63 - 1
CA = FakeCa()
OTHER = FakeCa(which="other")


def whole_seconds(most: int = 4_000_000_000) -> st.SearchStrategy[datetime]:
    """Instants that the wire can carry."""
    return st.integers(1, most).map(lambda one: datetime.fromtimestamp(one, UTC))


TTLS = st.integers(0, 2**31 - 1).map(lambda one: timedelta(seconds=one))
DOMAINS = st.text(string.ascii_lowercase + string.digits + "-._", min_size=1, max_size=20).map(
    TrustDomain
)
SEGMENTS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=10)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(lambda one: "/" + "/".join(one))
IDS = st.builds(SpiffeId, DOMAINS, PATHS)
SELECTORS = st.builds(
    Selector,
    SEGMENTS,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda one: one.isprintable()
    ),
)
DNS = st.lists(st.sampled_from(["a.example.org", "b", "*.c.test"]), max_size=3, unique=True)
ENTRIES = st.builds(
    RegistrationEntry,
    spiffe_id=IDS,
    parent_id=IDS,
    selectors=st.frozensets(SELECTORS, min_size=1, max_size=5),
    id=st.text(string.ascii_letters + string.digits + "-_.", max_size=20),
    x509_svid_ttl=TTLS,
    jwt_svid_ttl=TTLS,
    federates_with=st.frozensets(DOMAINS, max_size=3),
    admin=st.booleans(),
    downstream=st.booleans(),
    expires_at=st.none() | whole_seconds(),
    dns_names=DNS.map(tuple),
    hint=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    disable_x509_svid_prefetch=st.booleans(),
    jwt_svid_include_jti=st.booleans(),
    revision_number=st.integers(0, ODD),
    created_at=st.none() | whole_seconds(),
)


@patient
@given(IDS)
def test_ids_there_and_back(spiffe_id: SpiffeId) -> None:
    """SPIRE API 3.7: an ID goes as bare trust domain and path, and comes back the same."""
    message = id_to_wire(spiffe_id)
    assert (message.trust_domain, message.path) == (spiffe_id.trust_domain.name, spiffe_id.path)
    assert id_from_wire(message) == spiffe_id
    message.trust_domain = f"spiffe://{message.trust_domain}"
    assert id_from_wire(message) == spiffe_id


@patient
@given(st.frozensets(SELECTORS, max_size=6))
def test_selectors_there_and_back(selectors: frozenset[Selector]) -> None:
    """SPIRE API 3.8: a set of selectors comes back the same, in an order of its own."""
    messages = selectors_to_wire(selectors)
    assert selectors_from_wire(messages) == selectors
    again = selectors_to_wire(sorted(selectors, reverse=True))
    assert messages == again


@patient
@given(ENTRIES)
def test_entries_there_and_back(entry: RegistrationEntry) -> None:
    """SPIRE API 4: every field of an entry survives the wire, as bytes too."""
    message = entry_to_wire(entry)
    again = entry_pb2.Entry.FromString(message.SerializeToString())
    assert entry_from_wire(again) == entry


def test_every_field_of_an_entry_is_carried() -> None:
    """SPIRE API 4: an entry in which everything is set sets every field of the message."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    full = an_entry(
        id="e", x509_svid_ttl=timedelta(1), jwt_svid_ttl=timedelta(1), admin=True,
        federates_with=frozenset({TrustDomain("b.test")}), downstream=True, expires_at=now,
        dns_names=("a",), hint="h", revision_number=3, created_at=now, store_svid=True,
        jwt_svid_include_jti=True,
    )  # fmt: skip
    seen = {field.name for field, _ in entry_to_wire(full).ListFields()}
    assert seen == {field.name for field in entry_pb2.Entry.DESCRIPTOR.fields}


TEXTS = st.text(max_size=12)
NUMBERS = st.integers(-(2**63), ODD)
ANY_ID = st.builds(
    lambda domain, path: spiffeid_pb2.SPIFFEID(trust_domain=domain, path=path),
    st.sampled_from(["example.org", "spiffe://example.org", "Ex", "", "a/b"]) | TEXTS,
    st.sampled_from(["/w", "", "/", "/../x", "w", "//"]) | TEXTS,
)
ANY_SELECTOR = st.builds(lambda t, v: selector_pb2.Selector(type=t, value=v), TEXTS, TEXTS)


@st.composite
def any_entry(draw: st.DrawFn) -> Any:
    """A message of an entry with anything in it."""
    message = entry_pb2.Entry()
    for field, values in {
        "id": TEXTS,
        "hint": TEXTS,
        "x509_svid_ttl": st.integers(-(2**31), 2**31 - 1),
        "jwt_svid_ttl": st.integers(-(2**31), 2**31 - 1),
        "expires_at": NUMBERS,
        "created_at": NUMBERS,
        "revision_number": NUMBERS,
        "admin": st.booleans(),
        "downstream": st.booleans(),
        "store_svid": st.booleans(),
    }.items():
        if draw(st.booleans()):
            setattr(message, field, draw(values))
    for field in ("spiffe_id", "parent_id"):
        if draw(st.integers(0, 4)):
            getattr(message, field).CopyFrom(draw(ANY_ID))
    message.selectors.extend(draw(st.lists(ANY_SELECTOR, max_size=3)))
    message.federates_with.extend(draw(st.lists(TEXTS, max_size=2)))
    message.dns_names.extend(draw(st.lists(TEXTS, max_size=2)))
    if draw(st.booleans()):
        message.additional_attributes.disable_x509_svid_prefetch = draw(st.booleans())
    return message


@patient
@given(any_entry())
def test_any_message_is_an_entry_or_an_error_of_ours(message: Any) -> None:
    """SEC-95: whatever a caller puts into an entry, it is parsed whole or refused by us."""
    try:
        entry = entry_from_wire(message)
    except MalformedError:
        return
    assert entry_from_wire(entry_to_wire(entry)) == entry


@patient
@given(st.binary(max_size=80))
def test_any_bytes_are_an_entry_or_an_error(data: bytes) -> None:
    """Whatever bytes arrive, protobuf refuses them, or we do, or they are an entry."""
    try:
        message = entry_pb2.Entry.FromString(data)
    except DecodeError:
        return
    try:
        entry_from_wire(message)
    except MalformedError:
        pass


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spiffe_id": None}, "invalid spiffe ID: request must specify SPIFFE ID"),
        ({"parent_id": None}, "invalid parent ID: request must specify SPIFFE ID"),
        ({"spiffe_id": ("Bad", "/x")}, "invalid spiffe ID: "),
        ({"parent_id": ("example.org", "x")}, "invalid parent ID: "),
        ({"federates_with": ["UP"]}, "invalid federated trust domain: "),
        ({"expires_at": 2**62}, "an instant is out of range"),
        ({"created_at": -(2**62)}, "an instant is out of range"),
        ({"x509_svid_ttl": -1}, "TTL"),
    ],
    ids=str,
)
def test_sec_95_a_refusal_says_which_part(change: dict[str, Any], why: str) -> None:
    """SEC-95, SPIRE API 5.1: the text names the part that breaks a rule."""
    message = entry_to_wire(an_entry())
    for field, value in change.items():
        message.ClearField(field)
        if isinstance(value, tuple):
            domain, path = value
            getattr(message, field).trust_domain = domain
            getattr(message, field).path = path
        elif isinstance(value, list):
            getattr(message, field).extend(value)
        elif value is not None:
            setattr(message, field, value)
    with pytest.raises(MalformedError, match=why):
        entry_from_wire(message)


def test_an_absent_id_is_asked_for() -> None:
    """SPIRE API 3.7: where an ID is needed and absent, the text is the one that is known."""
    with pytest.raises(MalformedError, match="request must specify SPIFFE ID"):
        optional_id(entry_pb2.Entry(), "spiffe_id")


# Masks.


def test_no_mask_is_everything() -> None:
    """SPIRE API 3.4: no output mask leaves the message as it is."""
    message = entry_to_wire(an_entry(id="e", hint="h"))
    assert masked(message, None, "id") is message


@pytest.mark.parametrize("field", [one.name for one in entry_pb2.EntryMask.DESCRIPTOR.fields])
def test_a_mask_keeps_what_it_names(field: str) -> None:
    """SPIRE API 3.4: a mask keeps its fields and the identifying one, whatever else is set."""
    message = entry_to_wire(
        an_entry(id="e", hint="h", admin=True, downstream=True, dns_names=("a",))
    )
    kept = masked(message, entry_pb2.EntryMask(**{field: True}), "id")
    assert {one.name for one, _ in kept.ListFields()} <= {field, "id"}
    assert kept.id == "e"
    assert getattr(kept, field) == getattr(message, field)
    assert {
        one.name for one, _ in masked(message, entry_pb2.EntryMask(), "id").ListFields()
    } == {"id"}


# Bundles.

JWT_KEYS = st.builds(
    JwtAuthority,
    key_id=st.text(string.ascii_letters, min_size=1, max_size=10),
    public_key=st.sampled_from(
        [spki_of(a_key(kind).public_key()) for kind in ("p256", "p384")]
    ),
    expires_at=st.none() | whole_seconds(),
    tainted=st.booleans(),
)
BUNDLES = st.builds(
    Bundle,
    trust_domain=DOMAINS,
    x509_authorities=st.lists(
        st.sampled_from([CA.authority, OTHER.authority]), unique=True, max_size=2
    ).map(tuple),
    jwt_authorities=st.lists(JWT_KEYS, unique_by=lambda one: one.key_id, max_size=3).map(tuple),
    sequence_number=st.integers(0, ODD),
    refresh_hint=st.none() | st.integers(1, 2_592_000).map(lambda one: timedelta(seconds=one)),
)


@patient
@given(BUNDLES)
def test_bundles_there_and_back(bundle: Bundle) -> None:
    """SPIRE API 4: every field of a bundle survives the wire, as bytes too."""
    message = bundle_to_wire(bundle)
    again = bundle_pb2.Bundle.FromString(message.SerializeToString())
    assert bundle_from_wire(again) == bundle


def test_several_certificates_in_one_field() -> None:
    """SPIRE API 5.4: certificates back to back are several authorities; doubles are one."""
    message = bundle_pb2.Bundle(trust_domain="example.org")
    both = CA.cert.der + OTHER.cert.der
    for der in (both, CA.cert.der):
        message.x509_authorities.append(bundle_pb2.X509Certificate(asn1=der))
    assert [one.der for one in bundle_from_wire(message).x509_authorities] == [
        CA.cert.der,
        OTHER.cert.der,
    ]


CERTIFICATES = st.sampled_from([CA.cert.der, CA.leaf().der, b"", b"\x30\x03\x02\x01\x05"])


@st.composite
def any_bundle(draw: st.DrawFn) -> Any:
    """A message of a bundle with anything in it."""
    message = bundle_pb2.Bundle(
        trust_domain=draw(st.sampled_from(["example.org", "", "EX"]) | TEXTS),
        refresh_hint=draw(st.sampled_from([0, 1, -1]) | NUMBERS),
        sequence_number=draw(st.integers(0, 2**64 - 1)),
    )
    for der in draw(st.lists(CERTIFICATES | st.binary(max_size=20), max_size=2)):
        message.x509_authorities.append(
            bundle_pb2.X509Certificate(asn1=der, tainted=draw(st.booleans()))
        )
    keys = st.sampled_from([spki_of(CA.key.public_key()), b""]) | st.binary(max_size=20)
    for key in draw(st.lists(keys, max_size=2)):
        message.jwt_authorities.append(
            bundle_pb2.JWTKey(
                public_key=key, key_id=draw(TEXTS), expires_at=draw(st.just(0) | NUMBERS)
            )
        )
    return message


@patient
@given(any_bundle())
def test_any_message_is_a_bundle_or_an_error_of_ours(message: Any) -> None:
    """SEC-95: whatever a caller puts into a bundle, it is parsed whole or refused by us."""
    try:
        bundle = bundle_from_wire(message)
    except SpiffeError as error:
        assert isinstance(error, MalformedError)
        return
    assert bundle_from_wire(bundle_to_wire(bundle)) == bundle


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"trust_domain": "EX"}, "trust domain"),
        ({"refresh_hint": -1}, "refresh hint"),
        ({"refresh_hint": 30 * 86400 + 1}, "refresh hint"),
        ({"jwt": 2**60}, "out of range"),
    ],
    ids=str,
)
def test_one_bad_part_refuses_the_bundle(change: dict[str, Any], why: str) -> None:
    """SPIRE API 5.4: a bundle is taken whole or not at all, and the text says why."""
    message = bundle_to_wire(CA.bundle)
    for field, value in change.items():
        if field == "jwt":
            message.jwt_authorities[0].expires_at = value
        else:
            setattr(message, field, value)
    with pytest.raises(MalformedError, match=why):
        bundle_from_wire(message)


# Explanations.


@patient
@given(st.lists(ENTRIES, max_size=3), st.frozensets(SELECTORS, max_size=3))
def test_explanations_carry_what_was_decided(
    entries: list[RegistrationEntry], selectors: frozenset[Selector]
) -> None:
    """A decision's selectors, matches and reason are in the message, and in its text."""
    decision = Decision(
        selectors=selectors, partial={"docker": "did not answer"}, matched=tuple(entries),
        near_misses=(), dropped_hints=(), considered=7,
    )  # fmt: skip
    message = explanation_of(decision)
    assert selectors_from_wire(message.selectors) == selectors
    assert [entry_from_wire(one) for one in message.matched] == entries
    assert [(one.attestor, one.reason) for one in message.partial] == [
        ("docker", "did not answer")
    ]
    assert message.considered == 7
    for one in (*map(str, selectors), *(entry.spiffe_id.uri for entry in entries)):
        assert one in message.text
    assert "could not vouch: docker: did not answer" in message.text
