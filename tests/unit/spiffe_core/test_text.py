"""Lengths in bytes, and base64 of the padded sort."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.strictjson import StrictJsonError, b64_decode
from spiffe_core.text import utf8_bytes


@given(st.text())
def test_bytes_of_text(text: str) -> None:
    """The length is that of the UTF-8 form."""
    assert utf8_bytes(text) == len(text.encode())


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc00\ud800", "é\udcff"], ids=ascii)
def test_half_a_pair_has_no_length(text: str) -> None:
    """What UTF-8 cannot carry has no length, and raises nothing."""
    assert utf8_bytes(text) is None


@given(st.binary(max_size=60))
def test_base64_goes_and_comes_back(data: bytes) -> None:
    """SEC-05: what any encoder writes, padded, is read."""
    assert b64_decode(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "text", ["YR==", "YWF=", "YQ", "YQ=", "YQ===", "YWJj=", "Y Q==", "-_8="]
)
def test_base64_that_is_not_the_one_spelling(text: str) -> None:
    """SEC-05: spare bits, padding too much or too little, and other alphabets are refused."""
    with pytest.raises(StrictJsonError, match="base64"):
        b64_decode(text)


@given(st.text(st.characters(codec=None), max_size=12) | st.text("YWQ=+/-_ \n", max_size=12))
def test_base64_in_one_spelling(text: str) -> None:
    """SEC-05: any other text than the one spelling of its bytes is refused."""
    try:
        data = b64_decode(text)
    except StrictJsonError:
        return
    assert base64.b64encode(data).decode() == text
