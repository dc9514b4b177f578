"""
X509-SVIDs: parse one, and verify one against the bundle of its own trust domain.

Source: X509-01 to X509-46, SEC-10 to SEC-18, conformance 3.4 (the validation routine).
Path building is the library's; the SVID profile is ours, on the same DER (T-15).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Self, TypeVar

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import (
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.keys import (
    MAX_CHAIN_BYTES,
    MAX_CHAIN_CERTIFICATES,
    KeyRefusedError,
    check_certificate_size,
    check_public_key,
)
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError

# What a critical extension may be; any other is refused (X509-30).
_KNOWN_ON_LEAF: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)
_SIGNATURE_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})  # SEC-15: no SHA-1, MD5


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class X509SvidError(MalformedError):
    """A chain is not an X509-SVID, or not one to be trusted; names the first rule broken."""


@dataclass(frozen=True, slots=True)
class X509Svid:
    """A parsed X509-SVID: *chain* is DER, leaf first, without the root."""

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...] = field(repr=False)
    validity: Validity
    serial_number: int

    @classmethod
    def from_chain(cls, chain: Sequence[bytes]) -> Self:
        """
        Parse a chain and check its leaf against the SVID profile; nothing is trusted yet.

        Raises:
            X509SvidError: names the first rule broken.
        """
        return cls._of(tuple(chain), _parse_chain(chain)[0])

    @classmethod
    def _of(cls, chain: tuple[bytes, ...], leaf: x509.Certificate) -> Self:
        spiffe_id = _check_leaf(leaf)
        validity = Validity(leaf.not_valid_before_utc, leaf.not_valid_after_utc)
        return cls(spiffe_id, chain, validity, leaf.serial_number)

    @property
    def leaf(self) -> bytes:
        """The leaf's DER."""
        return self.chain[0]

    @property
    def serial(self) -> str:
        """The serial number as decimal text, as SPIRE's API carries it."""
        return str(self.serial_number)

    def chain_der(self) -> bytes:
        """The chain as the Workload API carries it: DER back to back (WAPI-17)."""
        return b"".join(self.chain)


def verify_x509_svid(chain: Sequence[bytes], bundles: BundleSet, *, at: datetime) -> X509Svid:
    """
    Verify *chain*, leaf first, at the instant *at*, and return what it proves.

    The roots are those of the trust domain named in the leaf, and no others (X509-31,
    SEC-11).  Says nothing about whether that identity is welcome: see
    `spiffe_core.matching`.

    Raises:
        X509SvidError: names the first rule broken.
    """
    certificates = _parse_chain(chain)
    leaf, intermediates = certificates[0], certificates[1:]
    svid = X509Svid._of(tuple(chain), leaf)
    for certificate in intermediates:
        _check_intermediate(certificate)
    bundle = bundles.get(svid.spiffe_id.trust_domain)
    if bundle is None or not bundle.x509_authorities:
        raise X509SvidError("no X.509 authority is known for the SVID's trust domain")
    if not svid.validity.covers(at):
        raise X509SvidError("SVID has expired or is not valid yet")
    anchors = [
        x509.load_der_x509_certificate(authority.der)
        for authority in bundle.x509_authorities
        if authority.validity.covers(at)  # SEC-16: the whole chain, anchors included
    ]
    if not anchors:
        raise X509SvidError("every X.509 authority of the SVID's trust domain has expired")
    _build_path(leaf, intermediates, anchors, at)
    return svid


def _parse_chain(chain: Sequence[bytes]) -> list[x509.Certificate]:
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
    return certificates


def _check_common(certificate: x509.Certificate) -> None:
    if certificate.version is not x509.Version.v3:
        raise X509SvidError("certificate must be X.509 version 3")
    if not 0 < certificate.serial_number < 1 << 159:
        raise X509SvidError("serial number must be positive and at most 20 octets")
    check_public_key(certificate.public_key())
    algorithm = certificate.signature_hash_algorithm
    if algorithm is not None and algorithm.name not in _SIGNATURE_HASHES:
        raise X509SvidError("certificate is signed with a hash that is not accepted")


def _check_leaf(leaf: x509.Certificate) -> SpiffeId:
    extensions = _extensions(leaf)
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_ON_LEAF:
            raise X509SvidError("leaf has an unknown critical extension")
    spiffe_id = _id_of(extensions, subject_is_empty=not list(leaf.subject))
    constraints = _find(extensions, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise X509SvidError("leaf has cA TRUE; a signing certificate is no identity")
    usage = _find(extensions, x509.KeyUsage)
    if usage is None:
        raise X509SvidError("leaf has no key usage")
    if usage.key_cert_sign or usage.crl_sign:
        raise X509SvidError("leaf must not have keyCertSign or cRLSign")
    if not usage.digital_signature:
        raise X509SvidError("leaf has no digitalSignature")
    purposes = _find(extensions, x509.ExtendedKeyUsage)
    if purposes is not None and not {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    } <= set(purposes):
        raise X509SvidError("extended key usage must hold both serverAuth and clientAuth")
    return spiffe_id


def _check_intermediate(certificate: x509.Certificate) -> None:
    extensions = _extensions(certificate)
    constraints = _find(extensions, x509.BasicConstraints)
    usage = _find(extensions, x509.KeyUsage)
    if constraints is None or not constraints.ca or usage is None or not usage.key_cert_sign:
        raise X509SvidError("every certificate after the leaf must be a CA with keyCertSign")


def _id_of(extensions: x509.Extensions, *, subject_is_empty: bool) -> SpiffeId:
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise X509SvidError("leaf must have exactly one URI SAN; it has none") from None
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise X509SvidError(f"leaf must have exactly one URI SAN; it has {len(uris)}")
    if subject_is_empty and not names.critical:
        raise X509SvidError("an empty subject needs a critical subject alternative name")
    try:
        spiffe_id = SpiffeId.parse(uris[0])
    except SpiffeIdError as error:
        raise X509SvidError(f"URI SAN is not a SPIFFE ID: {error}") from error
    if not spiffe_id.path:
        raise X509SvidError("a leaf's SPIFFE ID must have a path")
    return spiffe_id


def _extensions(certificate: x509.Certificate) -> x509.Extensions:
    try:
        return certificate.extensions
    except Exception as error:
        raise X509SvidError("certificate extensions cannot be read") from error


def _find(extensions: x509.Extensions, wanted: type[_Extension]) -> _Extension | None:
    try:
        return extensions.get_extension_for_class(wanted).value
    except x509.ExtensionNotFound:
        return None


def _build_path(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    anchors: list[x509.Certificate],
    at: datetime,
) -> None:
    verifier = (
        PolicyBuilder()
        .store(Store(anchors))
        .time(at.replace(tzinfo=None))
        .max_chain_depth(MAX_CHAIN_CERTIFICATES - 1)
        # The leaf's profile was checked above; the library's is the web's, not SPIFFE's.
        .extension_policies(
            ca_policy=ExtensionPolicy.webpki_defaults_ca(),
            ee_policy=ExtensionPolicy.permit_all(),
        )
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, list(intermediates))
    except VerificationError as error:
        raise X509SvidError(
            "no valid path from the SVID to an authority of its trust domain"
        ) from error
