"""Files that clients of a cluster read: kubeconfigs, and volumes as a kubelet projects them."""

import base64
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.k8s.pki import Pair


def kubeconfig(
    folder: Path,
    name: str,
    cluster: dict[str, Any],
    ca_pem: bytes,
    *,
    pair: Pair | None = None,
    token: str = "",
    token_file: Path | None = None,
    inline: bool = True,
) -> Path:
    """Write a kubeconfig with one context; with *inline* it needs no other file."""
    user: dict[str, Any] = {}
    path = folder / f"{name}.kubeconfig"

    def put(entry: dict[str, Any], field: str, content: bytes) -> None:
        if inline:
            entry[f"{field}-data"] = base64.b64encode(content).decode()
        else:
            file = folder / f"{name}-{field}.pem"
            write_private(file, content)
            entry[field] = file.name  # relative to the kubeconfig, as kubectl reads it

    whole = dict(cluster)
    put(whole, "certificate-authority", ca_pem)
    if pair is not None:
        put(user, "client-certificate", pair.certificate)
        put(user, "client-key", pair.key)
    if token:
        user["token"] = token
    if token_file is not None:
        user["tokenFile"] = str(token_file)
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": whole}],
        "users": [{"name": f"{name}-user", "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": f"{name}-user"}}],
        "current-context": name,
    }
    write_private(path, yaml.safe_dump(content, sort_keys=False).encode())
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)


def project(folder: Path, content: Mapping[str, str], mode: int = 0o644) -> None:
    """
    Write a volume as the kubelet does: all of it changes at once.

    Each name is a link through `..data`, which points to a folder that is never changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "..data"
    old = os.readlink(data) if data.is_symlink() else None
    fresh = folder / f"..2026_{uuid.uuid4().hex[:10]}"
    fresh.mkdir(mode=0o755)
    for name, text in content.items():
        file = fresh / name
        file.write_text(text)
        file.chmod(mode)
    link = folder / "..data_tmp"
    link.symlink_to(fresh.name)
    link.rename(data)
    for name in content:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    if old is not None:
        shutil.rmtree(folder / old)
