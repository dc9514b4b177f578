"""
As many file descriptors as the limits of a front door need (SEC-80, SEC-107).

Service managers start a process with a soft limit of 1,024 for the sake of ``select``, and
leave the hard limit for those who ask; a connection takes four.
"""

import logging
import resource
from typing import Final

from spiffe_wire.logs import event

_log = logging.getLogger(__name__)

WANTED: Final = 4 * 4096 + 1024
"""Four for each of a door's 4,096 connections, and those of everything else."""


def raise_limit(wanted: int = WANTED) -> int:
    """Raise the soft limit to *wanted*, or as far as it goes; return it.  Once, at start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if most < wanted:
        event(_log, logging.WARNING, "few_descriptors", limit=most, wanted=wanted)
    return soft
