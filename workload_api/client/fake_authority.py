"""
A CA and a JWT key to test with: what they sign is right, unless a test asks for what is not.

Source: X509-01 to X509-46 and JWT-01 to JWT-32, as a good issuer follows them.  It is no part
of the product's own signing, and nothing that it signs is trusted by anybody but a test.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.strictjson import b64url_encode, dumps
from spiffe_core.x509svid import X509Svid
from workload_api.client.client import X509Identity

X509_TTL: Final = timedelta(hours=1)
JWT_TTL: Final = timedelta(minutes=5)
_BACKDATED: Final = timedelta(seconds=30)
_MONTH: Final = timedelta(days=30)


def utc_now() -> datetime:
    """The present instant."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Ca:
    """A CA certificate with its key; *chain* holds the intermediates below its root."""

    root: bytes
    chain: tuple[bytes, ...]
    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    jwt_key: ec.EllipticCurvePrivateKey
    key_id: str


class FakeAuthority:
    """
    The authorities of one trust domain: signs whatever a test wants, for now or the past.

    A second one of the same name is a stranger that claims the domain.
    """

    def __init__(
        self,
        trust_domain: str = "example.org",
        *,
        intermediate: bool = False,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.trust_domain = TrustDomain(trust_domain)
        self._intermediate = intermediate
        self._now = now
        self._cas = [self._new_ca()]

    @property
    def bundle(self) -> Bundle:
        """What others verify with: the authorities of now, and those of before."""
        return Bundle(
            self.trust_domain,
            tuple(X509Authority.parse(one.root) for one in self._cas),
            tuple(
                JwtAuthority(one.key_id, spki_of(one.jwt_key.public_key())) for one in self._cas
            ),
        )

    def rotate(self, *, keep_old: bool = True) -> None:
        """Sign with new authorities from now on; those of before stay in the bundle or go."""
        self._cas = [self._new_ca(), *(self._cas if keep_old else ())]

    def mint_x509(
        self, path: str, *, hint: str = "", ttl: timedelta = X509_TTL, expired: bool = False
    ) -> X509Identity:
        """Return an X509-SVID for *path* with a new key; *expired*: its life ended just now."""
        ca, key = self._cas[0], ec.generate_private_key(ec.SECP256R1())
        now = self._now().replace(microsecond=0)
        end = now - _BACKDATED if expired else now + ttl
        begin = end - ttl - _BACKDATED
        builder = _certificate(x509.Name([]), ca.name, key.public_key(), begin, end)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf = (
            builder.add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_uri(self._id(path)), critical=True)
            .add_extension(_issuer_key_id(ca.key), critical=False)
            .sign(ca.key, hashes.SHA256())
        )
        return X509Identity(
            X509Svid.from_chain((_der(leaf), *ca.chain)),
            key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            hint,
        )

    def mint_jwt(
        self, path: str, *audience: str, ttl: timedelta = JWT_TTL, expired: bool = False
    ) -> JwtSvid:
        """Return a JWT-SVID for *path* and *audience*; *expired*: a minute too old for all."""
        ca, issued = self._cas[0], int(self._now().timestamp())
        if expired:
            issued -= int(ttl.total_seconds()) + 60
        header = {"alg": "ES256", "kid": ca.key_id, "typ": "JWT"}
        claims = {
            "sub": self._id(path).uri,
            "aud": list(audience),
            "iat": issued,
            "exp": issued + int(ttl.total_seconds()),
        }
        signed = f"{b64url_encode(dumps(header))}.{b64url_encode(dumps(claims))}"
        r, s = decode_dss_signature(ca.jwt_key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return JwtSvid.parse_unverified(f"{signed}.{b64url_encode(signature)}")

    def _id(self, path: str) -> SpiffeId:
        return SpiffeId(self.trust_domain, path)

    def _new_ca(self) -> _Ca:
        """A root, and below it an intermediate when that is wanted."""
        key, name = ec.generate_private_key(ec.SECP256R1()), _name("root", self.trust_domain)
        root = self._ca_certificate(name, key, name, key)
        jwt_key = ec.generate_private_key(ec.SECP256R1())
        key_id = x509.SubjectKeyIdentifier.from_public_key(jwt_key.public_key()).digest.hex()
        made = _Ca(root, (), name, key, jwt_key, key_id)
        if not self._intermediate:
            return made
        below, its_name = (
            ec.generate_private_key(ec.SECP256R1()),
            _name("sub", self.trust_domain),
        )
        chain = (self._ca_certificate(its_name, below, name, key),)
        return replace(made, chain=chain, name=its_name, key=below)

    def _ca_certificate(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Name,
        issuer_key: ec.EllipticCurvePrivateKey,
    ) -> bytes:
        now = self._now().replace(microsecond=0)
        builder = _certificate(name, issuer, key.public_key(), now - _MONTH, now + 120 * _MONTH)
        return _der(
            builder.add_extension(x509.BasicConstraints(True, None), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(_uri(self.trust_domain.id), critical=False)
            .add_extension(_issuer_key_id(issuer_key), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )


def _name(which: str, trust_domain: TrustDomain) -> x509.Name:
    # Another name each time: two CAs of one name and one domain are hard to tell apart.
    text = f"fake {which} {os.urandom(4).hex()} of {trust_domain}"[:64]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*bits: str) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: name in bits for name in names})


def _uri(spiffe_id: SpiffeId) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id.uri)])


def _issuer_key_id(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)
