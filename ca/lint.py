"""
A profile proves itself before it may sign anything that counts (SEC-24).

It signs a full certificate with a throw-away key; our own verifier and a list of small
named checks look at the result.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from ca.active import ActiveX509, key_usage
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.x509 import (
    LINTED,
    CheckedProfile,
    LintError,
    X509Profile,
    prepare_x509,
    self_signed,
    sign_x509,
)
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.errors import MalformedError
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import verify_x509_svid

_DOMAIN: Final = TrustDomain("lint.invalid")

Check = Callable[[x509.Certificate], bool]


def check_profile(profile: X509Profile, now: datetime) -> CheckedProfile:
    """
    Return *profile* as one that may sign.

    Raises:
        LintError: names the rule that its certificate breaks.
    """
    checked = CheckedProfile(profile, LINTED)
    key = SigningKey("scratch", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP256R1()))
    root = self_signed(key, _DOMAIN, now=now, ttl=timedelta(days=400))
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    for dns_names in ((), ("lint.invalid",)):
        prepared = prepare_x509(
            checked,
            ActiveX509(root, key),
            spiffe_id=SpiffeId(_DOMAIN, "/lint"),
            public_key=spki_of(leaf_key.public_key()),
            now=now,
            dns_names=dns_names,
        )
        svid = sign_x509(prepared).svid
        try:
            verify_x509_svid(svid.chain, BundleSet.of([Bundle(_DOMAIN, (root,))]), at=now)
        except MalformedError as error:
            raise LintError(f"the profile makes certificates that fail: {error}") from error
        lint_leaf(x509.load_der_x509_certificate(svid.leaf))
    return checked


def lint_leaf(certificate: x509.Certificate) -> None:
    """
    Run every check on a leaf of ours.

    Raises:
        LintError: names the first rule broken.
    """
    for rule, check in CHECKS.items():
        try:
            good = check(certificate)
        except (x509.ExtensionNotFound, MalformedError):
            good = False
        if not good:
            raise LintError(f"the profile breaks {rule}")


def _extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension:  # type: ignore[type-arg]
    return certificate.extensions.get_extension_for_class(kind)


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    return list(_extension(certificate, x509.SubjectAlternativeName).value)


def _uris(certificate: x509.Certificate) -> list[str]:
    uri = x509.UniformResourceIdentifier
    return [name.value for name in _names(certificate) if isinstance(name, uri)]


_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    }
)


CHECKS: Final[dict[str, Check]] = {
    "X509-01 (one URI SAN)": lambda c: len(_uris(c)) == 1,
    "X509-05 (ID with a path)": lambda c: SpiffeId.parse(_uris(c)[0]).path != "",
    "X509-06 (empty subject, critical SAN)": lambda c: (
        bool(list(c.subject)) != _extension(c, x509.SubjectAlternativeName).critical
    ),
    "X509-03 (no other names)": lambda c: all(
        isinstance(name, x509.UniformResourceIdentifier | x509.DNSName) for name in _names(c)
    ),
    "X509-15 (cA FALSE, present)": lambda c: (
        _extension(c, x509.BasicConstraints).critical
        and not _extension(c, x509.BasicConstraints).value.ca
    ),
    "X509-20 (key usage critical)": lambda c: _extension(c, x509.KeyUsage).critical,
    "X509-23 (digitalSignature)": lambda c: (
        _extension(c, x509.KeyUsage).value.digital_signature
    ),
    "X509-24 (digitalSignature alone)": lambda c: (
        _extension(c, x509.KeyUsage).value == key_usage(digital_signature=True)
    ),
    "X509-25 (no keyCertSign, cRLSign)": lambda c: (
        not (
            _extension(c, x509.KeyUsage).value.key_cert_sign
            or _extension(c, x509.KeyUsage).value.crl_sign
        )
    ),
    "X509-27 (EKU, not critical)": lambda c: not _extension(c, x509.ExtendedKeyUsage).critical,
    "X509-28 (both purposes)": lambda c: (
        set(_extension(c, x509.ExtendedKeyUsage).value)
        == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    ),
    "X509-45 (AKI)": lambda c: (
        _extension(c, x509.AuthorityKeyIdentifier).value.key_identifier is not None
    ),
    "X509-45 (SKI)": lambda c: bool(_extension(c, x509.SubjectKeyIdentifier).value.digest),
    "X509-45 (issuer's name)": lambda c: bool(list(c.issuer)),
    "conformance 3.4 (these extensions alone)": lambda c: (
        {one.oid for one in c.extensions} == _EXTENSIONS
    ),
    "SEC-22 (serial)": lambda c: 1 << 128 <= c.serial_number < 1 << 159,
}
