"""Folders of a process's own."""

import stat
import subprocess
import sys
from pathlib import Path

from spiffe_wire import privatefolder
from tests.support.stack import ROOT


def test_made_for_nobody_else(tmp_path: Path) -> None:
    """It has mode 0700 under any umask, another name each time, and its parent is made."""
    made = [privatefolder.make(tmp_path / "new" / "run", "d") for _ in range(2)]
    assert len({*made}) == 2
    for one in made:
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        assert one.parent == tmp_path / "new" / "run" and one.name.startswith("d")
    assert stat.S_IMODE((tmp_path / "new" / "run").stat().st_mode) == 0o700


def test_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    """Files, folders and links go; what a link leads to stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    folder = privatefolder.make(tmp_path, "d")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "to-folder").symlink_to(kept)
    (folder / "a" / "to-file").symlink_to(kept / "file")
    (folder / "nowhere").symlink_to(tmp_path / "none")
    privatefolder.remove(folder)
    assert not folder.exists()
    assert (kept / "file").read_text() == "x"


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """What stands where the folder was is left, and so is what it leads to."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "d").symlink_to(kept)
    privatefolder.remove(tmp_path / "d")
    assert (kept / "file").exists()


def test_nothing_to_remove(tmp_path: Path) -> None:
    """A folder that is gone, or was never one, is no error."""
    privatefolder.remove(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    privatefolder.remove(tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_an_agent_does_without_shutil() -> None:
    """An agent with everything that is always there loads neither `shutil` nor `tempfile`."""
    code = (
        "import sys, uvloop, workload_api.agent.app, workload_api.sds.stream; "
        "print([one for one in ('shutil', 'tempfile', 'bz2', 'lzma') if one in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"
