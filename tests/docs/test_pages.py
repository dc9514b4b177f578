"""
Every command of the tutorial and the how-to pages is run, and answers as the page says.

What a page may hold is told in `tests.support.pages`.
"""

import re

import pytest

from tests.support.pages import play
from tests.support.stack import ROOT, a_folder

PAGES = (
    "docs/tutorial/first-svid.md",
    "docs/howto/server-and-agents.md",
    "docs/howto/test-your-service.md",
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str) -> None:
    """A reader who types what the page says sees what the page says."""
    with a_folder() as folder:
        play(page, folder)


def test_links_lead_somewhere() -> None:
    """Every relative link of the README and the docs leads to a file."""
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
