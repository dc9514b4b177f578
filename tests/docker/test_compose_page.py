"""The page about docker-compose, played on the file that it is about."""

from pathlib import Path

import pytest

from tests.support.compose import Project
from tests.support.envoy import needs_envoy
from tests.support.pages import play

pytestmark = [pytest.mark.docker, needs_envoy]


@pytest.mark.timeout(180)
def test_the_page(project: Project, tmp_path: Path) -> None:
    """What the page shows is seen, and when it is over nothing is left in the engine."""
    play("docs/howto/docker-compose.md", tmp_path, project.become, patience=60)
    assert project.docker("ps", "--all", "--quiet") == ""
    assert project.docker("volume", "ls", "--quiet") == ""
    networks = project.docker("network", "ls", "--format", "{{.Name}}")
    assert set(networks.split()) == {"bridge", "host", "none"}
