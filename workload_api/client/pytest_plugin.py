"""
A fixture for pytest: ``pytest_plugins = ["workload_api.client.pytest_plugin"]`` in conftest.py.

The only module that needs pytest; nothing else imports it.
"""

from collections.abc import Iterator

import pytest

from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from workload_api.client.testing import FakeWorkloadApi


@pytest.fixture
def fake_workload_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorkloadApi]:
    """A fake Workload API with one identity, which ``SPIFFE_ENDPOINT_SOCKET`` points to."""
    with FakeWorkloadApi() as fake:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, fake.address)
        yield fake
