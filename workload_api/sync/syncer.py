"""
Keeps the cache in step with the server: a held stream, or polling.

Source: architecture A2, A8; SPIRE API 5.1.1, 9; SEC-47, SEC-106, SEC-107.  Four loops: follow
the server, sign what is due, stay a member (`membership`), write to disk.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import grpc

from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import (
    ForbiddenError,
    InternalError,
    MalformedError,
    NotFoundError,
    NotReadyError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.keys import KeyKind
from spiffe_core.permission import AgentDeniedError
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.backoff import Backoff
from spiffe_wire.convert.bundle import bundle_from_wire
from spiffe_wire.convert.entry import entry_from_wire
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.logs import event
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2, watch_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.status import error_of
from workload_api.cache.cache import Change, WorkloadCache
from workload_api.node.identity import NodeIdentity
from workload_api.storage import AgentStorage, Snapshot
from workload_api.sync.calls import Pods, SvidCalls
from workload_api.sync.membership import Membership, SyncState
from workload_api.sync.signer import Signer
from workload_api.sync.tokens import TokenCache

_log = logging.getLogger(__name__)
CALL_TIMEOUT: Final = 30.0
TICK: Final = 1.0
SAVE_DELAY: Final = 0.5
"""Seconds in which changes gather before the cache is written."""
FIRST_PAUSE: Final = timedelta(milliseconds=200)
LONGEST_PAUSE: Final = timedelta(seconds=60)  # SEC-107
LONGEST_SIGNING_PAUSE: Final = timedelta(seconds=5)  # it follows the server's own waiting
FAILED_SAVE_DELAY: Final = 5.0


@dataclass
class Syncer:
    """One for an agent; `run` ends when the server does not want this agent any more."""

    cache: WorkloadCache
    node: NodeIdentity
    dialer: Dialer
    storage: AgentStorage
    now: Callable[[], datetime]
    key_kind: KeyKind
    sync_interval: timedelta
    version: str
    attest_anew: Callable[[], Awaitable[None]] | None = None
    """See `Membership`."""
    pods: Pods | None = None
    """Of this node, where they are watched."""
    state: SyncState = field(default_factory=SyncState)
    cursor: str = ""

    def __post_init__(self) -> None:
        self._dirty = asyncio.Event()
        self._said = ("", "")
        self.calls = SvidCalls(lambda: self.dialer.channel, self.pods)
        self.signer = Signer(
            self.cache, self.calls, self.now, self.key_kind, on_changed=self._dirty.set
        )
        self.tokens = TokenCache(self.cache, self._ask_jwt, self.now)
        self.membership = Membership(
            self.node,
            self.dialer,
            self.state,
            self.signer.idle,
            self._forget_workloads,
            self._fail,
            self.attest_anew,
        )

    @property
    def problem(self) -> str:
        """What is wrong now; empty when nothing is."""
        return self.state.problem or ("" if self.state.connected else self.dialer.problem)

    async def run(self) -> None:
        """
        Stay in step until cancelled.

        Raises:
            SpiffeError: banned, evicted, superseded or expired; keys are gone by then.
        """
        loops = (
            self._follow(),
            self._keep_signed(),
            self.membership.keep(),
            self._keep_on_disk(),
        )
        tasks = [asyncio.create_task(one) for one in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.signer.close()

    async def renew(self, spiffe_id: SpiffeId | None) -> int:
        """
        Sign anew, with new keys, for *spiffe_id* or for everything; return how many.

        Raises:
            NotFoundError: no entry of this agent has that ID.
            SpiffeError: what the server said.
        """
        entries = [one for one in self.cache.index.all() if spiffe_id in (None, one.spiffe_id)]
        if spiffe_id is not None and not entries:
            raise NotFoundError(f"no entry of this agent is for {spiffe_id}")
        signed = await self.signer.sign(entries)
        self._dirty.set()
        return signed

    async def _follow(self) -> None:
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            since = self.membership.switched
            try:
                await self._in_step(backoff)
            except AgentDeniedError as error:
                await self.membership.denied(error, since)
            except SpiffeError as error:
                if since == self.membership.switched:
                    self._fail("sync_failed", error)
            if since != self.membership.switched:
                continue  # we cut the connection ourselves: dial with the new SVID
            self.state.connected = False
            pause = backoff.next().total_seconds()
            # A server that cannot be reached is dialled at the dialer's pace, not at ours too.
            pause = min(pause, TICK) if self.dialer.problem else pause
            await self.membership.pause(pause, since)

    async def _in_step(self, backoff: Backoff) -> None:
        """Follow the server's stream, or ask again and again when it has none."""
        try:
            await self._post_status()
        except AgentDeniedError:
            raise
        except (UnsupportedError, ForbiddenError) as error:
            # A courtesy (SPIRE API 9), which SPIRE 1.13's server lets no agent do.
            event(_log, logging.DEBUG, "status_not_posted", why=str(error))
        self.calls.is_offered = True
        try:
            await self._watch(backoff)
            raise NotReadyError("the server ended the stream")
        except UnsupportedError:
            self.state.mode = "poll"
            self.calls.is_offered = False  # SPIRE's own
        await self._poll(backoff)

    async def _watch(self, backoff: Backoff) -> None:
        call = watch_pb2_grpc.AgentWatchStub(self.dialer.channel).Watch(
            watch_pb2.WatchRequest(cursor=self.cursor)
        )
        whole, entries = watch_pb2.WatchResponse(), []
        try:
            async for message in call:
                entries += _entries_of(message.entries)
                message.ClearField("entries")
                whole.MergeFrom(message)
                if not message.more:
                    self._apply(whole, entries)
                    whole, entries = watch_pb2.WatchResponse(), []
                    backoff.reset()
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def _apply(self, whole: Any, entries: Sequence[RegistrationEntry]) -> None:
        """Take over one change: all its messages merged, and the *entries* of all of them."""
        self.state.mode = "watch"
        bundles, unread = _bundles_of(whole.bundles)
        change = self.cache.apply(
            snapshot=whole.snapshot,
            entries=entries,
            removed=whole.removed_entry_ids,
            bundles=bundles,
            removed_domains=[TrustDomain(name) for name in whole.removed_trust_domains],
            unread_domains=unread,
        )
        crash_point("agent.applied")
        self.cursor = whole.cursor
        self._synced(change, whole.committed_at_micros)

    def _synced(self, change: Change, committed_at_micros: int) -> None:
        if not self.state.connected:
            self._said = ("", "")
            event(_log, logging.INFO, "in_step", mode=self.state.mode)
        if not self.state.connected or change:
            self._dirty.set()
        self.state.connected = True
        self.state.last_sync_at = self.now()
        self.state.problem = ""
        # What was taken away goes now; what was added, when it is signed.
        self.cache.wake(change, committed_at_micros)
        self.signer.note(change, committed_at_micros)

    async def _poll(self, backoff: Backoff) -> None:
        """A server that can't push: SPIRE's own way, at its own pace (SPIRE API 9)."""
        while True:
            entries = await self._authorized()
            names = sorted({one for entry in entries for one in entry.federates_with})
            async with self.membership.calls.call():
                answers = [await self._bundle(one) for one in (None, *names)]
            bundles, unread = _bundles_of(one for one in answers if one is not None)
            change = self.cache.apply(
                snapshot=True, entries=entries, bundles=bundles, unread_domains=unread
            )
            self._synced(change, 0)
            backoff.reset()
            await asyncio.sleep(self.sync_interval.total_seconds())

    async def _authorized(self) -> list[RegistrationEntry]:
        request = entry_pb2.GetAuthorizedEntriesRequest()
        stub = entry_pb2_grpc.EntryStub(self.dialer.channel)
        try:
            async with self.membership.calls.call():
                answer = await stub.GetAuthorizedEntries(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return _entries_of(answer.entries)

    async def _bundle(self, name: TrustDomain | None) -> Any:
        """Our own bundle, or that of *name*, or None when the server has none."""
        stub = bundle_pb2_grpc.BundleStub(self.dialer.channel)
        try:
            if name is None:
                return await stub.GetBundle(bundle_pb2.GetBundleRequest(), timeout=CALL_TIMEOUT)
            request = bundle_pb2.GetFederatedBundleRequest(trust_domain=name.name)
            return await stub.GetFederatedBundle(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise error_of(error) from error

    async def _post_status(self) -> None:
        request = agent_pb2.PostStatusRequest(agent_version=self.version)
        try:
            async with self.membership.calls.call():
                await agent_pb2_grpc.AgentStub(self.dialer.channel).PostStatus(
                    request, timeout=CALL_TIMEOUT
                )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    def _fail(self, what: str, error: SpiffeError) -> str:
        why = self.dialer.problem or str(error)
        if (what, why) != self._said:  # once for an outage, however long
            event(_log, logging.WARNING, what, why=why)
        self._said = what, why
        self.state.problem = why
        return why

    def _forget_workloads(self) -> None:
        own = self.cache.bundles.get(self.cache.trust_domain)
        self.cache.wipe()
        if own is not None:  # it is public, and what the server is known by
            self.cache.bundles[self.cache.trust_domain] = own
        self.cursor = ""
        self.tokens.clear()
        self._dirty.set()

    async def _keep_signed(self) -> None:
        backoff = Backoff(FIRST_PAUSE, LONGEST_SIGNING_PAUSE)
        problem = ""
        while True:
            await self.signer.wanted(TICK)
            since = self.membership.switched
            try:
                if await self.signer.sign_due():
                    self._dirty.set()
                backoff.reset()
                if problem and self.state.problem == problem:
                    self.state.problem = ""
            except AgentDeniedError as error:
                await self.membership.denied(error, since)
            except SpiffeError as error:
                problem = self._fail("signing_failed", error)
                await asyncio.sleep(backoff.next().total_seconds())

    async def _ask_jwt(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        try:
            async with self.membership.calls.call():
                return await self._new_jwt(entry, audience)
        except AgentDeniedError as error:
            if self.attest_anew is None:
                raise
            raise NotReadyError("the server does not know this agent now") from error

    async def _new_jwt(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        if self.dialer.problem and not self.state.connected:
            raise NotReadyError("the server cannot be reached")  # now, not at the next dialling
        answer = await self.calls.jwt(entry, audience)
        try:
            svid = JwtSvid.parse_unverified(answer.token)
        except MalformedError as error:
            raise InternalError("the server answered something that is no JWT-SVID") from error
        if svid.spiffe_id != entry.spiffe_id:
            raise InternalError("the server answered a JWT-SVID for another SPIFFE ID")
        return svid

    async def _keep_on_disk(self) -> None:
        pause = SAVE_DELAY
        while True:
            await self._dirty.wait()
            await asyncio.sleep(pause)
            self._dirty.clear()
            snapshot = Snapshot.of(self.cache)
            started = time.monotonic()
            try:
                await asyncio.to_thread(self.storage.save_cache, snapshot)
                # However large it is and however often it changes: a tenth of the time.
                pause = max(SAVE_DELAY, 10 * (time.monotonic() - started))
            except SpiffeError as error:
                self.state.problem = str(error)
                event(_log, logging.ERROR, "cache_not_saved", exc_info=error)
                pause = FAILED_SAVE_DELAY
                self._dirty.set()


def _entries_of(messages: Iterable[Any]) -> list[RegistrationEntry]:
    """Parse entries; a bad one is skipped with a warning (SPIRE API 5.1.1)."""
    found = []
    for message in messages:
        try:
            found.append(entry_from_wire(message))
        except MalformedError as error:
            event(_log, logging.WARNING, "entry_skipped", entry=message.id, why=str(error))
    return found


def _bundles_of(messages: Iterable[Any]) -> tuple[list[Bundle], list[TrustDomain]]:
    """Parse bundles; for a bad one the name alone, and its last good one is kept (IOP-26)."""
    found, unread = [], []
    for message in messages:
        try:
            found.append(bundle_from_wire(message))
        except MalformedError as error:
            name = message.trust_domain
            event(_log, logging.ERROR, "bundle_skipped", of=name, why=str(error))
            with contextlib.suppress(MalformedError):
                unread.append(TrustDomain(name))
    return found, unread
