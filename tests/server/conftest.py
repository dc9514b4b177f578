"""A server for a whole module, or one for a test alone."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.callers import Running, a_running_server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    """One server for the module: its tests keep to names of their own."""
    async with a_running_server() as made:
        yield made
