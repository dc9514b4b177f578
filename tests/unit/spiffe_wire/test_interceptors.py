"""Every call becomes a status in one place, whatever its shape (style 4, SEC-90)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from spiffe_core.errors import ForbiddenError, NotReadyError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.status import DETAILS_KEY, error_of
from tests.support.door import eventually
from tests.support.stack import a_folder

SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Failing:
    """Four methods that raise *error*, the streams after an answer."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.closed = 0

    def register(self, server: Any) -> None:
        """Add one method for each shape."""
        handlers = {
            shape: getattr(grpc, f"{shape}_rpc_method_handler")(getattr(self, shape))
            for shape in SHAPES
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Fails", handlers),)
        )

    async def unary_unary(self, request: bytes, _: Any) -> bytes:
        """One to one."""
        if self.error is not None:
            raise self.error
        return request

    async def unary_stream(self, request: bytes, _: Any) -> AsyncIterator[bytes]:
        """One to many."""
        try:
            yield request
            if self.error is not None:
                raise self.error
            if request == b"hold":
                await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        """Many to one."""
        return await self.unary_unary(b"".join([one async for one in requests]), context)

    async def stream_stream(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Many to many."""
        async for one in requests:
            async for answer in self.unary_stream(one, context):
                yield answer


@asynccontextmanager
async def served(
    failing: Failing, calls: list[tuple[str, str]] | None = None
) -> AsyncIterator[Any]:
    """A channel to a plain server with the interceptor in front of *failing*."""

    def on_call(method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        if calls is not None:
            calls.append((method, code))

    server = grpc.aio.server(interceptors=[ErrorInterceptor(on_call)])
    failing.register(server)
    with a_folder() as folder:
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{folder}/s", options=options) as channel:
            yield channel
        await server.stop(None)


async def outcome(channel: Any, shape: str, request: bytes = b"x") -> tuple[list[bytes], Any]:
    """The answers of one call, and what it ended with."""
    method = getattr(channel, shape)(f"/test.Fails/{shape}")
    asked = method(iter([request]) if shape.startswith("stream") else request, timeout=10)
    answers: list[bytes] = []
    try:
        if shape.endswith("unary"):
            answers.append(await asked)
        else:
            async for one in asked:
                answers.append(one)
    except grpc.aio.AioRpcError as error:
        return answers, error
    return answers, None


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_shape_is_served_and_counted(shape: str) -> None:
    """A call that goes well passes through, and is reported once, as OK."""
    calls: list[tuple[str, str]] = []
    async with served(Failing(None), calls) as channel:
        assert await outcome(channel, shape) == ([b"x"], None)
        assert calls == [(f"/test.Fails/{shape}", "OK")]


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_shape_maps_its_errors(shape: str) -> None:
    """An error of ours is sent as its code and text, after the answers before it."""
    calls: list[tuple[str, str]] = []
    async with served(Failing(NotReadyError("not yet")), calls) as channel:
        answers, error = await outcome(channel, shape)
        assert answers == ([b"x"] if shape.endswith("stream") else [])
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "not yet")
        assert calls == [(f"/test.Fails/{shape}", "UNAVAILABLE")]


@pytest.mark.parametrize("shape", SHAPES)
async def test_sec_90_strangers_say_nothing(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-90: a foreign exception is INTERNAL without a word of it, and is in our log."""
    async with served(Failing(ValueError("s3cret"))) as channel:
        _, error = await outcome(channel, shape)
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INTERNAL,
            "internal error",
        )
        assert "s3cret" not in str(error.trailing_metadata())
    assert caplog.messages.count("call_failed") == 1


@pytest.mark.parametrize("shape", SHAPES)
async def test_denials_carry_their_detail(shape: str) -> None:
    """SPIRE API 2.3: every shape of call sends the typed reason in its trailer."""
    denied = AgentDeniedError("agent is banned", DenialReason.AGENT_BANNED)
    async with served(Failing(denied)) as channel:
        _, error = await outcome(channel, shape)
        assert DETAILS_KEY in dict(error.trailing_metadata())
        back = error_of(error)
        assert isinstance(back, AgentDeniedError)
        assert back.reason is DenialReason.AGENT_BANNED


@pytest.mark.parametrize("text", ["ü 漢", "a\nb\tc", "100 % sure", "x" * 2000])
async def test_texts_arrive_as_they_are(text: str) -> None:
    """Whatever is in an error's text arrives unchanged: it is encoded on the way."""
    async with served(Failing(ForbiddenError(text))) as channel:
        _, error = await outcome(channel, "unary_unary")
        assert error.details() == text


async def test_unknown_methods_stay_unimplemented() -> None:
    """WEP-23: a method that nobody registered is UNIMPLEMENTED, and no call of ours."""
    calls: list[tuple[str, str]] = []
    async with served(Failing(None), calls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await channel.unary_unary("/test.Fails/nothing")(b"", timeout=10)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert calls == []


async def test_a_cancelled_stream_is_closed() -> None:
    """A stream whose client leaves is closed then and there, with its `finally` blocks."""
    failing = Failing(None)
    async with served(failing) as channel:
        asked = channel.unary_stream("/test.Fails/unary_stream")(b"hold", timeout=10)
        assert await asked.read() == b"hold"
        asked.cancel()
        await eventually(lambda: failing.closed == 1)
