"""
Target 5: JWT-SVIDs against the bare signature.

Signing is `ca.jwt.sign_jwt`, which reads back what it signed; validating is
`verify_jwt_svid`, with its strict reading around PyJWT.  Measured in CPU time of one thread.
"""

import time

from bench._crypto import NOW, TD, a_jwt_authority, bare_sign, bare_verify
from bench._harness import Result, alternate
from ca.jwt import JwtProfile, sign_jwt
from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.keys import KeyKind, spki_of
from spiffe_core.spiffeid import SpiffeId

SPIFFE_ID = SpiffeId(TD, "/cluster/prod/ns/shop/sa/checkout")
PROFILE = JwtProfile()
AUDIENCE = "spiffe://example.org/cluster/prod/ns/shop/sa/ledger"


def main() -> list[Result]:
    """Sign and validate with an EC and an RSA key."""
    runs = {}
    for name, kind in (("ES256", KeyKind.EC_P256), ("RS256", KeyKind.RSA_2048)):
        authority = a_jwt_authority(kind)
        key = authority.private
        public = JwtAuthority(authority.key_id, spki_of(key.public_key()))
        bundles = BundleSet.of([Bundle(TD, (), (public,))])

        def sign(authority=authority):
            return sign_jwt(
                PROFILE, authority, spiffe_id=SPIFFE_ID, audience=(AUDIENCE,), now=NOW
            )

        token = sign().svid.token
        runs[f"{name} bare sign"] = bare_sign(key)
        runs[f"{name} bare verify"] = bare_verify(key)
        runs[f"{name} sign"] = sign
        runs[f"{name} validate"] = lambda token=token, bundles=bundles: verify_jwt_svid(
            token, bundles, audience=AUDIENCE, at=NOW
        )
    took = alternate(runs, rounds=15, repeat=40, clock=time.thread_time)

    def ratio(name: str, act: str, bare: str) -> float:
        return took[f"{name} {act}"] / took[f"{name} {bare}"]

    us = {name: f"{seconds * 1e6:.0f} us" for name, seconds in took.items()}
    return [
        Result(
            "ES256 sign / bare sign",
            ratio("ES256", "sign", "bare sign"),
            at_most=1.8,
            note=f"{us['ES256 sign']} against {us['ES256 bare sign']}",
        ),
        Result(
            "RS256 sign / bare sign",
            ratio("RS256", "sign", "bare sign"),
            at_most=1.1,
            note=f"{us['RS256 sign']} against {us['RS256 bare sign']}",
        ),
        Result(
            "ES256 validate / bare verify",
            ratio("ES256", "validate", "bare verify"),
            at_most=2.2,
            note=f"{us['ES256 validate']} against {us['ES256 bare verify']}",
        ),
        Result("RS256 validate / bare verify", ratio("RS256", "validate", "bare verify")),
    ]
