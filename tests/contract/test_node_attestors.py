"""
What every way to prove a node promises, on both sides: join tokens, and Kubernetes tokens.

The server's attestors and the agent's proofs are tested as pairs, through a server that has
them all; whoever adds one adds a `Way` here.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from issuer.attestation.protocol import NodeAttestor
from spiffe_core.errors import ErrorKind, SpiffeError
from tests.support.callers import Running, a_running_server
from tests.support.k8s.cluster import FakeCluster
from tests.support.psat import a_cluster, agent_pod, settings_of, stored
from tests.support.stack import a_folder
from workload_api.keys import make_csr, make_key
from workload_api.node.join_token import JoinTokenProof
from workload_api.node.k8s_psat import K8sPsatProof
from workload_api.node.proof import NodeProof, NoWayToAttestError

pytestmark = pytest.mark.asyncio(loop_scope="module")
REFUSALS = {ErrorKind.MALFORMED, ErrorKind.FORBIDDEN}


@dataclass
class Way:
    """One attestor of a server, and an agent's proofs for it."""

    running: Running
    attestor: NodeAttestor
    fresh: Callable[[], Awaitable[NodeProof]]
    """A proof of another node each time."""
    wrong: Callable[[], Awaitable[NodeProof]]
    """One of the right form that proves nothing."""
    nothing: NodeProof
    """One of an agent that was given nothing."""

    async def attest(self, payload: bytes, csr: bytes = b"") -> Any:
        """Have the server attest a node; no attestor of these asks anything back."""
        agents = self.running.server.agents
        return await agents.attest(
            self.attestor.type, payload, csr or make_csr(make_key()), _no_challenge
        )


async def _no_challenge(_: bytes) -> bytes:
    raise AssertionError("nothing is asked")


def _join_token(running: Running, cluster: FakeCluster, folder: Path) -> Way:
    del cluster, folder
    attestor = running.server.agents.attestors["join_token"]

    async def fresh() -> NodeProof:
        return JoinTokenProof(await running.token())

    async def wrong() -> NodeProof:
        public_id = (await running.token()).partition(".")[0]
        return JoinTokenProof(f"{public_id}.{'x' * 43}")

    return Way(running, attestor, fresh, wrong, JoinTokenProof())


def _k8s_psat(running: Running, cluster: FakeCluster, folder: Path) -> Way:
    attestor = running.server.agents.attestors["k8s_psat"]

    def proof(audience: str) -> NodeProof:
        pod = agent_pod(cluster)
        path = folder / f"token-{pod.name}"
        path.write_text(cluster.projected_token(pod, audience))
        return K8sPsatProof(cluster.name, path)

    async def fresh() -> NodeProof:
        return proof("spire-server")

    async def wrong() -> NodeProof:
        return proof("vault")

    return Way(running, attestor, fresh, wrong, K8sPsatProof("prod", folder / "absent"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ways() -> AsyncIterator[dict[str, Way]]:
    """Every way, by its type."""
    async with a_cluster() as cluster:
        with a_folder() as folder:
            async with a_running_server(clusters=(settings_of(cluster, folder),)) as running:
                makers = {"join_token": _join_token, "k8s_psat": _k8s_psat}
                # A server that learns a new one is not tested until it is here.
                assert set(makers) == set(running.server.agents.attestors)
                yield {name: make(running, cluster, folder) for name, make in makers.items()}


@pytest.fixture(params=["join_token", "k8s_psat"])
def way(ways: dict[str, Way], request: pytest.FixtureRequest) -> Way:
    """One of them."""
    return ways[request.param]


async def test_both_sides_agree(way: Way) -> None:
    """SEC-04: what the agent sends is taken by that attestor, and names a node below it."""
    proof = await way.fresh()
    assert proof.is_given and proof.type == way.attestor.type
    signed, node = await way.attest(await proof.payload())
    assert node.agent_id.path.startswith(f"/spire/agent/{proof.type}/")
    assert signed.svid.spiffe_id == node.agent_id
    assert node.can_reattest == proof.can_repeat
    assert {one.type for one in node.selectors} <= {proof.type}
    stored_one = await way.running.server.agents.get(node.agent_id)
    assert (stored_one.serial, stored_one.selectors) == (signed.svid.serial, node.selectors)
    assert (stored_one.attestation_type, stored_one.can_reattest) == (
        proof.type, proof.can_repeat,
    )  # fmt: skip


async def test_another_proof_is_another_node(way: Way) -> None:
    """SEC-54: two proofs of two nodes name two."""
    found = [await way.attest(await (await way.fresh()).payload()) for _ in range(2)]
    assert len({node.agent_id for _, node in found}) == 2


async def test_sec_54_the_same_again(way: Way) -> None:
    """SEC-54: who can repeat a proof is the same node again; who can't is refused."""
    proof = await way.fresh()
    first, node = await way.attest(await proof.payload())
    if proof.can_repeat:
        second, again = await way.attest(await proof.payload())
        assert again.agent_id == node.agent_id and second.svid.serial != first.svid.serial
    else:
        with pytest.raises(SpiffeError) as caught:
            await way.attest(await proof.payload())
        assert caught.value.kind in REFUSALS


async def test_what_proves_nothing(way: Way) -> None:
    """SEC-51: what is of the right form and proves nothing is refused, and nothing stored."""
    payload = await (await way.wrong()).payload()
    kept = await stored(way.running)
    with pytest.raises(SpiffeError) as caught:
        await way.attest(payload)
    assert caught.value.kind in REFUSALS
    assert await stored(way.running) == kept


async def test_sec_55_a_bad_csr_costs_no_proof(way: Way) -> None:
    """SEC-55, SEC-50: a request that is wrong in itself uses no proof up."""
    proof = await way.fresh()
    with pytest.raises(SpiffeError) as caught:
        await way.attest(await proof.payload(), b"no CSR")
    assert caught.value.kind is ErrorKind.MALFORMED
    assert await way.attest(await proof.payload())


async def test_sec_55_anything_may_come(way: Way) -> None:
    """SEC-55: bytes of every sort are refused for a reason that quotes none of them."""
    good = await (await way.fresh()).payload()
    draw = random.Random(8)
    kept = await stored(way.running)
    odd = (b"", b"\x00", b"{}", b"null", b"\xff" * 99, b"[" * 9999, b"a" * 10**6, good + good,
           good[:-9])  # fmt: skip
    for payload in (*odd, *(_mutant(good, draw) for _ in range(200))):
        with pytest.raises(SpiffeError) as caught:
            await way.attest(payload)
        assert caught.value.kind in REFUSALS, payload
        assert good[-40:-2].decode() not in str(caught.value)
    assert await stored(way.running) == kept


def _mutant(good: bytes, draw: random.Random) -> bytes:
    """A good payload with one byte changed, in what proves something."""
    made = bytearray(good)
    at = draw.randrange(len(made) - 40, len(made) - 3)
    # Never a byte that is the same to whoever reads base64url with spare bits.
    made[at] = draw.choice([one for one in range(256) if one not in (made[at], 92)])
    return bytes(made)


async def test_sec_90_no_secret_in_a_repr(way: Way) -> None:
    """SEC-90: neither the proof, nor what it proved, shows what it was proved by."""
    proof = await way.fresh()
    payload = await proof.payload()
    _, node = await way.attest(payload)
    for one in (proof, node, way.attestor):
        assert payload[-40:-2].decode() not in repr(one)


async def test_nothing_to_prove_with(way: Way) -> None:
    """An agent that was given nothing says what an operator has to do, and sends nothing."""
    with pytest.raises(NoWayToAttestError, match="token"):
        await way.nothing.payload()
    assert way.nothing.what_to_do(None)
