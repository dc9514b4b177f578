"""
Security requirements A: names, selectors, the strict JSON and base64url readers.

Over 500 lines: the tables of one subject stay together.
"""

import base64
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spiffe_core.agent import agent_id, require_agent_id
from spiffe_core.decision import decide
from spiffe_core.entry import EntryError
from spiffe_core.matching import MismatchError, exactly, one_of
from spiffe_core.selector import Selector, SelectorError, SetMatch
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain, path_of
from spiffe_core.strictjson import StrictJsonError, b64url_decode, b64url_encode, dumps, loads
from tests.support.store import NOW, TD, an_entry, an_id, node_id

# --- SEC-01 ---

FOREIGN = [
    "\n", "\r", "\r\n", "\t", "\x00", "\x01", "\x0b", "\x0c", "\x1b", "\x7f", " ", "\u00a0",
    "\u2028", "\u200b", "\ufeff", "%", "%2e", "%2f", "%00", "%61", "\\", "|", "^", "`", "{",
    "}", "<", ">", '"', "'", "!", "$", "&", "(", ")", "*", "+", ",", ";", "=", "~", "?", "#",
    "@", ":", "[", "]", "\u212a", "\u0131", "\u017f", "é", "e\u0301", "\uff41", "\uff0e",
    "\uff0f", "\u2215", "\u0430", "\u0660", "\ud800", "\U0001d41a",
]  # fmt: skip

HOSTILE = sorted(
    {
        *(f"spiffe://exam{one}ple.org/a" for one in FOREIGN),
        *(f"spiffe://example.org{one}/a" for one in FOREIGN),
        *(f"spiffe://example.org/a{one}b" for one in FOREIGN),
        *(f"spiffe://example.org/a{one}" for one in FOREIGN),
        *(f"{one}spiffe://example.org/a" for one in FOREIGN),
        *(f"spiffe:{one}//example.org/a" for one in FOREIGN),
        *(f"spiffe://{one}example.org/a" for one in FOREIGN),
        *(f"spiffe://example.org/{one}/a" for one in FOREIGN),
        "",
        "spiffe",
        "spiffe:",
        "spiffe:/",
        "spiffe://",
        "spiffe:///",
        "spiffe:////a",
        "spiffe:example.org/a",
        "spiffe:/example.org/a",
        "spiffe//example.org/a",
        "spiffe:///example.org/a",
        "spiffe:\\\\example.org\\a",
        "spiffe://example.org\\a",
        "http://example.org/a",
        "https://example.org/a",
        "sparfe://example.org/a",
        "spiffes://example.org/a",
        "xspiffe://example.org/a",
        "Spiffe://example.org/a",
        "SPIFFE://example.org/a",
        "spiffe://EXAMPLE.org/a",
        "spiffe://example.Org/a",
        "spiffe://spiffe://example.org/a",
        "spiffe://example.org/",
        "spiffe://example.org//",
        "spiffe://example.org//a",
        "spiffe://example.org/a/",
        "spiffe://example.org/a//b",
        "spiffe://example.org/.",
        "spiffe://example.org/..",
        "spiffe://example.org/./a",
        "spiffe://example.org/../a",
        "spiffe://example.org/a/.",
        "spiffe://example.org/a/..",
        "spiffe://example.org/a/./b",
        "spiffe://example.org/a/../b",
        "spiffe://example.org/a/%2e%2e/b",
        "spiffe://example.org:443/a",
        "spiffe://example.org:/a",
        "spiffe://user@example.org/a",
        "spiffe://user:password@example.org/a",
        "spiffe://@example.org/a",
        "spiffe://[::1]/a",
        "spiffe://[2001:db8::1]:80/a",
        "spiffe://example.org?x=1",
        "spiffe://example.org/a?x=1",
        "spiffe://example.org/a?",
        "spiffe://example.org#x",
        "spiffe://example.org/a#",
        "spiffe://example.org/a;v=1",
        "spiffe://example.org/a,spiffe://example.org/b",
        "spiffe://example.org/a spiffe://example.org/b",
        "spiffe://*/a",
        "spiffe://*.org/a",
        "spiffe://example.org/*",
        f"spiffe://{'a' * 256}",
        f"spiffe://{'a' * 256}/a",
        f"spiffe://{'a' * 3000}/a",
        f"spiffe://example.org/{'a' * (2049 - 21)}",
        f"spiffe://example.org{'/a' * 1100}",
        f"spiffe://example.org/{'é' * 1200}",
    }
)


def test_sec_01_the_table_is_long_enough() -> None:
    """The table of hostile IDs holds at least 200, each once."""
    assert len(HOSTILE) == len(set(HOSTILE)) >= 200


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:60])
def test_sec_01_hostile_ids_are_refused(text: str) -> None:
    """Every hostile ID is refused with our own error, which never quotes it."""
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse(text)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 80


def test_sec_01_the_hostile_ones_differ_from_a_good_one_by_little() -> None:
    """The twin of the hostile IDs, without the foreign characters, is accepted."""
    for text in ("spiffe://example.org/a", "spiffe://example.org/ab", "spiffe://example.org"):
        assert str(SpiffeId.parse(text)) == text


def test_sec_01_no_second_way_in() -> None:
    """What is hostile as a whole is refused in parts too: every way in is the one parser."""
    for text in HOSTILE:
        name, slash, path = text.removeprefix("spiffe://").partition("/")
        if text.startswith("spiffe://"):  # the others are hostile for their scheme
            with pytest.raises(SpiffeIdError):
                SpiffeId(TrustDomain.parse(f"spiffe://{name}"), slash + path)


# --- SEC-02 ---


@pytest.mark.parametrize(
    "segment",
    [
        "../x", "a/b", "", "%2fx", "/", "/a", "a/", ".", "..", "a\n", "\n", "a b", "a\x00",
        "é", "\u2215", "*", "a?b", "a#b", "\ud800", "a\\b",
    ],
)  # fmt: skip
def test_sec_02_a_value_is_one_segment(segment: str) -> None:
    """A value put into a path contributes one plain segment, or is refused."""
    with pytest.raises(SpiffeIdError):
        path_of("tag", segment)
    with pytest.raises(SpiffeIdError):
        path_of(segment, "tag")
    with pytest.raises(SpiffeIdError):
        agent_id(TD, "join_token", segment)
    with pytest.raises(SpiffeIdError):
        agent_id(TD, segment, "a")


def test_sec_02_the_whole_is_checked_again() -> None:
    """A path of legal segments that makes the ID too long is refused: 3,000 bytes."""
    assert path_of("a" * 3000) == "/" + "a" * 3000
    with pytest.raises(SpiffeIdError, match="longer than 2048"):
        agent_id(TD, "join_token", "a" * 3000)
    with pytest.raises(SpiffeIdError, match="at least one"):
        path_of()


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4))
@example(["a", "..", "b"])
def test_sec_02_n_values_are_n_segments(segments: list[str]) -> None:
    """However they are made up, n values give n segments, or nothing."""
    try:
        path = path_of(*segments)
    except SpiffeIdError:
        return
    assert path.split("/")[1:] == segments
    assert SpiffeId(TD, path).path == path


# --- SEC-03 ---

ODD = [
    ",",
    ":",
    ";",
    "*",
    ".",
    "[",
    "]",
    "|",
    "\n",
    "\t",
    "\x00",
    "?",
    "%",
    "\\",
    "^",
    "$",
    " ",
]
ODD_VALUES = [
    value
    for one in ODD
    for value in (
        one,
        f"a{one}b",
        f"{one}a",
        f"a{one}",
        f"uid:1000{one}uid:1001",
        f"a{one}{one}",
    )
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=ascii)
def test_sec_03_odd_selectors_match_themselves_alone(value: str) -> None:
    """An entry whose selector holds list or pattern characters matches exactly that text."""
    entry = an_entry(selectors=frozenset({Selector("unix", value)}))
    assert [one.value for one in entry.selectors] == [value]
    assert decide(entry.selectors, [entry], at=NOW).matched == (entry,)
    for other in ODD_VALUES + ["a", "ab", "uid:1000", "uid:1001"]:
        matched = decide(frozenset({Selector("unix", other)}), [entry], at=NOW).matched
        assert bool(matched) is (other == value)


@pytest.mark.parametrize("value", ODD_VALUES, ids=ascii)
def test_sec_03_a_selector_reads_back_unchanged(value: str) -> None:
    """Text and selector are one to one: the type ends at the first colon."""
    selector = Selector("unix", value)
    assert Selector.parse(str(selector)) == selector
    assert selector != Selector("unix", value + "x")
    assert selector != Selector("docker", value)


def test_sec_03_pairs_not_joined_text() -> None:
    """No two selectors have one text: a type holds no colon, a value may."""
    with pytest.raises(SelectorError, match="contains ':'"):
        Selector("a:b", "c")
    assert Selector.parse("a:b:c") == Selector("a", "b:c")


@pytest.mark.parametrize(
    "name",
    [
        "a,b", "a:b", "a;b", "a[b", "a]b", "a|b", "a\nb", "a\n", "\na", "a..b", ".a", "a.",
        "a*", "*a.b", "a.*.b", "*", "*.", "**.a", "*.*.a", "[a]", "a b", "a.b,c.d", ".", "",
    ],
    ids=ascii,
)  # fmt: skip
def test_sec_03_odd_dns_names_are_refused(name: str) -> None:
    """A DNS name with list or pattern characters never gets into an entry."""
    with pytest.raises(EntryError, match="invalid DNS name"):
        an_entry(dns_names=("good.example.org", name))
    assert an_entry(dns_names=("good.example.org",)).dns_names == ("good.example.org",)


def test_sec_03_ids_are_equal_or_not() -> None:
    """A list of allowed IDs accepts its members; no prefix, pattern or joined list is read."""
    check = one_of([an_id("/a"), an_id("/b")])
    check(an_id("/a"))
    check(an_id("/b"))
    for path in ("", "/a/b", "/ab", "/A", "/a.", "/.a", "/..."):
        with pytest.raises(MismatchError):
            check(SpiffeId(TD, path))
    dotted = exactly(SpiffeId.parse("spiffe://example.org/a.c"))
    with pytest.raises(MismatchError):
        dotted(SpiffeId.parse("spiffe://example.org/abc"))
    with pytest.raises(MismatchError):
        one_of([])(an_id("/a"))


@given(
    st.frozensets(st.tuples(st.sampled_from("ab"), st.sampled_from("ab,:*")), max_size=6),
    st.frozensets(st.tuples(st.sampled_from("ab"), st.sampled_from("ab,:*")), max_size=6),
)
def test_sec_03_sets_of_pairs(
    stored: frozenset[tuple[str, str]], given_: frozenset[tuple[str, str]]
) -> None:
    """The four set matches are those of sets of (type, value) pairs."""
    left = frozenset(Selector(*pair) for pair in stored)
    right = frozenset(Selector(*pair) for pair in given_)
    assert SetMatch.EXACT.holds(left, right) is (stored == given_)
    assert SetMatch.SUBSET.holds(left, right) is (
        len(stored) > 0 and all(one in given_ for one in stored)
    )
    assert SetMatch.SUPERSET.holds(left, right) is all(one in stored for one in given_)
    assert SetMatch.ANY.holds(left, right) is any(one in stored for one in given_)


# --- SEC-04 ---

RESERVED = [
    "/spire",
    "/spire/server",
    "/spire/agent",
    "/spire/agent/join_token/x",
    "/spire/x",
    "/spire/.spire",
]
LOOKS_RESERVED = ["/Spire", "/spire.x", "/spires", "/spire-server", "/x/spire", "/spire_/agent"]


@pytest.mark.parametrize("path", RESERVED)
def test_sec_04_reserved_names_are_no_workloads(path: str) -> None:
    """No entry may carry an ID in the reserved namespace."""
    with pytest.raises(SpiffeIdError, match="reserved namespace"):
        an_id(path).require_workload(TD)
    with pytest.raises(EntryError, match="reserved namespace"):
        an_entry(spiffe_id=an_id(path)).check_names(TD)


@pytest.mark.parametrize("path", LOOKS_RESERVED)
def test_sec_04_only_the_first_segment_reserves(path: str) -> None:
    """Names that only look like reserved ones are ordinary."""
    assert an_id(path).require_workload(TD) == an_id(path)


@pytest.mark.parametrize(
    ("attestor", "segment"),
    [
        ("..", "x"),
        (".", "x"),
        ("", "x"),
        ("join_token", ".."),
        ("a/b", "x"),
        ("x", "a/../../b"),
    ],
)
def test_sec_04_an_attestor_stays_below_its_name(attestor: str, segment: str) -> None:
    """An attestor yields IDs under /spire/agent/<attestor>/ and no others."""
    with pytest.raises(SpiffeIdError):
        agent_id(TD, attestor, segment)
    assert agent_id(TD, "join_token", "x").path == "/spire/agent/join_token/x"


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://example.org/spire/agent",
        "spiffe://example.org/spire/server",
        "spiffe://example.org/spire/agents/x",
        "spiffe://example.org/x/spire/agent/y",
        "spiffe://example.org",
        "spiffe://evil.test/spire/agent/join_token/x",
    ],
)
def test_sec_04_agents_have_agents_names(text: str) -> None:
    """An agent's ID is below /spire/agent/ in our own trust domain."""
    with pytest.raises(SpiffeIdError, match="not an agent"):
        require_agent_id(SpiffeId.parse(text), TD)
    assert require_agent_id(node_id("a"), TD) == node_id("a")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spiffe_id": TD.id}, "invalid spiffe ID: .*path is empty"),
        ({"spiffe_id": TrustDomain("evil.test").id}, "not a workload in trust domain"),
        ({"parent_id": TD.id}, "invalid parent ID: .*path is empty"),
        (
            {"parent_id": TrustDomain("evil.test").server_id},
            "invalid parent ID: .*not a member",
        ),
    ],
)
def test_sec_04_names_must_be_ours(changes: dict[str, Any], reason: str) -> None:
    """An entry's names lie in our trust domain and have a path (IOP-30)."""
    with pytest.raises(EntryError, match=reason):
        an_entry(**changes).check_names(TD)


# --- SEC-05: JSON ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a":1,"a":1}', "two members"),
        (b'{"a":1,"\\u0061":2}', "two members"),
        (b'[{"x":{"a":1,"a":2}}]', "two members"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "NaN"),
        (b'{"a":-Infinity}', "NaN"),
        (b"1e400", "out of range"),
        (b"-1e400", "out of range"),
        (b"[1e99999]", "out of range"),
        (b"\xff", "not UTF-8"),
        (b'"\xc3"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xc0\xaf"', "not UTF-8"),
        (b"\x00[]", "not JSON"),
        ("[]".encode("utf-16"), "not UTF-8"),
        ("[]".encode("utf-16-le"), "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"", "not JSON"),
        (b" ", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{}x", "not JSON"),
        (b"{}\x00", "not JSON"),
        (b"{},", "not JSON"),
        (b"[1,]", "not JSON"),
        (b'{"a":1,}', "not JSON"),
        (b"{a:1}", "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b"[01]", "not JSON"),
        (b"[+1]", "not JSON"),
        (b"[.5]", "not JSON"),
        (b"[1.]", "not JSON"),
        (b"[0x10]", "not JSON"),
        (b"[1_000]", "not JSON"),
        ("[\u0661]".encode(), "not JSON"),
        (b"// x\n{}", "not JSON"),
        (b"{}/* x */", "not JSON"),
        (b'"a\nb"', "not JSON"),
        (b'"a\x00b"', "not JSON"),
        (b'"\\x41"', "not JSON"),
        (b'"\\u00g0"', "not JSON"),
        (b'"abc', "not JSON"),
        (b'"abc\\', "not JSON"),
        (b"[1", "not JSON"),
        (b"]", "not JSON"),
        (b"\x0b[]", "not JSON"),
        (b"\xc2\xa0[]", "not JSON"),
        (b"True", "not JSON"),
        (b"undefined", "not JSON"),
        (b'"\\ud800"', "surrogate"),
        (b'"\\udc00\\ud800"', "surrogate"),
        (b'{"\\uDBFF":1}', "surrogate"),
        (b'[["\\ud800x\\udc00"]]', "surrogate"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_sec_05_what_readers_disagree_on_is_refused(text: bytes, reason: str) -> None:
    """JSON that two readers might read differently is refused, for its reason."""
    with pytest.raises(StrictJsonError, match=reason):
        loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b' \t\r\n[1, -1.5, "x", true, false, null]\n', [1, -1.5, "x", True, False, None]),
        (b'{"a":1,"A":2}', {"a": 1, "A": 2}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        ("\U0001f600".join('""').encode(), "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
        (b'"[[[[{{{{"', "[[[[{{{{"),
        (b'"\\"[["', '"[['),
        (b"-0", 0),
        (b"1e300", 1e300),
    ],
)
def test_sec_05_plain_json_is_read(text: bytes, value: Any) -> None:
    """JSON on which every reader agrees is read."""
    assert loads(text) == value
    assert loads(text.decode()) == value


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'], ids=["arrays", "objects", "both"])
def test_sec_05_depth(opening: str) -> None:
    """Depth 32 is read, depth 33 refused."""
    closing = "".join({"[": "]", "{": "}"}[one] for one in reversed(opening) if one in "[{")
    nested = opening.count("[") + opening.count("{")
    good = opening * (32 // nested) + "1" + closing * (32 // nested)
    assert loads(good)
    with pytest.raises(StrictJsonError, match="deeper than 32"):
        loads(f"[{good}]")


def test_sec_05_brackets_side_by_side_are_no_depth() -> None:
    """Any number of arrays and objects may stand in 32 levels, and none in a 33rd."""
    for inner in ("[]", "{}", "[[]]", '[{"a":1}]'):
        levels = 32 - len([one for one in inner if one in "[{"])
        many = "[" * levels + ",".join([inner] * 100) + "]" * levels
        assert loads(many)
        with pytest.raises(StrictJsonError, match="deeper than 32"):
            loads(f"[{many}]")


def test_sec_05_brackets_in_strings_are_no_depth() -> None:
    """Only structure counts as depth."""
    assert loads(json.dumps(["[{" * 500, '\\"[' * 500])) == ["[{" * 500, '\\"[' * 500]


@pytest.mark.parametrize(
    ("digits", "good"),
    [
        (2**53, True),
        (-(2**53), True),
        (2**53 + 1, False),
        (-(2**53) - 1, False),
        (10**30, False),
        (2**64, False),
    ],
)
def test_sec_05_integers(digits: int, good: bool) -> None:
    """Integers up to 2**53 on both sides are read exactly, those beyond refused."""
    if good:
        assert loads(f"[{digits}]") == [digits]
    else:
        with pytest.raises(StrictJsonError, match="out of range"):
            loads(f"[{digits}]")


def test_sec_05_a_million_bytes_and_not_one_more() -> None:
    """1 MiB is read; a byte more is refused before anything is parsed, in text as in bytes."""
    limit = 1024 * 1024
    assert loads(b'"' + b"a" * (limit - 2) + b'"') == "a" * (limit - 2)
    for text in (b'"' + b"a" * (limit - 1) + b'"', '"' + "é" * (limit // 2) + '"'):
        with pytest.raises(StrictJsonError, match="longer than"):
            loads(text)


BOMBS: dict[str, Callable[[], str]] = {
    "100,000 [": lambda: "[" * 100_000,
    "100,000 {": lambda: '{"a":' * 100_000,
    "5,000 digits": lambda: "9" * 5000,
    "5,000 digits, negative": lambda: "-" + "9" * 5000,
    "a million digits": lambda: "9" * 1_000_000,
    "an exponent of a million digits": lambda: "1e" + "9" * 1_000_000,
    "escaped quotes that never end": lambda: '"' + '\\"' * 520_000,
    "escaped quotes and a backslash": lambda: '"' + '\\"' * 520_000 + "\\",
    "quotes": lambda: '"' * 1_000_000,
    "brackets": lambda: "[]" * 500_000,
    "closed before opened": lambda: "]" * 100_000 + "[" * 200_000,
    "many equal members": lambda: "{" + '"a":1,' * 100_000 + '"a":1}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_sec_05_bombs_are_refused_soon(name: str) -> None:
    """A text made to exhaust a parser is refused within a second, with our own error."""
    text = BOMBS[name]()
    started = time.process_time()
    with pytest.raises(StrictJsonError):
        loads(text)
    assert time.process_time() - started < 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_sec_05_what_we_write_we_read(value: Any) -> None:
    """dumps and loads are each other's inverse, and the standard library agrees."""
    written = dumps(value)
    assert loads(written) == value
    assert json.loads(written) == value


@given(JSON, st.booleans())
def test_sec_05_what_others_write_we_read(value: Any, ascii_only: bool) -> None:
    """What the standard library writes, escaped or not, reads the same here."""
    assert loads(json.dumps(value, ensure_ascii=ascii_only)) == value


@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"1", b"-", b"e9", b".", b"null",
             b"NaN", b"\\u", b"d800", b"\xff", b" ", b'"a"', b"\n"]
        ),
        max_size=14,
    ).map(b"".join)
)  # fmt: skip
def test_sec_05_any_bytes(data: bytes) -> None:
    """Any bytes give a value that the standard library reads too, or our own error."""
    try:
        value = loads(data)
    except StrictJsonError:
        return
    assert json.loads(data) == value
    assert loads(dumps(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": "\ud800"}])
def test_sec_05_nothing_unreadable_is_written(value: Any) -> None:
    """The writer refuses what the reader would."""
    with pytest.raises(StrictJsonError):
        dumps(value)


# --- SEC-05: base64url ---


@pytest.mark.parametrize(
    "text",
    [
        "YQ==", "YQ=", "=", "====", "Y", "YWJjZ", "YR", "YWF", "YWJ", "Y Q", "YQ ", " YQ",
        "YQ\n", "\nYQ", "YW\n!!Jj", "Y\tQ", "YQ\r\n", "a+b_", "a/b_", "a+/b", "YQ.", "YQ!",
        "YQ\x00", "é", "\u212aQ", "\uff39Q", "\ud800", "YQ%3D", "-", "_", "_____",
    ],
    ids=ascii,
)  # fmt: skip
def test_sec_05_base64url_in_one_spelling(text: str) -> None:
    """Padding, white space, foreign characters and spare bits are refused."""
    with pytest.raises(StrictJsonError, match="base64url"):
        b64url_decode(text)


@given(st.binary(max_size=100))
def test_sec_05_base64url_round_trip(data: bytes) -> None:
    """Every byte string has one spelling, without padding, and reads back."""
    text = b64url_encode(data)
    assert text == base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert b64url_decode(text) == data


def test_sec_05_base64url_of_short_strings_one_to_one() -> None:
    """Of all texts of two characters 256 are read: one for each byte."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/= \n."
    found = {}
    for first in alphabet:
        for second in alphabet:
            try:
                found[first + second] = b64url_decode(first + second)
            except StrictJsonError:
                continue
    assert len(found) == 256
    assert set(found.values()) == {bytes([byte]) for byte in range(256)}


@given(st.text(st.characters(codec=None), max_size=20) | st.text("YQ=-_+/ \n", max_size=12))
def test_sec_05_base64url_of_any_text(text: str) -> None:
    """Any text decodes to bytes that are written as that same text, or is refused."""
    try:
        data = b64url_decode(text)
    except StrictJsonError:
        return
    assert b64url_encode(data) == text
