"""
Structured log events with stable names, as JSON lines or as text.

Source: SEC-90 (no secret in any output), SEC-91 (control characters escaped).  Log through
`event`; its fields are data, never parts of a sentence.
"""

import json
import logging
import math
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

LEVELS: Final = ("debug", "info", "warning", "error")
_FIELDS: Final = "event_fields"
# A field that is named like a secret is one; a mistake in a call site must not leak it.
_SECRET: Final = frozenset(
    {
        "token",
        "join_token",
        "secret",
        "key",
        "private_key",
        "jwt",
        "jwt_svid",
        "password",
        "svid",
    }
)


def event(
    logger: logging.Logger,
    level: int,
    name: str,
    /,
    *,
    exc_info: BaseException | None = None,
    **fields: object,
) -> None:
    """Log the event *name* with *fields*; instants and IDs are written as text."""
    if logger.isEnabledFor(level):
        logger.log(level, name, exc_info=exc_info, extra={_FIELDS: fields})


def set_up(style: str, level: str, stream: TextIO | None = None) -> None:
    """Send every log line of this process to *stream* as ``json`` or ``text``."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # It reports every look at a schema; a migration that fails raises anyway.
    logging.getLogger("alembic").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; json.dumps escapes every control character."""
        line: dict[str, Any] = {name: _text(value) for name, value in _fields(record).items()}
        # Last, so that no field can pass for one of them.
        line |= {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _causes(record.exc_info[1])
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """One line for people: time, level, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with control characters escaped."""
        parts = [_time(record), f"{record.levelname.lower():<7}", record.getMessage()]
        parts += [f"{name}={_text(value)}" for name, value in _fields(record).items()]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"error={_causes(record.exc_info[1])}")
        line = " ".join(parts).translate(_ESCAPES)
        # A file name may hold what no stream can encode.
        return line.encode(errors="backslashreplace").decode()


# C1 is what terminals obey too; the last two end a line for those who read it.
_ESCAPES: Final = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, _FIELDS, {})
    return {k: "(redacted)" if k.lower() in _SECRET else v for k, v in fields.items()}


def _text(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _causes(error: BaseException | None) -> str:
    """The error and what it was raised from; a traceback would carry values along."""
    parts: list[str] = []
    while error is not None and len(parts) < 5:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return " <- ".join(parts)
