"""Bundles, and sets of them, never apart from their names."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from spiffe_core.bundle import (
    DEFAULT_REFRESH_HINT,
    MAX_AUTHORITIES,
    Bundle,
    BundleError,
    BundleSet,
)
from spiffe_core.der import split_certificates
from spiffe_core.spiffeid import TrustDomain
from tests.support.authorities import a_jwt_authority, an_x509_authority
from tests.support.store import TD

PARTNER = TrustDomain("partner.test")


def a_bundle(trust_domain: TrustDomain = TD, **changes: Any) -> Bundle:
    """A correct bundle with one authority of each type."""
    made = Bundle(trust_domain, (an_x509_authority(),), (a_jwt_authority(),), 7)
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("number", "good"), [(0, True), (2**64 - 1, True), (2**64, False), (-1, False)]
)
def test_sequence_numbers_are_64_bits(number: int, good: bool) -> None:
    """BUNDLE-09: a sequence number is 0 to 2**64 - 1."""
    if good:
        assert a_bundle(sequence_number=number).sequence_number == number
    else:
        with pytest.raises(BundleError, match="64 bits"):
            a_bundle(sequence_number=number)


def test_at_most_100_authorities() -> None:
    """100 authorities of both types together are taken, 101 refused (table 1)."""
    x509 = an_x509_authority()
    jwt = a_jwt_authority()
    jwts = tuple(replace(jwt, key_id=f"k{number}") for number in range(99))
    assert MAX_AUTHORITIES == 100
    assert a_bundle(x509_authorities=(x509,), jwt_authorities=jwts)
    with pytest.raises(BundleError, match="more than 100 authorities"):
        a_bundle(x509_authorities=(x509, x509), jwt_authorities=jwts)


def test_sec_45_a_key_id_names_one_key() -> None:
    """Two JWT authorities with one key ID, of one key or of two, are refused."""
    for which in ("jwt", "other"):
        with pytest.raises(BundleError, match="share a key ID"):
            a_bundle(jwt_authorities=(a_jwt_authority(), a_jwt_authority(which=which)))


def test_a_key_id_is_looked_up_exactly() -> None:
    """The authority for a key ID is that with the same text, in the same case, or none."""
    bundle = a_bundle(jwt_authorities=(a_jwt_authority("kid"), a_jwt_authority("KID")))
    assert bundle.jwt_authority("kid") == a_jwt_authority("kid")
    assert bundle.jwt_authority("KID") == a_jwt_authority("KID")
    for key_id in ("Kid", "ki", "kid ", ""):
        assert bundle.jwt_authority(key_id) is None


def test_wapi_19_certificates_back_to_back() -> None:
    """The Workload API's form is the DER of every authority, concatenated, in order."""
    some = (an_x509_authority(which="a"), an_x509_authority(which="b"))
    bundle = a_bundle(x509_authorities=some)
    assert split_certificates(bundle.x509_der()) == tuple(one.der for one in some)
    assert a_bundle(x509_authorities=()).x509_der() == b""


@pytest.mark.parametrize(
    "changes",
    [
        {"x509_authorities": ()},
        {"jwt_authorities": ()},
        {"refresh_hint": timedelta(seconds=60)},
        {"x509_authorities": (replace(an_x509_authority(), tainted=True),)},
        {"trust_domain": PARTNER},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_content(changes: dict[str, Any]) -> None:
    """Every change but that of the sequence number makes the content another."""
    bundle = a_bundle()
    assert bundle.same_content(replace(bundle, sequence_number=99))
    assert not bundle.same_content(replace(bundle, **changes))


def test_bundle_28_default_hint() -> None:
    """Without a hint five minutes are assumed."""
    assert timedelta(minutes=5) == DEFAULT_REFRESH_HINT


def test_sec_11_a_set_keeps_bundles_under_their_own_names() -> None:
    """BUNDLE-01: a bundle under another trust domain's name is refused."""
    bundles = BundleSet.of([a_bundle(), a_bundle(PARTNER)])
    assert set(bundles) == {TD, PARTNER}
    assert bundles[PARTNER].trust_domain == PARTNER
    with pytest.raises(BundleError, match="another trust domain's name"):
        BundleSet({TD: a_bundle(PARTNER)})


def test_a_bundle_begins_with_nothing() -> None:
    """BUNDLE-16: a bundle of nothing trusts nothing, and has the sequence number 0."""
    empty = Bundle(TD)
    assert (empty.x509_authorities, empty.jwt_authorities) == ((), ())
    assert (empty.sequence_number, empty.refresh_hint) == (0, None)


def test_a_set_is_a_mapping() -> None:
    """A set has its members, no others, and the last bundle of a trust domain."""
    newer = a_bundle(sequence_number=8)
    bundles = BundleSet.of([a_bundle(), newer])
    assert (len(bundles), bundles[TD], TD in bundles) == (1, newer, True)
    assert bundles.get(PARTNER) is None
    assert BundleSet.of([newer]) == bundles
    with pytest.raises(KeyError):
        bundles[TrustDomain("example.org.")]
    assert len(BundleSet()) == 0
