"""What a program does that runs another one: a shell's exit codes, and keys at the terminal."""

import os
import signal
from typing import Final

NO_PROGRAM, NO_COMMAND = 126, 127
"""What a shell says of a file that it cannot run, and of one that is not there."""
FROM_KEYS: Final = (signal.SIGINT, signal.SIGQUIT)
"""Signals that a terminal sends to everybody in the foreground."""


def heard_already(number: int) -> bool:
    """True for a key at the terminal when our children, in the foreground too, heard it."""
    if number not in FROM_KEYS:
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
