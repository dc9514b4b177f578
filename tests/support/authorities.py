"""Authorities to test with: keys made once, CA certificates and leaves that are right."""

import datetime as dt
from collections.abc import Sequence
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.keys import spki_of

NOW = dt.datetime(2026, 3, 1, 12, 0, 0, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
URI = "spiffe://example.org"

KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)

_MAKERS: dict[str, Any] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "p224": lambda: ec.generate_private_key(ec.SECP224R1()),
    "k256": lambda: ec.generate_private_key(ec.SECP256K1()),
    "brainpool": lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
    "rsa1024": lambda: rsa.generate_private_key(65537, 1024),  # noqa: S505 - to be refused
    "rsa2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa4096": lambda: rsa.generate_private_key(65537, 4096),
    "rsa-e3": lambda: rsa.generate_private_key(3, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
    "dsa": lambda: dsa.generate_private_key(2048),
}


def a_key(kind: str = "p256", which: str = "") -> Any:
    """A private key; the same one for the same arguments, as making RSA keys takes long."""
    return _key(kind, which)


@cache
def _key(kind: str, which: str) -> Any:
    return _MAKERS[kind]()


def key_usage(*bits: str) -> x509.KeyUsage:
    """A key usage with exactly these bits."""
    return x509.KeyUsage(**{name: name in bits for name in KEY_USAGES})


def a_ca(
    kind: str = "p256",
    which: str = "",
    *,
    uris: Sequence[str] = (URI,),
    ca: bool | None = True,
    usage: x509.KeyUsage | None = key_usage("key_cert_sign", "crl_sign"),  # noqa: B008
    life: tuple[dt.datetime, dt.datetime] = (NOW - DAY, NOW + DAY),
    ski: bool = True,
    extra: Sequence[x509.ExtensionType] = (),
) -> bytes:
    """A self-signed CA certificate, DER; *ca* or *usage* None leaves the extension out."""
    key = a_key(kind, which)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {kind} {which}")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(life[0])
        .not_valid_after(life[1])
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ski:
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    return _signed(builder, key)


def a_leaf(
    issuer: bytes,
    issuer_key: Any,
    uri: str = "spiffe://example.org/w",
) -> bytes:
    """A workload's certificate, DER, signed by *issuer*."""
    parent = x509.load_der_x509_certificate(issuer)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(parent.subject)
        .public_key(a_key("p256", "workload").public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(minutes=1))
        .not_valid_after(NOW + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(key_usage("digital_signature"), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
        )
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    return _signed(builder, issuer_key)


def an_x509_authority(kind: str = "p256", which: str = "", **changes: Any) -> X509Authority:
    """A correct X.509 authority of example.org."""
    return X509Authority.parse(a_ca(kind, which, **changes))


def a_jwt_authority(key_id: str = "k1", kind: str = "p256", which: str = "jwt") -> JwtAuthority:
    """A correct JWT authority."""
    return JwtAuthority(key_id, spki_of(a_key(kind, which).public_key()))


def pkcs8_of(key: Any) -> bytes:
    """A private key as PKCS#8 DER."""
    return bytes(
        key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _signed(builder: x509.CertificateBuilder, key: Any) -> bytes:
    algorithm = (
        None
        if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
        else hashes.SHA256()
    )
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)
