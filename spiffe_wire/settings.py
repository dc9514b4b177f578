"""
Settings of both daemons: YAML and environment into frozen dataclasses, once, at start.

Source: style 7, SEC-95 (unknown means no), SEC-96 (`safe_load` only).  A class of settings
is a frozen dataclass whose fields are made by `setting`; from it come the loader, the JSON
schema, an example and the reference page, so that none of them can disagree.
"""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from spiffe_core.errors import MalformedError

PREFIX: Final = "SPIFFE_ISSUER_"
MAX_BYTES: Final = 1024 * 1024
_T = TypeVar("_T")
_DURATION = re.compile(
    r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m(?!s))?(?:([0-9]+)s)?(?:([0-9]+)ms)?"
)
# Variables that begin like settings and are none: one of our own commands, and those that
# Kubernetes makes for a Service that is called as we are.
_NO_SETTING = re.compile(
    r"SPIFFE_ISSUER_AGENT_SOCKET=.*|\w+_SERVICE_(HOST|PORT\w*)=.*|\w+_PORT\w*=(tcp|udp|sctp)://.*"
    r"|\w+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*",
    re.DOTALL,
)
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class SettingsError(MalformedError):
    """A setting is unknown or impossible; the text starts with its path."""


def setting(doc: str, default: Any = MISSING, *, unsafe: bool = False) -> Any:
    """A field of settings: what it means, and its default unless it must be given."""
    return dataclasses.field(
        default=default, metadata={"doc": doc, "unsafe": unsafe}, kw_only=True
    )


def section(doc: str, kind: type[Any]) -> Any:
    """A field that holds further settings, all of which have defaults."""
    return dataclasses.field(default_factory=kind, metadata={"doc": doc}, kw_only=True)


def sections(doc: str) -> Any:
    """A field that holds any number of one kind of settings: ``tuple[Kind, ...]``."""
    return dataclasses.field(default=(), metadata={"doc": doc}, kw_only=True)


def load(kind: type[_T], text: str, environment: Mapping[str, str], role: str) -> _T:
    """
    Return settings of *kind* from YAML *text*, overridden by *environment*.

    ``SPIFFE_ISSUER_<ROLE>_<KEY>`` sets a key; a dot in its path is two underscores.  There
    numbers, booleans and comma-separated lists are text; in YAML they are what they are.

    Raises:
        SettingsError: unknown key, wrong type, impossible value, or one that is missing.
    """
    if len(text) > MAX_BYTES:
        raise SettingsError("settings are longer than 1 MiB")
    from spiffe_wire import strictyaml

    try:
        tree = strictyaml.loads(text)
    except strictyaml.YamlError as error:
        raise SettingsError(str(error)) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise SettingsError("settings must be keys and values")
    _override(kind, tree, environment, f"{PREFIX}{role.upper()}_")
    return _build(kind, tree, "")


class _Word(str):
    """A value from the environment, where everything is text."""

    __slots__ = ()


def duration(text: str) -> timedelta:
    """
    Parse ``1h30m``, ``5s``, ``250ms``.

    Raises:
        ValueError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError("a duration reads 1h30m, 5s or 250ms")
    days, hours, minutes, seconds, milliseconds = (int(one or 0) for one in match.groups())
    try:
        return timedelta(
            days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds
        )
    except OverflowError as error:
        raise ValueError("a duration is longer than time itself") from error


def duration_text(value: timedelta) -> str:
    """Return *value* in the form that `duration` reads."""
    left = int(value.total_seconds() * 1000)
    parts = []
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, for pages about it."""

    path: str
    kind: str
    default: str | None
    doc: str


def rows(kind: type[Any], path: str = "") -> list[Row]:
    """Every setting of *kind*, in order, with its path."""
    found = []
    for field, type_ in _fields(kind):
        here = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(type_):
            found += rows(typing.cast(type[Any], type_), here)
        elif (many := _many(type_)) is not None:
            found += rows(many, f"{here}[]")
        else:
            default = None if field.default is MISSING else _shown(field.default)
            found.append(Row(here, _named(type_), default, field.metadata["doc"]))
    return found


def unsafe_in_use(settings: Any, path: str = "") -> list[str]:
    """The paths of *settings* that lower safety and are not at their default."""
    found = []
    for field in dataclasses.fields(settings):
        value, here = getattr(settings, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            found += unsafe_in_use(value, f"{here}.")
        elif field.metadata.get("unsafe") and value != field.default:
            found.append(here)
    return found


def example(kind: type[Any], given: Mapping[str, str]) -> str:
    """Return YAML with every setting at its default; *given* fills those without one."""
    return "\n".join(_example(kind, given, "", "")) + "\n"


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of the YAML that `load` accepts."""
    properties: dict[str, Any] = {}
    required = []
    for field, type_ in _fields(kind):
        if dataclasses.is_dataclass(type_):
            properties[field.name] = json_schema(typing.cast(type[Any], type_))
        elif (many := _many(type_)) is not None:
            properties[field.name] = {"type": "array", "items": json_schema(many)}
        else:
            properties[field.name] = _schema(type_)
        properties[field.name]["description"] = field.metadata["doc"]
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
    return {
        "type": "object", "properties": properties, "additionalProperties": False,
        **({"required": required} if required else {}),
    }  # fmt: skip


def _fields(kind: type[Any]) -> list[tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(kind)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


def _build(kind: type[_T], tree: Mapping[str, Any], path: str) -> _T:
    known = {field.name: (field, type_) for field, type_ in _fields(kind)}
    for key in tree:
        if key not in known:
            raise SettingsError(
                f"{path}{key}: no such setting; known here: {', '.join(sorted(known))}"
            )
    values: dict[str, Any] = {}
    for name, (field, type_) in known.items():
        here = f"{path}{name}"
        if name not in tree:
            if field.default is MISSING and field.default_factory is MISSING:
                raise SettingsError(f"{here}: must be set ({field.metadata['doc']})")
            continue
        if dataclasses.is_dataclass(type_):
            if not isinstance(tree[name], dict):
                raise SettingsError(f"{here}: must be keys and values")
            values[name] = _build(typing.cast(type[Any], type_), tree[name], f"{here}.")
            continue
        if (many := _many(type_)) is not None:
            values[name] = _build_many(many, tree[name], here)
            continue
        try:
            values[name] = _value(type_, tree[name])
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{here}: {error}") from error
    try:
        return kind(**values)
    except SettingsError as error:
        raise SettingsError(f"{path}{error}") from error


def _build_many(kind: type[_T], given: Any, path: str) -> tuple[_T, ...]:
    if not isinstance(given, list):
        raise SettingsError(f"{path}: must be a list")
    made = []
    for number, item in enumerate(given):
        if not isinstance(item, dict):
            raise SettingsError(f"{path}[{number}]: must be keys and values")
        made.append(_build(kind, item, f"{path}[{number}]."))
    return tuple(made)


def _many(type_: Any) -> type[Any] | None:
    """The kind of settings that a field holds any number of, or None."""
    if typing.get_origin(type_) is not tuple:
        return None
    inner = typing.get_args(type_)[0]
    return inner if dataclasses.is_dataclass(inner) else None  # type: ignore[return-value]


def _value(type_: Any, given: Any) -> Any:
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        (inner,) = (one for one in typing.get_args(type_) if one is not type(None))
        return None if given is None else _value(inner, given)
    if typing.get_origin(type_) is tuple:
        if isinstance(given, _Word):
            given = [_Word(one.strip()) for one in given.split(",") if one.strip()]
        if not isinstance(given, list):
            raise ValueError("must be a list")
        return tuple(_value(typing.get_args(type_)[0], one) for one in given)
    if type_ is bool:
        if isinstance(given, _Word) and given in ("true", "false"):
            return given == "true"
        if not isinstance(given, bool):
            raise TypeError("must be true or false")
        return given
    if type_ is int:
        if isinstance(given, _Word) and _NUMBER.fullmatch(given):
            return int(given)
        if type(given) is not int:
            raise ValueError("must be a whole number")
        return given
    if not isinstance(given, str):
        raise TypeError("must be text")
    given = str(given)
    if type_ is timedelta:
        return duration(given)
    if type_ is Path:
        try:
            path = Path(given).expanduser()
        except RuntimeError as error:
            raise ValueError("names a home folder that is not there") from error
        if not path.is_absolute():
            # Started from another folder, a server would find no database, and begin anew.
            raise ValueError("must be an absolute path")
        return path
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        allowed = [one.value for one in type_]
        if given not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return type_(given)
    return given


def _override(
    kind: type[Any], tree: dict[str, Any], environment: Mapping[str, str], prefix: str
) -> None:
    # What there can be any number of is for the file alone.
    paths = {
        prefix + row.path.upper().replace(".", "__"): row.path
        for row in rows(kind)
        if "[]" not in row.path
    }
    for name in sorted(environment):
        if name not in paths:
            given = f"{name}={environment[name]}"
            if name.startswith(prefix) and not _NO_SETTING.fullmatch(given):
                raise SettingsError(f"{name}: the environment sets no such setting")
            continue
        *folders, last = paths[name].split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise SettingsError(f"{folder}: must be keys and values")
        place[last] = _Word(environment[name])


def _named(type_: Any) -> str:
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        return _named(typing.get_args(type_)[0])
    if typing.get_origin(type_) is tuple:
        return f"list of {_named(typing.get_args(type_)[0])}"
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return " or ".join(f"`{one.value}`" for one in type_)
    return {timedelta: "duration", Path: "path", str: "text", int: "number", bool: "yes or no"}[
        type_
    ]


def _shown(value: Any) -> str:
    if isinstance(value, timedelta):
        return duration_text(value)
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    if isinstance(value, str) and (not value or _NUMBER.fullmatch(value)):
        return f'"{value}"'  # a mode, which YAML would read as a number
    return "null" if value is None else str(value)


def _example(kind: type[Any], given: Mapping[str, str], path: str, pad: str) -> list[str]:
    lines = []
    for field, type_ in _fields(kind):
        here = f"{path}{field.name}"
        lines.append(f"{pad}# {field.metadata['doc']}")
        if dataclasses.is_dataclass(type_):
            lines.append(f"{pad}{field.name}:")
            lines += _example(typing.cast(type[Any], type_), given, f"{here}.", pad + "  ")
        elif (many := _many(type_)) is not None:
            lines += [f"{pad}{field.name}: []", f"{pad}# one of them:", f"{pad}#   -"]
            lines += [f"{pad}#{line}" for line in _example(many, {}, f"{here}[].", "     ")]
        else:
            value = given.get(here) or (
                "" if field.default is MISSING else _shown(field.default)
            )
            lines.append(f"{pad}{field.name}: {value}")
    return lines


def _schema(type_: Any) -> dict[str, Any]:
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(typing.get_args(type_)[0]), {"type": "null"}]}
    if typing.get_origin(type_) is tuple:
        return {"type": "array", "items": _schema(typing.get_args(type_)[0])}
    if type_ is bool:
        return {"type": "boolean"}
    if type_ is int:
        return {"type": "integer"}
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return {"type": "string", "enum": [one.value for one in type_]}
    if type_ is timedelta:
        return {
            "type": "string",
            "pattern": "^(?=.)([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$",
        }
    if type_ is Path:
        return {"type": "string", "pattern": "^[/~]"}
    return {"type": "string"}
