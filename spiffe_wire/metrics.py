"""
Counters, gauges and histograms, and the text that Prometheus scrapes.

Source: Prometheus text format 0.0.4.  Ours because every node pays for it all day: the usual
library brings an HTTP server, an HTTP client and HTML along, 2 MB in the agent (performance,
target 18).  Changed in the event loop alone; the text may be asked for from another thread.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Registry:
    """The metrics of one process, in the order in which they were made."""

    def __init__(self) -> None:
        self.metrics: list[Metric[Any]] = []

    def text(self) -> bytes:
        """Return what a scraper gets."""
        return "".join(line + "\n" for one in self.metrics for line in one.lines()).encode()


class Number:
    """One value of a counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add *amount*."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replace it; a counter never does."""
        self.value = value

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """Yield the end of the name, a label of its own, and the value."""
        yield "", "", self.value


class Spread:
    """One value of a histogram: how many observations lie at or below each bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count *value*."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """Yield each bucket, with all that lies below it, then the sum and the number."""
        total = 0
        for bound, count in zip((*self._bounds, math.inf), tuple(self._counts), strict=True):
            total += count
            yield "_bucket", f'le="{_number(bound)}"', total
        yield "_sum", "", self._sum
        yield "_count", "", total


_Value = TypeVar("_Value", bound=Number | Spread)


class Metric(ABC, Generic[_Value]):
    """One name: a value for each set of labels that was used, or one if it has no labels."""

    kind: ClassVar[str]

    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), *, registry: Registry
    ) -> None:
        self.name = name
        self.text = text
        self.label_names = tuple(labels)
        self._values: dict[tuple[str, ...], _Value] = {}
        if not labels:
            self._values[()] = self._make()
        registry.metrics.append(self)

    def labels(self, *values: str) -> _Value:
        """Return the value for these labels, in the order of their names."""
        found = self._values.get(values)
        if found is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has {len(self.label_names)} labels")
            found = self._values[values] = self._make()
        return found

    def lines(self) -> Iterator[str]:
        """Yield this metric's lines of the text."""
        yield f"# HELP {self.name} {_escaped(self.text)}"
        yield f"# TYPE {self.name} {self.kind}"
        for values, held in list(self._values.items()):
            named = zip(self.label_names, values, strict=True)
            own = [f'{name}="{_quoted(value)}"' for name, value in named]
            for suffix, label, value in held.samples():
                inside = ",".join([*own, label] if label else own)
                where = f"{{{inside}}}" if inside else ""
                yield f"{self.name}{suffix}{where} {_number(value)}"

    @abstractmethod
    def _make(self) -> _Value:
        """Return a value in which nothing is counted yet."""


class Counter(Metric[Number]):
    """Only grows; its name ends in ``_total``."""

    kind = "counter"

    def inc(self, amount: float = 1) -> None:
        """Add *amount*, when there are no labels."""
        self.labels().inc(amount)

    def _make(self) -> Number:
        return Number()


class Gauge(Metric[Number]):
    """Goes up and down."""

    kind = "gauge"

    def set(self, value: float) -> None:
        """Replace the value, when there are no labels."""
        self.labels().set(value)

    def _make(self) -> Number:
        return Number()


class Histogram(Metric[Spread]):
    """How observations spread over *bounds*, which grow."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float],
        registry: Registry,
    ) -> None:
        self.bounds = tuple(bounds)
        super().__init__(name, text, labels, registry=registry)

    def observe(self, value: float) -> None:
        """Count *value*, when there are no labels."""
        self.labels().observe(value)

    def _make(self) -> Spread:
        return Spread(self.bounds)


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
