"""
Keeps the cache in step with the server: a held stream, or polling; signing ahead; renewing.

Source: architecture A2, A8; SPIRE API 5.1.1, 9; SEC-47, SEC-106, SEC-107.  A pushed entry is
signed for at once, and streams are woken when its SVID is there, not before.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import grpc
from cryptography import x509

from spiffe_core.bundle import Bundle
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import (
    InternalError,
    MalformedError,
    NotFoundError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.keys import KeyKind
from spiffe_core.lifetime import renew_at
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import X509Svid
from spiffe_wire.backoff import Backoff
from spiffe_wire.convert.bundle import bundle_from_wire
from spiffe_wire.convert.entry import entry_from_wire
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.logs import event
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2, watch_pb2_grpc
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2, entry_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.status import error_of
from workload_api.agent.storage import AgentStorage, Snapshot
from workload_api.cache.cache import HeldSvid, WorkloadCache
from workload_api.node.identity import NodeIdentity
from workload_api.node.keys import make_csr, make_key
from workload_api.sync.tokens import TokenCache

_log = logging.getLogger(__name__)
BATCH: Final = 500  # SPIRE API 9
CALL_TIMEOUT: Final = 30.0
TICK: Final = 1.0
SAVE_DELAY: Final = 0.5
"""Seconds in which changes gather before the cache is written."""
FIRST_PAUSE: Final = timedelta(milliseconds=200)
LONGEST_PAUSE: Final = timedelta(seconds=60)  # SEC-107


@dataclass(slots=True)
class SyncState:
    """How the syncing goes, for health and operators."""

    mode: str = "none"
    connected: bool = False
    last_sync_at: datetime | None = None
    problem: str = ""
    denied: AgentDeniedError | None = None


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
    state: SyncState = field(default_factory=SyncState)
    cursor: str = ""

    def __post_init__(self) -> None:
        self._signing = asyncio.Lock()
        self._jitter: dict[str, float] = {}
        self._retry_at: dict[str, tuple[float, Backoff]] = {}
        self._dirty = asyncio.Event()
        self.tokens = TokenCache(self.cache, self._new_jwt, self.now)

    async def run(self) -> None:
        """
        Stay in step until cancelled.

        Raises:
            AgentDeniedError: banned, evicted, superseded or expired; keys are gone by then.
        """
        tasks = [
            asyncio.create_task(one)
            for one in (self._follow(), self._keep_fresh(), self._keep_on_disk())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
        signed = await self._sign(entries)
        self.cache.wake(0)
        return signed

    async def _follow(self) -> None:
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                await self._post_status()
                await self._watch(backoff)
                self.state.problem = "the server ended the stream"
            except UnsupportedError:
                await self._poll(backoff)
            except AgentDeniedError as error:
                await self._denied(error)
            except SpiffeError as error:
                self.state.problem = self.dialer.problem or str(error)
                event(_log, logging.WARNING, "sync_failed", why=self.state.problem)
            self.state.connected = False
            await asyncio.sleep(backoff.next().total_seconds())

    async def _watch(self, backoff: Backoff) -> None:
        call = watch_pb2_grpc.AgentWatchStub(self.dialer.channel).Watch(
            watch_pb2.WatchRequest(cursor=self.cursor)
        )
        gathered: list[Any] = []
        try:
            async for message in call:
                gathered.append(message)
                if not message.more:
                    await self._apply(gathered)
                    gathered = []
                    backoff.reset()
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def _apply(self, messages: Sequence[Any]) -> None:
        last = messages[-1]
        self.state.mode = "watch"
        self.cache.apply(
            snapshot=messages[0].snapshot,
            entries=_entries_of(entry for one in messages for entry in one.entries),
            removed=last.removed_entry_ids,
            bundles=_bundles_of(last.bundles),
            removed_domains=[TrustDomain(name) for name in last.removed_trust_domains],
        )
        crash_point("agent.applied")
        self.cursor = last.cursor
        await self._synced(messages[0].committed_at_micros)

    async def _synced(self, committed_at_micros: int) -> None:
        self.state.connected = True
        self.state.last_sync_at = self.now()
        self.state.problem = ""
        try:
            await self._sign(self._due())
        finally:
            # Also when signing failed: what was taken away must go now.
            self.cache.wake(committed_at_micros)
            self._dirty.set()

    async def _poll(self, backoff: Backoff) -> None:
        """A server that can't push: SPIRE's own way, at its own pace (SPIRE API 9)."""
        while True:
            self.state.mode = "poll"
            entries = await self._authorized()
            names = sorted({one for entry in entries for one in entry.federates_with})
            bundles = [await self._bundle(None), *[await self._bundle(one) for one in names]]
            self.cache.apply(
                snapshot=True, entries=entries, bundles=[one for one in bundles if one]
            )
            await self._synced(0)
            backoff.reset()
            await asyncio.sleep(self.sync_interval.total_seconds())

    async def _authorized(self) -> list[RegistrationEntry]:
        request = entry_pb2.GetAuthorizedEntriesRequest()
        stub = entry_pb2_grpc.EntryStub(self.dialer.channel)
        try:
            answer = await stub.GetAuthorizedEntries(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return _entries_of(answer.entries)

    async def _bundle(self, name: TrustDomain | None) -> Bundle | None:
        stub = bundle_pb2_grpc.BundleStub(self.dialer.channel)
        try:
            if name is None:
                answer = await stub.GetBundle(
                    bundle_pb2.GetBundleRequest(), timeout=CALL_TIMEOUT
                )
            else:
                answer = await stub.GetFederatedBundle(
                    bundle_pb2.GetFederatedBundleRequest(trust_domain=name.name),
                    timeout=CALL_TIMEOUT,
                )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise error_of(error) from error
        return next(iter(_bundles_of([answer])), None)

    async def _post_status(self) -> None:
        request = agent_pb2.PostStatusRequest(agent_version=self.version)
        try:
            await agent_pb2_grpc.AgentStub(self.dialer.channel).PostStatus(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    async def _denied(self, error: AgentDeniedError) -> None:
        """SPIRE API 2.3: a join token can't be used again, so every reason is the end."""
        if error.reason in (DenialReason.UNKNOWN, DenialReason.AGENT_MUST_REATTEST):
            self.state.problem = str(error)
            return
        event(_log, logging.ERROR, "agent_denied", reason=error.reason.name)
        self.state.denied = error
        self.cache.wipe()
        self.tokens.clear()
        await self.node.forget()
        raise error

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                if self.node.renew_due():
                    await self.node.renew(self.dialer.channel)
                    self.dialer.cut()  # the next call comes with the new certificate
                    crash_point("agent.switched_over")
                due = self._due()
                if due and await self._sign(due):
                    self.cache.wake(0)
                    self._dirty.set()
            except AgentDeniedError as error:
                await self._denied(error)
            except SpiffeError as error:
                self.state.problem = self.dialer.problem or str(error)
                event(_log, logging.WARNING, "renewal_failed", why=self.state.problem)
                await asyncio.sleep(random.uniform(1, 5))  # noqa: S311 spreads load only

    def _due(self) -> list[RegistrationEntry]:
        """Entries without a good SVID of their revision, or past their share of its life."""
        now, monotonic = self.now(), time.monotonic()
        own = self.cache.bundles.get(self.cache.trust_domain)
        trusted = (
            {one.authority_id for one in own.x509_authorities if not one.tainted}
            if own
            else set()
        )
        due = []
        for entry in self.cache.index.all():
            held = self.cache.svids.get(entry.id)
            fresh = (
                held is not None
                and held.revision_number == entry.revision_number
                and held.spiffe_id == entry.spiffe_id
                and (not held.authority_id or held.authority_id in trusted)
                and now < renew_at(held.validity, self._jitter_of(entry.id))
            )
            if fresh or entry.is_expired(now) or entry.is_node_alias:
                continue
            if self._retry_at.get(entry.id, (0.0, None))[0] > monotonic:
                continue
            due.append(entry)
        return due

    def _jitter_of(self, entry_id: str) -> float:
        return self._jitter.setdefault(entry_id, random.uniform(-1, 1))  # noqa: S311

    async def _sign(self, entries: Sequence[RegistrationEntry]) -> int:
        """Sign for *entries* in batches; return how many went well."""
        done = 0
        async with self._signing:
            for at in range(0, len(entries), BATCH):
                done += await self._sign_batch(entries[at : at + BATCH])
        return done

    async def _sign_batch(self, entries: Sequence[RegistrationEntry]) -> int:
        keys = []
        for number, _ in enumerate(entries):
            if self.key_kind is KeyKind.EC_P256:
                keys.append(make_key())
            else:
                keys.append(await asyncio.to_thread(make_key, self.key_kind))
            if number % 20 == 19:
                await asyncio.sleep(0)
        request = svid_pb2.BatchNewX509SVIDRequest(
            params=[
                svid_pb2.NewX509SVIDParams(
                    entry_id=entry.id, csr=make_csr(key, entry.spiffe_id)
                )
                for entry, key in zip(entries, keys, strict=True)
            ]
        )
        try:
            answer = await svid_pb2_grpc.SVIDStub(self.dialer.channel).BatchNewX509SVID(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        crash_point("agent.svids_got")
        if len(answer.results) != len(entries):
            raise InternalError("the server answered another number of SVIDs than was asked")
        return sum(
            self._take(entry, key, result)
            for entry, key, result in zip(entries, keys, answer.results, strict=True)
        )

    def _take(self, entry: RegistrationEntry, key: bytes, result: Any) -> bool:
        if result.status.code != 0:
            self._put_off(entry, result.status.message)
            return False
        try:
            svid = X509Svid.from_chain(tuple(result.svid.cert_chain))
        except MalformedError as error:
            self._put_off(entry, str(error))
            return False
        if svid.spiffe_id != entry.spiffe_id:  # IOP-27
            self._put_off(entry, "the SVID is for another SPIFFE ID")
            return False
        self._retry_at.pop(entry.id, None)
        self._jitter.pop(entry.id, None)
        self.cache.svids[entry.id] = HeldSvid(
            svid.spiffe_id,
            entry.revision_number,
            svid.chain,
            key,
            svid.validity,
            svid.serial_number,
            _authority_of(svid.leaf) if len(svid.chain) == 1 else "",
        )
        return True

    def _put_off(self, entry: RegistrationEntry, why: str) -> None:
        _, backoff = self._retry_at.get(entry.id, (0.0, Backoff(FIRST_PAUSE, LONGEST_PAUSE)))
        self._retry_at[entry.id] = (time.monotonic() + backoff.next().total_seconds(), backoff)
        event(_log, logging.WARNING, "entry_not_signed", entry=entry.id, why=why)

    async def _new_jwt(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> JwtSvid:
        request = svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=audience)
        try:
            answer = await svid_pb2_grpc.SVIDStub(self.dialer.channel).NewJWTSVID(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        try:
            svid = JwtSvid.parse_unverified(answer.svid.token)
        except MalformedError as error:
            raise InternalError("the server answered something that is no JWT-SVID") from error
        if svid.spiffe_id != entry.spiffe_id:
            raise InternalError("the server answered a JWT-SVID for another SPIFFE ID")
        return svid

    async def _keep_on_disk(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(SAVE_DELAY)
            self._dirty.clear()
            snapshot = Snapshot.of(self.cache, self.cursor)
            try:
                await asyncio.to_thread(self.storage.save_cache, snapshot)
            except SpiffeError as error:
                self.state.problem = str(error)
                event(_log, logging.ERROR, "cache_not_saved", exc_info=error)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.sleep(5)
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


def _bundles_of(messages: Iterable[Any]) -> list[Bundle]:
    """Parse bundles; a bad one is skipped and the last good one kept (IOP-26, T-13)."""
    found = []
    for message in messages:
        try:
            found.append(bundle_from_wire(message))
        except MalformedError as error:
            event(
                _log, logging.ERROR, "bundle_skipped", of=message.trust_domain, why=str(error)
            )
    return found


def _authority_of(leaf: bytes) -> str:
    try:
        extensions = x509.load_der_x509_certificate(leaf).extensions
        found = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return ""
    return (found.value.key_identifier or b"").hex()
