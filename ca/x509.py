"""
X.509 signing: prepare, sign, look at what was signed, hand out.

Source: X509-01 to X509-46 (issuing), conformance 3.4, SEC-16, SEC-20, SEC-22, SEC-24,
architecture A6.  `prepare_x509` takes parsed values only; `sign_x509` takes what it returns,
once; and the finished DER is parsed back and compared before it leaves.
"""

import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from ca.active import ActiveX509, key_usage, signature_hash
from ca.keys.protocol import KeyPurpose, PrivateKey, SigningKey
from ca.template import TbsTemplate, extension_der, has_issuer, key_id_der
from spiffe_core.authority import X509Authority
from spiffe_core.entry import MAX_DNS_NAMES, check_dns_name
from spiffe_core.errors import InternalError, MalformedError, NotReadyError
from spiffe_core.keys import (
    check_certificate_size,
    encoded_key,
    key_identifier_of,
    key_of_spki,
)
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import X509Svid

MAX_BACKDATE: Final = timedelta(minutes=5)  # SEC-16
_SECOND: Final = timedelta(seconds=1)
SERIAL_BITS: Final = 159  # at most 20 octets, positive (X509-45, SEC-22)


class LintError(InternalError):
    """What was signed is not what was prepared; it was thrown away."""


@dataclass(frozen=True, slots=True)
class X509Profile:
    """How leaves are made; usable only once `checked` (SEC-24)."""

    default_ttl: timedelta = timedelta(hours=1)
    max_ttl: timedelta = timedelta(hours=24)
    backdate: timedelta = timedelta(seconds=60)

    def __post_init__(self) -> None:
        for span in (self.default_ttl, self.max_ttl, self.backdate):
            check_span("X.509-SVID", span)
        if not timedelta(0) < self.default_ttl <= self.max_ttl:
            raise MalformedError("X.509-SVID lifetime must be above 0 and within its cap")
        if not timedelta(0) <= self.backdate <= MAX_BACKDATE:
            raise MalformedError("backdate must be 0 to 5 minutes")


class CheckedProfile:
    """A profile that made a good certificate with a throw-away key; `ca.lint` makes it."""

    __slots__ = ("_profile",)

    def __init__(self, profile: X509Profile, proof: object = None) -> None:
        if proof is not LINTED:
            raise LintError("a profile signs nothing before `check_profile` has seen it")
        self._profile = profile

    @property
    def profile(self) -> X509Profile:
        """The profile."""
        return self._profile


LINTED: Final = object()
"""What `ca.lint`, and nobody else, vouches for a profile with."""


@dataclass(slots=True)
class PreparedX509:
    """One certificate to be; it can be signed once."""

    spiffe_id: SpiffeId
    public_key: bytes = field(repr=False)
    validity: Validity
    dns_names: tuple[str, ...]
    serial_number: int
    clamped: bool
    authority: ActiveX509
    _spent: bool = False

    def spend(self) -> None:
        """
        Use it up.

        Raises:
            LintError: it was signed already.
        """
        if self._spent:
            raise LintError("a prepared certificate is signed once")
        self._spent = True


@dataclass(frozen=True, slots=True)
class SignedX509:
    """A leaf that is ready to be recorded and handed out; *clamped* when it lives shorter."""

    svid: X509Svid
    authority_id: str
    clamped: bool


def prepare_x509(
    checked: CheckedProfile,
    authority: ActiveX509,
    *,
    spiffe_id: SpiffeId,
    public_key: bytes,
    now: datetime,
    ttl: timedelta = timedelta(0),
    dns_names: tuple[str, ...] = (),
) -> PreparedX509:
    """
    Decide everything about one leaf; *ttl* of zero means the default.

    Raises:
        NotReadyError: the authority ends before the leaf would begin to be of use.
        MalformedError: the ID has no path, a DNS name or their number breaks a rule, or the
            lifetime is negative or no whole seconds.
    """
    if not spiffe_id.path:
        raise MalformedError("a leaf's SPIFFE ID must have a path")
    check_dns_names(dns_names)
    check_span("X.509-SVID", ttl)
    profile = checked.profile
    wanted = ttl or profile.default_ttl
    second = now.replace(microsecond=0)
    ends = authority.authority.validity
    # The cap comes first: a TTL may reach beyond the calendar.
    end = min(second + min(wanted, profile.max_ttl), ends.not_after)
    if end <= now:
        raise NotReadyError("the X.509 authority has expired; it is renewed by itself")
    # Were a short life backdated by more, it would be due for renewal as soon as it begins.
    begin = second - min(profile.backdate, timedelta(seconds=(end - second) // _SECOND // 4))
    begin = max(begin, ends.not_before)
    if end <= begin:
        raise NotReadyError(
            "the X.509 authority begins later than this clock says: put the clock right, then "
            "start again"
        )
    return PreparedX509(
        spiffe_id,
        public_key,
        Validity(begin, end),
        dns_names,
        random_serial(),
        end - second < wanted,
        authority,
    )


def sign_x509(prepared: PreparedX509) -> SignedX509:
    """
    Sign what was prepared, parse it back and compare (SEC-24).

    Raises:
        LintError: the result differs, or it was signed already; nothing leaves.
        KeyRefusedError: the public key is not one that a leaf may have.
    """
    prepared.spend()
    authority = prepared.authority
    leaf = leaf_of(prepared)
    template = authority.template
    if template is None:
        der = built(prepared, leaf).public_bytes(serialization.Encoding.DER)
    else:
        der = template.sign(tbs_of(template, prepared, leaf), leaf.signer)
    svid = compared(der, prepared, leaf)
    return SignedX509(svid, authority.authority.authority_id, prepared.clamped)


def check_span(what: str, span: timedelta) -> None:
    """
    Check a lifetime (SEC-22): certificates and tokens count whole seconds.

    Raises:
        MalformedError: it is negative, or holds parts of a second.
    """
    if span < timedelta(0):
        raise MalformedError(f"{what} TTL is negative")
    if span.microseconds:
        raise MalformedError(f"{what} TTL must be whole seconds")


def check_dns_names(names: tuple[str, ...]) -> None:
    """
    Check the DNS names of one certificate (SEC-25).

    Raises:
        MalformedError: too many, or one of them is none.
    """
    if len(names) > MAX_DNS_NAMES:
        raise MalformedError(f"more than {MAX_DNS_NAMES} DNS names")
    for name in names:
        check_dns_name(name)


def random_serial() -> int:
    """159 random bits, never zero."""
    while True:
        serial = secrets.randbits(SERIAL_BITS)
        if serial >> 128:  # SEC-22: at least 128 bits that nobody can guess
            return serial


def self_signed(
    key: SigningKey, trust_domain: TrustDomain, *, now: datetime, ttl: timedelta
) -> X509Authority:
    """Return a root that carries the trust domain's own ID (ID-26, X509-08, C-01)."""
    private = key.private_for(KeyPurpose.X509_CA)
    public = private.public_key()
    serial = random_serial()
    # The serial number in the name makes it unique for each key (X509-45, T-16).
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIFFE"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, str(serial)),
        ]
    )
    uri = x509.UniformResourceIdentifier(trust_domain.id.uri)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(now.replace(microsecond=0) - timedelta(seconds=60))
        .not_valid_after(now.replace(microsecond=0) + ttl)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(private, signature_hash(private))
    )
    return X509Authority.parse(certificate.public_bytes(serialization.Encoding.DER))


_NO_SUBJECT: Final = x509.Name([])


@dataclass(frozen=True, slots=True)
class LeafNames:
    """Whom a leaf names, in the library's values and encoded."""

    subject: x509.Name
    extension: x509.Extension[x509.ExtensionType]
    subject_der: bytes
    extension_der: bytes


@lru_cache(maxsize=1024)  # at most 40 KB each, and 1 KB as a rule
def names_of(spiffe_id: SpiffeId, dns_names: tuple[str, ...]) -> LeafNames:
    """Return how a leaf names *spiffe_id* and *dns_names*."""
    # X509-06: an empty subject needs a critical SAN; a first DNS name goes into the subject
    # too, for clients that still look there (SPIRE API 7.1).
    subject = _NO_SUBJECT
    if dns_names and len(dns_names[0]) <= 64:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns_names[0])])
    names = x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(spiffe_id.uri),
            *(x509.DNSName(name) for name in dns_names),
        ]
    )
    extension: x509.Extension[x509.ExtensionType] = x509.Extension(
        names.oid, subject is _NO_SUBJECT, names
    )
    return LeafNames(subject, extension, subject.public_bytes(), extension_der(extension))


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a prepared certificate is to hold, in the library's values."""

    names: LeafNames
    public: Any
    key_id: bytes
    signer: PrivateKey = field(repr=False)
    extensions: list[x509.Extension[x509.ExtensionType]]

    @property
    def subject(self) -> x509.Name:
        """The subject."""
        return self.names.subject


def leaf_of(prepared: PreparedX509) -> Leaf:
    """
    Return what *prepared* is to become.

    Raises:
        KeyRefusedError: its public key is not one that a leaf may have.
    """
    public: Any = key_of_spki(prepared.public_key)  # checked: RSA, EC or Ed25519
    names = names_of(prepared.spiffe_id, prepared.dns_names)
    key_id = key_identifier_of(prepared.public_key, public)
    return Leaf(
        names,
        public,
        key_id,
        prepared.authority.private,
        [
            *prepared.authority.leaf_extensions,
            names.extension,
            x509.Extension(_KEY_ID, False, x509.SubjectKeyIdentifier(key_id)),
        ],
    )


_KEY_ID: Final = x509.SubjectKeyIdentifier.oid


def tbs_of(template: TbsTemplate, prepared: PreparedX509, leaf: Leaf) -> bytes:
    """Return what is signed, as the template writes it: byte for byte what `built` signs."""
    return template.tbs(
        serial=prepared.serial_number,
        validity=prepared.validity,
        subject=leaf.names.subject_der,
        spki=encoded_key(prepared.public_key, leaf.public),
        own=leaf.names.extension_der + key_id_der(leaf.key_id),
    )


def built(prepared: PreparedX509, leaf: Leaf) -> x509.Certificate:
    """Return the certificate as the library makes it."""
    # In one step: its setters copy it each time, which would be a tenth of the issuance.
    builder = x509.CertificateBuilder(
        issuer_name=prepared.authority.issuer_name,
        subject_name=leaf.subject,
        public_key=leaf.public,
        serial_number=prepared.serial_number,
        not_valid_before=prepared.validity.not_before.replace(tzinfo=None),
        not_valid_after=prepared.validity.not_after.replace(tzinfo=None),
        extensions=leaf.extensions,
    )
    return builder.sign(leaf.signer, signature_hash(leaf.signer))


def compared(der: bytes, prepared: PreparedX509, leaf: Leaf) -> X509Svid:
    """
    Compare every field of what was signed, and every extension whole, with what was prepared.

    Raises:
        LintError: something differs (SEC-24).
    """
    try:
        check_certificate_size(der)
        parsed = x509.load_der_x509_certificate(der)
        extensions = list(parsed.extensions)
        same = (
            parsed.version is x509.Version.v3
            and parsed.signature_algorithm_oid == prepared.authority.signature_oid
            and parsed.serial_number == prepared.serial_number
            and _has_issuer(der, parsed, prepared)
            and parsed.not_valid_before_utc == prepared.validity.not_before
            and parsed.not_valid_after_utc == prepared.validity.not_after
            and parsed.subject == leaf.subject
            and parsed.public_key() == leaf.public
            and extensions == leaf.extensions
            # The names once more, from what was prepared and not from what was built.
            and [one.value for one in extensions[-2].value]
            == [prepared.spiffe_id.uri, *prepared.dns_names]
        )
    except Exception as error:  # whatever it is that cannot be read, it does not leave
        raise LintError("what was signed cannot be read back; it was thrown away") from error
    if not same:
        raise LintError("what was signed is not what was prepared; it was thrown away")
    return X509Svid(prepared.spiffe_id, (der,), prepared.validity, prepared.serial_number)


def _has_issuer(der: bytes, parsed: x509.Certificate, prepared: PreparedX509) -> bool:
    authority, template = prepared.authority, prepared.authority.template
    if template is not None and has_issuer(
        der,
        serial=prepared.serial_number,
        algorithm=template.algorithm,
        issuer=authority.issuer_der,  # not the template's, which is what is looked at here
    ):
        return True
    return parsed.issuer == authority.issuer_name
