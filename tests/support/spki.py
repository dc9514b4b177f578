"""EC public keys in spellings that no library writes."""

from tests.support.der import bits, integer, octets, oid, sequence

P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
GENERATOR = bytes.fromhex(
    "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)
EC_PUBLIC_KEY = oid("1.2.840.10045.2.1")
PRIME_FIELD = oid("1.2.840.10045.1.1")
P256 = oid("1.2.840.10045.3.1.7")


def named_spki(point: bytes) -> bytes:
    """A P-256 key by the curve's name."""
    return sequence(sequence(EC_PUBLIC_KEY, P256), bits(point))


def explicit_spki(point: bytes) -> bytes:
    """A P-256 key with the curve's parameters in full (SEC 1, C.2)."""
    curve = sequence(octets((P - 3).to_bytes(32, "big")), octets(B.to_bytes(32, "big")))
    field = sequence(PRIME_FIELD, integer(P))
    parameters = sequence(integer(1), field, curve, octets(GENERATOR), integer(N), integer(1))
    return sequence(sequence(EC_PUBLIC_KEY, parameters), bits(point))
