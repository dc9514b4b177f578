"""
Targets 1 and 2: CSR in, certificate out, as a multiple of one bare sign and one bare verify.

The road is the server's own: `public_key_of` the CSR, `prepare_x509`, `sign_x509`, which
parses its work back and compares it.  All in one thread and measured in its CPU time.
"""

import time
from collections.abc import Callable

from bench._crypto import NOW, TD, an_x509_authority, bare_sign, bare_verify, sign_and_verify
from bench._harness import Result, alternate
from ca.active import ActiveX509
from ca.csr import public_key_of
from ca.keys.protocol import generate_private_key
from ca.lint import check_profile
from ca.x509 import X509Profile, prepare_x509, sign_x509
from spiffe_core.keys import KeyKind
from spiffe_core.spiffeid import SpiffeId
from workload_api.keys import make_csr, make_key

SPIFFE_ID = SpiffeId(TD, "/cluster/prod/ns/shop/sa/checkout")
CSRS = 64
"""Requests taken in turn, each with a key of its own, as they come in life."""


def _requests(kind: KeyKind = KeyKind.EC_P256) -> list[bytes]:
    return [make_csr(make_key(kind), SPIFFE_ID) for _ in range(CSRS)]


def _in_turn(run: Callable[[bytes], object], items: list[bytes]) -> Callable[[], object]:
    at = 0

    def one() -> object:
        nonlocal at
        at = (at + 1) % len(items)
        return run(items[at])

    return one


def main() -> list[Result]:
    """Issue with each kind of authority, and say where the time goes."""
    checked = check_profile(X509Profile(), NOW)
    csrs = _requests()
    keys = [public_key_of(one) for one in csrs]

    def issue(authority: ActiveX509, csr: bytes) -> object:
        # What `SvidService` refuses as a leaf's key is looked up in the same way.
        key = public_key_of(csr, refused=frozenset({b"x509", b"jwt"}))
        return sign(authority, key)

    def sign(authority: ActiveX509, key: bytes) -> object:
        prepared = prepare_x509(
            checked, authority, spiffe_id=SPIFFE_ID, public_key=key, now=NOW
        )
        return sign_x509(prepared)

    p256, p384, rsa = map(
        an_x509_authority, (KeyKind.EC_P256, KeyKind.EC_P384, KeyKind.RSA_2048)
    )
    by_builder = an_x509_authority()
    by_builder.__dict__["template"] = None  # as for an authority that no template is for
    floor_key = generate_private_key(KeyKind.EC_P256)
    took = alternate(
        {
            "S+V": sign_and_verify(),
            "sign": bare_sign(floor_key),
            "verify": bare_verify(floor_key),
            "P-256": _in_turn(lambda csr: issue(p256, csr), csrs),
            "builder": _in_turn(lambda csr: issue(by_builder, csr), csrs),
            "CSR": _in_turn(public_key_of, csrs),
            "prepare": _in_turn(
                lambda key: prepare_x509(
                    checked, p256, spiffe_id=SPIFFE_ID, public_key=key, now=NOW
                ),
                keys,
            ),
            "sign and compare": _in_turn(lambda key: sign(p256, key), keys),
            "P-384": _in_turn(lambda csr: issue(p384, csr), csrs),
            "P-384 sign": bare_sign(p384.private),
            "RSA-2048": _in_turn(lambda csr: issue(rsa, csr), csrs),
            "RSA-2048 sign": bare_sign(rsa.private),
        },
        rounds=15,
        repeat=CSRS,
        clock=time.thread_time,
    )
    floor, compare = took["S+V"], took["sign and compare"] - took["prepare"]
    parts = (
        f"S+V {floor * 1e6:.0f} us; CSR {took['CSR'] / floor:.2f}, "
        f"prepare {took['prepare'] / floor:.2f}, sign and compare {compare / floor:.2f}"
    )
    return [
        Result("issue, P-256 CA / S+V", took["P-256"] / floor, at_most=1.85, note=parts),
        Result("the same by the builder / S+V", took["builder"] / floor, at_most=2.6),
        Result("template / builder", took["P-256"] / took["builder"], at_most=0.8),
        Result(
            "issue, P-384 CA / its sign + P-256 verify",
            took["P-384"] / (took["P-384 sign"] + took["verify"]),
        ),
        Result(
            "issue, RSA-2048 CA / its sign + P-256 verify",
            took["RSA-2048"] / (took["RSA-2048 sign"] + took["verify"]),
        ),
    ]
