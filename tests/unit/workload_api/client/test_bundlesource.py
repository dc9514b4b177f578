"""BundleSource, against a Workload API on a real socket that changes under it."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import (
    ForbiddenError,
    MalformedError,
    NotReadyError,
    PreconditionError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import verify_x509_svid
from tests.support.callers import eventually
from tests.support.children import open_files
from workload_api.client.bundlesource import BundleSource
from workload_api.client.testing import FakeWorkloadApi

SHORT = timedelta(seconds=0.3)
X509, JWT = "FetchX509Bundles", "FetchJWTBundles"
DENIED, GONE = ForbiddenError("denied"), UnsupportedError("not offered")
OWN, PARTNER = TrustDomain("example.org"), TrustDomain("partner.test")


class Hasty:
    """The system's time, and pauses that are over soon."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, span: timedelta) -> None:
        await asyncio.sleep(min(span.total_seconds(), 0.01))


@pytest.fixture
def fake() -> Iterator[FakeWorkloadApi]:
    """A fake of example.org with the partner partner.test."""
    with FakeWorkloadApi(federated=[PARTNER.name]) as made:
        yield made


def a_source(fake: FakeWorkloadApi, **changes: Any) -> BundleSource:
    """A source of *fake* that tries again soon."""
    return BundleSource(fake.address, **{"clock": Hasty(), **changes})


def counted(bundles: BundleSet) -> dict[str, tuple[int, int]]:
    """How many X.509 and JWT authorities each domain has."""
    return {
        name.name: (len(one.x509_authorities), len(one.jwt_authorities))
        for name, one in bundles.items()
    }


async def becomes(source: BundleSource, expected: dict[str, tuple[int, int]]) -> None:
    """Wait until *source* holds so many authorities."""
    await eventually(lambda: counted(source.bundles) == expected)


async def test_both_kinds_of_authorities_in_one_set(fake: FakeWorkloadApi) -> None:
    """WAPI-16, WAPI-22, WAPI-38: each domain's X.509 and JWT authorities, to verify its own."""
    async with a_source(fake) as source:
        assert counted(source.bundles) == {"example.org": (1, 1), "partner.test": (1, 1)}
        assert source.bundles == fake.bundles and source.problem == ""
        for authority in (fake.authority, fake._federated[PARTNER.name]):
            svid = authority.mint_x509("/w").svid
            now = datetime.now(UTC)
            assert verify_x509_svid(svid.chain, source.bundles, at=now) == svid
            token = authority.mint_jwt("/w", "db").token
            assert verify_jwt_svid(token, source.bundles, audience="db", at=now).token == token


async def test_wep_11_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEP-11: with no address at all it says what to set."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    with pytest.raises(PreconditionError, match="set SPIFFE_ENDPOINT_SOCKET"):
        BundleSource()


async def test_wapi_31_bundles_come_and_go(fake: FakeWorkloadApi) -> None:
    """WAPI-12, WAPI-31: a partner that is left out is gone; new authorities join the old."""
    async with a_source(fake) as source:
        fake.unfederate(PARTNER.name)
        await becomes(source, {"example.org": (1, 1)})
        fake.federate("other.test")
        await becomes(source, {"example.org": (1, 1), "other.test": (1, 1)})
        fake.rotate_authorities()
        await becomes(source, {"example.org": (2, 2), "other.test": (1, 1)})
        fake.rotate_authorities(keep_old=False)
        await becomes(source, {"example.org": (1, 1), "other.test": (1, 1)})
    assert (fake.calls[X509], fake.calls[JWT]) == (1, 1)  # WAPI-06


async def test_wapi_07_the_agent_restarts(fake: FakeWorkloadApi) -> None:
    """WAPI-07: what was known stays while the agent is away; equal news wake nobody."""
    async with a_source(fake) as source:
        before, told = source.bundles, []
        source.on_change(lambda: told.append(True))
        fake.stop()
        await eventually(lambda: all(one.problem for one in source._followers))
        assert source.bundles is before
        fake.start()
        await eventually(lambda: source.problem == "")
        assert source.bundles is before and told == []
        fake.federate("other.test")
        await eventually(lambda: told)


@pytest.mark.parametrize("error", [DENIED, GONE], ids=["denied", "unsupported"])
@pytest.mark.parametrize(
    ("method", "left"), [(X509, (0, 1)), (JWT, (1, 0))], ids=["x509", "jwt"]
)
async def test_only_one_kind(
    fake: FakeWorkloadApi, method: str, left: tuple[int, int], error: SpiffeError
) -> None:
    """WEP-23, WAPI-31: where the agent gives one kind alone, that one is there and fresh."""
    expected = {"example.org": left, "partner.test": left}
    fake.refuse(error, method)
    async with a_source(fake) as source:
        assert counted(source.bundles) == expected and source.problem == str(error)
        fake.unfederate(PARTNER.name)
        await becomes(source, {"example.org": left})
    assert error is DENIED or fake.calls[method] == 1


async def test_wapi_28_denied_later(fake: FakeWorkloadApi) -> None:
    """WAPI-28, WAPI-31: what is denied later is used no longer, until it is given again."""
    async with a_source(fake) as source:
        fake.refuse(DENIED, JWT)
        await becomes(source, {"example.org": (1, 0), "partner.test": (1, 0)})
        fake.deny()
        await becomes(source, {})
        assert source.bundles == BundleSet()
        fake.allow()
        await becomes(source, {"example.org": (1, 1), "partner.test": (1, 1)})
        await eventually(lambda: source.problem == "")


@pytest.mark.parametrize(
    ("prepare", "error", "said"),
    [
        (FakeWorkloadApi.deny, NotReadyError, "no identity issued"),
        (FakeWorkloadApi.stop, NotReadyError, "No such file or directory"),
        (lambda fake: fake.refuse(NotReadyError("soon"), JWT), NotReadyError, "s: soon"),
        (lambda fake: fake.refuse(GONE), UnsupportedError, "not offered"),
        (lambda fake: fake.refuse(MalformedError("no"), JWT), MalformedError, "no"),
    ],
    ids=["denied", "nobody there", "one not ready", "unsupported", "invalid argument"],
)
async def test_nothing_comes_in_time(
    fake: FakeWorkloadApi,
    prepare: Callable[[FakeWorkloadApi], None],
    error: type[SpiffeError],
    said: str,
) -> None:
    """WEP-18, WEP-23: who enters and cannot be served is told what the agent answered."""
    prepare(fake)
    with pytest.raises(error, match=said):
        async with a_source(fake, timeout=SHORT):
            pass


async def test_an_update_that_breaks_a_rule(fake: FakeWorkloadApi) -> None:
    """WAPI-15: a bundle that cannot be read replaces nothing; the next good one does."""
    async with a_source(fake) as source:
        before = source.bundles
        own = fake.authority._cas
        with fake._changed:
            fake.authority._cas = []  # an empty X.509 bundle, and a JWK Set of no keys
            fake._tell()
        await eventually(lambda: "breaks a rule" in source.problem)
        assert source.bundles[OWN].x509_authorities == before[OWN].x509_authorities
        with fake._changed:
            fake.authority._cas = own
        fake.rotate_authorities()
        await becomes(source, {"example.org": (2, 2), "partner.test": (1, 1)})
        assert source.problem == ""
    assert (fake.calls[X509], fake.calls[JWT]) == (1, 1)


async def test_updates(fake: FakeWorkloadApi) -> None:
    """An iterator gives the present bundles, then the latest, and ends with the source."""
    async with a_source(fake) as source:
        updates = source.updates()
        assert await anext(updates) == source.bundles
        fake.unfederate(PARTNER.name)
        async with asyncio.timeout(5):
            async for bundles in updates:
                if counted(bundles) == {"example.org": (1, 1)}:
                    break
    assert [one async for one in source.updates()] == []


async def test_nothing_is_left_open(fake: FakeWorkloadApi) -> None:
    """A source that is left, or that could not be entered, leaves no task and no file."""
    async with a_source(fake):
        pass
    before = open_files()
    for _ in range(5):
        async with a_source(fake):
            pass
    fake.deny()
    with pytest.raises(NotReadyError):
        async with a_source(fake, timeout=SHORT):
            pass
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    await eventually(lambda: open_files() <= before)
