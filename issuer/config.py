"""The server's settings; `docs/reference/config.md` is made from them."""

import enum
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from ca.jwt import JwtProfile
from ca.rotator import RotationSettings
from ca.x509 import X509Profile
from spiffe_core.errors import MalformedError
from spiffe_core.keys import KeyKind
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain, path_of
from spiffe_wire.logs import LEVELS
from spiffe_wire.settings import SettingsError, section, sections, setting

ROLE = "server"
DEFAULT_DATA_DIR = Path("/var/lib/spiffe-issuer/server")
DEFAULT_RUNTIME_DIR = Path("/run/spiffe-issuer/server")


class LogStyle(enum.Enum):
    """How log lines look."""

    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True)
class Authority:
    """How the trust domain's authorities live."""

    key_type: KeyKind = setting("Key of new authorities", KeyKind.EC_P256)
    x509_ttl: timedelta = setting("Life of an X.509 authority", timedelta(days=365))
    jwt_ttl: timedelta = setting("Life of a JWT authority", timedelta(days=30))
    publish_ahead: timedelta = setting(
        "A new authority is published this long before it signs; at least one sync interval",
        timedelta(minutes=10),
    )


@dataclass(frozen=True)
class Svids:
    """How long what is issued lives."""

    x509_ttl: timedelta = setting(
        "Life of an X509-SVID whose entry names none", timedelta(hours=1)
    )
    x509_max_ttl: timedelta = setting("No X509-SVID lives longer", timedelta(hours=24))
    jwt_ttl: timedelta = setting(
        "Life of a JWT-SVID whose entry names none", timedelta(minutes=5)
    )
    jwt_max_ttl: timedelta = setting("No JWT-SVID lives longer", timedelta(hours=1))
    agent_ttl: timedelta = setting("Life of an agent's own SVID", timedelta(hours=1))
    backdate: timedelta = setting(
        "X509-SVIDs begin this long ago, for skew", timedelta(seconds=60)
    )
    jwt_issuer: str = setting("`iss` of JWT-SVIDs; empty leaves it out", "")


@dataclass(frozen=True)
class RateLimits:
    """What one caller may ask for."""

    attestation: bool = setting("Attest at most once a second for each address", True)
    signing: bool = setting("Sign at most 500 times a second for each agent", True)


class WithoutPod(enum.Enum):
    """What an agent gets that does not say for which pod it asks, as SPIRE's do not."""

    ANY_POD_OF_NODE = "any-pod-of-node"
    REFUSE = "refuse"
    ALLOW = "allow"


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes cluster whose nodes may join, and whose pods are verified."""

    name: str = setting("Name of the cluster; part of its agents' SPIFFE IDs")
    kubeconfig: Path | None = setting(
        "How to reach its API server; left out, as a pod of that cluster", None
    )
    context: str = setting("Context in the kubeconfig; empty is its current one", "")
    audience: tuple[str, ...] = setting(
        "Audiences of agents' tokens; an empty list is the API server's own", ("spire-server",)
    )
    service_account_allow_list: tuple[str, ...] = setting(
        "NAMESPACE:NAME of each account that agents run as; an empty list lets nobody join", ()
    )
    allowed_node_label_keys: tuple[str, ...] = setting(
        "Node labels that become selectors of agents", ()
    )
    allowed_pod_label_keys: tuple[str, ...] = setting(
        "Labels of an agent's pod that become selectors of agents", ()
    )
    use_pod_uid_for_agent_id: bool = setting(
        "Name agents by the UID of their pod instead of their node's", False
    )
    verify_pods: bool = setting(
        "Before signing for an entry with k8s selectors, see that such a pod is on the "
        "agent's node",
        True,
    )
    agents_without_pod: WithoutPod = setting(
        "What an agent gets that does not say for which pod it asks, as SPIRE's do not",
        WithoutPod.ANY_POD_OF_NODE,
    )
    namespace_labels: bool = setting("Verify the selector k8s:ns-label", False)
    stale_limit: timedelta = setting(
        "For how long pods are known from before while the API server is away; 0s is for ever",
        timedelta(0),
    )

    def __post_init__(self) -> None:
        try:
            path_of(self.name)
        except SpiffeIdError as error:
            raise SettingsError(
                "name: must be one segment of a SPIFFE ID: A-Z a-z 0-9 . _ -"
            ) from error
        for one in self.service_account_allow_list:
            if _ACCOUNT.fullmatch(one) is None:
                raise SettingsError(
                    "service_account_allow_list: each reads NAMESPACE:NAME, such as "
                    "spiffe-issuer:spiffe-issuer-agent"
                )


_ACCOUNT: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?:[a-z0-9]([-.a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class Status:
    """Health and metrics over plain HTTP."""

    host: str = setting("Address of /live, /ready and /metrics", "127.0.0.1")
    port: int = setting("Port of the same; 0 turns it off", 8180)


@dataclass(frozen=True)
class ServerSettings:
    """Everything `issuer server run` can be told."""

    trust_domain: str = setting("Name of the trust domain, such as example.org")
    bind_address: str = setting("Address that agents connect to", "0.0.0.0")  # noqa: S104 SPIRE's
    bind_port: int = setting("Port that agents connect to; 0 picks one", 8081)
    data_dir: Path = setting("Database and keys; a folder of mode 0700", DEFAULT_DATA_DIR)
    runtime_dir: Path = setting(
        "Sockets; a folder that is empty after a boot", DEFAULT_RUNTIME_DIR
    )
    admin_socket: Path | None = setting(
        "Admin socket; left out, it is admin.sock in runtime_dir", None
    )
    admin_uids: tuple[int, ...] = setting(
        "Users beside our own who may use the admin socket", ()
    )
    admin_ids: tuple[str, ...] = setting(
        "SPIFFE IDs of ours whose holders are admins over TCP", ()
    )
    authority: Authority = section("The trust domain's authorities", Authority)
    svids: Svids = section("What is issued", Svids)
    clusters: tuple[Cluster, ...] = sections("Kubernetes clusters of this trust domain")
    rate_limits: RateLimits = section("Limits for each caller", RateLimits)
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
        for one in self.admin_ids:
            self._check_admin_id(one)
        if not 0 <= self.bind_port <= 65535:
            raise SettingsError("bind_port: must be 0 to 65535")
        if self.svids.jwt_max_ttl > timedelta(hours=1):
            raise SettingsError("svids.jwt_max_ttl: must be at most 1h (SEC-26)")
        self._check_lives()
        names = [one.name for one in self.clusters]
        if len(set(names)) < len(names):
            raise SettingsError("clusters: two of them have the same name")
        if self.svids.agent_ttl < timedelta(seconds=10):
            raise SettingsError("svids.agent_ttl: must be at least 10s")
        if self.authority.x509_ttl < 2 * self.svids.x509_ttl:
            raise SettingsError(
                "authority.x509_ttl: must be at least twice svids.x509_ttl, or SVIDs are cut "
                "short"
            )

    def _check_lives(self) -> None:
        try:
            _ = self.x509_profile, self.jwt_profile
        except MalformedError as error:
            raise SettingsError(f"svids: {error}") from error
        try:
            _ = self.rotation
        except MalformedError as error:
            raise SettingsError(str(error)) from error

    def _check_admin_id(self, text: str) -> None:
        # Others' certificates are not asked for: TLS knows our own authorities alone (T-09).
        try:
            SpiffeId.parse(text).require_member(TrustDomain(self.trust_domain))
        except SpiffeIdError as error:
            raise SettingsError(f"admin_ids: {error}") from error

    @property
    def x509_profile(self) -> X509Profile:
        """How X509-SVIDs are made."""
        return X509Profile(self.svids.x509_ttl, self.svids.x509_max_ttl, self.svids.backdate)

    @property
    def jwt_profile(self) -> JwtProfile:
        """How JWT-SVIDs are made."""
        return JwtProfile(self.svids.jwt_ttl, self.svids.jwt_max_ttl, self.svids.jwt_issuer)

    @property
    def rotation(self) -> RotationSettings:
        """How the authorities follow one another."""
        life = self.authority
        return RotationSettings(life.x509_ttl, life.jwt_ttl, life.key_type, life.publish_ahead)

    @property
    def admin_socket_path(self) -> Path:
        """Where the admin socket is."""
        return self.admin_socket or self.runtime_dir / "admin.sock"

    @property
    def database(self) -> Path:
        """The database file."""
        return self.data_dir / "issuer.db"
