"""
X509-SVIDs: parse one, and verify one against the bundle of its own trust domain.

Source: X509-01 to X509-46, SEC-10 to SEC-18, conformance 3.4 (the validation routine).
Path building is the library's; the SVID profile is ours, on the same DER (T-15).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Self

from cryptography import x509
from cryptography.x509.oid import ExtensionOID

from spiffe_core.bundle import BundleSet
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError
from spiffe_core.x509path import (
    BOTH_PURPOSES,
    build_path,
    extensions_of,
    find,
    issuer_key_id,
    parse_chain,
)
from spiffe_core.x509path import X509SvidError as X509SvidError

# What a critical extension may be; any other is refused (X509-30).
_KNOWN_ON_LEAF: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)


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
        return cls._of(tuple(chain), parse_chain(chain)[0])

    @classmethod
    def _of(cls, chain: tuple[bytes, ...], leaf: x509.Certificate) -> Self:
        try:
            spiffe_id = _check_leaf(leaf)
            validity = Validity(leaf.not_valid_before_utc, leaf.not_valid_after_utc)
        except X509SvidError:
            raise
        except Exception as error:
            # Names and instants are parsed late, and each in its own way.
            raise X509SvidError("leaf cannot be read") from error
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
    certificates = parse_chain(chain)
    svid = X509Svid._of(tuple(chain), certificates[0])
    bundle = bundles.get(svid.spiffe_id.trust_domain)
    if bundle is None or not bundle.x509_authorities:
        raise X509SvidError("no X.509 authority is known for the SVID's trust domain")
    if not svid.validity.covers(at):
        raise X509SvidError("SVID has expired or is not valid yet")
    build_path(certificates, bundle.x509_authorities, at=at)
    return svid


def _check_leaf(leaf: x509.Certificate) -> SpiffeId:
    extensions = extensions_of(leaf)
    _check_usage(extensions)
    return _id_of(extensions, subject_is_empty=not list(leaf.subject))


def _check_usage(extensions: x509.Extensions) -> None:
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_ON_LEAF:
            raise X509SvidError("leaf has an unknown critical extension")
        if extension.oid == ExtensionOID.NAME_CONSTRAINTS:
            raise X509SvidError("leaf has name constraints, which belong to CAs")
    constraints = find(extensions, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise X509SvidError("leaf has cA TRUE; a signing certificate is no identity")
    usage = find(extensions, x509.KeyUsage)
    if usage is None:
        raise X509SvidError("leaf has no key usage")
    if usage.key_cert_sign or usage.crl_sign:
        raise X509SvidError("leaf must not have keyCertSign or cRLSign")
    if not usage.digital_signature:
        raise X509SvidError("leaf has no digitalSignature")
    purposes = find(extensions, x509.ExtendedKeyUsage)
    if purposes is not None and not set(purposes) >= BOTH_PURPOSES:
        raise X509SvidError("extended key usage must hold both serverAuth and clientAuth")
    issuer_key_id(extensions)


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
