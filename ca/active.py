"""Authorities that may sign now: the private half beside the public facts."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, SignatureAlgorithmOID

from ca.keys.protocol import KeyPurpose, PrivateKey, SigningKey
from ca.template import TbsTemplate
from spiffe_core.authority import X509Authority
from spiffe_core.jwtsvid import algorithms_of
from spiffe_core.lifetime import Validity
from spiffe_core.strictjson import b64url_encode, dumps


def key_usage(**bits: bool) -> x509.KeyUsage:
    """Return a key usage of the named bits alone."""
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: bits.get(name, False) for name in names})


# The same on every leaf, so made once.
_LEAF_CONSTRAINTS: Final = x509.BasicConstraints(ca=False, path_length=None)
_LEAF_USAGE: Final = key_usage(digital_signature=True)
_LEAF_PURPOSES: Final = x509.ExtendedKeyUsage(
    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
)


@dataclass(frozen=True)
class ActiveX509:
    """The X.509 authority that signs; what is the same for every leaf is made once."""

    authority: X509Authority
    key: SigningKey = field(repr=False)

    @property
    def authority_id(self) -> str:
        """The authority's ID, as it is on record."""
        return self.authority.authority_id

    @cached_property
    def certificate(self) -> x509.Certificate:
        """The CA certificate, parsed."""
        return x509.load_der_x509_certificate(self.authority.der)

    @cached_property
    def issuer_name(self) -> x509.Name:
        """What leaves carry as their issuer."""
        return self.certificate.subject

    @cached_property
    def issuer_der(self) -> bytes:
        """The same, encoded."""
        return self.issuer_name.public_bytes()

    @cached_property
    def authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        """What leaves carry to find this authority."""
        extension = self.certificate.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        )
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(extension.value)

    @cached_property
    def leaf_extensions(self) -> tuple[x509.Extension[x509.ExtensionType], ...]:
        """The extensions that all leaves of this authority share, in their order."""
        return (
            x509.Extension(_LEAF_CONSTRAINTS.oid, True, _LEAF_CONSTRAINTS),
            x509.Extension(_LEAF_USAGE.oid, True, _LEAF_USAGE),
            x509.Extension(_LEAF_PURPOSES.oid, False, _LEAF_PURPOSES),
            x509.Extension(
                self.authority_key_identifier.oid, False, self.authority_key_identifier
            ),
        )

    @cached_property
    def signature_oid(self) -> x509.ObjectIdentifier:
        """The algorithm that leaves are signed with."""
        key = self.private
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return _ECDSA_OIDS[signature_hash(key).name]
        return SignatureAlgorithmOID.RSA_WITH_SHA256

    @cached_property
    def template(self) -> TbsTemplate | None:
        """What leaves share, encoded; None when only the library's builder can make them."""
        key = self.private
        return TbsTemplate.of(self.issuer_name, self.leaf_extensions, key, signature_hash(key))

    @property
    def private(self) -> PrivateKey:
        """The key, for X.509 alone."""
        return self.key.private_for(KeyPurpose.X509_CA)


@dataclass(frozen=True)
class ActiveJwt:
    """The JWT authority that signs."""

    key_id: str
    validity: Validity
    key: SigningKey = field(repr=False)

    @property
    def authority_id(self) -> str:
        """The authority's ID, as it is on record: for a JWT authority its ``kid``."""
        return self.key_id

    @property
    def private(self) -> PrivateKey:
        """The key, for JWTs alone."""
        return self.key.private_for(KeyPurpose.JWT)

    @cached_property
    def algorithm(self) -> str:
        """RS256, ES256 or ES384, by the key (SPIRE API 7.3)."""
        return algorithms_of(self.private.public_key())[0]

    def sign(self, data: bytes) -> bytes:
        """Return the signature of *data* as a JWS carries it (RFC 7518 3.3, 3.4)."""
        key, scheme = self._scheme
        signature: bytes = key.sign(data, *scheme)
        if isinstance(key, rsa.RSAPrivateKey):
            return signature
        # The curve's size twice, where X.509 has a SEQUENCE of two numbers.
        size = (key.key_size + 7) // 8
        return b"".join(one.to_bytes(size, "big") for one in decode_dss_signature(signature))

    @cached_property
    def _scheme(self) -> tuple[Any, tuple[Any, ...]]:
        key = self.private
        if isinstance(key, rsa.RSAPrivateKey):
            return key, (padding.PKCS1v15(), hashes.SHA256())
        return key, (ec.ECDSA(signature_hash(key)),)

    @cached_property
    def header(self) -> str:
        """The first part of every token (JWT-01, JWT-08): the same until the key changes."""
        members = {"alg": self.algorithm, "kid": self.key_id, "typ": "JWT"}
        return b64url_encode(dumps(members))


_ECDSA_OIDS: Final = {
    "sha256": SignatureAlgorithmOID.ECDSA_WITH_SHA256,
    "sha384": SignatureAlgorithmOID.ECDSA_WITH_SHA384,
}


def signature_hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384:
    """SHA-384 for P-384, SHA-256 for everything else."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1":
        return hashes.SHA384()
    return hashes.SHA256()
