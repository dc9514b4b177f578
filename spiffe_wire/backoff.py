"""Pauses between tries that grow and are drawn at random: no stampede (SEC-107)."""

import random
from datetime import timedelta


class Backoff:
    """
    Full jitter: each pause is drawn evenly from zero to a bound that doubles up to *cap*.

    Raises:
        ValueError: *initial* is not above zero, or *cap* is below it.
    """

    def __init__(
        self, initial: timedelta, cap: timedelta, rng: random.Random | None = None
    ) -> None:
        if initial <= timedelta(0) or cap < initial:
            raise ValueError("back-off needs 0 < initial <= cap")
        self._initial = initial
        self._cap = cap
        self._bound = initial
        self._rng = rng or random.SystemRandom()

    def next(self) -> timedelta:
        """Return the next pause, and double the bound."""
        pause = self._bound * self._rng.random()
        self._bound = min(self._bound * 2, self._cap)
        return pause

    def reset(self) -> None:
        """Start again from *initial*: a try went well."""
        self._bound = self._initial
