"""
Our two programs as processes, the way a person runs them: what they said, and their code.

Every run is checked for what no run may do: print a traceback, or a private key where nobody
asked for one.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.stack import ROOT, Stack

OURS = ("SPIFFE_ENDPOINT_SOCKET", "SPIFFE_ISSUER_SOCKET", "SPIFFE_ISSUER_AGENT_SOCKET")
DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3


@dataclass(frozen=True)
class Ran:
    """A program that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output, which must be one JSON value."""
        return json.loads(self.out)

    @property
    def yaml(self) -> Any:
        """Its standard output, which must be YAML."""
        return yaml.safe_load(self.out)


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without our own variables, and with *changes*."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {**kept, "PYTHONPATH": str(ROOT), **(changes or {})}


async def ran(
    *command: str | Path,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 30,
) -> Ran:
    """Run *command* to its end."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(env),
        cwd=cwd,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), timeout)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    found = Ran(process.returncode, out.decode(), err.decode())
    assert "Traceback" not in found.err, found.err
    assert "PRIVATE KEY" not in found.err
    return found


def called(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> Ran:
    """Run a program's *main* in this process, which must be outside any event loop."""
    capsys.readouterr()
    try:
        code = main([str(one) for one in arguments])
    except SystemExit as ended:  # argparse's way to end
        code = int(ended.code or 0)
    said = capsys.readouterr()
    assert "PRIVATE KEY" not in said.err
    return Ran(code, said.out, said.err)


@dataclass(frozen=True)
class Programs:
    """Both programs, in an environment that names the sockets of one stack."""

    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stack: Stack) -> "Programs":
        """Those that ask *stack*."""
        return cls(
            {
                "SPIFFE_ENDPOINT_SOCKET": stack.agent.endpoint,
                "SPIFFE_ISSUER_SOCKET": str(stack.server.admin_socket),
                "SPIFFE_ISSUER_AGENT_SOCKET": str(stack.agent.admin_socket),
            }
        )

    async def issuer(self, *arguments: str | Path, **changes: Any) -> Ran:
        """Run ``python -m issuer``."""
        return await ran(
            sys.executable, "-m", "issuer", *arguments, env=self.variables, **changes
        )

    async def agent(self, *arguments: str | Path, **changes: Any) -> Ran:
        """Run ``python -m workload_api.agent``."""
        return await ran(
            sys.executable, "-m", "workload_api.agent", *arguments, env=self.variables,
            **changes,
        )  # fmt: skip


def openssl_verifies(bundle: Path, svid: Path) -> None:
    """Have openssl build and check the path, strictly; raises when it is not content."""
    command = ["openssl", "verify", "-x509_strict", "-CAfile", bundle, "-untrusted", svid, svid]
    subprocess.run(command, check=True, capture_output=True)


def openssl_key_fits(key: Path, svid: Path) -> None:
    """Have openssl compare the public keys of a private key and a certificate."""
    ours, theirs = (
        subprocess.run(["openssl", *command], check=True, capture_output=True).stdout
        for command in (
            ("pkey", "-in", key, "-pubout"),
            ("x509", "-in", svid, "-pubkey", "-noout"),
        )
    )
    assert ours == theirs
