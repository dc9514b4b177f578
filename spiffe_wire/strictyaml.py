"""
YAML as the safe loader reads it, and a key that is there twice is an error (SEC-96).

A module of its own because only who reads settings needs it, and the library is slow to load.
"""

import contextlib
from collections.abc import Hashable
from typing import Any, Final

import yaml

from spiffe_core.errors import MalformedError

# What the library lets slip: for a date that is none, `!!int` without digits, `!!bool x`,
# `!!timestamp x`, a number of thousands of digits, thousands of brackets.
_SLIPS: Final = (
    ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError,
)  # fmt: skip


class YamlError(MalformedError):
    """A text is not YAML, or says two things."""


class _Loader(yaml.SafeLoader):
    """Safe, and a duplicate key is an error instead of the last one winning."""

    def close(self) -> None:
        """Undo the circles in it."""
        self.dispose()


def loads(text: str) -> Any:
    """
    Parse one YAML document.

    Raises:
        YamlError: it is none, or a key is there twice.
    """
    try:
        with contextlib.closing(_Loader(text)) as loader:
            return loader.get_single_data()
    except yaml.YAMLError as error:
        raise YamlError(f"settings are not YAML: {_without_snippet(error)}") from error
    except _SLIPS as error:
        raise YamlError("settings are not YAML that we read") from error


def _without_snippet(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the line itself: it may hold a secret (SEC-90)."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a character is not allowed"
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{error.context or ''} {error.problem or ''}".strip() + where


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise YamlError("settings are not YAML that we read: a list or map is a key")
        if key in made:
            raise YamlError(f"{key}: the key is there twice")
        try:
            made[key] = loader.construct_object(value_node, deep=True)
        except YamlError as error:
            raise YamlError(f"{key}.{error}") from error
    return made


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
