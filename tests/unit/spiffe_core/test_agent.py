"""The names of agents."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.agent import agent_id, require_agent_id
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain
from tests.support.store import NOW, TD, an_agent, an_id, node_id

SECOND = timedelta(seconds=1)
END = NOW + timedelta(hours=1)


def test_an_agents_id() -> None:
    """SPIRE API 3.7: agents are spiffe://<td>/spire/agent/<attestor type>/…."""
    assert (
        str(agent_id(TD, "join_token", "x")) == "spiffe://example.org/spire/agent/join_token/x"
    )
    assert agent_id(TD, "x509pop", "a", "b").path == "/spire/agent/x509pop/a/b"


def test_the_servers_id() -> None:
    """SPIRE API 3.7: the server is spiffe://<td>/spire/server, the CA's ID is spiffe://<td>."""
    assert str(TD.server_id) == "spiffe://example.org/spire/server"
    assert str(TD.id) == "spiffe://example.org"


@pytest.mark.parametrize(
    ("spiffe_id", "reason"),
    [
        (TD.id, "agent namespace"),
        (an_id("/web"), "agent namespace"),
        (an_id("/spire/agent"), "agent namespace"),
        (TD.server_id, "agent namespace"),
        (agent_id(TrustDomain("partner.test"), "join_token", "x"), "not an agent in trust"),
    ],
    ids=str,
)
def test_who_is_no_agent(spiffe_id: SpiffeId, reason: str) -> None:
    """SPIRE API 3.7: an agent is a member of our trust domain below /spire/agent/."""
    with pytest.raises(SpiffeIdError, match=reason):
        require_agent_id(spiffe_id, TD)
    assert require_agent_id(node_id("a"), TD) == node_id("a")


@given(st.lists(st.text(max_size=5), max_size=3))
def test_every_agents_id_is_one(segments: list[str]) -> None:
    """What `agent_id` makes, `require_agent_id` takes, and no workload may be called so."""
    try:
        made = agent_id(TD, "any", *segments)
    except SpiffeIdError:
        return
    assert require_agent_id(made, TD) == made
    with pytest.raises(SpiffeIdError):
        made.require_workload(TD)


@pytest.mark.parametrize(
    ("changes", "at", "live"),
    [
        ({}, END, True),
        ({}, END + SECOND, False),
        ({"banned": True}, END + SECOND, True),
        ({"new_expires_at": END + 2 * SECOND}, END + SECOND, True),
        ({"new_expires_at": END + 2 * SECOND}, END + 3 * SECOND, False),
        ({"new_expires_at": END - 2 * SECOND}, END, True),
    ],
)
def test_while_an_agent_is_live(changes: dict[str, Any], at: datetime, live: bool) -> None:
    """SEC-52: an agent is live until the end of its last certificate; a banned one always."""
    assert an_agent(**changes).is_live(at) is live


def test_a_fresh_agent() -> None:
    """An agent begins with one serial, not banned, with no selectors."""
    agent = an_agent()
    assert (agent.new_serial, agent.banned, agent.selectors) == ("", False, frozenset())
