"""
Files that change together: a certificate never stands beside another certificate's key.

Files are written into a fresh folder of their own, and one rename makes it the current one, as
Kubernetes does for its volumes::

    DIR/svid.pem -> ..data/svid.pem        what programs are told to open; stays as it is
    DIR/..data   -> ..set-8f21c0           replaced by rename(2) at every change
    DIR/..set-8f21c0/svid.pem              the file, complete and on disk before it is seen

Renaming the files one by one was the other way: in any order there is a moment in which the
new key stands beside the old certificate, or for ever if the power goes then.  What a reader
may rely on:

* A name, once there, opens, and what it opens is whole.
* Files that are opened below the folder that ``..data`` leads to, looked up once, are of one
  set.  If one is missing there, a newer set has taken its place: look up again.
* Two names that are opened one after the other are of one set unless the change falls between
  the two.  Who reads when told to (a signal) is safe: after a change,
  `workload_api.sidecar.delivery` leaves the set as it is for a while.

Source: SEC-11 (a file for each trust domain), SEC-90.  Keys are created with mode 0600, in a
folder of mode 0700 that nobody else can enter until all of it is there; no link is followed.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import InternalError
from spiffe_wire.exclusive import held

DATA: Final = "..data"
_NEW_LINK: Final = "..new"
_SET: Final = "..set-"
SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_NOFOLLOW: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class FilesError(InternalError):
    """Files could not be written; those that are there are as they were."""


@dataclass(frozen=True, slots=True)
class File:
    """What one file holds, and who may read it."""

    content: bytes = field(repr=False)
    mode: int = PUBLIC_MODE


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose the files are; -1 leaves it as it is."""

    uid: int = -1
    gid: int = -1


class SvidFolder:
    """
    A folder of files that change together, this process's alone while entered.

    It is made with *mode* if it is not there; *setting* names it in a refusal.  Every method
    blocks.

    Raises:
        PreconditionError: another process writes there, or it cannot be opened.
    """

    def __init__(
        self, path: Path, setting: str, *, owner: Owner | None = None, mode: int = 0o700
    ) -> None:
        self.path = path
        self._setting = setting
        self._owner = owner or Owner()
        self._mode = mode
        self._held = contextlib.ExitStack()
        self._folder = -1

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            self.tidy()

    def _open(self) -> None:
        fresh = not self.path.exists()
        self._held.enter_context(held(self.path, self._setting))
        try:
            with self._reported():
                self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._held.callback(os.close, self._folder)
                if fresh:
                    self._hand_over(self._folder, self._mode)
            self.tidy()
        except BaseException:
            self._folder = -1
            self._held.close()
            raise

    def write(
        self, files: Mapping[str, File], keep: Callable[[str], bool] = lambda _: False
    ) -> None:
        """
        Replace the files by *files*; of those there now, the names that *keep* likes stay.

        Durable when this returns.  The set before it stays on disk until `tidy`, for whoever
        is just opening it.

        Raises:
            FilesError: nothing was changed, save for names that are new.
            PreconditionError: the folder was removed, and cannot be made again.
        """
        for name in files:
            _check(name)
        with self._reported():
            if self._folder < 0 or not os.fstat(self._folder).st_nlink:
                # Somebody has removed it, as is done to a user's files at the last logout.
                self._folder = -1
                self._held.close()
                self._open()
            self.tidy()
            before = self._current()
            kept = [one for one in self._names(before) if one not in files and keep(one)]
            name = _SET + secrets.token_hex(6)
            try:
                self._fill(name, files, before, kept)
                self._swap(name)
            except BaseException:
                if self._current() != name:
                    self._remove(name)
                raise
            self._link({*files, *kept})

    def tidy(self) -> None:
        """Remove what is not the current set: older ones, and leftovers of a crash."""
        with contextlib.suppress(OSError):  # it is looked at again at the next change
            current = self._current()
            for one in self._listed():
                if one == _NEW_LINK or (one.startswith(_SET) and one != current):
                    self._remove(one)

    def _fill(
        self, name: str, files: Mapping[str, File], before: str | None, kept: Iterable[str]
    ) -> None:
        """Make the set *name*: whole, with its modes, and on disk."""
        os.mkdir(name, 0o700, dir_fd=self._folder)
        crash_point("svid_files.begun")
        flags = os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW
        place = os.open(name, flags, dir_fd=self._folder)
        try:
            for file_name, file in files.items():
                self._write_one(place, file_name, file)
            for file_name in kept:
                os.link(
                    f"{before}/{file_name}", file_name, src_dir_fd=self._folder,
                    dst_dir_fd=place, follow_symlinks=False,
                )  # fmt: skip
            crash_point("svid_files.filled")
            # Others may enter now; each file says who may read it.
            os.fchmod(place, 0o755)
            os.fsync(place)
        finally:
            os.close(place)
        crash_point("svid_files.synced")

    def _write_one(self, place: int, name: str, file: File) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW
        with os.fdopen(os.open(name, flags, SECRET_MODE, dir_fd=place), "wb") as stream:
            crash_point("svid_files.opened")
            stream.write(file.content)
            stream.flush()
            crash_point("svid_files.written")
            self._hand_over(stream.fileno(), file.mode)
            os.fsync(stream.fileno())

    def _hand_over(self, descriptor: int, mode: int) -> None:
        if self._owner != Owner():
            os.fchown(descriptor, self._owner.uid, self._owner.gid)
        os.fchmod(descriptor, mode)

    def _swap(self, name: str) -> None:
        os.symlink(name, _NEW_LINK, dir_fd=self._folder)
        crash_point("svid_files.linked")
        os.replace(_NEW_LINK, DATA, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        crash_point("svid_files.swapped")
        os.fsync(self._folder)

    def _link(self, names: Iterable[str]) -> None:
        """Have each of *names* lead into the current set, and no other name of ours be left."""
        wanted = set(names)
        for name in wanted:
            if self._target(name) == f"{DATA}/{name}":
                continue
            os.symlink(f"{DATA}/{name}", _NEW_LINK, dir_fd=self._folder)
            crash_point("svid_files.named")
            os.replace(_NEW_LINK, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        for name in self._listed():
            if name not in wanted and self._target(name) == f"{DATA}/{name}":
                os.unlink(name, dir_fd=self._folder)
        os.fsync(self._folder)

    def _current(self) -> str | None:
        """The name of the set that is seen; none if it is gone, or a link that was planted."""
        name = self._target(DATA)
        if not name.startswith(_SET) or "/" in name:
            return None
        try:
            found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return name if stat.S_ISDIR(found.st_mode) else None

    def _names(self, set_name: str | None) -> list[str]:
        if set_name is None:
            return []
        flags = os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW
        place = os.open(set_name, flags, dir_fd=self._folder)
        try:
            return os.listdir(place)
        finally:
            os.close(place)

    def _listed(self) -> list[str]:
        return os.listdir(self._folder)

    def _target(self, name: str) -> str:
        """Where the link *name* leads; empty when it is none."""
        try:
            return os.readlink(name, dir_fd=self._folder)
        except OSError:
            return ""

    def _remove(self, name: str) -> None:
        """Remove a set or a link, whatever is left of it; it is looked at again next time."""
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=self._folder)
            except IsADirectoryError:
                self._remove_set(name)

    def _remove_set(self, name: str) -> None:
        # Not by `shutil`, which costs every sidecar memory: a set has no folders in it.
        place = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW, dir_fd=self._folder)
        try:
            for one in os.listdir(place):
                os.unlink(one, dir_fd=place)
        finally:
            os.close(place)
        os.rmdir(name, dir_fd=self._folder)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FilesError(f"cannot write to {self.path}: {error.strerror}") from error


def _check(name: str) -> None:
    if not name or "/" in name or "\0" in name or name.startswith(".."):
        raise FilesError("a file's name must be one name, and not begin with two dots")
