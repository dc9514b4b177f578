"""The page about Envoy, played with the real program and our own server and agent."""

import os
from pathlib import Path

import pytest

from tests.support.envoy import PROGRAM, needs_envoy
from tests.support.pages import play
from tests.support.stack import a_folder

pytestmark = needs_envoy


@pytest.mark.timeout(120)
def test_two_envoys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Envoys in mutual TLS by SPIFFE ID: what the page says happens."""
    assert PROGRAM is not None
    (tmp_path / "envoy").symlink_to(PROGRAM)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with a_folder() as folder:
        play("docs/howto/envoy.md", folder)
