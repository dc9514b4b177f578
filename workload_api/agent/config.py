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
        "How long FetchX509SVID holds a caller without an identity before it says so",
        timedelta(seconds=2),
    )
    peer_proof: PeerPolicy = setting(
        "What to do on kernels before 6.5, which cannot prove a caller",
        PeerPolicy.ALLOW_FALLBACK,
    )
    hash_executables: bool = setting("Offer the selector unix:sha256", True)


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
    server: Server = section("The server", Server)
    workloads: Workloads = section("The workloads", Workloads)
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
        if self.workloads.key_type is KeyKind.RSA_4096:
            raise SettingsError("workloads.key_type: rsa-4096 is too slow to sign ahead with")
