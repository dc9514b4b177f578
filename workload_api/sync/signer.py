"""
Signs ahead for every entry, and anew when it is due.

Source: architecture A2; SPIRE API 9 (6); SEC-47, SEC-106; IOP-27.  Keys are made here, on the
node; the server sees a CSR.  Whoever waits for an SVID is woken when it is there.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import grpc

from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.keys import KeyKind
from spiffe_core.lifetime import renew_at
from spiffe_core.x509svid import X509Svid
from spiffe_wire.backoff import Backoff
from spiffe_wire.logs import event
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.status import error_of
from workload_api.cache.cache import Change, HeldSvid, WorkloadCache
from workload_api.keys import authority_of, make_csr, make_key

_log = logging.getLogger(__name__)
BATCH: Final = 500  # SPIRE API 9
CALL_TIMEOUT: Final = 30.0
FIRST_PAUSE: Final = timedelta(milliseconds=200)
LONGEST_PAUSE: Final = timedelta(seconds=60)  # SEC-107
_AT_A_STRETCH: Final = 20
"""Keys made or SVIDs parsed before others have a turn: about 2 ms."""


@dataclass
class Signer:
    """One for an agent, on its event loop."""

    cache: WorkloadCache
    channel: Callable[[], Any]
    now: Callable[[], datetime]
    key_kind: KeyKind
    _calling: asyncio.Lock = field(default_factory=asyncio.Lock)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _renew_at: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    """Serial number and instant, by entry: the jitter is drawn once for each SVID."""
    _put_off: dict[str, tuple[float, Backoff]] = field(default_factory=dict)
    _committed_at: dict[str, int] = field(default_factory=dict)

    def note(self, change: Change, committed_at_micros: int) -> None:
        """Something changed: look at once what is due."""
        if change.everybody:
            self._put_off.clear()  # an authority that was not known may be known now
        for entry in change.entries:
            self._put_off.pop(entry.id, None)
            self._committed_at[entry.id] = committed_at_micros
        self._wanted.set()

    async def wanted(self, at_most: float) -> None:
        """Return when something was noted, or after *at_most* seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._wanted.wait()
        self._wanted.clear()

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Hold signing off while entered; what is under way ends first."""
        async with self._calling:
            yield

    async def sign_due(self) -> int:
        """
        Sign what is due; return how many went well.

        Raises:
            SpiffeError: what the server said to the call as a whole.
        """
        done = 0
        while True:
            async with self._calling:
                due = self._due()
                for at in range(0, len(due), BATCH):
                    done += await self._sign(due[at : at + BATCH])
                    if self._wanted.is_set():
                        break  # what came meanwhile does not wait for the rest
                else:
                    return done

    async def sign(self, entries: Sequence[RegistrationEntry]) -> int:
        """Sign for *entries* whether it is due or not; see `sign_due`."""
        async with self._calling:
            return sum(
                [
                    await self._sign(entries[at : at + BATCH])
                    for at in range(0, len(entries), BATCH)
                ]
            )

    def _due(self) -> list[RegistrationEntry]:
        """
        Entries without a good SVID of their revision, or past their share of its life.

        Those that never had one come first, and of these the newest: where thousands are to
        be signed at once, as at the start, one that is just added does not wait for them.
        """
        self._wanted.clear()
        self._forget_the_gone()
        now, monotonic = self.now(), time.monotonic()
        trusted = self._trusted()
        never: list[RegistrationEntry] = []
        again: list[RegistrationEntry] = []
        for entry in self.cache.index.all():
            held = self.cache.svids.get(entry.id)
            if entry.is_node_alias or entry.is_expired(now):
                continue
            if held is not None and self._is_fresh(entry, held, trusted, now):
                continue
            if entry.id in self._put_off and self._put_off[entry.id][0] > monotonic:
                continue
            (never if held is None else again).append(entry)
        return never[::-1] + again

    def _is_fresh(
        self, entry: RegistrationEntry, held: HeldSvid, trusted: frozenset[str], now: datetime
    ) -> bool:
        return (
            held.revision_number == entry.revision_number
            and held.spiffe_id == entry.spiffe_id
            and (not held.authority_id or held.authority_id in trusted)
            and now < self._renewal_of(entry.id, held)
        )

    def _renewal_of(self, entry_id: str, held: HeldSvid) -> datetime:
        known = self._renew_at.get(entry_id)
        if known is None or known[0] != held.serial_number:
            jitter = random.uniform(-1, 1)  # noqa: S311 spreads load only
            known = held.serial_number, renew_at(held.validity, jitter)
            self._renew_at[entry_id] = known
        return known[1]

    def _trusted(self) -> frozenset[str]:
        own = self.cache.bundles.get(self.cache.trust_domain)
        authorities = own.x509_authorities if own else ()
        return frozenset(one.authority_id for one in authorities if not one.tainted)

    def _forget_the_gone(self) -> None:
        index = self.cache.index
        for notes in (self._renew_at, self._put_off, self._committed_at):
            if len(notes) > 2 * len(index) + 64:
                for entry_id in [one for one in notes if index.get(one) is None]:
                    del notes[entry_id]

    async def _sign(self, entries: Sequence[RegistrationEntry]) -> int:
        keys, wanted = [], []
        for number, entry in enumerate(entries):
            if self.key_kind is KeyKind.EC_P256:
                keys.append(make_key())
            else:
                keys.append(await asyncio.to_thread(make_key, self.key_kind))
            csr = make_csr(keys[-1], entry.spiffe_id)
            wanted.append(svid_pb2.NewX509SVIDParams(entry_id=entry.id, csr=csr))
            if number % _AT_A_STRETCH == _AT_A_STRETCH - 1:
                await asyncio.sleep(0)
        try:
            answer = await svid_pb2_grpc.SVIDStub(self.channel()).BatchNewX509SVID(
                svid_pb2.BatchNewX509SVIDRequest(params=wanted), timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        crash_point("agent.svids_got")
        if len(answer.results) != len(entries):
            raise InternalError("the server answered another number of SVIDs than was asked")
        return await self._take_all(entries, keys, answer.results)

    async def _take_all(
        self, entries: Sequence[RegistrationEntry], keys: list[bytes], results: Sequence[Any]
    ) -> int:
        taken = []
        trusted = self._trusted()
        for number, entry in enumerate(entries):
            if self._take(entry, keys[number], results[number], trusted):
                taken.append(entry)
            if number % _AT_A_STRETCH == _AT_A_STRETCH - 1:
                await asyncio.sleep(0)
        commits = [self._committed_at.pop(entry.id, 0) for entry in taken]
        self.cache.wake(Change(tuple(taken)), min(filter(None, commits), default=0))
        return len(taken)

    def _take(
        self, entry: RegistrationEntry, key: bytes, result: Any, trusted: frozenset[str]
    ) -> bool:
        if self.cache.index.get(entry.id) != entry:
            return False  # changed or removed meanwhile: this is not for what it is now
        why = result.status.message
        if result.status.code == 0:
            try:
                svid = X509Svid.from_chain(tuple(result.svid.cert_chain))
                authority_id = authority_of(svid.leaf) if len(svid.chain) == 1 else ""
            except MalformedError as error:
                return self._refuse(entry, str(error))
            if svid.spiffe_id != entry.spiffe_id:  # IOP-27
                return self._refuse(entry, "the SVID is for another SPIFFE ID")
            if authority_id and authority_id not in trusted:
                # Nobody who holds our bundle could verify it; nor could the workload's peers.
                return self._refuse(entry, "the SVID is of an authority we do not know yet")
            if svid.validity.not_after < self.now():
                return self._refuse(entry, "the SVID has ended already: compare the clocks")
            held = HeldSvid(
                svid.spiffe_id,
                entry.revision_number,
                svid.chain,
                key,
                svid.validity,
                svid.serial_number,
                authority_id,
            )
            self.cache.svids[entry.id] = held
            if self.now() < self._renewal_of(entry.id, held):
                self._put_off.pop(entry.id, None)
            else:  # clocks that differ must not make us ask all the time
                self._refuse(entry, "the SVID is due for renewal already: compare the clocks")
            return True
        return self._refuse(entry, why)

    def _refuse(self, entry: RegistrationEntry, why: str) -> bool:
        _, backoff = self._put_off.get(entry.id, (0.0, Backoff(FIRST_PAUSE, LONGEST_PAUSE)))
        pause = backoff.next().total_seconds()
        self._put_off[entry.id] = time.monotonic() + pause, backoff
        event(_log, logging.WARNING, "entry_not_signed", entry=entry.id, why=why)
        return False
