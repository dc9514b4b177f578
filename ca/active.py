"""Authorities that may sign now: the private half beside the public facts."""

from dataclasses import dataclass, field
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ca.keys.protocol import KeyPurpose, PrivateKey, SigningKey
from spiffe_core.authority import X509Authority
from spiffe_core.jwtsvid import algorithms_of
from spiffe_core.lifetime import Validity


@dataclass(frozen=True)
class ActiveX509:
    """The X.509 authority that signs; what is the same for every leaf is made once."""

    authority: X509Authority
    key: SigningKey = field(repr=False)

    @cached_property
    def certificate(self) -> x509.Certificate:
        """The CA certificate, parsed."""
        return x509.load_der_x509_certificate(self.authority.der)

    @cached_property
    def issuer_name(self) -> x509.Name:
        """What leaves carry as their issuer."""
        return self.certificate.subject

    @cached_property
    def authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        """What leaves carry to find this authority."""
        extension = self.certificate.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        )
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(extension.value)

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
    def private(self) -> PrivateKey:
        """The key, for JWTs alone."""
        return self.key.private_for(KeyPurpose.JWT)

    @cached_property
    def algorithm(self) -> str:
        """RS256, ES256 or ES384, by the key (SPIRE API 7.3)."""
        return algorithms_of(self.private.public_key())[0]


def signature_hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384:
    """SHA-384 for P-384, SHA-256 for everything else."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1":
        return hashes.SHA384()
    return hashes.SHA256()
