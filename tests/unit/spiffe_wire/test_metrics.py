"""Metrics, read back by Prometheus's own parser."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spiffe_wire.metrics import Counter, Gauge, Histogram, Registry


def samples(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample that the parser finds, by name and labels."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(registry.text().decode())
        for one in family.samples
    }


def test_without_labels() -> None:
    """A metric without labels is there from the start, and says what it was set to."""
    registry = Registry()
    calls = Counter("calls_total", "Calls", registry=registry)
    entries = Gauge("entries", "Entries", registry=registry)
    Counter("never_total", "Never", registry=registry)
    calls.inc()
    calls.inc(2.5)
    entries.set(7)

    assert samples(registry) == {
        ("calls_total", ()): 3.5,
        ("entries", ()): 7,
        ("never_total", ()): 0,
    }


def test_labels() -> None:
    """Each set of labels has a value of its own, and none before it is used."""
    registry = Registry()
    calls = Counter("calls_total", "Calls", ["method", "code"], registry=registry)
    assert samples(registry) == {}
    calls.labels("/a/B", "OK").inc()
    calls.labels("/a/B", "OK").inc()
    calls.labels("/a/C", "INTERNAL").inc()

    assert samples(registry) == {
        ("calls_total", (("code", "OK"), ("method", "/a/B"))): 2,
        ("calls_total", (("code", "INTERNAL"), ("method", "/a/C"))): 1,
    }
    with pytest.raises(ValueError, match="2 labels"):
        calls.labels("/a/B")


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "\\n", 'a",code="x', "ü€"])
def test_labels_cannot_break_out(text: str) -> None:
    """A label's value comes back as it was, whatever is in it."""
    registry = Registry()
    Gauge("g", f"help {text}", ["name"], registry=registry).labels(text).set(1)

    assert samples(registry) == {("g", (("name", text),)): 1}
    (family,) = text_string_to_metric_families(registry.text().decode())
    assert family.documentation == f"help {text}"


def test_histogram() -> None:
    """Buckets are cumulative, a bound belongs to its bucket, and the last one holds all."""
    registry = Registry()
    spread = Histogram("s", "Spread", bounds=(0.1, 1, 5), registry=registry)
    for value in (0.05, 0.1, 0.5, 5, 7):
        spread.observe(value)

    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in samples(registry).items()
        if name == "s_bucket"
    }
    assert buckets == {"0.1": 2, "1": 3, "5": 4, "+Inf": 5}
    assert samples(registry)["s_count", ()] == 5
    assert samples(registry)["s_sum", ()] == pytest.approx(12.65)


def test_types_and_help() -> None:
    """The parser learns kind and help text of each metric, in the order they were made."""
    registry = Registry()
    Counter("a_total", "A", registry=registry)
    Gauge("b", "B", registry=registry)
    Histogram("c", "C", bounds=(1,), registry=registry)

    found = text_string_to_metric_families(registry.text().decode())
    assert [(one.name, one.type, one.documentation) for one in found] == [
        ("a", "counter", "A"),
        ("b", "gauge", "B"),
        ("c", "histogram", "C"),
    ]


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-9, 1.7e9, 2**53, 1e22, float("inf")])
def test_numbers_come_back_exactly(value: float) -> None:
    """No digit is lost."""
    registry = Registry()
    Gauge("g", "G", registry=registry).set(value)
    assert samples(registry) == {("g", ()): value}
