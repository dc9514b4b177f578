"""Tokens written by hand, so that one can hold what no library would sign."""

import base64
import hashlib
import hmac
import json
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from tests.support.authorities import NOW, a_key

KEY_FOR = {
    "RS256": "rsa2048", "RS384": "rsa2048", "RS512": "rsa2048", "PS256": "rsa2048",
    "PS384": "rsa2048", "PS512": "rsa2048", "ES256": "p256", "ES384": "p384", "ES512": "p521",
}  # fmt: skip
"""The nine algorithms, and a kind of key that fits each."""

SECONDS = int(NOW.timestamp())
MISSING = object()
"""As the value of a claim or header member: leave it out."""


def b64(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def key_for(algorithm: str) -> Any:
    """The private key of the tests' trust domain that fits *algorithm*."""
    return a_key(KEY_FOR[algorithm], "jwt")


def raw_signature(algorithm: str, key: Any, data: bytes) -> bytes:
    """A JWS signature, made with whatever *key* there is."""
    if algorithm == "none":
        return b""
    if algorithm.startswith("HS"):
        return hmac.new(key, data, getattr(hashlib, f"sha{algorithm[2:]}")).digest()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    digest = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}.get(
        algorithm[2:5], hashes.SHA256()
    )
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(digest)))
        size = (key.curve.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    if algorithm.startswith("PS"):
        pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return bytes(key.sign(data, pss, digest))
    return bytes(key.sign(data, padding.PKCS1v15(), digest))


def encoded(value: Any) -> str:
    """One part of a token: text and bytes as they are, all else as JSON."""
    if isinstance(value, str):
        return b64(value.encode())
    return b64(value if isinstance(value, bytes) else json.dumps(value).encode())


def sealed(header: Any, payload: Any, *, algorithm: str, key: Any = None) -> str:
    """A token of these two parts; the signature is by *algorithm*, whatever the header says."""
    signed = f"{encoded(header)}.{encoded(payload)}"
    by = key_for(algorithm) if key is None else key
    return f"{signed}.{b64(raw_signature(algorithm, by, signed.encode()))}"


def header_of(algorithm: str = "ES256", **changes: Any) -> dict[str, Any]:
    """A right header; a member that is MISSING is left out."""
    made = {"alg": algorithm, "kid": algorithm, "typ": "JWT"} | changes
    return {name: value for name, value in made.items() if value is not MISSING}


def claims_of(**changes: Any) -> dict[str, Any]:
    """Right claims, good for five minutes; a claim that is MISSING is left out."""
    made = {
        "sub": "spiffe://example.org/w", "aud": ["db"], "exp": SECONDS + 300, "iat": SECONDS,
    } | changes  # fmt: skip
    return {name: value for name, value in made.items() if value is not MISSING}


def a_token(
    algorithm: str = "ES256", *, header: Any = None, key: Any = None, **claims: Any
) -> str:
    """A right JWT-SVID, but for the *claims* or the *header* that the test changes."""
    return sealed(
        header or header_of(algorithm), claims_of(**claims), algorithm=algorithm, key=key
    )


def a_bundle(name: str = "example.org", which: str = "jwt") -> Bundle:
    """A bundle whose JWT authorities are one key for each algorithm, with its name as kid."""
    return Bundle(
        TrustDomain(name),
        jwt_authorities=tuple(
            JwtAuthority(algorithm, spki_of(a_key(kind, which).public_key()))
            for algorithm, kind in KEY_FOR.items()
        ),
    )


def bundles(*more: Bundle) -> BundleSet:
    """The bundle of example.org, and *more*."""
    return BundleSet.of([a_bundle(), *more])
