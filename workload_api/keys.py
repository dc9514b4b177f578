"""Keys and signing requests of a node: the agent's own, and those of its workloads."""

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spiffe_core.errors import MalformedError
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


def check_key(key: bytes, chain: tuple[bytes, ...]) -> None:
    """
    See that *key* is a private key, and that of the leaf of *chain* when there is one.

    Raises:
        MalformedError: it is not.
    """
    try:
        private = serialization.load_der_private_key(key, password=None)
        leaf = x509.load_der_x509_certificate(chain[0]) if chain else None
    except (ValueError, TypeError) as error:
        raise MalformedError("key or certificate cannot be read") from error
    if leaf is not None and leaf.public_key() != private.public_key():
        raise MalformedError("the key is not that of the certificate")


def authority_of(leaf: bytes) -> str:
    """
    Return the ID of the authority that signed *leaf*; empty when it does not say.

    Raises:
        MalformedError: not a certificate whose extensions can be read.
    """
    try:
        extensions = x509.load_der_x509_certificate(leaf).extensions
        found = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return ""
    except ValueError as error:
        raise MalformedError("certificate cannot be read") from error
    return (found.value.key_identifier or b"").hex()
