"""YAML that can mean two things, or run code, is refused."""

import pytest

from spiffe_wire.strictyaml import YamlError, loads


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2", "a: the key is there twice"),
        ("a: {b: 1, b: 1}", "b: the key is there twice"),
        ("- {b: 1, 'b': 1}", "b: the key is there twice"),
        ("? [1]\n: 2", "a list or map is a key"),
        ("{{a: 1}: 2}", "a list or map is a key"),
        ("a: [", "not YAML"),
        ("a: 1\n---\na: 2", "single document"),
        ("a: &x [*x]", "recursive"),
        ("a: !!python/object/apply:os.system [id]", "constructor"),
        ("a: !!python/name:os.system", "constructor"),
        ("a: \x07", "not YAML"),
    ],
)
def test_sec_96_refused(text: str, why: str) -> None:
    """SEC-96: unsafe tags, and what two readers could read in two ways, are refused."""
    with pytest.raises(YamlError, match=why):
        loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), ("a: 1", {"a": 1}), ("a: {b: [x, 1h]}", {"a": {"b": ["x", "1h"]}})],
)
def test_read(text: str, value: object) -> None:
    """Ordinary YAML is read as everybody reads it."""
    assert loads(text) == value
