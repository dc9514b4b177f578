"""
When to prepare, activate and prune an authority: arithmetic on instants, nothing else.

Source: SPIRE API 9 (step 9), SEC-66, FED-04.
"""

from datetime import datetime, timedelta
from typing import Final

from spiffe_core.lifetime import Validity

PREPARE_AT_MOST: Final = timedelta(days=30)
ACTIVATE_AT_MOST: Final = timedelta(days=7)
PRUNE_AFTER: Final = timedelta(minutes=5)  # validators' clocks, and their leeway


def prepare_at(active: Validity) -> datetime:
    """The next authority is made when half of the life, at most 30 days, is left."""
    return active.not_after - min(active.life / 2, PREPARE_AT_MOST)


def activate_at(active: Validity) -> datetime:
    """It takes over when a sixth of the life, at most 7 days, is left."""
    return active.not_after - min(active.life / 6, ACTIVATE_AT_MOST)


def lead_of(life: timedelta) -> timedelta:
    """From `prepare_at` to `activate_at` for an authority that lives for *life*."""
    return min(life / 2, PREPARE_AT_MOST) - min(life / 6, ACTIVATE_AT_MOST)


def prune_at(old: Validity) -> datetime:
    """
    An old authority goes once it has ended, and so has all that it signed (X509-46, JWT-17).

    Not earlier: what lives longest among the things it signed is a setting that an operator
    may have lowered since.
    """
    return old.not_after + PRUNE_AFTER
