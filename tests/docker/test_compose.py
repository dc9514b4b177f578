"""docker-compose.yml, brought up for real: who has which rights, and who reaches whom."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spiffe_core.version import VERSION
from tests.support.compose import Project
from tests.support.envoy import needs_envoy
from tests.support.stack import ROOT

pytestmark = [pytest.mark.docker, needs_envoy, pytest.mark.timeout(180)]

PAGE = ROOT / "docs" / "howto" / "docker-compose.md"
WEB, BATCH = "spiffe://example.org/web", "spiffe://example.org/batch"
WEB_SAYS = f"api answered 200: hello {WEB}, certificate "
SYS_PTRACE = 1 << 19
RIGHTS = {
    "server": (65_532, 0),
    "agent": (0, SYS_PTRACE),
    "api-envoy": (10_012, 0),
    "web-envoy": (10_011, 0),
    "batch-envoy": (10_013, 0),
    "api": (10_022, 0),
    "web": (10_021, 0),
    "batch": (10_023, 0),
}
"""Of each service the user, and its capabilities."""


@pytest.fixture(scope="module")
def running(project: Project) -> Iterator[Project]:
    """The project, up; its volumes are kept for the page."""
    project.compose("up", "-d")
    project.served()
    yield project
    project.compose("down")


def test_sec_97_images_hold_what_runs_and_no_more(project: Project) -> None:
    """SEC-97: images of hashed packages alone; the agent's neither signs nor has a database."""
    names = "issuer", "ca", "sqlalchemy", "workload_api", "pip", "hatchling"
    look = (
        "import importlib.util as u, os\n"
        f"print(os.getuid(), *(one for one in {names} if u.find_spec(one)))"
    )
    held = {
        image: project.docker(
            "run", "--rm", "--network", "none", "--entrypoint", "python",
            f"spiffe-issuer-{image}:{VERSION}", "-c", look,
        )
        for image in ("server", "agent")
    }  # fmt: skip
    assert held == {
        "server": "65532 issuer ca sqlalchemy workload_api\n",
        "agent": "65532 workload_api\n",
    }


def test_what_the_kernel_grants(running: Project) -> None:
    """Each service runs as its user with its capabilities, and can gain no other."""
    found = {}
    for service, container in running.containers().items():
        assert container["HostConfig"]["ReadonlyRootfs"] is True
        lines = Path(f"/proc/{container['State']['Pid']}/status").read_text().splitlines()
        status = {name: text.split() for name, _, text in (one.partition(":") for one in lines)}
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"]), service
        users = {*status["Uid"], *status["Gid"]}
        capabilities = {int(status[f"Cap{one}"][0], 16) for one in ("Eff", "Prm", "Bnd")}
        found[service] = (users, capabilities)
    assert found == {name: ({str(user)}, {right}) for name, (user, right) in RIGHTS.items()}


def test_one_is_let_in_and_one_is_not(running: Project) -> None:
    """The callee learns the SPIFFE ID of who may call; who may not comes to its Envoy alone."""
    assert running.asked().startswith(WEB_SAYS)
    running.logs("api", f"{WEB} asked for /hello")
    running.python("batch", until("code == 403 and text == 'RBAC: access denied'"))
    assert BATCH not in running.compose("logs", "api")
    running.logs("api-envoy", f"{BATCH} GET /hello 403")


def until(condition: str, always: str = "True") -> str:
    """A program that ends well at an answer like that, and badly if one is not *always*."""
    return (
        "import sys, time; sys.path.append('/app'); import caller\n"
        "for _ in range(100):\n"
        "    code, text = caller.ask()\n"
        f"    if not ({always}): break\n"
        f"    if {condition}: sys.exit()\n"
        "    time.sleep(0.1)\n"
        "sys.exit(f'{code} {text}')\n"
    )


CUT = "closed connection|reset by peer|CERTIFICATE_REQUIRED|EOF occurred"
"""What comes of a connection that Envoy ends; the alert may be overtaken by our request."""
AWAY = "timed out|unreachable"
"""What comes of going to another network: engines differ in how they bar the way."""


@pytest.mark.parametrize(
    ("url", "said"),
    [
        pytest.param("http://{api-envoy[mesh]}:8000/", "refused", id="past-envoy"),
        pytest.param("http://{api-envoy[mesh]}:8443/", CUT, id="without-tls"),
        pytest.param("https://{api-envoy[mesh]}:8443/", CUT, id="without-an-svid"),
        pytest.param("https://{server[control]}:8081/", AWAY, id="to-the-server"),
        pytest.param("http://{web-envoy[front]}:8080/", AWAY, id="to-the-page"),
        pytest.param("http://{web-envoy[mesh]}:8080/", "refused", id="to-the-page-in-the-mesh"),
    ],
)
def test_there_is_no_other_way(running: Project, url: str, said: str) -> None:
    """Past Envoys, without an SVID, and from network to network nobody is answered."""
    at = {
        service: {
            network.partition("_")[2]: joined["IPAddress"]
            for network, joined in container["NetworkSettings"]["Networks"].items()
        }
        for service, container in running.containers().items()
    }
    program = (
        "import ssl, urllib.request as u\n"
        "context = ssl._create_unverified_context()\n"
        f"try: answer = u.urlopen({url.format(**at)!r}, timeout=2, context=context)\n"
        "except OSError as error: answer = error\n"
        "print(answer)\n"
    )
    assert re.search(said, running.python("batch", program))


def test_what_a_caller_says_of_itself_is_dropped(running: Project) -> None:
    """The header that names the caller is Envoy's, whatever the caller wrote there."""
    program = (
        "import urllib.request as u\n"
        "forged = {'x-forwarded-client-cert': 'URI=spiffe://example.org/admin'}\n"
        "asked = u.Request('http://127.0.0.1:9000/', headers=forged)\n"
        "print(u.urlopen(asked, timeout=5).read().decode())\n"
    )
    assert running.python("web", program).startswith(f"hello {WEB}, certificate ")


def test_sds_09_a_renewal_is_pushed(running: Project) -> None:
    """SDS-09: a renewed SVID is used with no restart, and no request fails meanwhile."""
    started = starts(running)
    renew(running, running.asked())
    assert starts(running) == started


def renew(project: Project, before: str) -> None:
    """Have the agent renew all, and ask until another certificate is used than *before*."""
    project.compose("exec", "-T", "agent", "issuer-agent", "renew")
    project.python("web", until(f"text not in {before!r}", always="code == 200"))
    assert project.asked().startswith(WEB_SAYS)


def starts(project: Project) -> dict[str, str]:
    """When each service was started."""
    return {name: one["State"]["StartedAt"] for name, one in project.containers().items()}


def test_sds_09_server_and_agent_made_anew(running: Project) -> None:
    """SDS-09: services go on without server and agent; new ones are who the old ones were."""
    known, before, started = facts(running), running.asked(), starts(running)
    running.compose("rm", "--stop", "--force", "server", "setup", "agent")
    assert running.asked() == before
    running.compose("up", "-d")
    assert facts(running) == known
    anew = {name for name, at in starts(running).items() if at != started[name]}
    assert anew == {"server", "agent"}, "nothing else was touched"
    renew(running, before)


def test_the_agent_can_go_by_labels(running: Project, tmp_path: Path) -> None:
    """With the words of the page and the engine's socket the agent learns labels."""
    (words,) = re.findall(r"^```yaml\n(docker:.*?)^```", PAGE.read_text(), re.M | re.S)
    settings = tmp_path / "agent.yaml"
    settings.write_text((ROOT / "deploy/compose/agent.yaml").read_text() + words)
    settings.chmod(0o644)
    volumes = [
        f"{settings}:/etc/spiffe-issuer/agent.yaml:ro",
        f"{running.engine.socket}:/var/run/docker.sock",
        "/sys/fs/cgroup:/sys/fs/cgroup:ro",
    ]
    more = tmp_path / "more.yml"
    more.write_text(json.dumps({"services": {"agent": {"volumes": volumes}}}))
    files = ("-f", str(ROOT / "docker-compose.yml"), "-f", str(more))
    running.compose(*files, "up", "-d", "--no-deps", "agent")
    socket = "SPIFFE_ENDPOINT_SOCKET=unix:///run/spiffe-issuer/workload/workload.sock"
    answer = running.compose(
        "exec", "-T", "-e", socket, "agent", "sh", "-c",
        "until issuer-agent healthcheck; do :; done; issuer-agent whoami",
    )  # fmt: skip
    assert "docker:label:com.docker.compose.service:agent" in answer


def facts(project: Project) -> str:
    """What the server knows: its bundle, its agents, and who is who."""
    named = [
        (one["id"], one["spiffe_id"], one["selectors"])
        for one in project.issuer("entry", "list")["entries"]
        if one["spiffe_id"]["path"] != "/node"  # the agent's, one for each token
    ]
    agents = [one["id"] for one in project.issuer("agent", "list")["agents"]]
    assert (len(named), len(agents)) == (3, 1)
    bundle = project.compose("exec", "-T", "server", "issuer", "bundle", "show")
    return json.dumps([named, agents, bundle])
