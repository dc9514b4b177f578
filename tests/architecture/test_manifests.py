"""The Kubernetes manifests: whole, least-privileged, and of one mind with code and docs."""

import os
import re
import shlex
from pathlib import Path

import pytest

from issuer.cli.grammar import parser
from spiffe_core.version import VERSION
from spiffe_wire.k8s.rbac import AGENT_RULES, KUBELET_RULES, SERVER_RULES
from tests.support import manifests
from tests.support.manifests import ROOT, Manifest, container, one, pod, pods
from workload_api.agent.config import NodeAttestor, PodSource

BASE = manifests.written("base")
EXAMPLE = manifests.written("example")
ALL = BASE + EXAMPLE
SERVER = "spiffe-issuer-server"
AGENT = "spiffe-issuer-agent"
CSI = "spiffe-csi-driver"
BUNDLE = "spiffe-issuer-bundle"
"""Made by an operator; agent.yaml says how."""

API = {
    "Namespace": "v1",
    "ResourceQuota": "v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "StatefulSet": "apps/v1",
    "DaemonSet": "apps/v1",
    "Deployment": "apps/v1",
    "ClusterRole": "rbac.authorization.k8s.io/v1",
    "ClusterRoleBinding": "rbac.authorization.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "CSIDriver": "storage.k8s.io/v1",
}
NO_NAMESPACE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CSIDriver"}
CLOSED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def named(objects: list[Manifest]) -> list[str]:
    """Ids of tests."""
    return [f"{each['kind']}-{each['metadata']['name']}" for each in objects]


@pytest.mark.parametrize("each", ALL, ids=named(ALL))
def test_every_object_is_one(each: Manifest) -> None:
    """Each has the API version of its kind, a name, and a namespace if its kind lies in one."""
    assert each["apiVersion"] == API[each["kind"]]
    assert ("namespace" in each["metadata"]) == (each["kind"] not in NO_NAMESPACE)
    spec = each.get("spec", {})
    if "template" in spec:
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        assert one(ALL, "ServiceAccount", spec["template"]["spec"]["serviceAccountName"])
    if each["kind"] != "Namespace" and "namespace" in each["metadata"]:
        assert one(ALL, "Namespace", each["metadata"]["namespace"])


def test_no_two_objects_are_one() -> None:
    """No kind has two objects of one name."""
    assert len(set(named(ALL))) == len(ALL)


@pytest.mark.parametrize("folder", ["base", "example"])
def test_kustomize_renders_what_is_written(folder: str) -> None:
    """`kubectl apply -k` applies the objects of the files, with their specs as they stand."""
    wanted = manifests.written(folder)
    found = manifests.rendered(manifests.FOLDER / folder)
    assert sorted(named(found)) == sorted(named(wanted))
    for each in wanted:
        other = one(found, each["kind"], each["metadata"]["name"])
        for part in set(each) - {"metadata"}:
            assert other[part] == each[part]


@pytest.mark.parametrize("name", [name for name, _ in pods(ALL)])
def test_every_volume_exists_and_is_mounted(name: str) -> None:
    """What is mounted is a volume, what is a volume is mounted, and what it shows is there."""
    spec = pod(ALL, name)
    claims = (
        one(ALL, "StatefulSet", name)["spec"]["volumeClaimTemplates"] if name == SERVER else []
    )
    volumes = [each["name"] for each in spec["volumes"]]
    volumes += [each["metadata"]["name"] for each in claims]
    mounted = {m["name"] for each in spec["containers"] for m in each["volumeMounts"]}
    assert sorted(volumes) == sorted(mounted)
    for each in spec["volumes"]:
        if "configMap" in each and each["configMap"]["name"] != BUNDLE:
            assert one(ALL, "ConfigMap", each["configMap"]["name"])
        if "csi" in each:
            assert one(ALL, "CSIDriver", each["csi"]["driver"])
            assert each["csi"]["readOnly"] is True  # the driver refuses any other


def test_probes_and_services_come_to_ports_that_are_served() -> None:
    """Each port that is named is a container's, and is the one that the settings say."""
    for name, settings in (
        (SERVER, manifests.server_settings(BASE)),
        (AGENT, manifests.agent_settings(BASE)),
    ):
        box = container(BASE, name)
        ports = {each["name"]: each["containerPort"] for each in box["ports"]}
        assert ports.pop("status") == settings.status.port
        assert settings.status.host == manifests.FIELDS["status.podIP"]
        probes = [box[each] for each in box if each.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} == {"status"}
        assert {probe["httpGet"]["path"] for probe in probes} == {"/live", "/ready"}
        assert box["livenessProbe"]["httpGet"]["path"] == "/live"
        assert box["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container(BASE, SERVER)["ports"][0] == {
        "name": "agents", "containerPort": manifests.server_settings(BASE).bind_port,
    }  # fmt: skip
    service = one(BASE, "Service", SERVER)["spec"]
    labels = one(BASE, "StatefulSet", SERVER)["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert [each["targetPort"] for each in service["ports"]] == ["agents"]
    assert one(BASE, "StatefulSet", SERVER)["spec"]["serviceName"] == SERVER


def test_other_pods_reach_no_metrics() -> None:
    """Network policies let other pods come to the server's port for agents, and to no agent."""
    for name, ingress in (
        (SERVER, [{"ports": [{"protocol": "TCP", "port": "agents"}]}]),
        (AGENT, None),
    ):
        policy = one(BASE, "NetworkPolicy", name)["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        assert policy.get("ingress") == ingress
        kind = "StatefulSet" if name == SERVER else "DaemonSet"
        labels = one(BASE, kind, name)["spec"]["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_server_runs_as_nobody_with_nothing() -> None:
    """The server's pod is not root, can gain nothing, and writes to two volumes alone."""
    spec = pod(BASE, SERVER)
    assert not {"hostPID", "hostNetwork", "hostIPC"} & set(spec)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(BASE, SERVER)["securityContext"] == CLOSED
    assert one(BASE, "StatefulSet", SERVER)["spec"]["replicas"] == 1  # SQLite has one writer
    settings = manifests.server_settings(BASE)
    # Folders that it makes itself, below what the kubelet makes for a group.
    assert settings.data_dir.parent == mount_of(SERVER, "data")
    assert settings.runtime_dir.parent == mount_of(SERVER, "run")
    (run,) = (each for each in spec["volumes"] if each["name"] == "run")
    assert run["emptyDir"]["medium"] == "Memory"


def test_the_agent_has_one_capability_and_the_nodes_processes() -> None:
    """The agent's pod sees its node's processes, may read which files they run, and no more."""
    spec = pod(BASE, AGENT)
    assert spec["hostPID"] is True
    assert not {"hostNetwork", "hostIPC"} & set(spec)
    assert spec["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert container(BASE, AGENT)["securityContext"] == CLOSED | {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]},
    }


def test_one_container_is_privileged() -> None:
    """The CSI driver alone is privileged, as Kubernetes asks of whoever mounts for others."""
    found = {
        f"{name}/{each['name']}": each["securityContext"]
        for name, spec in pods(ALL)
        for each in spec["containers"]
    }
    assert [name for name, given in found.items() if given.get("privileged")] == [
        f"{CSI}/driver"
    ]
    assert all(given["readOnlyRootFilesystem"] for given in found.values())
    assert found[f"{CSI}/registrar"] == found["web/web"] == CLOSED


def test_only_who_asks_the_api_server_has_a_token_for_it() -> None:
    """The server and its agents have an API token; the driver and the workload have none."""
    has = {name for name, spec in pods(ALL) if spec["automountServiceAccountToken"]}
    assert has == {SERVER, AGENT}
    # Nor does any pod that is made under one of these accounts by others.
    accounts = [each for each in ALL if each["kind"] == "ServiceAccount"]
    assert not any(each["automountServiceAccountToken"] for each in accounts)


def mount_of(name: str, volume: str) -> Path:
    """Where a pod has a volume."""
    box = container(ALL, name)
    (path,) = (each["mountPath"] for each in box["volumeMounts"] if each["name"] == volume)
    return Path(path)


def host_path(name: str, volume: str) -> Path:
    """Which folder of the node a volume is."""
    (path,) = (
        each["hostPath"]["path"] for each in pod(ALL, name)["volumes"] if each["name"] == volume
    )
    return Path(path)


def test_the_agents_settings_are_of_one_mind_with_its_pod() -> None:
    """Files that the settings name are mounted; folders that are written lie on the node."""
    settings = manifests.agent_settings(BASE)
    assert settings.node_attestor is NodeAttestor.K8S_PSAT
    assert settings.kubernetes.workloads and settings.kubernetes.node_name
    assert settings.kubernetes.pods_from is PodSource.API_SERVER
    # The node's folders have the same names inside, so that every page's paths hold.
    for volume, folders in (
        ("data", [settings.data_dir]),
        (
            "run",
            [
                settings.runtime_dir,
                settings.workload_socket.parent,
                settings.admin_socket.parent,
            ],
        ),
    ):
        assert mount_of(AGENT, volume) == host_path(AGENT, volume)
        assert {folder.parent for folder in folders} == {mount_of(AGENT, volume)}
    assert settings.server.trust_bundle is not None
    assert settings.server.trust_bundle.parent == mount_of(AGENT, "bundle")
    text = (manifests.FOLDER / "base" / "agent.yaml").read_text()
    assert f"create configmap {BUNDLE} --from-file={settings.server.trust_bundle.name}" in text


def test_agents_find_the_server_and_are_let_in() -> None:
    """Trust domain, cluster, audience, address and account agree on both sides."""
    server, agent = manifests.server_settings(BASE), manifests.agent_settings(BASE)
    (cluster,) = server.clusters
    assert agent.trust_domain == server.trust_domain
    assert agent.kubernetes.cluster == cluster.name
    place = one(BASE, "Service", SERVER)["metadata"]
    assert agent.server.address == f"{place['name']}.{place['namespace']}.svc"
    assert agent.server.port == one(BASE, "Service", SERVER)["spec"]["ports"][0]["port"]
    place = one(BASE, "ServiceAccount", AGENT)["metadata"]
    assert cluster.service_account_allow_list == (f"{place['namespace']}:{place['name']}",)
    (token,) = (
        each["projected"] for each in pod(BASE, AGENT)["volumes"] if each["name"] == "token"
    )
    assert token["sources"] == [
        {
            "serviceAccountToken": {
                "audience": cluster.audience[0],
                "path": agent.kubernetes.token_path.name,
                "expirationSeconds": 7200,
            }
        }
    ]
    assert mount_of(AGENT, "token") == agent.kubernetes.token_path.parent


def test_the_driver_shows_the_agents_socket_and_nothing_else() -> None:
    """The CSI driver has the folder of the public socket alone, and workloads find it there."""
    socket = manifests.agent_settings(BASE).workload_socket
    assert host_path(CSI, "workload-api") == socket.parent
    driver, registrar = pod(BASE, CSI)["containers"]
    assert f"-workload-api-socket-dir={socket.parent}" in driver["args"]
    folder = host_path(CSI, "csi")
    assert folder.name == one(BASE, "CSIDriver", "csi.spiffe.io")["metadata"]["name"]
    assert f"--kubelet-registration-path={folder}/csi.sock" in registrar["args"]
    for name, spec in pods(EXAMPLE):
        (volume,) = spec["volumes"]
        endpoint = manifests.environment(container(EXAMPLE, name))["SPIFFE_ENDPOINT_SOCKET"]
        assert endpoint == f"unix://{mount_of(name, volume['name'])}/{socket.name}"
        assert "hostPath" not in volume


def test_rbac_grants_what_the_code_asks_for_and_no_more() -> None:
    """The roles are exactly the tables that stand beside the code; the driver has none."""
    assert manifests.rules(BASE, SERVER) == SERVER_RULES
    assert manifests.rules(BASE, AGENT) == AGENT_RULES
    assert manifests.rules(BASE, CSI) == frozenset()
    bound = [each for each in ALL if each["kind"].endswith("Binding")]
    assert len(bound) == 2
    for binding in bound:
        for subject in binding["subjects"]:
            found = one(ALL, subject["kind"], subject["name"])["metadata"]
            assert found["namespace"] == subject["namespace"]


def test_the_kubelet_component_swaps_one_right_for_another(tmp_path: Path) -> None:
    """Agents that ask their kubelet may ask nothing else, and are set to do so."""
    base, component = (
        os.path.relpath(manifests.FOLDER / each, tmp_path)  # it takes no absolute path
        for each in ("base", "components/kubelet")
    )
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: ['{base}']\ncomponents: ['{component}']\n"
    )
    objects = manifests.rendered(tmp_path)
    assert manifests.rules(objects, AGENT) == KUBELET_RULES
    assert manifests.rules(objects, SERVER) == SERVER_RULES
    settings = manifests.agent_settings(objects).kubernetes
    assert settings.pods_from is PodSource.KUBELET
    assert settings.kubelet_host == manifests.FIELDS["status.hostIP"]
    assert not settings.object_uids
    assert settings.workloads and settings.node_name  # as in the base


def test_images_are_of_this_release() -> None:
    """Files and kustomizations name the images of the version that they come with."""
    ours = {each["image"] for _, spec in pods(ALL) for each in spec["containers"]}
    assert {each for each in ours if "/" not in each} == {
        f"{SERVER}:{VERSION}",
        f"{AGENT}:{VERSION}",
    }
    assert not any(each.endswith(":latest") or ":" not in each for each in ours)
    for path in manifests.FOLDER.rglob("kustomization.yaml"):
        tags = re.findall(r"newTag: (\S+)", path.read_text())
        assert set(tags) <= {VERSION}, path
    dockerfile = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
    for name in (SERVER, AGENT):
        target = name.rpartition("-")[2]
        assert f"--target {target} -t {name}:" in dockerfile
        entry = container(BASE, name)["args"]
        assert f"CMD [{', '.join(f'{chr(34)}{each}{chr(34)}' for each in entry)}]" in dockerfile


def test_sec_97_images_hold_pinned_and_hashed_packages() -> None:
    """SEC-97: an image is made of the hashed set and our own packages, and runs as nobody."""
    dockerfile = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
    installs = re.findall(r"pip install ((?:.*\\\n)*.*)", dockerfile)
    assert len(installs) == 2
    assert "--require-hashes --only-binary :all:" in installs[0]
    assert "--no-deps --no-build-isolation" in installs[1]
    assert "USER 65532:65532" in dockerfile
    copied = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert all((ROOT / each).exists() for each in copied)


def test_docs_name_what_is_there() -> None:
    """Files of `deploy` that pages name exist, and so do the objects that commands name."""
    known = {(each["kind"].lower(), each["metadata"]["name"]) for each in ALL} | {
        ("configmap", BUNDLE),
        ("pod", f"{SERVER}-0"),
    }
    namespaces = {name for kind, name in known if kind == "namespace"}
    wrong = []
    for path, text in manifests.pages():
        where = path.relative_to(ROOT)
        for named_file in re.findall(r"\bdeploy/[\w./-]*[\w/]", text):
            if not (ROOT / named_file).exists():
                wrong.append(f"{where}: {named_file}")
        for command in re.findall(r"\bkubectl [^`\n]+", text):
            for space in re.findall(r"(?:-n|--namespace)[ =]([a-z][\w-]*)", command):
                if space not in namespaces:
                    wrong.append(f"{where}: namespace {space}")
            for kind, name in re.findall(
                r"\b(statefulset|daemonset|deployment)/([\w-]+)", command
            ):
                if (kind, name) not in known:
                    wrong.append(f"{where}: {kind}/{name}")
            for name in re.findall(r" exec (?:-\w+ )*([\w-]+) -- issuer ", command):
                if ("pod", name) not in known:
                    wrong.append(f"{where}: pod {name}")
    assert wrong == []


def test_commands_in_comments_are_ours() -> None:
    """What a manifest tells an operator to type at the server is understood by it."""
    found = []
    for path, text in manifests.pages():
        if path.suffix == ".yaml":
            found += re.findall(r"(?:-0 -- issuer|\$I) ((?!\")[^>\n]+)", text)
    assert len(found) == 3
    for command in found:
        assert parser().parse_args(shlex.split(command)).run
