"""
When to prepare, activate and prune an authority: arithmetic on instants, nothing else.

Source: SPIRE API 9 (step 9), SEC-66, FED-04.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from spiffe_core.lifetime import Validity

PREPARE_AT_MOST: Final = timedelta(days=30)
ACTIVATE_AT_MOST: Final = timedelta(days=7)


def prepare_at(active: Validity) -> datetime:
    """The next authority is made when half of the life, at most 30 days, is left."""
    return active.not_after - min(active.life / 2, PREPARE_AT_MOST)


def activate_at(active: Validity) -> datetime:
    """It takes over when a sixth of the life, at most 7 days, is left."""
    return active.not_after - min(active.life / 6, ACTIVATE_AT_MOST)


@dataclass(frozen=True, slots=True)
class Spans:
    """How long things take to reach everybody, and how long what was signed lives."""

    publish_ahead: timedelta
    """A key is published this long before it signs: one sync interval or more (SEC-66)."""
    longest_svid: timedelta
    """Nothing that an authority signed outlives this."""


def may_sign_from(prepared_at: datetime, spans: Spans) -> datetime:
    """The instant from which a prepared authority may sign."""
    return prepared_at + spans.publish_ahead


def prune_at(validity: Validity, retired_at: datetime, spans: Spans) -> datetime:
    """An old authority goes when the last thing it signed has expired."""
    return min(validity.not_after, retired_at + spans.longest_svid) + timedelta(minutes=5)
