"""What a server without clusters does without (architecture A14)."""

import subprocess
import sys

from tests.support.stack import ROOT, a_folder

CODE = """
import asyncio, sys
from pathlib import Path
from tests.support.stack import serving

async def run(folder):
    async with serving(folder) as server:
        assert server.is_ready() and not server.pods.clusters

asyncio.run(run(Path(sys.argv[1])))
print(*{"httpcore", "anyio", "h11", "aiohttp"} & set(sys.modules))
"""


def test_a_server_without_clusters_has_no_http_client() -> None:
    """Who configures no cluster pays for none: nothing that speaks HTTP to one is loaded."""
    with a_folder() as folder:
        found = subprocess.run(
            [sys.executable, "-c", CODE, str(folder)],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
    assert found.stdout.split() == []
