"""
Wycheproof's JWS, JWK, ECDSA and RSA vectors, in the profile of JWT-SVIDs.

A key of the suite goes into a bundle document, and its token through the two steps that
stand before the claims of `verify_jwt_svid`: form and header, then the signature.
"""

import json
from collections import Counter
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spiffe_core.bundle_document import bundle_from_document
from spiffe_core.errors import MalformedError
from spiffe_core.jwtsvid import JwtSvidError, check_signature, parse_jws
from spiffe_core.keys import check_public_key
from tests.support.issuing import TD
from tests.support.vectors import wycheproof

SECRET = ("d", "p", "q", "dp", "dq", "qi", "oth")

ALG_OF_A_KEY = "a bundle entry has no alg (BUNDLE-18), so that an RSA key serves all of RSA's; "
ALG_OF_A_KEY += "the suite itself wants a PS384 token by a PS256 key accepted (347, 350)"
LOOSER = {("json_web_signature", number): ALG_OF_A_KEY for number in (332, 334, 336, 338, 340)}
"""The suite refuses, we accept: the signature is good and by the very key that kid names."""

SYMMETRIC = "an HMAC is no JWT-SVID's (JWT-05)"
ENCRYPTED = "a JWE is no JWT-SVID (JWT-02)"
LOOSE_BASE64 = "base64 has one spelling here (SEC-05)"
NO_SUCH_ALG = "ES521 names no algorithm, so the entry is skipped"


def reason(group: dict[str, Any], test: dict[str, Any]) -> str:
    """Why we refuse what the suite accepts; empty when there is no reason to."""
    kinds = {entry.get("kty") for entry in entries(group)}
    if "jwe" in test:
        return ENCRYPTED
    if kinds == {"oct"}:
        return SYMMETRIC
    if test["comment"].startswith("InvalidCharacterInserted"):
        return LOOSE_BASE64
    return NO_SUCH_ALG if entries(group)[0].get("alg") == "ES521" else ""


def entries(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group's public keys as entries of a bundle document."""
    found = group.get("public") or group["private"]
    plain = [
        {name: value for name, value in entry.items() if name not in SECRET}
        for entry in found.get("keys", [found])
    ]
    # `sig` and nothing are what our `jwt-svid` is; any other use stays as it is.
    return [
        {**one, "use": "jwt-svid"} if one.get("use", "sig") == "sig" else one for one in plain
    ]


def text_of(test: dict[str, Any]) -> str:
    """The token; a JSON serialization as the text that it would be sent as."""
    found = test["jws"] if "jws" in test else test["jwe"]
    return found if isinstance(found, str) else json.dumps(found)


def refusal(group: dict[str, Any], text: str) -> str:
    """Why a token is refused; empty when its signature is good."""
    try:
        document = json.dumps({"keys": entries(group)}).encode()
        jws = parse_jws(text)
        authority = bundle_from_document(TD, document).jwt_authority(jws.header["kid"])
        if authority is None:
            return "no such key"
        check_signature(authority.public_key, jws.header["alg"], jws.signed, jws.signature)
    except MalformedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "count"),
    [("json_web_signature", 401), ("json_web_crypto", 83), ("json_web_key", 26)],
)
def test_sec_40_tokens(name: str, count: int) -> None:
    """SEC-40, SEC-44, JWT-06, JWT-19: each token is judged as the suite says, or as listed."""
    found = wycheproof(f"{name}_test.json")
    seen = Counter[str]()
    for group in found["testGroups"]:
        for test in group["tests"]:
            why = refusal(group, text_of(test))
            good = test["result"] == "valid"
            listed = LOOSER.get((name, test["tcId"]), reason(group, test) if good else "")
            assert (not why) == (good != bool(listed)), (test["tcId"], test["comment"], why)
            seen[test["result"]] += 1
    assert seen.total() == found["numberOfTests"] == count


def test_sec_40_no_hmac_is_accepted() -> None:
    """SEC-40, JWT-05: of the HMAC tokens that the suite calls valid, not one is accepted."""
    valid = [
        (group, text_of(test))
        for name in ("json_web_signature", "json_web_crypto", "json_web_key")
        for group in wycheproof(f"{name}_test.json")["testGroups"]
        for test in group["tests"]
        if test["result"] == "valid" and {one.get("kty") for one in entries(group)} == {"oct"}
    ]
    assert len(valid) >= 10
    for group, text in valid:
        assert refusal(group, text)


def raw_vectors(name: str) -> list[tuple[bytes, dict[str, Any]]]:
    """The tests of one file with the keys they go with."""
    return [
        (bytes.fromhex(group["publicKeyDer"]), test)
        for group in wycheproof(f"{name}_test.json")["testGroups"]
        for test in group["tests"]
    ]


def judged(spki: bytes, algorithm: str, test: dict[str, Any]) -> str:
    """Why a raw signature is refused; empty when it is good."""
    message, signature = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
    try:
        check_signature(spki, algorithm, message, signature)
    except MalformedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("ecdsa_secp256r1_sha256_p1363", "ES256"),
        ("ecdsa_secp384r1_sha384_p1363", "ES384"),
        ("ecdsa_secp521r1_sha512_p1363", "ES512"),
        ("rsa_pss_2048_sha256_mgf1_32", "PS256"),
        ("rsa_pss_3072_sha256_mgf1_32", "PS256"),
        ("rsa_pss_2048_sha384_mgf1_48", "PS384"),
        ("rsa_pss_4096_sha384_mgf1_48", "PS384"),
        ("rsa_pss_4096_sha512_mgf1_64", "PS512"),
        *(
            (f"rsa_signature_{bits}_sha{digest}", f"RS{digest}")
            for bits in (2048, 3072, 4096)
            for digest in (256, 384, 512)
        ),
    ],
)
def test_sec_44_signatures(name: str, algorithm: str) -> None:
    """SEC-44: every signature is judged as the suite says, save under weak keys."""
    seen = Counter[str]()
    for spki, test in raw_vectors(name):
        why = judged(spki, algorithm, test)
        if "keys must" in why:
            seen["weak key"] += 1
        elif test["result"] == "acceptable":
            # PKCS#1 encodings that leave out a NULL: the library refuses them.
            assert why == "token signature does not verify", test["tcId"]
        else:
            assert (why == "") == (test["result"] == "valid"), (test["tcId"], test["comment"])
        seen[test["result"]] += 1
    assert seen["valid"] > 5
    assert seen["invalid"] > 10
    assert seen["weak key"] <= seen["valid"] // 4


@pytest.mark.parametrize(
    ("curve", "digest"), [("256r1", "256"), ("384r1", "384"), ("521r1", "512")]
)
def test_sec_44_signatures_of_certificates(curve: str, digest: str) -> None:
    """SEC-44: the library that checks certificates judges DER signatures as the suite says."""
    algorithm = ec.ECDSA(getattr(hashes, f"SHA{digest}")())
    count = 0
    for spki, test in raw_vectors(f"ecdsa_secp{curve}_sha{digest}"):
        key: Any = check_public_key(serialization.load_der_public_key(spki))
        try:
            key.verify(bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"]), algorithm)
            good = True
        except (InvalidSignature, ValueError):
            good = False
        assert good == (test["result"] == "valid"), (test["tcId"], test["comment"])
        count += 1
    assert count > 400


def test_sec_44_ed25519_is_no_algorithm_of_tokens() -> None:
    """SEC-40: a good Ed25519 signature verifies under none of the nine algorithms."""
    for spki, test in raw_vectors("ed25519")[:40]:
        with pytest.raises(JwtSvidError, match="does not fit the key"):
            check_signature(
                spki, "ES256", bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
            )
