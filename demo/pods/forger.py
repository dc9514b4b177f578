"""
An ordinary user's process that forges a pod's cgroup path, as well as its user can.

systemd gives every user who logs in a folder of cgroups of his own (`delegated` does the same),
and below it he may make any name.  So may a process that an attacker runs on a node.

Usage: ``python -m demo.pods.forger UID FOLDER PATH``: enters *FOLDER* as root's gift, becomes
*UID* for good, makes *PATH* below the folder, moves there, and is a workload from then on.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 now: the user may not be able to read it later
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from demo.pods import workload


@contextlib.contextmanager
def delegated(uid: int) -> Iterator[Path]:
    """The folder of cgroups that *uid* is given, gone afterwards with all below it."""
    top = hierarchy() / f"user-{uid}.slice"
    folder = top / f"user@{uid}.service"
    folder.mkdir(parents=True)
    try:
        for one in (folder, folder / "cgroup.procs"):
            os.chown(one, uid, uid)
        yield folder
    finally:
        below = [path for path in top.rglob("*") if path.is_dir()]
        for one in (*sorted(below, reverse=True), top):
            one.rmdir()


def hierarchy() -> Path:
    """Where the new hierarchy of cgroups is mounted; there users are given folders."""
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, place, kind, *_ = line.split()
            if kind == "cgroup2":
                return Path(place)
    raise FileNotFoundError("no cgroup2 is mounted here")


def forge(uid: int, folder: Path, path: str) -> None:
    """Become *uid*, and then be at *path* below *folder*, which is his."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    forged = folder / path.strip("/")
    forged.mkdir(parents=True)
    (forged / "cgroup.procs").write_text(str(os.getpid()))


if __name__ == "__main__":
    forge(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    asyncio.run(workload.main())
