"""Label and field selectors, as the API server reads them."""

import re
from collections.abc import Callable
from typing import Any

from tests.support.k8s.resources import Resource
from tests.support.k8s.status import bad_request

Test = Callable[[dict[str, Any]], bool]

_NAME = r"([A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?)"
_SET = re.compile(rf"^{_NAME}\s+(in|notin)\s*\(([^)]*)\)$")
_EQUAL = re.compile(rf"^{_NAME}\s*(!=|==|=)\s*([-A-Za-z0-9_.]*)$")
_HAS = re.compile(rf"^(!?)\s*{_NAME}$")


def split_selector(text: str) -> list[str]:
    """Its requirements: commas within brackets do not part them."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def labels_test(text: str) -> Test:
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
    if found := _EQUAL.match(part):
        key, sign, value = found.groups()
        if sign == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := _HAS.match(part):
        key = found[2]
        if found[1]:
            return lambda labels: key not in labels
        return lambda labels: key in labels
    raise bad_request(f"found '{part}', expected: !, identifier, or 'end of string'")


def fields_test(text: str, resource: Resource) -> Test:
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
            raise bad_request(f"field label not supported: {field}")
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
