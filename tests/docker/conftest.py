"""Engines of our own, each started once for all tests of this folder that use it."""

from collections.abc import Iterator

import pytest

from tests.support.compose import Project, a_project, why_no_project
from tests.support.containers import Engine, Podman, why_not


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Docker."""
    if reason := why_not():
        pytest.skip(reason)
    with Engine() as running:
        yield running


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman's service."""
    if reason := why_not("podman", "docker", "runc", "conmon", "setpriv", "unshare"):
        pytest.skip(reason)
    with Podman() as running:
        yield running


@pytest.fixture(scope="session")
def project() -> Iterator[Project]:
    """docker-compose.yml, built, in an engine of its own."""
    if reason := why_no_project():
        pytest.skip(reason)
    with a_project() as built:
        yield built
