"""Messages of the Workload API: everything that is built is right, or not sent."""

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_der_x509_certificate
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.der import split_certificates
from spiffe_core.entry import MAX_HINT_BYTES, EntryError, RegistrationEntry
from spiffe_core.errors import InternalError
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.pb import workloadapi_pb2 as pb
from tests.support.authorities import NOW, a_key
from tests.support.ca import FakeCa
from tests.support.endpoint import a_held
from tests.support.store import TD, an_entry, some
from workload_api.cache.cache import View, WorkloadCache
from workload_api.endpoint.responses import KEPT, MAX_BYTES, Responses

CA, PARTNER = FakeCa(), FakeCa("partner.test")
MINE = some("unix:uid:1000")
WEB = an_entry(id="web", created_at=NOW)


def a_view(
    *entries: RegistrationEntry, bundles: tuple[Bundle, ...] = (), ca: FakeCa = CA
) -> View:
    """What a process gets that matches *entries*."""
    cache = WorkloadCache(TD)
    entries = entries or (WEB,)
    cache.apply(snapshot=True, entries=entries, bundles=[ca.root.bundle, *bundles])
    for entry in entries:
        cache.svids[entry.id] = a_held(ca, entry)
    return cache.view(MINE, {}, NOW)


def x509(view: View) -> Any:
    """The X.509 response for *view*."""
    return pb.X509SVIDResponse.FromString(Responses(TD).x509_svids(view))


def x509_bundles(view: View) -> dict[str, bytes]:
    """The X.509 bundles for *view*."""
    return dict(pb.X509BundlesResponse.FromString(Responses(TD).x509_bundles(view)).bundles)


def jwt_bundles(view: View) -> dict[str, Any]:
    """The JWT bundles for *view*, read as JSON."""
    message = pb.JWTBundlesResponse.FromString(Responses(TD).jwt_bundles(view))
    return {name: json.loads(keys) for name, keys in message.bundles.items()}


def federated(*names: FakeCa) -> RegistrationEntry:
    """An entry that federates with *names*."""
    return replace(WEB, federates_with=frozenset(one.trust_domain for one in names))


# X.509


def test_an_svid_is_whole() -> None:
    """WAPI-17, WAPI-18, WAPI-19, WAPI-24, IOP-27: DER, PKCS#8, and one name everywhere."""
    message = x509(a_view())
    (svid,) = message.svids
    (leaf,) = split_certificates(svid.x509_svid)
    parsed = X509Svid.from_chain((leaf,))
    assert svid.spiffe_id == parsed.spiffe_id.uri == WEB.spiffe_id.uri
    key = serialization.load_der_private_key(svid.x509_svid_key, None)
    assert (
        key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        == svid.x509_svid_key
    )
    assert spki_of(key.public_key()) == spki_of(load_der_x509_certificate(leaf).public_key())
    assert split_certificates(svid.bundle) == (CA.authority.der,)
    assert not svid.hint and not message.crl and not message.federated_bundles


def test_intermediates_follow_the_leaf() -> None:
    """WAPI-17, IOP-06: leaf first, then the intermediates, and the root is not among them."""
    sub = CA.child()
    view = a_view(ca=sub)
    (svid,) = x509(view).svids
    chain = split_certificates(svid.x509_svid)
    assert chain[1:] == (sub.cert.der,) and CA.cert.der not in chain
    assert verify_x509_svid(chain, view.bundles, at=NOW).spiffe_id == WEB.spiffe_id


def test_one_message_for_each_identity() -> None:
    """WAPI-23, WAPI-25, WAPI-56: one SVID for each entry, hints with them, the oldest first."""
    hints = ["", "internal", "external", ""]
    entries = [
        an_entry(f"/w{n}", id=f"w{n}", created_at=NOW, hint=hint)
        for n, hint in enumerate(hints)
    ]
    message = x509(a_view(*entries[::-1]))
    assert [(one.spiffe_id[-1], one.hint) for one in message.svids] == [
        (str(n), hint) for n, hint in enumerate(hints)
    ]


def test_a_hint_counts_its_bytes() -> None:
    """WAPI-57: a hint of 1024 bytes is carried; one of 1025 bytes is no entry at all."""
    hint = "é" * (MAX_HINT_BYTES // 2)
    assert x509(a_view(replace(WEB, hint=hint))).svids[0].hint == hint
    with pytest.raises(EntryError):
        replace(WEB, hint=hint + "x")


def test_foreign_bundles_have_their_own_place() -> None:
    """WAPI-21, IOP-04: foreign domains alone, keyed by `spiffe://` and the bare name."""
    message = x509(a_view(federated(PARTNER), bundles=(PARTNER.bundle,)))
    assert dict(message.federated_bundles) == {"spiffe://partner.test": PARTNER.authority.der}


@pytest.mark.parametrize("what", [x509, x509_bundles])
def test_a_domain_without_x509_authorities_is_left_out(what: Any) -> None:
    """IOP-08: no empty bytes in a map: py-spiffe would drop the whole message."""
    empty = Bundle(PARTNER.trust_domain, (), PARTNER.bundle.jwt_authorities)
    found = what(a_view(federated(PARTNER), bundles=(empty,)))
    names = found if isinstance(found, dict) else found.federated_bundles
    assert "spiffe://partner.test" not in names


def test_x509_bundles_hold_our_own() -> None:
    """WAPI-29, WAPI-19: our own domain and the foreign ones, DER back to back."""
    second = FakeCa(which="second").authority
    own = replace(CA.bundle, x509_authorities=(CA.authority, second))
    view = a_view(federated(PARTNER), bundles=(own, PARTNER.bundle))
    assert x509_bundles(view) == {
        "spiffe://example.org": CA.authority.der + second.der,
        "spiffe://partner.test": PARTNER.authority.der,
    }


# JWT


def test_a_jwk_set_is_a_plain_one() -> None:
    """WAPI-40, WAPI-41, IOP-01, IOP-02: JWT keys alone, each with `kid`, without `use`."""
    found = jwt_bundles(a_view())
    assert found.keys() == {"spiffe://example.org"}
    (key,) = found["spiffe://example.org"]["keys"]
    assert key.keys() == {"kid", "kty", "crv", "x", "y"} and key["kid"] == "k1"
    assert found["spiffe://example.org"].keys() == {"keys"}


def test_our_own_jwk_set_is_there_without_a_key() -> None:
    """WAPI-39, IOP-18: our domain is present even when it has no key, as an empty list."""
    view = a_view(bundles=(replace(CA.bundle, jwt_authorities=()),))
    assert jwt_bundles(view) == {"spiffe://example.org": {"keys": []}}


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048"])
def test_every_kind_of_key_is_published(kind: str) -> None:
    """IOP-14, SEC-45: public members only, of full length."""
    authority = JwtAuthority("k", spki_of(a_key(kind, "jwt").public_key()))
    found = jwt_bundles(a_view(bundles=(replace(CA.bundle, jwt_authorities=(authority,)),)))
    (key,) = found["spiffe://example.org"]["keys"]
    assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & key.keys()


# What is never sent


def test_no_identity_no_answer() -> None:
    """IOP-09, WAPI-23: an answer without an SVID is not built."""
    view = replace(a_view(), identities=())
    with pytest.raises(InternalError):
        Responses(TD).x509_svids(view)


@pytest.mark.parametrize("build", ["x509_svids", "x509_bundles", "jwt_bundles"])
def test_without_our_own_bundle_no_answer(build: str) -> None:
    """WAPI-29, WAPI-39: without our own bundle nothing is built, and it is no crash."""
    view = a_view()
    with pytest.raises(InternalError):
        getattr(Responses(TD), build)(replace(view, bundles=BundleSet()))


@pytest.mark.parametrize("build", ["x509_svids", "x509_bundles"])
def test_without_our_own_authority_no_answer(build: str) -> None:
    """WAPI-24, WAPI-29: an SVID without the bundle to verify it with is not whole."""
    empty = BundleSet.of([Bundle(TD, (), CA.bundle.jwt_authorities)])
    with pytest.raises(InternalError):
        getattr(Responses(TD), build)(replace(a_view(), bundles=empty))


BROKEN = {
    "no certificate": lambda held: replace(held, chain=(b"x",)),
    "another name": lambda held: replace(held, chain=(CA.leaf("/other").der,)),
    "a CA": lambda held: replace(held, chain=(CA.cert.der,)),
    "something behind it": lambda held: replace(held, chain=(held.chain[0] + b"\0",)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_svid_is_not_sent(broken: str) -> None:
    """WAPI-15, IOP-27: an SVID that is not that of its entry, or none at all, is not sent."""
    view = a_view()
    (one,) = view.identities
    view = replace(view, identities=(replace(one, svid=BROKEN[broken](one.svid)),))
    with pytest.raises(InternalError):
        Responses(TD).x509_svids(view)


def test_two_of_one_hint_are_not_sent() -> None:
    """WAPI-25: should two hints be equal after all, the answer is not sent."""
    view = a_view(WEB, an_entry("/b", id="b", created_at=NOW))
    twins = tuple(replace(one, entry=replace(one.entry, hint="x")) for one in view.identities)
    with pytest.raises(InternalError):
        Responses(TD).x509_svids(replace(view, identities=twins))


def test_iop_25_a_message_stays_below_4_mib() -> None:
    """IOP-25: what a client could not receive is not sent."""
    key_id = "k" * 255
    names = [TrustDomain(f"d{n}.test") for n in range(160)]
    foreign = tuple(
        Bundle(name, (), tuple(
            JwtAuthority(f"{key_id[:-3]}{n:03}", spki_of(a_key("rsa2048").public_key()))
            for n in range(100)
        ))
        for name in names
    )  # fmt: skip
    entry = replace(WEB, federates_with=frozenset(names))
    made = Responses(TD)
    with pytest.raises(InternalError, match="4 MiB"):
        made.jwt_bundles(a_view(entry, bundles=foreign))
    assert len(made.jwt_bundles(a_view(entry, bundles=foreign[:50]))) < MAX_BYTES


# Built once


def test_built_once_for_all_who_get_the_same() -> None:
    """The same identities and bundles are one message, whoever asks and however often."""
    made = Responses(TD)
    view = a_view()
    assert made.x509_svids(view) is made.x509_svids(replace(view))
    assert made.x509_bundles(view) is made.x509_bundles(replace(view, identities=()))
    assert made.x509_svids(view) != made.x509_svids(a_view())  # another serial number


def test_a_bundle_that_is_gone_is_not_mistaken_for_another() -> None:
    """What was built for one bundle is never answered for another that took its place."""
    made = Responses(TD)
    roots = [FakeCa(which=f"root {n}").authority for n in range(5)]
    for number in range(200):
        root = roots[number % 5]  # each bundle is a new object, where an old one may have been
        view = replace(
            a_view(), identities=(), bundles=BundleSet.of([Bundle(TD, (root,), (), number)])
        )
        assert root.der in made.x509_bundles(view)


def test_only_so_many_are_kept() -> None:
    """What nobody asked for lately is built anew; memory stays bounded."""
    made = Responses(TD)
    first = a_view()
    kept = made.x509_svids(first)
    (one,) = first.identities
    for number in range(KEPT + 5):
        svid = replace(one.svid, serial_number=10**6 + number)
        made.x509_svids(replace(first, identities=(replace(one, svid=svid),)))
        if number < KEPT // 2:
            assert made.x509_svids(first) is kept
    assert len(made._made) == KEPT


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(6)))
def test_equal_content_is_equal_bytes(order: list[int]) -> None:
    """WAPI-09: maps are written in one order, so that nothing is sent twice."""
    partners = [FakeCa(f"p{n}.test") for n in range(6)]
    entry = federated(*partners)
    bundles = tuple(partners[n].bundle for n in order)
    view = a_view(entry, bundles=bundles)
    shuffled = replace(view, bundles=BundleSet.of([view.bundles[TD], *bundles]))
    for build in ("x509_svids", "x509_bundles", "jwt_bundles"):
        assert getattr(Responses(TD), build)(view) == getattr(Responses(TD), build)(shuffled)
