"""
Certificate signing requests: the public key, and nothing else (SEC-20).

Names, extensions and lifetimes come from the registration entry.  Minting is the one
exception: there an operator, on the admin socket, says what he wants in the request itself.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import SignatureAlgorithmOID

from ca.x509 import check_dns_names
from spiffe_core.errors import MalformedError
from spiffe_core.keys import (
    MAX_CSR_BYTES,
    SIGNATURE_HASHES,
    CheckedSpki,
    check_public_key,
    spki_of,
)
from spiffe_core.spiffeid import SpiffeId, TrustDomain


class CsrError(MalformedError):
    """A request cannot be used; the text names the rule."""


@dataclass(frozen=True, slots=True)
class MintRequest:
    """What an operator asks for in a CSR."""

    spiffe_id: SpiffeId
    public_key: bytes
    dns_names: tuple[str, ...]


def public_key_of(csr: bytes, *, refused: Collection[bytes] = ()) -> bytes:
    """
    Return the SubjectPublicKeyInfo DER of a request that its own key signed.

    *refused* holds the keys of our authorities: nobody gets a leaf on one of them.

    Raises:
        CsrError: too long, unreadable, unsigned, or with a key that is not accepted.
    """
    return _key_of(_parse(csr), refused)


def mint_request_of(
    csr: bytes, trust_domain: TrustDomain, *, refused: Collection[bytes] = ()
) -> MintRequest:
    """
    Return what an operator asks for: one workload ID, a key, DNS names.

    Raises:
        CsrError: see `public_key_of`; or the names break a rule.
    """
    parsed = _parse(csr)
    key = _key_of(parsed, refused)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise CsrError("CSR URI SAN is required") from None
    except Exception as error:
        # Doubled, unknown and unparsable extensions each have an exception of their own.
        raise CsrError("malformed CSR: its extensions cannot be read") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise CsrError("only one URI SAN is expected" if uris else "CSR URI SAN is required")
    try:
        spiffe_id = SpiffeId.parse(uris[0]).require_workload(trust_domain)
    except MalformedError as error:
        raise CsrError(f"CSR URI SAN is invalid: {error}") from error
    dns_names = tuple(names.get_values_for_type(x509.DNSName))
    try:
        check_dns_names(dns_names)
    except MalformedError as error:
        raise CsrError(f"CSR DNS name is invalid: {error}") from error
    covered = {f"*.{name.partition('.')[2]}" for name in dns_names if name[:2] != "*."}
    if covered & set(dns_names):
        raise CsrError("CSR DNS name contains a wildcard that covers another non-wildcard name")
    return MintRequest(spiffe_id, key, dns_names)


def _parse(csr: bytes) -> x509.CertificateSigningRequest:
    if not csr:
        raise CsrError("missing CSR")
    if len(csr) > MAX_CSR_BYTES:
        raise CsrError(f"malformed CSR: longer than {MAX_CSR_BYTES} bytes")
    try:
        return x509.load_der_x509_csr(csr)
    except Exception as error:
        # A strange version is no ValueError, and the parser may know more such things.
        raise CsrError("malformed CSR: not a DER PKCS#10 request") from error


def _key_of(parsed: x509.CertificateSigningRequest, refused: Collection[bytes]) -> bytes:
    try:
        key = check_public_key(parsed.public_key())
        digest = parsed.signature_hash_algorithm
        good = _is_signed(parsed, key)
    except MalformedError as error:
        raise CsrError(f"malformed CSR: {error}") from error
    except Exception as error:
        raise CsrError("malformed CSR: its key or signature cannot be read") from error
    if digest is not None and digest.name not in SIGNATURE_HASHES:
        raise CsrError("malformed CSR: it is signed with a hash that is not accepted")
    if not good:
        raise CsrError("invalid CSR signature: the request is not signed by its own key")
    spki = CheckedSpki.of(spki_of(key), key)
    if spki in refused:
        raise CsrError("malformed CSR: its key is an authority's")
    return spki


def _is_signed(parsed: x509.CertificateSigningRequest, key: PublicKeyTypes) -> bool:
    # Asked for an EC key, the library would read it a second time: a tenth of the whole.
    digest = _ECDSA.get(parsed.signature_algorithm_oid)
    if digest is None or not isinstance(key, ec.EllipticCurvePublicKey):
        return parsed.is_signature_valid
    try:
        key.verify(parsed.signature, parsed.tbs_certrequest_bytes, digest)
    except InvalidSignature:
        return False
    return True


_ECDSA: Final = {
    SignatureAlgorithmOID.ECDSA_WITH_SHA256: ec.ECDSA(hashes.SHA256()),
    SignatureAlgorithmOID.ECDSA_WITH_SHA384: ec.ECDSA(hashes.SHA384()),
    SignatureAlgorithmOID.ECDSA_WITH_SHA512: ec.ECDSA(hashes.SHA512()),
}
