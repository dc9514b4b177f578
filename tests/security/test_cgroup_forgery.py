"""Cgroup paths that were made to look like a pod's or a container's (SEC-33)."""

import re
from operator import attrgetter

import pytest

from tests.support.cgroups import Shape, cgroup_text, shapes
from workload_api.attestors.cgroup import CgroupError, CgroupLayout, CgroupView, container_of

FORGED = shapes("forged")
PODS = CgroupLayout.pods()
ENGINE = CgroupLayout.engine()
USER = "/user.slice/user-1000.slice/user@1000.service"
POD_PATH = "/kubepods/burstable/pod{uid}/{id}"


@pytest.mark.parametrize("shape", FORGED, ids=attrgetter("name"))
def test_sec_33_forged(shape: Shape) -> None:
    """SEC-33: what is made up is refused for its reason, or is nobody's container."""
    if shape.expect is None:
        assert shape.read() is None
    else:
        with pytest.raises(CgroupError, match=re.escape(shape.expect)):
            shape.read()


@pytest.mark.parametrize(
    "shape",
    [one for one in shapes("shapes") if isinstance(one.expect, list) and not one.prefixes],
    ids=attrgetter("name"),
)
def test_sec_33_the_same_below_a_users_folder(shape: Shape) -> None:
    """SEC-33: each real path, made below the folder that systemd gives a user, is no pod's."""
    lines = ["0::" + POD_PATH] if shape.roots is not None else shape.lines
    # Whole segments are put in front; what was at the root is at the user's own folder.
    paths = [re.sub(r"^(\*|[^:]*:[^:]*):(.*?)/?$", rf"\1:{USER}\2", line) for line in lines]
    for layout in (PODS, ENGINE):
        try:
            assert container_of(cgroup_text(*paths), layout) is None
        except CgroupError as error:
            assert "none of the configured prefixes" in str(error)


def test_sec_33_one_line_of_many_is_enough_to_refuse() -> None:
    """SEC-33: of twelve hierarchies that agree, any one that does not makes it a forgery."""
    lines = cgroup_text("*:" + POD_PATH).decode().splitlines()
    assert container_of(cgroup_text(*lines), PODS) is not None
    for at, line in enumerate(lines):
        head = line.rsplit(":", 1)[0]
        for path in ("/user.slice", "/kubepods/burstable/pod{uid}/{id2}", "/docker/{id2}"):
            forged = [*lines[:at], f"{head}:{path}", *lines[at + 1 :]]
            with pytest.raises(CgroupError, match="different containers"):
                container_of(cgroup_text(*forged), PODS)
        kept = [*lines[:at], f"{head}:/", *lines[at + 1 :]]
        assert container_of(cgroup_text(*kept), PODS) is not None


def test_sec_33_a_private_namespace_gives_no_new_root() -> None:
    """SEC-33: seen from a namespace whose root is known, a user's folder is still a user's."""
    view = CgroupView({b"": (b"kubepods", b"x", b"y")})
    text = cgroup_text(f"0::/../../..{USER}{POD_PATH}")
    with pytest.raises(CgroupError, match="none of the configured prefixes"):
        container_of(text, PODS, view)


def test_sec_33_below_the_agents_own_folder_is_the_agents() -> None:
    """SEC-33: who makes a pod's path below the agent's own container is in that container."""
    root = (b"system.slice", b"agent.service")
    with pytest.raises(CgroupError, match="none of the configured prefixes"):
        container_of(cgroup_text("0::" + POD_PATH), PODS, CgroupView({b"": root}))
    with pytest.raises(CgroupError, match="hostPID"):
        container_of(cgroup_text("0::" + POD_PATH), PODS, CgroupView({}, "needs hostPID"))


def test_sec_33_reasons_quote_nothing_that_was_forged() -> None:
    """SEC-33: a reason never repeats a path, which is the forger's to choose."""
    for shape in FORGED:
        if isinstance(shape.expect, str):
            with pytest.raises(CgroupError) as caught:
                shape.read()
            reason = str(caught.value)
            assert "/" not in reason
            assert reason.isascii()
            assert reason.isprintable()
