"""What is read of ``/proc/<pid>/status``, whose first line the process itself writes."""

import os
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spiffe_core.errors import ErrorKind
from tests.support.children import a_python
from workload_api.attestors.procfs import MAX_STATUS_BYTES, Status, parse_status, read_status
from workload_api.attestors.protocol import AttestationError

STATUS = (
    b"Name:\tsleep\nUid:\t1000\t1001\t1002\t1003\nGid:\t20\t21\t22\t23\nGroups:\t4 27 1000 \n"
)

RENAMED = """
import ctypes, sys
libc = ctypes.CDLL(None)
for line in sys.stdin:
    libc.prctl(15, bytes.fromhex(line), 0, 0, 0)  # PR_SET_NAME
    print("ok")
"""


def test_effective_ids_count() -> None:
    """SEC-31: of the four user and group IDs the effective ones are taken, and all groups."""
    assert parse_status(STATUS) == Status(1001, 21, (4, 27, 1000))


def test_no_groups() -> None:
    """A process without supplementary groups has none."""
    assert parse_status(STATUS.replace(b"4 27 1000 ", b"")).groups == ()


@pytest.mark.parametrize("line", [b"Uid:", b"Gid:", b"Groups:"])
def test_a_line_that_is_missing(line: bytes) -> None:
    """SEC-31: any error refuses: a status without one of its lines is none."""
    with pytest.raises(AttestationError, match="cannot be read"):
        parse_status(STATUS.replace(line, b"Other:"))


@pytest.mark.parametrize(
    "changed",
    [(b"1001", b"x"), (b"\t1001\t1002\t1003", b""), (b"4 27", b"4 -"), (b"27", b"0x7")],
)
def test_a_line_that_is_no_numbers(changed: tuple[bytes, bytes]) -> None:
    """SEC-31: a number that is none refuses; it is not left out."""
    with pytest.raises(AttestationError):
        parse_status(STATUS.replace(*changed))


def test_lines_end_at_newlines_alone() -> None:
    """SEC-31: a process named `\\rGroups:\\t0` does not choose its groups."""
    forged = STATUS.replace(b"sleep", b"\rGroups:\t0\r")
    assert parse_status(forged).groups == (4, 27, 1000)


@given(st.binary(max_size=400))
@example(b"Uid:\nGid:\nGroups:")
@example(b"Uid: 1 2\nGid: 1 2\nGroups: \xff")
def test_any_bytes(data: bytes) -> None:
    """SEC-120: whatever stands there is read, or refused with a reason of ours."""
    try:
        parse_status(data)
    except AttestationError as error:
        assert error.kind is ErrorKind.NOT_READY


def test_own_status() -> None:
    """What is read of this process is what the kernel tells it of itself."""
    found = read_status(os.getpid())
    assert (found.uid, found.gid) == (os.geteuid(), os.getegid())
    assert set(found.groups) == set(os.getgroups())


def test_a_process_that_is_not_there() -> None:
    """SEC-31: no process, no status, and no answer."""
    with pytest.raises(AttestationError):
        read_status(2**22 + 1)


def test_status_of_every_length_fits() -> None:
    """Linux's most groups fit; what is longer is refused, for half a number is another one."""
    assert len(b"4294967294 " * 65536) < MAX_STATUS_BYTES


def odd_names(count: int) -> list[bytes]:
    """Names of 1 to 15 bytes that look like what a parser looks for."""
    rng = random.Random(1)
    parts = [b"\r", b"\n", b"\t", b" ", b"\\", b"\\n", b":", b"Uid:", b"Gid:", b"Groups:",
             b"0", b"27", b")", b"(", b"\xff", b"\x0b", b"\x0c", b"\x1c", b"\x85"]  # fmt: skip
    made = [b"\rGroups:\t0\r", b"\nGroups:\t0\n", b"\rUid:\t0 0\r", b"\x85Gid:\t0 0"]
    while len(made) < count:
        name = b"".join(rng.choice(parts) for _ in range(rng.randint(1, 8)))[:15]
        made.append(name)
    return made


def test_sec_31_odd_names() -> None:
    """SEC-31: a thousand names that a process may give itself change nothing that is read."""
    before = None
    with a_python(RENAMED) as child:
        for name in odd_names(1000):
            child.say(name.hex())
            assert child.hear() == "ok"
            found = read_status(child.pid)
            before = before or found
            assert found == before, name
    assert before is not None and set(before.groups) == set(os.getgroups())
