"""
Cgroups of this very kernel (SEC-33): real forgeries, and real namespaces.

Everything lies below a folder of our own in each hierarchy, so that nothing of the machine's is
touched; pods are looked for below it.  Only children of ours are moved.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cgroups import CONTAINER, OTHER_CONTAINER, OTHER_POD, POD
from tests.support.children import Child, a_child, a_python
from tests.support.stack import ROOT, a_folder
from workload_api.attestors.cgroup import (
    HOST,
    CgroupError,
    CgroupLayout,
    ContainerRef,
    container_of,
    parse_lines,
    read_cgroup,
)
from workload_api.attestors.cgroupns import INITIAL_NAMESPACE, own_view

pytestmark = pytest.mark.root
USER = 1000
MOUNTS = Path("/sys/fs/cgroup")
PODS = CgroupLayout.pods()
CONTAINER_PATH = f"kubepods/burstable/pod{POD}/{CONTAINER}"
OTHER_PATH = f"kubepods/besteffort/pod{OTHER_POD}/{OTHER_CONTAINER}"


@dataclass(frozen=True)
class Cgroup:
    """A folder of our own in every hierarchy of this machine."""

    name: str
    roots: dict[str, Path]

    @property
    def layout(self) -> CgroupLayout:
        """Pods are below it."""
        return CgroupLayout.pods((f"/{self.name}/kubepods",))

    def all_at(self, path: str) -> dict[str, str]:
        """What a view says that is rooted at *path* in each hierarchy."""
        return dict.fromkeys(self.roots, f"/{self.name}/{path}")

    def folders(self, path: str) -> list[Path]:
        """Make *path* in each hierarchy that takes processes as it is; return the folders."""
        made = [root / self.name / path for root in self.roots.values()]
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        return made

    def place(self, pid: int, path: str) -> None:
        """Move process *pid* there."""
        for folder in self.folders(path):
            (folder / "cgroup.procs").write_text(str(pid))

    def give(self, path: str, uid: int) -> None:
        """Let a user do there what he likes, as systemd does for every user."""
        for folder in self.folders(path):
            for one in (folder, folder / "cgroup.procs", folder / "cgroup.subtree_control"):
                if one.exists():
                    os.chown(one, uid, uid)


def hierarchies() -> dict[str, Path]:
    """Where each hierarchy of this machine is mounted."""
    found = {}
    for controllers, _ in parse_lines(Path("/proc/self/cgroup").read_bytes()):
        name = controllers.decode().removeprefix("name=")
        places = [MOUNTS / name] if name else [MOUNTS, MOUNTS / "unified"]
        for place in places:
            if (place / "cgroup.procs").exists():
                found[controllers.decode()] = place
    return found


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A folder of our own; removed with all below."""
    if os.geteuid():
        pytest.skip("left out: only root makes cgroups at the root")
    roots = hierarchies()
    name = f"si-{os.getpid()}"
    try:
        for root in roots.values():
            (root / name).mkdir()
            if (root / "cpuset.cpus").exists():
                # Of the old hierarchies this one takes nobody before it knows where he may run.
                (root / "cgroup.clone_children").write_text("1")
    except OSError as error:
        for root in roots.values():
            with contextlib.suppress(OSError):
                (root / name).rmdir()
        pytest.skip(f"left out: this machine lets us make no cgroups: {error}")
    yield Cgroup(name, roots)
    for root in roots.values():
        for folder, _, _ in os.walk(root / name, topdown=False):
            removed(Path(folder))


def removed(folder: Path) -> None:
    """Remove a cgroup; its last process may take a moment to leave it."""
    for _ in range(200):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.01)
        else:
            return
    folder.rmdir()


def paths(pid: int) -> set[str]:
    """The paths of a process."""
    return {path.decode() for _, path in parse_lines(read_cgroup(pid))}


# --- who is where ----------------------------------------------------------------------------


def test_sec_33_a_process_where_a_kubelet_puts_it(cgroup: Cgroup) -> None:
    """SEC-33: placed by root below the prefix it is in that container, and no longer."""
    view = own_view()
    with a_child() as child:
        places = [
            (".", None),
            (CONTAINER_PATH, ContainerRef(CONTAINER, POD)),
            (OTHER_PATH, ContainerRef(OTHER_CONTAINER, OTHER_POD)),
            (".", None),
        ]
        for path, wanted in places:
            cgroup.place(child.pid, path)
            assert container_of(read_cgroup(child.pid), cgroup.layout, view) == wanted


def test_sec_33_a_process_in_two_places(cgroup: Cgroup) -> None:
    """SEC-33: in one hierarchy in a container, in another in an ordinary folder: refused."""
    if len(cgroup.roots) < 2:
        pytest.skip("left out: this machine has one hierarchy alone")
    with a_child() as child:
        cgroup.place(child.pid, "ordinary")
        text = read_cgroup(child.pid)
        *most, last = reversed(cgroup.folders(CONTAINER_PATH))  # the new hierarchy comes first
        for folder in most:
            (folder / "cgroup.procs").write_text(str(child.pid))
            with pytest.raises(CgroupError, match="different containers"):
                container_of(read_cgroup(child.pid), cgroup.layout)
        (last / "cgroup.procs").write_text(str(child.pid))
        assert container_of(read_cgroup(child.pid), cgroup.layout) is not None
        assert container_of(text, cgroup.layout) is None


# --- forgeries -------------------------------------------------------------------------------

FORGE = """
import os, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[1])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
print("ready", flush=True)
for line in sys.stdin:
    for folder in line.split():
        os.makedirs(folder, exist_ok=True)
        with open(folder + "/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
    print("done", flush=True)
"""


@contextlib.contextmanager
def a_forger(cgroup: Cgroup, home: str) -> Iterator[Child]:
    """A process of an ordinary user, in a folder *home* that was given to him."""
    cgroup.give(home, USER)
    with a_python(FORGE, str(USER), cwd="/") as child:
        assert child.hear() == "ready"
        cgroup.place(child.pid, home)
        yield child


def forge(child: Child, folders: Sequence[Path]) -> None:
    """Let it make *folders* and go there; it may fail."""
    child.say(" ".join(str(one) for one in folders))
    assert child.hear() == "done"


def test_sec_33_an_ordinary_user_forges_a_pods_path(cgroup: Cgroup) -> None:
    """SEC-33: uid 1000 makes a perfect path in a folder of his own: refused, in any layout."""
    home = "user.slice/user-1000.slice/user@1000.service"
    with a_forger(cgroup, home) as child:
        for root in cgroup.roots.values():
            # Hierarchy by hierarchy: no state on the way is a container's either.
            forge(child, [root / cgroup.name / home / CONTAINER_PATH])
            for layout in (PODS, cgroup.layout):
                with pytest.raises(CgroupError, match="none of the configured prefixes"):
                    container_of(read_cgroup(child.pid), layout)
            assert container_of(read_cgroup(child.pid), CgroupLayout.engine()) is None
        assert paths(child.pid) == {f"/{cgroup.name}/{home}/{CONTAINER_PATH}"}
        assert Path(f"/proc/{child.pid}").stat().st_uid == USER


def test_sec_33_a_container_forges_another_below_itself(cgroup: Cgroup) -> None:
    """SEC-33: a container that may make cgroups is never another one, and no longer itself."""
    for forged in (OTHER_CONTAINER, OTHER_PATH, f"cri-containerd-{OTHER_CONTAINER}.scope"):
        with a_forger(cgroup, CONTAINER_PATH) as child:
            assert container_of(read_cgroup(child.pid), cgroup.layout) == ContainerRef(
                CONTAINER, POD
            )
            forge(child, [one / forged for one in cgroup.folders(CONTAINER_PATH)])
            assert all(one.endswith(forged) for one in paths(child.pid))
            with pytest.raises(CgroupError, match="second pod or container"):
                container_of(read_cgroup(child.pid), cgroup.layout)


def test_sec_33_plain_folders_below_a_container_change_nothing(cgroup: Cgroup) -> None:
    """SEC-33: systemd in a container makes folders of its own: it is that container still."""
    with a_forger(cgroup, CONTAINER_PATH) as child:
        folders = cgroup.folders(CONTAINER_PATH)
        forge(child, [one / "system.slice/sshd.service" for one in folders])
        assert container_of(read_cgroup(child.pid), cgroup.layout) == ContainerRef(
            CONTAINER, POD
        )


MOUNT = """
mount --bind "$1" "$2" && mount --bind "$3" /proc/$$/cgroup && cat /proc/$$/cgroup
echo done; read line; exec sleep 60
"""


def test_sec_33_mounts_forge_nothing(cgroup: Cgroup) -> None:
    """SEC-33: uid 1000 mounts a pod's cgroup, and a file over his own: we read the same."""
    victim = cgroup.folders(CONTAINER_PATH)[-1]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh"]
    with a_folder(open_to_all=True) as folder:
        fake = folder / "fake"
        fake.write_text(f"0::/kubepods/burstable/pod{POD}/{CONTAINER}\n")
        place = folder / "place"
        place.mkdir()
        arguments = [str(one) for one in (victim, place, fake)]
        as_user = {"user": USER, "group": USER, "extra_groups": []}
        with a_child(*command, *arguments, cwd="/", **as_user) as child:
            heard = child.hear()
            if heard == "done" or not heard:
                pytest.skip("left out: this machine lets an ordinary user mount nothing")
            assert heard == fake.read_text().rstrip("\n")  # it deceives itself
            assert CONTAINER in Path(f"/proc/{child.pid}/mountinfo").read_text()
            assert read_cgroup(child.pid) == read_cgroup(os.getpid())
            assert container_of(read_cgroup(child.pid), PODS, own_view()) is None


# --- namespaces ------------------------------------------------------------------------------

AGENT = """
import json, os, sys
from workload_api.attestors.cgroup import CgroupError, CgroupLayout, container_of, read_cgroup
from workload_api.attestors.cgroupns import TREES, Tree, own_view

sys.stdin.readline()
for line in sys.stdin:
    order = json.loads(line)
    trees = [Tree(**one) for one in order["trees"]] if "trees" in order else TREES
    view = own_view(trees)
    answer = {"roots": None if view.roots is None else {
        name.decode(): "/" + b"/".join(root).decode() for name, root in view.roots.items()
    }}
    for name, pid in order.get("pids", {}).items():
        with open(f"/proc/{pid}/cgroup") as file:
            answer[name + "_text"] = file.read()
        try:
            found = container_of(read_cgroup(pid), CgroupLayout.pods(order["prefixes"]), view)
            answer[name] = found and [found.container_id, found.pod_uid]
        except CgroupError as error:
            answer[name] = str(error)
    print(json.dumps(answer), flush=True)
"""


@contextlib.contextmanager
def an_agent(cgroup: Cgroup, home: str, *unshare: str) -> Iterator[Child]:
    """A process that entered a cgroup namespace of its own in *home*, and reads from there."""
    start = f'read line; exec unshare {" ".join(unshare)} "$@"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with a_child(
        "sh", "-c", start, "sh", sys.executable, "-u", "-c", AGENT, env=environment, cwd=ROOT
    ) as child:
        cgroup.place(child.pid, home)
        child.say("go")
        child.say("go")
        yield child


def ask(agent: Child, cgroup: Cgroup, **order: Any) -> Any:
    """What it reads."""
    order["prefixes"] = cgroup.layout.prefixes
    agent.say(json.dumps(order))
    return json.loads(agent.hear())


def test_sec_33_we_are_in_the_nodes_namespace() -> None:
    """SEC-33: in the namespace that Linux starts with, paths are read as they are."""
    if os.stat("/proc/self/ns/cgroup").st_ino != INITIAL_NAMESPACE:
        pytest.skip("left out: the tests themselves run in a cgroup namespace of their own")
    assert own_view(()) == HOST


@pytest.mark.parametrize("home", ["agent", OTHER_PATH], ids=["service", "pod"])
def test_sec_33_from_a_namespace_of_our_own(cgroup: Cgroup, home: str) -> None:
    """SEC-33: behind a private namespace paths begin with "..", and are resolved for real."""
    with a_child() as pod, a_child() as host, an_agent(cgroup, home, "--cgroup") as agent:
        cgroup.place(pod.pid, CONTAINER_PATH)
        cgroup.place(host.pid, "host.service")
        pids = {"pod": pod.pid, "host": host.pid, "self": agent.pid}
        found = ask(agent, cgroup, pids=pids)
        assert found["roots"] == cgroup.all_at(home)
        assert f"/../{CONTAINER_PATH}" in found["pod_text"] or "/../../" in found["pod_text"]
        assert cgroup.name not in found["pod_text"]
        assert found["pod"] == [CONTAINER, POD]
        assert found["host"] is None
        assert found["self"] == (None if home == "agent" else [OTHER_CONTAINER, OTHER_POD])
        # The node's own tree, mounted where ours would be, serves as well as the first process.
        node = [{"path": str(MOUNTS)}]
        assert ask(agent, cgroup, pids=pids, trees=node) == found


def test_sec_33_what_cannot_be_learnt_is_refused(cgroup: Cgroup) -> None:
    """SEC-33: without the node's tree every path is refused, with what is to be done."""
    with a_child() as pod, an_agent(cgroup, "agent", "--cgroup") as agent:
        cgroup.place(pod.pid, CONTAINER_PATH)
        found = ask(agent, cgroup, pids={"pod": pod.pid, "self": agent.pid}, trees=[])
        assert found["roots"] == {}
        assert "hostPID" in found["pod"]
        assert "hostPID" in found["self"]


def test_sec_33_we_were_moved_below_our_own_root(cgroup: Cgroup) -> None:
    """SEC-33: the namespace's root is learnt, not the place where we happen to be."""
    with an_agent(cgroup, "agent", "--cgroup") as agent:
        assert ask(agent, cgroup)["roots"]
        cgroup.place(agent.pid, "agent/init.scope")
        found = ask(agent, cgroup)
        assert found["roots"] == cgroup.all_at("agent")


def test_sec_33_we_were_moved_out_of_our_own_root(cgroup: Cgroup) -> None:
    """SEC-33: outside our own root its name cannot be seen any more: refused, not guessed."""
    with a_child() as pod, an_agent(cgroup, "agent", "--cgroup") as agent:
        assert ask(agent, cgroup)["roots"]
        cgroup.place(pod.pid, CONTAINER_PATH)
        cgroup.place(agent.pid, "elsewhere")
        found = ask(agent, cgroup, pids={"pod": pod.pid})
        assert found["roots"] == {}
        assert "hostPID" in found["pod"]


def test_sec_33_a_tree_that_begins_at_our_own_root(cgroup: Cgroup, tmp_path: Path) -> None:
    """SEC-33: what a runtime mounts into a container begins there, and is not the node's."""
    mount = f"""'mount -t cgroup2 none {tmp_path} && exec "$@"'"""
    with an_agent(cgroup, "agent", "--cgroup", "--mount", "sh", "-c", mount, "sh") as agent:
        assert ask(agent, cgroup, trees=[{"path": str(tmp_path)}])["roots"] == {}
        # Taken at its word, as only the first process's is, it would call us the root.
        taken = ask(agent, cgroup, trees=[{"path": str(tmp_path), "whole": True}])
        assert taken["roots"] == {"": "/"}


# A first process with one beside it, which takes its own cgroup namespace.
BESIDE = """'exec 3<&0; (exec unshare --cgroup "$@" <&3) & wait'"""
# The same, but the first process has a namespace and a mount of its own, as a node of kind.
KIND = """'
mount -t cgroup2 none /sys/fs/cgroup && mkdir -p /sys/fs/cgroup/deeper/agent && exec 3<&0
(echo 0 > /sys/fs/cgroup/deeper/agent/cgroup.procs; exec unshare --cgroup "$@" <&3) & wait
'"""
IN_PIDS = ("--pid", "--fork", "--kill-child", "--mount-proc")
FIRST = [{"path": "/proc/1/root/sys/fs/cgroup", "whole": True}]


def test_sec_33_by_the_first_process(cgroup: Cgroup) -> None:
    """SEC-33: with hostPID the node's tree is found through the first process alone."""
    with an_agent(cgroup, CONTAINER_PATH, *IN_PIDS, "sh", "-c", BESIDE, "sh") as agent:
        found = ask(agent, cgroup, pids={"first": 1}, trees=FIRST)
        assert found["roots"] == cgroup.all_at(CONTAINER_PATH)
        assert set(found["first_text"].split()) >= {"0::/"}
        assert found["first"] == [CONTAINER, POD]


def test_sec_33_where_the_node_is_a_container(cgroup: Cgroup) -> None:
    """SEC-33: in kind the tree begins at the node, and so do the paths that it knows."""
    if "" not in cgroup.roots:
        pytest.skip("left out: this machine has no unified hierarchy")
    unshare = ("--cgroup", "--mount", *IN_PIDS, "sh", "-c", KIND, "sh")
    with an_agent(cgroup, "node", *unshare) as agent:
        assert ask(agent, cgroup)["roots"] == {"": "/deeper/agent"}


def test_sec_33_in_the_nodes_own_namespace(cgroup: Cgroup) -> None:
    """SEC-33: beside the first process of a container (kind) we read what it reads."""
    with an_agent(cgroup, "node", "--cgroup", *IN_PIDS) as agent:
        assert ask(agent, cgroup, trees=[])["roots"] is None
