"""Pure parsers of what Linux says of a process in ``/proc``."""

from dataclasses import dataclass

from workload_api.attestors.protocol import AttestationError


@dataclass(frozen=True, slots=True)
class Status:
    """Part of ``/proc/<pid>/status``; effective IDs."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def parse_status(text: str) -> Status:
    """
    Parse ``/proc/<pid>/status``.

    Raises:
        AttestationError: a line that must be there is not.
    """
    # The name comes first and is the process's own choice; a newline in it is escaped by
    # the kernel, so the first line of each key is the kernel's.
    lines: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            lines.setdefault(key, value)
    try:
        return Status(
            int(lines["Uid"].split()[1]),
            int(lines["Gid"].split()[1]),
            tuple(int(one) for one in lines["Groups"].split()),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise AttestationError("the process's status cannot be read") from error
