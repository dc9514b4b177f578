"""From what a process gets, and the names it asks for, to Envoy's secrets."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2
from tests.support.authorities import NOW
from tests.support.ca import FakeCa
from tests.support.endpoint import a_held
from tests.support.sds import Secrets
from tests.support.store import TD, an_entry, some
from workload_api.cache.cache import View, WorkloadCache
from workload_api.endpoint.responses import KEPT
from workload_api.sds.request import Node
from workload_api.sds.resources import Answers, Found, Roots, Terms, find

CA, PARTNER, OTHER = FakeCa(), FakeCa("partner.test"), FakeCa("other.test")
WEB = an_entry(
    id="web",
    created_at=NOW,
    federates_with=frozenset({PARTNER.trust_domain, OTHER.trust_domain}),
)
API = an_entry("/api", id="api", created_at=NOW + timedelta(seconds=1))
STRANGER = an_entry("/stranger", id="stranger", selectors=some("unix:uid:4242"))
WEB_ID, API_ID = WEB.spiffe_id.uri, API.spiffe_id.uri
TERMS = Terms()
ROOTS = {"example.org": (CA.authority.der,)}
ALL_ROOTS = {
    **ROOTS,
    "partner.test": (PARTNER.authority.der,),
    "other.test": (OTHER.authority.der,),
}


def a_view(
    *entries: RegistrationEntry,
    unsigned: tuple[RegistrationEntry, ...] = (),
    bundles: tuple[Bundle, ...] = (CA.bundle, PARTNER.bundle, OTHER.bundle),
) -> View:
    """What a process gets that matches *entries*, all signed but *unsigned*."""
    cache = WorkloadCache(TD)
    entries = entries or (WEB, API)
    cache.apply(snapshot=True, entries=(*entries, STRANGER), bundles=bundles)
    for entry in (*entries, STRANGER):
        if entry not in unsigned:
            cache.svids[entry.id] = a_held(CA, entry)
    return cache.view(some("unix:uid:1000"), {}, NOW)


VIEW = a_view()


def found(
    *names: str, view: View = VIEW, terms: Terms = TERMS, is_plain: bool = False
) -> Found:
    """What *names* stand for."""
    return find(view, TD, tuple(sorted(names)), terms, is_plain=is_plain)


def secrets(*names: str, **given: Any) -> Secrets:
    """The answer to *names*, read back; it must be whole."""
    got = found(*names, **given)
    assert got.is_whole
    answer = Answers().of(got)
    message = discovery_pb2.DiscoveryResponse.FromString(answer.with_nonce("n1"))
    assert message.version_info == answer.version
    assert message.nonce == "n1"
    return Secrets(message)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [("default", WEB_ID), (WEB_ID, WEB_ID), (API_ID, API_ID)],
    ids=["default", "first", "second"],
)
def test_sds_04_certificates(name: str, expected: str) -> None:
    """SDS-04: default is the first SVID; a SPIFFE ID is that one; each under the name asked."""
    answer = secrets(name)
    assert answer.names == {name}
    assert answer.svid(name).spiffe_id.uri == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ROOTCA", ROOTS),
        ("spiffe://example.org", ROOTS),
        ("spiffe://partner.test", {"partner.test": (PARTNER.authority.der,)}),
        ("ALL", ALL_ROOTS),
    ],
    ids=["ROOTCA", "own", "federated", "ALL"],
)
def test_sds_04_sds_06_roots(name: str, expected: dict[str, Any]) -> None:
    """SDS-04, SDS-06, SEC-11, FED-43: one store for each trust domain, under its bare name."""
    answer = secrets(name)
    assert answer.names == {name}
    assert answer.roots(name) == expected


def test_sds_04_several_names_at_once() -> None:
    """SDS-04: whatever is asked for together is answered together, one secret a name."""
    answer = secrets("default", WEB_ID, "ROOTCA", "ALL", "spiffe://example.org")
    assert answer.names == {"default", WEB_ID, "ROOTCA", "ALL", "spiffe://example.org"}
    assert answer.svid("default") == answer.svid(WEB_ID)


def test_sds_04_no_names() -> None:
    """SDS-04: no names are everything, each once, under the ID it has."""
    answer = secrets()
    domains = {f"spiffe://{name}" for name in ALL_ROOTS}
    assert answer.names == {WEB_ID, API_ID, *domains}
    assert answer.roots("spiffe://other.test") == {"other.test": (OTHER.authority.der,)}


def test_two_entries_with_one_id() -> None:
    """WAPI-56: of two entries with the same ID the older one's SVID is given, once."""
    twin = replace(WEB, id="twin", created_at=NOW + timedelta(seconds=9))
    view = a_view(WEB, twin)
    first = view.identities[0].svid.serial_number
    assert secrets(WEB_ID, view=view).svid(WEB_ID).serial_number == first
    assert secrets(view=view).svid(WEB_ID).serial_number == first


def test_sds_04_the_names_are_settings() -> None:
    """SDS-04: all three names can be others, and then the usual ones mean nothing."""
    terms = Terms("mine", "roots", "every")
    assert secrets("mine", "roots", "every", terms=terms).roots("every") == ALL_ROOTS
    assert found("ALL", "ROOTCA", "default", terms=terms).unknown == (
        "ALL", "ROOTCA", "default",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        STRANGER.spiffe_id.uri,
        "spiffe://example.org/nobody",
        "spiffe://partner.test/web",
        "spiffe://unknown.test",
        "spiffe://example.org/",
        "spiffe://EXAMPLE.org",
        "Default",
        "rootca",
        "spiffe://",
        "web",
    ],
)
def test_sec_85_names_that_are_not_the_callers(name: str) -> None:
    """SDS-07, SEC-85: another's, nobody's and nonsense are the same, and spoil the answer."""
    assert found(name) == Found(unknown=(name,))
    assert not found(name).is_possible
    assert not found(name, "default").is_whole


def test_sds_07_no_identity_no_roots() -> None:
    """SDS-07: who matches no entry gets nothing, roots neither."""
    view = VIEW.__class__(
        replace(VIEW.decision, matched=()), VIEW.identities, VIEW.missing, VIEW.bundles
    )
    assert found("ROOTCA", view=view) == Found(unknown=("ROOTCA",))
    assert not found(view=view).is_possible


# What is on its way


def test_sds_10_what_is_being_signed() -> None:
    """SDS-10: an entry without its SVID is on its way, by its ID and as the default."""
    view = a_view(WEB, unsigned=(WEB,))
    assert found("default", WEB_ID, view=view).pending == ("default", WEB_ID)
    assert found("default", view=view).is_possible
    assert found(view=view).pending == (WEB_ID,)
    assert secrets("ROOTCA", view=view).roots("ROOTCA") == ROOTS


def test_the_first_is_waited_for() -> None:
    """The default is the first entry's; it is known when another one would take its place."""
    early = found("default", view=a_view(WEB, API, unsigned=(WEB,)))
    assert (early.is_whole, early.is_early) == (True, True)
    assert not found("default", view=a_view(WEB, API, unsigned=(API,))).is_early
    assert not found(API_ID, view=a_view(WEB, API, unsigned=(WEB,))).is_early
    assert found(view=a_view(WEB, API, unsigned=(API,))).is_early


@pytest.mark.parametrize("name", ["ROOTCA", "ALL", "spiffe://example.org"])
def test_roots_that_are_not_there(name: str) -> None:
    """Envoy refuses an empty store: without certificates of our own there is no answer."""
    empty = replace(CA.bundle, x509_authorities=())
    assert found(name, view=a_view(bundles=(PARTNER.bundle,))).unknown == (name,)
    assert found(name, view=a_view(bundles=(empty, PARTNER.bundle))).unknown == (name,)


def test_a_federated_domain_without_roots() -> None:
    """A partner without certificates is left out of ALL, and cannot be asked for."""
    empty = replace(PARTNER.bundle, x509_authorities=())
    view = a_view(bundles=(CA.bundle, empty, OTHER.bundle))
    assert set(secrets("ALL", view=view).roots("ALL")) == {"example.org", "other.test"}
    assert found("spiffe://partner.test", view=view).unknown


# Plain roots


@pytest.mark.parametrize("name", ["ROOTCA", "spiffe://example.org"])
def test_sds_06_plain_roots(name: str) -> None:
    """SDS-06: a plain trusted_ca, where it is asked for, is one trust domain's."""
    assert secrets(name, is_plain=True).plain(name) == (CA.authority.der,)


def test_sds_06_everything_in_plain_roots() -> None:
    """SDS-06, FED-43: everything, with plain roots, is one secret for each trust domain."""
    answer = secrets(is_plain=True)
    for ca in (CA, PARTNER, OTHER):
        assert answer.plain(ca.trust_domain.id.uri) == (ca.authority.der,)


def test_sds_06_all_in_a_plain_store_is_refused() -> None:
    """SDS-06, SEC-11, FED-43: every domain in one store is refused, whoever asks for it."""
    for names in (("ALL",), ("ALL", "default")):
        with pytest.raises(MalformedError, match="FED-43"):
            TERMS.check(names, is_plain=True)
        TERMS.check(names, is_plain=False)
    with pytest.raises(InternalError, match="FED-43"):
        Answers().of(Found((Roots("ALL", (CA.bundle, PARTNER.bundle), is_plain=True),)))


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("is_old", [True, False])
def test_sds_06_who_gets_plain_roots(setting: bool, says: bool | None, is_old: bool) -> None:
    """SDS-06: an Envoy before 1.18; else what its metadata say; else the setting."""
    plain = Terms(is_plain=setting).plain_for(Node(is_old, says))
    assert plain is (is_old or (setting if says is None else says))


# Content


def test_sds_08_a_version_is_made_of_content() -> None:
    """SDS-08: each change has a version of its own; the same content has the same anywhere."""
    next_root = replace(
        CA.bundle, x509_authorities=(CA.authority, FakeCa(which="next").authority)
    )
    renewed = replace(VIEW, identities=(a_view().identities[0], VIEW.identities[1]))
    versions = {
        Answers().of(one).version
        for one in (
            found("default"),
            found(WEB_ID),
            found("default", view=renewed),
            found("ROOTCA"),
            found("ROOTCA", is_plain=True),
            found("ROOTCA", view=a_view(bundles=(next_root,))),
            found("ALL"),
            found(),
        )
    }
    assert len(versions) == 8
    assert Answers().of(found("ROOTCA", "ALL")).version == secrets("ALL", "ROOTCA").version


def test_a_version_tells_nothing_of_the_key() -> None:
    """SEC-90: a version, which an Envoy's admin page shows, is made without the key."""
    (first, _) = VIEW.identities
    other = replace(first.svid, key=a_held(CA, API).key[::-1])
    view = replace(VIEW, identities=(replace(first, svid=other), *VIEW.identities[1:]))
    answers = [Answers().of(found("default", view=one)) for one in (VIEW, view)]
    assert answers[0].version == answers[1].version
    assert answers[0].body != answers[1].body
    assert first.svid.key not in repr(answers[0]).encode()


def test_what_is_the_same_is_made_once() -> None:
    """All streams that ask the same get the same bytes, be the view another."""
    answers = Answers()
    first = answers.of(found("default", "ROOTCA"))
    again = replace(VIEW, identities=tuple(VIEW.identities))
    assert answers.of(found("ROOTCA", "default", view=again)) is first
    assert answers.of(found("default")) is not first
    assert len(answers) == 2


def test_only_so_many_are_kept() -> None:
    """SEC-80: what nobody asked for lately is made anew; memory stays bounded."""
    answers = Answers()
    (first, _) = VIEW.identities
    for number in range(KEPT + 5):
        svid = replace(first.svid, serial_number=number)
        answers.of(
            found("default", view=replace(VIEW, identities=(replace(first, svid=svid),)))
        )
    assert len(answers) == KEPT


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"chain": (b"0\x00",)}, "break a rule"), ({"chain": a_held(CA, API).chain}, "its entry")],
    ids=["no certificate", "another's"],
)
def test_what_would_break_a_rule_is_not_made(changes: dict[str, Any], message: str) -> None:
    """IOP-26: what is in the cache and is no SVID of its entry is not sent."""
    (first, _) = VIEW.identities
    wrong = replace(first, svid=replace(first.svid, **changes))
    with pytest.raises(InternalError, match=message):
        Answers().of(found("default", view=replace(VIEW, identities=(wrong,))))


def test_too_long_an_answer_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """IOP-25: an answer that a client cannot take is not sent."""
    monkeypatch.setattr("workload_api.endpoint.responses.MAX_BYTES", 1000)
    with pytest.raises(InternalError, match="4 MiB"):
        Answers().of(found("ALL"))


def test_our_own_domain_is_told_by_its_name() -> None:
    """ROOTCA is the agent's own trust domain, not the first of the view."""
    got = find(VIEW, TrustDomain("partner.test"), ("ROOTCA",), TERMS, is_plain=False)
    assert [one.trust_domain.name for one in got.secrets[0].bundles] == ["partner.test"]
