"""
The one strict JSON reader, and the strict base64 and base64url readers (SEC-05, T-30).

The standard library keeps the last of two equal members, reads NaN, and skips junk in
base64; each of these has been a vulnerability somewhere.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeAlias

from spiffe_core.errors import MalformedError

Json: TypeAlias = Mapping[str, Any] | Sequence[Any] | str | int | float | bool | None

MAX_DEPTH: Final = 32  # SEC-05
MAX_INTEGER: Final = 2**53  # SEC-05; beyond it other readers lose digits
MAX_BYTES: Final = 1024 * 1024

_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")


class StrictJsonError(MalformedError):
    """Text is not the one thing every reader would agree it is."""


def loads(
    data: bytes | str,
    *,
    max_depth: int = MAX_DEPTH,
    max_integer: int = MAX_INTEGER,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """
    Parse one JSON document.

    Raises:
        StrictJsonError: not UTF-8, half a surrogate pair, a duplicate member, NaN or
            Infinity, deeper than *max_depth*, an integer beyond *max_integer*, longer
            than *max_bytes*, or anything behind the document.
    """
    try:
        encoded = data.encode() if isinstance(data, str) else data
        if len(encoded) > max_bytes:
            raise StrictJsonError(f"JSON is longer than {max_bytes} bytes")
        text = encoded.decode()
    except UnicodeError as error:
        raise StrictJsonError("JSON is not UTF-8") from error
    _check_depth(text, max_depth)

    try:
        value = _decoder(max_integer).decode(text)
    except ValueError as error:
        raise StrictJsonError("not JSON") from error
    if "\\" in text and _SURROGATE.search(text):
        dumps(value)  # "\ud83d\ude00" is one character; "\ud83d" alone cannot be encoded
    return value


def dumps(value: Json) -> bytes:
    """
    Return *value* as compact UTF-8 JSON.

    Raises:
        StrictJsonError: NaN or Infinity, or half a surrogate pair.
    """
    try:
        return _ENCODER.encode(value).encode()
    except UnicodeEncodeError as error:
        raise StrictJsonError("JSON text holds half a surrogate pair") from error
    except ValueError as error:
        raise StrictJsonError("NaN and Infinity are not JSON") from error


def b64url_encode(data: bytes) -> str:
    """Return *data* as base64url without padding (RFC 7515 2)."""
    # Without the detours of `base64`, which take as long again.
    text = binascii.b2a_base64(data, newline=False)
    return text.translate(_TO_URL).rstrip(b"=").decode()


def b64url_decode(text: str) -> bytes:
    """
    Parse base64url as RFC 7515 has it: no padding, no white space, no spare bits set.

    Raises:
        StrictJsonError: anything else.
    """
    try:
        known = text.replace("-", "+").replace("_", "/")
        data = binascii.a2b_base64(known + "=" * (-len(text) % 4))
    except ValueError as error:
        raise StrictJsonError("not base64url without padding") from error
    # It skips what it does not know; what comes out has one spelling, and this must be it.
    if b64url_encode(data) != text:
        if _BASE64URL.fullmatch(text) is None:
            raise StrictJsonError("not base64url without padding")
        raise StrictJsonError("base64url has non-zero spare bits")
    return data


@lru_cache(maxsize=8)
def _decoder(max_integer: int) -> json.JSONDecoder:
    """Made once for each limit: to make one costs as much as to read a token with it."""

    def integer(digits: str) -> int:
        # Length before value: int() of a long text is quadratic.
        if len(digits) > 21 or not -max_integer <= (value := int(digits)) <= max_integer:
            raise StrictJsonError("a JSON integer is out of range")
        return value

    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_constant=_constant,
        parse_float=_float,
        parse_int=integer,
    )


def b64_decode(text: str) -> bytes:
    """
    Parse base64 as RFC 7517 4.7 has it: standard alphabet, padded, in its one spelling.

    Raises:
        StrictJsonError: anything else.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise StrictJsonError("not base64") from error
    if base64.b64encode(data).decode() != text:
        raise StrictJsonError("base64 has spare bits or padding too many")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise StrictJsonError("a JSON object has two members of one name")
    return made


def _constant(_: str) -> NoReturn:
    raise StrictJsonError("NaN and Infinity are not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):  # 1e400 is Infinity by another name
        raise StrictJsonError("a JSON number is out of range")
    return value


def _check_depth(text: str, limit: int) -> None:
    # Before the parser recurses.  Brackets inside strings are skipped.
    if text.count("[") + text.count("{") <= limit:
        return
    depth = 0
    for token in _STRUCTURE.findall(text):
        if token in ("[", "{"):
            depth += 1
            if depth > limit:
                raise StrictJsonError(f"JSON is nested deeper than {limit}")
        elif token in ("]", "}"):
            depth -= 1


# Possessive, and the closing quote optional: a string that never ends is consumed once.  To
# fail and begin anew at each quote inside it takes quadratic time, minutes for 1 MiB.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
