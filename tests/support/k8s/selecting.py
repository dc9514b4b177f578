"""Label and field selectors, as the API server reads them."""

import re
from collections.abc import Callable
from typing import Any

from tests.support.k8s.resources import Resource
from tests.support.k8s.status import bad_request

type_of_test = Callable[[dict[str, Any]], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^)]*)\)$")


def split_selector(text: str) -> list[str]:
    """Its requirements: commas within brackets do not part them."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def labels_test(text: str) -> type_of_test:
    """
    A label selector as a test of an object.

    Raises:
        ApiError: 400, it cannot be read.
    """
    tests = [_label_test(part) for part in split_selector(text)]

    def test(body: dict[str, Any]) -> bool:
        labels = body["metadata"].get("labels") or {}
        return all(one(labels) for one in tests)

    return test


def _label_test(part: str) -> Callable[[dict[str, str]], bool]:
    if found := _SET.match(part):
        key, word, listed = found.groups()
        values = {value.strip() for value in listed.split(",")}
        if word == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if "!=" in part:
        key, value = (side.strip() for side in part.split("!=", 1))
        return lambda labels: labels.get(key) != value
    if "=" in part:
        key, value = (side.strip() for side in part.replace("==", "=").split("=", 1))
        return lambda labels: labels.get(key) == value
    if not re.fullmatch(r"!?\s*[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?", part):
        raise bad_request(f"unable to parse requirement: found '{part}'")
    if part.startswith("!"):
        return lambda labels: part[1:].strip() not in labels
    return lambda labels: part in labels


def fields_test(text: str, resource: Resource) -> type_of_test:
    """
    A field selector as a test of an object.

    Raises:
        ApiError: 400, it cannot be read, or names a field that this resource cannot select by.
    """
    wanted: list[tuple[list[str], str, bool]] = []
    for part in split_selector(text):
        match = re.fullmatch(r"([^=!]+)(!=|==|=)(.*)", part)
        if match is None:
            raise bad_request(f"invalid selector: '{part}'; can't understand '{part}'")
        field, operator, value = match.groups()
        if field not in ("metadata.name", "metadata.namespace", *resource.fields):
            where = f"{resource.group}/{resource.version}, Resource={resource.plural}"
            raise bad_request(
                f'Unable to find "{where}" that match label selector "", field selector '
                f'"{text}": field label not supported: {field}'
            )
        wanted.append((field.split("."), value, operator != "!="))

    def test(body: dict[str, Any]) -> bool:
        return all((_at(body, path) == value) is same for path, value, same in wanted)

    return test


def required_name(text: str) -> str:
    """The one name that a field selector asks for, which authorisation then sees."""
    for part in split_selector(text):
        if found := re.fullmatch(r"metadata\.name==?(.+)", part):
            return found[1]
    return ""


def _at(body: dict[str, Any], path: list[str]) -> str:
    value: Any = body
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "false" if path[-1] == "unschedulable" else ""
    return str(value)
