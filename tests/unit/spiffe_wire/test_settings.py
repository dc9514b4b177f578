"""Settings: what is not understood is refused with its path (SEC-95, SEC-96)."""
# ruff: noqa: RUF009 - settings are dataclass fields, made by `setting`

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from issuer.config import ServerSettings
from spiffe_wire.settings import (
    SettingsError,
    duration,
    duration_text,
    example,
    json_schema,
    load,
    rows,
    section,
    sections,
    setting,
)
from workload_api.agent.config import AgentSettings

patient = hypothesis_settings(deadline=None)  # the machine may be busy


class Colour(enum.Enum):
    """A choice."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    """Settings in settings."""

    pause: timedelta = setting("A pause", timedelta(seconds=5))
    deep: int = setting("A number", 7)

    def __post_init__(self) -> None:
        """An impossible value."""
        if self.deep == 13:
            raise SettingsError("deep: must not be 13")


@dataclass(frozen=True)
class Everything:
    """One setting of each kind."""

    name: str = setting("A text that must be given")
    count: int = setting("A number", 3)
    flag: bool = setting("A switch", False)
    place: Path = setting("A path", Path("/var/x"))
    maybe: Path | None = setting("A path, perhaps", None)
    colour: Colour = setting("A choice", Colour.RED)
    hue: Colour | None = setting("A choice, perhaps", None)
    uids: tuple[int, ...] = setting("Numbers", ())
    words: tuple[str, ...] = setting("Texts", ())
    inner: Inner = section("More", Inner)
    many: tuple[Inner, ...] = sections("Any number of more")


def read(text: str, environment: Mapping[str, str] | None = None) -> Everything:
    """Settings of a server that has one of each."""
    return load(Everything, "name: n\n" + text, environment or {}, "server")


# What is taken.


def test_defaults() -> None:
    """What is left out has its default, in sections too."""
    assert read("") == Everything(name="n")
    assert load(Everything, "", {"SPIFFE_ISSUER_SERVER_NAME": "n"}, "server").name == "n"


def test_every_kind_is_read() -> None:
    """Each kind of setting is read from its own form in YAML."""
    text = (
        "count: -4\nflag: true\nplace: /p\nmaybe: /m\ncolour: blue\nhue: red\n"
        "uids: [1, 2]\nwords: [a, 'b,c']\ninner: {pause: 1h30m, deep: 9}\n"
    )
    assert read(text) == Everything(
        name="n",
        count=-4,
        flag=True,
        place=Path("/p"),
        maybe=Path("/m"),
        colour=Colour.BLUE,
        hue=Colour.RED,
        uids=(1, 2),
        words=("a", "b,c"),
        inner=Inner(pause=timedelta(hours=1, minutes=30), deep=9),
    )


def test_the_environment_overrides() -> None:
    """A variable sets a key over the file, two underscores go one level down."""
    given_ = {
        "SPIFFE_ISSUER_SERVER_COUNT": "5",
        "SPIFFE_ISSUER_SERVER_FLAG": "true",
        "SPIFFE_ISSUER_SERVER_UIDS": "1, 2,3",
        "SPIFFE_ISSUER_SERVER_WORDS": "a,b",
        "SPIFFE_ISSUER_SERVER_COLOUR": "blue",
        "SPIFFE_ISSUER_SERVER_MAYBE": "/e",
        "SPIFFE_ISSUER_SERVER_INNER__PAUSE": "250ms",
        "SPIFFE_ISSUER_SERVER_INNER__DEEP": "-1",
        "SPIFFE_ISSUER_AGENT_COUNT": "6",
        "HOME": "/root",
    }
    found = read("count: 4\ninner: {deep: 2}\n", given_)
    assert (found.count, found.flag, found.uids, found.words) == (
        5,
        True,
        (1, 2, 3),
        ("a", "b"),
    )
    assert (found.colour, found.maybe) == (Colour.BLUE, Path("/e"))
    assert found.inner == Inner(pause=timedelta(milliseconds=250), deep=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SPIFFE_ISSUER_SERVER_PORT", "tcp://10.0.0.1:8081"),
        ("SPIFFE_ISSUER_SERVER_SERVICE_HOST", "10.0.0.1"),
        ("SPIFFE_ISSUER_SERVER_SERVICE_PORT_GRPC", "8081"),
        ("SPIFFE_ISSUER_SERVER_PORT_8081_TCP", "tcp://10.0.0.1:8081"),
        ("SPIFFE_ISSUER_SERVER_PORT_8081_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_kubernetes_puts_there(name: str, value: str) -> None:
    """Variables of a Service that is called as we are do not stop the server."""
    assert read("", {name: value}) == Everything(name="n")


def test_our_own_variable_is_no_setting() -> None:
    """The variable of our commands, which `issuer dev` sets, does not stop an agent."""
    load(Everything, "name: n", {"SPIFFE_ISSUER_AGENT_SOCKET": "/s"}, "agent")


# What is refused.

REFUSED = {
    "unknown key": ("nmae: x", r"^nmae: no such setting; known here: colour, count, flag"),
    "unknown key below": (
        "inner: {depe: 1}",
        r"^inner\.depe: no such setting; known here",
    ),
    "key twice": ("count: 1\ncount: 2", r"^count: the key is there twice"),
    "key twice below": ("inner: {deep: 1, deep: 2}", r"^inner\.deep: the key is there twice"),
    "number as text": ("count: '5'", r"^count: must be a whole number"),
    "number as switch": ("count: true", r"^count: must be a whole number"),
    "number as float": ("count: 1.0", r"^count: must be a whole number"),
    "switch as text": ("flag: 'true'", r"^flag: must be true or false"),
    "switch as number": ("flag: 1", r"^flag: must be true or false"),
    "list as text": ("words: 'a,b'", r"^words: must be a list"),
    "list of the wrong kind": ("uids: [a]", r"^uids: must be a whole number"),
    "text as number": ("colour: 5", r"^colour: must be text"),
    "no such choice": ("colour: green", r"^colour: must be one of red, blue"),
    "choice in capitals": ("colour: RED", r"^colour: must be one of"),
    "nothing": ("count:", r"^count: must be a whole number"),
    "section as text": ("inner: x", r"^inner: must be keys and values"),
    "empty section": ("inner:", r"^inner: must be keys and values"),
    "duration without unit": ("inner: {pause: '5'}", r"^inner\.pause: a duration reads"),
    "duration as number": ("inner: {pause: 5}", r"^inner\.pause: must be text"),
    "duration of no length": ("inner: {pause: ''}", r"^inner\.pause: a duration reads"),
    "duration too long": (f"inner: {{pause: {'9' * 30}d}}", r"^inner\.pause: a duration is"),
    "duration in Arabic digits": ("inner: {pause: '٣s'}", r"^inner\.pause: a duration reads"),
    "duration out of order": ("inner: {pause: 5s1h}", r"^inner\.pause: a duration reads"),
    "negative duration": ("inner: {pause: -5s}", r"^inner\.pause: a duration reads"),
    "impossible value": ("inner: {deep: 13}", r"^inner\.deep: must not be 13"),
    "relative path": ("place: x/y", r"^place: must be an absolute path"),
    "nobody's home": ("place: ~nosuchuser/x", r"^place: names a home folder"),
    "a list at the top": ("- x", "settings are not YAML"),
    "a merge": ("base: &b {deep: 1}\ninner:\n  <<: *b", "settings are not YAML"),
    "a Python object": ("count: !!python/object/apply:os.getpid []", "settings are not YAML"),
    "two documents": ("---\ncount: 1", "settings are not YAML"),
    "a date that is none": ("name2: 2026-99-99", "settings are not YAML"),
    "a thousand brackets": ("words: " + "[" * 5000, "settings are not YAML"),
    "a number without end": ("count: " + "9" * 5000, "settings are not YAML"),
    "a list as key": ("? [a]\n: b", "settings are not YAML"),
    "an anchor in itself": ("words: &a [*a]", "settings are not YAML"),
    "a control character": ("count: \x07", "settings are not YAML"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_sec_95_refused_with_its_path(what: str) -> None:
    """SEC-95, SEC-96: unknown, doubled, mistyped or impossible: refused with its place."""
    text, why = REFUSED[what]
    with pytest.raises(SettingsError, match=why):
        read(text)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("COUNT", "five", "^count: must be a whole number"),
        ("COUNT", "5.0", "^count: must be a whole number"),
        ("COUNT", "", "^count: must be a whole number"),
        ("COUNT", "٣", "^count: must be a whole number"),
        ("FLAG", "yes", "^flag: must be true or false"),
        ("UIDS", "1,x", "^uids: must be a whole number"),
        ("INNER__PAUSE", "5", r"^inner\.pause: a duration reads"),
        (
            "INNER_PAUSE",
            "5s",
            "^SPIFFE_ISSUER_SERVER_INNER_PAUSE: the environment",
        ),
        ("INNER", "x", "^SPIFFE_ISSUER_SERVER_INNER: the environment sets no such"),
        ("INNER_PORT", "8080", "^SPIFFE_ISSUER_SERVER_INNER_PORT: the environment sets no"),
        ("CUONT", "5", "^SPIFFE_ISSUER_SERVER_CUONT: the environment sets no such"),
        ("count", "5", "^SPIFFE_ISSUER_SERVER_count: the environment sets no such"),
    ],
)
def test_sec_95_the_environment_is_refused_too(name: str, value: str, why: str) -> None:
    """SEC-95: a variable that is misspelt or mistyped is refused like a key in the file."""
    with pytest.raises(SettingsError, match=why):
        read("", {f"SPIFFE_ISSUER_SERVER_{name}": value})


@pytest.mark.parametrize("given_", ["inner: x", "inner:", "inner: [1]"])
def test_sec_95_a_variable_below_what_is_no_section(given_: str) -> None:
    """SEC-95: a variable cannot be laid over a value of another kind."""
    with pytest.raises(SettingsError, match="inner: must be keys and values"):
        read(given_, {"SPIFFE_ISSUER_SERVER_INNER__DEEP": "1"})


def test_sec_95_what_must_be_set() -> None:
    """SEC-95: a key without a default is asked for by name, with what it means."""
    with pytest.raises(SettingsError, match=r"^name: must be set \(A text that must be"):
        load(Everything, "", {}, "server")


def test_sec_95_size_first() -> None:
    """SEC-95: a file of more than 1 MiB is not even parsed."""
    with pytest.raises(SettingsError, match="longer than 1 MiB"):
        read("#" * (1024 * 1024))


def test_sec_90_a_broken_file_is_not_quoted() -> None:
    """SEC-90: the place of an error is named, the line itself may hold a secret."""
    with pytest.raises(SettingsError, match=r"line 3, column \d+") as refused:
        read("words: [a,\npassword: s3cret: s3cret\n")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("kind", [ServerSettings, AgentSettings])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("trust_domain: Example.org", "^trust_domain: "),
        ("trust_domain: a\nlog_level: loud", "^log_level: must be one of debug"),
    ],
)
def test_sec_95_impossible_values_have_their_path(kind: type, text: str, why: str) -> None:
    """SEC-95: a value that only its meaning makes impossible is refused with its path too."""
    with pytest.raises(SettingsError, match=why):
        load(kind, text, {}, "server")


# One description.


@patient
@given(st.timedeltas(timedelta(0), timedelta(days=4000)))
def test_durations_there_and_back(value: timedelta) -> None:
    """A duration is written in the form that is read."""
    whole = timedelta(milliseconds=value // timedelta(milliseconds=1))
    assert duration(duration_text(value)) == whole


@pytest.mark.parametrize(("text", "seconds"), [("5m", 300), ("5ms", 0.005), ("1d1s", 86401)])
def test_units(text: str, seconds: float) -> None:
    """Minutes and milliseconds are told apart."""
    assert duration(text) == timedelta(seconds=seconds)


def test_any_number_of_sections() -> None:
    """A list of settings is read one by one, each with its own defaults."""
    found = read("many: [{deep: 1}, {}, {pause: 1m}]").many
    assert found == (Inner(deep=1), Inner(), Inner(pause=timedelta(minutes=1)))
    assert "many[].deep" in {row.path for row in rows(Everything)}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("many: {deep: 1}", "many: must be a list"),
        ("many: [1]", r"many\[0\]: must be keys and values"),
        ("many: [{}, {dep: 1}]", r"many\[1\].dep: no such setting"),
        ("many: [{deep: x}]", r"many\[0\].deep: must be a whole number"),
        ("many: [{}, {deep: 13}]", r"many\[1\].deep: must not be 13"),
    ],
    ids=["map", "number", "unknown", "type", "impossible"],
)
def test_sec_95_one_of_many_is_refused_with_its_path(text: str, why: str) -> None:
    """SEC-95: what is wrong in one of many has its number in its path."""
    with pytest.raises(SettingsError, match=why):
        read(text)


def test_sec_95_the_environment_sets_none_of_many() -> None:
    """SEC-95: what there can be any number of stands in the file alone."""
    for name in ("MANY", "MANY[]__DEEP", "MANY__DEEP"):
        with pytest.raises(SettingsError, match="sets no such setting"):
            read("", {f"SPIFFE_ISSUER_SERVER_{name}": "1"})


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (Everything, {"name": "n"}),
        (ServerSettings, {"trust_domain": "example.org"}),
        (AgentSettings, {"trust_domain": "example.org"}),
    ],
)
def test_the_example_is_the_defaults(kind: type, needed: dict[str, str]) -> None:
    """The example holds every setting, loads, and means the defaults; the schema takes it."""
    text = example(kind, needed)
    assert load(kind, text, {}, "server") == kind(**needed)
    jsonschema.validate(yaml.safe_load(text), json_schema(kind))
    for row in rows(kind):
        assert f"{row.path.rpartition('.')[2]}:" in text


@pytest.mark.parametrize("kind", [Everything, ServerSettings, AgentSettings])
def test_the_schema_is_one(kind: type) -> None:
    """The JSON schema is valid, closed, and describes every setting."""
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    assert [
        one for one in schema["properties"] if "description" not in schema["properties"][one]
    ] == []


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from(
        [
            "",
            "red",
            "blue",
            "/x",
            "~/x",
            "x",
            "5s",
            "1h30m",
            "5ms",
            "5",
            "true",
            "1,2",
            "d",
            "-1s",
        ]
    ),
    st.text(max_size=8),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
NAMES = ["name", "count", "flag", "place", "maybe", "colour", "hue", "uids", "words"]
TREES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NAMES, VALUES),
        "inner": st.one_of(
            VALUES,
            st.fixed_dictionaries(
                {}, optional={"pause": VALUES, "deep": VALUES, "odd": VALUES}
            ),
        ),
        "odd": VALUES,
    },
)
SCHEMA = jsonschema.Draft202012Validator(json_schema(Everything))


@patient
@given(TREES)
def test_what_the_loader_takes_the_schema_takes(tree: dict[str, Any]) -> None:
    """The schema refuses nothing that the loader accepts."""
    text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        load(Everything, text, {}, "server")
    except SettingsError:
        return
    SCHEMA.validate(yaml.safe_load(text))


@patient
@given(TREES)
def test_what_the_schema_takes_the_loader_takes(tree: dict[str, Any]) -> None:
    """What the schema accepts the loader accepts, save for what only a meaning can refuse."""
    text = yaml.safe_dump(tree, allow_unicode=True)
    if not SCHEMA.is_valid(yaml.safe_load(text)):
        return
    try:
        load(Everything, text, {}, "server")
    except SettingsError as error:
        meaning = ("deep: must not be 13", "home folder", "whole number", "longer than time")
        assert any(one in str(error) for one in meaning)  # JSON's 1.0 is a whole number


@patient
@given(st.text(max_size=60))
def test_sec_96_any_text_is_settings_or_an_error(text: str) -> None:
    """SEC-96: whatever the file holds, it is loaded or refused by a SettingsError."""
    try:
        load(Everything, text, {}, "server")
    except SettingsError:
        pass


PIECES = st.sampled_from(
    ["name: n\n", "inner:\n", "  deep: 1\n", "- ", "? ", ": ", "{", "}", "[", "]", "&a ", "*a",
     "!!str ", "!!int ", "!!bool ", "!!timestamp ", "!!float ", "!!binary ", "!!set ",
     "<<: ", "|\n", ">\n", "'", '"', "\n", " ", "\t", "#", "%YAML 1.1\n", "---\n", "...\n",
     "0x", "0b", "0o", "1_", "1:2", "2026-01-01", ".inf", ".nan", "=", "~", "null", "yes"]
)  # fmt: skip


@patient
@given(st.lists(PIECES, max_size=14).map("".join))
def test_sec_96_any_yaml_is_settings_or_an_error(text: str) -> None:
    """SEC-96: whatever YAML's own words make together, it is loaded or refused by us."""
    try:
        load(Everything, text, {}, "server")
    except SettingsError:
        pass


@patient
@given(
    st.dictionaries(
        st.sampled_from(["COUNT", "FLAG", "UIDS", "MAYBE", "INNER__PAUSE", "HUE"]),
        st.text(max_size=9),
    )
)
def test_sec_95_any_environment_is_settings_or_an_error(values: dict[str, str]) -> None:
    """SEC-95: whatever the environment holds, it is taken or refused by a SettingsError."""
    try:
        read("", {f"SPIFFE_ISSUER_SERVER_{name}": value for name, value in values.items()})
    except SettingsError:
        pass
