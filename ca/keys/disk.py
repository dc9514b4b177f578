"""
Keys in files: one PKCS#8 file of mode 0600 a key, in a folder of mode 0700.

Source: SEC-61.  A file appears whole or not at all, and one that is damaged, linked, or
readable by others is refused with its name; it is never replaced by a new key in silence.
"""

import asyncio
import contextlib
import os
import re
import stat
import threading
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ca.keys.protocol import (
    KeyPurpose,
    KeyStoreError,
    PrivateKey,
    SigningKey,
    check_key_id,
    generate_private_key,
    pkcs8_of,
)
from spiffe_core.crashpoints import crash_point
from spiffe_core.keys import KeyKind

MAX_FILE_BYTES: Final = 16 * 1024
_SHA256: Final = hashes.SHA256()
_ECDSA: Final = ec.ECDSA(_SHA256)
_PKCS1: Final = padding.PKCS1v15()
# A key's file, or what a crash left of one that was being written.
_OURS: Final = re.compile(
    rf"\.?([a-z0-9-]+)\.(?:{'|'.join(one.value for one in KeyPurpose)})\.key(?:\.new)?"
)


class DiskKeyManager:
    """A `KeyManager` on a folder, which it makes if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._making = threading.Lock()  # between looking for a name and taking it

    async def generate(self, key_id: str, kind: KeyKind, purpose: KeyPurpose) -> SigningKey:
        """Make a key and keep it; see `KeyManager`."""
        return await asyncio.to_thread(self._generate, key_id, kind, purpose)

    async def load(self, key_id: str, purpose: KeyPurpose) -> SigningKey:
        """Return a key; see `KeyManager`."""
        return await asyncio.to_thread(self._load, key_id, purpose)

    async def delete(self, key_id: str) -> None:
        """Remove every file of a key."""

        await asyncio.to_thread(self._delete, key_id)

    async def key_ids(self) -> frozenset[str]:
        """Return the names of all keys in the folder, of those that a crash cut short too."""

        return await asyncio.to_thread(self._key_ids)

    def _path(self, key_id: str, purpose: KeyPurpose) -> Path:
        return self._folder / f"{check_key_id(key_id)}.{purpose.value}.key"

    def _delete(self, key_id: str) -> None:
        for purpose in KeyPurpose:
            path = self._path(key_id, purpose)
            for file in (path, _temporary(path)):
                try:
                    file.unlink()
                    crash_point("key.deleted")
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise KeyStoreError(f"cannot remove {file}: {error.strerror}") from error

    def _key_ids(self) -> frozenset[str]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise KeyStoreError(f"cannot list {self._folder}: {error.strerror}") from error
        return frozenset(found[1] for name in names if (found := _OURS.fullmatch(name)))

    def _generate(self, key_id: str, kind: KeyKind, purpose: KeyPurpose) -> SigningKey:
        path = self._path(key_id, purpose)
        private = generate_private_key(kind)
        crash_point("key.generated")
        make_private_folder(self._folder)
        with self._making:
            for taken in (self._path(key_id, one) for one in KeyPurpose):
                if os.path.lexists(taken):
                    raise KeyStoreError(f"{taken} exists already")
            write_private_file(path, pkcs8_of(private))
        return SigningKey(key_id, purpose, private)

    def _load(self, key_id: str, purpose: KeyPurpose) -> SigningKey:
        path = self._path(key_id, purpose)
        check_private_folder(self._folder)
        data = read_private_file(path)
        try:
            # Ours, so the slow check of RSA numbers is left out; it would hold the GIL.
            private = serialization.load_der_private_key(
                data, password=None, unsafe_skip_rsa_key_validation=True
            )
        except Exception as error:
            # What a damaged file looks like to the parser is not ours to know.
            raise KeyStoreError(f"{path} is damaged: restore it from a backup") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise KeyStoreError(f"{path} holds a key of another kind: restore it from a backup")
        return SigningKey(key_id, purpose, _checked(private, path))


def _checked(private: PrivateKey, path: Path) -> PrivateKey:
    # A flipped bit can leave a key that parses; what it signs must verify.
    try:
        if isinstance(private, ec.EllipticCurvePrivateKey):
            signature = private.sign(b"check", _ECDSA)
            private.public_key().verify(signature, b"check", _ECDSA)
        else:
            signature = private.sign(b"check", _PKCS1, _SHA256)
            private.public_key().verify(signature, b"check", _PKCS1, _SHA256)
    except Exception as error:
        raise KeyStoreError(f"{path} is damaged: restore it from a backup") from error
    return private


def make_private_folder(folder: Path) -> None:
    """
    Make *folder* with mode 0700, as all above it that is missing, or see that it is ours.

    Raises:
        KeyStoreError: it cannot be made, or see `check_private_folder`.
    """
    try:
        for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
            # Not `parents=True`: that would leave those above it to the umask.
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KeyStoreError(f"cannot make {folder}: {error.strerror}") from error
    check_private_folder(folder)


def check_private_folder(folder: Path) -> None:
    """
    See that *folder* is ours alone.

    Raises:
        KeyStoreError: it is missing, or somebody else owns it or can enter it.
    """
    try:
        found = os.lstat(folder)
    except OSError as error:
        raise KeyStoreError(
            f"cannot read {folder}: {error.strerror}; restore it from a backup"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise KeyStoreError(f"{folder} must be a folder that belongs to this user")
    if found.st_mode & 0o077:
        raise KeyStoreError(f"{folder} is open to others: chmod 0700 {folder}")


def write_private_file(path: Path, data: bytes) -> None:
    """
    Write a file of mode 0600 in one step: temporary, fsync, rename, fsync of the folder.

    Raises:
        KeyStoreError: it cannot be written; what was there stays.
    """
    temporary = _temporary(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()  # left by a crash; O_EXCL below refuses links
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            crash_point("key_file.opened")
            file.write(data)
            file.flush()
            crash_point("key_file.written")
            os.fsync(file.fileno())
        crash_point("key_file.synced")
        os.rename(temporary, path)
        crash_point("key_file.renamed")
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        crash_point("key_file.folder_synced")
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def read_private_file(path: Path) -> bytes:
    """
    Read a file that is ours alone.

    Raises:
        KeyStoreError: missing, a link, another's, readable by others, or too long.
    """
    try:
        # Not blocking: a pipe of that name would hold us for ever before we see what it is.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise KeyStoreError(
                    f"{path} must be a plain file that belongs to this user: restore it from a "
                    "backup"
                )
            if found.st_mode & 0o077:
                raise KeyStoreError(f"{path} is open to others: chmod 0600 {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyStoreError(
            f"cannot read {path}: {error.strerror}; restore it from a backup"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise KeyStoreError(f"{path} is too long to be a key: restore it from a backup")
    return data
