"""A DER writer of the smallest kind, to write what no library would."""

from datetime import datetime

NULL = b"\x05\x00"


def tlv(tag: int, *parts: bytes) -> bytes:
    """One element: *tag*, the shortest length, the contents."""
    body = b"".join(parts)
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    octets = (size.bit_length() + 7) // 8
    return bytes((tag, 0x80 | octets)) + size.to_bytes(octets, "big") + body


def sequence(*parts: bytes) -> bytes:
    """A SEQUENCE."""
    return tlv(0x30, *parts)


def integer(value: int) -> bytes:
    """An INTEGER, negative ones too."""
    size = (value + (value < 0)).bit_length() // 8 + 1
    return tlv(0x02, value.to_bytes(size, "big", signed=True))


def boolean(value: bool) -> bytes:
    """A BOOLEAN."""
    return tlv(0x01, b"\xff" if value else b"\x00")


def octets(value: bytes) -> bytes:
    """An OCTET STRING."""
    return tlv(0x04, value)


def bits(value: bytes, unused: int = 0) -> bytes:
    """A BIT STRING."""
    return tlv(0x03, bytes((unused,)), value)


def oid(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER."""
    first, second, *rest = map(int, dotted.split("."))
    out = bytearray()
    for arc in (first * 40 + second, *rest):
        septets = [arc & 0x7F]
        while arc := arc >> 7:
            septets.append(0x80 | arc & 0x7F)
        out += bytes(reversed(septets))
    return tlv(0x06, bytes(out))


def explicit(number: int, *parts: bytes) -> bytes:
    """A constructed context tag."""
    return tlv(0xA0 | number, *parts)


def implicit(number: int, value: bytes) -> bytes:
    """A primitive context tag."""
    return tlv(0x80 | number, value)


def utc_time(at: datetime) -> bytes:
    """A UTCTime: two digits of the year."""
    return tlv(0x17, at.strftime("%y%m%d%H%M%SZ").encode())


def generalized_time(at: datetime) -> bytes:
    """A GeneralizedTime."""
    return tlv(0x18, f"{at.year:04}".encode() + at.strftime("%m%d%H%M%SZ").encode())


def time(at: datetime) -> bytes:
    """The form that RFC 5280 4.1.2.5 asks for: UTCTime through 2049."""
    return utc_time(at) if 1950 <= at.year < 2050 else generalized_time(at)
