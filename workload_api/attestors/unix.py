"""
The ``unix`` attestor: user, group, executable.

Source: SPIRE API 10, SEC-31, SEC-32.  ``path`` and ``sha256`` do not separate programs of one
user, who can start the one and become the other; combine them with ``uid``.
"""

import asyncio
import grp
import hashlib
import os
import pwd
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Final

from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.text import utf8_bytes
from spiffe_wire.frontdoor.peer import UnixPeer
from workload_api.attestors.procfs import read_status
from workload_api.attestors.protocol import AttestationError

MAX_EXECUTABLE_BYTES: Final = 512 * 1024 * 1024  # SEC-32
HASHES_KEPT: Final = 1024
NAME_SECONDS: Final = 60.0
_CHUNK: Final = 1024 * 1024


class UnixAttestor:
    """Reads ``/proc``; hashes each executable once for as long as it stays the same file."""

    type: ClassVar[str] = "unix"

    def __init__(self, *, hash_executables: bool = True) -> None:
        self._hash = hash_executables
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._names: dict[tuple[str, int], tuple[float, str | None]] = {}

    async def attest(self, peer: UnixPeer) -> SelectorSet:
        """See `WorkloadAttestor`."""
        status = read_status(peer.pid)
        if (status.uid, status.gid) != (peer.uid, peer.gid):
            # It changed user since it connected: it is not what the kernel vouched for.
            raise AttestationError("the process changed its user or group since it connected")
        found = {f"uid:{status.uid}", f"gid:{status.gid}"}
        found |= {f"supplementary_gid:{one}" for one in status.groups}
        found |= await self._named("user", [status.uid], _user_name)
        found |= await self._named("group", [status.gid], _group_name)
        found |= await self._named("supplementary_group", status.groups, _group_name)
        found |= await self._executable(peer.pid)
        # A path may be any bytes; what is not UTF-8 no entry can name.
        return frozenset(
            Selector(self.type, one) for one in found if utf8_bytes(one) is not None
        )

    async def _executable(self, pid: int) -> set[str]:
        try:
            file = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise AttestationError("the process's executable cannot be read") from error
        try:
            path = os.readlink(f"/proc/{pid}/exe")
            found = os.fstat(file)
            selectors = {f"path:{path}"}
            if self._hash:
                selectors.add(f"sha256:{await self._digest(file, found)}")
            now = os.stat(f"/proc/{pid}/exe")
        except OSError as error:
            raise AttestationError("the process's executable cannot be read") from error
        finally:
            os.close(file)
        if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
            raise AttestationError("the process changed its executable meanwhile")
        return selectors

    async def _digest(self, file: int, found: os.stat_result) -> str:
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_EXECUTABLE_BYTES:
            raise AttestationError("the executable is too large to hash")
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in self._hashes:
            self._hashes[key] = await asyncio.to_thread(_sha256, file)
            while len(self._hashes) > HASHES_KEPT:
                self._hashes.popitem(last=False)
        return self._hashes[key]

    async def _named(
        self,
        kind: str,
        ids: "tuple[int, ...] | list[int]",
        look_up: Callable[[int], str | None],
    ) -> set[str]:
        found = set()
        for one in ids:
            known = self._names.get((kind, one))
            if known is None or known[0] < time.monotonic():
                # A directory service may stand behind this, and may hang.
                name = await asyncio.to_thread(look_up, one)
                known = time.monotonic() + NAME_SECONDS, name
                if len(self._names) > 10_000:
                    self._names.clear()
                self._names[kind, one] = known
            if known[1]:
                found.add(f"{kind}:{known[1]}")
        return found


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None


def _sha256(file: int) -> str:
    digest = hashlib.sha256()
    at = 0
    while data := os.pread(file, _CHUNK, at):
        digest.update(data)
        at += len(data)
    return digest.hexdigest()
