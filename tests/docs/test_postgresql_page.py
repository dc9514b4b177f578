"""The page about PostgreSQL, played with a real one."""

import pytest

from tests.support.ordinary import a_home, a_user
from tests.support.pages import play
from tests.support.postgres import needs_postgres
from tests.support.proxies import ending, needs

pytestmark = [*needs_postgres(), *needs("openssl")]


@pytest.mark.timeout(120)
def test_postgresql_page() -> None:
    """A reader who types what the page says sees what the page says."""
    with a_home() as folder, a_user() as user, ending(folder / "postgres.pid"):
        play("docs/howto/postgresql-client-certs.md", folder, user)
