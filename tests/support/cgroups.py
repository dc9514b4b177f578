"""The texts of ``/proc/<pid>/cgroup`` in `tests/vectors/cgroups`, and names for more."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workload_api.attestors.cgroup import (
    HOST,
    CgroupLayout,
    CgroupView,
    ContainerRef,
    container_of,
)

FOLDER = Path(__file__).parent.parent / "vectors" / "cgroups"
CONTAINER = "3f" * 16 + "04b5" * 8
OTHER_CONTAINER = "e7" * 16 + "19c2" * 8
POD = "6f1d4c52-0b7a-4e39-9c1e-2a5b8d7e4f60"
OTHER_POD = "b9a03e71-44d8-4c0f-8a26-71c5e0f3d982"
STATIC_POD = "8c2e5f1a9b7d4036e1f0a2b3c4d5e6f7"
LEGACY = (
    "hugetlb",
    "freezer",
    "net_cls,net_prio",
    "perf_event",
    "memory",
    "cpuset",
    "blkio",
    "cpu,cpuacct",
    "devices",
    "pids",
    "misc",
    "name=systemd",
)
NAMES = {
    "{id}": CONTAINER,
    "{ID}": CONTAINER.upper(),
    "{id-1}": CONTAINER[:-1],
    "{id2}": OTHER_CONTAINER,
    "{ID2}": OTHER_CONTAINER.upper(),
    "{uid}": POD,
    "{UID}": POD.upper(),
    "{uid-1}": POD[:-1],
    "{uid_}": POD.replace("-", "_"),
    "{uid2}": OTHER_POD,
    "{static}": STATIC_POD,
}


def filled(text: str) -> str:
    """*text* with IDs for its names."""
    for name, value in NAMES.items():
        text = text.replace(name, value)
    return text


def cgroup_text(*lines: str) -> bytes:
    """A file of *lines*; one that begins with ``*:`` stands for every old hierarchy."""
    whole: list[str] = []
    for line in lines:
        if line.startswith("*:"):
            whole += [f"{20 + i}:{one}{line[1:]}" for i, one in enumerate(LEGACY)]
        else:
            whole.append(line)
    return "".join(f"{filled(one)}\n" for one in whole).encode()


@dataclass(frozen=True)
class Shape:
    """One case of the tables."""

    name: str
    origin: str
    layout: str
    lines: tuple[str, ...]
    expect: Any
    prefixes: tuple[str, ...] = ()
    roots: Any = field(default=None)

    @property
    def text(self) -> bytes:
        """The file."""
        return cgroup_text(*self.lines)

    def read(self) -> ContainerRef | None:
        """What the parser makes of it."""
        make = {"pods": CgroupLayout.pods, "engine": CgroupLayout.engine}[self.layout]
        layout = make(self.prefixes) if self.prefixes else make()
        return container_of(self.text, layout, self._view())

    def _view(self) -> CgroupView:
        if self.roots is None:
            return HOST
        roots = {
            name.encode(): tuple(one.encode() for one in filled(path).split("/")[1:])
            for name, path in self.roots.items()
        }
        return CgroupView(roots, "give its pod hostPID")


def shapes(file: str) -> list[Shape]:
    """The cases of one table."""
    found = json.loads((FOLDER / f"{file}.json").read_bytes())
    return [
        Shape(
            **{
                **one,
                "lines": tuple(one["lines"]),
                "prefixes": tuple(one.get("prefixes", ())),
            }
        )
        for one in found
    ]
