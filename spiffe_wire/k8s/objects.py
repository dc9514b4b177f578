"""
Pods, nodes and accounts as we need them: parsed once from JSON, small, comparable.

Source: Kubernetes API core/v1; SPIRE API 10.  What an API server or kubelet sent is parsed
here and nowhere else; past this module nobody looks at its JSON.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from spiffe_core.errors import InternalError

_STATIC_POD: Final = "kubernetes.io/config.hash"
_OVER: Final = frozenset({"Succeeded", "Failed"})
_MD5: Final = re.compile("[0-9a-f]{32}")


class ObjectError(InternalError):
    """An object of an API server or kubelet is not of the form it has."""


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a pod."""

    name: str
    image: str
    """The image by its tag, as the status has it; as the spec has it before there is one."""
    image_id: str = ""
    """By its digest; empty before it has started."""
    ids: frozenset[str] = frozenset()
    """Of the running one, or the last; without ``containerd://``; empty before it started."""
    is_init: bool = False
    has_status: bool = False
    is_ended: bool = False
    """The one of `ids` runs no longer; another may be about to."""


@dataclass(frozen=True, slots=True)
class Owner:
    """An owner reference."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod."""

    uid: str
    name: str
    namespace: str
    service_account: str
    node_name: str
    host_ip: str
    labels: Mapping[str, str]
    owners: tuple[Owner, ...]
    containers: tuple[Container, ...]
    ephemeral_ids: frozenset[str] = frozenset()
    """Containers that were added for debugging: nobody vouches for what runs in them."""
    config_hash: str = ""
    """A static pod's own UID, which its cgroup has; `uid` is its mirror's.  Never a UUID."""
    is_over: bool = False
    """All its containers have ended for good."""
    is_ending: bool = False

    @property
    def cgroup_uids(self) -> frozenset[str]:
        """What its cgroup may be called by."""
        return frozenset(filter(None, (self.uid, self.config_hash)))

    def container_with(self, container_id: str) -> Container | None:
        """Return the container that has *container_id*, or None."""
        return next((one for one in self.containers if container_id in one.ids), None)


@dataclass(frozen=True, slots=True)
class Meta:
    """What a node, namespace or service account is known by."""

    uid: str
    name: str
    namespace: str
    labels: Mapping[str, str]


def meta_of(given: Any) -> Meta:
    """
    Parse the metadata of any object.

    Raises:
        ObjectError: it has no UID or name.
    """
    metadata = _map(given, "metadata")
    return Meta(
        _text(metadata, "uid"),
        _text(metadata, "name"),
        _text(metadata, "namespace", ""),
        _labels(metadata),
    )


def pod_of(given: Any) -> Pod:
    """
    Parse a pod, of the API server or of a kubelet.

    Raises:
        ObjectError: what every pod has is not there.
    """
    metadata, spec, status = (_map(given, one) for one in ("metadata", "spec", "status"))
    annotations = _map(metadata, "annotations")
    return Pod(
        _text(metadata, "uid"),
        _text(metadata, "name"),
        sys.intern(_text(metadata, "namespace")),
        # The API server fills it in; a static pod has none, and is nobody's "default".
        sys.intern(_text(spec, "serviceAccountName", "")),
        sys.intern(_text(spec, "nodeName", "")),
        _text(status, "hostIP", ""),
        _labels(metadata),
        tuple(_owner(one) for one in _list(metadata, "ownerReferences")),
        (
            *_containers(spec, status, "containers", "containerStatuses"),
            *_containers(spec, status, "initContainers", "initContainerStatuses"),
        ),
        frozenset(
            one
            for state in _list(status, "ephemeralContainerStatuses")
            for one in _ids_of(state)
        ),
        _hash_of(annotations),
        is_over=_text(status, "phase", "") in _OVER,
        is_ending="deletionTimestamp" in metadata,
    )


def _containers(spec: Any, status: Any, kind: str, statuses: str) -> Iterator[Container]:
    is_init = kind == "initContainers"
    known = {_text(one, "name"): one for one in _list(status, statuses)}
    for one in _list(spec, kind):
        name = _text(one, "name")
        state = known.get(name)
        if state is None:
            yield Container(name, _text(one, "image", ""), is_init=is_init)
        else:
            yield Container(
                name,
                sys.intern(_text(state, "image", "")),
                sys.intern(_text(state, "imageID", "")),
                frozenset(_ids_of(state)),
                is_init,
                has_status=True,
                is_ended=_is_ended(state),
            )


def _hash_of(annotations: Mapping[str, Any]) -> str:
    # Whoever makes a pod may write this, so it must not be able to name another pod's UID.
    text = annotations.get(_STATIC_POD)
    return text if isinstance(text, str) and _MD5.fullmatch(text) else ""


def _is_ended(state: Any) -> bool:
    now = _map(state, "state")
    # One that waits to be started anew still has the id of its last run.
    return "terminated" in now or ("waiting" in now and bool(_text(state, "containerID", "")))


def _ids_of(state: Any) -> Iterator[str]:
    # One that has ended has its id under `state.terminated` as well; both are the same run.
    terminated = _map(_map(state, "state"), "terminated")
    for text in (_text(state, "containerID", ""), _text(terminated, "containerID", "")):
        runtime, _, container_id = text.partition("://")
        if runtime and container_id:
            yield container_id


def _owner(given: Any) -> Owner:
    return Owner(
        sys.intern(_text(given, "kind")), sys.intern(_text(given, "name")), _text(given, "uid")
    )


def _labels(metadata: Any) -> Mapping[str, str]:
    labels = _map(metadata, "labels")
    for value in labels.values():
        if not isinstance(value, str):
            raise ObjectError("a label of an object is not text")
    return {sys.intern(key): sys.intern(value) for key, value in labels.items()}


def _map(given: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise ObjectError("an object is not a JSON object")
    found = given.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ObjectError(f"{key} of an object is not a JSON object")
    return found


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise ObjectError(f"{key} of an object is not a list")
    return found


def _text(given: Any, key: str, default: str | None = None) -> str:
    if not isinstance(given, dict):
        raise ObjectError("a part of an object is not a JSON object")
    found = given.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, str) or (not found and default is None):
        raise ObjectError(f"{key} of an object is not there, or not text")
    return found


@dataclass(frozen=True, slots=True)
class TokenReview:
    """What an API server says of a token: never the token."""

    is_authenticated: bool
    user: str
    audiences: frozenset[str]
    """Those of the asked ones that it is for; a server that knows no audiences has none."""
    extra: Mapping[str, str]
    """What has exactly one value."""
    error: str = ""


def review_of(given: Any) -> TokenReview:
    """
    Parse an answered TokenReview.

    Raises:
        ObjectError: it is not of the form it has.
    """
    status = _map(given, "status")
    user = _map(status, "user")
    extra = _map(user, "extra")
    audiences = _list(status, "audiences")
    if not all(isinstance(one, str) for one in audiences):
        raise ObjectError("an audience of a token is not text")
    single = {key: values[0] for key in extra if len(values := _list(extra, key)) == 1}
    if not all(isinstance(one, str) for one in single.values()):
        raise ObjectError("a fact about a user is not text")
    return TokenReview(
        status.get("authenticated") is True,
        _text(user, "username", ""),
        frozenset(audiences),
        single,
        _text(status, "error", ""),
    )
