"""``issuer dev`` as an ordinary user, and what root's domain offers to other users."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import DONE, REFUSED, ran
from tests.support.stack import a_folder

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as another user"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv"),
]
UID = 61001
# Another user, who may read whatever root may: the interpreter can lie in root's home.
AS_USER = (
    "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
    "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
)  # fmt: skip
FETCH = f"{sys.executable} -m workload_api.agent fetch x509"


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the other user."""
    with a_folder(open_to_all=True) as folder:
        place = folder / "home"
        place.mkdir(mode=0o700)
        os.chown(place, UID, UID)
        yield place


@pytest.mark.parametrize(
    ("runtime", "base"), [("{home}", "{home}"), ("/run", "/tmp"), ("", "/tmp")]
)
async def test_sec_37_an_ordinary_user(home: Path, runtime: str, base: str) -> None:
    """SEC-37: sockets lie in the user's runtime folder, else in a private one below /tmp."""
    ended = await ran(
        *AS_USER, sys.executable, "-m", "issuer", "dev", "--", "sh", "-c",
        f"id -u; echo $SPIFFE_ENDPOINT_SOCKET; {FETCH}",
        env={"HOME": str(home), "TMPDIR": str(home),
             "XDG_RUNTIME_DIR": runtime.format(home=home)},
    )  # fmt: skip
    assert ended.code == DONE, ended.err
    uid, endpoint, identity, *_ = ended.out.splitlines()
    assert uid == str(UID)
    assert identity == "spiffe://example.org/dev/command"
    socket = Path(endpoint.removeprefix("unix://"))
    assert str(socket.parents[2]) == base.format(home=home)
    assert not socket.parents[1].exists()
    assert list(home.iterdir()) == []


async def test_roots_domain_for_another_user() -> None:
    """Another user reaches the socket of root's domain, and is known as somebody else."""
    line = f"{FETCH}; {' '.join(AS_USER)} {FETCH}"
    ended = await ran(sys.executable, "-m", "issuer", "dev", "--", "sh", "-c", line)
    assert ended.code == REFUSED
    assert ended.out.count("spiffe://example.org/dev/command") == 1
    assert "no registration entry matches this process" in ended.err
