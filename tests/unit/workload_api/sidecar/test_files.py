"""The folder of files that change together: whole, matching, with their modes, or none."""

import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spiffe_core import crashpoints
from spiffe_core.errors import PreconditionError
from tests.faults.points import SVID_FILES
from tests.support.stack import ROOT
from workload_api.sidecar.files import DATA, File, FilesError, Owner, SvidFolder

POINTS = (*(one.removeprefix("svid_files.") for one in SVID_FILES), "opened:2")
ROUNDS = 200


def a_set(mark: str, *more: str) -> dict[str, File]:
    """A pair, and more, whose contents show that they belong together."""
    names = ("svid.key", "svid.pem", *more)
    return {name: File(mark.encode(), 0o600 if "key" in name else 0o644) for name in names}


def seen(folder: Path) -> dict[str, str]:
    """What a reader finds: each name that is no secret of ours, with its content."""
    return {
        one.name: "" if one.is_dir() else one.read_text()
        for one in folder.iterdir()
        if not one.name.startswith("..")
    }


def hidden(folder: Path) -> list[str]:
    """What lies in the folder beside what readers open."""
    return sorted(one.name for one in folder.iterdir() if one.name.startswith(".."))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SvidFolder]:
    """A folder, held."""
    with SvidFolder(tmp_path / "svids", "dir") as made:
        yield made


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A umask that keeps nothing from anybody."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_what_is_written(folder: SvidFolder) -> None:
    """Every file is there by its name, and a second set takes the place of the first."""
    folder.write(a_set("one", "extra"))
    assert seen(folder.path) == {"svid.key": "one", "svid.pem": "one", "extra": "one"}
    folder.write(a_set("two"))
    assert seen(folder.path) == {"svid.key": "two", "svid.pem": "two"}
    folder.tidy()
    assert len(hidden(folder.path)) == 2, "one set, and the link to it"


def test_names_stay_openable(folder: SvidFolder) -> None:
    """Who looked a name up before a change can still open it, until the folder is tidied."""
    folder.write(a_set("one"))
    resolved = (folder.path / "svid.pem").resolve()
    folder.write(a_set("two"))
    assert resolved.read_text() == "one"
    folder.tidy()
    assert not resolved.exists()


def test_some_are_kept(folder: SvidFolder) -> None:
    """What the writer asks to keep stays, with its mode, beside what it writes."""
    folder.write(a_set("one", "bundle"))
    folder.write({"jwt": File(b"two", 0o640)}, keep=lambda name: name.startswith("svid."))
    assert seen(folder.path) == {"svid.key": "one", "svid.pem": "one", "jwt": "two"}
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in folder.path.glob("[!.]*")}
    assert modes == {"svid.key": 0o600, "svid.pem": 0o644, "jwt": 0o640}


def test_sec_90_modes_under_any_umask(open_umask: None, tmp_path: Path) -> None:
    """Under umask 0 a key is 0600 from the moment it exists, in a folder that nobody enters."""
    found: list[tuple[str, int, int]] = []

    def look() -> None:
        for one in (tmp_path / "svids").glob("..set-*/*"):
            mode = stat.S_IMODE(one.stat().st_mode)
            found.append((one.name, mode, stat.S_IMODE(one.parent.stat().st_mode)))
        crashpoints.arm("svid_files.opened", look)

    crashpoints.arm("svid_files.opened", look)
    try:
        with SvidFolder(tmp_path / "svids", "dir") as folder:
            folder.write(a_set("one"))
    finally:
        crashpoints.arm("", lambda: None)
    assert ("svid.key", 0o600, 0o700) in found
    assert {(mode, above) for _, mode, above in found} <= {(0o600, 0o700), (0o644, 0o700)}
    assert stat.S_IMODE((tmp_path / "svids").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "svids" / "svid.key").stat().st_mode) == 0o600


def test_the_owner(tmp_path: Path) -> None:
    """The files and the folder that was made for them belong to whom the setting names."""
    gid = os.getgroups()[-1] if os.getgroups() else os.getegid()
    with SvidFolder(tmp_path / "svids", "dir", owner=Owner(gid=gid), mode=0o750) as folder:
        folder.write(a_set("one"))
        found = (tmp_path / "svids").stat()
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (gid, 0o750)
        assert {one.stat().st_gid for one in (tmp_path / "svids").glob("[!.]*")} == {gid}


def test_an_owner_who_may_not_be_named(tmp_path: Path) -> None:
    """A change of owner that the kernel refuses changes nothing that is there."""
    if os.geteuid() == 0:
        pytest.skip("root may name any owner")
    with SvidFolder(tmp_path / "svids", "dir") as folder:
        folder.write(a_set("one"))
    with SvidFolder(tmp_path / "svids", "dir", owner=Owner(uid=0)) as folder:
        with pytest.raises(FilesError, match="Operation not permitted"):
            folder.write(a_set("two"))
    assert set(seen(tmp_path / "svids").values()) == {"one"}


@pytest.mark.parametrize("name", ["svid.key", "..new", "..data"])
def test_planted_links(tmp_path: Path, name: str) -> None:
    """A link that lies where we write is replaced; what it leads to is not touched."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").write_text("theirs")
    (tmp_path / "svids").mkdir()
    (tmp_path / "svids" / name).symlink_to(
        elsewhere / "theirs" if name == "svid.key" else elsewhere
    )
    with SvidFolder(tmp_path / "svids", "dir") as folder:
        folder.write(a_set("ours"))
    assert set(seen(tmp_path / "svids").values()) == {"ours"}
    assert {one.name: one.read_text() for one in elsewhere.iterdir()} == {"theirs": "theirs"}


def test_a_set_that_is_a_link(tmp_path: Path) -> None:
    """A planted link that passes for a set is neither followed nor emptied, but replaced."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").write_text("theirs")
    (tmp_path / "svids").mkdir()
    (tmp_path / "svids" / "..set-1").symlink_to(elsewhere)
    (tmp_path / "svids" / DATA).symlink_to("..set-1")
    with SvidFolder(tmp_path / "svids", "dir") as folder:
        folder.write(a_set("ours"), keep=lambda _: True)
    assert set(seen(tmp_path / "svids").values()) == {"ours"}
    assert (elsewhere / "theirs").read_text() == "theirs"


def test_files_of_another_kind_stay(tmp_path: Path) -> None:
    """What was in the folder before and has another name is nobody's business."""
    (tmp_path / "svids" / "dir").mkdir(parents=True)
    (tmp_path / "svids" / "note").write_text("mine")
    (tmp_path / "svids" / "link").symlink_to("note")
    with SvidFolder(tmp_path / "svids", "dir") as folder:
        folder.write(a_set("one"))
        folder.write({})
    assert set(seen(tmp_path / "svids")) == {"dir", "link", "note"}


def test_a_folder_that_was_removed(folder: SvidFolder) -> None:
    """It is made again at the next change, and is held as before."""
    folder.write(a_set("one"))
    shutil.rmtree(folder.path)
    folder.write(a_set("two"))
    assert set(seen(folder.path).values()) == {"two"}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(PreconditionError, match="in use by another process"):
        with SvidFolder(folder.path, "dir"):
            pass


def test_a_folder_whose_place_is_taken(folder: SvidFolder) -> None:
    """Where it cannot be made again that is said each time, until it can."""
    shutil.rmtree(folder.path)
    folder.path.write_text("a file")
    for _ in range(2):
        with pytest.raises(PreconditionError, match="cannot be opened"):
            folder.write(a_set("one"))
    folder.path.unlink()
    folder.write(a_set("two"))
    assert set(seen(folder.path).values()) == {"two"}


def test_two_writers(folder: SvidFolder) -> None:
    """A second writer is refused, and told which setting to change."""
    with pytest.raises(PreconditionError, match=r"in use by another process.*`there`"):
        with SvidFolder(folder.path, "there"):
            pass


@pytest.mark.parametrize("name", ["", "a/b", "..data", "..", "a\0"])
def test_names_that_are_refused(folder: SvidFolder, name: str) -> None:
    """A name that leads elsewhere, or is one of our own, is refused before anything is done."""
    with pytest.raises(FilesError, match="one name"):
        folder.write({name: File(b"")})
    assert hidden(folder.path) == []


def test_a_full_disk(folder: SvidFolder) -> None:
    """When a file cannot be written in full, the set before it stays, and no part is left."""
    folder.write(a_set("one"))
    before = hidden(folder.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FilesError, match="File too large"):
            folder.write({**a_set("two"), "big": File(b"x" * 8192)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen(folder.path) == {"svid.key": "one", "svid.pem": "one"}
    assert hidden(folder.path) == before
    folder.write(a_set("three"))
    assert set(seen(folder.path).values()) == {"three"}


DIES = """
import os, signal, sys
from pathlib import Path
from spiffe_core import crashpoints
from workload_api.sidecar.files import File, SvidFolder

crashpoints.arm(sys.argv[2], lambda: os.kill(os.getpid(), signal.SIGKILL))
with SvidFolder(Path(sys.argv[1]), "dir") as folder:
    names = ("svid.key", "svid.pem", "new.pem")
    folder.write({name: File(b"two", 0o600) for name in names})
"""
"""Writes a second set, and is killed at the place that it is told."""


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step(tmp_path: Path, point: str) -> None:
    """kill -9 at any step leaves readers one whole set, and the next start clears the rest."""
    path = tmp_path / "svids"
    with SvidFolder(path, "dir") as folder:
        folder.write(a_set("one"))
    done = subprocess.run(
        [sys.executable, "-c", DIES, path, f"svid_files.{point}"], cwd=ROOT, check=False
    )
    assert done.returncode == -9, "the crash point was reached"
    found = seen(path)
    swapped = point in ("swapped", "named")
    assert found == dict.fromkeys(("svid.key", "svid.pem"), "two" if swapped else "one")
    with SvidFolder(path, "dir") as folder:
        assert len(hidden(path)) == 2, "leftovers are gone before anything is written"
        folder.write(a_set("three"))
    assert set(seen(path).values()) == {"three"}
    assert len(hidden(path)) == 2


READS = """
import os, sys
folder, rounds = sys.argv[1], 0
print("reading", flush=True)
while not os.path.exists(folder + "/over"):
    try:
        place = os.open(folder + "/..data", os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = []
            for name in ("svid.key", "svid.pem"):
                descriptor = os.open(name, os.O_RDONLY, dir_fd=place)
                found.append(os.read(descriptor, 100))
                os.close(descriptor)
        finally:
            os.close(place)
    except FileNotFoundError:
        continue  # a newer set took its place: look up again
    assert found[0] == found[1] != b"", found
    rounds += 1
print(rounds)
"""
"""Reads both files of a set over and over, until it is told to end."""


def test_a_reader_during_many_changes(folder: SvidFolder) -> None:
    """A reader that looks the set up once never sees two files that differ."""
    folder.write(a_set("0"))
    with subprocess.Popen(
        [sys.executable, "-S", "-c", READS, folder.path], stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for number in range(ROUNDS):
            folder.write(a_set(str(number)))
        (folder.path / "over").touch()
        rounds = int(reader.stdout.readline())
    assert reader.returncode == 0
    assert rounds > 10
