"""The page about haproxy, played with a real one."""

import pytest

from tests.support.ordinary import a_home, a_user, needs_ordinary_user
from tests.support.pages import play
from tests.support.proxies import ending, needs

pytestmark = [*needs("haproxy", "curl", "openssl"), needs_ordinary_user()]


@pytest.mark.timeout(120)
def test_haproxy_page() -> None:
    """A reader who types what the page says sees what the page says."""
    with a_home() as folder, a_user() as user, ending(folder / "haproxy.pid"):
        play("docs/howto/haproxy.md", folder, user)
