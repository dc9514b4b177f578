"""One stack for each module, and both programs pointed at it."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.programs import Programs
from tests.support.stack import Stack, a_stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent."""
    async with a_stack() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def programs(stack: Stack) -> Programs:
    """Both programs, in an environment that names the stack's sockets."""
    return Programs.of(stack)
