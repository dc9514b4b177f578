"""Pods as an agent knows them, and cgroup texts that place processes in their containers."""

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from spiffe_core.selector import SelectorSet
from spiffe_wire.k8s.objects import Container, Meta, Owner, Pod
from workload_api.attestors.pods import PodTable

_NUMBERS = itertools.count(1000)
HASH = "0123456789abcdef0123456789abcdef"
OWNER = Owner("ReplicaSet", "web-5d9c", "owner-uid")


def an_id(number: int) -> str:
    """A container's ID."""
    return f"{number:064x}"


def a_uid(number: int) -> str:
    """A pod's UID."""
    return f"00000000-0000-4000-8000-{number:012x}"


def a_container(name: str = "app", id: str | None = None, **changes: Any) -> Container:
    """A container that runs; *id* empty is one that has not started."""
    made = Container(
        name,
        f"registry.example/{name}:1",
        f"registry.example/{name}@sha256:{len(name):064x}",
        frozenset({an_id(next(_NUMBERS)) if id is None else id} - {""}),
        has_status=True,
    )
    if id == "":
        made = replace(made, image_id="")
    return replace(made, **changes)


def a_pod(number: int | None = None, **changes: Any) -> Pod:
    """A pod of node n1 with one container that runs."""
    number = next(_NUMBERS) if number is None else number
    made = Pod(
        a_uid(number),
        f"web-{number}",
        "shop",
        "web",
        "n1",
        "10.0.0.1",
        {"app": "web"},
        (OWNER,),
        (),
    )
    made = replace(made, **changes)
    return made if "containers" in changes else replace(made, containers=(a_container(),))


def its_id(pod: Pod, name: str = "app") -> str:
    """The ID of a pod's container."""
    (found,) = next(one.ids for one in pod.containers if one.name == name)
    return found


def a_table(*pods: Pod, **settings: Any) -> PodTable:
    """A table of cluster demo that holds *pods*."""
    table = PodTable(**{"cluster": "demo", **settings})
    table.replace(pods)
    return table


def a_meta(name: str, namespace: str = "", **labels: str) -> Meta:
    """A namespace, or an account in *namespace*."""
    return Meta(f"uid-of-{name}", name, namespace, labels)


def values(selectors: SelectorSet | Iterable[Any]) -> set[str]:
    """What selectors say, without their type."""
    return {one.value for one in selectors}


def cgroup_of(pod_uid: str, container_id: str, qos: str = "burstable") -> bytes:
    """The text of ``/proc/<pid>/cgroup`` of a process in a pod, cgroup v2 and cgroupfs."""
    return f"0::/kubepods/{qos}/pod{pod_uid}/{container_id}\n".encode()


NOWHERE = b"0::/user.slice/user-1000.slice\n"


class SourceOfPods:
    """A source that is in step until told otherwise."""

    name = "the API server"

    def __init__(self) -> None:
        self.problem = ""
        self.beside_problem = ""
        self.age = timedelta(0)
        self.wanted = 0

    @property
    def problems(self) -> list[str]:
        return [self.problem] if self.problem else []

    @property
    def away(self) -> timedelta:
        return self.age

    def want(self) -> None:
        self.wanted += 1

    async def run(self) -> None:
        await asyncio.Event().wait()
