"""
The SPIFFE bundle document, its JWK Sets and the bundle map: written, read, refused.

One file a standard, in the order of its clauses: hence over 500 lines.
"""

import base64
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import KeySet

from spiffe_core import bundle_document
from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle, BundleError, BundleSet
from spiffe_core.bundle_document import (
    MAX_HINT_SECONDS,
    SkippedKey,
    bundle_from_document,
    bundle_from_jwks,
    bundle_map_from_document,
    bundle_map_to_document,
    bundle_to_document,
    jwks_of,
    read_document,
)
from spiffe_core.jwk import members_of
from spiffe_core.jwtsvid import JwtSvidError, verify_jwt_svid
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.strictjson import b64url_encode
from spiffe_core.x509svid import X509SvidError, verify_x509_svid
from tests.support.authorities import (
    NOW,
    a_ca,
    a_jwt_authority,
    a_key,
    a_leaf,
    an_x509_authority,
    key_usage,
)
from tests.support.store import TD

PARTNER = TrustDomain("partner.test")
X509_KINDS = ["p256", "p384", "p521", "rsa2048", "ed25519"]
JWT_KINDS = ["p256", "p384", "p521", "rsa2048"]


def a_bundle(**changes: Any) -> Bundle:
    """A correct bundle: two X.509 authorities and two JWT authorities."""
    made = Bundle(
        TD,
        (an_x509_authority(which="a"), an_x509_authority("rsa2048")),
        (a_jwt_authority("k1"), a_jwt_authority("k2", "p384")),
        7,
        timedelta(seconds=300),
    )
    return replace(made, **changes)


EVERY_KIND = a_bundle(
    x509_authorities=tuple(an_x509_authority(kind) for kind in X509_KINDS),
    jwt_authorities=tuple(a_jwt_authority(f"k-{kind}", kind) for kind in JWT_KINDS),
)


def written(bundle: Bundle = EVERY_KIND) -> dict[str, Any]:
    """The document of *bundle*, as any JSON reader sees it."""
    document: dict[str, Any] = json.loads(bundle_to_document(bundle))
    return document


def keys_for(use: str, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of *document* with this use."""
    return [entry for entry in document["keys"] if entry["use"] == use]


# --- what we write ---


def test_bundle_05_a_json_object_in_utf_8() -> None:
    """BUNDLE-07, BUNDLE-13, IOP-19: an object with sequence, hint and keys, and no more."""
    document = written()
    assert list(document) == ["spiffe_sequence", "keys", "spiffe_refresh_hint"]
    assert isinstance(document["keys"], list)
    assert bundle_to_document(EVERY_KIND).decode("utf-8")


def test_bundle_09_the_sequence_is_a_bare_64_bit_integer() -> None:
    """IOP-19: the largest sequence number is written and read exactly."""
    largest = a_bundle(sequence_number=2**64 - 1)
    text = bundle_to_document(largest)
    assert b'"spiffe_sequence":18446744073709551615,' in text
    assert bundle_from_document(TD, text).sequence_number == 18446744073709551615


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (timedelta(seconds=300), b'"spiffe_refresh_hint":300'),
        (timedelta(days=30), b'"spiffe_refresh_hint":2592000'),
        (timedelta(0), b'"spiffe_refresh_hint":0'),
        (timedelta(seconds=1.9), b'"spiffe_refresh_hint":1'),
    ],
)
def test_bundle_11_the_hint_is_whole_seconds(hint: timedelta, text: bytes) -> None:
    """IOP-19: a refresh hint is an integer without a fraction; none is left out."""
    document = bundle_to_document(a_bundle(refresh_hint=hint))
    assert text in document
    assert type(json.loads(document)["spiffe_refresh_hint"]) is int
    assert b"refresh" not in bundle_to_document(a_bundle(refresh_hint=None))


def test_bundle_15_no_key_is_an_empty_array() -> None:
    """IOP-18: a bundle without authorities is written with "keys":[], never null."""
    empty = a_bundle(x509_authorities=(), jwt_authorities=())
    assert b'"keys":[]' in bundle_to_document(empty)
    assert jwks_of(empty) == b'{"keys":[]}'


def test_bundle_17_one_entry_for_each_authority() -> None:
    """X509-36, BUNDLE-20, IOP-17: one entry an authority, of its use, and none of another."""
    document = written()
    assert len(keys_for("x509-svid", document)) == len(X509_KINDS)
    assert len(keys_for("jwt-svid", document)) == len(JWT_KINDS)
    assert {entry["use"] for entry in document["keys"]} == {"x509-svid", "jwt-svid"}


MEMBERS = {
    "EC": {"kty", "crv", "x", "y"},
    "RSA": {"kty", "n", "e"},
    "OKP": {"kty", "crv", "x"},
}


def test_bundle_18_no_member_too_many_and_none_too_few() -> None:
    """X509-37, X509-38, JWT-25, JWT-26, BUNDLE-19: each entry has its members and no other."""
    for entry in written()["keys"]:
        own = {"use", "x5c"} if entry["use"] == "x509-svid" else {"use", "kid"}
        assert set(entry) == own | MEMBERS[entry["kty"]]
    assert [entry["kid"] for entry in keys_for("jwt-svid", written())] == [
        f"k-{kind}" for kind in JWT_KINDS
    ]


def test_x509_39_x5c_is_one_certificate_in_padded_base64() -> None:
    """IOP-16: x5c has one element, standard base64 of the DER, and no line breaks."""
    for entry, authority in zip(
        keys_for("x509-svid", written()), EVERY_KIND.x509_authorities, strict=True
    ):
        (text,) = entry["x5c"]
        assert text == base64.b64encode(authority.der).decode()
        assert x509.load_der_x509_certificate(base64.b64decode(text, validate=True))


def test_x509_41_the_members_are_the_certificates_key() -> None:
    """X509-41: kty and its members say the same key as the certificate, for every kind."""
    for entry in keys_for("x509-svid", written()):
        certificate = x509.load_der_x509_certificate(base64.b64decode(entry["x5c"][0]))
        plain = {name: entry[name] for name in MEMBERS[entry["kty"]]}
        other = jwt.PyJWK.from_dict({**plain, "alg": ALGORITHM_OF[plain.get("crv", "RSA")]}).key
        assert spki_of(other) == spki_of(certificate.public_key())


ALGORITHM_OF = {
    "P-256": "ES256",
    "P-384": "ES384",
    "P-521": "ES512",
    "Ed25519": "EdDSA",
    "RSA": "RS256",
}
PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")


def everything_in(value: Any) -> list[str]:
    """Every member name in a JSON value, however deep."""
    if isinstance(value, dict):
        return [*value, *(name for inner in value.values() for name in everything_in(inner))]
    if isinstance(value, list):
        return [name for inner in value for name in everything_in(inner)]
    return []


def test_jwt_24_nothing_private_is_written() -> None:
    """SEC-45: no document, JWK Set or map holds a private member, for any kind of key."""
    bundles = BundleSet.of([EVERY_KIND])
    for text in (
        bundle_to_document(EVERY_KIND),
        jwks_of(EVERY_KIND),
        bundle_map_to_document(bundles),
    ):
        assert not set(PRIVATE) & set(everything_in(json.loads(text)))


def test_iop_02_the_jwk_sets_of_the_workload_api() -> None:
    """IOP-01, WAPI-40, WAPI-41: JWT keys alone, each with kid and without use or spiffe_…."""
    document = json.loads(jwks_of(EVERY_KIND))
    assert list(document) == ["keys"]
    assert [entry["kid"] for entry in document["keys"]] == [f"k-{kind}" for kind in JWT_KINDS]
    for entry in document["keys"]:
        assert set(entry) == {"kid"} | MEMBERS[entry["kty"]]


def test_other_libraries_read_our_jwk_sets() -> None:
    """IOP-14: joserfc and PyJWT find every JWT key in our JWK Set and document, unchanged."""
    for text in (jwks_of(EVERY_KIND), bundle_to_document(EVERY_KIND)):
        whole = json.loads(text)
        whole["keys"] = [entry for entry in whole["keys"] if "kid" in entry]
        theirs = KeySet.import_key_set(json.loads(jwks_of(EVERY_KIND)))
        pyjwt = jwt.PyJWKSet.from_dict({"keys": [
            {**entry, "use": "sig", "alg": ALGORITHM_OF[entry.get("crv", "RSA")]}
            for entry in whole["keys"]
        ]})  # fmt: skip
        for authority in EVERY_KIND.jwt_authorities:
            assert (
                spki_of(theirs.get_by_kid(authority.key_id).public_key) == authority.public_key
            )
            assert spki_of(pyjwt[authority.key_id].key) == authority.public_key


PY_SPIFFE = """
import sys, hashlib
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import TrustDomain
from spiffe.bundle.jwt_bundle.jwt_bundle import JwtBundle
from spiffe.bundle.x509_bundle.x509_bundle import X509Bundle
td = TrustDomain("example.org")
jwks, x509 = [bytes.fromhex(line) for line in sys.stdin.read().split()]
for kid, key in sorted(JwtBundle.parse(td, jwks).jwt_authorities.items()):
    print(kid, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex())
print(len(X509Bundle.parse_raw(td, x509).x509_authorities))
"""


def test_py_spiffe_reads_our_bundles() -> None:
    """IOP-01, WAPI-19: py-spiffe, in its own process, finds every key of ours."""
    ran = subprocess.run(
        [sys.executable, "-c", PY_SPIFFE],
        input=f"{jwks_of(EVERY_KIND).hex()}\n{EVERY_KIND.x509_der().hex()}",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 0, ran.stderr
    expected = [f"{one.key_id} {one.public_key.hex()}" for one in EVERY_KIND.jwt_authorities]
    assert ran.stdout.splitlines() == [*sorted(expected), str(len(X509_KINDS))]


def test_what_we_write_we_read() -> None:
    """A bundle with every kind of key reads back equal, and nothing of it is skipped."""
    reading = read_document(TD, bundle_to_document(EVERY_KIND))
    assert reading.bundle == EVERY_KIND
    assert reading.skipped == ()
    assert bundle_from_jwks(TD, jwks_of(EVERY_KIND)).jwt_authorities == (
        EVERY_KIND.jwt_authorities
    )


def test_the_largest_bundle_goes_and_comes_back() -> None:
    """A bundle of 100 authorities is written and read; a map may hold several."""
    one = a_jwt_authority("k", "rsa2048")
    many = tuple(replace(one, key_id=f"{number:0255}") for number in range(100))
    full = a_bundle(x509_authorities=(), jwt_authorities=many)
    assert bundle_from_document(TD, bundle_to_document(full)) == full
    other = replace(full, trust_domain=PARTNER, refresh_hint=None)
    both = BundleSet.of([replace(full, refresh_hint=None), other])
    assert bundle_map_from_document(bundle_map_to_document(both)) == both


# --- what we read: the matrix of conformance 3.6 ---


def x509_entry(**changes: Any) -> dict[str, Any]:
    """A correct entry for an X.509 CA; a change to None takes a member away."""
    made = {
        "use": "x509-svid",
        **members_of(a_key("p256", "a").public_key()),
        "x5c": [base64.b64encode(CA).decode()],
    }
    return {k: v for k, v in {**made, **changes}.items() if v is not None}


def jwt_entry(**changes: Any) -> dict[str, Any]:
    """A correct entry for a JWT key; a change to None takes a member away."""
    made = {
        "use": "jwt-svid",
        "kid": "k1",
        **members_of(a_key("p256", "jwt").public_key()),
    }
    return {k: v for k, v in {**made, **changes}.items() if v is not None}


CA = a_ca(which="a")
GOOD_X509 = X509Authority.parse(CA)
GOOD_JWT = JwtAuthority("k1", spki_of(a_key("p256", "jwt").public_key()))


def document(*keys: Any, **members: Any) -> bytes:
    """A document with these keys and other members."""
    return json.dumps({"spiffe_sequence": 1, "keys": list(keys), **members}).encode()


def test_the_entries_that_the_others_change_are_good() -> None:
    """Both correct entries are read."""
    bundle = bundle_from_document(TD, document(x509_entry(), jwt_entry()))
    assert bundle.trust_domain == TD
    assert bundle.x509_authorities == (GOOD_X509,)
    assert bundle.jwt_authorities == (GOOD_JWT,)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"keys"',
        b"1",
        b"{}",
        b'{"keys":null}',
        b'{"keys":{}}',
        b'{"keys":"[]"}',
        b'{"keys":0}',
        b'{"spiffe_sequence":1}',
        b'{"Keys":[]}',
        json.dumps(jwt_entry()).encode(),
        b"\xef\xbb\xbf" + document(jwt_entry()),
        document(jwt_entry()).decode().encode("utf-16"),
        document(jwt_entry()) + b"x",
        document(jwt_entry())[:-1],
        b"-----BEGIN CERTIFICATE-----",
        CA,
    ],
    ids=lambda data: ascii(data)[:24] if data.isascii() else "binary",
)
def test_bundle_13_what_is_no_jwk_set(data: bytes) -> None:
    """BUNDLE-05: without an object that has keys, an array, the document is refused."""
    with pytest.raises(BundleError):
        bundle_from_document(TD, data)


@pytest.mark.parametrize(
    "text",
    [
        '{"keys":[],"keys":[]}',
        '{"keys":[],"spiffe_sequence":1,"spiffe_sequence":2}',
        '{"keys":[{"use":"jwt-svid","use":"x509-svid"}]}',
        '{"keys":[],"x":NaN}',
        '{"keys":[],"x":{"y":1,"y":1}}',
        '{"keys":[],"spiffe_sequence":1e400}',
        '{"keys":[{"kid":"\\ud800"}]}',
        '{"keys":' + "[" * 40 + "]" * 40 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_what_readers_disagree_on(text: str) -> None:
    """SEC-05: a document that two readers would read differently is refused as a whole."""
    with pytest.raises(BundleError, match="cannot be read"):
        bundle_from_document(TD, text.encode())


def test_bundle_06_other_members_are_ignored() -> None:
    """Unknown top-level members are allowed and change nothing."""
    more = document(jwt_entry(), x=1, refresh_hint=5, trust_domain="evil.test", **{"": []})
    assert bundle_from_document(TD, more) == bundle_from_document(TD, document(jwt_entry()))


COUNTERS = ["spiffe_sequence", "spiffe_refresh_hint"]


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize(
    "value",
    ["1.0", "1.5", '"1"', "true", "false", "null", "[]", "{}", "1e3", "1E0", str(2**64)],
)
def test_bundle_09_counters_are_integers(name: str, value: str) -> None:
    """BUNDLE-11, IOP-19: a float, string, bool or null as sequence or hint is refused."""
    with pytest.raises(BundleError):
        bundle_from_document(TD, f'{{"keys":[],"{name}":{value}}}'.encode())


def test_a_sequence_does_not_begin_below_zero() -> None:
    """A negative sequence number is refused; an absent one is 0."""
    with pytest.raises(BundleError, match="must not be negative"):
        bundle_from_document(TD, b'{"keys":[],"spiffe_sequence":-1}')
    assert bundle_from_document(TD, b'{"keys":[]}').sequence_number == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300),
        (0, 0),
        (-1, 0),
        (-(2**63), 0),
        (30 * 24 * 3600, 2_592_000),
        (30 * 24 * 3600 + 1, 2_592_000),
        (2**63 - 1, MAX_HINT_SECONDS),
        (2**64 - 1, MAX_HINT_SECONDS),
    ],
)
def test_bundle_12_hints_are_clamped(value: int, seconds: int) -> None:
    """A hint of nothing, below nothing, or of ages is read as one within bounds."""
    text = f'{{"keys":[],"spiffe_refresh_hint":{value}}}'.encode()
    assert bundle_from_document(TD, text).refresh_hint == timedelta(seconds=seconds)
    assert bundle_from_document(TD, b'{"keys":[]}').refresh_hint is None


def test_bundle_14_unknown_entries_are_skipped() -> None:
    """BUNDLE-20: of five entries with unknown kty or use exactly the good one is used."""
    keys = [
        jwt_entry(),
        {"use": "jwt-svid", "kid": "ml", "kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"},
        jwt_entry(use="foo-svid", kid="foo"),
        jwt_entry(use=None, kid="none"),
        jwt_entry(use="Jwt-Svid", kid="case"),
    ]
    reading = read_document(TD, document(*keys))
    assert reading.bundle.jwt_authorities == (GOOD_JWT,)
    assert reading.bundle.x509_authorities == ()
    assert [one.position for one in reading.skipped] == [1, 2, 3, 4]


OTHER_CA = base64.b64encode(a_ca(which="b")).decode()
GOOD_X5C = base64.b64encode(CA).decode()


def ca_entry(kind: str = "p256", which: str = "", **changes: Any) -> dict[str, Any]:
    """An entry for a CA certificate that breaks a rule itself."""
    der = a_ca(kind, which, **changes)
    key = a_key(kind, which).public_key()
    members = (
        members_of(key) if kind in X509_KINDS else {"kty": "EC", "crv": kind, "x": "", "y": ""}
    )
    return {"use": "x509-svid", **members, "x5c": [base64.b64encode(der).decode()]}


SKIPPED: dict[str, tuple[Any, str]] = {
    "not an object": (7, "not a JSON object"),
    "a string": ("x", "not a JSON object"),
    "null": (None, "not a JSON object"),
    "an array": ([], "not a JSON object"),
    "an empty object": ({}, "use is not known"),
    "no use": (x509_entry(use=None), "use is not known"),
    "unknown use": (jwt_entry(use="foo-svid"), "use is not known"),
    "use sig": (jwt_entry(use="sig"), "use is not known"),
    "use in another case": (x509_entry(use="X509-SVID"), "use is not known"),
    "use of another type": (jwt_entry(use=["jwt-svid"]), "use is not known"),
    "wit-svid": (jwt_entry(use="wit-svid"), "use is not known"),
    "no kty": (jwt_entry(kty=None), "kty of a key is not known"),
    "unknown kty": (jwt_entry(kty="AKP"), "kty of a key is not known"),
    "symmetric": ({"use": "jwt-svid", "kid": "s", "kty": "oct"}, "kty of a key is not known"),
    "unknown crv": (jwt_entry(crv="secp256k1"), "crv of a key is not known"),
    "x509 without x5c": (x509_entry(x5c=None), "x5c is missing"),
    "x509 with empty x5c": (x509_entry(x5c=[]), "x5c is missing"),
    "x5c is text": (x509_entry(x5c=GOOD_X5C), "x5c is missing"),
    "x5c of numbers": (x509_entry(x5c=[1]), "x5c is missing"),
    "x5c in base64url": (x509_entry(x5c=[b64url_encode(CA)]), "base64"),
    "x5c unpadded": (x509_entry(x5c=[GOOD_X5C.rstrip("=") + "A"]), "base64|certificate"),
    "x5c with line breaks": (x509_entry(x5c=[GOOD_X5C[:64] + "\n" + GOOD_X5C[64:]]), "base64"),
    "x5c in PEM": (
        x509_entry(x5c=[x509.load_der_x509_certificate(CA).public_bytes(
            serialization.Encoding.PEM).decode()]), "base64"),
    "x5c empty text": (x509_entry(x5c=[""]), "certificate is empty"),
    "x5c of another key": (x509_entry(x5c=[OTHER_CA]), "another key"),
    "x509 without x": (x509_entry(x=None), "member x of a key is missing"),
    "x509 without kty": (x509_entry(kty=None), "kty of a key is not known"),
    "jwt without kid": (jwt_entry(kid=None), "kid is missing"),
    "jwt with empty kid": (jwt_entry(kid=""), "missing key ID"),
    "jwt with a number for kid": (jwt_entry(kid=5), "kid is missing"),
    "jwt with a kid of 256 bytes": (jwt_entry(kid="k" * 256), "longer than 255"),
    "jwt with an Ed25519 key": (
        {"use": "jwt-svid", "kid": "e", **members_of(a_key("ed25519").public_key())},
        "no algorithm of JWT-SVIDs"),
    "alg of another curve": (jwt_entry(alg="ES384"), "alg does not fit"),
    "alg of another family": (jwt_entry(alg="HS256"), "alg does not fit"),
    "alg that is no text": (jwt_entry(alg=["ES256"]), "alg does not fit"),
    "key_ops without verify": (jwt_entry(key_ops=["encrypt"]), "key_ops"),
    "key_ops of nothing": (jwt_entry(key_ops=[]), "key_ops"),
    "key_ops that is text": (jwt_entry(key_ops="verify"), "key_ops"),
    "a leaf": (ca_entry(ca=False, usage=key_usage("digital_signature")), "cA TRUE"),
    "a CA without keyCertSign": (ca_entry(usage=key_usage("crl_sign")), "keyCertSign"),
    "an SVID's path": (ca_entry(uris=("spiffe://example.org/w",)), "has no path"),
    "a weak key": (ca_entry("rsa1024"), "2048 to 4096"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_entries_that_are_skipped(name: str) -> None:
    """BUNDLE-14, X509-42, SEC-12: a bad entry is left out and said, the rest is used."""
    bad, reason = SKIPPED[name]
    for keys in ([bad, x509_entry(), jwt_entry()], [x509_entry(), jwt_entry(), bad]):
        reading = read_document(TD, document(*keys))
        assert reading.bundle.x509_authorities == (GOOD_X509,)
        assert reading.bundle.jwt_authorities == (GOOD_JWT,)
        (skipped,) = reading.skipped
        assert keys[skipped.position] == bad
        assert not skipped.private
        assert re.search(reason, skipped.reason)


@pytest.mark.parametrize("more", [{"alg": "ES256"}, {"key_ops": ["verify"]}, {"z": 1}])
def test_entries_with_more_members_than_needed(more: dict[str, Any]) -> None:
    """BUNDLE-18: members that we would not write are no reason to skip a foreign entry."""
    bundle = bundle_from_document(TD, document(jwt_entry(**more), x509_entry(**more)))
    assert bundle.jwt_authorities == (GOOD_JWT,)
    assert bundle.x509_authorities == (GOOD_X509,)


@pytest.mark.parametrize("member", PRIVATE)
@pytest.mark.parametrize("entry", [x509_entry, jwt_entry])
def test_sec_45_private_members_are_skipped_loudly(member: str, entry: Any) -> None:
    """JWT-24: an entry with a private member, whatever its value, is left out and marked."""
    for value in ("AAAA", "", None, 5):
        bad = {**entry(), member: value}
        reading = read_document(TD, document(bad, jwt_entry(kid="other")))
        assert [one.key_id for one in reading.bundle.jwt_authorities] == ["other"]
        assert reading.bundle.x509_authorities == ()
        assert reading.skipped == (
            SkippedKey(0, "it holds a private key, which is no secret any more", private=True),
        )


def test_x509_43_the_first_of_several_certificates() -> None:
    """Only the first x5c value is used, whatever the others are."""
    for others in ([OTHER_CA], ["rubbish"], [7, None]):
        reading = read_document(TD, document(x509_entry(x5c=[GOOD_X5C, *others])))
        assert reading.bundle.x509_authorities == (GOOD_X509,)
    assert read_document(
        TD, document(x509_entry(x5c=[OTHER_CA, GOOD_X5C]))
    ).bundle.x509_authorities == ()  # fmt: skip


def test_a_kid_on_an_x509_entry_is_tolerated() -> None:
    """Conformance 3.6: a foreign X.509 entry with a kid is used all the same."""
    for key_id in ("x", "", 5, "k1"):
        both = document(x509_entry(kid=key_id), jwt_entry())
        assert bundle_from_document(TD, both).x509_authorities == (GOOD_X509,)


def test_x509_44_the_union_over_all_entries() -> None:
    """Every x509-svid entry counts, and one that is there twice counts once."""
    second = ca_entry("p384")
    bundle = bundle_from_document(TD, document(x509_entry(), second, x509_entry()))
    assert len(bundle.x509_authorities) == 2


def test_sec_45_a_kid_names_one_key() -> None:
    """A document in which two JWT keys share a kid is refused."""
    other = jwt_entry(**members_of(a_key("p384", "jwt").public_key()))
    for twins in ((jwt_entry(), jwt_entry()), (jwt_entry(), other)):
        with pytest.raises(BundleError, match="share a key ID"):
            bundle_from_document(TD, document(*twins))
        with pytest.raises(BundleError, match="share a key ID"):
            bundle_from_jwks(TD, document(*twins))
    cases = bundle_from_document(TD, document(jwt_entry(), jwt_entry(kid="K1")))
    assert len(cases.jwt_authorities) == 2


def test_sec_45_at_most_100_keys() -> None:
    """100 keys are read, 101 refused, used or not."""
    for make in (lambda n: jwt_entry(kid=str(n)), lambda n: {"use": "x", "n": n}):
        assert bundle_from_document(TD, document(*map(make, range(100))))
        with pytest.raises(BundleError, match="more than 100 keys"):
            bundle_from_document(TD, document(*map(make, range(101))))


def test_a_document_of_more_than_1_mib() -> None:
    """A document is at most 1 MiB (security requirements, table 1)."""
    big = document(jwt_entry(), padding="x" * (1024 * 1024))
    with pytest.raises(BundleError, match="longer than 1048576 bytes"):
        bundle_from_document(TD, big)


# --- what a bundle then verifies ---


def a_token(key: Any, key_id: str, algorithm: str = "ES256") -> str:
    """A JWT-SVID signed by *key*."""
    claims = {"sub": "spiffe://example.org/w", "aud": ["a"], "exp": int(NOW.timestamp()) + 60}
    return jwt.encode(claims, key, algorithm, headers={"kid": key_id})


def test_jwt_27_only_jwt_svid_entries_verify_tokens() -> None:
    """A key of an x509-svid or wit-svid entry verifies no JWT-SVID, whatever kid it has."""
    keys = [jwt_entry(), x509_entry(kid="ca"), jwt_entry(use="wit-svid", kid="wit")]
    keys[2].update(members_of(a_key("p256", "wit").public_key()))
    bundles = BundleSet.of([bundle_from_document(TD, document(*keys))])
    good = a_token(a_key("p256", "jwt"), "k1")
    assert verify_jwt_svid(good, bundles, audience="a", at=NOW)
    for key, key_id in ((a_key("p256", "a"), "ca"), (a_key("p256", "wit"), "wit")):
        with pytest.raises(JwtSvidError, match="not among"):
            verify_jwt_svid(a_token(key, key_id), bundles, audience="a", at=NOW)
        with pytest.raises(JwtSvidError, match="does not verify"):
            verify_jwt_svid(a_token(key, "k1"), bundles, audience="a", at=NOW)


def test_jwt_28_a_domain_without_jwt_keys() -> None:
    """A document without jwt-svid entries verifies no token, one without x509-svid no SVID."""
    x509_only = BundleSet.of([bundle_from_document(TD, document(x509_entry()))])
    token = a_token(a_key("p256", "jwt"), "k1")
    with pytest.raises(JwtSvidError, match="no JWT authority"):
        verify_jwt_svid(token, x509_only, audience="a", at=NOW)
    leaf = a_leaf(CA, a_key("p256", "a"))
    assert verify_x509_svid([leaf], x509_only, at=NOW)


def test_x509_44_a_domain_without_ca() -> None:
    """A JWT-only document makes every X509-SVID of the domain untrusted."""
    jwt_only = BundleSet.of([bundle_from_document(TD, document(jwt_entry()))])
    leaf = a_leaf(CA, a_key("p256", "a"))
    with pytest.raises(X509SvidError, match=r"no X\.509 authority"):
        verify_x509_svid([leaf], jwt_only, at=NOW)


@pytest.mark.parametrize(
    "keys",
    [[], [jwt_entry(use="foo-svid")], [x509_entry(x5c=None), jwt_entry(kid=None)], [None]],
)
def test_bundle_16_nothing_usable_means_nothing_trusted(keys: list[Any]) -> None:
    """A document with no usable key is a bundle that trusts nothing, not a failure to read."""
    new = bundle_from_document(TD, document(*keys))
    assert (new.x509_authorities, new.jwt_authorities) == ((), ())
    old = bundle_from_document(TD, document(x509_entry(), jwt_entry()))
    bundles = BundleSet.of([old, new])
    with pytest.raises(X509SvidError):
        verify_x509_svid([a_leaf(CA, a_key("p256", "a"))], bundles, at=NOW)
    with pytest.raises(JwtSvidError):
        verify_jwt_svid(a_token(a_key("p256", "jwt"), "k1"), bundles, audience="a", at=NOW)


def test_bundle_01_a_bundle_never_goes_without_its_name() -> None:
    """Every function that reads a document wants the trust domain, or finds it in the map."""
    for read in (bundle_from_document, read_document, bundle_from_jwks):
        assert next(iter(inspect.signature(read).parameters)) == "trust_domain"
    for reader in (bundle_from_document, bundle_from_jwks):
        assert reader(PARTNER, document(jwt_entry())).trust_domain == PARTNER
    assert inspect.signature(bundle_map_from_document).return_annotation is BundleSet
    assert [name for name in vars(bundle_document) if name.endswith("_from_document")] == [
        "bundle_from_document",
        "bundle_map_from_document",
    ]


# --- JWK Sets of the Workload API ---


@pytest.mark.parametrize("use", [None, "jwt-svid", "sig", "anything", 5])
def test_c_17_use_says_nothing_in_a_jwk_set(use: Any) -> None:
    """IOP-02, C-17: the JWK Set of FetchJWTBundles holds JWT keys, whatever their use."""
    bundle = bundle_from_jwks(TD, document(jwt_entry(use=use)))
    assert bundle.jwt_authorities == (GOOD_JWT,)


@pytest.mark.parametrize(
    "bad",
    [5, None, [], {}, jwt_entry(kid=None), jwt_entry(kty="oct"), {**jwt_entry(), "d": "A"}],
)
def test_a_bad_key_of_a_jwk_set_is_skipped(bad: Any) -> None:
    """BUNDLE-14: the good keys beside it are used."""
    assert bundle_from_jwks(TD, document(bad, jwt_entry())).jwt_authorities == (GOOD_JWT,)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"keys":null}', b'{"keys":5}', b"\xff"])
def test_what_is_no_jwk_set_of_the_workload_api(data: bytes) -> None:
    """BUNDLE-13: without an array of keys a JWK Set is refused."""
    with pytest.raises(BundleError):
        bundle_from_jwks(TD, data)


# --- bundle maps ---


def test_bundle_21_a_map_of_nothing() -> None:
    """An empty map has the member trust_domains, and is read as nothing."""
    assert bundle_map_to_document(BundleSet()) == b'{"trust_domains":{}}'
    assert len(bundle_map_from_document(b'{"trust_domains":{}}')) == 0


def test_bundle_22_names_are_bare() -> None:
    """BUNDLE-23, BUNDLE-25: a map is keyed by bare names, each once, without refresh hints."""
    bundles = BundleSet.of([a_bundle(), replace(a_bundle(), trust_domain=PARTNER)])
    text = bundle_map_to_document(bundles)
    whole = json.loads(text)
    assert list(whole) == ["trust_domains"]
    assert set(whole["trust_domains"]) == {"example.org", "partner.test"}
    assert b"refresh_hint" not in text
    for inner in whole["trust_domains"].values():
        assert set(inner) == {"spiffe_sequence", "keys"}
    read = bundle_map_from_document(text)
    assert read == BundleSet.of(
        replace(bundle, refresh_hint=None) for bundle in bundles.values()
    )


GOOD_MAP = {"example.org": {"spiffe_sequence": 1, "keys": [jwt_entry()]}}


@pytest.mark.parametrize(
    "name",
    [
        "spiffe://example.org",
        "Example.org",
        "EXAMPLE.ORG",
        "",
        "a/b",
        "example.org/",
        "a b",
        "é",
    ],
)
def test_bundle_22_other_names_are_refused(name: str) -> None:
    """BUNDLE-27: a map with a name in upper case or as an ID is refused as a whole."""
    bad = {"trust_domains": {**GOOD_MAP, name: {"keys": []}}}
    with pytest.raises(BundleError):
        bundle_map_from_document(json.dumps(bad).encode())


@pytest.mark.parametrize(
    "text",
    [
        '{"trust_domains":{"a":{"keys":[]},"a":{"keys":[]}}}',
        '{"trust_domains":{},"trust_domains":{}}',
        '{"trust_domains":{"a":{"keys":[],"keys":[]}}}',
        '{"trust_domains":{"a":{"keys":[]},"\\u0061":{"keys":[]}}}',
        '{"x":{"y":1,"y":1},"trust_domains":{}}',
    ],
)
def test_bundle_24_duplicates_are_refused(text: str) -> None:
    """BUNDLE-23: a name twice, or any member twice at any level, refuses the map."""
    with pytest.raises(BundleError, match="two members"):
        bundle_map_from_document(text.encode())


def test_bundle_26_inner_hints_say_nothing_of_the_map() -> None:
    """A hint inside a map stays with its bundle; the map itself has none to follow."""
    text = json.dumps({"trust_domains": {"a": {"keys": [], "spiffe_refresh_hint": 1}}})
    read = bundle_map_from_document(text.encode())
    assert read[TrustDomain("a")].refresh_hint == timedelta(seconds=1)
    assert not hasattr(read, "refresh_hint")


@pytest.mark.parametrize(
    "bad",
    [
        {"keys": None},
        {},
        [],
        None,
        5,
        {"keys": [], "spiffe_sequence": "1"},
        {"keys": [{"use": "x"}] * 101},
        {"keys": [jwt_entry(), jwt_entry()]},
    ],
    ids=lambda bad: ascii(bad)[:30],
)
def test_bundle_27_whole_or_not_at_all(bad: Any) -> None:
    """One bad bundle refuses the map; what is absent from a good one is not in the set."""
    text = json.dumps({"trust_domains": {**GOOD_MAP, "partner.test": bad}})
    with pytest.raises(BundleError):
        bundle_map_from_document(text.encode())
    good = bundle_map_from_document(json.dumps({"trust_domains": GOOD_MAP}).encode())
    assert set(good) == {TD}


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"trust_domains":[]}', "", "{"])
def test_bundle_21_what_is_no_map(text: str) -> None:
    """Without the member trust_domains, an object, it is no map."""
    with pytest.raises(BundleError):
        bundle_map_from_document(text.encode())


# --- properties ---

JWT_AUTHORITIES = st.lists(
    st.builds(a_jwt_authority, st.text(min_size=1, max_size=40), st.sampled_from(JWT_KINDS)),
    max_size=5,
    unique_by=lambda one: one.key_id,
).map(tuple)
BUNDLES = st.builds(
    Bundle,
    st.sampled_from([TD, PARTNER]),
    st.lists(st.sampled_from(EVERY_KIND.x509_authorities), unique=True).map(tuple),
    JWT_AUTHORITIES,
    st.integers(0, 2**64 - 1),
    st.none() | st.integers(0, MAX_HINT_SECONDS).map(lambda n: timedelta(seconds=n)),
)


@given(BUNDLES)
@settings(max_examples=60)
def test_any_bundle_goes_and_comes_back(bundle: Bundle) -> None:
    """Any bundle reads back equal from its document, and its keys from its JWK Set."""
    assert bundle_from_document(bundle.trust_domain, bundle_to_document(bundle)) == bundle
    read = bundle_from_jwks(bundle.trust_domain, jwks_of(bundle))
    assert read.jwt_authorities == bundle.jwt_authorities
    whole = BundleSet.of([replace(bundle, refresh_hint=None)])
    assert bundle_map_from_document(bundle_map_to_document(whole)) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["keys", "use", "kid", "kty", "crv", "x", "y", "n", "e", "x5c", "d"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
CHANGES = st.dictionaries(
    st.sampled_from(["use", "kid", "kty", "crv", "x", "y", "n", "e", "x5c", "d"]),
    JSON,
    max_size=3,
)
TOP = st.dictionaries(
    st.sampled_from(["keys", "spiffe_sequence", "spiffe_refresh_hint", "trust_domains", "z"]),
    JSON,
    max_size=3,
)


@given(
    st.lists(
        st.tuples(st.sampled_from([x509_entry(), jwt_entry()]), CHANGES) | JSON, max_size=3
    ),
    TOP,
    st.binary(max_size=3),
)
def test_any_document(entries: list[Any], top: dict[str, Any], junk: bytes) -> None:
    """Any JSON, good entries with anything changed, and junk behind give ours or our error."""
    keys = [{**one[0], **one[1]} if isinstance(one, tuple) else one for one in entries]
    text = json.dumps({"keys": keys, **top}).encode("utf-8", "replace") + junk
    for read in (bundle_from_document, bundle_from_jwks):
        try:
            bundle = read(TD, text)
        except BundleError:
            continue
        assert bundle_from_document(TD, bundle_to_document(bundle)) == bundle
    try:
        bundle_map_from_document(
            json.dumps({"trust_domains": {"a": {"keys": keys}}, **top}).encode()
        )
    except BundleError:
        return


@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    """Noise is refused with our own error by every reader."""
    for read in (bundle_from_document, bundle_from_jwks):
        with pytest.raises(BundleError):
            read(TD, data)
    with pytest.raises(BundleError):
        bundle_map_from_document(data)
