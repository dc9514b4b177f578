"""
JWT-SVIDs by the standard: what we issue, and what we accept (conformance 2.3 and 3.5).

One file a standard, in the order of its clauses: hence over 500 lines.
"""

import base64
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet

from ca.jwt import JwtProfile
from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.bundle_document import bundle_from_document, bundle_to_document, jwks_of
from spiffe_core.errors import MalformedError
from spiffe_core.jwtsvid import ALGORITHMS, JwtSvid, JwtSvidError, verify_jwt_svid
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.authorities import NOW, a_key, an_x509_authority
from tests.support.issuing import KINDS, TD, an_active_jwt, bundles_of, token
from tests.support.tokens import (
    KEY_FOR,
    MISSING,
    SECONDS,
    a_bundle,
    a_token,
    b64,
    bundles,
    claims_of,
    header_of,
    key_for,
    raw_signature,
    sealed,
)

SECOND = timedelta(seconds=1)


def verified(text: str, audience: str = "db", at: datetime = NOW, **more: Any) -> JwtSvid:
    """What the tests' bundles prove of a token."""
    return verify_jwt_svid(text, bundles(), audience=audience, at=at, **more)


def refused(text: str, match: str, **more: Any) -> None:
    """The token proves nothing, and the text names the rule."""
    with pytest.raises(JwtSvidError, match=match):
        verified(text, **more)


def parts_of(text: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Header, claims, and the raw text of the claims."""
    first, second, _ = text.split(".")
    header, payload = (base64.urlsafe_b64decode(part + "==") for part in (first, second))
    return json.loads(header), json.loads(payload), payload.decode()


# What we issue.


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("p256", "ES256"), ("p384", "ES384"), ("rsa2048", "RS256"), ("rsa4096", "RS256")],
)
def test_the_header_of_ours(kind: str, algorithm: str) -> None:
    """
    JWT-01, JWT-03, JWT-04, JWT-06 to JWT-08, IOP-01: three parts, and a header of alg, kid
    and typ alone; alg fits the key.
    """
    authority = an_active_jwt(kind)
    text = token(authority).svid.token

    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", text, re.ASCII)
    assert parts_of(text)[0] == {"alg": algorithm, "kid": authority.key_id, "typ": "JWT"}
    assert authority.key_id


def test_the_claims_of_ours() -> None:
    """JWT-10, JWT-11, JWT-15, JWT-31, ID-33, IOP-29: the claims are sub, aud, exp, iat, jti."""
    made = token(audience=("db", "cache")).svid
    claims = parts_of(made.token)[1]

    assert claims == {
        "sub": "spiffe://example.org/w",
        "aud": ["db", "cache"],
        "exp": SECONDS + 300,
        "iat": SECONDS,
        "jti": claims["jti"],
    }
    assert made.spiffe_id.uri == claims["sub"]
    assert made.audience == ("db", "cache")
    assert made.expires_at == NOW + timedelta(minutes=5)


def test_one_audience_is_an_array() -> None:
    """IOP-29, JWT-11: a single audience is an array of one."""
    assert parts_of(token().svid.token)[1]["aud"] == ["db"]


@pytest.mark.parametrize("audience", [(), ("",), ("", "")])
def test_no_token_without_an_audience(audience: tuple[str, ...]) -> None:
    """JWT-11: a token for nobody is not issued."""
    with pytest.raises(MalformedError, match="at least one audience"):
        token(audience=audience)


def test_no_token_without_a_path() -> None:
    """JWT-10, IOP-30: the trust domain's own ID is no subject of ours."""
    with pytest.raises(MalformedError, match="must have a path"):
        token(spiffe_id=TD.id)


def test_life_is_short() -> None:
    """JWT-17: five minutes by default, and never beyond the signing key's own end."""
    assert token().svid.expires_at == NOW + timedelta(minutes=5)
    ending = an_active_jwt(which="ending", ttl=timedelta(minutes=2))
    assert token(ending).svid.expires_at == NOW + timedelta(minutes=2)


@pytest.mark.parametrize("micros", [0, 1, 499_999, 500_000, 999_999])
def test_numbers_are_plain_integers(micros: int) -> None:
    """JWT-31, IOP-11, IOP-12: exp and iat are bare digits, and iat is never ahead of time."""
    now = NOW + timedelta(microseconds=micros)
    payload = parts_of(token(now=now).svid.token)[2]

    found = {name: re.search(rf'"{name}":(\d+)[,}}]', payload) for name in ("exp", "iat")}
    assert all(found.values()), payload
    assert int(found["iat"][1]) <= now.timestamp()  # type: ignore[index]


def test_jti_is_new_each_time() -> None:
    """JWT-09, JWT-29: each token has a jti of 128 random bits, and iss if configured."""
    found = {parts_of(token().svid.token)[1]["jti"] for _ in range(200)}
    assert len(found) == 200
    assert all(len(base64.urlsafe_b64decode(one + "==")) == 16 for one in found)
    named = token(profile=JwtProfile(issuer="https://issuer.example")).svid
    assert parts_of(named.token)[1]["iss"] == "https://issuer.example"


@pytest.mark.parametrize("kind", KINDS)
def test_we_accept_what_we_issue(kind: str) -> None:
    """JWT-19, JWT-06: every kind of authority's tokens verify, and say what was asked for."""
    authority = an_active_jwt(kind)
    made = token(authority)
    proved = verify_jwt_svid(made.svid.token, bundles_of(authority), audience="db", at=NOW)

    assert proved == made.svid
    assert made.authority_id == authority.key_id


@pytest.mark.parametrize("kind", KINDS)
def test_other_libraries_accept_what_we_issue(kind: str) -> None:
    """JWT-19, JWT-06, IOP-01: PyJWT and joserfc verify our tokens with our JWK Set, by kid."""
    authority = an_active_jwt(kind, "long", timedelta(days=36500))
    text = token(authority, now=datetime.now(UTC)).svid.token
    keys = json.loads(jwks_of(bundles_of(authority)[TD]))

    header = jwt.get_unverified_header(text)
    by_pyjwt = jwt.decode(
        text, jwt.PyJWKSet.from_dict(keys)[header["kid"]].key,
        algorithms=list(ALGORITHMS), audience="db",
    )  # fmt: skip
    by_joserfc = joserfc_jwt.decode(
        text, KeySet.import_key_set(keys), algorithms=list(ALGORITHMS)
    )
    registry = joserfc_jwt.JWTClaimsRegistry(aud={"essential": True, "value": "db"})
    registry.validate(by_joserfc.claims)
    assert by_pyjwt["sub"] == by_joserfc.claims["sub"] == "spiffe://example.org/w"


def test_the_longest_subject() -> None:
    """ID-20, JWT-10: an ID of 2048 bytes goes through a JWT-SVID."""
    path = "/" + "w" * (2048 - len("spiffe://example.org/"))
    made = token(spiffe_id=SpiffeId(TD, path)).svid
    proved = verify_jwt_svid(made.token, bundles_of(an_active_jwt()), audience="db", at=NOW)
    assert len(proved.spiffe_id.uri) == 2048


# What we accept: form and header.


@pytest.mark.parametrize("algorithm", KEY_FOR)
def test_the_nine_algorithms(algorithm: str) -> None:
    """JWT-04, JWT-06: each of the nine verifies with a key that fits it."""
    assert set(ALGORITHMS) == set(KEY_FOR)
    assert verified(a_token(algorithm)).key_id == algorithm


@pytest.mark.parametrize(
    "make",
    [
        lambda h, p, s: json.dumps({"payload": p, "protected": h, "signature": s}),
        lambda h, p, s: json.dumps(
            {"payload": p, "signatures": [{"protected": h, "signature": s}]}
        ),
        lambda h, p, s: f"{h}.{p}.{s}.",
        lambda h, p, s: f".{h}.{p}.{s}",
        lambda h, p, s: f"{h}.{p}.{s}.{s}.{s}",
        lambda h, p, s: f"{h}.{p}",
        lambda h, p, s: f"{h}.{p}.",
        lambda h, p, s: f"{h}..{s}",
        lambda h, p, s: f".{p}.{s}",
        lambda h, p, s: f"{h}.{p}.{s}\n",
        lambda h, p, s: f" {h}.{p}.{s}",
        lambda h, p, s: f"Bearer {h}.{p}.{s}",
        lambda h, p, s: "",
        lambda h, p, s: "..",
    ],
)
def test_compact_form_alone(make: Any) -> None:
    """JWT-01, JWT-02: JSON serializations, five parts of a JWE, and half tokens are refused."""
    text = a_token()
    assert verified(text)
    refused(make(*text.split(".")), "^token ")


def test_an_encrypted_token() -> None:
    """JWT-02: a JWE is refused for its form, and never opened."""
    header = {"alg": "RSA-OAEP", "enc": "A256GCM", "kid": "ES256"}
    refused(".".join([b64(json.dumps(header).encode()), *["AAAA"] * 4]), "three parts")


@pytest.mark.parametrize(
    "algorithm",
    [
        "none", "None", "NONE", "", "HS256", "HS384", "HS512", "EdDSA", "Ed25519", "ES256K",
        "ML-DSA-44", "es256", "rs256", "RSA-OAEP", "dir", "ES224", "RS1", None, 256, True,
        ["ES256"], {"ES256": 1}, MISSING, "ES256 ", " ES256", "ES256\0",
    ],
)  # fmt: skip
def test_other_algorithms(algorithm: Any) -> None:
    """JWT-05: whatever is not one of the nine is refused, with a good signature too."""
    refused(a_token(header=header_of(alg=algorithm)), "algorithm is not one")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize("kid", ["ES256", "RS256"])
def test_a_public_key_is_no_secret(algorithm: str, kid: str) -> None:
    """JWT-05: an HMAC keyed with the bytes of a public key in the bundle is refused."""
    authority = a_bundle().jwt_authority(kid)
    assert authority is not None
    header = header_of(algorithm, kid=kid)
    text = sealed(header, claims_of(), algorithm=algorithm, key=authority.public_key)
    refused(text, "algorithm is not one")


@pytest.mark.parametrize("algorithm", KEY_FOR)
@pytest.mark.parametrize("kid", KEY_FOR)
def test_algorithm_and_key(algorithm: str, kid: str) -> None:
    """JWT-06: a header's algorithm that does not fit the key that kid names is refused."""
    text = a_token(algorithm, header=header_of(algorithm, kid=kid))
    if KEY_FOR[algorithm] == KEY_FOR[kid]:
        assert verified(text)
    else:
        refused(text, "algorithm does not fit the key")


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512"])
def test_a_signature_in_der(algorithm: str) -> None:
    """JWT-06: an ECDSA signature is r and s side by side, never DER."""
    text = a_token(algorithm)
    signed, _, signature = text.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    half = len(raw) // 2
    assert len(raw) == {"ES256": 64, "ES384": 96, "ES512": 132}[algorithm]
    r, s = (int.from_bytes(part, "big") for part in (raw[:half], raw[half:]))
    refused(f"{signed}.{b64(encode_dss_signature(r, s))}", "wrong length")


@pytest.mark.parametrize("type_", [MISSING, "JWT", "JOSE"])
def test_good_types(type_: Any) -> None:
    """JWT-08: typ may be absent, JWT or JOSE."""
    assert verified(a_token(header=header_of(typ=type_)))


@pytest.mark.parametrize(
    "type_", ["jwt", "Jwt", "jose", "wit+jwt", "at+jwt", "", None, 1, ["JWT"], "JWT "]
)
def test_bad_types(type_: Any) -> None:
    """JWT-08: any other typ is refused."""
    refused(a_token(header=header_of(typ=type_)), "type must be JWT or JOSE")


def test_a_token_without_kid() -> None:
    """JWT-07, C-06: kid is not needed by the standard, and by us it is."""
    refused(a_token(header=header_of(kid=MISSING)), "no key ID")


class Watched(BundleSet):
    """Bundles that note which of them was looked up."""

    looked: ClassVar[list[TrustDomain]] = []

    def __getitem__(self, name: TrustDomain) -> Bundle:
        self.looked.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("payload", [claims_of(), "junk", "{}", b"\xff"])
def test_the_algorithm_comes_first(payload: Any) -> None:
    """JWT-18: a bad alg is refused before payload, key or bundle are looked at."""
    watched = Watched.of([a_bundle()])
    watched.looked.clear()
    text = sealed(header_of(alg="none"), payload, algorithm="ES256")
    with pytest.raises(JwtSvidError, match="algorithm is not one"):
        verify_jwt_svid(text, watched, audience="db", at=NOW)
    assert watched.looked == []

    assert verify_jwt_svid(a_token(), watched, audience="db", at=NOW)
    assert watched.looked == [TD]


# What we accept: signature and key.


def test_every_character_counts() -> None:
    """JWT-19, ID-29: no character of header, payload or signature can be changed."""
    text = a_token()
    alphabet = "Aa0-_"
    for at, old in enumerate(text):
        for new in alphabet:
            if new != old:
                with pytest.raises(JwtSvidError):
                    verified(text[:at] + new + text[at + 1 :])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("spoil", ["=", "==", "\n", " ", "+", "/", "%3D", "é"])
def test_base64_is_canonical(part: int, spoil: str) -> None:
    """JWT-19: padding, white space and foreign characters in a part are refused."""
    for spot in ("end", "start"):
        parts = a_token().split(".")
        parts[part] = parts[part] + spoil if spot == "end" else spoil + parts[part]
        refused(".".join(parts), "cannot be read: ")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_spare_bits_are_zero(part: int) -> None:
    """JWT-19: a part whose last character carries unused bits has one spelling."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for sub in ("/w", "/ww", "/www"):
        parts = a_token(sub=f"spiffe://example.org{sub}").split(".")
        if len(parts[part]) % 4 == 0:
            continue
        last = alphabet.index(parts[part][-1])
        parts[part] = parts[part][:-1] + alphabet[last + 1]
        refused(".".join(parts), "cannot be read: ")
        return
    pytest.fail("no part with spare bits")


@pytest.mark.parametrize("signer", ["example.org", "partner.test", "evil.test"])
@pytest.mark.parametrize("claimed", ["example.org", "partner.test", "evil.test"])
def test_only_the_subject_s_own_trust_domain_vouches(signer: str, claimed: str) -> None:
    """
    JWT-32, ID-25, SEC-11: of three trust domains with the same kids, each vouches for its own
    subjects and for nobody else's.
    """
    known = BundleSet.of([a_bundle(name, name) for name in ("example.org", "partner.test",
                                                            "evil.test")])  # fmt: skip
    text = a_token(sub=f"spiffe://{claimed}/w", key=a_key("p256", signer))
    if signer == claimed:
        proved = verify_jwt_svid(text, known, audience="db", at=NOW)
        assert proved.spiffe_id.trust_domain.name == claimed
    else:
        with pytest.raises(JwtSvidError, match="does not verify"):
            verify_jwt_svid(text, known, audience="db", at=NOW)


def test_a_kid_of_another_trust_domain() -> None:
    """JWT-32: a key that only a foreign bundle holds does not serve a subject of ours."""
    foreign = Bundle(
        TrustDomain("partner.test"),
        jwt_authorities=(JwtAuthority("theirs", spki_of(a_key("p256", "b").public_key())),),
    )
    text = a_token(header=header_of(kid="theirs"), key=a_key("p256", "b"))
    with pytest.raises(JwtSvidError, match="not among its trust domain's"):
        verify_jwt_svid(text, bundles(foreign), audience="db", at=NOW)


def test_an_unknown_trust_domain() -> None:
    """JWT-32: a subject of a trust domain without a bundle is refused."""
    refused(a_token(sub="spiffe://unknown.test/w"), "no JWT authority is known")


def test_a_bundle_without_jwt_keys() -> None:
    """JWT-28: a trust domain without jwt-svid keys has no JWT-SVIDs."""
    bundle = Bundle(TD, (an_x509_authority(),))
    with pytest.raises(JwtSvidError, match="no JWT authority is known"):
        verify_jwt_svid(a_token(), BundleSet.of([bundle]), audience="db", at=NOW)


@pytest.mark.parametrize("use", ["wit-svid", "x509-svid", "sig", "JWT-SVID"])
def test_keys_for_another_use(use: str) -> None:
    """JWT-27: a token by a key that the bundle document holds for another use is refused."""
    document = json.loads(bundle_to_document(a_bundle()))
    entry = next(one for one in document["keys"] if one["kid"] == "ES256")
    assert verify_jwt_svid(a_token(), BundleSet.of([_read(document)]), audience="db", at=NOW)
    entry["use"] = use
    with pytest.raises(JwtSvidError, match="not among its trust domain's"):
        verify_jwt_svid(a_token(), BundleSet.of([_read(document)]), audience="db", at=NOW)


@pytest.mark.parametrize(
    ("member", "value", "good"),
    [
        ("alg", "ES256", True), ("alg", "ES384", False), ("alg", "ES521", False),
        ("alg", "ECDH-ES", False), ("alg", "HS256", False), ("alg", None, False),
        ("key_ops", ["verify"], True), ("key_ops", ["sign", "verify"], True),
        ("key_ops", ["encrypt"], False), ("key_ops", [], False), ("key_ops", "verify", False),
    ],
)  # fmt: skip
def test_what_an_entry_says_of_its_key(member: str, value: Any, good: bool) -> None:
    """JWT-27, SEC-45: an entry whose alg or key_ops name another use lends no key."""
    document = json.loads(bundle_to_document(a_bundle()))
    next(one for one in document["keys"] if one["kid"] == "ES256")[member] = value
    known = BundleSet.of([_read(document)])
    if good:
        assert verify_jwt_svid(a_token(), known, audience="db", at=NOW)
    else:
        with pytest.raises(JwtSvidError, match="not among its trust domain's"):
            verify_jwt_svid(a_token(), known, audience="db", at=NOW)


def _read(document: dict[str, Any]) -> Bundle:
    return bundle_from_document(TD, json.dumps(document).encode())


def test_the_key_of_an_x509_authority() -> None:
    """JWT-27: a token by the key of an X.509 authority is refused."""
    authority = an_x509_authority(which="ca")
    bundle = Bundle(TD, (authority,), a_bundle().jwt_authorities)
    for kid in (authority.authority_id, "ES256"):
        text = a_token(header=header_of(kid=kid), key=a_key("p256", "ca"))
        with pytest.raises(JwtSvidError):
            verify_jwt_svid(text, BundleSet.of([bundle]), audience="db", at=NOW)


# What we accept: claims.


@pytest.mark.parametrize("name", ["iss", "jti", "nbf", "https://x.example/claim", "azp"])
def test_other_claims(name: str) -> None:
    """JWT-09, JWT-29: further claims do no harm, and jti is not tracked."""
    value: Any = SECONDS if name == "nbf" else "x"
    text = a_token(**{name: value})
    assert verified(text).claims[name] == value
    assert verified(text) == verified(text)


@pytest.mark.parametrize(
    "subject",
    [
        MISSING, None, 1, True, [], {}, ["spiffe://example.org/w"], "", "w", "example.org/w",
        "https://example.org/w", "spiffe://", "spiffe://example.org/", "SPIFFE://example.org/w",
        "spiffe://Example.org/w", "spiffe://example.org//w", "spiffe://example.org/w\n",
        "spiffe://example.org/w\u0000", "spiffe://example.org/ä", "spiffe://example.org/w?x",
        "spiffe://example.org/" + "w" * 2028,
    ],
)  # fmt: skip
def test_subjects(subject: Any) -> None:
    """JWT-10, JWT-31: sub is a SPIFFE ID by all of its rules, or the token is refused."""
    refused(a_token(sub=subject), "subject")


def test_a_subject_without_a_path() -> None:
    """JWT-10, C-21: a foreign issuer may name the trust domain itself."""
    assert verified(a_token(sub="spiffe://example.org")).spiffe_id == TD.id


@pytest.mark.parametrize(
    "audience",
    [
        MISSING, None, "", [], [""], [1], ["db", 1], ["db", ""], ["db", None], {}, {"db": 1},
        True, 1, [["db"]],
    ],
)  # fmt: skip
def test_audiences_that_are_none(audience: Any) -> None:
    """JWT-12, JWT-31: a token without a proper audience is refused."""
    refused(a_token(aud=audience), "audience")


@pytest.mark.parametrize(
    ("audience", "ours", "good"),
    [
        ("db", "db", True), (["db"], "db", True), (["cache", "db"], "db", True),
        (["DB"], "db", False), (["db "], "db", False), (["dbx"], "db", False),
        (["d"], "db", False), ("db", "d", False), ("db,cache", "db", False),
        (["db/"], "db", False), (["cache"], "db", False), (["*"], "db", False),
        ("spiffe://example.org/db", "spiffe://example.org/db", True),
        ("spiffe://example.org/db", "spiffe://example.org", False),
        (["Ä"], "Ä", True), (["A\u0308"], "Ä", False),
    ],
)  # fmt: skip
def test_audience_is_an_exact_member(audience: Any, ours: str, good: bool) -> None:
    """JWT-12, JWT-20, IOP-29: our own name is among the audiences, character for character."""
    text = a_token(aud=audience)
    if good:
        assert ours in verified(text, audience=ours).audience
    else:
        refused(text, "another audience", audience=ours)


def test_a_validator_without_a_name() -> None:
    """JWT-12: without an audience of its own a validator accepts nothing."""
    refused(a_token(), "audience to expect is missing", audience="")


@pytest.mark.parametrize("expiry", [MISSING, None, str(SECONDS + 300), True, [], {}, "soon"])
def test_expiry_that_is_none(expiry: Any) -> None:
    """JWT-15, JWT-16, JWT-31: a token whose exp is absent or no number is refused."""
    refused(a_token(exp=expiry), "claim exp must be a number")


@pytest.mark.parametrize(
    ("after", "leeway", "good"),
    [
        (-1, 0, True), (0, 0, False), (1, 0, False),
        (29, 30, True), (30, 30, False), (31, 30, False),
        (29, 3600, True), (30, 3600, False), (600, 3600, False),
    ],
)  # fmt: skip
def test_expiry_and_leeway(after: int, leeway: int, good: bool) -> None:
    """JWT-20, JWT-16: from exp on a token is refused; leeway moves that by 30 s at most."""
    at = NOW + timedelta(seconds=300 + after)
    if good:
        assert verified(a_token(), at=at, leeway=timedelta(seconds=leeway))
    else:
        refused(a_token(), "expired", at=at, leeway=timedelta(seconds=leeway))


@pytest.mark.parametrize(
    ("ahead", "leeway", "good"),
    [(-1, 0, True), (0, 0, True), (1, 0, False), (30, 30, True), (31, 30, False),
     (600, 600, False)],
)  # fmt: skip
def test_not_before(ahead: int, leeway: int, good: bool) -> None:
    """JWT-21: nbf, when it is there, is kept to, with leeway of 30 s at most."""
    text = a_token(nbf=SECONDS + ahead, exp=SECONDS + 3600)
    if good:
        assert verified(text, leeway=timedelta(seconds=leeway))
    else:
        refused(text, "not valid yet", leeway=timedelta(seconds=leeway))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("1772366700", True), ("1772366700.0", True), ("17723667e2", True),
        ("1.7723667e9", True),
        ("1772366700.5", False), ('"1772366700"', False), ("true", False), ("NaN", False),
        ("Infinity", False), ("1e400", False), ("-1", False), ("9007199254740993", False),
        ("0x69A42BEC", False), ("1_772_366_700", False), ("01772366700", False),
    ],
)  # fmt: skip
def test_how_exp_may_be_written(text: str, good: bool) -> None:
    """JWT-31: on receipt a whole number is one however it is written; a string is none."""
    payload = json.dumps(claims_of(exp=0)).replace('"exp": 0', f'"exp": {text}')
    sealed_ = sealed(header_of(), payload, algorithm="ES256")
    if good:
        assert verified(sealed_).expires_at == datetime(2026, 3, 1, 12, 5, tzinfo=UTC)
    else:
        refused(sealed_, "claim exp must be|cannot be read: ")


def test_a_token_is_read_without_proof_only_by_name() -> None:
    """JWT-19: reading a token unverified proves nothing, and still keeps every form rule."""
    text = a_token(key=a_key("p256", "evil"))
    assert JwtSvid.parse_unverified(text).spiffe_id.uri == "spiffe://example.org/w"
    refused(text, "does not verify")
    with pytest.raises(JwtSvidError):
        JwtSvid.parse_unverified(a_token(header=header_of(alg="none")))


def test_the_signature_is_over_the_text() -> None:
    """JWT-19: the same JSON spelt otherwise is another token."""
    header = json.dumps(header_of(), indent=1)
    signed = f"{b64(header.encode())}.{b64(json.dumps(claims_of()).encode())}"
    good = raw_signature("ES256", key_for("ES256"), signed.encode())
    assert verified(f"{signed}.{b64(good)}")
    other = f"{b64(json.dumps(header_of()).encode())}.{signed.split('.')[1]}"
    refused(f"{other}.{b64(good)}", "does not verify")
