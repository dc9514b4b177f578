"""
Hostile tokens: algorithms, headers, claims, sizes and signatures (SEC-40 to SEC-46).

Over 500 lines: the tables of one subject stay together.
"""

import base64
import json
import re
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.jwtsvid import (
    ALGORITHMS,
    MAX_TOKEN_BYTES,
    JwtSvid,
    JwtSvidError,
    algorithms_of,
    verify_jwt_svid,
)
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from tests.support.authorities import NOW, a_key
from tests.support.issuing import TD
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

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spiffe_core", "spiffe_wire", "ca", "issuer", "workload_api", "migrations")
ORDER = {
    "ES256": 2**256 - 2**224 + 2**192 - 0x4319055258E8617B0C46353D039CDAAF,
    "ES384": 2**384 - 0x389CB27E0BC8D220A7E5F24DB74F58851313E695333AD68D,
    "ES512": 2**521 - 0x5AE79787C40D069948033FEB708F65A2FC44A36477663B851449048E16EC79BF7,
}
"""The orders n of the three curves' groups."""


def verified(text: str, **more: Any) -> JwtSvid:
    """What the tests' bundle proves of a token."""
    return verify_jwt_svid(text, bundles(), **{"audience": "db", "at": NOW} | more)


def refused(text: str, match: str, **more: Any) -> None:
    """The token proves nothing, and the text names the rule but not the token."""
    with pytest.raises(JwtSvidError, match=match) as caught:
        verified(text, **more)
    assert text[:40] not in str(caught.value) or not text


# SEC-40: the algorithm follows the key.


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048", "rsa4096"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sec_40_algorithm_by_key(algorithm: str, kind: str) -> None:
    """SEC-40: of nine algorithms and every kind of key, exactly the pairs that fit verify."""
    key = a_key(kind, "jwt")
    authority = JwtAuthority("k", spki_of(key.public_key()))
    known = BundleSet.of([Bundle(TD, jwt_authorities=(authority,))])
    text = a_token(algorithm, header=header_of(algorithm, kid="k"), key=key)
    fits = kind == KEY_FOR[algorithm] or (kind.startswith("rsa") and algorithm[0] in "RP")

    assert (algorithm in algorithms_of(key.public_key())) == fits
    if fits:
        assert verify_jwt_svid(text, known, audience="db", at=NOW)
    else:
        with pytest.raises(JwtSvidError, match="algorithm does not fit the key"):
            verify_jwt_svid(text, known, audience="db", at=NOW)


@pytest.mark.parametrize("claimed", [one for one in KEY_FOR if one[0] in "RP"])
@pytest.mark.parametrize("used", [one for one in KEY_FOR if one[0] in "RP"])
def test_sec_40_swaps_in_one_family(used: str, claimed: str) -> None:
    """SEC-40: an RSA signature by one algorithm is not one by another."""
    header = header_of(claimed, kid="RS256")
    text = sealed(header, claims_of(), algorithm=used)
    if used == claimed:
        assert verified(text)
    else:
        refused(text, "does not verify")


@pytest.mark.parametrize(("kid", "digest"), [("ES256", "ES384"), ("ES384", "ES256")])
def test_sec_40_another_hash_on_the_curve(kid: str, digest: str) -> None:
    """SEC-40: the curve's own hash is the only one."""
    text = sealed(header_of(kid), claims_of(), algorithm=digest, key=key_for(kid))
    refused(text, "does not verify")


@pytest.mark.parametrize("kind", ["p224", "k256", "brainpool", "rsa1024", "ed25519", "ed448"])
def test_sec_40_keys_that_no_algorithm_fits(kind: str) -> None:
    """SEC-40, SEC-15: a key that none of the nine fits is no JWT authority."""
    assert algorithms_of(a_key(kind).public_key()) == () or kind == "rsa1024"
    with pytest.raises(MalformedError):
        JwtAuthority("k", spki_of(a_key(kind).public_key()))


def test_sec_40_no_road_to_symmetric_algorithms() -> None:
    """SEC-40: the list of algorithms holds no HMAC and no none."""
    assert sorted(ALGORITHMS) == sorted(KEY_FOR)


# SEC-41: headers.

HOSTILE: dict[str, list[Any]] = {
    "crit": [["b64"], ["exp"], [], None, "x"],
    "b64": [False, True, None],
    "zip": ["DEF", "", None],
    "jwk": [{"kty": "EC"}, {}, None],
    "jku": ["https://evil.test/keys", "file:///etc/passwd", "", None],
    "x5u": ["https://evil.test/cert", "", None],
    "x5c": [["MIIB"], [], None],
    "x5t": ["AAAA", None],
    "x5t#S256": ["AAAA", None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in HOSTILE for value in HOSTILE[name]]
)
def test_sec_41_hostile_members(name: str, value: Any) -> None:
    """SEC-41, JWT-03: members that bring keys, or change how a token is read, are refused."""
    refused(a_token(header=header_of(**{name: value})), "a member that a JWT-SVID may not have")


def test_sec_41_a_key_in_the_header() -> None:
    """SEC-41: a token that brings the very key it is signed by is refused, whatever its kid."""
    key = a_key("p256", "evil")
    numbers = key.public_key().public_numbers()
    jwk = {
        "kty": "EC", "crv": "P-256", "x": b64(numbers.x.to_bytes(32, "big")),
        "y": b64(numbers.y.to_bytes(32, "big")),
    }  # fmt: skip
    refused(a_token(header=header_of(jwk=jwk), key=key), "a member that")
    refused(a_token(header=header_of(kid=json.dumps(jwk)), key=key), "not among")


@pytest.mark.parametrize("name", ["cty", "x", "iss", "url", "nonce", "epk", "enc"])
def test_sec_41_harmless_members(name: str) -> None:
    """C-15: other unknown members are passed over, as other validators do."""
    assert verified(a_token(header=header_of(**{name: "x"})))


@pytest.mark.parametrize(
    "kid",
    [
        MISSING, None, "", 1, True, ["ES256"], {"kid": "ES256"}, "es256", "ES256 ", " ES256",
        "ES256\0", "ES257", "../ES256", "ES256' OR 1=1", "*", "%", "ES256\n", "\uff25S256",
        "x" * 256, "ä" * 128,
    ],
)  # fmt: skip
def test_sec_41_kid(kid: Any) -> None:
    """SEC-41: kid is required, at most 255 bytes, and is looked up exactly as it stands."""
    refused(a_token(header=header_of(kid=kid)), "key")


def test_sec_41_the_longest_kid() -> None:
    """SEC-41: a kid of 255 bytes is found; they are counted as bytes."""
    for kid in ("k" * 255, "ä" * 127):
        authority = JwtAuthority(kid, spki_of(key_for("ES256").public_key()))
        known = BundleSet.of([Bundle(TD, jwt_authorities=(authority,))])
        text = a_token(header=header_of(kid=kid))
        assert verify_jwt_svid(text, known, audience="db", at=NOW).key_id == kid


@pytest.mark.parametrize(
    "header",
    [
        '{"alg":"ES256","kid":"ES256","alg":"ES256"}',
        '{"alg":"none","alg":"ES256","kid":"ES256"}',
        '{"alg":"ES256","kid":"x","kid":"ES256"}',
        '{"alg":"ES256","\\u0061lg":"none","kid":"ES256"}',
        '{"alg":"ES256","kid":"ES256"}x',
        '{"alg":"ES256","kid":"ES256"',
        '["ES256"]',
        '"ES256"',
        "null",
        "1",
        "",
        "{}",
        "{'alg':'ES256','kid':'ES256'}",
        '{"alg":"ES256","kid":"ES256","x":NaN}',
        '{"alg":"ES256","kid":"ES256","x":"\\ud800"}',
        '{"alg":"ES256","kid":"ES256","x":1e999}',
        '{"alg":"ES256","kid":"ES256",}',
        b'{"alg":"ES256","kid":"ES256","x":"\xff"}',
        b'\xef\xbb\xbf{"alg":"ES256","kid":"ES256"}',
    ],
)
def test_sec_41_headers_with_two_readings(header: str | bytes) -> None:
    """SEC-41: a header that two readers could read differently is refused, signed as it is."""
    assert verified(sealed('{"alg":"ES256","kid":"ES256"}', claims_of(), algorithm="ES256"))
    refused(sealed(header, claims_of(), algorithm="ES256"), "^token ")


WATCHED = """
import sys
from datetime import timedelta
from tests.support.authorities import NOW
from tests.support.tokens import a_token, bundles, header_of
from spiffe_core.jwtsvid import JwtSvidError, verify_jwt_svid

known = bundles()
headers = [header_of(**{name: "https://127.0.0.1:1/x"})
           for name in ("jku", "x5u", "x5c", "x5t", "jwk", "crit", "b64", "zip")]
headers += [header_of(kid="file:///etc/passwd"), header_of()]
tokens = [a_token(header=one) for one in headers]
seen = []

def verify(text):
    try:
        verify_jwt_svid(text, known, audience="db", at=NOW)
    except JwtSvidError:
        return False
    return True

verify(tokens[-1])
sys.addaudithook(lambda event, args: seen.append(event))
good = [verify(one) for one in tokens]
families = ("open", "socket", "subprocess", "os", "import")
touched = [one for one in seen if one.split(".")[0] in families]
print(good.count(True), touched)
"""


def test_sec_41_no_file_no_network() -> None:
    """SEC-41: nothing that a header says makes the validator open a file or a socket."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1 []"


# SEC-42: claims.

NUMBERS = [None, True, False, "1772366700", "", 1.5, -1, 2**53 + 1, -(2**60), [], {}, [SECONDS],
           {"s": 1}, 1e300, -0.5]  # fmt: skip
SUBJECTS = [MISSING, None, 1, True, [], {}, "", "w", "spiffe://", "spiffe://example.org/",
            "spiffe:///w", "http://example.org/w", "spiffe://example.org/%2e", "\x00",
            "spiffe://example.org/../w"]  # fmt: skip
AUDIENCES = [MISSING, None, 1, True, {}, "", [], [""], [None], [1], ["db", 2], ["db", ""],
             [["db"]], "cache", ["cache"]]  # fmt: skip
MUTATIONS = [
    *(("exp", value) for value in [MISSING, *NUMBERS, SECONDS - 31, 0]),
    *(("iat", value) for value in [*NUMBERS, SECONDS + 301]),
    *(("nbf", value) for value in [*NUMBERS, SECONDS + 31]),
    *(("sub", value) for value in SUBJECTS),
    *(("aud", value) for value in AUDIENCES),
]


def test_sec_42_there_are_sixty() -> None:
    """SEC-42: at least 60 mutations of the claims are tried."""
    assert len(MUTATIONS) >= 60


@pytest.mark.parametrize(("name", "value"), MUTATIONS)
def test_sec_42_mutations(name: str, value: Any) -> None:
    """SEC-42: one wrong claim, by type, range or value, and a well-signed token is refused."""
    assert verified(a_token())
    refused(a_token(**{name: value}), "^token ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iat", SECONDS + 300), ("iat", SECONDS), ("iat", 0), ("iat", MISSING),
        ("nbf", SECONDS + 30), ("nbf", 0), ("nbf", float(SECONDS)), ("exp", SECONDS - 29),
        ("exp", 253402300799), ("exp", float(SECONDS + 300)),
        ("aud", "db"), ("aud", ["x", "db"]),
    ],
)  # fmt: skip
def test_sec_42_the_last_good_values(name: str, value: Any) -> None:
    """SEC-42, JWT-20: values at the edge are still good, the end of year 9999 among them."""
    assert verified(a_token(**{name: value}))


def test_sec_42_beyond_the_calendar() -> None:
    """SEC-42: an exp that fits 2**53 and no calendar is refused by our own error."""
    refused(a_token(exp=2**53), "out of range")


def test_sec_42_iat_of_a_fast_clock() -> None:
    """SEC-42, SEC-111: iat may be five minutes ahead of us, as the issuer's clock may be."""
    text = a_token(iat=SECONDS + 300, exp=SECONDS + 600)
    assert verified(text)
    refused(a_token(iat=SECONDS + 301, exp=SECONDS + 600), "issued in the future")


@pytest.mark.parametrize("leeway", [-60, 0, 30, 31, 3600, 10**9])
def test_sec_42_leeway_has_a_cap(leeway: int) -> None:
    """SEC-42: no caller gets more than 30 s of leeway."""
    spare = min(leeway, 30)
    at = NOW + timedelta(seconds=300 + spare)
    assert verified(a_token(), at=at - timedelta(seconds=1), leeway=timedelta(seconds=leeway))
    refused(a_token(), "expired", at=at, leeway=timedelta(seconds=leeway))


@pytest.mark.parametrize("zone", [timedelta(hours=-11), timedelta(hours=13, minutes=45)])
def test_sec_42_the_instant_may_be_in_any_zone(zone: timedelta) -> None:
    """SEC-42: the same instant in another time zone gives the same answer."""
    at = (NOW + timedelta(seconds=329)).astimezone(timezone(zone))
    assert verified(a_token(), at=at)
    refused(a_token(), "expired", at=at + timedelta(seconds=1))


GOOD = '"sub":"spiffe://example.org/w","aud":"db","exp":1772366700'


@pytest.mark.parametrize(
    "payload",
    [
        "", "null", "[]", '"x"', "1", "{", "{}", '{"sub":"spiffe://example.org/w"}',
        f'{{"sub":"spiffe://example.org/v",{GOOD}}}', f'{{"aud":"x",{GOOD}}}',
        f'{{"exp":1,{GOOD}}}', f'{{{GOOD}}}{{}}', f'{{{GOOD},"x":NaN}}',
        f'{{{GOOD},"x":"\\udfff"}}', f'{{{GOOD},"x":1{"0" * 5000}}}',
        f'{{{GOOD},"x":{"[" * 40}{"]" * 40}}}', f'{{{GOOD},"x":"'.encode() + b'\xc3"}',
    ],
)  # fmt: skip
def test_sec_42_payloads_with_two_readings(payload: str | bytes) -> None:
    """SEC-42: a payload that two readers could read differently is refused, signed as it is."""
    assert verified(sealed(header_of(), f"{{{GOOD}}}", algorithm="ES256"))
    refused(sealed(header_of(), payload, algorithm="ES256"), "^token ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["sub", "aud", "exp", "iat", "nbf", "jti"]), JSON))
def test_sec_42_any_claims(changes: dict[str, Any]) -> None:
    """SEC-42: whatever the claims hold, the answer is a right SVID or our error."""
    payload = json.dumps(claims_of() | changes)
    try:
        found = verified(sealed(header_of(), payload, algorithm="ES256"))
    except JwtSvidError:
        return
    assert "db" in found.audience
    assert NOW - timedelta(seconds=30) < found.expires_at


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=".AeyJ0-_=", max_size=60))
def test_sec_41_any_text(text: str) -> None:
    """SEC-41: no text that is no token raises anything but our error."""
    with pytest.raises(JwtSvidError):
        verified(text)
    with pytest.raises(JwtSvidError):
        JwtSvid.parse_unverified(text)


# SEC-43: sizes.


def sized(size: int) -> str:
    """A good token of exactly *size* characters."""
    short = size * 3 // 4 - 260
    made = (
        a_token(header=header_of(x="h" * head), x="p" * (short + spare))
        for head in range(3)
        for spare in range(100)
    )
    return next(text for text in made if len(text) == size)


def test_sec_43_token_size() -> None:
    """SEC-43: a token of 16 KiB is read, one over it is refused."""
    assert verified(sized(16384))
    refused(sized(16385), "longer than 16 KiB")
    refused("x" * 16385, "longer than 16 KiB")


@pytest.mark.parametrize("fill", [".", "a.", "A", "eyJ", "\0", "é"])
def test_sec_43_long_texts_cost_nothing(fill: str) -> None:
    """SEC-43: 64 MiB of dots, or of anything, are refused without a copy."""
    text = fill * (64 * 1024 * 1024 // len(fill))
    tracemalloc.start()
    try:
        with pytest.raises(JwtSvidError, match="longer than 16 KiB"):
            verified(text)
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


def test_sec_43_dots_within_the_limit() -> None:
    """SEC-43: 16 KiB of dots make four parts at most, and are refused."""
    refused("." * MAX_TOKEN_BYTES, "three parts")
    refused("." * 2, "cannot be read")


@pytest.mark.parametrize(("depth", "good"), [(7, True), (8, False), (31, False), (2000, False)])
def test_sec_43_header_depth(depth: int, good: bool) -> None:
    """SEC-43: a header is at most eight levels deep, itself counted."""
    inner = "[" * depth + "]" * depth
    text = sealed(
        f'{{"alg":"ES256","kid":"ES256","x":{inner}}}', claims_of(), algorithm="ES256"
    )
    if good:
        assert verified(text)
    else:
        refused(text, "nested deeper than 8")


def test_sec_43_a_jwe_is_never_opened() -> None:
    """SEC-43: five parts are refused for their number, whatever the first one says."""
    header = b64(json.dumps({"alg": "dir", "enc": "A128GCM", "zip": "DEF"}).encode())
    refused(f"{header}..AAAA.{'A' * 8000}.AAAA", "three parts")


# SEC-44: signatures.


def resigned(algorithm: str, change: Any) -> str:
    """A good token whose raw signature went through *change*."""
    signed, _, signature = a_token(algorithm).rpartition(".")
    return f"{signed}.{b64(change(base64.urlsafe_b64decode(signature + '==')))}"


@pytest.mark.parametrize("algorithm", KEY_FOR)
@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[1:], lambda raw: raw + b"\0",
        lambda raw: b"\0" + raw, lambda raw: raw * 2, lambda raw: raw[: len(raw) // 2],
        lambda raw: bytes(len(raw)), lambda raw: b"\xff" * len(raw),
        lambda raw: raw[len(raw) // 2 :] + raw[: len(raw) // 2],
    ],
    ids=["none", "one less", "cut in front", "one more", "a zero in front", "twice", "half",
         "zeros", "ones", "halves swapped"],
)  # fmt: skip
def test_sec_44_lengths_and_values(algorithm: str, change: Any) -> None:
    """SEC-44: a signature has exactly its length, for RSA that of the modulus."""
    refused(resigned(algorithm, change), "signature")


@pytest.mark.parametrize("algorithm", ORDER)
def test_the_orders(algorithm: str) -> None:
    """SEC-44: the tests' orders are right: n-1 is the private key of minus the base point."""
    curve = key_for(algorithm).curve
    base = ec.derive_private_key(1, curve).public_key().public_numbers()
    minus = ec.derive_private_key(ORDER[algorithm] - 1, curve).public_key().public_numbers()
    assert (minus.x, minus.y != base.y) == (base.x, True)


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512"])
@pytest.mark.parametrize("r", ["0", "1", "n", "n+1", "same"])
@pytest.mark.parametrize("s", ["0", "1", "n", "n+1", "s+n", "same"])
def test_sec_44_r_and_s_are_in_range(algorithm: str, r: str, s: str) -> None:
    """SEC-44: r and s of 0, of n and beyond are refused, in every pairing."""
    order = ORDER[algorithm]

    def change(raw: bytes) -> bytes:
        half = len(raw) // 2
        made = b""
        for old, wanted in ((raw[:half], r), (raw[half:], s)):
            own = int.from_bytes(old, "big")
            known = {"0": 0, "1": 1, "n": order, "n+1": order + 1, "same": own,
                     "s+n": own + order}  # fmt: skip
            made += (known[wanted] % (1 << half * 8)).to_bytes(half, "big")
        return made

    text = resigned(algorithm, change)
    if r == s == "same":
        assert verified(text)
    else:
        refused(text, "signature")


@pytest.mark.parametrize("algorithm", ["RS256", "PS256"])
def test_sec_44_rsa_signature_beyond_the_modulus(algorithm: str) -> None:
    """SEC-44: a signature plus the modulus is the same number to RSA, and another to us."""
    key = key_for(algorithm)
    modulus = key.public_key().public_numbers().n
    for _ in range(8):
        text = resigned(
            algorithm,
            lambda raw: ((int.from_bytes(raw, "big") + modulus) % (1 << len(raw) * 8)).to_bytes(
                len(raw), "big"
            ),
        )
        refused(text, "does not verify")


def test_sec_44_rsa_signature_with_a_leading_zero() -> None:
    """SEC-44: an RSA signature keeps its leading zero; without it it is refused."""
    key = key_for("RS256")
    for number in range(5000):
        payload = json.dumps(claims_of(n=number))
        signed = f"{b64(json.dumps(header_of('RS256')).encode())}.{b64(payload.encode())}"
        raw = raw_signature("RS256", key, signed.encode())
        if raw[0] == 0:
            assert verified(f"{signed}.{b64(raw)}")
            refused(f"{signed}.{b64(raw[1:])}", "does not verify")
            return
    pytest.fail("no signature with a leading zero")


@pytest.mark.parametrize("salt", [0, 20, 31, 33, "max"])
def test_sec_44_pss_salt(salt: Any) -> None:
    """SEC-44: the salt of a PS256 signature is exactly as long as its hash."""
    key = key_for("PS256")
    assert isinstance(key, rsa.RSAPrivateKey)
    length = padding.PSS.MAX_LENGTH if salt == "max" else salt
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), length)
    signed = a_token("PS256").rpartition(".")[0]
    refused(f"{signed}.{b64(key.sign(signed.encode(), pss, hashes.SHA256()))}", "not verify")


# SEC-46: nothing is trusted by default.


@pytest.mark.parametrize(
    "known", [BundleSet(), BundleSet.of([Bundle(TD)]), BundleSet.of([a_bundle("other.test")])]
)
def test_sec_46_no_keys_no_tokens(known: BundleSet) -> None:
    """SEC-46: without the trust domain's own keys every token is refused."""
    with pytest.raises(JwtSvidError, match="no JWT authority is known"):
        verify_jwt_svid(a_token(), known, audience="db", at=NOW)


def test_sec_46_no_key_in_the_product() -> None:
    """SEC-46: no file of the product holds key material."""
    blob = re.compile(r"[A-Za-z0-9+/_-]{100,}|BEGIN [A-Z ]*PRIVATE KEY-----\\n?[A-Za-z0-9]|"
                      r"(?:\\x[0-9a-f]{2}){32,}|0x[0-9a-fA-F]{48,}")  # fmt: skip
    found = [
        f"{path.relative_to(ROOT)}: {match[0][:20]}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "pb" not in path.relative_to(ROOT).parts
        for match in blob.finditer(path.read_text())
    ]
    assert found == []


def test_sec_90_a_token_is_in_no_repr() -> None:
    """SEC-90, JWT-30: a JWT-SVID's repr holds neither the token nor its claims."""
    text = a_token(secret="canary-value")
    shown = repr(verified(text))
    assert text not in shown
    assert "canary" not in shown


def test_a_foreign_trust_domain_is_judged_by_the_same_rules() -> None:
    """SEC-42: a foreign trust domain's tokens are verified with its own bundle, as ours are."""
    known = bundles(a_bundle("partner.test", "partner"))
    text = a_token(sub="spiffe://partner.test/w", key=a_key("p256", "partner"))
    found = verify_jwt_svid(text, known, audience="db", at=datetime(2026, 3, 1, 12, tzinfo=UTC))
    assert found.spiffe_id.trust_domain == TrustDomain("partner.test")
