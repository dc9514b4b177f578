"""
What is in the files: SVIDs, keys and bundles as PEM, PKCS#12, JWK Sets and plain tokens.

Each function returns files by name, for `SvidFolder.write`.  A bundle is a file for each trust
domain (SEC-11): who verifies a peer takes the file of the peer's own domain.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import BundleSet
from spiffe_core.errors import PreconditionError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from workload_api.client.client import X509Identity
from workload_api.sidecar.files import PUBLIC_MODE, SECRET_MODE, File

MAX_PASSWORD_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Modes:
    """Who may read which kind of file."""

    key: int = SECRET_MODE
    """Private keys, and whatever holds one."""
    certificate: int = PUBLIC_MODE
    bundle: int = PUBLIC_MODE
    jwt: int = SECRET_MODE


MODES: Final = Modes()


@dataclass(frozen=True, slots=True)
class Password:
    """What a PKCS#12 file is sealed with."""

    value: bytes = field(repr=False)

    @classmethod
    def from_file(cls, path: Path) -> "Password":
        """
        Read the first line of a file: a password on a command line is everybody's.

        Raises:
            PreconditionError: the file cannot be read, or its first line is empty.
        """
        try:
            with path.open("rb") as file:
                line = file.readline(MAX_PASSWORD_BYTES + 2).rstrip(b"\r\n")
        except OSError as error:
            raise PreconditionError(f"cannot read {path}: {error.strerror}") from error
        if not 1 <= len(line) <= MAX_PASSWORD_BYTES:
            raise PreconditionError(
                f"{path}: its first line must be a password of 1 to {MAX_PASSWORD_BYTES} bytes"
            )
        return cls(line)


def svid_pem(
    name: str, one: X509Identity, modes: Modes = MODES, *, leaf_alone: bool = False
) -> dict[str, File]:
    """``NAME.pem``, leaf first, and ``NAME.key``; *leaf_alone* leaves intermediates out."""
    chain = one.svid.chain[:1] if leaf_alone else one.svid.chain
    return {
        f"{name}.key": File(private_key_to_pem(one.key).encode(), modes.key),
        f"{name}.pem": File(certificates_to_pem(chain).encode(), modes.certificate),
    }


def svid_combined(name: str, one: X509Identity, modes: Modes = MODES) -> dict[str, File]:
    """``NAME.combined.pem``: the key, then the chain; one file, which always fits itself."""
    text = private_key_to_pem(one.key) + certificates_to_pem(one.svid.chain)
    return {f"{name}.combined.pem": File(text.encode(), modes.key)}


def svid_pkcs12(
    name: str, one: X509Identity, password: Password, modes: Modes = MODES
) -> dict[str, File]:
    """``NAME.p12``: key and chain, named by the SPIFFE ID."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    leaf, *others = (x509.load_der_x509_certificate(der) for der in one.svid.chain)
    key = serialization.load_der_private_key(one.key, None)
    data = pkcs12.serialize_key_and_certificates(
        one.svid.spiffe_id.uri.encode(),
        key,  # type: ignore[arg-type]  # of the kinds that an SVID may have
        leaf,
        others or None,
        serialization.BestAvailableEncryption(password.value),
    )
    return {f"{name}.p12": File(data, modes.key)}


def bundles_pem(
    bundles: BundleSet,
    modes: Modes = MODES,
    *,
    valid_at: datetime | None = None,
    intermediates: Sequence[X509Identity] = (),
) -> dict[str, File]:
    """
    ``bundle.<trust domain>.pem`` for each trust domain, never a merged pool (SEC-11).

    *valid_at* leaves out authorities that have expired by then; each of *intermediates* adds
    its own to its own domain's file.
    """
    found = {}
    for name, bundle in bundles.items():
        ders = [one.der for one in _still_valid(bundle.x509_authorities, valid_at)]
        for one in intermediates:
            if one.svid.spiffe_id.trust_domain == name:
                ders += [der for der in one.svid.chain[1:] if der not in ders]
        text = certificates_to_pem(ders)
        found[f"bundle.{name}.pem"] = File(text.encode(), modes.bundle)
    return found


def bundles_pkcs12(
    bundles: BundleSet,
    password: Password,
    modes: Modes = MODES,
    *,
    valid_at: datetime | None = None,
) -> dict[str, File]:
    """``bundle.<trust domain>.p12``: a trust store as Java reads it, one for each domain."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    found = {}
    for name, bundle in bundles.items():
        certificates = [
            pkcs12.PKCS12Certificate(
                x509.load_der_x509_certificate(one.der), f"{name}-{number}".encode()
            )
            for number, one in enumerate(_still_valid(bundle.x509_authorities, valid_at))
        ]
        if not certificates:
            continue  # nothing is trusted, and the format has no word for that
        data = pkcs12.serialize_java_truststore(
            certificates, serialization.BestAvailableEncryption(password.value)
        )
        found[f"bundle.{name}.p12"] = File(data, modes.bundle)
    return found


def bundles_merged(
    name: str, bundles: BundleSet, modes: Modes = MODES, *, valid_at: datetime | None = None
) -> dict[str, File]:
    """Every domain's authorities in one file: each of them can then speak for all (SEC-11)."""
    ders = [
        one.der
        for bundle in bundles.values()
        for one in _still_valid(bundle.x509_authorities, valid_at)
    ]
    return {name: File(certificates_to_pem(ders).encode(), modes.bundle)}


def bundles_jwks(bundles: BundleSet, modes: Modes = MODES) -> dict[str, File]:
    """``bundle.<trust domain>.jwks.json``: the keys of each domain's JWT-SVIDs."""
    from spiffe_core.bundle_document import jwks_of

    return {
        f"bundle.{name}.jwks.json": File(jwks_of(one), modes.bundle)
        for name, one in bundles.items()
    }


def jwt_file(name: str, svid: JwtSvid, modes: Modes = MODES) -> dict[str, File]:
    """The token and nothing else, not even a line's end: it goes into a header as it is."""
    return {name: File(svid.token.encode(), modes.jwt)}


def jwt_name(audience: Sequence[str], number: int | None = None) -> str:
    """A file name for a JWT-SVID: one for each list of audiences, whatever they hold."""
    words = "+".join(quote(one, safe="") for one in audience)
    return f"jwt.{words}.token" if number is None else f"jwt.{number}.{words}.token"


def _still_valid(
    authorities: Iterable[X509Authority], at: datetime | None
) -> list[X509Authority]:
    return [one for one in authorities if at is None or at <= one.validity.not_after]
