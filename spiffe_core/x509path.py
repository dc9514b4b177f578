"""
From a leaf to an authority: what RFC 5280 asks of certificates and of the path (X509-30).

Source: SEC-13 to SEC-16, X509-16 to X509-18, X509-29 to X509-31, X509-45, T-14, T-15.
The library builds the path.  What it leaves open is decided here, always as a refusal.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final, TypeVar

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import (
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from spiffe_core.authority import X509Authority
from spiffe_core.errors import MalformedError
from spiffe_core.keys import (
    MAX_CHAIN_BYTES,
    MAX_CHAIN_CERTIFICATES,
    SIGNATURE_HASHES,
    KeyRefusedError,
    check_certificate_size,
    key_of_certificate,
)

MAX_INTERMEDIATES: Final = MAX_CHAIN_CERTIFICATES - 1
MAX_SIGNATURE_CHECKS: Final = 64  # SEC-14; the library itself would go on to 200
BOTH_PURPOSES: Final = frozenset(
    {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
)
# Rules that neither the library nor we evaluate; on a CA they may forbid the path.
_POLICY_RULES: Final = frozenset(
    {
        ExtensionOID.POLICY_MAPPINGS,
        ExtensionOID.POLICY_CONSTRAINTS,
        ExtensionOID.INHIBIT_ANY_POLICY,
    }
)

_NO_PATH: Final = "no valid path from the SVID to an authority of its trust domain"

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class X509SvidError(MalformedError):
    """A chain is not an X509-SVID, or not one to be trusted; names the first rule broken."""


def parse_chain(chain: Sequence[bytes]) -> list[x509.Certificate]:
    """
    Parse DER certificates, leaf first, and check what holds for every one of them.

    Raises:
        X509SvidError: none or too many (SEC-14), not DER, or a key, hash, version or serial
            number that is not accepted (SEC-15, X509-45).
    """
    if not chain:
        raise X509SvidError("no certificate")
    if len(chain) > MAX_CHAIN_CERTIFICATES or sum(map(len, chain)) > MAX_CHAIN_BYTES:
        raise X509SvidError("certificate chain is too long")
    try:
        for der in chain:
            check_certificate_size(der)
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        for certificate in certificates:
            _check_common(certificate)
    except X509SvidError:
        raise
    except KeyRefusedError as error:
        raise X509SvidError(str(error)) from error
    except Exception as error:
        raise X509SvidError("not a DER X.509 certificate") from error
    for certificate in certificates[1:]:
        _check_intermediate(certificate)
    return certificates


def extensions_of(certificate: x509.Certificate) -> x509.Extensions:
    """
    Return the extensions, all of them parsed.

    Raises:
        X509SvidError: one cannot be read, or stands there twice.
    """
    try:
        return certificate.extensions
    except Exception as error:
        raise X509SvidError("certificate extensions cannot be read") from error


def find(extensions: x509.Extensions, wanted: type[_Extension]) -> _Extension | None:
    """Return the value of one extension, or None."""
    try:
        return extensions.get_extension_for_class(wanted).value
    except x509.ExtensionNotFound:
        return None


def issuer_key_id(extensions: x509.Extensions) -> bytes:
    """
    Return the key ID of the authority key identifier (X509-45).

    Raises:
        X509SvidError: there is none.
    """
    found = find(extensions, x509.AuthorityKeyIdentifier)
    if found is None or not found.key_identifier:
        raise X509SvidError("certificate has no authority key identifier")
    return found.key_identifier


def build_path(
    certificates: Sequence[x509.Certificate],
    authorities: Sequence[X509Authority],
    *,
    at: datetime,
    max_intermediates: int = MAX_INTERMEDIATES,
) -> None:
    """
    Find a path from the first of *certificates* over the others to one of *authorities*.

    Raises:
        X509SvidError: there is none that holds at the instant *at*.
    """
    leaf, intermediates = certificates[0], list(certificates[1:])
    anchors = _anchors(certificates, authorities, at)
    _check_work(leaf, intermediates, anchors)
    verifier = (
        PolicyBuilder()
        .store(Store(anchors))
        .time(at.astimezone(UTC).replace(tzinfo=None))
        .max_chain_depth(max_intermediates)
        # The leaf's profile is checked by us; the library's is the web's, not SPIFFE's.
        .extension_policies(
            ca_policy=ExtensionPolicy.webpki_defaults_ca(),
            ee_policy=ExtensionPolicy.permit_all(),
        )
        .build_client_verifier()
    )
    try:
        path = verifier.verify(leaf, intermediates).chain
    except VerificationError as error:
        raise X509SvidError(_NO_PATH) from error
    for issued, issuer in pairwise(path):
        # The library goes by names alone; OpenSSL and others go by key IDs too.
        own = find(extensions_of(issuer), x509.SubjectKeyIdentifier)
        if own is None or issuer_key_id(extensions_of(issued)) != own.digest:
            raise X509SvidError(_NO_PATH)


def _check_common(certificate: x509.Certificate) -> None:
    if certificate.version is not x509.Version.v3:
        raise X509SvidError("certificate must be X.509 version 3")
    if not 0 < certificate.serial_number < 1 << 159:
        raise X509SvidError("serial number must be positive and at most 20 octets")
    key_of_certificate(certificate)
    _ = certificate.issuer, certificate.subject  # parsed late: here, where errors are expected
    algorithm = certificate.signature_hash_algorithm
    if algorithm is not None and algorithm.name not in SIGNATURE_HASHES:
        raise X509SvidError("certificate is signed with a hash that is not accepted")


def _check_intermediate(certificate: x509.Certificate) -> None:
    extensions = extensions_of(certificate)
    constraints = find(extensions, x509.BasicConstraints)
    usage = find(extensions, x509.KeyUsage)
    if constraints is None or not constraints.ca or usage is None or not usage.key_cert_sign:
        raise X509SvidError("every certificate after the leaf must be a CA with keyCertSign")
    _check_ca(certificate, extensions)


def _check_ca(certificate: x509.Certificate, extensions: x509.Extensions) -> None:
    """What RFC 5280 asks of a CA and the library does not."""
    if find(extensions, x509.SubjectKeyIdentifier) is None:
        raise X509SvidError("a CA has no subject key identifier")
    if certificate.issuer != certificate.subject:
        issuer_key_id(extensions)
    for extension in extensions:
        if extension.oid in _POLICY_RULES:
            raise X509SvidError("a CA has policy rules, which are not evaluated here")
        if extension.oid == ExtensionOID.NAME_CONSTRAINTS and not extension.critical:
            raise X509SvidError("a CA's name constraints must be critical")
    purposes = find(extensions, x509.ExtendedKeyUsage)
    if purposes is not None and not set(purposes) >= BOTH_PURPOSES:
        raise X509SvidError("a CA's extended key usage must hold serverAuth and clientAuth")


def _anchors(
    certificates: Sequence[x509.Certificate],
    authorities: Sequence[X509Authority],
    at: datetime,
) -> list[x509.Certificate]:
    """The authorities that one of *certificates* names as its issuer, and that hold at *at*."""
    # By key ID, before anything is parsed: a bundle may hold a hundred (SEC-14).
    wanted = {
        found.key_identifier.hex()
        for certificate in certificates
        if (found := find(extensions_of(certificate), x509.AuthorityKeyIdentifier))
        and found.key_identifier
    }
    named = [one for one in authorities if one.authority_id in wanted]
    if not named:
        raise X509SvidError(_NO_PATH)
    current = [one for one in named if one.validity.covers(at)]  # SEC-16: anchors included
    if not current:
        raise X509SvidError("the authority that signed the SVID has expired")
    anchors = [x509.load_der_x509_certificate(one.der) for one in current]
    for anchor in anchors:
        _check_anchor(anchor)
    return anchors


def _check_anchor(anchor: x509.Certificate) -> None:
    extensions = extensions_of(anchor)
    _check_ca(anchor, extensions)
    own = find(extensions, x509.SubjectKeyIdentifier)
    named = find(extensions, x509.AuthorityKeyIdentifier)
    if named is None or anchor.issuer != anchor.subject:
        return
    if named.authority_cert_issuer or named.authority_cert_serial_number is not None:
        raise X509SvidError("a root's authority key identifier must hold a key ID alone")
    if own is None or named.key_identifier != own.digest:
        raise X509SvidError("a root's authority key identifier must name its own key")


def _check_work(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
) -> None:
    """Count by names how many signatures a search could check at worst, and stop at 64."""
    issuers = Counter(one.subject for one in (*intermediates, *anchors))
    walks = Counter([leaf.issuer])
    checks = 0
    for _ in range(MAX_CHAIN_CERTIFICATES + 1):
        checks += sum(issuers[name] * number for name, number in walks.items())
        if checks > MAX_SIGNATURE_CHECKS:
            raise X509SvidError("the chain would take too many signature checks")
        further: Counter[x509.Name] = Counter()
        for one in intermediates:
            further[one.issuer] += walks[one.subject]
        walks = further
