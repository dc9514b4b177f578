"""How files follow the agent: renewals, a disk that is full, an agent that says never again."""

import asyncio
import contextlib
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_core.errors import MalformedError, SpiffeError, UnsupportedError
from spiffe_core.jwtsvid import JwtSvid
from tests.support.authorities import NOW
from tests.support.clock import DrivenClock
from tests.support.programs import openssl_key_fits
from tests.support.tokens import MISSING, a_token
from workload_api.client.client import WorkloadClient
from workload_api.client.testing import FakeWorkloadApi
from workload_api.sidecar.config import Bundles, JwtFile, Kind, SidecarSettings, X509Files
from workload_api.sidecar.delivery import Delivery, until_renewal
from workload_api.sidecar.files import FilesError, SvidFolder


class Delivering:
    """A delivery that runs, and what it told."""

    def __init__(self, folder: Path, clock: DrivenClock) -> None:
        self.dir = folder
        self.clock = clock
        self.told: list[frozenset[Kind]] = []
        self.delivery: Any = None
        self.task: Any = None

    async def tell(self, changed: frozenset[Kind]) -> None:
        """Remember it."""
        self.told.append(changed)

    async def until(self, ready: Any) -> None:
        """Wait, in real time, until *ready*; the clock is not advanced."""
        async with asyncio.timeout(10):
            while not ready():
                await asyncio.sleep(0.005)

    async def passes(self, span: timedelta, ready: Any) -> None:
        """Advance the clock by small steps of *span* until *ready*."""
        async with asyncio.timeout(10):
            while not ready():
                self.clock.advance(span)
                await asyncio.sleep(0.005)


@pytest.fixture
def clock() -> DrivenClock:
    """The time, for the agent and for us."""
    return DrivenClock()


@pytest.fixture
def fake(clock: DrivenClock) -> Iterator[FakeWorkloadApi]:
    """An agent for which we are ``/web``."""
    with FakeWorkloadApi("/web", now=clock.now) as made:
        yield made


@contextlib.asynccontextmanager
async def delivering(
    fake: FakeWorkloadApi, folder: Path, clock: DrivenClock, **changes: Any
) -> AsyncIterator[Delivering]:
    """Deliver one SVID, but for *changes*."""
    settings = SidecarSettings(**{"dir": folder, "x509": (X509Files(),), **changes})
    made = Delivering(folder, clock)
    async with WorkloadClient(fake.address) as client:
        with SvidFolder(folder, "dir") as place:
            made.delivery = Delivery(settings, client, place, made.tell, clock)
            made.task = asyncio.create_task(made.delivery.run())
            try:
                yield made
            finally:
                made.task.cancel()
                await asyncio.gather(made.task, return_exceptions=True)


async def test_a_token_is_renewed_before_it_expires(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """A JWT-SVID is another at half of its life, a tenth sooner or later; only it changed."""
    wanted = JwtFile(audience=("db",))
    async with delivering(fake, tmp_path, clock, jwt=(wanted,)) as made:
        file = tmp_path / "jwt.db.token"
        await made.until(file.exists)
        first = JwtSvid.parse_unverified(file.read_text())
        life = first.expires_at - clock.now()
        began = clock.now()
        await made.passes(life / 100, lambda: file.read_text() != first.token)
        assert 0.38 * life <= clock.now() - began <= 0.65 * life
        await made.until(lambda: len(made.told) > 1)
        assert made.told[-1] == {Kind.JWT}


async def test_it_stays_as_it_is_for_a_while(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """After a change nothing is written until `settle` has passed: who was told reads now."""
    settle = timedelta(seconds=5)
    async with delivering(fake, tmp_path, clock, settle=settle) as made:
        await made.until(lambda: made.told)
        fake.rotate()
        await made.until(lambda: made.delivery._known.x509.identities == fake.identities)
        assert made.delivery.sets_written == 1
        await made.passes(timedelta(seconds=1), lambda: made.delivery.sets_written == 2)
        openssl_key_fits(tmp_path / "svid.key", tmp_path / "svid.pem")


async def test_equal_updates_write_nothing(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """An agent that comes back with the same state causes no new set, and tells nobody."""
    async with delivering(fake, tmp_path, clock) as made:
        await made.until(lambda: made.told)
        fake.stop()
        await made.until(lambda: made.delivery.problems)
        assert made.delivery.is_ready
        fake.start()
        await made.passes(timedelta(seconds=1), lambda: not made.delivery.problems)
        assert made.delivery.sets_written == len(made.told) == 1


async def test_a_full_disk(fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock) -> None:
    """While nothing can be written the old set stays, and it is said; the newest follows."""
    async with delivering(fake, tmp_path, clock) as made:
        await made.until(lambda: made.told)
        before = (tmp_path / "svid.pem").read_text()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            fake.rotate()
            await made.passes(timedelta(seconds=1), lambda: made.delivery.failures)
            assert "File too large" in made.delivery.problems[0]
            assert (tmp_path / "svid.pem").read_text() == before
            openssl_key_fits(tmp_path / "svid.key", tmp_path / "svid.pem")
            assert len(made.told) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await made.passes(timedelta(seconds=1), lambda: len(made.told) == 2)
        assert (tmp_path / "svid.pem").read_text() != before
        assert made.delivery.problems == ()


async def test_a_disk_that_was_full_from_the_start(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """Where not even the first set can be written, it ends and says why."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        async with delivering(fake, tmp_path, clock) as made:
            with pytest.raises(FilesError, match="File too large"):
                await asyncio.wait_for(made.task, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("method", ["FetchX509SVID", "FetchJWTSVID", "FetchJWTBundles"])
@pytest.mark.parametrize("error", [MalformedError, UnsupportedError])
async def test_an_answer_that_is_final(
    error: type[SpiffeError],
    method: str,
    fake: FakeWorkloadApi,
    tmp_path: Path,
    clock: DrivenClock,
) -> None:
    """WEP-18, WEP-23: it ends, with the agent's words, and does not ask that again."""
    fake.refuse(error("never again"), method)
    changes = {"jwt": (JwtFile(audience=("db",)),), "bundles": Bundles(jwt=True)}
    async with delivering(fake, tmp_path, clock, **changes) as made:
        with pytest.raises(error, match="never again"):
            await asyncio.wait_for(made.task, 10)
    assert fake.calls[method] == 1


READS = """
import os, ssl, sys, time
folder, rounds, pairs = sys.argv[1], 0, set()
print("reading", flush=True)
while not os.path.exists(folder + "/over"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        place = os.open(folder + "/..data", os.O_RDONLY | os.O_DIRECTORY)
        try:
            here = f"/proc/self/fd/{place}"
            pairs.add(os.readlink(here))
            context.load_cert_chain(here + "/svid.pem", here + "/svid.key")
        finally:
            os.close(place)
    except FileNotFoundError:
        continue  # a newer set took its place: look up again
    rounds += 1
    time.sleep(0.001)
print(rounds, len(pairs))
"""
"""Has OpenSSL load certificate and key over and over: it refuses two that do not fit."""


async def test_a_reader_during_200_renewals(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """At no moment of 200 renewals does a reader find a certificate with another key."""
    async with delivering(fake, tmp_path, clock, settle=timedelta(0)) as made:
        await made.until(lambda: made.told)
        with subprocess.Popen(
            [sys.executable, "-c", READS, tmp_path], stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout is not None
            assert await asyncio.to_thread(reader.stdout.readline) == "reading\n"
            for number in range(2, 202):
                fake.rotate()
                await made.until(lambda wanted=number: made.delivery.sets_written >= wanted)
            (tmp_path / "over").touch()
            rounds, sets = (await asyncio.to_thread(reader.stdout.readline)).split()
        assert reader.returncode == 0
    assert int(rounds) >= int(sets) > 10


async def test_files_that_expired(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock
) -> None:
    """While the agent is away files stay, and are ready until the first of them expires."""
    async with delivering(fake, tmp_path, clock) as made:
        await made.until(lambda: made.told)
        fake.stop()
        assert made.delivery.is_ready
        clock.advance(made.delivery.written.expires_at - clock.now())
        assert made.delivery.is_ready
        clock.advance(timedelta(seconds=1))
        assert not made.delivery.is_ready
        assert (tmp_path / "svid.pem").exists()


async def test_it_says_what_it_waits_for(
    fake: FakeWorkloadApi, tmp_path: Path, clock: DrivenClock, caplog: pytest.LogCaptureFixture
) -> None:
    """While nothing comes, the log says once what is missing, and why."""
    fake.stop()
    async with delivering(fake, tmp_path, clock) as made:

        def said() -> list[str]:
            return [str(e.event_fields["why"]) for e in caplog.records if e.msg == "waiting"]

        await made.until(said)
        (why,) = said()
        assert why.startswith("waiting for an X509-SVID; failed to connect")
        assert not made.delivery.is_ready


@pytest.mark.parametrize(
    ("claims", "later", "least", "most"),
    [
        ({}, 0, 120, 180),
        ({}, 60, 60, 120),
        ({"iat": MISSING}, 0, 120, 180),
        ({}, 240, 6, 6),
        ({}, 299, 1, 1),
        ({}, 400, 1, 1),
    ],
    ids=["new", "a-minute-old", "no-iat", "past-half", "nearly-over", "over"],
)
def test_when_a_token_is_renewed(
    claims: dict[str, Any], later: int, least: float, most: float
) -> None:
    """At half of its life, a tenth sooner or later; at most once a second."""
    token = JwtSvid.parse_unverified(a_token(**claims))
    spans = {until_renewal(token, NOW + timedelta(seconds=later)) for _ in range(50)}
    assert timedelta(seconds=least) <= min(spans)
    assert max(spans) <= timedelta(seconds=most)
    assert len(spans) > 1 or least == most
