"""How an API server is reached: kubeconfigs, pods, and files that change under us."""

import base64
import copy
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spiffe_wire.k8s.credentials import (
    Access,
    CredentialsError,
    Source,
    access_of,
    from_kubeconfig,
    in_cluster,
)
from tests.support.k8s.pki import ClusterCa

CA = ClusterCa("demo-ca")
PAIR = CA.client("somebody", ("group",))
OTHER = CA.serving(["a.example"])


def b64(data: bytes) -> str:
    """As a kubeconfig holds it."""
    return base64.b64encode(data).decode()


def a_tree() -> Any:
    """A kubeconfig as kubeadm writes it, with two contexts."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "admin@demo",
        "contexts": [
            {"name": "admin@demo", "context": {"cluster": "demo", "user": "admin"}},
            {"name": "robot@demo", "context": {"cluster": "demo", "user": "robot"}},
        ],
        "clusters": [
            {
                "name": "demo",
                "cluster": {
                    "server": "https://api.example:6443",
                    "certificate-authority-data": b64(CA.pem),
                },
            }
        ],
        "users": [
            {
                "name": "admin",
                "user": {
                    "client-certificate-data": b64(PAIR.certificate),
                    "client-key-data": b64(PAIR.key),
                },
            },
            {"name": "robot", "user": {"token": "s3cret-token"}},
        ],
        "preferences": {},
    }


def written(folder: Path, tree: Any) -> Path:
    """*tree* as a file."""
    path = folder / "kubeconfig"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def cluster_of(tree: Any) -> Any:
    """The cluster's own part."""
    return tree["clusters"][0]["cluster"]


def user_of(tree: Any) -> Any:
    """The administrator's own part."""
    return tree["users"][0]["user"]


def test_a_kubeconfig(tmp_path: Path) -> None:
    """Server, CAs and client certificate of the current context."""
    path = written(tmp_path, a_tree())
    access = access_of(path, "", {})
    assert (access.host, access.port, access.path, access.server_name) == (
        "api.example", 6443, "", "",
    )  # fmt: skip
    assert access.described == str(path)
    assert access.bearer() == ""
    context = access.context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert len(context.get_ca_certs()) == 1


def test_another_context_and_its_token(tmp_path: Path) -> None:
    """A context that is named instead, and a user with a token."""
    access = from_kubeconfig(written(tmp_path, a_tree()), "robot@demo")
    assert access.bearer() == "s3cret-token"
    assert access.certificate is None


@pytest.mark.parametrize(
    ("server", "host", "port", "path"),
    [
        ("https://10.0.0.1", "10.0.0.1", 443, ""),
        ("https://[fd00::1]:6443/", "fd00::1", 6443, ""),
        ("https://proxy.example/k8s/clusters/c-1/", "proxy.example", 443, "/k8s/clusters/c-1"),
    ],
)
def test_servers(tmp_path: Path, server: str, host: str, port: int, path: str) -> None:
    """Addresses as they are written: a port, a path before every other, IPv6."""
    tree = a_tree()
    cluster_of(tree).update({"server": server, "tls-server-name": "kubernetes"})
    access = from_kubeconfig(written(tmp_path, tree))
    assert (access.host, access.port, access.path) == (host, port, path)
    assert access.server_name == "kubernetes"


def test_files_beside_a_kubeconfig(tmp_path: Path) -> None:
    """Paths in it are relative to its own folder, as kubectl has it."""
    for name, data in [("ca", CA.pem), ("crt", PAIR.certificate), ("key", PAIR.key),
                       ("token", b" tok\n")]:  # fmt: skip
        (tmp_path / name).write_bytes(data)
    tree = a_tree()
    tree["clusters"][0]["cluster"] = {"server": "https://a", "certificate-authority": "ca"}
    tree["users"][0]["user"] = {
        "client-certificate": "crt", "client-key": "key", "tokenFile": "token",
    }  # fmt: skip
    access = from_kubeconfig(written(tmp_path, tree))
    assert access.bearer() == "tok"
    access.context()


def set_in(part: Callable[[Any], Any], **values: Any) -> Callable[[Any], None]:
    """Set values in one part; names have underscores for their dashes."""

    def change(tree: Any) -> None:
        for name, value in values.items():
            part(tree)[name.replace("_", "-")] = value

    return change


def without(part: Callable[[Any], Any], name: str) -> Callable[[Any], None]:
    """Take one value away."""
    return lambda tree: part(tree).pop(name)


def whole(tree: Any) -> Any:
    """All of it."""
    return tree


def set_exactly(part: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], None]:
    """Set one value, its name as it stands."""
    return lambda tree: part(tree).__setitem__(name, value)


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "unverified": (
        set_in(cluster_of, insecure_skip_tls_verify=True), "insecure-skip-tls-verify",
    ),
    "plain http": (set_in(cluster_of, server="http://a"), "must be https"),
    "no server": (without(cluster_of, "server"), "must be https"),
    "no host": (set_in(cluster_of, server="https://"), "must be https"),
    "no port": (set_in(cluster_of, server="https://a:x"), "no URL"),
    "no CA": (without(cluster_of, "certificate-authority-data"), "certificate-authority"),
    "CA not base64": (set_in(cluster_of, certificate_authority_data="!"), "not base64"),
    "proxy": (set_in(cluster_of, proxy_url="http://p"), "proxy-url"),
    "program": (set_in(user_of, exec={"command": "sh"}), "exec is not supported"),
    "auth provider": (set_in(user_of, auth_provider={"name": "gcp"}), "auth-provider"),
    "user name": (set_in(user_of, username="a"), "username"),
    "password": (set_in(user_of, password="hunter2"), "password"),
    "no context": (without(whole, "current-context"), "no current-context"),
    "unknown context": (set_in(whole, current_context="x"), "no context of the name x"),
    "unknown user": (set_in(whole, users=[]), "no user of the name admin"),
    "clusters are text": (set_in(whole, clusters="x"), "clusters is not a list"),
    "contexts are a number": (set_in(whole, contexts=7), "contexts is not a list"),
    "cluster is text": (
        lambda tree: tree["clusters"][0].update(cluster="x"), "not keys and values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_sec_34_what_is_not_done(tmp_path: Path, name: str) -> None:
    """SEC-34: what would not verify the server, run a program, or lacks a part: says which."""
    change, why = REFUSED[name]
    tree = copy.deepcopy(a_tree())
    change(tree)
    path = written(tmp_path, tree)
    with pytest.raises(CredentialsError, match=why) as raised:
        from_kubeconfig(path)
    assert str(path) in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "a", "[1]", "a: [", "\x00", "a: 1\na: 2"])
def test_what_is_no_kubeconfig(tmp_path: Path, text: str) -> None:
    """Any other file names itself and fails."""
    with pytest.raises(CredentialsError, match="kubeconfig"):
        from_kubeconfig(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Not there, empty, or too long: says which file."""
    path = tmp_path / "kubeconfig"
    with pytest.raises(CredentialsError, match="cannot read"):
        from_kubeconfig(path)
    path.write_bytes(b"")
    with pytest.raises(CredentialsError, match="empty"):
        Source(path).read()
    path.write_bytes(b"x" * (1024 * 1024))
    assert len(Source(path).read()) == 1024 * 1024
    path.write_bytes(b"x" * (1024 * 1024 + 1))
    with pytest.raises(CredentialsError, match="longer than 1 MiB"):
        Source(path).read()


# In a pod


def a_pods_files(folder: Path, token: bytes = b"tok") -> None:
    """What every pod is given."""
    (folder / "ca.crt").write_bytes(CA.pem)
    (folder / "token").write_bytes(token)


def test_in_a_pod(tmp_path: Path) -> None:
    """By the environment and the files that every pod is given."""
    a_pods_files(tmp_path)
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    access = in_cluster(environment, tmp_path)
    assert (access.host, access.port, access.bearer()) == ("10.96.0.1", 6443, "tok")
    access.context()


@pytest.mark.parametrize(
    "environment",
    [{}, {"KUBERNETES_SERVICE_HOST": ""},
     {"KUBERNETES_SERVICE_HOST": "a", "KUBERNETES_SERVICE_PORT": "tcp"}],
    ids=["nothing", "empty", "no number"],
)  # fmt: skip
def test_in_no_pod(environment: dict[str, str]) -> None:
    """Outside a cluster it says what to set."""
    with pytest.raises(CredentialsError, match="set kubeconfig"):
        access_of(None, "", environment)


def test_a_token_that_rotates(tmp_path: Path) -> None:
    """A token is read anew for each request; the kubelet replaces it before it ends."""
    a_pods_files(tmp_path)
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "a"}, tmp_path)
    before = access.version
    (tmp_path / "token").write_bytes(b"next\n")
    assert access.bearer() == "next"
    assert access.version == before  # no new connection is needed for that
    (tmp_path / "token").unlink()
    with pytest.raises(CredentialsError, match="cannot read"):
        access.bearer()


def test_a_ca_that_rotates(tmp_path: Path) -> None:
    """A CA that was replaced asks for a new TLS context, through the links of a volume too."""
    real = [tmp_path / one for one in ("one", "two")]
    for folder in real:
        folder.mkdir()
        a_pods_files(folder)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "ca.crt").symlink_to("..data/ca.crt")
    (tmp_path / "token").symlink_to("..data/token")
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "a"}, tmp_path)
    before = access.version
    assert access.version == before
    (tmp_path / "..next").symlink_to("two")
    os.rename(tmp_path / "..next", tmp_path / "..data")
    assert access.version != before
    (real[1] / "ca.crt").unlink()
    assert access.version != before
    with pytest.raises(CredentialsError, match="cannot read"):
        access.context()


@pytest.mark.parametrize("data", [b"a b", b"\n", b"a\x00b", b"\xff", b"a\nb"])
def test_what_is_no_token(tmp_path: Path, data: bytes) -> None:
    """A token is one printable word: it goes into a header."""
    a_pods_files(tmp_path, data)
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "a"}, tmp_path)
    with pytest.raises(CredentialsError, match="token"):
        access.bearer()


@pytest.mark.parametrize(
    ("field", "data"),
    [("authorities", b"x"), ("authorities", b"\xff"), ("certificate", b"x"), ("key", b"x"),
     ("key", OTHER.key)],
    ids=["CA", "CA not text", "certificate", "key", "another's key"],
)  # fmt: skip
def test_what_is_not_pem(field: str, data: bytes) -> None:
    """A certificate or key that cannot be used says where it came from."""
    sources = {
        "authorities": Source(data=CA.pem),
        "certificate": Source(data=PAIR.certificate),
        "key": Source(data=PAIR.key),
        field: Source(data=data),
    }
    with pytest.raises(CredentialsError, match="/etc/x: a certificate or key"):
        Access("a", 443, described="/etc/x", **sources).context()


def test_sec_90_no_secret_in_a_repr(tmp_path: Path) -> None:
    """SEC-90: tokens and keys are in no repr."""
    for context in ("admin@demo", "robot@demo"):
        shown = repr(from_kubeconfig(written(tmp_path, a_tree()), context))
        assert "s3cret" not in shown
        assert "PRIVATE" not in shown
        assert b64(PAIR.key)[:40] not in shown
