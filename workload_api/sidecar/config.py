"""The sidecar's settings; ``issuer-agent sidecar --example`` prints them."""

import enum
import grp
import ipaddress
import pwd
import re
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from spiffe_core.spiffeid import SpiffeId, SpiffeIdError
from spiffe_wire.endpoint import EndpointError, parse_endpoint
from spiffe_wire.logs import LEVELS
from spiffe_wire.settings import SettingsError, section, sections, setting
from workload_api.sidecar.files import Owner
from workload_api.sidecar.formats import Modes, jwt_name

ROLE: Final = "sidecar"
_MODE = re.compile(r"0?[0-7]{3}")
_METHODS: Final = ("GET", "POST", "PUT")


class LogStyle(enum.Enum):
    """How log lines look."""

    JSON = "json"
    TEXT = "text"


class Kind(enum.Enum):
    """What changed."""

    X509 = "x509"
    """An X509-SVID or its key."""
    BUNDLES = "bundles"
    JWT = "jwt"


class WhenDenied(enum.Enum):
    """What becomes of the files when the agent says that we have no identity any more."""

    KEEP = "keep"
    REMOVE = "remove"


@dataclass(frozen=True)
class X509Files:
    """One X509-SVID as files."""

    name: str = setting("Its files are NAME.pem (leaf first) and NAME.key", "svid")
    spiffe_id: str = setting(
        "Which identity; empty: the one with this hint, or the agent's first", ""
    )
    hint: str = setting("Which identity, by the hint in its entry", "")
    certificate_file: str = setting("Another name for NAME.pem", "")
    key_file: str = setting("Another name for NAME.key", "")
    bundle_file: str = setting("The bundle of its own trust domain under this name too", "")
    combined: bool = setting("Write NAME.combined.pem: the key, then the chain", False)
    pem: bool = setting("Write the two PEM files", True)
    pkcs12: bool = setting(
        "Write NAME.p12, and a trust store bundle.<trust domain>.p12 for each domain; see "
        "pkcs12_password_file",
        False,
    )

    def __post_init__(self) -> None:
        _check_id(self.spiffe_id)
        if self.spiffe_id and self.hint:
            raise SettingsError("hint: spiffe_id says which one already")
        for key in ("name", "certificate_file", "key_file", "bundle_file"):
            _check_name(key, getattr(self, key), needed=key == "name")
        if not (self.pem or self.combined or self.pkcs12):
            raise SettingsError("pem: nothing of this SVID would be written")

    def file_names(self) -> list[str]:
        """What its own files are called, where that is known before it is fetched."""
        pair = [
            self.certificate_file or f"{self.name}.pem",
            self.key_file or f"{self.name}.key",
        ]
        return [
            *(pair if self.pem else ()),
            *([f"{self.name}.combined.pem"] if self.combined else ()),
            *([f"{self.name}.p12"] if self.pkcs12 else ()),
            *([self.bundle_file] if self.bundle_file else ()),
        ]


@dataclass(frozen=True)
class JwtFile:
    """One JWT-SVID as a file."""

    audience: tuple[str, ...] = setting("Who is to accept it")
    file: str = setting("Name of its file; empty: jwt.<audience>.token", "")
    spiffe_id: str = setting("Which identity; empty: the agent's first", "")

    def __post_init__(self) -> None:
        if not all(self.audience) or not self.audience:
            raise SettingsError("audience: must name who is to accept it")
        _check_id(self.spiffe_id)
        _check_name("file", self.file)

    @property
    def file_name(self) -> str:
        """What the file is called."""
        return self.file or jwt_name(self.audience)


@dataclass(frozen=True)
class Bundles:
    """The trust bundles as files: one for each trust domain."""

    x509: bool = setting("Write bundle.<trust domain>.pem", True)
    jwt: bool = setting("Write bundle.<trust domain>.jwks.json", False)
    federated: bool = setting("Write those of other trust domains too", True)
    intermediates: bool = setting(
        "Put intermediates into the bundle's file, and the leaf alone into the SVID's", False
    )
    omit_expired: bool = setting("Leave out authorities that have expired", False)
    unsafe_merged_file: str = setting(
        "Every domain's authorities in one file of this name, for programs that take no more "
        "than one. Unsafe: each of these domains can then speak for every other",
        "",
        unsafe=True,
    )

    def __post_init__(self) -> None:
        _check_name("unsafe_merged_file", self.unsafe_merged_file)


@dataclass(frozen=True)
class Files:
    """Who may read the files; modes are octal, in quotes."""

    key_mode: str = setting("Mode of keys and of what holds one", "0600")
    certificate_mode: str = setting("Mode of certificates", "0644")
    bundle_mode: str = setting("Mode of bundles", "0644")
    jwt_mode: str = setting("Mode of JWT-SVIDs", "0600")
    dir_mode: str = setting("Mode of the folder, when it is made", "0700")
    owner: str = setting("User whose the files are: a name or a number (needs root)", "")
    group: str = setting("Group whose the files are: a name or a number", "")

    def __post_init__(self) -> None:
        for key in ("key_mode", "certificate_mode", "bundle_mode", "jwt_mode", "dir_mode"):
            if _MODE.fullmatch(getattr(self, key)) is None:
                raise SettingsError(f'{key}: a mode reads "0640", in quotes')
        for key in ("key_mode", "jwt_mode"):
            if int(getattr(self, key), 8) & 0o007:
                raise SettingsError(f"{key}: everybody could use it; 0640 and `group` share it")
        self.owner_ids()

    def modes(self) -> Modes:
        """The modes as numbers."""
        return Modes(
            *(
                int(one, 8)
                for one in (
                    self.key_mode, self.certificate_mode, self.bundle_mode, self.jwt_mode
                )
            )
        )  # fmt: skip

    def owner_ids(self) -> Owner:
        """The owner as numbers."""
        return Owner(_uid(self.owner), _gid(self.group))


@dataclass(frozen=True)
class Action:
    """What is done when files have changed: exactly one of the four."""

    on: tuple[str, ...] = setting(
        "After which changes: x509, bundles, jwt", ("x509", "bundles")
    )
    signal: str = setting("Signal to send, such as HUP", "")
    pid_file: Path | None = setting(
        "File with the number of the process to signal; left out: our own command", None
    )
    restart: bool = setting("End our own command with TERM, and start it again", False)
    command: tuple[str, ...] = setting("Program to run, with its arguments; no shell", ())
    url: str = setting("HTTP address to call", "")
    method: str = setting("How to call it: GET, POST or PUT", "POST")
    unsafe_remote_url: bool = setting(
        "Call an address that is not of this machine, in the clear", False, unsafe=True
    )
    timeout: timedelta = setting("For how long one try may run", timedelta(seconds=10))
    tries: int = setting("How often it is tried before we go on", 3)

    def __post_init__(self) -> None:
        known = {one.value for one in Kind}
        if not self.on or not known.issuperset(self.on):
            raise SettingsError(f"on: must hold one or more of {', '.join(sorted(known))}")
        if sum(map(bool, (self.signal, self.restart, self.command, self.url))) != 1:
            raise SettingsError("signal: set one of signal, restart, command and url")
        if self.signal:
            signal_number(self.signal)
        elif self.pid_file is not None:
            raise SettingsError("pid_file: says whom to signal; set signal as well")
        if self.command and not self.command[0]:
            raise SettingsError("command: must begin with a program")
        if self.method not in _METHODS:
            raise SettingsError(f"method: must be one of {', '.join(_METHODS)}")
        if self.url:
            _check_url(self.url, remote=self.unsafe_remote_url)
        if not 1 <= self.tries <= 100 or self.timeout <= timedelta(0):
            raise SettingsError("tries: must be 1 to 100, and timeout above zero")

    @property
    def kinds(self) -> frozenset[Kind]:
        """After which changes."""
        return frozenset(map(Kind, self.on))


@dataclass(frozen=True)
class Status:
    """Health and metrics over plain HTTP."""

    host: str = setting("Address of /live, /ready and /metrics", "127.0.0.1")
    port: int = setting("Port of the same; 0 turns it off", 0)


@dataclass(frozen=True)
class SidecarSettings:
    """Everything `issuer-agent sidecar` can be told."""

    dir: Path = setting("Folder of the files; no other process may write there")
    endpoint: str = setting("The Workload API: unix:///path; empty: SPIFFE_ENDPOINT_SOCKET", "")
    x509: tuple[X509Files, ...] = sections("X509-SVIDs to write")
    jwt: tuple[JwtFile, ...] = sections("JWT-SVIDs to write")
    bundles: Bundles = section("Bundles to write", Bundles)
    pkcs12_password_file: Path | None = setting(
        "File whose first line seals what is PKCS#12; read again at each renewal", None
    )
    files: Files = section("Who may read the files", Files)
    command: tuple[str, ...] = setting(
        "Program to start once the files are there, with its arguments; we end with it", ()
    )
    on_change: tuple[Action, ...] = sections(
        "What to do when files have changed, in order; where there is a command of ours, the "
        "first set starts it and nothing else is done"
    )
    settle: timedelta = setting(
        "For how long the files stay as they are after a change, so that a program which is "
        "told of it reads files that match",
        timedelta(seconds=1),
    )
    when_denied: WhenDenied = setting(
        "What becomes of the files when the agent says that we have no identity any more; "
        "while it is away they stay in any case",
        WhenDenied.KEEP,
    )
    status: Status = section("Health and metrics", Status)
    log_style: LogStyle = setting("How log lines look", LogStyle.JSON)
    log_level: str = setting("Least level that is logged", "info")

    def __post_init__(self) -> None:
        if self.log_level not in LEVELS:
            raise SettingsError(f"log_level: must be one of {', '.join(LEVELS)}")
        if not (self.x509 or self.jwt or self.bundles.x509 or self.bundles.jwt):
            raise SettingsError("x509: there is nothing to write; name an SVID")
        self._check_names()
        try:
            _ = self.endpoint and parse_endpoint(self.endpoint)
        except EndpointError as error:
            raise SettingsError(f"endpoint: {error}") from error
        if any(one.pkcs12 for one in self.x509) and self.pkcs12_password_file is None:
            raise SettingsError("pkcs12_password_file: must be set; PKCS#12 is always sealed")
        if self.command and not self.command[0]:
            raise SettingsError("command: must begin with a program")
        for number, one in enumerate(self.on_change):
            ours = one.restart or (one.signal and one.pid_file is None)
            if ours and not self.command:
                raise SettingsError(
                    f"on_change[{number}]: there is no command of ours to tell; set pid_file "
                    "or command"
                )

    def _check_names(self) -> None:
        wanted = [name for one in self.x509 for name in one.file_names()]
        wanted += [one.file_name for one in self.jwt] + [self.bundles.unsafe_merged_file]
        taken: set[str] = set()
        for name in filter(None, wanted):
            if name in taken:
                raise SettingsError(f"x509: two files would be called {name}")
            taken.add(name)


def signal_number(name: str) -> int:
    """
    Return the number of the signal *name*: ``HUP``, ``SIGHUP``.

    Raises:
        SettingsError: there is none of this name.
    """
    try:
        return int(signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"])
    except KeyError as error:
        raise SettingsError(f"signal: {name!r} is none; such as HUP or USR1") from error


def _check_id(text: str) -> None:
    try:
        if text:
            SpiffeId.parse(text)
    except SpiffeIdError as error:
        raise SettingsError(f"spiffe_id: {error}") from error


def _check_name(key: str, name: str, *, needed: bool = False) -> None:
    if needed and not name:
        raise SettingsError(f"{key}: must not be empty")
    if "/" in name or "\0" in name or name.startswith(".."):
        raise SettingsError(f"{key}: must be a name in `dir`, without a folder")


def _check_url(url: str, *, remote: bool) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise SettingsError(f"url: {error}") from error
    if parts.scheme != "http" or not host or parts.username or not url.isascii():
        raise SettingsError("url: reads http://127.0.0.1:8080/reload")
    if not remote and not _is_loopback(host):
        raise SettingsError(
            f"url: {host} is not this machine; unsafe_remote_url allows it, in the clear"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _uid(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid if name else -1
    except KeyError as error:
        raise SettingsError(f"owner: there is no user {name!r}") from error


def _gid(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid if name else -1
    except KeyError as error:
        raise SettingsError(f"group: there is no group {name!r}") from error
