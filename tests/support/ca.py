"""
A CA to test with: what it makes is right, and a test changes one thing.

Certificates are written byte by byte, so that one can hold what no library would sign.
"""

import datetime as dt
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, padding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, ObjectIdentifier

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from tests.support import der
from tests.support.authorities import DAY, NOW, a_key, key_usage

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_EC = {"sha1": "1.2.840.10045.4.1", "sha224": "1.2.840.10045.4.3.1",
       "sha256": "1.2.840.10045.4.3.2", "sha384": "1.2.840.10045.4.3.3",
       "sha512": "1.2.840.10045.4.3.4"}  # fmt: skip
_RSA = {"md5": "1.2.840.113549.1.1.4", "sha1": "1.2.840.113549.1.1.5",
        "sha224": "1.2.840.113549.1.1.14", "sha256": "1.2.840.113549.1.1.11",
        "sha384": "1.2.840.113549.1.1.12", "sha512": "1.2.840.113549.1.1.13"}  # fmt: skip


@dataclass(frozen=True)
class Ext:
    """One extension: *value* is what the OCTET STRING holds."""

    oid: ObjectIdentifier
    value: bytes
    critical: bool = False

    def der(self) -> bytes:
        """The extension as the certificate holds it."""
        flag = der.boolean(True) if self.critical else b""
        return der.sequence(der.oid(self.oid.dotted_string), flag, der.octets(self.value))


def ext(value: x509.ExtensionType, critical: bool = False) -> Ext:
    """An extension of a kind that the library knows."""
    return Ext(value.oid, value.public_bytes(), critical)


def name(*common_names: str) -> bytes:
    """A distinguished name, DER; none gives the empty name."""
    made = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in common_names])
    return made.public_bytes()


def uri_san(*uris: str, others: tuple[x509.GeneralName, ...] = (), critical: bool) -> Ext:
    """A subject alternative name; the URIs may be what the library would not encode."""
    parts = [der.implicit(6, uri.encode()) for uri in uris]
    parts += [_general_name(other) for other in others]
    value = der.sequence(*parts)
    return Ext(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, value, critical)


def _general_name(other: x509.GeneralName) -> bytes:
    whole = x509.SubjectAlternativeName([other]).public_bytes()
    return whole[2:] if whole[1] < 0x80 else whole[2 + (whole[1] & 0x7F) :]


@dataclass(frozen=True)
class Cert:
    """One certificate to be."""

    subject: bytes
    issuer: bytes
    spki: bytes
    signer: Any = field(repr=False)
    extensions: tuple[Ext, ...]
    serial: int = 0x1001
    not_before: dt.datetime | bytes = NOW - dt.timedelta(minutes=1)
    not_after: dt.datetime | bytes = NOW + dt.timedelta(hours=1)
    version: int | None = 2
    digest: str = "sha256"
    inner_algorithm: bytes = b""
    outer_algorithm: bytes = b""
    signature: bytes = b""
    trailer: bytes = b""

    def but(self, **changes: Any) -> Self:
        """The same with other fields."""
        return replace(self, **changes)

    def without(self, *oids: ObjectIdentifier) -> Self:
        """The same without these extensions."""
        return self.but(extensions=tuple(one for one in self.extensions if one.oid not in oids))

    def having(self, *added: Ext) -> Self:
        """The same with these extensions in the place of any of their kind."""
        kinds = {one.oid: one for one in added}
        kept = [kinds.pop(one.oid, one) for one in self.extensions]
        return self.but(extensions=(*kept, *kinds.values()))

    def adding(self, *added: Ext) -> Self:
        """The same with these extensions behind the others, doubles too."""
        return self.but(extensions=(*self.extensions, *added))

    def find(self, oid: ObjectIdentifier) -> Ext:
        """Its extension of one kind."""
        return next(one for one in self.extensions if one.oid == oid)

    @cached_property
    def tbs(self) -> bytes:
        """The part that is signed."""
        version = b"" if self.version is None else der.explicit(0, der.integer(self.version))
        extensions = b""
        if self.extensions:
            extensions = der.explicit(3, der.sequence(*(one.der() for one in self.extensions)))
        return der.sequence(
            version,
            der.integer(self.serial),
            self.inner_algorithm or algorithm_of(self.signer, self.digest),
            self.issuer,
            der.sequence(_time(self.not_before), _time(self.not_after)),
            self.subject,
            self.spki,
            extensions,
        )

    @cached_property
    def der(self) -> bytes:
        """The certificate."""
        algorithm = self.outer_algorithm or algorithm_of(self.signer, self.digest)
        signature = self.signature or sign(self.signer, self.tbs, self.digest)
        return der.sequence(self.tbs, algorithm, der.bits(signature)) + self.trailer


def _time(at: dt.datetime | bytes) -> bytes:
    return at if isinstance(at, bytes) else der.time(at)


def algorithm_of(key: Any, digest: str) -> bytes:
    """The AlgorithmIdentifier of a signature."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return der.sequence(der.oid("1.3.101.112"))
    if isinstance(key, ed448.Ed448PrivateKey):
        return der.sequence(der.oid("1.3.101.113"))
    if isinstance(key, dsa.DSAPrivateKey):
        return der.sequence(der.oid("2.16.840.1.101.3.4.3.2"))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return der.sequence(der.oid(_EC[digest]))
    return der.sequence(der.oid(_RSA[digest]), der.NULL)


def sign(key: Any, data: bytes, digest: str) -> bytes:
    """A signature by *key*, whichever kind it is."""
    if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        return key.sign(data)
    if isinstance(key, dsa.DSAPrivateKey):
        return key.sign(data, hashes.SHA256())
    algorithm = getattr(hashes, digest.upper())()
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(algorithm))
    return bytes(key.sign(data, padding.PKCS1v15(), algorithm))


class FakeCa:
    """A signing certificate of a trust domain; self-signed unless it has a *parent*."""

    def __init__(
        self,
        trust_domain: str = "example.org",
        kind: str = "p256",
        which: str = "",
        *,
        parent: "FakeCa | None" = None,
        path_length: int | None = None,
        extra: tuple[Ext, ...] = (),
        **changes: Any,
    ) -> None:
        self.trust_domain = TrustDomain(trust_domain)
        self.key = a_key(kind, f"{trust_domain} {which}")
        self.parent = parent
        signer = parent or self
        self.name = name(f"{trust_domain[:30]} {kind} {which}")
        public = self.key.public_key()
        self.key_id = x509.SubjectKeyIdentifier.from_public_key(public).digest
        extensions = [
            ext(x509.BasicConstraints(True, path_length), critical=True),
            ext(key_usage("key_cert_sign", "crl_sign"), critical=True),
            uri_san(f"spiffe://{trust_domain}", critical=False),
            ext(x509.SubjectKeyIdentifier(self.key_id)),
        ]
        if parent is not None:
            extensions.append(ext(x509.AuthorityKeyIdentifier(parent.key_id, None, None)))
        made = Cert(
            subject=self.name,
            issuer=signer.name,
            spki=spki_of(public),
            signer=signer.key,
            extensions=(*extensions, *extra),
            not_before=NOW - DAY,
            not_after=NOW + 30 * DAY,
            digest=_digest_for(signer.key),
        )
        self.cert = made.but(**changes)

    def changed(self, cert: Cert) -> "FakeCa":
        """The same CA with another certificate."""
        made = FakeCa.__new__(FakeCa)
        made.__dict__.update(self.__dict__, cert=cert)
        for name in ("authority", "bundle", "bundles"):  # they hold the certificate of before
            made.__dict__.pop(name, None)
        return made

    def child(self, which: str = "sub", kind: str = "p256", **changes: Any) -> "FakeCa":
        """An intermediate signed by this one."""
        return FakeCa(self.trust_domain.name, kind, which, parent=self, **changes)

    def leaf(self, path: str = "/w", kind: str = "p256", **changes: Any) -> Cert:
        """A workload's certificate; *path* is a path or a whole URI."""
        uri = path if "://" in path else f"spiffe://{self.trust_domain}{path}"
        public = a_key(kind, "workload").public_key()
        made = Cert(
            subject=name(),
            issuer=self.name,
            spki=spki_of(public),
            signer=self.key,
            extensions=(
                ext(x509.BasicConstraints(False, None), critical=True),
                ext(key_usage("digital_signature"), critical=True),
                ext(x509.ExtendedKeyUsage(BOTH)),
                uri_san(uri, critical=True),
                ext(x509.AuthorityKeyIdentifier(self.key_id, None, None)),
                ext(x509.SubjectKeyIdentifier.from_public_key(public)),
            ),
            digest=_digest_for(self.key),
        )
        return made.but(**changes)

    def chain(self, leaf: Cert | None = None) -> tuple[bytes, ...]:
        """A leaf and the intermediates up to the root, without the root."""
        found = [(leaf or self.leaf()).der]
        signer = self
        while signer.parent is not None:
            found.append(signer.cert.der)
            signer = signer.parent
        return tuple(found)

    @property
    def root(self) -> "FakeCa":
        """The CA at the end of the chain."""
        return self if self.parent is None else self.parent.root

    @cached_property
    def authority(self) -> X509Authority:
        """What others verify with."""
        return X509Authority.parse(self.cert.der)

    @cached_property
    def jwt_key(self) -> Any:
        """The trust domain's key for tokens, ES256."""
        return a_key("p256", f"{self.trust_domain} jwt")

    @cached_property
    def bundle(self) -> Bundle:
        """The trust domain's bundle, with the JWT key ``k1``."""
        jwt = JwtAuthority("k1", spki_of(self.jwt_key.public_key()))
        return Bundle(self.trust_domain, (self.root.authority,), (jwt,))

    @cached_property
    def bundles(self) -> BundleSet:
        """That bundle alone, as verification takes it."""
        return BundleSet.of([self.bundle])


def _digest_for(key: Any) -> str:
    is_p384 = isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    return "sha384" if is_p384 else "sha256"
