"""Certificates of a cluster: its CA, servers, and clients with CN as user, O as groups."""

import datetime as dt
import ipaddress
import itertools
import os
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.authorities import a_key, key_usage

DAY = dt.timedelta(days=1)
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Present this in handshakes from now on."""
        descriptor, path = tempfile.mkstemp(suffix=".pem")
        try:
            with open(descriptor, "wb") as file:
                file.write(self.certificate + self.key)
            context.load_cert_chain(path)
        finally:
            os.unlink(path)


class ClusterCa:
    """A certificate authority, valid from yesterday for ten years by the machine's clock."""

    def __init__(self, name: str = "kubernetes") -> None:
        self._key = a_key("p256", f"cluster ca {next(_numbers)}")
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            self._builder(self.name, self._key.public_key())
            .add_extension(x509.BasicConstraints(True, None), critical=True)
            .add_extension(
                key_usage("digital_signature", "key_encipherment", "key_cert_sign"),
                critical=True,
            )
        )
        self.certificate = builder.sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(self, subject: x509.Name, public: Any, life: Any = None) -> Any:
        now = dt.datetime.now(dt.UTC)
        begin, end = life or (now - DAY, now + 3650 * DAY)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )

    def serving(
        self,
        names: Sequence[str],
        common_name: str = "kube-apiserver",
        *,
        expired: bool = False,
    ) -> Pair:
        """A server's certificate for DNS names and addresses."""
        now = dt.datetime.now(dt.UTC)
        life = (now - 2 * DAY, now - DAY) if expired else None
        key = a_key("p256", f"serving {common_name}")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = self._leaf(subject, key, ExtendedKeyUsageOID.SERVER_AUTH, life)
        sans = x509.SubjectAlternativeName([_san(name) for name in names])
        return self._pair(builder.add_extension(sans, critical=False), key)

    def client(self, user: str, groups: Sequence[str] = ()) -> Pair:
        """A client's certificate: *user* as common name, *groups* as organisations."""
        key = a_key("p256", "cluster client")
        organisations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, one) for one in groups]
        subject = x509.Name([*organisations, x509.NameAttribute(NameOID.COMMON_NAME, user)])
        return self._pair(self._leaf(subject, key, ExtendedKeyUsageOID.CLIENT_AUTH), key)

    def _leaf(self, subject: x509.Name, key: Any, usage: Any, life: Any = None) -> Any:
        return (
            self._builder(subject, key.public_key(), life)
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(key_usage("digital_signature", "key_encipherment"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )

    def _pair(self, builder: Any, key: Any) -> Pair:
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pair(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def server_context(pair: Pair, client_ca: ClusterCa) -> ssl.SSLContext:
    """
    TLS as an API server or kubelet offers it: a client's certificate is welcome, not needed.

    A real one ends a handshake with a stranger's certificate well and answers 401; OpenSSL
    under Python can only refuse the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=client_ca.pem.decode())
    context.set_alpn_protocols(["http/1.1"])
    pair.load_into(context)
    return context
