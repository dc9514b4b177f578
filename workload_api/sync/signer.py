"""
Signs ahead for every entry, and anew when it is due.

Source: architecture A2; SPIRE API 9 (6); SEC-47, SEC-106; IOP-27.  Keys are made here, on the
node; the server sees a CSR.  Whoever waits for an SVID is woken when it is there.

Where this agent watches the pods of its node and the server verifies them (architecture A5),
an entry for pods is signed ahead as soon as a pod here is what it is for, and no earlier: for
pods of other nodes the server would not sign.  When the last such pod is gone, its SVID is
not renewed, and is dropped with its key a minute later.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import MalformedError
from spiffe_core.keys import KeyKind
from spiffe_core.lifetime import renew_at
from spiffe_core.x509svid import X509Svid
from spiffe_wire.backoff import Backoff
from spiffe_wire.logs import event
from workload_api.cache.cache import Change, HeldSvid, WorkloadCache
from workload_api.keys import authority_of, make_csr, make_key
from workload_api.sync.calls import Collected, SvidCalls, WantedX509, is_of_pods

_log = logging.getLogger(__name__)
BATCH: Final = 500  # SPIRE API 9
FIRST_PAUSE: Final = timedelta(milliseconds=200)
LONGEST_PAUSE: Final = timedelta(seconds=60)  # SEC-107
UNUSED_KEPT: Final = 60.0
"""Seconds for which the SVID of an entry is kept when no pod here is what it is for."""
SWEEP_SECONDS: Final = 10.0
_AT_A_STRETCH: Final = 20
"""Keys made or SVIDs parsed before others have a turn: about 2 ms."""


@dataclass
class Signer:
    """One for an agent, on its event loop."""

    cache: WorkloadCache
    calls: SvidCalls
    now: Callable[[], datetime]
    key_kind: KeyKind
    on_changed: Callable[[], object] = lambda: None
    """Called when SVIDs came late, or were dropped: nobody is told by `sign_due`."""
    monotonic: Callable[[], float] = time.monotonic
    _calling: asyncio.Lock = field(default_factory=asyncio.Lock)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _renew_at: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    """Serial number and instant, by entry: the jitter is drawn once for each SVID."""
    _put_off: "dict[str, _PutOff]" = field(default_factory=dict)
    _committed_at: dict[str, int] = field(default_factory=dict)
    _under_way: set[str] = field(default_factory=set)
    """Entries for whose pods the server waits."""
    _late: "set[asyncio.Task[None]]" = field(default_factory=set)
    _failed: BaseException | None = None
    _pod_seen_at: dict[str, float] = field(default_factory=dict)
    """When a pod was last here, by entry; for those with an SVID."""
    _swept_at: float = 0.0

    def __post_init__(self) -> None:
        if self.calls.pods is not None:
            self.calls.pods.on_change(self._wanted.set)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)

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
            while self._late:
                await asyncio.wait(set(self._late))
            yield

    async def sign_due(self) -> int:
        """
        Sign what is due; return how many went well.

        Raises:
            SpiffeError: what the server said to the call as a whole.
        """
        done = 0
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
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
        Entries without a good SVID of their revision, or past their share of its life; those
        for pods only while such a pod is here.

        Those that never had one come first, and of these the newest: where thousands are to
        be signed at once, as at the start, one that is just added does not wait for them.
        """
        self._wanted.clear()
        self._forget_the_gone()
        now, monotonic = self.now(), self.monotonic()
        self._drop_unused(now, monotonic)
        trusted = self._trusted()
        never: list[RegistrationEntry] = []
        again: list[RegistrationEntry] = []
        for entry in self.cache.index.all():
            held = self.cache.svids.get(entry.id)
            if entry.is_node_alias or entry.is_expired(now):
                continue
            if held is not None and self._is_fresh(entry, held, trusted, now):
                continue
            pod_uid = self.calls.pod_of(entry)
            if pod_uid is None or entry.id in self._under_way:
                continue
            put_off = self._put_off.get(entry.id)
            # Another pod is another question: what was said of the first does not count.
            if put_off and put_off.until > monotonic and put_off.pod_uid == pod_uid:
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
        notes: dict[str, Any]
        for notes in (self._renew_at, self._put_off, self._committed_at, self._pod_seen_at):
            if len(notes) > 2 * len(index) + 64:
                for entry_id in [one for one in notes if index.get(one) is None]:
                    del notes[entry_id]

    def _drop_unused(self, now: datetime, monotonic: float) -> None:
        """Drop SVIDs whose pods are gone: keys that nobody may use any more."""
        if not self.calls.names_pods or monotonic < self._swept_at + SWEEP_SECONDS:
            return
        self._swept_at = monotonic
        dropped = False
        for entry in self.cache.index.all():
            held = self.cache.svids.get(entry.id)
            if held is None or not is_of_pods(entry):
                continue
            if self.calls.pod_of(entry) is not None:
                self._pod_seen_at[entry.id] = monotonic
                continue
            # Of what an earlier life left, no pod may be known yet: it stays until its end.
            seen_at = self._pod_seen_at.get(entry.id)
            if held.validity.not_after < now or (
                seen_at is not None and monotonic > seen_at + UNUSED_KEPT
            ):
                self._pod_seen_at.pop(entry.id, None)
                del self.cache.svids[entry.id]
                dropped = True
        if dropped:
            self.on_changed()

    async def _sign(self, entries: Sequence[RegistrationEntry]) -> int:
        asked: list[_Asked] = []
        wanted: list[WantedX509] = []
        for number, entry in enumerate(entries):
            pod_uid = self.calls.pod_of(entry)
            if pod_uid is None:
                continue
            if self.key_kind is KeyKind.EC_P256:
                key = make_key()
            else:
                key = await asyncio.to_thread(make_key, self.key_kind)
            asked.append(_Asked(entry, key, pod_uid))
            csr = make_csr(key, entry.spiffe_id)
            wanted.append(WantedX509(entry.id, csr, pod_uid))
            if number % _AT_A_STRETCH == _AT_A_STRETCH - 1:
                await asyncio.sleep(0)
        if not asked:
            return 0
        parts, collected = self.calls.x509(wanted), Collected(len(wanted))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(parts.aclose)
            first: list[tuple[int, Any]] = await anext(parts, [])
            crash_point("agent.svids_got")
            collected.take(first)
            if not self.calls.names_pods:
                collected.end()
            elif collected.missing:  # for some the server waits: others must not
                stack.pop_all()
                self._begin_late(parts, asked, collected)
        return await self._take_all(asked, first)

    def _begin_late(
        self,
        parts: AsyncGenerator[list[tuple[int, Any]], None],
        asked: "Sequence[_Asked]",
        collected: Collected,
    ) -> None:
        waited_for = {asked[number].entry.id for number in collected.missing}
        self._under_way |= waited_for

        def end(task: "asyncio.Task[None]") -> None:
            self._late.discard(task)
            self._under_way -= waited_for
            if not task.cancelled():
                self._failed = task.exception() or self._failed
            self._wanted.set()
            self.on_changed()

        task = asyncio.create_task(self._take_late(parts, asked, collected))
        self._late.add(task)
        task.add_done_callback(end)

    async def _take_late(
        self,
        parts: AsyncGenerator[list[tuple[int, Any]], None],
        asked: "Sequence[_Asked]",
        collected: Collected,
    ) -> None:
        async with aclosing(parts):
            async for part in parts:
                collected.take(part)
                await self._take_all(asked, part)
        collected.end()

    async def _take_all(
        self, asked: "Sequence[_Asked]", results: Sequence[tuple[int, Any]]
    ) -> int:
        taken = []
        trusted = self._trusted()
        for turn, (number, result) in enumerate(results):
            if self._take(asked[number], result, trusted):
                taken.append(asked[number].entry)
            if turn % _AT_A_STRETCH == _AT_A_STRETCH - 1:
                await asyncio.sleep(0)
        commits = [self._committed_at.pop(entry.id, 0) for entry in taken]
        self.cache.wake(Change(tuple(taken)), min(filter(None, commits), default=0))
        return len(taken)

    def _take(self, asked: "_Asked", result: Any, trusted: frozenset[str]) -> bool:
        entry = asked.entry
        if self.cache.index.get(entry.id) != entry:
            return False  # changed or removed meanwhile: this is not for what it is now
        why = result.status.message
        if result.status.code == 0:
            try:
                svid = X509Svid.from_chain(tuple(result.svid.cert_chain))
                authority_id = authority_of(svid.leaf) if len(svid.chain) == 1 else ""
            except MalformedError as error:
                return self._refuse(asked, str(error))
            if svid.spiffe_id != entry.spiffe_id:  # IOP-27
                return self._refuse(asked, "the SVID is for another SPIFFE ID")
            if authority_id and authority_id not in trusted:
                # Nobody who holds our bundle could verify it; nor could the workload's peers.
                return self._refuse(asked, "the SVID is of an authority we do not know yet")
            if svid.validity.not_after < self.now():
                return self._refuse(asked, "the SVID has ended already: compare the clocks")
            held = HeldSvid(
                svid.spiffe_id,
                entry.revision_number,
                svid.chain,
                asked.key,
                svid.validity,
                svid.serial_number,
                authority_id,
            )
            self.cache.svids[entry.id] = held
            if asked.pod_uid:
                self._pod_seen_at[entry.id] = self.monotonic()
            if self.now() < self._renewal_of(entry.id, held):
                self._put_off.pop(entry.id, None)
            else:  # clocks that differ must not make us ask all the time
                self._refuse(asked, "the SVID is due for renewal already: compare the clocks")
            return True
        return self._refuse(asked, why)

    def _refuse(self, asked: "_Asked", why: str) -> bool:
        entry_id = asked.entry.id
        before = self._put_off.get(entry_id)
        backoff = before.backoff if before else Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        until = self.monotonic() + backoff.next().total_seconds()
        self._put_off[entry_id] = _PutOff(until, backoff, asked.pod_uid)
        event(_log, logging.WARNING, "entry_not_signed", entry=entry_id, why=why)
        return False


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an SVID was asked for."""

    entry: RegistrationEntry
    key: bytes = field(repr=False)
    pod_uid: str


@dataclass(frozen=True, slots=True)
class _PutOff:
    """An entry that was refused: not asked for again until then, for this pod."""

    until: float
    backoff: Backoff
    pod_uid: str
