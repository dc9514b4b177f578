"""
Validity, and the one formula for when to renew.

Source: X509-46, SEC-16, SEC-106 (rotation begins at half-life, plus or minus 10 %).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from spiffe_core.errors import MalformedError

RENEW_FRACTION: Final = 0.5
MAX_JITTER: Final = 0.1  # of the whole life, to both sides; SEC-106


@dataclass(frozen=True, slots=True)
class Validity:
    """From *not_before* to *not_after*, both inclusive, aware UTC."""

    not_before: datetime
    not_after: datetime

    def __post_init__(self) -> None:
        if self.not_before.tzinfo is None or self.not_after.tzinfo is None:
            raise MalformedError("validity needs instants with a time zone")
        if self.not_after <= self.not_before:
            raise MalformedError("validity must end after it begins")

    @property
    def life(self) -> timedelta:
        """The whole span."""
        return self.not_after - self.not_before

    def covers(self, at: datetime) -> bool:
        """True when *at* lies inside; there is no grace on either end (SEC-16)."""
        return self.not_before <= at <= self.not_after


def renew_at(validity: Validity, jitter: float = 0.0) -> datetime:
    """
    Return the instant at which to renew: half-life, moved by *jitter*.

    *jitter* is a number from -1 to 1; 1 moves the instant a tenth of the life later.
    """
    share = RENEW_FRACTION + MAX_JITTER * max(-1.0, min(1.0, jitter))
    return validity.not_before + validity.life * share
