"""py-spiffe, in this process and in one of its own, on the fake Workload API that we ship."""

import contextlib
import json
import os
import queue
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.interop import workload as program
from tests.support.children import a_child
from workload_api.client.testing import FakeIdentity, FakeWorkloadApi

WEB, API = "spiffe://example.org/web", "spiffe://example.org/api"
BUNDLES = {"example.org": 1, "partner.test": 1}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorkloadApi]:
    """A fake with two identities and a partner, which the environment names."""
    identities = ("/web", FakeIdentity("/api", hint="external"))
    with FakeWorkloadApi(*identities, federated=["partner.test"]) as made:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", made.address)
        yield made


@contextlib.contextmanager
def in_process() -> Iterator[Callable[..., Any]]:
    """py-spiffe in this process, beside our own messages."""
    program.UPDATES = queue.Queue()
    made = program.Workload()
    try:
        yield lambda name, **arguments: getattr(made, name)(**arguments)
    finally:
        for source in made.sources:
            source.close()
        made.client.close()


@contextlib.contextmanager
def as_process() -> Iterator[Callable[..., Any]]:
    """py-spiffe in a process of its own."""
    with a_child(sys.executable, program.__file__, env=dict(os.environ)) as child:

        def ask(name: str, **arguments: Any) -> Any:
            child.say(json.dumps([name, arguments]))
            answer = json.loads(child.hear(30))
            if "error" in answer:
                raise RuntimeError(answer["error"])
            return answer["answer"]

        yield ask


@pytest.fixture(params=[in_process, as_process], ids=["in process", "a process"])
def ask(request: pytest.FixtureRequest, fake: FakeWorkloadApi) -> Iterator[Any]:
    """Has py-spiffe do something."""
    with request.param() as made:
        yield made


def test_it_asks_everything(ask: Any) -> None:
    """All that py-spiffe can ask is answered so that py-spiffe takes it."""
    assert ask("x509_svid")["id"] == WEB
    assert [one["id"] for one in ask("x509_svids")] == [WEB, API]
    context = ask("x509_context")
    assert context["default"] == WEB and context["bundles"] == BUNDLES
    assert ask("x509_bundles") == ask("jwt_bundles") == BUNDLES
    svid = ask("jwt_svid", audience=["db", "cache"])
    assert svid["id"] == WEB and svid["audience"] == ["cache", "db"]
    assert ask("jwt_svid", audience=["db"], subject=API)["id"] == API
    assert ask("jwt_svids", audience=["db"]) == [WEB, API]
    assert ask("validate", token=svid["token"], audience="db") == WEB
    assert ask("validate_by_bundle", token=svid["token"], audience="db") == WEB
    with pytest.raises(Exception, match=r"JWT SVID|JwtSvid"):
        ask("validate", token=svid["token"], audience="other")
    with pytest.raises(Exception, match=r"JWT SVID|JwtSvid"):
        ask("jwt_svid", audience=["db"], subject="spiffe://example.org/other")


def test_its_sources_follow(ask: Any, fake: FakeWorkloadApi) -> None:
    """Its sources see rotations, survive a restart and a denial, and stay open."""
    before = ask("x509_source")
    assert ask("jwt_source", audience=["db"]) == {"id": WEB, "bundles": BUNDLES}
    fake.rotate()
    after = ask("update")
    assert after["id"] == WEB and after["serial"] != before["serial"]
    assert after["serial"] == fake.identities[0].svid.serial
    fake.stop()
    fake.rotate()
    fake.start()
    assert ask("update")["serial"] == fake.identities[0].svid.serial
    fake.deny()
    fake.set_identities("/other")
    fake.allow()
    assert ask("update")["id"] == "spiffe://example.org/other"
    assert ask("source_closed") == [False, False]
