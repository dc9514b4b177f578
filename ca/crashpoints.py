"""
Named places at which a test can end the process, as a power cut would (SEC-100).

Nothing happens at them unless the composition root armed one, from
``SPIFFE_ISSUER_CRASH_POINT``.
"""

import os

_armed: str | None = None


def arm(name: str | None) -> None:
    """End the process without any clean-up at the crash point *name*; None disarms."""
    global _armed
    _armed = name


def crash_point(name: str) -> None:
    """A place worth dying at."""
    if _armed == name:
        os._exit(137)
