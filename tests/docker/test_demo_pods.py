"""`make demo-pods` tells its story to the end, and its JSON holds what it promises."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.containers import why_not
from tests.support.stack import ROOT

pytestmark = pytest.mark.docker
WEB, PAYMENTS = "spiffe://example.org/shop/web", "spiffe://example.org/shop/payments"


def told(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the demo to its end."""
    return subprocess.run(
        [sys.executable, "-m", "demo.pods", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.timeout(120)
def test_demo_pods_json() -> None:
    """The demo ends with exit code 0 and one JSON object whose every part was really seen."""
    if reason := why_not():
        pytest.skip(reason)
    ran = told("--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    story = ran.stdout.splitlines()
    facts = json.loads(story[-1])
    assert facts["made_of"] == "real containers, a stand-in API server"
    assert facts["made_of"] in story[0], "said first, to people too"
    assert {name: one["spiffe_id"] for name, one in facts["pods"].items()} == {
        "web-0": WEB,
        "payments-0": PAYMENTS,
    }
    assert facts["mtls"].items() >= {"server_saw": WEB, "client_saw": PAYMENTS}.items()
    assert facts["relabelled"]["spiffe_id"] == PAYMENTS
    assert facts["relabelled"]["kind"] == "FORBIDDEN"
    recreated = facts["recreated"]
    assert recreated["old_uid"] == facts["pods"]["web-0"]["uid"] != recreated["new_uid"]
    assert (recreated["spiffe_id"], recreated["old_container_gets"]) == (WEB, [])
    forged = facts["forged"]
    assert forged["svids"] == []
    assert f"pod{recreated['new_uid']}/" in forged["cgroup"]
    stolen = facts["stolen"]
    assert stolen["own_pod_signed"] and stolen["refused"] and stolen["audited"]
    assert recreated["new_uid"] in stolen["text"]
    within_seconds = {
        **{name: one["connect_to_svid_ms"] for name, one in facts["pods"].items()},
        "lost": facts["relabelled"]["lost_ms"],
        "back": facts["relabelled"]["back_ms"],
        "ended": recreated["old_stream_ended_ms"],
        "anew": recreated["new_connect_to_svid_ms"],
        "refused": stolen["ms"],
        "mtls": facts["mtls"]["ms"],
    }
    assert all(0 < one < 5000 for one in within_seconds.values()), within_seconds
    assert ran.stderr == ""


def test_demo_pods_without_an_engine() -> None:
    """Where it cannot run it says what it needs, and its exit code is 1."""
    ran = told(PATH="/nowhere")
    assert ran.returncode == 1
    assert "needs" in ran.stdout
    assert "Traceback" not in ran.stderr
