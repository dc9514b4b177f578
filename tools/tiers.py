"""
Say what a tier of tests leaves out on this machine, and why; nothing is left out in silence.

Usage: ``tiers.py [root|docker]``.  These two install what they lack where they may.
"""

import contextlib
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Other people's programs before which our SVIDs are put, and the packages they are in.
PEERS = {
    "curl": "curl",
    "haproxy": "haproxy",
    "nginx": "nginx",
    "node": "nodejs",
    "openssl": "openssl",
    "initdb": "postgresql",
}
POLICY = Path("/usr/sbin/policy-rc.d")
"""What Debian's packages ask whether they may start their services."""


def main(arguments: list[str]) -> int:
    """Print one line for each thing left out; return 0."""
    tier = arguments[0] if arguments else "pip"
    if tier == "pip":
        plain()
    elif tier == "root":
        root()
    else:
        docker()
    return 0


def plain() -> None:
    """What `make test` leaves out here."""
    left_out("tests marked root", "run `make test-root` as root")
    vectors = Path(os.environ.get("VECTORS", ""))
    if not (vectors / "wycheproof").is_dir():
        left_out("Wycheproof and x509-limbo", "set VECTORS to the folder that holds them")
    if "KUBECONFIG" not in os.environ:
        left_out(
            "a real Kubernetes cluster",
            "set KUBECONFIG to an administrator's; a stand-in serves meanwhile",
        )
    if not os.environ.get("SPIRE_BIN"):
        left_out(
            "SPIRE's own agent, server and command line",
            "set SPIRE_BIN to the folder of spire-agent and spire-server (CONTRIBUTING.md)",
        )
    if absent(["openssl"]):
        left_out(
            "openssl verify -x509_strict",
            "no openssl program here; cryptography verifies instead",
        )
    for name in absent(PEERS):
        left_out(f"tests with {name}", f"no {PEERS[name]} here; `make test-root` installs it")
    no_jdk()


def root() -> None:
    """What `make test-root` needs; installed by apt where that is possible."""
    if os.geteuid() != 0:
        left_out("every test marked root", "this user is not root")
        return
    for name in install({"faketime": "faketime", "strace": "strace", **PEERS}):
        left_out(f"tests with {name}", f"{name} is not here and apt could not install it")
    no_jdk()


def docker() -> None:
    """What `make test-docker` and `make demo-pods` need: the programs of two engines."""
    if os.geteuid() != 0:
        left_out("every test marked docker", "this user is not root")
        return
    missing = install({"dockerd": "docker.io", "containerd": "containerd", "runc": "runc"})
    missing += install({"docker": "docker-cli"})  # its own package since Debian 13
    if missing:
        left_out("every test marked docker", f"apt could not install {', '.join(missing)}")
        return
    if install({"podman": "podman"}):
        left_out("tests with podman", "podman is not here and apt could not install it")
    composing = {"docker-compose": "docker-compose", "iptables": "iptables", "curl": "curl"}
    if missing := install(composing):
        left_out("docker-compose.yml", f"apt could not install {', '.join(missing)}")


def no_jdk() -> None:
    """A JDK is never installed: it is larger than everything else together."""
    if absent(["javac"]):
        left_out("tests with javac", "no JDK here; install one to have its PKIX verify too")


def absent(names: Iterable[str]) -> list[str]:
    """Those of these programs that are not here, wherever Debian puts them."""
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    path = ":".join([*places, *glob.glob("/usr/lib/postgresql/*/bin")])
    return [name for name in names if shutil.which(name, path=path) is None]


def install(packages: dict[str, str]) -> list[str]:
    """Install by apt what is missing of these programs; return what is missing still."""
    missing = absent(packages)
    if missing and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        wanted = sorted({packages[name] for name in missing})
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
        with nothing_started():
            for command in (
                [*apt, "update"],
                [*apt, "install", "-y", "--no-install-recommends", *wanted],
            ):
                subprocess.run(
                    command,
                    check=False,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=300,
                )
    return absent(packages)


@contextlib.contextmanager
def nothing_started() -> Iterator[None]:
    """Meanwhile no package starts a service: a database or a web server would take its port."""
    try:
        with POLICY.open("x") as file:
            file.write("#!/bin/sh\nexit 101\n")
    except OSError:  # there is a policy already, and that is the machine's own
        yield
        return
    try:
        POLICY.chmod(0o755)
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def left_out(what: str, why: str) -> None:
    """One line, on standard error, so that it stands out beside the test run."""
    print(f"left out: {what}: {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
