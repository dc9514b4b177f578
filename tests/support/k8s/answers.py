"""How answers are written: JSON, partial metadata, compression, and answers that are broken."""

import asyncio
import gzip
import json
import socket
import struct
from typing import Any

from aiohttp import web

from tests.support.k8s.faults import Fault
from tests.support.k8s.status import ApiError, not_acceptable

Body = dict[str, Any]
PARTIAL = "PartialObjectMetadata"
META = {"apiVersion": "meta.k8s.io/v1"}
GZIP_FROM = 128 * 1024  # as the API server's: smaller answers are not worth it
_BLOCK = b"a" * 65536


def wanted_form(request: web.BaseRequest) -> str:
    """
    The first form in Accept that can be had: "" for whole objects, or partial metadata.

    Raises:
        ApiError: 406, there is none.
    """
    header = request.headers.get("Accept", "") or "*/*"
    is_readable = False
    for clause in header.split(","):
        media, *parameters = (part.strip() for part in clause.split(";"))
        given = dict(part.split("=", 1) for part in parameters if "=" in part)
        if media not in ("application/json", "application/*", "*/*"):
            continue
        is_readable = True
        if "as" not in given:
            return ""
        known = (PARTIAL, f"{PARTIAL}List")
        if given["as"] in known and (given.get("g"), given.get("v")) == ("meta.k8s.io", "v1"):
            return given["as"]
    if not is_readable:
        raise not_acceptable()
    raise not_acceptable(
        "only the following media types are accepted: application/json, application/yaml, "
        "application/vnd.kubernetes.protobuf"
    )


def partial(body: Body) -> Body:
    """An object's metadata alone."""
    return {"kind": PARTIAL, **META, "metadata": body["metadata"]}


def dumped(body: Any) -> bytes:
    """JSON as Go's encoder writes it, with its newline."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def json_answer(request: web.BaseRequest, body: Body, status: int = 200) -> web.Response:
    """An answer, compressed when it is long and the client reads that."""
    data = dumped(body)
    headers = {"Cache-Control": "no-cache, private", "Content-Type": "application/json"}
    if len(data) > GZIP_FROM and "gzip" in request.headers.get("Accept-Encoding", ""):
        data = gzip.compress(data, 1)
        headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return web.Response(body=data, status=status, headers=headers)


def text_answer(text: str, status: int = 200, **headers: str) -> web.Response:
    """An answer in plain text."""
    plain = {"Cache-Control": "no-cache, private", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, status=status, headers=plain | headers)


def error_answer(request: web.BaseRequest, error: ApiError) -> web.Response:
    """A Status."""
    answer = json_answer(request, error.body, error.code)
    answer.headers.update(error.headers)
    return answer


def failure(request: web.BaseRequest, fault: Fault) -> web.Response:
    """The answer of a server that is in trouble."""
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.code == 429:
        headers.setdefault("Retry-After", "1")
        return text_answer("Too many requests, please try again later.\n", 429, **headers)
    known = {
        500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
        503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
        504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
    }
    reason, message = known.get(fault.code, ("", f"answer {fault.code} was asked for"))
    return error_answer(request, ApiError(fault.code, reason, message, {}, headers))


async def broken_answer(request: web.BaseRequest, fault: Fault, is_watch: bool) -> web.Response:
    """A 200 whose body is garbage, endless, or cut off; ends with the connection."""
    if fault.kind == "garbage" and not is_watch:
        return web.Response(body=fault.body, headers={"Content-Type": "application/json"})
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    if is_watch:
        answer.enable_chunked_encoding()
        begin = b'{"type":"ADDED","object":{"kind":"Pod","apiVersion":"v1","metadata":{"name":"'
    else:
        begin = b'{"kind":"PodList","apiVersion":"v1","metadata":{"continue":"'
    if fault.kind == "truncate" and not is_watch:
        answer.content_length = 4096
    await answer.prepare(request)
    if fault.kind == "garbage":
        await answer.write(fault.body)
        await answer.write_eof()
        return answer  # type: ignore[return-value]
    await answer.write(begin)
    left = fault.size
    while left > 0 and not fault.ended.is_set():
        await answer.write(_BLOCK[:left])
        left -= len(_BLOCK)
    if fault.kind == "huge":
        await answer.write(b'"}}}\n' if is_watch else b'"}}\n')
        await answer.write_eof()
        return answer  # type: ignore[return-value]
    await asyncio.sleep(0)
    abort(request)
    return answer  # type: ignore[return-value]


def abort(request: web.BaseRequest) -> None:
    """Break the connection off: the client sees its end."""
    if request.transport is not None:
        request.transport.abort()


def reset(request: web.BaseRequest) -> web.Response:
    """Reset the connection, as a load balancer does; the answer goes nowhere."""
    if request.transport is not None:
        own = request.transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    abort(request)
    return web.Response(status=500)
