"""Health and metrics over HTTP, as curl and Prometheus ask for them."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from spiffe_core.errors import InternalError
from spiffe_wire import httpstatus
from spiffe_wire.httpstatus import MAX_CONNECTIONS, StatusServer
from tests.support.stack import a_folder, serving


def broken() -> tuple[int, str, bytes]:
    """A page with a mistake in it."""
    raise LookupError("secret of the page")


ROUTES = {
    "/live": lambda: (200, "application/json", b'{"live": true}\n'),
    "/ready": lambda: (503, "application/json", b"{}\n"),
    "/broken": broken,
}


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    """The port of a running server."""
    async with StatusServer("127.0.0.1", 0, ROUTES) as server:
        yield server.port


async def ask(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Ask with the standard library's client, off the loop."""

    def work() -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    return await asyncio.to_thread(work)


async def raw(port: int, data: bytes) -> bytes:
    """Send bytes, and return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/live", 200, b'{"live": true}\n'),
        ("/live?verbose", 200, b'{"live": true}\n'),
        ("/ready", 503, b"{}\n"),
        ("/", 404, b"not found\n"),
        ("/live/", 404, b"not found\n"),
        ("/%6cive", 404, b"not found\n"),
        ("/broken", 500, b"internal server error\n"),
    ],
)
async def test_pages(port: int, path: str, status: int, body: bytes) -> None:
    """Fixed paths are answered and no others; a page that fails says nothing of why."""
    assert (await ask(port, path))[::2] == (status, body)


async def test_head(port: int) -> None:
    """HEAD is answered like GET, without the body."""
    status, headers, body = await ask(port, "/live", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "15", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
async def test_other_methods(port: int, method: str) -> None:
    """Nothing can be changed over this port."""
    status, headers, _ = await ask(port, "/live", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "data",
    [
        b"GET /live\r\n\r\n",
        b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ],
)
async def test_not_http_1(port: int, data: bytes) -> None:
    """What is no HTTP/1 request is answered with 400."""
    assert (await raw(port, data)).startswith(b"HTTP/1.1 400 ")


async def test_endless_request(port: int) -> None:
    """A request that does not end is not read to the end, and the next one is served."""
    assert await raw(port, b"GET /live HTTP/1.1\r\n" + b"a: b\r\n" * 10_000) == b""
    assert (await ask(port, "/live"))[0] == 200


async def test_silent_client(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing is cut off."""
    monkeypatch.setattr(httpstatus, "PATIENCE", 0.05)
    assert await raw(port, b"") == b""


async def test_many_clients(port: int) -> None:
    """Clients that hold their connection do not add up; when they leave, others are served."""
    held = [
        await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CONNECTIONS + 1)
    ]
    reader, _ = held[-1]
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    for _, writer in held:
        writer.close()
    for _ in range(100):
        status = await raw(port, b"GET /live HTTP/1.1\r\n\r\n")
        if status:
            break
        await asyncio.sleep(0.01)
    assert status.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_ends_at_once() -> None:
    """A client that holds its connection does not keep the server from ending."""
    async with StatusServer("127.0.0.1", 0, ROUTES) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_port_taken(port: int) -> None:
    """A port that is taken is named."""
    with pytest.raises(InternalError, match=f"cannot listen on 127.0.0.1:{port}"):
        async with StatusServer("127.0.0.1", port, ROUTES):
            pass


async def test_a_server_tells_the_truth() -> None:
    """SEC-114: a running server is ready and says what it counts; one that stops is not."""
    with a_folder() as folder:
        async with serving(folder) as server:
            status, _, body = await ask(server.status_port, "/ready")
            assert (status, json.loads(body)["problems"]) == (200, [])
            status, headers, page = await ask(server.status_port, "/metrics")
            families: dict[str, Any] = {
                one.name: one for one in text_string_to_metric_families(page.decode())
            }
            assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
            (issued,) = families["issuer_svids_issued"].samples
            assert (issued.labels, issued.value) == ({"kind": "x509"}, 1)
            server.ready = False
            status, _, body = await ask(server.status_port, "/ready")
            assert (status, json.loads(body)["ready"]) == (503, False)
