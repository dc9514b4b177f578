"""The page about SVIDs as files, typed; and that its table leaves no option of ours unnamed."""

import re

import pytest

from spiffe_wire.settings import rows
from tests.support.pages import play
from tests.support.stack import ROOT, a_folder
from workload_api.sidecar.config import SidecarSettings

PAGE = "docs/howto/run-with.md"


@pytest.mark.timeout(120)
def test_the_page() -> None:
    """A reader who types what the page says sees what the page says."""
    with a_folder() as folder:
        play(PAGE, folder)


def test_every_setting_that_it_names_is_one() -> None:
    """What the table for those who come from spiffe-helper names on our side is there."""
    table = (ROOT / PAGE).read_text().partition("## 7.")[2]
    ours = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `")]
    words = {word for cell in ours for word in re.findall(r"[a-z0-9_]+_[a-z0-9_]+", cell)}
    known = {part for row in rows(SidecarSettings) for part in re.split(r"\W+", row.path)}
    assert len(ours) > 10
    assert words <= known
