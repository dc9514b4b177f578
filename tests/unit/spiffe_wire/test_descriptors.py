"""The soft limit of descriptors is raised to what the limits on connections need (SEC-80)."""

import resource
from collections.abc import Iterator

import pytest

from spiffe_wire.descriptors import WANTED, raise_limit
from spiffe_wire.frontdoor.limits import DoorLimits


@pytest.fixture(autouse=True)
def limit() -> Iterator[tuple[int, int]]:
    """The limit of this process, put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_sec_80_the_soft_limit_follows_the_need(
    limit: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-80: from a few it goes up to what is wanted, or to the hard limit, with a warning."""
    soft = min(256, limit[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limit[1]))
    assert raise_limit(soft + 1) == soft + 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft + 1, limit[1])
    assert caplog.messages == []
    if limit[1] != resource.RLIM_INFINITY:
        assert raise_limit(limit[1] + 1) == limit[1]
        assert caplog.messages == ["few_descriptors"]


def test_sec_80_it_is_never_lowered(limit: tuple[int, int]) -> None:
    """SEC-80: a limit that is above the need stays where it is."""
    assert raise_limit(1) == limit[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


def test_sec_80_four_for_each_connection() -> None:
    """SEC-80: the need covers every connection that a door admits."""
    assert 4 * DoorLimits().connections < WANTED
