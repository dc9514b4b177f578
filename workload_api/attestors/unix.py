"""
The ``unix`` attestor: user, group, executable.

Source: SPIRE API 10, SEC-31, SEC-32.  ``path`` and ``sha256`` do not separate programs of one
user, who can start the one and become the other; combine them with ``uid``.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Final

from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.text import utf8_bytes
from spiffe_wire.frontdoor.peer import UnixPeer
from workload_api.attestors.executable import FileIdentity, digest_of, executable_of
from workload_api.attestors.names import Names, group_name, user_name
from workload_api.attestors.procfs import read_status
from workload_api.attestors.protocol import AT_ONCE, PER_UID, AttestationError, Finding
from workload_api.attestors.workers import Workers

KEPT: Final = 1024


class UnixAttestor:
    """Reads ``/proc``; hashes each executable once for as long as it stays the same file."""

    type: ClassVar[str] = "unix"

    def __init__(
        self,
        *,
        hash_executables: bool = True,
        look_up_user: Callable[[int], str | None] = user_name,
        look_up_group: Callable[[int], str | None] = group_name,
        digest: Callable[[int, FileIdentity], str] = digest_of,
    ) -> None:
        self._hash = hash_executables
        self._digest_of = digest
        self._workers = Workers(AT_ONCE, PER_UID)
        self._users = Names(look_up_user, self._workers)
        self._groups = Names(look_up_group, self._workers)
        self._digests: OrderedDict[FileIdentity, str] = OrderedDict()
        self._hashing: dict[FileIdentity, asyncio.Task[str]] = {}
        self._made: OrderedDict[frozenset[str], SelectorSet] = OrderedDict()

    async def attest(self, peer: UnixPeer) -> Finding:
        """See `WorkloadAttestor`."""
        status = read_status(peer.pid)
        if (status.uid, status.gid) != (peer.uid, peer.gid):
            # It changed user since it connected: it is not what the kernel vouched for.
            raise AttestationError("the process changed its user or group since it connected")
        found = {f"uid:{status.uid}", f"gid:{status.gid}"}
        found |= {f"supplementary_gid:{one}" for one in status.groups}
        named = [("user", self._users, status.uid), ("group", self._groups, status.gid)]
        named += [("supplementary_group", self._groups, one) for one in status.groups]
        for kind, names, number in named:
            if name := await names.of(number):
                found.add(f"{kind}:{name}")
        found |= await self._executable(peer)
        # A program that changes its user when it starts must not lend its path to the caller.
        if read_status(peer.pid) != status:
            raise AttestationError("the process changed its user or group meanwhile")
        return Finding(self._selectors(frozenset(found)))

    def close(self) -> None:
        """Stop whatever is under way."""
        for task in self._hashing.values():
            task.cancel()
        self._users.close()
        self._groups.close()
        self._workers.close()

    def _selectors(self, values: frozenset[str]) -> SelectorSet:
        """The same set for the same values, as it is asked for before every push."""
        known = self._made.get(values)
        if known is None:
            # A path may be any bytes; what is not UTF-8 no entry can name.
            known = frozenset(
                Selector(self.type, one) for one in values if utf8_bytes(one) is not None
            )
            self._made[values] = known
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(values)
        return known

    async def _executable(self, peer: UnixPeer) -> set[str]:
        runs = await self._workers.run(peer.uid, executable_of, peer.pid)
        selectors = set() if runs.path is None else {f"path:{runs.path}"}
        if self._hash:
            selectors.add(f"sha256:{await self._digest(peer, runs.identity)}")
        return selectors

    async def _digest(self, peer: UnixPeer, identity: FileIdentity) -> str:
        while True:
            known = self._digests.get(identity)
            if known is not None:
                self._digests.move_to_end(identity)
                return known
            task = self._hashing.get(identity)
            mine = task is None
            if task is None:
                run = self._workers.run(peer.uid, self._digest_of, peer.pid, identity)
                task = asyncio.ensure_future(run)
                self._hashing[identity] = task
                task.add_done_callback(lambda done: self._hashed(identity, done))
            try:
                # It goes on when the caller's time is up: his next try then finds it done.
                return await asyncio.shield(task)
            except AttestationError:
                if mine:
                    raise
                # Another process's file could not be read; ours may still be there.

    def _hashed(self, identity: FileIdentity, task: "asyncio.Task[str]") -> None:
        del self._hashing[identity]
        if not task.cancelled() and task.exception() is None:
            self._digests[identity] = task.result()
            while len(self._digests) > KEPT:
                self._digests.popitem(last=False)
