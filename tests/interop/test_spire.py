"""
SPIRE's own programs, unmodified: its agent and its command line at our server, its server
under our agent.

They are no Python package, so they have to be there: SPIRE_BIN names the folder that holds
`spire-agent` and `spire-server`.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from issuer.config import WithoutPod
from spiffe_core.pem import certificates_to_pem
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from tests.support.callers import eventually
from tests.support.programs import ran
from tests.support.psat import agent_pod
from tests.support.stack import a_folder, a_stack, entry_message
from tests.support.verifying import Verified, a_place
from workload_api.agent import app as agent_app
from workload_api.agent import config as agent_config
from workload_api.client.client import WorkloadClient

PROGRAMS = Path(os.environ.get("SPIRE_BIN", "/nowhere"))
pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "spire-agent").exists() or not (PROGRAMS / "spire-server").exists(),
    reason="SPIRE_BIN names no folder with spire-agent and spire-server",
)
ME = f"unix:uid:{os.geteuid()}"
AGENT = """
agent {{
  data_dir = "{folder}/data"
  log_level = "INFO"
  server_address = "127.0.0.1"
  server_port = {port}
  socket_path = "{folder}/public/api.sock"
  trust_bundle_path = "{folder}/bundle.pem"
  trust_domain = "example.org"
  {token}
}}
plugins {{
  NodeAttestor "{attestor}" {{ plugin_data {{ {data} }} }}
  KeyManager "memory" {{ plugin_data {{}} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""
SERVER = """
server {{
  bind_address = "127.0.0.1"
  bind_port = {port}
  socket_path = "{folder}/private/api.sock"
  trust_domain = "example.org"
  data_dir = "{folder}/data"
  log_level = "INFO"
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3" connection_string = "{folder}/data/db.sqlite3" }}
  }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"""


def a_free_port() -> int:
    """A port that nobody listens on at this moment: SPIRE's server picks none itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running(
    program: str, folder: Path, settings: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """One of SPIRE's daemons, by its settings."""
    (folder / "settings.conf").write_text(settings)
    with open(folder / "log", "wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(PROGRAMS / program), "run", "-config", str(folder / "settings.conf"),
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@dataclass
class SpireAgent:
    """SPIRE's agent at our server."""

    place: Verified
    folder: Path
    process: asyncio.subprocess.Process
    agent_id: str

    async def fetch(self, *what: str) -> Any:
        """What its own client is given; it comes back until there is something."""
        for _ in range(40):
            got = await ran(
                PROGRAMS / "spire-agent", "api", "fetch", *what,
                "-socketPath", self.folder / "public" / "api.sock", "-output", "json",
            )  # fmt: skip
            if got.code == 0:
                return json.loads(got.out)
            await asyncio.sleep(0.25)
        raise AssertionError((self.folder / "log").read_text())


@contextlib.asynccontextmanager
async def a_spire_agent(attestor: str, **changes: Any) -> AsyncIterator[SpireAgent]:
    """SPIRE's agent, attested at our server by *attestor*."""
    async with a_place(**changes) as place:
        with a_folder() as folder:
            bundle = await place.running.local.bundle.GetBundle(bundle_pb2.GetBundleRequest())
            pem = certificates_to_pem([one.asn1 for one in bundle.x509_authorities])
            (folder / "bundle.pem").write_text(pem)
            token, data = "", ""
            if attestor == "join_token":
                token = f'join_token = "{await place.running.token()}"'
            else:
                pod = agent_pod(place.cluster, "n1")
                (folder / "token").write_text(place.cluster.projected_token(pod))
                data = f'cluster = "prod" token_path = "{folder}/token"'
            settings = AGENT.format(
                folder=folder, port=place.running.server.port,
                attestor=attestor, token=token, data=data,
            )  # fmt: skip
            index = place.running.server.hub.index
            async with running("spire-agent", folder, settings) as process:
                await eventually(lambda: list(index.agents()), timeout=20)
                (agent,) = index.agents()
                yield SpireAgent(place, folder, process, agent.id.uri)


@pytest.mark.parametrize("attestor", ["join_token", "k8s_psat"])
async def test_its_agent_at_our_server(attestor: str) -> None:
    """SPIRE's agent attests, and its workloads get X509- and JWT-SVIDs."""
    async with a_spire_agent(attestor) as spire:
        assert f"/spire/agent/{attestor}/" in spire.agent_id
        await spire.place.running.add(entry_message("/me", spire.agent_id, ME))
        (svid,) = (await spire.fetch("x509"))["svids"]
        assert svid["spiffe_id"] == "spiffe://example.org/me"
        answers = await spire.fetch("jwt", "-audience", "a")
        assert "spiffe://example.org/me" in json.dumps(answers)


@pytest.mark.parametrize(
    ("setting", "signed"),
    [("any-pod-of-node", {"near"}), ("refuse", set()), ("allow", {"near", "far"})],
)
async def test_which_pods_its_agent_may_speak_for(setting: str, signed: set[str]) -> None:
    """SPIRE's agent names no pod, and gets what the cluster's setting lets it have."""
    async with a_spire_agent("k8s_psat", agents_without_pod=WithoutPod(setting)) as spire:
        place, names = spire.place, {}
        place.cluster.pod("web-1", "shop", "web", "n1", labels={"app": "web"})
        far = place.cluster.pod("far-1", "shop", "far", "n2", labels={"app": "far"})
        await place.knows(far)
        for name, account in (("near", "web"), ("far", "far")):
            wanted = ("k8s:ns:shop", f"k8s:sa:{account}")
            (made,) = await place.running.add(
                entry_message(f"/{name}", spire.agent_id, *wanted)
            )
            names[made.id] = name
        await place.running.add(entry_message("/me", spire.agent_id, ME))
        await spire.fetch("x509")  # all of them were asked for by now, in one call
        got = {names.get(entry_id) for entry_id, _, _ in await place.issued()} - {None}
        assert got == signed


async def test_its_agent_is_told_to_go() -> None:
    """SEC-52: SPIRE's agent, banned, understands it and ends."""
    async with a_spire_agent("join_token") as spire:
        path = spire.agent_id.removeprefix("spiffe://example.org")
        request = agent_pb2.BanAgentRequest()
        request.id.trust_domain, request.id.path = "example.org", path
        await spire.place.running.local.agent.BanAgent(request)
        async with asyncio.timeout(30):
            await spire.process.wait()
        assert "banned" in (spire.folder / "log").read_text().lower()


async def test_its_command_line_at_our_server() -> None:
    """Every noun of `spire-server` that we serve does what it says; the rest gives a reason."""
    async with a_place() as place:
        admin = place.running.server.settings.admin_socket_path
        agent = await place.agent("n1")

        async def typed(*words: str, code: int = 0) -> str:
            got = await ran(PROGRAMS / "spire-server", *words, "-socketPath", admin)
            assert got.code == code, got.out + got.err
            return got.out + got.err

        assert "healthy" in await typed("healthcheck")
        group = "spiffe://example.org/cluster/prod"
        said = await typed(
            "entry", "create", "-node", "-spiffeID", group,
            "-selector", "k8s_psat:cluster:prod",
        )  # fmt: skip
        assert "spiffe://example.org/spire/server" in said
        said = await typed(
            "entry", "create", "-parentID", group, "-spiffeID", "spiffe://example.org/web",
            "-selector", "k8s:ns:shop", "-selector", "k8s:sa:web", "-x509SVIDTTL", "600",
            "-dns", "web.shop.svc", "-hint", "h",
        )  # fmt: skip
        for line in ("Selector         : k8s:sa:web", "DNS name         : web.shop.svc"):
            assert line in said
        entry_id = said.split("Entry ID")[1].split(":")[1].split()[0]
        shown = json.loads(await typed("entry", "show", "-output", "json"))
        assert len(shown["entries"]) == 2
        said = await typed(
            "entry", "update", "-entryID", entry_id, "-parentID", group,
            "-spiffeID", "spiffe://example.org/web2", "-selector", "k8s:ns:shop",
        )  # fmt: skip
        assert "Revision         : 1" in said
        assert "2 registration entries" in await typed("entry", "count")
        assert "Can re-attest     : true" in await typed("agent", "list")
        said = await typed("agent", "show", "-spiffeID", agent.id.uri)
        assert "k8s_psat:agent_node_name:n1" in said
        assert "BEGIN CERTIFICATE" in await typed("bundle", "show")
        assert '"x509-svid"' in await typed("bundle", "show", "-format", "spiffe")
        assert "Token: " in await typed("token", "generate")
        minted = "spiffe://example.org/minted"
        assert "BEGIN CERTIFICATE" in await typed("x509", "mint", "-spiffeID", minted)
        assert await typed("jwt", "mint", "-spiffeID", minted, "-audience", "a")
        assert "banned" in await typed("agent", "ban", "-spiffeID", agent.id.uri)
        assert "evicted" in await typed("agent", "evict", "-spiffeID", agent.id.uri)
        assert "Deleted entry" in await typed("entry", "delete", "-entryID", entry_id)
        for words in (("federation", "list"), ("localauthority", "x509", "show")):
            assert "Unimplemented" in await typed(*words, code=1)


async def test_our_agent_under_its_server() -> None:
    """Our agent attests at SPIRE's server, asks it by polling, and serves its workloads."""
    with a_folder() as folder:
        (folder / "data").mkdir()
        admin = folder / "private" / "api.sock"
        port = a_free_port()
        async with running(
            "spire-server", folder, SERVER.format(folder=folder, port=port)
        ) as server:

            async def typed(*words: str) -> str:
                got = await ran(PROGRAMS / "spire-server", *words, "-socketPath", admin)
                assert got.code == 0, got.out + got.err
                return got.out

            await eventually(admin.exists, timeout=20)
            assert server.returncode is None
            (folder / "bundle.pem").write_text(await typed("bundle", "show"))
            token = (await typed("token", "generate")).split()[1]
            settings = agent_config.AgentSettings(
                trust_domain="example.org",
                data_dir=folder / "agent",
                runtime_dir=folder / "run",
                workload_socket=folder / "workload" / "workload.sock",
                admin_socket=folder / "run" / "admin.sock",
                server=agent_config.Server(
                    port=port,
                    trust_bundle=folder / "bundle.pem",
                    sync_interval=timedelta(milliseconds=200),
                ),
                status=agent_config.Status(port=0),
            )
            async with agent_app.serve(settings, token) as agent:
                await eventually(lambda: agent.syncer.state.connected, timeout=20)
                assert agent.syncer.state.mode == "poll"
                own = agent.node.svid
                assert own is not None
                await typed(
                    "entry", "create", "-parentID", own.spiffe_id.uri,
                    "-spiffeID", "spiffe://example.org/me", "-selector", ME,
                )  # fmt: skip
                await eventually(lambda: agent.cache.svids, timeout=20)
                endpoint = f"unix://{settings.workload_socket}"
                async with WorkloadClient(endpoint) as client:
                    context = await client.fetch_x509()
                (identity,) = context.identities
                assert identity.svid.spiffe_id.uri == "spiffe://example.org/me"


async def test_its_client_at_our_agent() -> None:
    """SPIRE's own client, which is go-spiffe's, gets SVIDs of our agent and validates them."""
    async with a_stack() as stack:
        await stack.server.add_entry("/me", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        where = ("-socketPath", stack.agent.workload_socket)

        async def typed(*words: str) -> str:
            got = await ran(PROGRAMS / "spire-agent", "api", *words, *where)
            assert got.code == 0, got.out + got.err
            return got.out

        assert "spiffe://example.org/me" in await typed("fetch", "x509")
        said = await typed("fetch", "jwt", "-audience", "a")
        assert "token(spiffe://example.org/me)" in said
        token = said.split("token(spiffe://example.org/me):")[1].split()[0]
        said = await typed("validate", "jwt", "-audience", "a", "-svid", token)
        assert "spiffe://example.org/me" in said
