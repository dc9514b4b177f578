"""Containers from ``/proc/<pid>/cgroup``: every shape that real machines write."""

import itertools
import os
import random
import re
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cgroups import (
    CONTAINER,
    OTHER_CONTAINER,
    POD,
    Shape,
    cgroup_text,
    filled,
    shapes,
)
from tests.support.children import a_child
from workload_api.attestors import cgroup
from workload_api.attestors.cgroup import (
    ENGINE_PREFIXES,
    MAX_CGROUP_BYTES,
    MAX_LINES,
    POD_PREFIXES,
    CgroupError,
    CgroupLayout,
    ContainerRef,
    PrefixError,
    container_of,
    read_cgroup,
)
from workload_api.attestors.protocol import AttestationError

PODS = CgroupLayout.pods()
ENGINE = CgroupLayout.engine()
SHAPES = shapes("shapes")
POD_PATH = "/kubepods/burstable/pod{uid}/{id}"


@pytest.mark.parametrize("shape", SHAPES, ids=attrgetter("name"))
def test_sec_33_shapes(shape: Shape) -> None:
    """SEC-33: each shape gives its container and pod, none, or its reason to refuse."""
    if isinstance(shape.expect, str):
        with pytest.raises(CgroupError, match=re.escape(shape.expect)):
            shape.read()
        return
    found = shape.read()
    if shape.expect is None:
        assert found is None
    else:
        assert found is not None
        wanted = [one and filled(one) for one in shape.expect]
        assert [found.container_id, found.pod_uid, found.runtime] == wanted


def test_sec_33_there_are_shapes_enough() -> None:
    """SEC-33: at least 60 shapes with a container, of old, new and mixed hierarchies."""
    found = [one for one in SHAPES if isinstance(one.expect, list)]
    assert len(SHAPES) >= 60
    assert len(found) >= 60
    assert {one.expect[2] for one in found} == {"", "containerd", "cri-o", "docker", "podman"}
    assert len({one.name for one in SHAPES}) == len(SHAPES)
    assert {one.origin for one in SHAPES} == {"recorded", "documented", "made"}
    kinds = {
        ("unified" if all(line.startswith("0::") for line in one.lines) else "legacy")
        if len({line.startswith("0::") for line in one.lines}) == 1
        else "hybrid"
        for one in found
    }
    assert kinds == {"unified", "legacy", "hybrid"}


@pytest.mark.parametrize("prefix", [one for one in POD_PREFIXES if one != "/"])
def test_sec_33_each_prefix_matches_whole_segments_from_the_start(prefix: str) -> None:
    """SEC-33: below a prefix is a pod's; with anything in front or at its end it is none."""
    stem = prefix.rsplit("/", 1)[1].removesuffix(".slice")
    uid_, rest = POD.replace("-", "_"), f"/pod{POD}/{CONTAINER}"
    if prefix.endswith(".slice"):
        rest = f"/{stem}-pod{uid_}.slice/crio-{CONTAINER}.scope"
    elif prefix.endswith(".service"):
        rest = f"/kubepods-pod{uid_}.slice:cri-containerd:{CONTAINER}"
    found = container_of(cgroup_text(f"0::{prefix}{rest}"), PODS)
    assert found == ContainerRef(CONTAINER, POD)
    for forged in (f"/x{prefix}{rest}", f"{prefix}x{rest}", f"/x{prefix[1:]}{rest}"):
        with pytest.raises(CgroupError, match="below none of the configured prefixes"):
            container_of(cgroup_text(f"0::{forged}"), PODS)


@pytest.mark.parametrize("byte", range(256))
def test_sec_33_every_byte_in_an_id(byte: int) -> None:
    """SEC-33: of 256 bytes 16 may stand in an ID, and nothing behind it."""
    wrong = CONTAINER[:-1].encode() + bytes([byte])
    text = cgroup_text(f"0::/kubepods/pod{POD}/").rstrip(b"\n") + wrong + b"\n"
    if byte in b"0123456789abcdef":
        assert container_of(text, PODS) == ContainerRef(wrong.decode(), POD)
    else:
        with pytest.raises(CgroupError):
            container_of(text, PODS)
    if bytes([byte]) != b"\n":
        with pytest.raises(CgroupError):
            container_of(cgroup_text("0::" + POD_PATH)[:-1] + bytes([byte]) + b"\n", PODS)


def test_sec_33_an_engines_container_is_no_pods_and_the_reverse() -> None:
    """SEC-33: each layout knows its own: nobody is two containers at once."""
    for shape in SHAPES:
        if shape.prefixes or shape.roots is not None or not isinstance(shape.expect, list):
            continue
        other = ENGINE if shape.layout == "pods" else PODS
        assert container_of(shape.text, other) is None, shape.name


def test_the_outermost_prefix_wins() -> None:
    """SEC-33: of two prefixes that match, the one nearer to the root decides."""
    layout = CgroupLayout.engine(("/a/b", "/a"))
    text = cgroup_text("0::/a/{id}/x")
    assert container_of(text, layout) == ContainerRef(CONTAINER)
    with pytest.raises(CgroupError, match="second"):
        container_of(cgroup_text("0::/a/{id}/b/{id2}"), CgroupLayout.engine(("/a/*/b", "/a")))
    inner = CgroupLayout.engine(("/a/*/b",))
    assert container_of(cgroup_text("0::/a/{id}/b/{id2}"), inner) == ContainerRef(
        OTHER_CONTAINER
    )


def test_a_star_is_one_segment() -> None:
    """SEC-33: a star in a prefix stands for exactly one segment, whatever it is called."""
    layout = CgroupLayout.pods(("/docker/*/kubepods",))
    assert container_of(cgroup_text("0::/docker/node" + POD_PATH), layout) is not None
    for path in ("/docker" + POD_PATH, "/docker/a/b" + POD_PATH, "/x/docker/a" + POD_PATH):
        with pytest.raises(CgroupError, match="prefixes"):
            container_of(cgroup_text("0::" + path), layout)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "kubepods",
        "/kubepods/",
        "//kubepods",
        "/a/../b",
        "/a/./b",
        "/a b",
        "/é",
        "/a/*",
        "/*",
    ],
)
def test_a_prefix_that_can_match_nothing(prefix: str) -> None:
    """A prefix is an absolute path of plain segments, or the settings are refused."""
    for make in (CgroupLayout.pods, CgroupLayout.engine):
        with pytest.raises(PrefixError, match="prefix"):
            make((prefix,))


def test_the_defaults_cannot_be_a_users() -> None:
    """SEC-33: no default prefix lies where systemd lets an ordinary user make folders."""
    for prefix in (*POD_PREFIXES, *ENGINE_PREFIXES):
        assert "user" not in prefix
        assert "*" not in prefix


def test_the_file_has_a_limit() -> None:
    """SEC-33: 64 KiB and 256 lines are read, and not one more."""
    lines = [f"{i}:c{i}:/" for i in range(1, MAX_LINES)]
    assert container_of(cgroup_text("0::" + POD_PATH, *lines), PODS) is not None
    with pytest.raises(CgroupError, match="too long"):
        container_of(cgroup_text("0::" + POD_PATH, *lines, "999:x:/"), PODS)
    whole = cgroup_text("0::" + POD_PATH)
    room = MAX_CGROUP_BYTES - len(whole) - 1
    fits = whole[:-1] + b"/" + b"x" * room + b"\n"
    assert len(fits) == MAX_CGROUP_BYTES
    assert container_of(fits, PODS) is not None
    with pytest.raises(CgroupError, match="too long"):
        container_of(fits[:-1] + b"x\n", PODS)


@pytest.mark.parametrize("text", [b"", b"0::/", b"\n", cgroup_text("0::" + POD_PATH)[:-1]])
def test_a_file_that_is_cut_off(text: bytes) -> None:
    """SEC-33: without its last newline a file may lack what it contradicts itself by."""
    with pytest.raises(CgroupError, match=r"cut off|not what the kernel writes"):
        container_of(text, PODS)


def test_reading_a_real_process() -> None:
    """What the kernel says of a child of ours is what it says of us."""
    with a_child() as child:
        text = read_cgroup(child.pid)
        assert text == Path("/proc/self/cgroup").read_bytes()
        container_of(text, PODS)
        container_of(text, ENGINE)


def test_reading_a_process_that_is_gone() -> None:
    """SEC-31: of a process that ended and was waited for there is nothing to read."""
    with a_child() as child:
        child.end()
        with pytest.raises(AttestationError, match="cannot be read"):
            read_cgroup(child.pid)


def test_reading_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-33: a file that is longer than any real one is refused, not cut."""
    length = len(read_cgroup(os.getpid()))
    monkeypatch.setattr(cgroup, "MAX_CGROUP_BYTES", length)
    assert len(read_cgroup(os.getpid())) == length
    monkeypatch.setattr(cgroup, "MAX_CGROUP_BYTES", length - 1)
    with pytest.raises(CgroupError, match="too long"):
        read_cgroup(os.getpid())


# --- fuzz ------------------------------------------------------------------------------------

_BELOW_A_PREFIX = re.compile(
    rb"(?m)^[0-9]+:[^:\n]*:(?:"
    + b"|".join(
        re.escape(one.rstrip("/")).encode() for one in (*POD_PREFIXES, *ENGINE_PREFIXES)
    )
    + rb")/[^\n]*$"
)


def check(text: bytes) -> ContainerRef | None:
    """Read *text* by both layouts: a container stands in it below a prefix."""
    for layout in (PODS, ENGINE):
        try:
            found = container_of(text, layout)
        except CgroupError:
            continue
        if found is None:
            continue
        lines = [
            line
            for line in _BELOW_A_PREFIX.findall(text)
            if found.container_id.encode() in line
        ]
        assert lines
        assert re.fullmatch("[0-9a-f]{64}", found.container_id)
        assert all(len(re.findall(rb"[0-9a-f]{64}", line)) <= 2 for line in lines)
        if layout is PODS:
            assert found.pod_uid is not None
            spellings = {found.pod_uid.encode(), found.pod_uid.replace("-", "_").encode()}
            assert any(b"pod" + one in line for one in spellings for line in lines)
        else:
            assert found.pod_uid is None
        return found
    return None


SEGMENTS = st.sampled_from(
    [
        *("kubepods", "kubepods.slice", "burstable", "besteffort", "kubepods-burstable.slice"),
        *("system.slice", "docker", "containerd.service", "user.slice", "machine.slice", ".."),
        *("pod{uid}", "pod{uid2}", "kubepods-burstable-pod{uid_}.slice", "libpod_parent"),
        *("{id}", "{id2}", "{ID}", "crio-{id}.scope", "docker-{id}.scope", "libpod-{id}"),
        *("kubepods-burstable-pod{uid_}.slice:cri-containerd:{id}", "init.scope", "x", ""),
    ]
)
PATHS = st.lists(SEGMENTS, max_size=7).map(lambda found: "/" + "/".join(found))
FILES = st.lists(PATHS, min_size=1, max_size=4).map(
    lambda paths: cgroup_text(
        *(f"{i}:{'' if i == 0 else f'c{i}'}:{p}" for i, p in enumerate(paths))
    )
)


@given(st.binary(max_size=400))
@settings(max_examples=500, deadline=None)
def test_sec_33_any_bytes(text: bytes) -> None:
    """SEC-33: any bytes are a container that stands in them, none, or refused."""
    check(text)


@given(FILES)
@settings(max_examples=1000, deadline=None)
def test_sec_33_any_paths_of_real_segments(text: bytes) -> None:
    """SEC-33: any mixture of real names is a container that stands in it, none, or refused."""
    check(text)


PLAIN = r"(?:/(?:burstable|docker|libpod_parent|(?:system|user)\.slice|containerd\.service|x))*"
# The grammar once more, on names instead of IDs, by another road than the parser's.
ANCHORED = {
    PODS: re.compile(
        r"(?:/kubepods(?:/burstable)?/pod\{uid\}/\{id\}"
        r"|/kubepods\.slice/(?:kubepods-burstable\.slice/kubepods-burstable-pod\{uid_\}\.slice"
        r"|kubepods-pod\{uid_\}\.slice)/(?:crio|docker)-\{id\}\.scope"
        r"|(?:/system\.slice/containerd\.service)?/kubepods-pod\{uid_\}\.slice:crio:\{id\})"
        + PLAIN
    ),
    ENGINE: re.compile(
        r"(?:/docker/(?:libpod-)?\{id\}|/system\.slice/docker-\{id\}\.scope"
        r"|/libpod_parent(?:/\{id\})?/libpod-\{id\})" + PLAIN
    ),
}
ALPHABET = (
    *("kubepods", "kubepods.slice", "burstable", "kubepods-burstable.slice", "pod{uid}"),
    *("kubepods-burstable-pod{uid_}.slice", "kubepods-pod{uid_}.slice", "crio-{id}.scope"),
    *("kubepods-pod{uid_}.slice:crio:{id}", "system.slice", "containerd.service", "docker"),
    *("{id}", "docker-{id}.scope", "libpod_parent", "libpod-{id}", "user.slice", "x"),
)
FILLED = {one: filled(one).encode() for one in ALPHABET}


@pytest.mark.parametrize("first", ALPHABET, ids=range(len(ALPHABET)))
def test_sec_33_every_path_of_four_names(first: str) -> None:
    """SEC-33: of all 111,150 paths of up to four real names, those that are anchored count."""
    for count in range(4):
        for rest in itertools.product(ALPHABET, repeat=count):
            path = "/" + "/".join((first, *rest))
            text = b"0::/" + b"/".join(FILLED[one] for one in (first, *rest)) + b"\n"
            for layout, anchored in ANCHORED.items():
                try:
                    found = container_of(text, layout) is not None
                except CgroupError:
                    found = False
                assert found is (anchored.fullmatch(path) is not None), path


def test_sec_33_damaged_shapes() -> None:
    """SEC-33: 30,000 real files with a few bytes changed give what stands there, or nothing."""
    chance = random.Random(33)
    texts = [one.text for one in SHAPES + shapes("forged")]
    found = 0
    for _ in range(30_000):
        text = bytearray(chance.choice(texts))
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(text))
            match chance.randrange(4):
                case 0:
                    text[at] = chance.choice([*b"0a5fpod/-_", chance.randrange(256)])
                case 1:
                    del text[at : at + chance.randint(1, 40)]
                case 2:
                    text[at:at] = text[chance.randrange(len(text)) :][: chance.randint(1, 90)]
                case _:
                    text[at:at] = chance.choice(
                        [b"/", b"/../", b":", b"\n", b" (deleted)", b"\0"]
                    )
            if not text:
                break
        found += check(bytes(text)) is not None
    assert 300 < found < 29_700  # both outcomes were really met
