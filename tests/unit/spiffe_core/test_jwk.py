"""Public keys as JWK members."""

import json
import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import ECKey, OKPKey, RSAKey

from spiffe_core.errors import MalformedError
from spiffe_core.jwk import PRIVATE_MEMBERS, JwkError, key_of_jwk, members_of
from spiffe_core.keys import spki_of
from spiffe_core.strictjson import b64url_decode, b64url_encode
from tests.support.authorities import a_key

KINDS = ["p256", "p384", "p521", "rsa2048", "ed25519"]
SIZES = {"P-256": 32, "P-384": 48, "P-521": 66}
EC_CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def jwk(kind: str = "p256", **changes: Any) -> dict[str, Any]:
    """A correct JWK; a change to None takes a member away."""
    made = {**members_of(a_key(kind).public_key()), **changes}
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_go_and_come_back(kind: str) -> None:
    """IOP-15: RSA, the three EC curves and Ed25519 are written, and read as the same key."""
    key = a_key(kind).public_key()
    assert spki_of(key_of_jwk(members_of(key))) == spki_of(key)


@pytest.mark.parametrize("kind", KINDS)
def test_others_read_them_alike(kind: str) -> None:
    """Another library reads our members as the same key, and we read its own."""
    reader = {"EC": ECKey, "RSA": RSAKey, "OKP": OKPKey}[jwk(kind)["kty"]]
    theirs: Any = reader.import_key(jwk(kind))  # type: ignore[attr-defined]
    assert spki_of(theirs.public_key) == spki_of(a_key(kind).public_key())
    assert spki_of(key_of_jwk(theirs.as_dict(private=False))) == spki_of(theirs.public_key)


@pytest.mark.parametrize("kind", KINDS)
def test_sec_45_public_members_alone(kind: str) -> None:
    """What is written has public members and nothing else (JWT-24, BUNDLE-18)."""
    assert not PRIVATE_MEMBERS & jwk(kind).keys()
    assert set(jwk(kind)) <= {"kty", "crv", "x", "y", "n", "e"}


@settings(max_examples=60)
@given(st.sampled_from(sorted(EC_CURVES)), st.integers(1, 2**16))
def test_iop_14_coordinates_have_full_length(curve: str, secret: int) -> None:
    """EC coordinates are 32, 48 or 66 bytes however small the number is, without padding."""
    key = ec.derive_private_key(secret, EC_CURVES[curve]).public_key()
    made = members_of(key)
    assert {len(b64url_decode(made[name])) for name in ("x", "y")} == {SIZES[curve]}
    assert "=" not in made["x"] + made["y"]
    assert spki_of(key_of_jwk(made)) == spki_of(key)


def test_iop_14_a_coordinate_that_begins_with_zeros() -> None:
    """Keys whose x or y needs padding in front are written and read right."""
    short = 0
    for secret in range(1, 1500):
        numbers = ec.derive_private_key(secret, ec.SECP256R1()).public_key().public_numbers()
        if max(numbers.x.bit_length(), numbers.y.bit_length()) <= 256 and (
            min(numbers.x, numbers.y).bit_length() <= 248
        ):
            short += 1
            made = members_of(numbers.public_key())
            assert len(made["x"]) == len(made["y"]) == 43
            assert key_of_jwk(made).public_numbers() == numbers  # type: ignore[union-attr]
    assert short >= 5


def test_an_rsa_number_has_no_zeros_in_front() -> None:
    """RFC 7518 6.3.1.1: n and e are written in as few bytes as they need."""
    made = members_of(a_key("rsa2048").public_key())
    assert made["e"] == "AQAB"
    assert len(b64url_decode(made["n"])) == 256
    assert b64url_decode(made["n"])[0] != 0


def test_an_rsa_modulus_with_a_zero_in_front_is_read() -> None:
    """Some writers put a zero byte before n; the key is the same."""
    modulus = b"\x00" + b64url_decode(jwk("rsa2048")["n"])
    read = key_of_jwk(jwk("rsa2048", n=b64url_encode(modulus)))
    assert spki_of(read) == spki_of(a_key("rsa2048").public_key())


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("p256", {"kty": None}, "kty"),
        ("p256", {"kty": "ec"}, "kty"),
        ("p256", {"kty": "oct"}, "kty"),
        ("p256", {"kty": "AKP"}, "kty"),
        ("p256", {"kty": ["EC"]}, "kty"),
        ("p256", {"kty": 1}, "kty"),
        ("p256", {"crv": None}, "crv"),
        ("p256", {"crv": "secp256k1"}, "crv"),
        ("p256", {"crv": "p-256"}, "crv"),
        ("p256", {"crv": "P-384"}, "wrong length"),
        ("p256", {"crv": "Ed25519"}, "crv"),
        ("p256", {"x": None}, "member x of a key is missing"),
        ("p256", {"y": None}, "member y of a key is missing"),
        ("p256", {"y": 7}, "member y of a key is missing"),
        ("p256", {"x": ""}, "wrong length"),
        ("p256", {"x": b64url_encode(b"\x01" * 31)}, "wrong length"),
        ("p256", {"x": b64url_encode(b"\x00" + b"\x01" * 32)}, "wrong length"),
        ("p256", {"x": b64url_encode(b"\x01" * 32)}, "point of its curve"),
        ("p256", {"x": b64url_encode(b"\xff" * 32)}, "point of its curve"),
        ("p256", {"x": b64url_encode(b"\x00" * 32), "y": b64url_encode(b"\x00" * 32)}, "point"),
        ("p256", {"x": jwk()["x"] + "="}, "base64url"),
        ("p256", {"x": jwk()["x"][:-1] + "\n"}, "base64url"),
        ("p256", {"x": "+" * 43}, "base64url"),
        ("p256", {"x": "A" * 10_000_000}, "wrong length"),
        ("rsa2048", {"n": None}, "member n of a key is missing"),
        ("rsa2048", {"e": None}, "member e of a key is missing"),
        ("rsa2048", {"e": 65537}, "member e of a key is missing"),
        ("rsa2048", {"e": "AQ"}, "RSA key is not one"),
        ("rsa2048", {"e": "Aw"}, "exponent 65537"),
        ("rsa2048", {"e": "AA"}, "RSA key is not one"),
        ("rsa2048", {"e": b64url_encode(b"\x01" * 9)}, "wrong length"),
        ("rsa2048", {"n": b64url_encode(b"\xff" * 128)}, "2048 to 4096"),
        ("rsa2048", {"n": b64url_encode(b"\xff" * 514)}, "wrong length"),
        ("rsa2048", {"n": b64url_encode(b"\xff" * 513)}, "2048 to 4096"),
        ("rsa2048", {"n": b64url_encode(b"\xff" * 1_000_000)}, "wrong length"),
        ("rsa2048", {"n": ""}, "wrong length"),
        ("ed25519", {"crv": "Ed448"}, "crv"),
        ("ed25519", {"crv": "X25519"}, "crv"),
        ("ed25519", {"x": None}, "member x of a key is missing"),
        ("ed25519", {"x": b64url_encode(b"\x01" * 31)}, "wrong length"),
        ("ed25519", {"x": b64url_encode(b"\x01" * 57)}, "wrong length"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else ",".join(value),
)
def test_what_is_no_key(kind: str, changes: dict[str, Any], reason: str) -> None:
    """A member that is absent, of another type, length or spelling makes it no key."""
    with pytest.raises(MalformedError, match=reason):
        key_of_jwk(jwk(kind, **changes))


def test_other_members_are_ignored() -> None:
    """kid, use, alg, key_ops, x5c and unknown members say nothing about the key."""
    extra = {"kid": 5, "use": "enc", "alg": "none", "key_ops": 1, "x5c": "?", "z": {}}
    assert spki_of(key_of_jwk(jwk(**extra))) == spki_of(a_key().public_key())


@pytest.mark.parametrize("kind", ["ed448", "dsa", "k256", "p224"])
def test_iop_15_exotic_keys_are_not_published(kind: str) -> None:
    """A key that readers cannot skip is never written."""
    with pytest.raises(JwkError, match="not published"):
        members_of(a_key(kind).public_key())
    with pytest.raises(JwkError, match="not published"):
        members_of(x25519.X25519PrivateKey.generate().public_key())


MEMBERS = st.sampled_from(["kty", "crv", "x", "y", "n", "e", "use", "kid"])
VALUES = (
    st.none()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(
        ["EC", "RSA", "OKP", "P-256", "P-384", "P-521", "Ed25519", "AQAB", "A" * 43]
    )
    | st.lists(st.text(max_size=3), max_size=2)
)


@given(st.dictionaries(MEMBERS, VALUES), st.sampled_from([None, *KINDS]))
def test_any_members(changes: dict[str, Any], kind: str | None) -> None:
    """Any object, and real keys with members replaced, give a key or our own error."""
    entry = changes if kind is None else {**members_of(a_key(kind).public_key()), **changes}
    try:
        key = key_of_jwk(json.loads(json.dumps(entry)))
    except MalformedError:
        return
    assert members_of(key)["kty"] == entry["kty"]


def test_random_rsa_moduli() -> None:
    """RSA keys of sizes from 2048 to 4096 bits come back with the same numbers."""
    rng = random.Random(3)
    for bits in (2048, 2056, 3072, 4088, 4096):
        modulus = rng.getrandbits(bits) | 1 << (bits - 1) | 1
        key = rsa.RSAPublicNumbers(65537, modulus).public_key()
        read: Any = key_of_jwk(members_of(key))
        assert read.public_numbers().n == modulus
