"""PEM files."""

import base64
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.pem import (
    MAX_PEM_BYTES,
    PemError,
    certificates_from_pem,
    certificates_to_pem,
    private_key_to_pem,
)
from tests.support.authorities import a_ca, a_key, pkcs8_of

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def test_certificates_go_and_come_back() -> None:
    """What we write, we and the library read as the same certificates, in order."""
    some = [a_ca(), a_ca(which="b"), a_ca("rsa2048")]
    text = certificates_to_pem(some)
    assert certificates_from_pem(text) == tuple(some)
    loaded = x509.load_pem_x509_certificates(text.encode())
    assert [one.public_bytes(serialization.Encoding.DER) for one in loaded] == some


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4))
def test_any_content_goes_and_comes_back(some: list[bytes]) -> None:
    """Any content that is not empty reads back; lines have 64 characters at most."""
    text = certificates_to_pem(some)
    assert certificates_from_pem(text) == tuple(some)
    assert max(map(len, text.splitlines())) <= 64


def test_a_key_is_written_as_pkcs8() -> None:
    """A private key in PEM is the library's own form of it."""
    key = a_key()
    assert private_key_to_pem(pkcs8_of(key)) == key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()  # fmt: skip


def test_comments_and_line_ends() -> None:
    """Text between blocks is skipped, and lines may end as on Windows or be of any length."""
    der = a_ca()
    text = certificates_to_pem([der])
    for form in (
        f"subject=CN = x\n{text}\nissuer\n{text}",
        text.replace("\n", "\r\n") * 2,
        f"{BEGIN}\n{base64.b64encode(der).decode()}\n{END}{text}",
    ):
        assert certificates_from_pem(form) == (der, der)


@pytest.mark.parametrize(
    "label", ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"]
)
def test_sec_12_a_private_key_beside_them(label: str) -> None:
    """A file that holds a private key, of any kind and in any place, is refused."""
    text = certificates_to_pem([a_ca()])
    key = f"-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n"
    for both in (text + key, key + text):
        with pytest.raises(PemError, match="private key"):
            certificates_from_pem(both)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        BEGIN,
        f"{BEGIN}\nAAAA",
        f"{BEGIN}\nAAAA\n-----END X-----",
        f"{BEGIN}{END}",
        f"{BEGIN}\n{END}\n",
        f"{BEGIN}\n\n\n{END}\n",
        f"{BEGIN}\nAAA\n{END}",
        f"{BEGIN}\nA===\n{END}",
        f"{BEGIN}\nAA=A\n{END}",
        f"{BEGIN}\nAAAA=\n{END}",
        f"{BEGIN}\nAA_-\n{END}",
        f"{BEGIN}\nAA!A\n{END}",
        f"{BEGIN}\n{BEGIN}\nAAAA\n{END}",
        f"{BEGIN}\nAAAA\n{END}\n-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        "-----BEGIN TRUSTED CERTIFICATE-----\nAAAA\n-----END TRUSTED CERTIFICATE-----",
        f"{BEGIN}\nProc-Type: 4,ENCRYPTED\n\nAAAA\n{END}",
        f"{BEGIN}\n\uff21AAA\n{END}",
    ],
    ids=ascii,
)
def test_what_is_not_pem(text: str) -> None:
    """No block, a broken or empty one, or one of another kind beside it is refused."""
    with pytest.raises(PemError):
        certificates_from_pem(text)


def test_sec_14_1_mib() -> None:
    """1 MiB is read; a byte more is refused, and hostile text of that size costs little."""
    text = certificates_to_pem([b"\x30"])
    assert MAX_PEM_BYTES == 1048576
    assert certificates_from_pem(text.ljust(MAX_PEM_BYTES)) == (b"\x30",)
    with pytest.raises(PemError, match="longer than 1 MiB"):
        certificates_from_pem(text.ljust(MAX_PEM_BYTES + 1))
    started = time.process_time()
    for bomb in (f"{BEGIN}\n", f"{BEGIN}\nA", f"{BEGIN}\n" + "A" * MAX_PEM_BYTES, BEGIN + " "):
        with pytest.raises(PemError):
            certificates_from_pem((bomb * (MAX_PEM_BYTES // len(bomb) + 1))[:MAX_PEM_BYTES])
    assert time.process_time() - started < 2


@given(
    st.text(max_size=50)
    | st.lists(
        st.sampled_from([BEGIN, END, "\n", "AAAA", "AA==", "=", "-----", " ", "x", "\xa0"]),
        max_size=10,
    ).map("".join)
)
def test_any_text(text: str) -> None:
    """Any text gives certificates that are not empty, or our own error."""
    try:
        found = certificates_from_pem(text)
    except PemError:
        return
    assert found
    assert all(found)
