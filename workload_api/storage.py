"""
What an agent keeps on disk: its own SVID, and what it serves, for outages and restarts.

Source: architecture A8, SEC-61, SEC-103.  Files are 0600, appear whole or not at all, and begin
with their checksum: a flipped bit in an entry could be another entry.  Workload keys are sealed
under a key in the runtime folder, which a reboot empties: a stolen disk yields no identity.  A
cache that cannot be read is set aside with its reason, never a crash loop: the agent then syncs
anew.
"""

import base64
import binascii
import contextlib
import hashlib
import logging
import os
import secrets
import stat
import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.strictjson import dumps, loads
from spiffe_core.x509svid import X509Svid
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.convert.entry import entry_from_wire, entry_to_wire
from spiffe_wire.logs import event
from spiffe_wire.pb.spire.api.types import bundle_pb2, entry_pb2
from workload_api.cache.cache import HeldSvid, WorkloadCache
from workload_api.keys import check_key

_log = logging.getLogger(__name__)
FORMAT: Final = 2
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
_SEALED_AS: Final = b"spiffe-issuer agent cache 2"


class StorageError(InternalError):
    """A file cannot be read or written; the text names it and what to do."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """The agent's own identity on disk; *chain* is empty while it attests."""

    key: bytes = field(repr=False)
    chain: tuple[bytes, ...] = ()
    reattestable: bool = False
    """The server wants this node to attest again where others renew."""


class AgentStorage:
    """
    The files in *data_dir*, and the sealing key in *runtime_dir*.

    Every method blocks, and may be called from any thread.
    """

    def __init__(self, data_dir: Path, runtime_dir: Path) -> None:
        self._node = data_dir / "node.json"
        self._cache = data_dir / "cache.json"
        self._aside = data_dir / "cache.damaged"
        self._seal = runtime_dir / "seal.key"
        self._turn = threading.Lock()
        self._wiped = False
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
        try:
            tree = _load(self._node)
            if tree is None:
                return None
            again = tree.get("reattestable") is True  # an older file says nothing of it
            state = NodeState(_bytes(tree["key"]), _chain(tree["chain"]), again)
            check_key(state.key, state.chain)
        except (MalformedError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{self._node} is damaged ({error}): restore it, or remove it and start with a "
                "new join token"
            ) from error
        return state

    def save_node(self, state: NodeState) -> None:
        """Keep the agent's own identity; durable when this returns."""
        with self._turn:
            if self._wiped:
                raise StorageError("this agent was told to forget its identity")
            _save(
                self._node,
                {
                    "key": _text(state.key),
                    "chain": list(map(_text, state.chain)),
                    "reattestable": state.reattestable,
                },
            )

    def load_cache(self, cache: WorkloadCache, at: datetime) -> bool:
        """Fill *cache* from disk with what is still good; return whether there was anything."""
        try:
            tree = _load(self._cache)
            if tree is None:
                return False
            self._fill(cache, tree, at)
        except Exception as error:  # noqa: BLE001 whatever a file holds, the agent starts
            with contextlib.suppress(OSError):
                os.replace(self._cache, self._aside)
            event(
                _log, logging.ERROR, "cache_damaged", file=self._cache, kept_as=self._aside,
                exc_info=error,
            )  # fmt: skip
            cache.wipe()
            return False
        return True

    def save_cache(self, snapshot: "Snapshot") -> None:
        """Keep what is served, keys sealed; nothing once everything was wiped."""
        with self._turn:
            if self._wiped:
                return
            seal = AESGCM(self._sealing_key())
            svids = {}
            for entry_id, held in snapshot.svids.items():
                nonce = secrets.token_bytes(12)
                sealed = nonce + seal.encrypt(nonce, held.key, _seal_of(entry_id, held.chain))
                svids[entry_id] = {
                    "revision": held.revision_number,
                    "chain": [_text(one) for one in held.chain],
                    "key": _text(sealed),
                    "authority": held.authority_id,
                }
            _save(
                self._cache,
                {
                    "format": FORMAT,
                    "trust_domain": snapshot.trust_domain.name,
                    "entries": [
                        _text(entry_to_wire(one).SerializeToString())
                        for one in snapshot.entries
                    ],
                    "bundles": [
                        _text(bundle_to_wire(one).SerializeToString())
                        for one in snapshot.bundles
                    ],
                    "svids": svids,
                },
            )

    def wipe(self) -> None:
        """Remove every key, for good: this agent was banned or evicted."""
        with self._turn:
            self._wiped = True
            for file in (self._seal, self._node, self._cache, self._aside):
                for one in (file, _new_of(file)):
                    with contextlib.suppress(FileNotFoundError):
                        one.unlink()

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
    """A cache at one moment, ready to be written off the event loop."""

    trust_domain: TrustDomain
    entries: tuple[RegistrationEntry, ...]
    bundles: tuple[Bundle, ...]
    svids: dict[str, HeldSvid] = field(repr=False)

    @classmethod
    def of(cls, cache: WorkloadCache) -> "Snapshot":
        """Take one."""
        return cls(
            cache.trust_domain,
            tuple(cache.index.all()),
            tuple(cache.bundles.values()),
            dict(cache.svids),
        )


def _held_of(entry_id: str, one: dict[str, Any], seal: AESGCM) -> HeldSvid | None:
    sealed = _bytes(one["key"])
    chain = _chain(one["chain"])
    try:
        key = seal.decrypt(sealed[:12], sealed[12:], _seal_of(entry_id, chain))
    except InvalidTag:
        return None  # sealed before a reboot: signed anew at the first sync
    svid = X509Svid.from_chain(chain)
    return HeldSvid(
        svid.spiffe_id,
        int(one["revision"]),
        chain,
        key,
        svid.validity,
        svid.serial_number,
        str(one["authority"]),
    )


def _seal_of(entry_id: str, chain: tuple[bytes, ...]) -> bytes:
    """What a sealed key belongs to: it opens with this entry and this certificate alone."""
    return _SEALED_AS + entry_id.encode() + b"\0" + hashlib.sha256(b"".join(chain)).digest()


def _load(path: Path) -> dict[str, Any] | None:
    """
    Return what `_save` wrote, or None when there is no file.

    Raises:
        StorageError: the file cannot be opened, or must not be as it is.
        MalformedError: it is not what was written.
    """
    data = _read(path)
    if data is None:
        return None
    checksum, _, rest = data.partition(b"\n")
    if checksum != hashlib.sha256(rest).hexdigest().encode():
        raise MalformedError("its checksum does not fit")
    tree = loads(rest, max_bytes=MAX_FILE_BYTES)
    if not isinstance(tree, dict):
        raise MalformedError("not a JSON object")
    return tree


def _save(path: Path, tree: dict[str, Any]) -> None:
    data = dumps(tree)
    _write(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _chain(texts: object) -> tuple[bytes, ...]:
    if not isinstance(texts, list):
        raise TypeError("not a list of certificates")
    return tuple(_bytes(one) for one in texts)


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
    temporary = _new_of(path)
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


def _new_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.new")
