"""py-spiffe, unmodified and in a process of its own, against a real agent and server."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.ca import FakeCa
from tests.support.children import Child, a_child
from tests.support.stack import Stack, a_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAM = Path(__file__).with_name("workload.py")
ME = f"unix:uid:{os.geteuid()}"
WEB, API = "spiffe://example.org/web", "spiffe://example.org/api"


class Error(Exception):
    """What py-spiffe raised."""


class Workload:
    """The other process."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.seconds = 0.0

    async def __call__(self, command: str, **arguments: Any) -> Any:
        """Have it do something, and return what came of it."""
        self._child.say(json.dumps([command, arguments]))
        answer = json.loads(await asyncio.to_thread(self._child.hear, 30))
        self.seconds = answer["seconds"]
        if "error" in answer:
            raise Error(answer["error"])
        return answer["answer"]


@contextlib.contextmanager
def a_workload(stack: Stack) -> Iterator[Workload]:
    """A fresh process with the endpoint in its environment."""
    environment = {**os.environ, "SPIFFE_ENDPOINT_SOCKET": stack.agent.endpoint}
    with a_child(sys.executable, str(PROGRAM), env=environment) as child:
        yield Workload(child)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent; processes of this user have two identities and a partner."""
    async with a_stack() as made:
        agent = made.agent.agent_id
        await made.server.set_bundle(FakeCa("partner.test").bundle)
        await made.server.add_entry("/web", agent, ME, federates_with=["partner.test"])
        await made.server.add_entry("/api", agent, ME, hint="external")
        await made.agent.until_svids(2)
        yield made


@pytest.fixture(scope="module")
def workload(stack: Stack) -> Iterator[Workload]:
    """One process for those tests that only ask."""
    with a_workload(stack) as made:
        yield made


async def test_x509(workload: Workload) -> None:
    """WEP-04, WAPI-17, WAPI-18, WAPI-56, IOP-05, IOP-07: it loads our leaf, key and chain."""
    svid = await workload("x509_svid")
    assert svid["id"] == WEB and svid["chain"] == 1 and svid["key"] == "ECPrivateKey"
    svids = await workload("x509_svids")
    assert [one["id"] for one in svids] == [WEB, API]


async def test_x509_context(workload: Workload) -> None:
    """WAPI-19, WAPI-21, IOP-04: SVIDs and bundles of both domains in one context."""
    context = await workload("x509_context")
    assert [one["id"] for one in context["svids"]] == [WEB, API] and context["default"] == WEB
    assert context["bundles"] == {"example.org": 1, "partner.test": 1}


async def test_x509_bundles(workload: Workload) -> None:
    """WAPI-29, IOP-08: the bundles of both domains."""
    assert await workload("x509_bundles") == {"example.org": 1, "partner.test": 1}


async def test_jwt(workload: Workload) -> None:
    """WAPI-32, WAPI-33, WAPI-34, IOP-01, IOP-29: tokens for one identity, or for all."""
    svid = await workload("jwt_svid", audience=["db", "cache"])
    assert svid["id"] == WEB and svid["audience"] == ["cache", "db"]
    other = await workload("jwt_svid", audience=["db"], subject=API)
    assert other["id"] == API
    assert await workload("jwt_svids", audience=["db"]) == [WEB, API]


async def test_jwt_bundles(workload: Workload) -> None:
    """WAPI-39, WAPI-40, IOP-01, IOP-02: it reads our JWK Sets."""
    assert await workload("jwt_bundles") == {"example.org": 1, "partner.test": 1}


async def test_validation(workload: Workload) -> None:
    """WAPI-43, WAPI-45, WAPI-59, IOP-23: validated by the agent, and by our bundle alone."""
    token = (await workload("jwt_svid", audience=["db"]))["token"]
    assert await workload("validate", token=token, audience="db") == WEB
    assert await workload("validate_by_bundle", token=token, audience="db") == WEB
    for wrong in (
        {"token": token, "audience": "other"},
        {"token": token[:-6], "audience": "db"},
    ):
        with pytest.raises(Error):
            await workload("validate", **wrong)


async def test_refusals(workload: Workload) -> None:
    """WAPI-37, C-19: another's identity is refused, and it says so in its own errors."""
    with pytest.raises(Error, match="JwtSvid"):
        await workload("jwt_svid", audience=["db"], subject="spiffe://example.org/other")


async def test_rotation_on_an_open_stream(stack: Stack) -> None:
    """WAPI-09, SEC-106: a source that stays open has the new serial within a second."""
    with a_workload(stack) as workload:
        before = await workload("x509_source")
        for _ in range(3):
            await stack.agent.renew()
            after = await workload("update")
            assert after["id"] == WEB and after["serial"] != before["serial"]
            before = after
        assert await workload("source_svid") == before
        assert await workload("source_closed") == [False]


async def test_entries_come_and_go_on_an_open_stream(stack: Stack) -> None:
    """WAPI-08, WAPI-23: each change of entitlement is a whole new context."""
    with a_workload(stack) as workload:
        await workload("watch")
        assert len((await workload("update"))["svids"]) == 2
        entry = await stack.server.add_entry("/third", stack.agent.agent_id, ME)
        context = await workload("update")
        assert [one["id"] for one in context["svids"]] == [
            WEB,
            API,
            "spiffe://example.org/third",
        ]
        assert context["bundles"] == {"example.org": 1, "partner.test": 1}
        await stack.server.delete_entries(entry)
        assert [one["id"] for one in (await workload("update"))["svids"]] == [WEB, API]


async def test_jwt_source(stack: Stack) -> None:
    """WAPI-39: its source of tokens and JWT bundles starts, and stays open."""
    with a_workload(stack) as workload:
        found = await workload("jwt_source", audience=["db"])
        assert found == {"id": WEB, "bundles": {"example.org": 1, "partner.test": 1}}
        assert await workload("source_closed") == [False]


async def test_an_agent_that_restarts(stack: Stack) -> None:
    """IOP-10, IOP-24, WAPI-07: a source survives the agent's stop and start."""
    with a_workload(stack) as workload:
        before = await workload("x509_source")
        assert stack.agent.process.stop() == 0
        await stack.agent.start()
        after = await workload("update")  # the watcher came back by itself
        assert after["id"] == WEB and await workload("source_closed") == [False]
        await stack.agent.renew()
        while after["serial"] == before["serial"]:
            after = await workload("update")


async def test_registered_after_it_asked(stack: Stack) -> None:
    """WEP-22: a workload that comes before its entry is answered when the entry comes."""
    with a_workload(stack) as workload:
        await stack.server.delete_entries(*await stack.server.entries())
        await stack.agent.process.until(lambda: _entry_count(stack, 0))
        waiting = asyncio.create_task(workload("x509_svid"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        added = time.monotonic()
        await stack.server.add_entry(
            "/web", stack.agent.agent_id, ME, federates_with=["partner.test"]
        )
        assert (await waiting)["id"] == WEB
        assert time.monotonic() - added < 1
        await stack.server.add_entry("/api", stack.agent.agent_id, ME, hint="external")
        await stack.agent.until_svids(2)


async def test_losing_every_entry_and_getting_one_back(stack: Stack) -> None:
    """IOP-09, WAPI-27, WEP-22: a source that is denied keeps trying, and comes back."""
    with a_workload(stack) as workload:
        before = await workload("x509_source")
        await stack.server.delete_entries(*await stack.server.entries())
        await stack.agent.process.until(lambda: _entry_count(stack, 0))
        assert await workload("source_closed") == [False]
        await stack.server.add_entry(
            "/web", stack.agent.agent_id, ME, federates_with=["partner.test"]
        )
        after = await workload("update")
        assert after["id"] == WEB and after["serial"] != before["serial"]
        await stack.server.add_entry("/api", stack.agent.agent_id, ME, hint="external")
        await stack.agent.until_svids(2)


async def _entry_count(stack: Stack, count: int) -> bool:
    status = await stack.agent.status()
    return status is not None and status.entries == count
