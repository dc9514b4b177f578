"""How the door reads a client's frames: limits to the frame, whatever pieces they come in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffe_wire.frontdoor.conduct import Conduct, ConductError
from tests.support import http2
from tests.support.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    OPENING,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    headers,
)

pytestmark = pytest.mark.asyncio
ANSWER = frame(HEADERS, END_HEADERS, 1, b"\x88") + frame(DATA, 0, 1, b"\x00\x00\x00\x00\x00")
A_RESET = frame(RST_STREAM, 0, 1, (8).to_bytes(4))
A_PING = frame(PING, payload=bytes(8))
LIMITS = [
    (A_RESET, 200),
    (A_PING, 20),
    (frame(SETTINGS), 100),
    (frame(WINDOW_UPDATE, 0, 0, (1).to_bytes(4)), 2000),
    (frame(PRIORITY, 0, 1, bytes(5)), 200),
    (frame(0x77, 0, 0, b"?"), 200),
    (frame(DATA, 0, 1), 200),
    (frame(PING, ACK, payload=bytes(8)), 2000),
    (frame(SETTINGS, ACK), 2000),
]


class Seconds:
    """A clock that is set."""

    now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def begun(clock: Seconds | None = None) -> Conduct:
    """A connection whose client has said its opening."""
    conduct = Conduct(clock or Seconds())
    conduct.from_client(OPENING)
    assert conduct.begun.result() is True
    return conduct


@pytest.mark.parametrize(("one", "most"), LIMITS, ids=[str(one[3]) for one, _ in LIMITS])
async def test_sec_82_the_limit_and_one_over(one: bytes, most: int) -> None:
    """SEC-80, SEC-82: exactly the limit passes inside 10 s, and one more is abuse."""
    conduct = begun()
    conduct.from_client(one * most)
    with pytest.raises(ConductError):
        conduct.from_client(one)


@pytest.mark.parametrize(("one", "most"), LIMITS, ids=[str(one[3]) for one, _ in LIMITS])
async def test_sec_82_counts_start_again_after_ten_seconds(one: bytes, most: int) -> None:
    """SEC-82: the same number over a longer time is nobody's flood."""
    clock = Seconds()
    conduct = begun(clock)
    for _ in range(3):
        conduct.from_client(one * most)
        clock.now += 10


async def test_sec_82_pings_between_data_are_not_idle() -> None:
    """SEC-82: who measures bandwidth with pings, as gRPC clients do, is never cut for it."""
    conduct = begun()
    for _ in range(100):
        conduct.from_client(A_PING * 20)
        conduct.from_server(ANSWER)
        conduct.from_client(A_PING * 20)
        conduct.from_client(frame(DATA, 0, 1, b"x"))


async def test_sec_82_resets_that_the_client_provokes_count() -> None:
    """SEC-82: a client that makes the server reset streams is counted as one that resets."""
    conduct = begun()
    conduct.from_client(A_RESET * 100)
    conduct.from_server(frame(RST_STREAM, 0, 1, bytes(4)) * 1000)  # NO_ERROR: the usual end
    conduct.from_server(A_RESET * 100)
    with pytest.raises(ConductError, match="resets"):
        conduct.from_server(A_RESET)


async def test_sec_82_goaway_is_never_put_inside_a_frame() -> None:
    """SEC-82: the farewell is a GOAWAY, and is left out in the middle of a server's frame."""
    for said, kind in ((ANSWER, GOAWAY), (ANSWER[:-3], None), (ANSWER + b"\x00", None)):
        conduct = begun()
        conduct.from_server(said)
        with pytest.raises(ConductError) as refused:
            conduct.from_client(A_RESET * 201)
        assert (refused.value.farewell[3] if refused.value.farewell else None) == kind


async def test_sec_82_fields_of_a_request() -> None:
    """SEC-82: 128 header fields of any form pass, and one more does not."""
    most, plain = 128, 6  # six in every request of ours
    for form in (b"\x82", b"\xbe", b"\x0f\x2f\x01v", http2.stored(b"a", b"b"), b"\x3f\x45"):
        begun().from_client(headers(1, "/x", more=form * (most - plain)))
        with pytest.raises(ConductError, match="too many headers"):
            begun().from_client(headers(1, "/x", more=form * (most - plain + 1)))


async def test_sec_82_padding_and_priority_are_no_fields() -> None:
    """SEC-82: what stands before the block in HEADERS is skipped, not counted."""
    conduct = begun()
    ahead = bytes(6)
    conduct.from_client(frame(HEADERS, END_HEADERS | 0x8 | 0x20, 1, ahead + b"\x82" * 128))
    assert conduct.requested


async def test_sec_80_a_request_is_whole() -> None:
    """SEC-80: only a whole header block counts as the first request."""
    conduct = begun()
    whole = headers(1, "/x", flags=0) + frame(CONTINUATION, END_HEADERS, 1, b"\x82")
    for at in range(len(whole) - 1):
        conduct.from_client(whole[at : at + 1])
        assert not conduct.requested
    conduct.from_client(whole[-1:])
    assert conduct.requested


async def test_sec_80_a_block_is_bounded() -> None:
    """SEC-80: a header block of 64 KiB may come, one byte more is refused by its size alone."""
    size = 64 * 1024
    begun().from_client(size.to_bytes(3) + bytes((HEADERS, 0)) + (1).to_bytes(4))
    with pytest.raises(ConductError, match="without end"):
        begun().from_client((size + 1).to_bytes(3) + bytes((HEADERS, 0)) + (1).to_bytes(4))
    two = headers(1, "/x", flags=0) + frame(CONTINUATION, 0, 1, bytes(size - 1))
    with pytest.raises(ConductError, match="without end"):
        begun().from_client(two)


async def test_an_abandoned_opening_is_no_exception() -> None:
    """A client that leaves before its SETTINGS makes `begun` False, and that only once."""
    conduct = Conduct()
    conduct.abandon()
    conduct.abandon()
    assert conduct.begun.result() is False


A_FRAME = st.builds(
    frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.integers(0, 5),
    st.binary(max_size=40),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(A_FRAME, max_size=30), st.data())
async def test_sec_82_pieces_do_not_matter(frames: list[bytes], data: st.DataObject) -> None:
    """SEC-82: however a client's bytes are cut up, the same is counted and the same refused."""
    whole = OPENING + b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert outcome([whole]) == outcome(pieces) == outcome([bytes((b,)) for b in whole])


def outcome(pieces: list[bytes]) -> object:
    """What a connection comes to."""
    conduct = Conduct(Seconds())
    try:
        for piece in pieces:
            conduct.from_client(piece)
    except ConductError as error:
        return str(error)
    return conduct.requested, conduct._counts


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
async def test_sec_82_any_bytes(data: bytes) -> None:
    """SEC-82: whatever follows the preface is passed or refused by an error of ours."""
    conduct = Conduct(Seconds())
    with_opening = begun()
    for one, start in ((conduct, PREFACE), (with_opening, b"")):
        try:
            one.from_client(start + data)
            one.from_server(data)
        except ConductError:
            continue
