"""
x509-limbo: where our path building differs from RFC 5280, and why.

The suite's leaves carry DNS names and no SPIFFE ID, so a case is run through the two halves
of `verify_x509_svid` one after the other: the path, then the leaf's profile.
"""

import time
from datetime import datetime
from typing import Any

import pytest

from spiffe_core.authority import X509Authority
from spiffe_core.errors import MalformedError
from spiffe_core.pem import certificates_from_pem
from spiffe_core.x509path import MAX_INTERMEDIATES, X509SvidError, build_path, parse_chain
from spiffe_core.x509svid import X509Svid
from tests.support.authorities import NOW
from tests.support.vectors import limbo

# CRLs are not evaluated (the Workload API's `crl` field is always empty), and the other two
# groups are about the DNS names of a web server's certificate.
LEFT_OUT = ("crl::", "webpki::san::", "webpki::cn::")
CASES = {id_: case for id_, case in limbo().items() if not id_.startswith(LEFT_OUT)}

pytestmark = [
    pytest.mark.skipif(not CASES, reason="VECTORS names no folder with x509-limbo"),
    # The library warns of certificates that it will not read in some later release.
    pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning"),
]

STRICTER = {
    "cve::cve-2024-0567": "SEC-14: a chain has at most five certificates",
    "pathlen::self-issued-certs-pathlen": "the library counts a self-issued certificate",
    "pathlen::max-chain-depth-1-self-issued": "the library counts a self-issued certificate",
    "rfc5280::nc::permitted-dn-match": "the library evaluates no constraint on directory names",
    "rfc5280::validity::notafter-fractional": "SEC-16: no grace, of part of a second neither",
    "webpki::nc::permitted-dns-match-noncritical": "X509-45: name constraints are critical; the"
    " case's twin rfc5280::nc::permitted-dns-match-noncritical agrees",
}
"""The suite accepts, we refuse."""

BY_PROFILE = {
    "rfc5280::eku::ee-wrong-eku": "extended key usage",
    "rfc5280::nc::not-allowed-in-ee-noncritical": "name constraints",
    "rfc5280::nc::not-allowed-in-ee-critical": "unknown critical extension",
    # Its extended key usage is reason enough; test_x509_svid has the empty subject alone.
    "rfc5280::san::noncritical-with-empty-subject": "extended key usage",
    "rfc5280::leaf-ku-keycertsign": "keyCertSign",
    "rfc5280::ee-critical-aia-invalid": "unknown critical extension",
    "rfc5280::ca-as-leaf-wrong-san": "cA TRUE",
    "webpki::eku::ee-anyeku": "extended key usage",
    # A critical one with both purposes would be good: X509-27 allows it.
    "webpki::eku::ee-critical-eku": "extended key usage",
    "webpki::ee-basicconstraints-ca": "cA TRUE",
    "webpki::ca-as-leaf": "cA TRUE",
}
"""There is a path; the leaf's profile is what refuses, with these words."""

BY_NAME = {
    "rfc5280::san::underscore-dns": "the fault is a DNS name with an underscore",
    "rfc5280::san::ip-in-dns": "the fault is an IP address written as a DNS name",
}
"""Only a DNS name is at fault, which nothing of ours reads in an X509-SVID."""

OTHER_PROFILE = {
    "webpki::eku::ee-without-eku": "C-14 demands none, as rfc5280::eku::ee-without-eku says",
}
"""The suite contradicts itself between two profiles, and ours is the other one."""


def refusal(case: dict[str, Any]) -> str:
    """Why there is no path; empty when there is one."""
    at = datetime.fromisoformat(case["validation_time"]) if case["validation_time"] else NOW
    depth = case["max_chain_depth"]
    try:
        return _refusal(case, at, MAX_INTERMEDIATES if depth is None else depth)
    except X509SvidError as error:
        return str(error)


def _refusal(case: dict[str, Any], at: datetime, depth: int) -> str:
    authorities = []
    for pem in case["trusted_certs"]:
        try:
            authorities += [X509Authority.parse(one) for one in certificates_from_pem(pem)]
        except MalformedError:
            continue  # no such anchor in a bundle of ours (SEC-12)
    certificates = parse_chain(chain_of(case))
    build_path(
        certificates, authorities, at=at, max_intermediates=min(depth, MAX_INTERMEDIATES)
    )
    return ""


def chain_of(case: dict[str, Any]) -> list[bytes]:
    """The DER that a peer would send."""
    pems = [case["peer_certificate"], *case["untrusted_intermediates"]]
    return [certificates_from_pem(pem)[0] for pem in pems]


def test_the_suite_is_whole() -> None:
    """SEC-13: all 158 cases are here, and every difference listed is still one of them."""
    assert len(CASES) == 158
    listed = [*STRICTER, *BY_PROFILE, *BY_NAME, *OTHER_PROFILE]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(CASES)


@pytest.mark.parametrize("id_", CASES)
def test_sec_13_agreement(id_: str) -> None:
    """SEC-13, X509-30, X509-18: each case agrees, or differs in the way that is listed."""
    case = CASES[id_]
    found = refusal(case)

    if id_ in STRICTER:
        assert (case["expected_result"], bool(found)) == ("SUCCESS", True), STRICTER[id_]
    elif id_ in BY_PROFILE:
        assert (case["expected_result"], found) == ("FAILURE", "")
        with pytest.raises(X509SvidError, match=BY_PROFILE[id_]):
            X509Svid.from_chain(chain_of(case))
    elif id_ in BY_NAME or id_ in OTHER_PROFILE:
        assert (case["expected_result"], found) == ("FAILURE", "")
    else:
        assert bool(found) == (case["expected_result"] == "FAILURE"), found


@pytest.mark.parametrize("id_", [one for one in CASES if "::forbidden-" in one])
def test_sec_15_forbidden_keys(id_: str) -> None:
    """SEC-15: weak RSA, RSA of odd sizes, DSA and P-192 are refused, in roots and in leaves."""
    assert refusal(CASES[id_])


@pytest.mark.parametrize(
    "id_", [one for one in CASES if "denial-of-service" in CASES[one]["features"]]
)
def test_sec_14_denial_of_service(id_: str) -> None:
    """SEC-14: a chain made to take long is refused within 250 ms of processor time."""
    began = time.process_time()
    assert refusal(CASES[id_])
    assert time.process_time() - began < 0.25


@pytest.mark.parametrize(
    ("id_", "good"),
    [
        ("rfc5280::validity::notbefore-exact", True),
        ("rfc5280::validity::notafter-exact", True),
        ("rfc5280::validity::notbefore-fractional", False),
        ("rfc5280::validity::expired-1-second", False),
        ("rfc5280::validity::not-yet-valid-1-second", False),
        ("rfc5280::validity::expired-root", False),
        ("rfc5280::validity::expired-intermediate", False),
        ("rfc5280::validity::expired-leaf", False),
    ],
)
def test_sec_16_validity(id_: str, good: bool) -> None:
    """SEC-16: the suite's validity cases agree to the second."""
    assert (refusal(CASES[id_]) == "") == good
