"""`make demo` tells its story to the end, and its JSON holds what it promises."""

import json
import subprocess
import sys

import pytest

from tests.support.stack import ROOT


@pytest.mark.timeout(120)
def test_demo_json() -> None:
    """The demo ends with exit code 0 and one JSON object whose every part was really seen."""
    ran = subprocess.run(
        [sys.executable, "-m", "demo", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    story = ran.stdout.splitlines()
    facts = json.loads(story[-1])
    shop, payments = facts["spiffe_ids"]
    assert (shop, payments) == ("spiffe://example.org/shop", "spiffe://example.org/payments")
    assert facts["mtls"] == {"server_saw": shop, "client_saw": payments}
    assert facts["refused"]["reason"] == "no_match"
    assert "the entry wants unix:" in facts["refused"]["text"]
    pushed = facts["entry_to_svid_ms"]
    assert pushed["n"] >= 20
    assert 0 < pushed["median"] <= pushed["max"]
    assert facts["denied_then_entry_ms"] > 0
    assert facts["start_to_first_svid_ms"] > 0
    assert facts["rotation"]["serial_before"] != facts["rotation"]["serial_after"]
    assert facts["rotation"]["ms"] > 0
    assert facts["jwt"] == {"subject": shop, "audience": [payments], "validated": True}
    assert len(story) < 75, "a screen and a half"
    assert ran.stderr == ""
