"""
What an agent keeps on disk: its own SVID, and what it serves, for outages and restarts.

Source: architecture A8, SEC-61, SEC-103.  Files are 0600 and appear whole or not at all.
Workload keys are sealed under a key in the runtime folder, which a reboot empties: a stolen
disk yields no identity.  A file that cannot be read is set aside with its reason, never a
crash loop: the agent then syncs anew.
"""

import base64
import binascii
import contextlib
import logging
import os
import secrets
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.lifetime import Validity
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.strictjson import dumps, loads
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.convert.entry import entry_from_wire, entry_to_wire
from spiffe_wire.logs import event
from spiffe_wire.pb.spire.api.types import bundle_pb2, entry_pb2
from workload_api.cache.cache import HeldSvid, WorkloadCache

_log = logging.getLogger(__name__)
FORMAT: Final = 1
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
_SEALED_AS: Final = b"spiffe-issuer agent cache 1"


class StorageError(InternalError):
    """A file cannot be read or written; the text names it and what to do."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """The agent's own identity on disk; *chain* is empty while it attests."""

    key: bytes = field(repr=False)
    chain: tuple[bytes, ...] = ()


class AgentStorage:
    """The files in *data_dir*, and the sealing key in *runtime_dir*.  Every method blocks."""

    def __init__(self, data_dir: Path, runtime_dir: Path) -> None:
        self._node = data_dir / "node.json"
        self._cache = data_dir / "cache.json"
        self._seal = runtime_dir / "seal.key"
        for folder in (data_dir, runtime_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(data_dir)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise StorageError(f"{data_dir} must be this user's alone: chmod 0700 {data_dir}")

    def load_node(self) -> NodeState | None:
        """
        Return the agent's own identity, or None when there is none.

        Raises:
            StorageError: it is there and damaged; attesting anew would need a new token, so
                an operator has to decide.
        """
        data = _read(self._node)
        if data is None:
            return None
        try:
            tree = loads(data)
            return NodeState(_bytes(tree["key"]), tuple(_bytes(one) for one in tree["chain"]))
        except (MalformedError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{self._node} is damaged: restore it, or remove it and start with a new join "
                "token"
            ) from error

    def save_node(self, state: NodeState) -> None:
        """Keep the agent's own identity; durable when this returns."""
        _write(
            self._node, dumps({"key": _text(state.key), "chain": list(map(_text, state.chain))})
        )

    def load_cache(self, cache: WorkloadCache, at: datetime) -> bool:
        """Fill *cache* from disk with what is still good; return whether there was anything."""
        try:
            data = _read(self._cache)
            if data is None:
                return False
            self._fill(cache, loads(data, max_bytes=MAX_FILE_BYTES), at)
        except (StorageError, MalformedError, KeyError, TypeError, ValueError) as error:
            aside = self._cache.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                os.replace(self._cache, aside)
            event(
                _log, logging.ERROR, "cache_damaged", file=self._cache, kept_as=aside,
                exc_info=error,
            )  # fmt: skip
            cache.wipe()
            return False
        return True

    def save_cache(self, snapshot: "Snapshot") -> None:
        """Keep what is served; keys sealed."""
        seal = AESGCM(self._sealing_key())
        svids = {}
        for entry_id, held in snapshot.svids.items():
            nonce = secrets.token_bytes(12)
            sealed = nonce + seal.encrypt(nonce, held.key, _SEALED_AS + entry_id.encode())
            svids[entry_id] = {
                "spiffe_id": held.spiffe_id.uri,
                "revision": held.revision_number,
                "chain": [_text(one) for one in held.chain],
                "key": _text(sealed),
                "not_before": int(held.validity.not_before.timestamp()),
                "not_after": int(held.validity.not_after.timestamp()),
                "serial": str(held.serial_number),
                "authority": held.authority_id,
            }
        _write(
            self._cache,
            dumps(
                {
                    "format": FORMAT,
                    "trust_domain": snapshot.trust_domain.name,
                    "cursor": snapshot.cursor,
                    "entries": [_text(one) for one in snapshot.entries],
                    "bundles": [_text(one) for one in snapshot.bundles],
                    "svids": svids,
                }
            ),
        )

    def wipe(self) -> None:
        """Remove every key: this agent was banned or evicted."""
        for file in (self._node, self._cache, self._seal):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()

    def _fill(self, cache: WorkloadCache, tree: dict[str, Any], at: datetime) -> None:
        if tree["format"] != FORMAT:
            raise StorageError(f"{self._cache} is of another release")
        if tree["trust_domain"] != cache.trust_domain.name:
            raise StorageError(f"{self._cache} is of another trust domain")
        cache.apply(
            snapshot=True,
            entries=[
                entry_from_wire(entry_pb2.Entry.FromString(_bytes(one)))
                for one in tree["entries"]
            ],
            bundles=[
                bundle_from_wire(bundle_pb2.Bundle.FromString(_bytes(one)))
                for one in tree["bundles"]
            ],
        )
        seal = AESGCM(self._sealing_key())
        for entry_id, one in tree["svids"].items():
            held = _held_of(entry_id, one, seal)
            if held is not None and at < held.validity.not_after:
                cache.svids[entry_id] = held

    def _sealing_key(self) -> bytes:
        key = _read(self._seal)
        if key is None or len(key) != 32:
            key = secrets.token_bytes(32)
            _write(self._seal, key)
        return key


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A cache at one moment, as bytes, ready to be written off the event loop."""

    trust_domain: TrustDomain
    cursor: str
    entries: tuple[bytes, ...]
    bundles: tuple[bytes, ...]
    svids: dict[str, HeldSvid] = field(repr=False)

    @classmethod
    def of(cls, cache: WorkloadCache, cursor: str) -> "Snapshot":
        """Take one."""
        return cls(
            cache.trust_domain,
            cursor,
            tuple(entry_to_wire(one).SerializeToString() for one in cache.index.all()),
            tuple(bundle_to_wire(one).SerializeToString() for one in cache.bundles.values()),
            dict(cache.svids),
        )


def _held_of(entry_id: str, one: dict[str, Any], seal: AESGCM) -> HeldSvid | None:
    sealed = _bytes(one["key"])
    try:
        key = seal.decrypt(sealed[:12], sealed[12:], _SEALED_AS + entry_id.encode())
    except InvalidTag:
        return None  # sealed before a reboot: signed anew at the first sync
    validity = Validity(
        datetime.fromtimestamp(one["not_before"], UTC),
        datetime.fromtimestamp(one["not_after"], UTC),
    )
    return HeldSvid(
        SpiffeId.parse(one["spiffe_id"]),
        one["revision"],
        tuple(_bytes(der) for der in one["chain"]),
        key,
        validity,
        int(one["serial"]),
        one["authority"],
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _read(path: Path) -> bytes | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    with os.fdopen(file, "rb") as stream:
        found = os.fstat(stream.fileno())
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise StorageError(f"{path} must be this user's alone: chmod 0600 {path}")
        if found.st_size > MAX_FILE_BYTES:
            raise StorageError(f"{path} is too long")
        return stream.read()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as stream:
            crash_point("agent_file.opened")
            stream.write(data)
            stream.flush()
            crash_point("agent_file.written")
            os.fsync(stream.fileno())
        crash_point("agent_file.synced")
        os.replace(temporary, path)
        crash_point("agent_file.renamed")
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        crash_point("agent_file.folder_synced")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
