"""The main job, end to end: a process on a node gets an SVID over the Unix socket."""

import os
import subprocess
import sys

from tests.support.stack import a_stack

FETCH = """
from spiffe import WorkloadApiClient
with WorkloadApiClient() as client:
    print(client.fetch_x509_svid().spiffe_id)
"""


async def test_a_process_gets_its_svid() -> None:
    """py-spiffe, unmodified and in its own process, gets the identity its entry names."""
    async with a_stack() as stack:
        await stack.server.add_entry("/web", stack.agent.agent_id, f"unix:uid:{os.getuid()}")
        ran = subprocess.run(
            [sys.executable, "-c", FETCH],
            env={**os.environ, "SPIFFE_ENDPOINT_SOCKET": stack.agent.endpoint},
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ran.stdout.strip() == "spiffe://example.org/web", ran.stderr
