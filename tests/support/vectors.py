"""The public test vectors, where they are: the folder in the environment variable VECTORS."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def wycheproof(name: str) -> dict[str, Any]:
    """
    One file of Wycheproof; skips the test when the vectors are not on this machine.

    `make test` sets VECTORS.
    """
    folder = os.environ.get("VECTORS", "")
    if not folder:
        pytest.skip("VECTORS is not set: the folder of the public test vectors")
    file = Path(folder) / "wycheproof" / name
    if not file.is_file():
        pytest.skip(f"VECTORS holds no wycheproof/{name}")
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


@cache
def limbo() -> dict[str, dict[str, Any]]:
    """The cases of x509-limbo by their ids; none where the vectors are not on this machine."""
    file = Path(os.environ.get("VECTORS", "/nowhere")) / "x509-limbo" / "limbo.json"
    if not file.is_file():
        return {}
    return {case["id"]: case for case in json.loads(file.read_bytes())}
