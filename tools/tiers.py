"""
Say what a tier of tests leaves out on this machine, and why; nothing is left out in silence.

Usage: ``tiers.py [root|docker]``.  The tier ``root`` installs what it lacks where it may.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Print one line for each thing left out; return 0."""
    tier = arguments[0] if arguments else "pip"
    if tier == "pip":
        plain()
    elif tier == "root":
        root()
    else:
        print("0 passed, 0 failed: no test of this release needs a container engine")
    return 0


def plain() -> None:
    """What `make test` leaves out here."""
    left_out("tests marked root", "run `make test-root` as root")
    vectors = Path(os.environ.get("VECTORS", ""))
    if not (vectors / "wycheproof").is_dir():
        left_out("Wycheproof and x509-limbo", "set VECTORS to the folder that holds them")
    if shutil.which("openssl") is None:
        left_out(
            "openssl verify -x509_strict",
            "no openssl program here; cryptography verifies instead",
        )


def root() -> None:
    """What `make test-root` needs; installed by apt where that is possible."""
    if os.geteuid() != 0:
        left_out("every test marked root", "this user is not root")
        return
    missing = [name for name in ("faketime", "strace") if shutil.which(name) is None]
    if missing and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "-qq", "update"],
            ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing],
        ):
            subprocess.run(
                command,
                check=False,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=300,
            )
    for name in missing:
        if shutil.which(name) is None:
            left_out(f"tests with {name}", f"{name} is not here and apt could not install it")


def left_out(what: str, why: str) -> None:
    """One line, on standard error, so that it stands out beside the test run."""
    print(f"left out: {what}: {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
