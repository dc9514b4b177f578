"""Options of ``issuer-agent fetch`` that go together; nothing is asked until they are right."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import REFUSED, USAGE, Ran, called
from workload_api.agent.cli import main

Fetch = Callable[..., Ran]


@pytest.fixture
def fetch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Run ``issuer-agent fetch`` in this process, with no agent anywhere."""
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///nonexistent/w.sock")
    return lambda *arguments: called(main, capsys, "fetch", *arguments)


@pytest.mark.parametrize("kind", ["x509", "bundles"])
@pytest.mark.parametrize(
    "options",
    [
        ("--format", "pkcs12"),
        ("--format", "pkcs12", "--write", "d"),
        ("--format", "pkcs12", "--password-file", "f"),
        ("--password-file", "f", "--write", "d"),
    ],
    ids=" ".join,
)
def test_pkcs12_needs(options: tuple[str, ...], kind: str, fetch: Fetch) -> None:
    """What goes together with ``--format pkcs12`` is said."""
    answer = fetch(kind, *options)
    assert (answer.code, answer.out) == (USAGE, "")
    assert "--format pkcs12 goes with --write DIR and --password-file FILE" in answer.err


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot read"), (b"", "1 to 1024 bytes"), (b"x" * 1025, "1 to 1024 bytes")],
    ids=["missing", "empty", "too-long"],
)
def test_a_password_file_that_will_not_do(
    content: bytes | None, why: str, fetch: Fetch, tmp_path: Path
) -> None:
    """The file is named, what it holds is not, and nothing is written."""
    password = tmp_path / "password"
    if content is not None:
        password.write_bytes(content)
    answer = fetch(
        "x509", "--format", "pkcs12", "--password-file", password, "--write", tmp_path / "d"
    )
    assert answer.code == REFUSED
    assert why in answer.err
    assert str(password) in answer.err
    assert not (tmp_path / "d").exists()
