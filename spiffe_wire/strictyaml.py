"""
YAML as the safe loader reads it, and a key that is there twice is an error (SEC-96).

A module of its own because only who reads settings needs it, and the library is slow to load.
"""

import contextlib
from collections.abc import Hashable
from typing import Any

import yaml

from spiffe_core.errors import MalformedError


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
        raise YamlError(f"settings are not YAML: {error}") from error


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise YamlError("settings are not YAML that we read: a list or map is a key")
        if key in made:
            raise YamlError(f"{key}: the key is there twice")
        made[key] = loader.construct_object(value_node, deep=True)
    return made


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
