"""
Where an API server is, how it is known, and how we are known to it.

Source: SEC-34 (it is always verified; there is no switch that turns that off), SEC-90 (what
opens it is in no repr).  Files are read anew when they change: tokens and certificates of a
cluster rotate under a running process.
"""

import base64
import binascii
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from spiffe_core.errors import MalformedError, PreconditionError
from spiffe_wire import strictyaml
from spiffe_wire.frontdoor.tls import load_pem

SERVICE_ACCOUNT_FOLDER: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_BYTES: Final = 1024 * 1024


class CredentialsError(PreconditionError):
    """There is no way to an API server; says which file and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes that stand in a file, or in a setting."""

    path: Path | None = None
    data: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """
        Return the bytes as they are now; blocks for as long as a small local file takes.

        Raises:
            CredentialsError: the file is not there, or too large.
        """
        if self.path is None:
            return self.data
        try:
            with open(self.path, "rb") as file:
                found = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise CredentialsError(f"cannot read {self.path}: {error.strerror}") from error
        if not found or len(found) > MAX_BYTES:
            raise CredentialsError(f"{self.path} is empty, or longer than 1 MiB")
        return found

    @property
    def version(self) -> tuple[int, ...]:
        """Another value once the file was replaced."""
        if self.path is None:
            return ()
        try:
            found = os.stat(self.path)  # follows the links that a mounted secret is made of
        except OSError:
            return (-1,)
        return found.st_ino, found.st_mtime_ns, found.st_size


@dataclass(frozen=True, slots=True)
class Access:
    """One API server, or one kubelet, and one way to be known there."""

    host: str
    port: int
    authorities: Source
    """The CAs it is known by, PEM."""
    path: str = ""
    """Before every request's own, without a slash at its end."""
    token: Source | None = None
    certificate: Source | None = None
    key: Source | None = None
    server_name: str = ""
    """What its certificate must be for, when that is not *host*."""
    described: str = ""
    """Where this came from, for messages."""

    @property
    def version(self) -> tuple[tuple[int, ...], ...]:
        """Another value once a new TLS context is needed."""
        parts = (self.authorities, self.certificate, self.key)
        return tuple(one.version for one in parts if one is not None)

    def context(self) -> ssl.SSLContext:
        """
        Return a TLS context from the files as they are now.

        Raises:
            CredentialsError: a file is not there, or not PEM.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_verify_locations(cadata=self.authorities.read().decode("ascii"))
            if self.certificate is not None and self.key is not None:
                load_pem(context, self.key.read() + b"\n" + self.certificate.read())
        except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
            raise CredentialsError(
                f"{self.described}: a certificate or key in it is not PEM"
            ) from error
        return context

    def bearer(self) -> str:
        """
        Return the token as it is now, or nothing when there is none.

        Raises:
            CredentialsError: the file is not there, or holds no token.
        """
        if self.token is None:
            return ""
        try:
            text = self.token.read().decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise CredentialsError(f"{self.described}: the token is not ASCII text") from error
        if not text or not text.isprintable() or " " in text:
            raise CredentialsError(f"{self.described}: there is no token in it")
        return text


def access_of(kubeconfig: Path | None, context: str, environment: Mapping[str, str]) -> Access:
    """
    Return the way to an API server: by *kubeconfig*, or as a pod of its cluster.

    Raises:
        CredentialsError: neither is there, or it asks for what we do not do.
    """
    if kubeconfig is not None:
        return from_kubeconfig(kubeconfig, context)
    return in_cluster(environment)


def in_cluster(environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT_FOLDER) -> Access:
    """
    Return the way that every pod is given.

    Raises:
        CredentialsError: this process does not run in a pod.
    """
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    port = environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not port.isdecimal():
        raise CredentialsError(
            "this process is in no pod (KUBERNETES_SERVICE_HOST is not set): set kubeconfig"
        )
    return Access(
        host,
        int(port),
        Source(folder / "ca.crt"),
        token=Source(folder / "token"),
        described=str(folder),
    )


def from_kubeconfig(path: Path, context: str = "") -> Access:
    """
    Return the way that a kubeconfig names, by its current context or by *context*.

    Raises:
        CredentialsError: not readable, not one, or it asks for what we do not do: running
            a program for a token, a password, a proxy, or not verifying the server.
    """
    try:
        tree = strictyaml.loads(Source(path).read().decode("utf-8"))
        return _Kubeconfig(path, tree).access(context)
    except (MalformedError, UnicodeDecodeError) as error:
        raise CredentialsError(f"{path} is not a kubeconfig: {error}") from error


class _Kubeconfig:
    """Reads one; every error names the file."""

    def __init__(self, path: Path, tree: Any) -> None:
        self._path = path
        self._tree = _dict(tree, "it")

    def access(self, context: str) -> Access:
        name = context or self._tree.get("current-context")
        if not name:
            raise MalformedError("it has no current-context: name one")
        chosen = self._named("contexts", name, "context")
        cluster = self._named("clusters", chosen.get("cluster"), "cluster")
        user = self._named("users", chosen.get("user"), "user")
        self._refuse(cluster, "insecure-skip-tls-verify", "the server must be verified")
        self._refuse(cluster, "proxy-url", "proxies are not supported")
        for key in ("exec", "auth-provider"):
            self._refuse(user, key, "use a token, a token file or a client certificate")
        for key in ("username", "password"):
            self._refuse(user, key, "API servers take none any more")
        try:
            server = urlsplit(str(cluster.get("server", "")))
            port = server.port or 443
        except ValueError as error:
            raise MalformedError("server is no URL") from error
        if server.scheme != "https" or not server.hostname:
            raise MalformedError("server must be https://HOST[:PORT]")
        authorities = self._source(cluster, "certificate-authority")
        if authorities is None:
            raise MalformedError("the cluster needs certificate-authority(-data)")
        return Access(
            server.hostname,
            port,
            authorities,
            server.path.rstrip("/"),
            self._token(user),
            self._source(user, "client-certificate"),
            self._source(user, "client-key"),
            str(cluster.get("tls-server-name", "")),
            str(self._path),
        )

    def _named(self, kind: str, name: Any, inner: str) -> Mapping[str, Any]:
        listed = self._tree.get(kind) or []
        if not isinstance(listed, list):
            raise MalformedError(f"{kind} is not a list")
        for one in listed:
            if isinstance(one, dict) and one.get("name") == name:
                return _dict(one.get(inner) or {}, f"{inner} {name}")
        raise MalformedError(f"it has no {inner} of the name {name}")

    def _refuse(self, given: Mapping[str, Any], key: str, why: str) -> None:
        if given.get(key):
            raise MalformedError(f"{key} is not supported: {why}")

    def _token(self, user: Mapping[str, Any]) -> Source | None:
        if user.get("tokenFile"):
            return Source(self._beside(str(user["tokenFile"])))
        if user.get("token"):
            return Source(data=str(user["token"]).encode())
        return None

    def _source(self, given: Mapping[str, Any], key: str) -> Source | None:
        data = given.get(f"{key}-data")
        if data:
            try:
                return Source(data=base64.b64decode(str(data), validate=True))
            except (binascii.Error, ValueError) as error:
                raise MalformedError(f"{key}-data is not base64") from error
        return Source(self._beside(str(given[key]))) if given.get(key) else None

    def _beside(self, name: str) -> Path:
        return self._path.parent / name  # relative to the kubeconfig, as kubectl has it


def _dict(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise MalformedError(f"{what} is not keys and values")
    return given
