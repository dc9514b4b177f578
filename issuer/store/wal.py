"""
Whether SQLite's write-ahead log is whole, looked at before SQLite itself reads it.

Source: SEC-101, SEC-103; SQLite's file format, section 4.  Where a frame does not fit its
checksum SQLite takes the log to end there: right for a power cut, which tears what was not
synced yet, and so was acknowledged to nobody.  After a flipped bit it is a silent loss of every
change behind it, authorities among them.  The two can be told apart: a commit is synced before
the next one begins, so a commit that others follow cannot be torn.
"""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682
"""Its last bit says that checksums are made of big-endian words."""
_WORD: Final = 0xFFFFFFFF


def is_whole(path: Path) -> bool:
    """
    False when the log at *path* holds commits behind a damaged place; blocks.

    A log that is not there or not begun is whole.  Of a log that another process writes the
    answer can be wrong: ask again.

    Raises:
        OSError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return True
    if len(data) <= _HEADER.size:
        return True
    magic, _, page_size, _, *salts, first, second = _HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    if (
        magic & ~1 != _MAGIC
        or not 512 <= page_size <= 65536
        or (first, second) != _checksum(data[: _HEADER.size - 8], order, (0, 0))
    ):
        return False
    starts = range(
        _HEADER.size, len(data) - _FRAME.size - page_size + 1, _FRAME.size + page_size
    )
    torn_at = None
    chain = first, second
    for start in starts:
        frame = _FRAME.unpack_from(data, start)
        page = start + _FRAME.size
        body = data[start : start + 8] + data[page : page + page_size]
        chain = _checksum(body, order, chain)
        if [*frame[2:4]] != salts or frame[4:] != chain:
            torn_at = start
            break
    if torn_at is None:
        return True
    # Of this generation of the log; older ones, with other salts, may lie behind its end.
    ours = [
        frame
        for start in starts
        if start >= torn_at
        for frame in [_FRAME.unpack_from(data, start)]
        if [*frame[2:4]] == salts
    ]
    is_commit = 1  # the size of the database after it, and 0 in every other frame
    return not any(before[is_commit] for before, _ in pairwise(ours))


def _checksum(data: bytes, order: str, chain: tuple[int, int]) -> tuple[int, int]:
    first, second = chain
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & _WORD
        second = (second + odd + first) & _WORD
    return first, second
