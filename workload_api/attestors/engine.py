"""
Asks a container engine of this machine about a container: Docker, or Podman by the same API.

Source: Docker Engine API, ``GET /containers/{id}/json`` and ``GET /images/{id}/json``; SEC-34:
whoever serves the socket is believed only if the kernel says that it is root or we ourselves.
"""

import asyncio
import json
import os
import re
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpcore

from spiffe_core.version import VERSION
from spiffe_wire.unixsocket import SocketPathError, check_ancestors
from workload_api.attestors.protocol import AttestationError

TIMEOUT: Final = timedelta(seconds=2)
"""For each of the two questions about a container; an attestation has five seconds."""
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class EngineError(AttestationError):
    """The engine cannot be asked, or what it says is not to be believed."""


@dataclass(frozen=True, slots=True)
class Container:
    """A running container, as its engine describes it."""

    id: str
    image: str
    """What it was started from, as whoever started it wrote it; may be empty."""
    image_id: str
    """What that was then: the name may stand for another image by now; may be empty."""
    labels: Mapping[str, str]
    env: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspected:
    """A container and its image; *missing* says why the image's ID is None."""

    container: Container
    image_digest: str | None
    missing: str = ""


class Engine:
    """An engine behind a Unix socket.  Holds nothing open between questions."""

    def __init__(self, path: Path, *, timeout: timedelta = TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout.total_seconds()

    async def inspect(self, container_id: str) -> Inspected:
        """
        Return a running container, and the image it runs.

        Raises:
            EngineError: it is not there or not running, or the engine is not to be believed.
        """
        path = self._checked()
        async with httpcore.AsyncConnectionPool(uds=str(path), max_connections=1) as pool:
            answer = await self._get(pool, f"/containers/{container_id}/json")
            container = running_container(container_id, answer)
            try:
                return Inspected(container, await self._image(pool, container))
            except EngineError as error:
                return Inspected(container, None, f"its image is not known: {error}")

    async def _image(self, pool: httpcore.AsyncConnectionPool, container: Container) -> str:
        # By its ID: the name is but a name, and whoever pulls images moves it to another.
        if not _IMAGE_ID.fullmatch(container.image_id):
            raise EngineError("the engine names none")
        found = (await self._get(pool, f"/images/{container.image_id}/json")).get("Id")
        if not isinstance(found, str) or not _IMAGE_ID.fullmatch(found):
            raise EngineError("the engine's answer has no ID")
        return f"sha256:{found.removeprefix('sha256:')}"

    async def _get(self, pool: httpcore.AsyncConnectionPool, target: str) -> Mapping[str, Any]:
        headers = [
            ("Host", "localhost"),
            ("Accept", "application/json"),
            ("User-Agent", f"spiffe-issuer/{VERSION}"),
        ]
        url = httpcore.URL(scheme=b"http", host=b"localhost", port=None, target=target)
        path = self._path
        try:
            async with (
                asyncio.timeout(self._timeout),
                pool.stream("GET", url, headers=headers) as response,
            ):
                _check_server(response)
                data = await _body(response)
        except TimeoutError as error:
            raise EngineError(f"the engine at {path} did not answer in time") from error
        except (httpcore.NetworkError, OSError) as error:
            raise EngineError(f"the engine at {path} cannot be reached: {error}") from error
        except httpcore.ProtocolError as error:
            raise EngineError(f"what serves {path} speaks no HTTP: {error}") from error
        if response.status == 404:
            raise EngineError(f"the engine at {path} knows none of this ID")
        if response.status != 200:
            raise EngineError(f"the engine at {path} answered {response.status}")
        return _object(data)

    def _checked(self) -> Path:
        """
        Return the socket's path without links, in folders that nobody else may write to.

        Raises:
            EngineError: it is not there, or not root's or ours.
        """
        try:
            path = self._path.resolve(strict=True)  # /var/run is a link on most systems
            found = os.stat(path)
            check_ancestors(path.parent)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"there is no engine's socket at {self._path}") from error
        except SocketPathError as error:
            raise EngineError(f"the engine's socket is not safe: {error}") from error
        if not stat.S_ISSOCK(found.st_mode):
            raise EngineError(f"{self._path} is no socket")
        if found.st_uid not in _trusted():
            raise EngineError(f"{self._path} belongs to uid {found.st_uid}, not to root or us")
        return path


def running_container(asked: str, answer: Mapping[str, Any]) -> Container:
    """
    Return what an engine answered about the container *asked*.

    Raises:
        EngineError: it is about another one, says that it does not run, or is malformed.
    """
    state, config = _section(answer, "State"), _section(answer, "Config")
    if answer.get("Id") != asked:
        raise EngineError("the engine answered about another container")
    pid = state.get("Pid")
    if state.get("Running") is not True or type(pid) is not int or pid <= 0:
        raise EngineError("the engine says that the container is not running")
    labels, env = config.get("Labels") or {}, config.get("Env") or []
    if not isinstance(labels, dict) or not isinstance(env, list):
        raise EngineError("the engine's answer about the container is malformed")
    texts = (config.get("Image", ""), answer.get("Image", ""), *labels.values(), *env)
    if not all(isinstance(one, str) for one in texts):
        raise EngineError("the engine's answer about the container is malformed")
    return Container(asked, texts[0], texts[1], labels, tuple(env))


def _section(answer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = answer.get(name)
    if not isinstance(found, dict):
        raise EngineError("the engine's answer about the container is malformed")
    return found


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()


def _check_server(response: httpcore.Response) -> None:
    """Believe only root or ourselves; the file's owner alone may have been swapped since."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = _CREDENTIALS.unpack(raw)[1]
    if uid not in _trusted():
        raise EngineError(f"the engine is run by uid {uid}, not by root or us")


async def _body(response: httpcore.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_stream():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise EngineError("the engine's answer is longer than 4 MiB")
        parts.append(part)
    return b"".join(parts)


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EngineError("the engine's answer is not JSON") from error
    if not isinstance(found, dict):
        raise EngineError("the engine's answer is not a JSON object")
    return found
