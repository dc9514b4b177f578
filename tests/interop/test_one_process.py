"""Ours beside py-spiffe and xds-protos in one process: private descriptor pools (T-29)."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.ca import FakeCa
from tests.support.forked import a_forked_stack
from tests.support.stack import ROOT, Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAM = Path(__file__).with_name("one_process.py")
ORDERS = list(itertools.permutations(("ours", "py-spiffe", "xds-protos")))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent with one identity for processes of this user."""
    async with a_forked_stack() as made:
        await made.server.set_bundle(FakeCa("partner.test").bundle)
        await made.server.add_entry(
            "/web",
            made.agent.agent_id,
            f"unix:uid:{os.geteuid()}",
            federates_with=["partner.test"],
        )
        await made.agent.until_svids(1)
        yield made


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
async def test_in_every_order(stack: Stack, order: tuple[str, ...]) -> None:
    """WAPI-04: whichever is imported first, all three ask one agent and are answered alike."""
    environment = {
        **os.environ,
        "SPIFFE_ENDPOINT_SOCKET": stack.agent.endpoint,
        "SDS_SOCKET": str(stack.agent.sds_socket),
    }
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", str(PROGRAM), *order],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=40,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    saw = json.loads(ran.stdout)
    assert saw["ours"] == saw["py-spiffe"]
    assert saw["ours"]["serial"] == saw["xds-protos"]["serial"]
    assert saw["ours"]["bundles"] == ["example.org", "partner.test"]
    assert saw["ours"]["jwt"] == "spiffe://example.org/web"
