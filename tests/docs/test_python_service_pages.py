"""The pages for Python services: their programs run as they stand, and refuse who is wrong."""

import pytest

from tests.support.pages import play
from tests.support.stack import a_folder

PAGES = ("docs/howto/python-service.md", "docs/howto/grpc-service.md")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str) -> None:
    """A reader who types what the page says sees what the page says."""
    with a_folder() as folder:
        play(page, folder)
