"""Keys and signing requests of a node: the agent's own, and those of its workloads."""

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spiffe_core.keys import KeyKind
from spiffe_core.spiffeid import SpiffeId

_PKCS8 = (
    serialization.Encoding.DER,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)


def make_key(kind: KeyKind = KeyKind.EC_P256) -> bytes:
    """Return a new private key as PKCS#8 DER (WAPI-18).  RSA takes long: off the loop."""
    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if kind is KeyKind.EC_P256:
        private = ec.generate_private_key(ec.SECP256R1())
    elif kind is KeyKind.EC_P384:
        private = ec.generate_private_key(ec.SECP384R1())
    else:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return private.private_bytes(*_PKCS8)


def make_csr(key: bytes, spiffe_id: SpiffeId | None = None) -> bytes:
    """Return a CSR on *key*, with *spiffe_id* in it when a SPIRE server wants to see it."""
    # Ours, made a moment ago: the slow check of RSA numbers would hold the GIL for 30 ms.
    private = serialization.load_der_private_key(
        key, password=None, unsafe_skip_rsa_key_validation=True
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if spiffe_id is not None:
        uri = x509.UniformResourceIdentifier(spiffe_id.uri)
        builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=True)
    signed = builder.sign(private, hashes.SHA256())  # type: ignore[arg-type]  # EC or RSA
    return signed.public_bytes(serialization.Encoding.DER)
