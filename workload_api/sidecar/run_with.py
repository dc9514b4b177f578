"""
``issuer-agent run-with -- COMMAND``: a program that knows files, and nothing of SPIFFE.

It is a sidecar whose settings are made of a few options, and whose folder is private and goes
with it unless one is named.
"""

import contextlib
import fcntl
import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spiffe_core.errors import MalformedError
from spiffe_wire import privatefolder
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from workload_api.sidecar.app import serve
from workload_api.sidecar.config import (
    Action,
    Bundles,
    JwtFile,
    LogStyle,
    SidecarSettings,
    X509Files,
)

PREFIX: Final = "svid-run-"
BUNDLE: Final = "bundle.pem"
"""The bundle of our own trust domain, under a name that does not depend on it."""


class OptionError(MalformedError):
    """The value of an option cannot be."""


@dataclass(frozen=True, slots=True)
class RunWith:
    """What was asked for."""

    command: Sequence[str]
    endpoint: str
    dir: Path | None = None
    spiffe_id: str = ""
    hint: str = ""
    audiences: Sequence[str] = ()
    on_renew: str = "none"


async def run(wanted: RunWith, environment: Mapping[str, str]) -> int:
    """
    Run the command with its files; return its exit code, 128 + n when signal n ended it.

    Raises:
        SpiffeError: it cannot be started, or the agent's last word came before any identity.
    """
    actions = on_renew(wanted.on_renew)
    with contextlib.ExitStack() as stack:
        folder = wanted.dir
        if folder is None:
            folder = stack.enter_context(private_folder())
        settings = SidecarSettings(
            dir=folder.absolute(),
            endpoint=wanted.endpoint,
            x509=(
                X509Files(spiffe_id=wanted.spiffe_id, hint=wanted.hint, bundle_file=BUNDLE),
            ),
            jwt=tuple(
                JwtFile(audience=(one,), spiffe_id=wanted.spiffe_id) for one in wanted.audiences
            ),
            bundles=Bundles(),
            command=tuple(wanted.command),
            on_change=actions,
            log_style=LogStyle.TEXT,
            log_level="warning",
        )  # fmt: skip
        variables = {**environment, **variables_of(settings)}
        return await serve(settings, variables, setting="--dir")


def variables_of(settings: SidecarSettings) -> dict[str, str]:
    """Return the variables by which the command finds its files."""
    (svid,) = settings.x509
    found = {
        ENVIRONMENT_VARIABLE: settings.endpoint,
        "SVID_DIR": str(settings.dir),
        "SVID_FILE": str(settings.dir / f"{svid.name}.pem"),
        "SVID_KEY_FILE": str(settings.dir / f"{svid.name}.key"),
        "BUNDLE_FILE": str(settings.dir / svid.bundle_file),
    }
    if settings.jwt:
        found["JWT_SVID_FILE"] = str(settings.dir / settings.jwt[0].file_name)
    return found


def on_renew(text: str) -> tuple[Action, ...]:
    """
    Parse ``signal:HUP``, ``restart``, ``none``, ``run:PROGRAM ARGUMENT…``.

    The words after ``run:`` are split as a shell splits them, quotes and all; no shell sees
    them (SEC-96).

    Raises:
        OptionError: it is none of these.
        SettingsError: there is no such signal.
    """
    what, _, rest = text.partition(":")
    if text == "none":
        return ()
    if text == "restart":
        return (Action(restart=True),)
    if what == "signal" and rest:
        return (Action(signal=rest),)
    if what == "run":
        try:
            words = tuple(shlex.split(rest))
        except ValueError as error:
            raise OptionError(f"--on-renew: {error}".lower()) from error
        if words:
            return (Action(command=words),)
    raise OptionError("--on-renew reads signal:HUP, restart, none or 'run:nginx -s reload'")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """
    A folder of mode 0700, in memory where there is such a place, that goes at the end.

    Those that killed processes of this user have left are removed.
    """
    place = _place()
    _remove_leftovers(place)
    folder = privatefolder.make(place, PREFIX)
    try:
        yield folder
    finally:
        privatefolder.remove(folder)


def _place() -> Path:
    """The best place: on a tmpfs, so that no disk ever holds the key."""
    candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/run"]  # noqa: S108 no file of a known name is made there
    for one in filter(None, candidates):
        if os.path.isabs(one) and os.access(one, os.W_OK | os.X_OK) and _in_memory(one):
            return Path(one)
    return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 the same


def _in_memory(path: str) -> bool:
    """True when the kernel says that *path* lies on a tmpfs."""
    path, best, kind = os.path.realpath(path), "", ""
    with contextlib.suppress(OSError), open("/proc/self/mounts") as file:
        for line in file:
            _, mount, type_, *_ = line.split(" ")
            inside = path == mount or path.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, type_
    return kind in ("tmpfs", "ramfs")


def _remove_leftovers(place: Path) -> None:
    for one in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(descriptor)
                if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
                    continue
                # Whoever lives holds it (`spiffe_wire.exclusive`).
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                privatefolder.remove(one)
            finally:
                os.close(descriptor)
