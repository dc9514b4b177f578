"""What every test begins with."""

import os
from collections.abc import Iterator

import pytest

from spiffe_wire.descriptors import raise_limit

# As both daemons do: a shell's 1,024 are few for a test that holds hundreds of connections.
raise_limit()


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of a shell: a daemon that ran in this process before has set its own."""
    before = os.umask(0o022)
    yield
    os.umask(before)
