"""Whether anybody answered: grpcio's own UNAVAILABLE, told from a server's."""

import grpc
import pytest

from spiffe_wire.status import never_answered


def error(code: grpc.StatusCode, text: str) -> grpc.aio.AioRpcError:
    """What a call ends with."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details=text)


@pytest.mark.parametrize(
    ("code", "text", "nobody"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: UNKNOWN: …", True),
        ("UNAVAILABLE", "Socket closed", True),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer (104)", True),
        ("UNAVAILABLE", "the disk is full; nothing was changed", False),
        ("UNAVAILABLE", "the agent is stopping", False),
        ("UNAVAILABLE", "", False),
        ("PERMISSION_DENIED", "Socket closed", False),
    ],
)
def test_nobody_or_a_refusal(code: str, text: str, nobody: bool) -> None:
    """A server that says UNAVAILABLE is there, and its own words are passed on."""
    assert never_answered(error(grpc.StatusCode[code], text)) is nobody


async def test_what_grpcio_says() -> None:
    """A socket that is not there yields one of the texts that are known."""
    async with grpc.aio.insecure_channel("unix:/nonexistent/socket") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/a/B")(b"")
    assert never_answered(raised.value)
