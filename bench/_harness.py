"""What every bench shares: alternating rounds, medians, and a result with its target."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One figure: a ratio unless *unit* says otherwise, and the target it is held against."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool:
        """True when there is no target, or the figure meets it."""
        if self.at_most is not None and self.value > self.at_most:
            return False
        return self.at_least is None or self.value >= self.at_least

    @property
    def target_text(self) -> str:
        """The target as text, empty when the figure is only reported."""
        if self.at_most is not None:
            return f"<= {self.at_most:g} {self.unit}"
        return f">= {self.at_least:g} {self.unit}" if self.at_least is not None else ""

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "target": self.target_text,
            "met": self.met,
            "note": self.note,
        }


def alternate(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    repeat: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """
    Time each of *runs* in turn, *rounds* times, and return the median seconds of one call.

    Alternating makes a noisy neighbour hit all of them alike; *repeat* calls are timed
    together when one is too short to time.  What never waits is best timed with
    `time.thread_time` as *clock*, which stands still while others have the processor.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    gc.collect()
    for _ in range(rounds):
        for name, run in runs.items():
            started = clock()
            for _ in range(repeat):
                run()
            taken[name].append((clock() - started) / repeat)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(results: list[Result]) -> str:
    """The results as aligned lines, each with its target and whether it is met."""
    wide = max((len(one.name) for one in results), default=0)
    return "\n".join(
        f"  {one.name:<{wide}}  {one.value:>9.2f} {one.unit:<4}"
        f" {one.target_text:<12} {'' if not one.target_text else 'met' if one.met else 'SHORT'}"
        f"{'  ' + one.note if one.note else ''}"
        for one in results
    )
