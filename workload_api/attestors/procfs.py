"""What Linux says of a process in ``/proc``: read whole, parsed purely."""

from dataclasses import dataclass
from typing import Final

from workload_api.attestors.protocol import AttestationError

MAX_STATUS_BYTES: Final = 1024 * 1024  # 65,536 groups, Linux's own limit, take 720 KB


@dataclass(frozen=True, slots=True)
class Status:
    """Part of ``/proc/<pid>/status``; effective IDs."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def read_status(pid: int) -> Status:
    """
    Read ``/proc/<pid>/status``; made by the kernel in memory, so it does not block.

    Raises:
        AttestationError: there is no such process, or its status is not what it must be.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            data = file.read(MAX_STATUS_BYTES)
    except OSError as error:
        raise AttestationError("the process's status cannot be read") from error
    if len(data) == MAX_STATUS_BYTES:
        raise AttestationError("the process's status is too long")  # half a number is another
    return parse_status(data)


def parse_status(data: bytes) -> Status:
    """
    Parse ``/proc/<pid>/status``.

    Raises:
        AttestationError: a line that must be there is not.
    """
    # The name comes first and is the process's own choice.  The kernel escapes a newline in
    # it and nothing else, so lines end at newlines alone: Python's text mode also ends them
    # at a carriage return, and a process named "\rGroups:\t0\r" would choose its groups.
    try:
        return Status(
            int(_line(data, b"\nUid:").split()[1]),
            int(_line(data, b"\nGid:").split()[1]),
            tuple(int(one) for one in _line(data, b"\nGroups:").split()),
        )
    except (IndexError, ValueError) as error:
        raise AttestationError("the process's status cannot be read") from error


def _line(data: bytes, start: bytes) -> bytes:
    """The rest of the line that begins so; ValueError when there is none."""
    at = data.index(start) + len(start)
    end = data.find(b"\n", at)
    return data[at:] if end < 0 else data[at:end]
