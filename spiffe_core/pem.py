"""PEM text for files that people and other programs read; size first (SEC-14)."""

import base64
import re
from collections.abc import Sequence
from typing import Final

from spiffe_core.errors import MalformedError
from spiffe_core.strictjson import StrictJsonError, b64_decode

MAX_PEM_BYTES: Final = 1024 * 1024  # SEC-14

_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----"
)


class PemError(MalformedError):
    """Text is not PEM certificates."""


def certificates_to_pem(certificates: Sequence[bytes]) -> str:
    """Return DER *certificates* as PEM blocks, in order."""
    return "".join(_armour("CERTIFICATE", der) for der in certificates)


def private_key_to_pem(pkcs8: bytes) -> str:
    """Return a PKCS#8 DER key as a PEM block; the caller sees to the file's mode."""
    return _armour("PRIVATE KEY", pkcs8)


def certificates_from_pem(text: str) -> tuple[bytes, ...]:
    """
    Return the DER certificates in *text*; comments between blocks are skipped.

    Raises:
        PemError: too long, none in it, a broken block, or a private key beside them (SEC-12).
    """
    if len(text) > MAX_PEM_BYTES:
        raise PemError("PEM text is longer than 1 MiB")
    if "PRIVATE KEY-----" in text:
        raise PemError("a private key stands beside the certificates; take it out")
    blocks = _CERTIFICATE.findall(text)
    if not blocks or len(blocks) != text.count("-----BEGIN "):
        raise PemError("expected one or more CERTIFICATE blocks and nothing else")
    try:
        found = [b64_decode("".join(block.split())) for block in blocks]
    except StrictJsonError as error:
        raise PemError("a CERTIFICATE block is not base64") from error
    if not all(found):
        raise PemError("a CERTIFICATE block is empty")
    return tuple(found)


def _armour(label: str, der: bytes) -> str:
    body = base64.b64encode(der).decode()
    lines = [body[at : at + 64] for at in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])
