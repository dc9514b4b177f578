"""Wycheproof's groups about base64 and about keys, read with our readers."""

import hmac
from typing import Any

import pytest

from spiffe_core.bundle import BundleError
from spiffe_core.bundle_document import bundle_from_jwks
from spiffe_core.errors import MalformedError
from spiffe_core.jwk import key_of_jwk
from spiffe_core.keys import KeyRefusedError
from spiffe_core.strictjson import StrictJsonError, b64url_decode, b64url_encode, dumps, loads
from tests.support.store import TD
from tests.support.vectors import wycheproof

# The suite calls these valid, as RFC 7515 lets a reader skip foreign characters; we don't.
STRICTER = {372, 373}
# The suite calls these invalid for padding that its JSON file no longer holds: the token is
# byte for byte that of test 357, which it calls valid.
LOST_PADDING = {367, 370}


def decodes(token: str, key: bytes) -> bool:
    """Whether the parts of *token* are base64url, the header JSON, the MAC that of *key*."""
    try:
        header, payload, mac = (b64url_decode(part) for part in token.split("."))
        loads(header)
    except (StrictJsonError, ValueError):
        return False
    signed = token.rpartition(".")[0].encode()
    return bool(payload) and hmac.compare_digest(hmac.digest(key, signed, "sha256"), mac)


def test_sec_05_wycheproof_base64() -> None:
    """SEC-121: of the 21 base64 cases we refuse each that the suite refuses, and two more."""
    (group,) = (
        group
        for group in wycheproof("json_web_signature_test.json")["testGroups"]
        if group["comment"] == "base64"
    )
    key = b64url_decode(group["private"]["k"])
    cases = {case["tcId"]: case for case in group["tests"]}
    assert len(cases) == 21
    for number, case in cases.items():
        if number in LOST_PADDING:
            assert case["jws"] == cases[357]["jws"]
            continue
        expected = case["result"] == "valid" and number not in STRICTER
        assert decodes(case["jws"], key) is expected, case["comment"]


def keys_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The public keys of a group, or the secret one where it has no other."""
    found = group.get("public") or group["private"]
    keys: list[dict[str, Any]] = found.get("keys", [found])
    return keys


def group_of(comment: str) -> dict[str, Any]:
    """One group of the suite's key tests."""
    groups = wycheproof("json_web_key_test.json")["testGroups"]
    return next(group for group in groups if group["comment"] == comment)


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("jws_rsa_roca_key", "ROCA"),
        ("keysize_too_small", "2048 to 4096"),
        ("exponentOne", "RSA key is not one|exponent"),
        ("invalid_point", "point of its curve"),
        ("wrong_curve", "wrong length"),
        ("wrong_kty", "member n of a key is missing"),
        ("HS256", "kty of a key is not known"),
        ("HS512", "kty of a key is not known"),
        ("invalid_aes_gcm_key", "kty of a key is not known"),
    ],
)
def test_sec_15_wycheproof_keys(comment: str, reason: str) -> None:
    """SEC-121: the suite's weak, wrong and symmetric keys are refused for what they are."""
    for entry in keys_of(group_of(comment)):
        with pytest.raises(MalformedError, match=reason):
            key_of_jwk(entry)


def test_sec_15_the_roca_key_differs_by_its_fingerprint_alone() -> None:
    """A modulus beside that of the ROCA key, as long and as odd, has no fingerprint."""
    (entry,) = keys_of(group_of("jws_rsa_roca_key"))
    modulus = b64url_decode(entry["n"])
    assert (len(modulus), entry["e"]) == (257, "AQAB")
    with pytest.raises(KeyRefusedError, match="CVE-2017-15361"):
        key_of_jwk(entry)
    near = b"\xff" + modulus[2:-1] + bytes([modulus[-1] ^ 2])
    key_of_jwk({**entry, "n": b64url_encode(near)})


def test_sec_45_wycheproof_key_sets() -> None:
    """SEC-121: secrets in a set are left out, and two keys of one kid refuse it."""
    mixed = bundle_from_jwks(TD, dumps({"keys": keys_of(group_of("jws_mixedSymmetryKeyset"))}))
    assert all(one.key_id != "kid-aes-sign" for one in mixed.jwt_authorities)
    secrets = bundle_from_jwks(TD, dumps({"keys": keys_of(group_of("jws_keyset"))}))
    assert secrets.jwt_authorities == ()
    good = keys_of(group_of("rs256"))
    assert len(bundle_from_jwks(TD, dumps({"keys": good})).jwt_authorities) == len(good)
    with pytest.raises(BundleError, match="share a key ID"):
        bundle_from_jwks(TD, dumps({"keys": [*good, *good]}))
