"""
Keeps files on disk as the agent has them: follows it, writes, tells, and waits a while.

Source: WAPI-06, WAPI-07, WAPI-28 (what is denied), SEC-106 (JWT-SVIDs are renewed at half of
their life).  While the agent is away the files stay; the streams are opened again by
`workload_api.client.watching`.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import ForbiddenError, PreconditionError, SpiffeError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.lifetime import Validity, renew_at
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.backoff import Backoff
from spiffe_wire.logs import event
from workload_api.client.client import WorkloadClient, X509Context
from workload_api.client.watching import FINAL, Clock, Follower, Pauses
from workload_api.sidecar.config import JwtFile, Kind, SidecarSettings
from workload_api.sidecar.files import FilesError, SvidFolder
from workload_api.sidecar.plan import FileSet, Known, Plan

Told = Callable[[frozenset[Kind]], Awaitable[None]]

_log = logging.getLogger(__name__)
SHORTEST_PAUSE: Final = timedelta(seconds=1)
SAID_AFTER: Final = 2.0
"""Seconds of waiting after which we say for what; an agent that is well takes less."""
LONGEST_PAUSE: Final = timedelta(seconds=30)
"""Between tries to write; a disk that was full has room again when somebody has seen to it."""


class Delivery:
    """
    One folder of files, kept as the agent has them, while `run` runs.

    *told* is awaited after each set that was written, with what changed.
    """

    def __init__(
        self,
        settings: SidecarSettings,
        client: WorkloadClient,
        folder: SvidFolder,
        told: Told,
        clock: Clock,
    ) -> None:
        self.written: FileSet | None = None
        """What is on disk; None until all of it was there once."""
        self.sets_written = 0
        self.failures = 0
        self._settings = settings
        self._client = client
        self._folder = folder
        self._told = told
        self._clock = clock
        self._plan = Plan(settings)
        self._known = Known()
        self._problems: tuple[str, ...] = ()
        self._is_answered = False
        self._token_problems: dict[JwtFile, str] = {}
        self._final: SpiffeError | None = None
        self._news = asyncio.Event()
        self._followers = self._streams()
        self._said: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong now, each in a sentence; empty when nothing is."""
        found = [*self._problems, *(one.problem for one in self._followers)]
        found += self._token_problems.values()
        return tuple(dict.fromkeys(filter(None, found)))

    @property
    def is_ready(self) -> bool:
        """Everything that was asked for is there, and none of it has expired."""
        if self.written is None or self.written.problems:
            return False
        end = self.written.expires_at
        return end is None or self._clock.now() <= end

    async def run(self, *, once: bool = False) -> None:
        """
        Follow the agent, until cancelled or, with *once*, until everything was written.

        Raises:
            SpiffeError: before anything was written: the agent's last word (WEP-18, WEP-23),
                or why it cannot be written.
        """
        keeping = [one.run(self._tell) for one in self._followers]
        keeping += [self._keep_token(one) for one in self._settings.jwt]
        tasks = [asyncio.create_task(one) for one in keeping]
        try:
            await self._write_all(once=once)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _streams(self) -> list[Follower[X509Context] | Follower[BundleSet]]:
        found: list[Follower[X509Context] | Follower[BundleSet]] = []
        if self._plan.needs_x509:
            found.append(
                Follower("FetchX509SVID", self._client.watch_x509, self._take_x509, self._clock)
            )
        if self._plan.needs_jwt_bundles:
            found.append(
                Follower(
                    "FetchJWTBundles", self._client.watch_jwt_bundles, self._take_jwt_bundles,
                    self._clock,
                )
            )  # fmt: skip
        return found

    def _take_x509(self, context: X509Context | None) -> None:
        self._known.x509 = context

    def _take_jwt_bundles(self, bundles: BundleSet | None) -> None:
        self._known.jwt_bundles = bundles

    def _tell(self) -> None:
        self._news.set()

    async def _keep_token(self, wanted: JwtFile) -> None:
        """Fetch a JWT-SVID, and another at half of its life, for as long as we run."""
        pauses = Pauses()
        spiffe_id = SpiffeId.parse(wanted.spiffe_id) if wanted.spiffe_id else None
        while True:
            try:
                token, *_ = await self._client.fetch_jwt(wanted.audience, spiffe_id)
            except SpiffeError as error:
                self._token_problems[wanted] = str(error)
                if isinstance(error, ForbiddenError):
                    self._known.tokens.pop(wanted, None)
                self._tell()
                if isinstance(error, FINAL):
                    self._final = error
                    return
                await self._clock.sleep(pauses.after(error))
                continue
            pauses.reset()
            self._token_problems.pop(wanted, None)
            self._known.tokens[wanted] = token
            self._tell()
            await self._clock.sleep(until_renewal(token, self._clock.now()))

    async def _write_all(self, *, once: bool) -> None:
        pauses = Backoff(SHORTEST_PAUSE, LONGEST_PAUSE)
        while True:
            self._news.clear()
            try:
                changed = await self._write()
            except (FilesError, PreconditionError) as error:
                self.failures += 1
                self._problems = (str(error),)
                event(_log, logging.ERROR, "files_not_written", why=error)
                if self.written is None:
                    raise
                await self._clock.sleep(pauses.next())
                continue
            pauses.reset()
            if self.written is not None or self._is_answered:
                self._say_problems()
            if self.written is None:
                self._raise_if_final()
            elif once:
                return
            if changed:
                await self._told(changed)
                # Who was told reads now, and finds files that match.
                await self._clock.sleep(self._settings.settle)
                await _to_its_end(self._folder.tidy)
            await self._wait_for_news()

    async def _write(self) -> frozenset[Kind]:
        """Write what has changed, and return its kinds."""
        made = self._plan.files(self._known, self._clock.now(), self.written)
        self._problems, self._is_answered = made.problems, made.is_answered
        if self.written is None and made.problems:
            return frozenset()
        changed = made.changes_from(self.written)
        if changed or self.written is None:
            await _to_its_end(self._folder.write, made.files)
            self.sets_written += 1
            event(
                _log, logging.INFO, "files_written", dir=self._folder.path,
                changed=",".join(sorted(one.value for one in changed)),
                files=",".join(sorted(made.files)), expires_at=made.expires_at,
            )  # fmt: skip
        self.written = made
        return changed

    async def _wait_for_news(self) -> None:
        """Return at the next news; while nothing was written, say once what it is we lack."""
        if self.written is None and not self._said:
            try:
                await asyncio.wait_for(self._news.wait(), SAID_AFTER)
            except TimeoutError:
                self._say_problems()
        await self._news.wait()

    def _say_problems(self) -> None:
        if self._problems and self._problems != self._said:
            what = "waiting" if self.written is None else "not_renewed"
            event(_log, logging.WARNING, what, why="; ".join(self.problems))
        self._said = self._problems

    def _raise_if_final(self) -> None:
        for error in (*(one.final for one in self._followers), self._final):
            if error is not None:
                raise error


async def _to_its_end(call: Callable[..., None], *arguments: object) -> None:
    """Have *call* run in a thread; who cancels us waits for it, and then closes the folder."""
    running = asyncio.create_task(asyncio.to_thread(call, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def until_renewal(token: JwtSvid, now: datetime) -> timedelta:
    """Until half of its life; of one that is past it, a tenth of what is left."""
    left = token.expires_at - now
    start = token.issued_at or now
    if left <= timedelta(0) or start >= token.expires_at:
        return SHORTEST_PAUSE
    jitter = random.SystemRandom().uniform(-1, 1)
    half = renew_at(Validity(start, token.expires_at), jitter)
    return max(half - now, left / 10, SHORTEST_PAUSE)
