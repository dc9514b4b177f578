"""
Concatenated DER certificates, as the Workload API carries them.

Source: WAPI-17, WAPI-19, T-17 (the library refuses concatenated DER, so the outermost TLV
is walked here, and nothing inside it), SEC-14 (size first).
"""

from typing import Final

from spiffe_core.errors import MalformedError
from spiffe_core.keys import MAX_CERTIFICATE_BYTES

MAX_BUNDLE_BYTES: Final = 1024 * 1024  # security requirements, table 1
_SEQUENCE: Final = 0x30


class DerError(MalformedError):
    """Bytes are not certificates back to back."""


def split_certificates(der: bytes, *, max_bytes: int = MAX_BUNDLE_BYTES) -> tuple[bytes, ...]:
    """
    Split concatenated DER certificates; the inside of each is not looked at.

    Raises:
        DerError: empty, too long, or not whole SEQUENCEs back to back.
    """
    if not der:
        raise DerError("no certificate")
    if len(der) > max_bytes:
        raise DerError(f"certificates are longer than {max_bytes} bytes together")
    found = []
    start = 0
    while start < len(der):
        end = _end_of_sequence(der, start)
        if end - start > MAX_CERTIFICATE_BYTES:
            raise DerError(f"certificate is longer than {MAX_CERTIFICATE_BYTES} bytes")
        found.append(der[start:end])
        start = end
    return tuple(found)


def _end_of_sequence(der: bytes, start: int) -> int:
    if der[start] != _SEQUENCE:
        raise DerError("not a DER certificate")
    if start + 2 > len(der):
        raise DerError("certificate is cut off")
    length = der[start + 1]
    body = start + 2
    if length >= 0x80:
        octets = length & 0x7F
        # 0x80 is BER's indefinite form; a certificate under 16 KiB needs two octets.
        if octets not in (1, 2, 3):
            raise DerError("not a DER certificate")
        digits = der[body : body + octets]
        length = int.from_bytes(digits, "big")
        if len(digits) != octets or digits[0] == 0 or length < 0x80:
            raise DerError("not a DER certificate")
        body += octets
    if body + length > len(der):
        raise DerError("certificate is cut off")
    return body + length
