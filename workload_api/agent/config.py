"""The agent's settings; `docs/reference/config.md` is made from them."""

import enum
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from spiffe_core.keys import KeyKind
from spiffe_core.spiffeid import SpiffeIdError, TrustDomain
from spiffe_wire.frontdoor.kernel import PeerPolicy
from spiffe_wire.logs import LEVELS
from spiffe_wire.settings import SettingsError, section, setting

ROLE = "agent"
DEFAULT_DATA_DIR = Path("/var/lib/spiffe-issuer/agent")
DEFAULT_RUNTIME_DIR = Path("/run/spiffe-issuer/agent")


class LogStyle(enum.Enum):
    """How log lines look."""

    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True)
class Server:
    """The server of this agent."""

    address: str = setting("Host name or address of the server", "127.0.0.1")
    port: int = setting("Port of the server", 8081)
    trust_bundle: Path | None = setting(
        "Bundle to know the server by at the first start: PEM, or a SPIFFE bundle document",
        None,
    )
    sync_interval: timedelta = setting(
        "How often to ask a server that cannot push", timedelta(seconds=5)
    )


@dataclass(frozen=True)
class Workloads:
    """How workloads are served."""

    key_type: KeyKind = setting("Key of new X509-SVIDs", KeyKind.EC_P256)
    no_identity_grace: timedelta = setting(
        "How long FetchX509SVID holds a caller without an identity before it says so; 15 times "
        "as long while its platform has yet to tell of its container",
        timedelta(seconds=2),
    )
    peer_proof: PeerPolicy = setting(
        "What to do on kernels before 6.5, which cannot prove a caller",
        PeerPolicy.ALLOW_FALLBACK,
    )
    hash_executables: bool = setting("Offer the selector unix:sha256", True)


class NodeAttestor(enum.Enum):
    """How an agent proves its node."""

    JOIN_TOKEN = "join_token"  # noqa: S105 a name
    K8S_PSAT = "k8s_psat"


class PodSource(enum.Enum):
    """Who tells an agent of the pods of its node."""

    API_SERVER = "api-server"
    KUBELET = "kubelet"


@dataclass(frozen=True)
class Kubernetes:
    """The cluster that this node belongs to."""

    cluster: str = setting("Name of the cluster, as in the server's settings", "")
    token_path: Path = setting(
        "Projected service-account token that proves this node (k8s_psat)",
        Path("/var/run/secrets/tokens/spire-agent"),
    )
    workloads: bool = setting("Attest processes of pods: selectors k8s:…", False)
    pods_from: PodSource = setting(
        "Who tells of this node's pods; kubelet needs no API server", PodSource.API_SERVER
    )
    node_name: str = setting("Name of this node; from spec.nodeName in a DaemonSet", "")
    kubeconfig: Path | None = setting(
        "How to reach the API server; left out, as a pod of the cluster", None
    )
    kubelet_host: str = setting("Name or address that the kubelet's certificate is for", "")
    kubelet_port: int = setting("Port of the kubelet's authenticated API", 10250)
    kubelet_ca: Path | None = setting(
        "CAs of the kubelet's certificate, PEM; left out, the cluster's own", None
    )
    object_uids: bool = setting(
        "Offer ns-uid and sa-uid: watches namespaces and service accounts", True
    )
    namespace_labels: bool = setting(
        "Offer ns-label; who may label a namespace chooses identities then", False
    )
    container_selectors: bool = setting(
        "Offer container-name and container-image; off, a container of a known pod need not "
        "be listed yet",
        True,
    )
    cgroup_prefixes: tuple[str, ...] = setting(
        "Where the kubelet puts pods; * stands for one segment. Empty: the usual places", ()
    )
    stale_limit: timedelta = setting(
        "For how long pods are known from before while their source is away; 0s is for ever",
        timedelta(0),
    )


@dataclass(frozen=True)
class Docker:
    """Containers of Docker, or of Podman."""

    workloads: bool = setting("Attest processes of containers: selectors docker:…", False)
    socket: Path = setting("Socket of the engine", Path("/var/run/docker.sock"))
    environment: bool = setting("Offer docker:env; who may start a container chooses it", False)
    cgroup_prefixes: tuple[str, ...] = setting(
        "Where the engine puts containers; * stands for one segment. Empty: the usual places",
        (),
    )


@dataclass(frozen=True)
class Sds:
    """Envoy's secret discovery service."""

    socket: str = setting(
        "Socket for Envoys: an absolute path, or a name in the workload socket's folder; "
        "empty for none",
        "sds.sock",
    )
    default_svid_name: str = setting(
        "Name under which an Envoy asks for its first X509-SVID", "default"
    )
    default_bundle_name: str = setting(
        "Name under which it asks for the roots of our trust domain", "ROOTCA"
    )
    default_all_bundles_name: str = setting(
        "Name under which it asks for the roots of every trust domain it may know", "ALL"
    )
    disable_spiffe_cert_validation: bool = setting(
        "Give roots as a plain trusted_ca, of one trust domain each, instead of Envoy's SPIFFE "
        "validator. What an Envoy's node metadata say of it goes first",
        False,
    )
    refuse_unknown_names: bool = setting(
        "End a stream that asks for what its process may not have, as SPIRE does, instead of "
        "holding it until there is an answer",
        False,
    )
    on_workload_socket: bool = setting(
        "Serve Envoys on the workload socket, too; they send its security header by "
        "initial_metadata. Messages of 1 MiB are taken there then",
        False,
    )
    unsafe_without_header: bool = setting(
        "With on_workload_socket: let Envoys leave the header out. Whoever makes a program of "
        "this node call that socket gets what the program gets",
        False,
        unsafe=True,
    )

    def __post_init__(self) -> None:
        names = {
            "default_svid_name": self.default_svid_name,
            "default_bundle_name": self.default_bundle_name,
            "default_all_bundles_name": self.default_all_bundles_name,
        }
        for key, name in names.items():
            if not name or name.startswith("spiffe://"):
                raise SettingsError(f"{key}: must be a word, and not a SPIFFE ID")
            if list(names.values()).count(name) > 1:
                raise SettingsError(f"{key}: two of the three names are the same")
        if "/" in self.socket and not self.socket.startswith("/"):
            raise SettingsError("socket: must be an absolute path, or a plain file name")
        if self.unsafe_without_header and not self.on_workload_socket:
            raise SettingsError(
                "unsafe_without_header: is about on_workload_socket, which is not set; the "
                "socket of its own asks for no header"
            )

    @property
    def is_on(self) -> bool:
        """True when SDS is served anywhere."""
        return bool(self.socket) or self.on_workload_socket


@dataclass(frozen=True)
class Status:
    """Health and metrics over plain HTTP."""

    host: str = setting("Address of /live, /ready and /metrics", "127.0.0.1")
    port: int = setting("Port of the same; 0 turns it off", 8181)


@dataclass(frozen=True)
class AgentSettings:
    """Everything `issuer-agent run` can be told."""

    trust_domain: str = setting("Name of the trust domain, such as example.org")
    data_dir: Path = setting("Own identity and cache; a folder of mode 0700", DEFAULT_DATA_DIR)
    runtime_dir: Path = setting(
        "Private sockets and the sealing key; a folder that is empty after a boot",
        DEFAULT_RUNTIME_DIR,
    )
    workload_socket: Path = setting(
        "The Workload API, for every process of this node",
        Path("/run/spiffe-issuer/workload/workload.sock"),
    )
    admin_socket: Path = setting(
        "Explanations and health, for operators", Path("/run/spiffe-issuer/agent/admin.sock")
    )
    admin_uids: tuple[int, ...] = setting(
        "Users beside our own who may use the admin socket", ()
    )
    join_token_file: Path | None = setting("File with a join token, for the first start", None)
    node_attestor: NodeAttestor = setting(
        "How this agent proves its node", NodeAttestor.JOIN_TOKEN
    )
    kubernetes: Kubernetes = section("The Kubernetes cluster of this node", Kubernetes)
    docker: Docker = section("The container engine of this node", Docker)
    server: Server = section("The server", Server)
    workloads: Workloads = section("The workloads", Workloads)
    sds: Sds = section("Envoy's secret discovery service (SDS)", Sds)
    status: Status = section("Health and metrics", Status)
    log_style: LogStyle = setting("How log lines look", LogStyle.JSON)
    log_level: str = setting("Least level that is logged", "info")

    def __post_init__(self) -> None:
        try:
            TrustDomain(self.trust_domain)
        except SpiffeIdError as error:
            raise SettingsError(f"trust_domain: {error}") from error
        if self.log_level not in LEVELS:
            raise SettingsError(f"log_level: must be one of {', '.join(LEVELS)}")
        if self.admin_socket.parent == self.workload_socket.parent:
            raise SettingsError("admin_socket: must not lie in the workload socket's folder")
        if self.sds_socket == self.workload_socket:
            raise SettingsError(
                "sds.socket: is the workload socket; leave it empty, and set "
                "sds.on_workload_socket"
            )
        if self.sds_socket and self.sds_socket.parent == self.admin_socket.parent:
            raise SettingsError("sds.socket: must not lie in the admin socket's folder")
        self._check_kubernetes()
        if self.workloads.key_type is KeyKind.RSA_4096:
            raise SettingsError("workloads.key_type: rsa-4096 is too slow to sign ahead with")

    @property
    def sds_socket(self) -> Path | None:
        """Where Envoys ask; None when they have no socket of their own."""
        return self.workload_socket.parent / self.sds.socket if self.sds.socket else None

    def _check_kubernetes(self) -> None:
        here = self.kubernetes
        proves = self.node_attestor is NodeAttestor.K8S_PSAT
        if (proves or here.workloads) and not here.cluster:
            raise SettingsError("kubernetes.cluster: must be set, as in the server's settings")
        if here.workloads and not here.node_name:
            raise SettingsError(
                "kubernetes.node_name: must be set; in a DaemonSet from spec.nodeName"
            )
        if here.namespace_labels and here.pods_from is PodSource.KUBELET:
            raise SettingsError(
                "kubernetes.namespace_labels: a kubelet knows no namespaces; set pods_from to "
                "api-server"
            )
        if proves and self.join_token_file is not None:
            raise SettingsError("join_token_file: node_attestor is k8s_psat, which needs none")
