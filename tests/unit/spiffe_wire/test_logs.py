"""Log lines: no secrets, no control characters, one line each (SEC-90, SEC-91)."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spiffe_wire.logs import LEVELS, JsonFormatter, TextFormatter, event, set_up

patient = hypothesis_settings(deadline=None)  # the machine may be busy

CANARY = "s3cret-canary"
SECRET_NAMES = [
    "token", "join_token", "secret", "key", "private_key", "jwt", "jwt_svid", "password",
    "svid", "Token", "PASSWORD", "Private_Key",
]  # fmt: skip
CONTROL = [chr(code) for code in (*range(32), *range(127, 160), 0x2028, 0x2029)]


def a_line(style: str, name: str = "happened", error: object = None, **fields: object) -> str:
    """What one event is written as."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logger = logging.Logger("test")  # noqa: LOG001 - of nobody else
    logger.addHandler(handler)
    event(logger, logging.WARNING, name, exc_info=error, **fields)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("name", SECRET_NAMES)
def test_sec_90_a_field_named_like_a_secret(style: str, name: str) -> None:
    """SEC-90: what a call site passes under a secret's name is never written, in any case."""
    line = a_line(style, **{name: CANARY, "other": "seen"})
    assert CANARY not in line
    assert "(redacted)" in line and "seen" in line


@pytest.mark.parametrize("style", ["json", "text"])
def test_sec_90_no_traceback(style: str) -> None:
    """SEC-90: an error's causes are written, not its frames: those hold values."""

    def deep() -> None:
        local = CANARY  # in the frame, and in the source line of a traceback
        raise ValueError("inner") from None if not local else OSError(2, "no such file")

    try:
        deep()
    except ValueError as error:
        line = a_line(style, error=error)
    assert "ValueError: inner <- FileNotFoundError: [Errno 2] no such file" in line
    assert "Traceback" not in line and "deep" not in line and "local" not in line


@pytest.mark.parametrize("style", ["json", "text"])
def test_causes_are_bounded(style: str) -> None:
    """A chain of causes that goes in circles ends."""
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert a_line(style, error=one).count("ValueError") == 5


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("character", CONTROL, ids=lambda one: f"{ord(one):04x}")
def test_sec_91_control_characters_are_escaped(style: str, character: str) -> None:
    """SEC-91: no control character or line separator reaches the log, in any place."""
    said = f"a{character}b"
    line = a_line(style, said, error=ValueError(said), why=said)
    assert line.endswith("\n")
    assert not set(line[:-1]) & set(CONTROL)


@patient
@given(st.text(), st.text(), st.text())
def test_sec_91_json_there_and_back(name: str, value: str, error: str) -> None:
    """SEC-91: a JSON line is one line, and holds exactly what was logged."""
    line = a_line("json", name.replace("%", ""), error=ValueError(error), why=value)
    assert line.count("\n") == 1
    found = json.loads(line)
    assert found["event"] == name.replace("%", "")
    assert found["why"] == value
    assert found["error"] == f"ValueError: {error}"
    assert set(found) == {"time", "level", "event", "logger", "why", "error"}


@patient
@given(st.text(), st.text())
def test_sec_91_text_is_one_line(value: str, error: str) -> None:
    """SEC-91: a line of text is one line that every stream can take."""
    line = a_line("text", error=ValueError(error), why=value)
    assert line.splitlines() == [line[:-1]]
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (5, 5),
        (True, True),
        (None, None),
        ("x", "x"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02 00:00:00+00:00"),
        (b"x", "b'x'"),
        (["a"], "['a']"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_values(value: object, written: object) -> None:
    """Numbers and booleans stay what they are, all else is its text; JSON stays JSON."""
    found = json.loads(a_line("json", what=value), parse_constant=pytest.fail)
    assert found["what"] == written


def test_a_field_cannot_pass_for_another() -> None:
    """SEC-91: a field called like a part of the line does not replace it."""
    line = json.loads(a_line("json", level="fatal", time="never", event="x", logger="y"))
    assert (line["level"], line["event"], line["logger"]) == ("warning", "happened", "test")
    assert line["time"] != "never"


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("level", LEVELS)
def test_set_up(style: str, level: str, root: logging.Logger) -> None:
    """From its level on, every logger of the process writes in one form."""
    stream = io.StringIO()
    set_up(style, level, stream)
    logging.getLogger("somebody.else").debug("hello %s", "there")
    logging.getLogger("somebody.else").error("bad\nthing")
    lines = stream.getvalue().splitlines()
    assert len(lines) == (2 if level == "debug" else 1)
    assert ("hello there" in lines[0]) == (level == "debug")
    assert lines[-1].startswith("{") == (style == "json")


def test_a_quiet_logger_costs_nothing() -> None:
    """Below the level, fields are not even turned into text."""

    class Loud:
        def __str__(self) -> str:
            raise AssertionError("was asked for its text")

    logger = logging.Logger("quiet", logging.ERROR)  # noqa: LOG001 - of nobody else
    event(logger, logging.INFO, "unheard", what=Loud())
