"""
Which container a process is in, by ``/proc/<pid>/cgroup`` alone (SEC-33).

A path counts only below a configured prefix, whole segments from the start: whoever is given
a folder of cgroups of his own, which systemd gives to every user, can make any name below it.
What the file says must be of one piece; anything that looks made up is an error with its
reason, never a guess.  Mounts are not read: a process chooses its own.
"""

import enum
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias

from spiffe_core.errors import MalformedError
from workload_api.attestors.protocol import AttestationError

MAX_CGROUP_BYTES: Final = 64 * 1024  # a path takes 4 KiB at most, and there are 15 hierarchies
MAX_LINES: Final = 256

POD_PREFIXES: Final = (
    "/kubepods",
    "/kubepods.slice",
    "/kubelet/kubepods",  # kind
    "/kubelet.slice/kubelet-kubepods.slice",  # kind, with systemd
    # Where a runtime takes the name that is meant for systemd for a folder's: below its own.
    "/",
    "/system.slice/containerd.service",
    "/system.slice/crio.service",
    "/system.slice/k3s.service",
    "/system.slice/k3s-agent.service",
    "/system.slice/rke2-server.service",
    "/system.slice/rke2-agent.service",
    "/runtime.slice/containerd.service",
    "/kuberuntime.slice/containerd.service",
    "/podruntime.slice/containerd.service",
)
"""Where a node's pods are; none of these can be handed to an ordinary user."""

ENGINE_PREFIXES: Final = ("/docker", "/system.slice", "/libpod_parent", "/machine.slice")
"""Where Docker and Podman put root's containers; a user's own Podman is not among them."""

Segments: TypeAlias = tuple[bytes, ...]


class CgroupError(AttestationError):
    """A cgroup file looks forged, contradicts itself, or cannot be understood from here."""


@dataclass(frozen=True, slots=True)
class ContainerRef:
    """A container as the kernel names it; the runtime or the kubelet must still confirm it."""

    container_id: str
    """64 hex digits."""
    pod_uid: str | None = None
    """With dashes; 32 hex digits for a pod of the kubelet's own files; None outside pods."""
    runtime: str = field(default="", compare=False)
    """``containerd``, ``cri-o``, ``docker``, ``podman``; empty where the path does not say."""


class _Grammar(enum.Enum):
    PODS = enum.auto()
    ENGINE = enum.auto()


class PrefixError(MalformedError):
    """A configured prefix can match nothing."""


@dataclass(frozen=True, slots=True)
class CgroupLayout:
    """
    Where containers are looked for: by `pods` or by `engine`, below *prefixes*.

    A prefix is an absolute path; a segment ``*`` stands for any one, such as the container
    that a node of kind is.  Its last segment says what stands below: ``x.slice`` what systemd
    makes, anything else plain folders.
    """

    grammar: _Grammar
    prefixes: tuple[str, ...]
    parsed: tuple[Segments, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The outermost match wins, so the shortest is tried first.
        parsed = sorted((_prefix(one) for one in self.prefixes), key=len)
        object.__setattr__(self, "parsed", tuple(parsed))

    @classmethod
    def pods(cls, prefixes: Sequence[str] = POD_PREFIXES) -> Self:
        """
        Kubernetes' pods.

        Raises:
            PrefixError: a prefix can match nothing.
        """
        return cls(_Grammar.PODS, tuple(prefixes))

    @classmethod
    def engine(cls, prefixes: Sequence[str] = ENGINE_PREFIXES) -> Self:
        """
        Containers of Docker or Podman.

        Raises:
            PrefixError: a prefix can match nothing.
        """
        return cls(_Grammar.ENGINE, tuple(prefixes))


@dataclass(frozen=True, slots=True)
class CgroupView:
    """
    How paths read from here, which depends on our own cgroup namespace.

    *roots* is None where they are absolute.  Elsewhere it holds, for each hierarchy by its
    controllers, the absolute path of the folder that they are relative to; one that is not in
    it could not be learnt, and *missing* says why.
    """

    roots: Mapping[bytes, Segments] | None = None
    missing: str = ""


HOST: Final = CgroupView()


def read_cgroup(pid: int) -> bytes:
    """
    Read ``/proc/<pid>/cgroup``; made by the kernel in memory, so it does not block.

    Raises:
        CgroupError: there is no such process, or its file is longer than any real one.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            data = file.read(MAX_CGROUP_BYTES + 1)
    except OSError as error:
        raise CgroupError("the process's cgroups cannot be read") from error
    if len(data) > MAX_CGROUP_BYTES:
        raise CgroupError("the process's list of cgroups is too long")
    return data


def container_of(
    text: bytes, layout: CgroupLayout, view: CgroupView = HOST
) -> ContainerRef | None:
    """
    Return the container that *text*, a ``/proc/<pid>/cgroup``, places a process in.

    None: in no container of this *layout*.

    Raises:
        CgroupError: it may be in one, but what stands there looks forged or contradicts itself.
    """
    unified: _Reading | None = None
    legacy: list[_Reading] = []
    known: dict[Segments, ContainerRef | None] = {}  # most lines say the same
    for controllers, path in parse_lines(text):
        segments = _absolute(path, controllers, view)
        if segments not in known:
            known[segments] = _container(segments, layout)
        reading = _Reading(segments, known[segments])
        if controllers:
            legacy.append(reading)
        else:
            unified = reading
    return _agreed(unified, legacy)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one hierarchy says."""

    segments: Segments
    container: ContainerRef | None


def _agreed(unified: _Reading | None, legacy: Sequence[_Reading]) -> ContainerRef | None:
    """
    Return what all hierarchies say, of which any may be forged, but not all alike.

    A process at the root of one is in no group of it: a runtime need not join them all.
    """
    everywhere = legacy if unified is None else [*legacy, unified]
    found = next((one for one in everywhere if one.container), None)
    if found is None:
        return None
    for one in everywhere:
        if one.container == found.container or not (one.container or one.segments):
            continue
        # Where the old hierarchies carry the container, older runtimes leave the process in
        # the new one where they themselves are: on the same node, which may be a container.
        shared = _shared(one.segments, found.segments)
        is_runtime = one is unified and one.container is None
        if not is_runtime or any(_resembles(each) for each in one.segments[shared:]):
            raise CgroupError(
                "the cgroup hierarchies place the process in different containers"
            )
    return found.container


def _shared(one: Segments, other: Segments) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(same))


# --- lines -----------------------------------------------------------------------------------

_LINE = re.compile(rb"(0|[1-9][0-9]{0,5}):([A-Za-z0-9_.,=-]*):(/[^\n]*)")
_REMOVED: Final = b" (deleted)"


def parse_lines(text: bytes) -> list[tuple[bytes, bytes]]:
    """
    Return controllers and path of each line; the new hierarchy has no controllers.

    Raises:
        CgroupError: not what the kernel writes.
    """
    if len(text) > MAX_CGROUP_BYTES:
        raise CgroupError("the process's list of cgroups is too long")
    if not text.endswith(b"\n"):
        raise CgroupError("the process's list of cgroups is cut off")
    lines = text[:-1].split(b"\n")
    if len(lines) > MAX_LINES:
        raise CgroupError("the process's list of cgroups is too long")
    numbers: set[bytes] = set()
    found: list[tuple[bytes, bytes]] = []
    for line in lines:
        # A path may hold colons, so the first two alone divide.
        parts = _LINE.fullmatch(line)
        if parts is None or (parts[1] == b"0") != (parts[2] == b"") or parts[1] in numbers:
            raise CgroupError("the process's list of cgroups is not what the kernel writes")
        if parts[3].endswith(_REMOVED):
            raise CgroupError("the process's cgroup was removed: its container has ended")
        numbers.add(parts[1])
        found.append((parts[2], parts[3]))
    return found


def _absolute(path: bytes, controllers: bytes, view: CgroupView) -> Segments:
    """
    Return *path* as the node itself would see it.

    Raises:
        CgroupError: it cannot be known, or no kernel writes such a path.
    """
    if view.roots is None:
        places: list[bytes] = []
    else:
        root = view.roots.get(controllers)
        if root is None:
            raise CgroupError(f"cgroup paths are relative to the agent's own: {view.missing}")
        places = list(root)
    inside = False
    for segment in path[1:].split(b"/") if path != b"/" else []:
        if segment in (b"", b"."):
            raise CgroupError("a cgroup path has an empty segment")
        if segment != b"..":
            places.append(segment)
            inside = True
        elif view.roots is not None and places and not inside:  # it goes up, then down
            places.pop()
        else:
            raise CgroupError("a cgroup path leads out of the root")
    return tuple(places)


def _prefix(text: str) -> Segments:
    if not re.fullmatch(r"/|(/[!-.0-~]+)+", text):
        raise PrefixError(f"a cgroup prefix is an absolute path such as /kubepods: {text!r}")
    segments = tuple(one.encode() for one in text.split("/") if one)
    if any(one in (b".", b"..") for one in segments):
        raise PrefixError(f"a cgroup prefix holds no '.' and no '..': {text!r}")
    if segments and segments[-1] == b"*":
        raise PrefixError(f"the last segment of a cgroup prefix must be known: {text!r}")
    return segments


# --- paths -----------------------------------------------------------------------------------

_ID = rb"(?P<id>[0-9a-f]{64})"
_PARTS = tuple(b"[0-9a-f]{%d}" % digits for digits in (8, 4, 4, 4, 12))
# A pod of the kubelet's own files has the MD5 of the file for a UID.
_POD = re.compile(rb"pod(?P<uid>" + b"-".join(_PARTS) + rb"|[0-9a-f]{32})")
_SLICE_UID = rb"pod(?P<uid>" + b"_".join(_PARTS) + rb"|[0-9a-f]{32})\.slice"
_POD_SCOPE = re.compile(rb"(?P<runtime>cri-containerd|crio|docker)-" + _ID + rb"\.scope")
_POD_FOLDER = re.compile(rb"(?:(?P<runtime>crio)-)?" + _ID)
_POD_NAME = re.compile(  # systemd's name for it, taken for a folder's
    rb"(?:[a-z0-9]+-)*kubepods(?:-burstable|-besteffort)?-" + _SLICE_UID
    + rb":(?P<runtime>cri-containerd|crio|docker):" + _ID
)  # fmt: skip
_ENGINE_SCOPE = re.compile(rb"(?P<runtime>docker|libpod)-" + _ID + rb"\.scope")
_ENGINE_FOLDER = re.compile(rb"(?:(?P<runtime>libpod)-(?:payload-)?)?" + _ID)
_PODMAN_FOLDER = re.compile(rb"(?P<runtime>libpod)-" + _ID)
_PODMAN_POD_FOLDER = re.compile(rb"[0-9a-f]{64}")
_PODMAN_POD_SLICE = re.compile(rb"[a-z]+-libpod_pod_[0-9a-f]{64}\.slice")
# Who minds a container from outside: the runtime's own, in the pod's cgroup at times.
_CONMON = re.compile(rb"(?:crio|libpod)-conmon-[0-9a-f]{64}(?:\.scope)?")
_QOS = (b"burstable", b"besteffort")
_RUNTIMES: Final = {
    b"cri-containerd": "containerd",
    b"crio": "cri-o",
    b"docker": "docker",
    b"libpod": "podman",
}
# Wider than the names above, so that what nearly is one is noticed.  32 digits are no sign of
# a container: systemd's transient units have them.
_CONTAINER_LIKE = re.compile(
    rb"[0-9a-f]{60}|(?:cri-containerd|crio|docker|libpod)(?:-payload)?[-:][0-9a-f]{12}",
    re.IGNORECASE,
)
_POD_LIKE = re.compile(
    rb"pod[0-9a-f]{8}[-_][0-9a-f]{4}|pod[0-9a-f]{32}|(?:^|-)kubepods(?:$|\.slice|-)",
    re.IGNORECASE,
)


def _pod_like(segment: bytes) -> bool:
    return _POD_LIKE.search(segment) is not None


def _resembles(segment: bytes) -> bool:
    """True for what a pod's or a container's cgroup could be called."""
    return _pod_like(segment) or _CONTAINER_LIKE.search(segment) is not None


def _container(segments: Segments, layout: CgroupLayout) -> ContainerRef | None:
    """
    Return the container of one absolute path, or None.

    Raises:
        CgroupError: it looks like one of ours and is none.
    """
    place = _pod_place if layout.grammar is _Grammar.PODS else _engine_place
    for prefix in layout.parsed:
        if not _below(segments, prefix):
            continue
        found = place(prefix, segments[len(prefix) :])
        if found is not None:
            return _innermost(found, segments)
    if layout.grammar is _Grammar.PODS and any(_pod_like(one) for one in segments):
        raise CgroupError(
            "the cgroup is named like a pod's, but is below none of the configured prefixes"
        )
    return None


def _below(segments: Segments, prefix: Segments) -> bool:
    return len(segments) >= len(prefix) and all(
        wanted in (b"*", one) for wanted, one in zip(prefix, segments, strict=False)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a path the container stands; *container* is None for one that minds it."""

    container: ContainerRef | None
    deeper: Segments


def _innermost(place: _Place, segments: Segments) -> ContainerRef | None:
    if any(_resembles(one) for one in place.deeper):
        raise CgroupError("the cgroup names a second pod or container below the first")
    if any(not 32 < byte < 127 for one in segments for byte in one):
        raise CgroupError("the cgroup's path is not plain ASCII")
    return place.container


def _ref(found: "re.Match[bytes]", uid: bytes | None = None) -> ContainerRef:
    runtime = _RUNTIMES.get(found["runtime"] or b"", "")
    pod_uid = None if uid is None else uid.replace(b"_", b"-").decode()
    return ContainerRef(found["id"].decode(), pod_uid, runtime)


def _pod_place(prefix: Segments, rest: Segments) -> _Place | None:
    """
    Return the place of a pod's container below *prefix*; None where others live there too.

    Raises:
        CgroupError: not a pod's, in a place that is for pods alone.
    """
    last = prefix[-1] if prefix else b""
    if not last or last.endswith(b".service"):
        found = _POD_NAME.fullmatch(rest[0]) if rest else None
        return None if found is None else _Place(_ref(found, found["uid"]), rest[1:])
    stem = last.removesuffix(b".slice")
    by_systemd = stem != last
    pod, name = _POD, _POD_FOLDER
    at = 0
    if by_systemd:
        folders = {stem + b"-" + qos + b".slice": stem + b"-" + qos for qos in _QOS}
        # The pod's own slice repeats the class of service, or has none as its parent has none.
        stem = folders.get(rest[0], stem) if rest else stem
        at = int(bool(rest) and rest[0] in folders)
        pod, name = re.compile(re.escape(stem) + b"-" + _SLICE_UID), _POD_SCOPE
    elif rest and rest[0] in _QOS:
        at = 1
    uid = pod.fullmatch(rest[at]) if len(rest) > at else None
    if uid is None:
        raise CgroupError("the cgroup is among the pods' and is no pod's")
    if len(rest) == at + 1:
        raise CgroupError("the cgroup is a pod's and names no container")
    deeper = rest[at + 2 :]
    if _CONMON.fullmatch(rest[at + 1]):
        # CRI-O's monitor, a process of the node's that serves the container and is not in it.
        return _Place(None, deeper)
    found = name.fullmatch(rest[at + 1])
    if found is None:
        raise CgroupError("the cgroup is a pod's and does not name a container as runtimes do")
    return _Place(_ref(found, uid["uid"]), deeper)


def _engine_place(prefix: Segments, rest: Segments) -> _Place | None:
    """
    Return the place of an engine's container below *prefix*; None where it is somebody else's.

    Raises:
        CgroupError: named nearly as a container is.
    """
    last = prefix[-1] if prefix else b""
    name, pod = _ENGINE_FOLDER, None
    if last.endswith(b".slice"):
        name, pod = _ENGINE_SCOPE, _PODMAN_POD_SLICE
    elif last == b"libpod_parent":
        # A plain ID is a pod here.  Elsewhere it is a container, which could make a folder
        # with another's name below its own.
        name, pod = _PODMAN_FOLDER, _PODMAN_POD_FOLDER
    if pod is not None and rest and pod.fullmatch(rest[0]):
        rest = rest[1:]
        if not rest:
            raise CgroupError("the cgroup is a pod's and names no container")
    if not rest:
        return None
    if _CONMON.fullmatch(rest[0]):
        return _Place(None, rest[1:])
    found = name.fullmatch(rest[0])
    if found is not None:
        return _Place(_ref(found), rest[1:])
    if _CONTAINER_LIKE.search(rest[0]):
        raise CgroupError("the cgroup is named nearly, but not quite, as a container's is")
    return None
