"""
Authorities as public facts: the certificate or key that others verify with.

Source: SPIRE API 5.6 (authority IDs), SEC-12, SEC-15.  Private halves live in `ca`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from spiffe_core.errors import MalformedError
from spiffe_core.keys import (
    KeyRefusedError,
    check_certificate_size,
    key_of_certificate,
    key_of_spki,
    subject_key_id_of,
)
from spiffe_core.lifetime import Validity
from spiffe_core.text import utf8_bytes


class AuthorityError(MalformedError):
    """A certificate or key cannot be an authority (SEC-12)."""


@dataclass(frozen=True, slots=True)
class X509Authority:
    """
    One CA certificate of a trust domain, as DER.

    *authority_id* is the lower-case hex subject key ID.  Build with `parse`, which
    checks what an anchor must be.
    """

    der: bytes
    authority_id: str
    validity: Validity
    tainted: bool = False

    @classmethod
    def parse(cls, der: bytes, *, tainted: bool = False) -> Self:
        """
        Parse one DER CA certificate (SEC-12, SEC-14, SEC-15).

        Raises:
            AuthorityError: not exactly one certificate, not a CA, a key that is not
                accepted, or an SVID path in it.
        """
        try:
            check_certificate_size(der)
            certificate = x509.load_der_x509_certificate(der)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
            validity = Validity(
                certificate.not_valid_before_utc, certificate.not_valid_after_utc
            )
            key = key_of_certificate(certificate)
            _ = certificate.issuer, certificate.subject  # parsed late; a path needs them
        except KeyRefusedError as error:
            raise AuthorityError(f"an authority's {error}") from error
        except x509.ExtensionNotFound as error:
            raise AuthorityError("an authority needs basicConstraints and keyUsage") from error
        except Exception as error:
            raise AuthorityError("not one DER X.509 certificate") from error
        if not constraints.value.ca:
            raise AuthorityError("an authority needs cA TRUE; this is a leaf")
        if not usage.value.key_cert_sign:
            raise AuthorityError("an authority needs keyCertSign")
        _check_uri(certificate)
        return cls(der, subject_key_id_of(certificate, key), validity, tainted)


@dataclass(frozen=True, slots=True)
class JwtAuthority:
    """One JWT signing key of a trust domain: *public_key* is SPKI DER, *key_id* the ``kid``."""

    key_id: str
    public_key: bytes = field(repr=False)
    expires_at: datetime | None = None
    tainted: bool = False

    def __post_init__(self) -> None:
        if not self.key_id:
            raise AuthorityError("missing key ID")
        key_id_bytes = utf8_bytes(self.key_id)
        if key_id_bytes is None:
            raise AuthorityError("key ID is not UTF-8 text")
        if key_id_bytes > MAX_KEY_ID_BYTES:
            raise AuthorityError(f"key ID is longer than {MAX_KEY_ID_BYTES} bytes")
        if not self.public_key:
            raise AuthorityError("missing public key")
        # One Ed25519 key in a bundle, and none of it could be written as a document (JWT-04).
        if isinstance(key_of_spki(self.public_key), ed25519.Ed25519PublicKey):
            raise AuthorityError("no algorithm of JWT-SVIDs fits an Ed25519 key")


MAX_KEY_ID_BYTES = 255  # SEC-41


def _check_uri(certificate: x509.Certificate) -> None:
    # C-09: foreign CAs write `spiffe://td/`, so the ID is not parsed; but a path that
    # names a workload means somebody hands us an SVID as an anchor.
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return
    for uri in names.value.get_values_for_type(x509.UniformResourceIdentifier):
        _, _, rest = uri.removeprefix("spiffe://").partition("/")
        if uri.startswith("spiffe://") and rest:
            raise AuthorityError("an authority's SPIFFE ID has no path (X509-09)")
