"""Concatenated certificates: only the outermost layer is walked."""

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.der import DerError, split_certificates
from spiffe_core.keys import MAX_CERTIFICATE_BYTES
from tests.support import der as writer
from tests.support.authorities import a_ca

KIB16 = MAX_CERTIFICATE_BYTES


def of_size(size: int) -> bytes:
    """A SEQUENCE of exactly *size* bytes, head and all."""
    for body in range(max(0, size - 6), size):
        made = writer.sequence(b"\x00" * body)
        if len(made) == size:
            return made
    raise AssertionError(f"no DER of {size} bytes")


def test_wapi_17_certificates_back_to_back() -> None:
    """WAPI-19: real certificates, concatenated, come apart as they went in, in order."""
    some = [a_ca(), a_ca(which="b"), a_ca("rsa2048")]
    assert split_certificates(b"".join(some)) == tuple(some)
    assert split_certificates(some[0]) == (some[0],)


@pytest.mark.parametrize("body", [0, 1, 127, 128, 129, 255, 256, 257, 16_380])
def test_lengths_of_one_two_and_three_bytes(body: int) -> None:
    """Each length has its shortest form, at every border between forms."""
    one = writer.sequence(b"\xff" * body)
    assert split_certificates(one * 2) == (one, one)
    with pytest.raises(DerError, match="cut off"):
        split_certificates(one + one[:-1])


@given(st.lists(st.integers(2, 400) | st.integers(2, 70_000), max_size=5))
def test_what_is_joined_comes_apart(sizes: list[int]) -> None:
    """SEQUENCEs of any size up to 16 KiB come apart; a longer one is refused."""
    some = [writer.sequence(b"\xff" * (size - 2)) for size in sizes]
    joined = b"".join(some)
    if not some or len(joined) > 1024 * 1024 or max(map(len, some)) > KIB16:
        with pytest.raises(DerError):
            split_certificates(joined)
    else:
        assert split_certificates(joined) == tuple(some)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no certificate"),
        (b"\x30", "cut off"),
        (b"\x30\x01", "cut off"),
        (b"\x30\x82\x01", "not a DER certificate"),
        (b"\x30\x82\x01\x00", "cut off"),
        (b"\x00", "not a DER certificate"),
        (b"\x31\x00", "not a DER certificate"),
        (b"\x02\x01\x00", "not a DER certificate"),
        (b"\x10\x00", "not a DER certificate"),
        (b"-----BEGIN CERTIFICATE-----", "not a DER certificate"),
        (b"\x30\x80\x00\x00", "not a DER certificate"),
        (b"\x30\x81\x7f" + b"\x00" * 127, "not a DER certificate"),
        (b"\x30\x82\x00\x80" + b"\x00" * 128, "not a DER certificate"),
        (b"\x30\x84\x00\x00\x00\x80" + b"\x00" * 128, "not a DER certificate"),
        (b"\x30\xff", "not a DER certificate"),
        (b"\x30\x83\xff\xff\xff", "cut off"),
        (b"\x30\x00\x00", "not a DER certificate"),
        (b"\x30\x00\x30", "cut off"),
        (b"\x30\x00\n", "not a DER certificate"),
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else value,
)
def test_what_is_not_der(data: bytes, reason: str) -> None:
    """Cut off, indefinite or padded lengths, other tags and trailing bytes are refused."""
    with pytest.raises(DerError, match=reason):
        split_certificates(data)


def test_sec_14_a_certificate_of_16_kib() -> None:
    """A certificate of 16384 bytes is taken, one of 16385 refused."""
    assert split_certificates(of_size(KIB16)) == (of_size(KIB16),)
    with pytest.raises(DerError, match="longer than 16384"):
        split_certificates(of_size(KIB16 + 1))


def test_sec_14_a_bundle_of_1_mib() -> None:
    """A bundle of 1 MiB is taken, one of a byte more refused before it is walked."""
    whole = of_size(KIB16) * 64
    assert len(whole) == 1024 * 1024
    assert len(split_certificates(whole)) == 64
    with pytest.raises(DerError, match="longer than 1048576 bytes together"):
        split_certificates(whole + b"\x30")
    with pytest.raises(DerError, match="longer than 40 bytes together"):
        split_certificates(b"\x30\x27" + b"\x00" * 39, max_bytes=40)


def test_sec_14_a_lying_length_costs_nothing() -> None:
    """A length of 16 MiB in five bytes is refused without room being made for it."""
    tracemalloc.start()
    with pytest.raises(DerError):
        split_certificates(b"\x30\x83\xff\xff\xff" + b"\x00" * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1024 * 1024


def test_sec_14_half_a_million_pieces() -> None:
    """The most pieces that 1 MiB can hold come apart in a second."""
    started = time.process_time()
    assert len(split_certificates(b"\x30\x00" * 524_288)) == 524_288
    assert time.process_time() - started < 2


HEADS = [b"\x30", b"\x00", b"\x80", b"\x81", b"\x82", b"\x83", b"\xff", b"\x01", b"\x30\x00"]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(HEADS), max_size=12).map(b"".join))
def test_any_bytes(data: bytes) -> None:
    """Any bytes come apart into pieces that make up the whole, or are our own error."""
    try:
        pieces = split_certificates(data)
    except DerError:
        return
    assert b"".join(pieces) == data
    assert all(piece[0] == 0x30 for piece in pieces)
