"""What an agent proves its node with: a token that is read anew, and one that is spent."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.authorities import a_key, pkcs8_of
from tests.support.ca import FakeCa
from workload_api.node.join_token import JoinTokenProof
from workload_api.node.k8s_psat import MAX_TOKEN_BYTES, K8sPsatProof
from workload_api.node.proof import NoWayToAttestError
from workload_api.storage import AgentStorage, NodeState

CA = FakeCa()
ENDED = datetime(2026, 6, 1, 12, tzinfo=UTC)
KEY = pkcs8_of(a_key("p256", "workload"))


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """Where the kubelet puts the token."""
    return tmp_path / "token"


async def test_the_whole_file_as_it_is_now(token: Path) -> None:
    """SPIRE API 8.5: the file is read anew each time, and nothing is trimmed."""
    proof = K8sPsatProof("prod", token)
    for text in ("a.b.c", "d.e.f\n", " g "):
        token.write_text(text)
        assert json.loads(await proof.payload()) == {"cluster": "prod", "token": text}


async def test_as_go_writes_it(token: Path) -> None:
    """SPIRE API 8.5: two members, in Go's order, without a space."""
    token.write_text("a.b.c")
    payload = await K8sPsatProof("prod", token).payload()
    assert payload == b'{"cluster":"prod","token":"a.b.c"}'


async def test_through_the_links_of_a_volume(tmp_path: Path) -> None:
    """A projected volume is links to a folder that is replaced; the token is the newer one."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "spire-agent").write_text(f"token.{number}.x")
    data, path = tmp_path / "..data", tmp_path / "spire-agent"
    data.symlink_to("1")
    path.symlink_to("..data/spire-agent")
    proof = K8sPsatProof("prod", path)
    assert b"token.1.x" in await proof.payload()
    data.unlink()
    data.symlink_to("2")
    assert b"token.2.x" in await proof.payload()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "mount a projected volume with a serviceAccountToken"),
        (b"", "is empty"),
        (b"a" * (MAX_TOKEN_BYTES + 1), "longer than 16384 bytes"),
        (b"\xff\xfe", "holds no token, but binary"),
    ],
    ids=["absent", "empty", "too long", "binary"],
)
async def test_no_token(token: Path, content: bytes | None, text: str) -> None:
    """What is no token is said, with the file's name, and not sent."""
    if content is not None:
        token.write_bytes(content)
    with pytest.raises(NoWayToAttestError, match=text) as caught:
        await K8sPsatProof("prod", token).payload()
    assert str(token) in str(caught.value)


async def test_what_to_do(token: Path) -> None:
    """Each way says what an operator does when it fails; only one needs a token made."""
    for ended in (None, ENDED):
        told = K8sPsatProof("prod", token).what_to_do(ended)
        assert "service_account_allow_list" in told and '"prod"' in told
        assert str(token) in told and "join" not in told
    assert "issuer token generate" in JoinTokenProof().what_to_do(None)
    assert "ended at 2026-06-01 12:00:00 UTC" in JoinTokenProof().what_to_do(ENDED)


async def test_sec_90_a_join_token_is_in_no_repr() -> None:
    """SEC-90: what proves a node is not in the proof's repr."""
    assert "secret" not in repr(JoinTokenProof("id.secret"))
    assert await JoinTokenProof("id.secret").payload() == b"id.secret"
    assert JoinTokenProof("id.secret").is_given and not JoinTokenProof().is_given


# What is kept of it


@pytest.mark.parametrize("again", [True, False])
def test_whether_it_attests_again_is_kept(tmp_path: Path, again: bool) -> None:
    """SPIRE API 9 (8): a restarted agent knows whether to renew or to attest again."""
    storage = AgentStorage(tmp_path / "data", tmp_path / "run")
    state = NodeState(KEY, CA.chain(CA.leaf("/spire/agent/k8s_psat/c/n")), again)
    storage.save_node(state)
    assert AgentStorage(tmp_path / "data", tmp_path / "run").load_node() == state


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_a_file_of_an_earlier_build(tmp_path: Path, value: object) -> None:
    """SEC-103: a file that does not say so, or in another way, means that it renews."""
    from workload_api import storage as module

    storage = AgentStorage(tmp_path / "data", tmp_path / "run")
    chain = CA.chain(CA.leaf("/spire/agent/join_token/1"))
    tree = {"key": module._text(KEY), "chain": [module._text(one) for one in chain]}
    if value is not None:
        tree["reattestable"] = value  # type: ignore[assignment]
    module._save(tmp_path / "data" / "node.json", tree)
    assert storage.load_node() == NodeState(KEY, chain, False)
