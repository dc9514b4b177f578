"""
Where this process's own cgroup namespace is rooted in the node's tree (SEC-33).

A runtime gives a container a namespace of its own, in which everybody else's path begins
with ``..``: the names above our own root are not shown.  They are learnt by finding ourselves
in the node's tree, once, at start: the kernel lists us in one folder of each hierarchy.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from workload_api.attestors.cgroup import (
    HOST,
    CgroupError,
    CgroupView,
    Segments,
    parse_lines,
    read_cgroup,
)

INITIAL_NAMESPACE: Final = 0xEFFFFFFB  # include/linux/proc_ns.h: the one that Linux starts with
_ROOT_INODE: Final = 1
MAX_FOLDERS: Final = 200_000
"""A node of 500 pods has some 3,000."""
REMEDY: Final = (
    "give its pod hostPID and CAP_SYS_PTRACE, or mount the node's /sys/fs/cgroup at the same "
    "place, or run it in the node's cgroup namespace"
)


@dataclass(frozen=True, slots=True)
class Tree:
    """
    A folder in which the node's cgroup hierarchies are mounted.

    *whole*: below it everything is, whatever the inodes say.  Only the tree of the first
    process may be taken at its word: where the node is itself a container, as in kind, its
    tree begins there, and so do the paths that the node knows.
    """

    path: str
    whole: bool = False


TREES: Final = (Tree("/proc/1/root/sys/fs/cgroup", whole=True), Tree("/sys/fs/cgroup"))


def own_view(trees: Sequence[Tree] = TREES) -> CgroupView:
    """
    Return how paths of cgroups read from here; what cannot be learnt is said, not guessed.

    It blocks: it walks the node's tree, unless we are in the node's own namespace.
    """
    if _in_the_nodes_namespace():
        return HOST
    roots: dict[bytes, Segments] = {}
    try:
        for controllers, path in parse_lines(read_cgroup(os.getpid())):
            root = _root(controllers, path, trees)
            if root is not None:
                roots[controllers] = root
    except CgroupError:
        return CgroupView({}, REMEDY)
    return CgroupView(roots, REMEDY)


def _in_the_nodes_namespace() -> bool:
    # Where the first process is in ours, what we read is what it would read.
    ours = os.stat("/proc/self/ns/cgroup").st_ino
    if ours == INITIAL_NAMESPACE:
        return True
    try:
        return os.stat("/proc/1/ns/cgroup").st_ino == ours
    except OSError:
        return False


def _root(controllers: bytes, path: bytes, trees: Sequence[Tree]) -> Segments | None:
    """Return the absolute path of the folder that paths of one hierarchy are relative to."""
    inside = tuple(one for one in path.split(b"/") if one)
    for tree in trees:
        folder = _hierarchy(controllers, tree)
        place = None if folder is None else _our_place(folder)
        # Unless we were moved out of our own root: what lies between is not shown then.
        if place is not None and place[len(place) - len(inside) :] == inside:
            return place[: len(place) - len(inside)]
    return None


def _hierarchy(controllers: bytes, tree: Tree) -> bytes | None:
    """Return where one hierarchy is mounted whole in *tree*."""
    base = os.fsencode(tree.path)
    names = [controllers.removeprefix(b"name=")]
    if not controllers:
        names = [b".", b"unified"]
    for name in names:
        folder = os.path.join(base, name)
        try:
            found = os.stat(os.path.join(folder, b"cgroup.procs"))
            whole = tree.whole or os.stat(folder).st_ino == _ROOT_INODE
        except OSError:
            continue
        if whole and found:
            return folder
    return None


def _our_place(top: bytes) -> Segments | None:
    """Return our own folder, from *top*, which the kernel says we are in."""
    us = b"%d" % os.getpid()
    for folder in _folders(top):
        try:
            with open(os.path.join(folder, b"cgroup.procs"), "rb") as file:
                if us in file.read().split():
                    return tuple(one for one in folder[len(top) :].split(b"/") if one)
        except OSError:
            continue  # it went away, or holds threads alone
    return None


def _folders(top: bytes) -> Iterator[bytes]:
    waiting = [top]
    for _ in range(MAX_FOLDERS):
        if not waiting:
            return
        folder = waiting.pop()
        yield folder
        try:
            with os.scandir(folder) as entries:
                waiting += [one.path for one in entries if one.is_dir(follow_symlinks=False)]
        except OSError:
            continue
