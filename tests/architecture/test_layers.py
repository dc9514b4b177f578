"""The borders between the packages, as the contracts in pyproject.toml state them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts() -> None:
    """Every import-linter contract is kept."""
    linter = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_the_agent_loads_no_database_and_no_http_library() -> None:
    """A node carries no signing code, no SQL and no HTTP server library (A14)."""
    code = (
        "import sys, workload_api.agent.app\n"
        "bad = {'sqlalchemy', 'aiohttp', 'ca', 'issuer', 'alembic'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {bad}' if bad else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
