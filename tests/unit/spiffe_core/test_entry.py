"""Registration entries: every rule of SPIRE API 4 and 5.1 that one entry can break alone."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spiffe_core.entry import EntryError, check_dns_name, check_entry_id
from spiffe_core.selector import Selector, SelectorError
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.store import NOW, TD, an_entry, an_id, node_id, some

SECOND = timedelta(seconds=1)
PARTNER = TrustDomain("partner.test")


def test_a_correct_entry() -> None:
    """The entry that the other tests change is accepted as it is."""
    entry = an_entry()
    assert entry.check_names(TD) is entry
    assert (entry.x509_svid_ttl, entry.expires_at, entry.hint) == (timedelta(0), None, "")
    assert entry.revision_number == 0


@pytest.mark.parametrize(
    "text", ["a", "-", "0f0f-_.Z", "A" * 255, "9f4a8c0e-1111-4222-8333-444455556666"]
)
def test_entry_ids(text: str) -> None:
    """SPIRE API 5.1: an ID is 1 to 255 of - . 0-9 A-Z _ a-z."""
    assert check_entry_id(text) == text
    assert an_entry(id=text).id == text


def test_entry_id_every_byte() -> None:
    """SPIRE API 5.1: of all 256 characters the listed ones are allowed and no other."""
    allowed = set("-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz")
    for number in range(256):
        text = f"a{chr(number)}"
        if chr(number) in allowed:
            assert check_entry_id(text) == text
        else:
            with pytest.raises(EntryError, match="invalid characters"):
                check_entry_id(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing entry ID"),
        ("a" * 256, "entry ID too long"),
        ("a b", "invalid characters"),
        ("a\n", "invalid characters"),
        ("../x", "invalid characters"),
        ("é", "invalid characters"),
    ],
)
def test_what_is_no_entry_id(text: str, reason: str) -> None:
    """SPIRE API 5.1: empty, long and foreign IDs are refused, each for its reason."""
    with pytest.raises(EntryError, match=reason):
        check_entry_id(text)
    if text:
        with pytest.raises(EntryError, match=reason):
            an_entry(id=text)


def test_an_entry_needs_selectors() -> None:
    """SPIRE API 5.1: an entry without selectors, or with more than 64, is refused."""
    with pytest.raises(SelectorError, match="selector list is empty"):
        an_entry(selectors=frozenset())
    many = frozenset(Selector("a", str(number)) for number in range(65))
    with pytest.raises(SelectorError, match="more than 64"):
        an_entry(selectors=many)


@pytest.mark.parametrize("field", ["x509_svid_ttl", "jwt_svid_ttl"])
@pytest.mark.parametrize(
    ("ttl", "reason"),
    [
        (timedelta(0), None),
        (SECOND, None),
        (timedelta(seconds=2**31 - 1), None),
        (-SECOND, "TTL is negative"),
        (timedelta(microseconds=-1), "TTL is negative"),
        (timedelta(seconds=2**31), "whole seconds, at most"),
        (timedelta.max, "whole seconds, at most"),
        (timedelta(seconds=1.5), "whole seconds"),
    ],
)
def test_ttls(field: str, ttl: timedelta, reason: str | None) -> None:
    """SPIRE API 5.1: a TTL is 0 (the server's default) up to what the wire's int32 holds."""
    if reason is None:
        assert getattr(an_entry(**{field: ttl}), field) == ttl
    else:
        with pytest.raises(EntryError, match=reason):
            an_entry(**{field: ttl})


@pytest.mark.parametrize(
    ("hint", "good"),
    [
        ("", True),
        ("internal", True),
        ("a" * 1024, True),
        ("a" * 1025, False),
        ("é" * 512, True),
        ("é" * 512 + "a", False),
        ("\U0001f600" * 256, True),
        ("\U0001f600" * 257, False),
    ],
    ids=lambda value: ascii(value)[:16],
)
def test_wapi_57_hints_are_counted_in_bytes(hint: str, good: bool) -> None:
    """A hint has at most 1024 bytes of UTF-8, however many characters that is."""
    if good:
        assert an_entry(hint=hint).hint == hint
    else:
        with pytest.raises(EntryError, match="hint is too long"):
            an_entry(hint=hint)


def test_a_hint_is_text() -> None:
    """A hint that UTF-8 cannot carry is refused as an entry's fault, not by a codec."""
    with pytest.raises(EntryError, match="not UTF-8"):
        an_entry(hint="\ud800")


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "example.org",
        "a-b.example.org",
        "a--b.example.org",
        "1.2.3.4",
        "*.example.org",
        "*.org",
        "a" * 63 + ".org",
        ".".join(["a" * 61] * 4) + ".abcde",
        "xn--bcher-kva.example",
        "xn--nxasmq6b",
        "xn--11b4c3d",
        "xn--b-cher-3ya",
    ],
    ids=lambda name: name[:20],
)
def test_dns_names(name: str) -> None:
    """SPIRE API 5.1: lower-case labels, one wildcard as the whole first label, A-labels."""
    assert len(name) <= 253
    assert an_entry(dns_names=(name,)).dns_names == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "a.-b",
        "A.example.org",
        "example.Org",
        "a_b",
        "a b",
        "a\n",
        "*",
        "*.",
        "**.a",
        "a.*",
        "a.*.b",
        "*.*.a",
        "a*.b",
        "*a.b",
        "a" * 64,
        "b\u00fccher.example",
        "ex\u00e4mple",
        "\uff41",
        "\u212a",
        "ab--c",
        "xn--",
        "xn--a",
        "xn--a-",
        "xn--abc-",
        "xn--99999999",
        "xn--wca",
        "xn---tda",
        "xn--bcher-kva.XN--A",
        "[::1]",
        "a:80",
        "spiffe://a",
        ".".join(["a" * 61] * 4) + ".abcdef",
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_what_is_no_dns_name(name: str) -> None:
    """SPIRE API 5.1: every other name is refused, before a certificate can carry it."""
    with pytest.raises(EntryError, match="invalid DNS name"):
        an_entry(dns_names=(name,))


@given(st.text(st.characters(codec=None), max_size=12) | st.text("xn-*.abz09", max_size=16))
@example("xn--0")
@example("xn--zzzzzzzzzzzzzzzz")
def test_any_dns_name(name: str) -> None:
    """Any text is a DNS name of plain labels, or our own error."""
    try:
        check_dns_name(name)
    except EntryError:
        return
    labels = name.removeprefix("*.").split(".")
    assert all(label and label.isascii() and label == label.lower() for label in labels)
    assert all(set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for label in labels)


def test_at_most_64_dns_names() -> None:
    """64 DNS names are taken, 65 refused (security requirements, table 1)."""
    names = tuple(f"n{number}.example.org" for number in range(65))
    assert len(an_entry(dns_names=names[:64]).dns_names) == 64
    with pytest.raises(EntryError, match="more than 64 DNS names"):
        an_entry(dns_names=names)


def test_store_svid_wants_one_type() -> None:
    """SPIRE API 5.1: a stored SVID's selectors are all of one type."""
    assert an_entry(store_svid=True, selectors=some("aws:a", "aws:b")).store_svid
    with pytest.raises(EntryError, match="selector types must be the same"):
        an_entry(store_svid=True, selectors=some("aws:a", "gcp:b"))
    assert not an_entry(selectors=some("aws:a", "gcp:b")).store_svid


def test_store_svid_has_no_cache_behaviour() -> None:
    """SPIRE API 5.1: a stored SVID cannot switch prefetching off as well."""
    with pytest.raises(EntryError, match="incompatible with storable SVIDs"):
        an_entry(store_svid=True, disable_x509_svid_prefetch=True)
    assert an_entry(disable_x509_svid_prefetch=True).disable_x509_svid_prefetch


@pytest.mark.parametrize("field", ["expires_at", "created_at"])
def test_instants_have_a_zone(field: str) -> None:
    """An instant without a time zone is refused: comparing it would fail at decision time."""
    with pytest.raises(EntryError, match="time zone"):
        an_entry(**{field: datetime(2026, 3, 1, 12)})  # noqa: DTZ001
    assert getattr(an_entry(**{field: NOW}), field) == NOW


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parent_id": PARTNER.server_id}, "invalid parent ID: .* is not a member of"),
        ({"parent_id": TD.id}, "invalid parent ID: .*; path is empty"),
        ({"spiffe_id": SpiffeId(PARTNER, "/w")}, "invalid spiffe ID: .* is not a workload in"),
        ({"spiffe_id": TD.id}, "invalid spiffe ID: .*; path is empty"),
        ({"spiffe_id": an_id("/spire/x")}, "invalid spiffe ID: .*; path is in the reserved"),
        ({"federates_with": frozenset({TD})}, "invalid federated trust domain"),
    ],
)
def test_names(changes: dict[str, Any], reason: str) -> None:
    """SPIRE API 5.1: parent is a member, SPIFFE ID a workload, federation is with others."""
    with pytest.raises(EntryError, match=reason):
        an_entry(**changes).check_names(TD)


@pytest.mark.parametrize(
    "parent", [node_id("a"), TD.server_id, an_id("/w"), an_id("/spire/agent")], ids=str
)
def test_every_member_may_be_a_parent(parent: SpiffeId) -> None:
    """SPIRE API 5.1: agents, the server, workloads: whoever is a member may be a parent."""
    assert an_entry(parent_id=parent).check_names(TD).parent_id == parent


@pytest.mark.parametrize(
    ("parent", "alias"),
    [
        (TD.server_id, True),
        (node_id("server"), False),
        (an_id("/spire/server/x"), False),
        (an_id("/server"), False),
        (an_id("/spire"), False),
    ],
    ids=str,
)
def test_node_aliases(parent: SpiffeId, alias: bool) -> None:
    """SPIRE API 5.1: an entry is a node alias if its parent is exactly the server."""
    assert an_entry(parent_id=parent).is_node_alias is alias


@pytest.mark.parametrize(
    ("expires_at", "expired"),
    [
        (None, False),
        (NOW + SECOND, False),
        (NOW, True),
        (NOW - SECOND, True),
    ],
)
def test_expiry(expires_at: datetime | None, expired: bool) -> None:
    """SPIRE API 5.1: an entry counts until its end, and not at it."""
    assert an_entry(expires_at=expires_at).is_expired(NOW) is expired


def test_similar_entries_have_one_fingerprint() -> None:
    """SPIRE API 5.1: entries are similar by SPIFFE ID, parent and set of selectors alone."""
    entry = an_entry(selectors=some("unix:uid:1", "unix:gid:2"))
    twin = an_entry(
        selectors=some("unix:gid:2", "unix:uid:1"), id="x", hint="h", x509_svid_ttl=SECOND
    )
    assert entry.fingerprint == twin.fingerprint
    assert len(entry.fingerprint) == 16
    for changes in (
        {"spiffe_id": an_id("/other")},
        {"parent_id": node_id("b")},
        {"selectors": some("unix:uid:1")},
        {"selectors": some("unix:uid:1", "unix:gid:2", "unix:gid:3")},
    ):
        other = an_entry(**{"selectors": some("unix:uid:1", "unix:gid:2"), **changes})
        assert other.fingerprint != entry.fingerprint


def test_sec_03_joined_text_makes_no_similar_entries() -> None:
    """Selectors whose joined texts would be equal have different fingerprints."""
    sets = [
        {Selector("a", "b,a:c")},
        {Selector("a", "b"), Selector("a", "c")},
        {Selector("a", 'b"],["a","c')},
        {Selector("a", "b\na:c")},
        {Selector("a", "b a:c")},
    ]
    prints = {an_entry(selectors=frozenset(one)).fingerprint for one in sets}
    assert len(prints) == len(sets)
