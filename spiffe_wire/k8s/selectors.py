"""
From a pod and one of its containers to selectors of type ``k8s``.

Source: SPIRE API 10 (its names, byte for byte); ours are ``cluster``, ``sa-uid`` and
``ns-uid``.  Used by the agent for what it attests, and by the server for what it verifies, so
that both mean the same (architecture A5).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from spiffe_core.selector import Selector, SelectorSet
from spiffe_core.text import utf8_bytes
from spiffe_wire.k8s.objects import Container, Meta, Pod

TYPE: Final = "k8s"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a pod beside itself; what is not known yields no selector."""

    cluster: str = ""
    namespace: Meta | None = None
    account: Meta | None = None
    namespace_labels: bool = False
    """Offer ``ns-label``; who may label a namespace then chooses identities in it."""


def pod_selectors(pod: Pod, around: Surroundings) -> SelectorSet:
    """Return what holds for every container of *pod*."""
    return _set_of(_pod_values(pod, around))


def container_selectors(container: Container) -> SelectorSet:
    """Return what holds for *container* alone."""
    return _set_of(_container_values(container))


def _pod_values(pod: Pod, around: Surroundings) -> Iterator[str]:
    yield f"ns:{pod.namespace}"
    yield f"sa:{pod.service_account}"
    yield f"pod-uid:{pod.uid}"
    yield f"pod-name:{pod.name}"
    if pod.node_name:
        yield f"node-name:{pod.node_name}"
    for key, value in pod.labels.items():
        yield f"pod-label:{key}:{value}"
    for owner in pod.owners:
        yield f"pod-owner:{owner.kind}:{owner.name}"
        yield f"pod-owner-uid:{owner.kind}:{owner.uid}"
    for prefix, is_init in (("pod-image", False), ("pod-init-image", True)):
        started = [one for one in pod.containers if one.is_init is is_init and one.has_status]
        yield f"{prefix}-count:{len(started)}"
        for container in started:
            yield from _images(prefix, container)
    yield from _around(around)


def _around(around: Surroundings) -> Iterator[str]:
    if around.cluster:
        yield f"cluster:{around.cluster}"
    if around.account is not None:
        yield f"sa-uid:{around.account.uid}"
    if around.namespace is not None:
        yield f"ns-uid:{around.namespace.uid}"
        if around.namespace_labels:
            for key, value in around.namespace.labels.items():
                yield f"ns-label:{key}:{value}"


def _container_values(container: Container) -> Iterator[str]:
    yield f"container-name:{container.name}"
    yield from _images("container-image", container)


def _images(prefix: str, container: Container) -> Iterator[str]:
    # Twice: by tag, which whoever pushes images can move, and by digest, which nobody can.
    for image in (container.image, container.image_id):
        if image:
            yield f"{prefix}:{image}"


def _set_of(values: Iterator[str]) -> SelectorSet:
    return frozenset(Selector(TYPE, one) for one in values if utf8_bytes(one) is not None)
