"""SPIFFE-ID: every row of the standard about IDs and trust domain names."""

import string
from collections.abc import Iterator

import jwt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.entry import EntryError
from spiffe_core.errors import MalformedError
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.matching import MismatchError, exactly, member_of, one_of
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from tests.support.authorities import (
    NOW,
    a_ca,
    a_jwt_authority,
    a_key,
    a_leaf,
    an_x509_authority,
)
from tests.support.store import TD, an_entry, an_id

NAME_BYTES = frozenset((string.ascii_lowercase + string.digits + ".-_").encode())
PATH_BYTES = frozenset((string.ascii_letters + string.digits + ".-_").encode())

LONGEST_NAME = "a" * 255
LONGEST_ID = "spiffe://example.org/" + "a" * (2048 - len("spiffe://example.org/"))

ACCEPTED = [
    "spiffe://example.org",
    "spiffe://example.org/a",
    "spiffe://example.org/A.b-c_9/...",
    "spiffe://1.2.3.4/a",
    "spiffe://a_b/c",
    "spiffe://a-b.c/d",
    "spiffe://example..org/a",
    "spiffe://-/x",
    "spiffe://-a-/x",
    "spiffe://.a/x",
    "spiffe://a./x",
    "spiffe://example.org/.a",
    "spiffe://example.org/..a",
    "spiffe://example.org/...",
    f"spiffe://{LONGEST_NAME}/a",
    LONGEST_ID,
]


@pytest.mark.parametrize("text", ACCEPTED, ids=lambda text: text[:40])
def test_accepted(text: str) -> None:
    """ID-01, ID-08, ID-09, ID-11, ID-12, ID-16: what the standard allows is taken as it is."""
    parsed = SpiffeId.parse(text)
    assert str(parsed) == text
    name, slash, path = text.removeprefix("spiffe://").partition("/")
    assert (parsed.trust_domain.name, parsed.path) == (name, slash + path)


@pytest.mark.parametrize(
    "text",
    ["spiffe:example.org/a", "spiffe:/example.org/a", "", "example.org/a", "/a", "//x/a"],
)
def test_id_01_made_of_scheme_authority_and_path(text: str) -> None:
    """An ID begins with a scheme and two slashes."""
    with pytest.raises(SpiffeIdError, match="scheme must be"):
        SpiffeId.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org/a",
        "sparfe://example.org/a",
        "example.org",
        "Spiffe://example.org/a",
        "SPIFFE://example.org/a",
        " spiffe://example.org/a",
        "\x00spiffe://example.org/a",
        "\x01spiffe://example.org/a",
        "\ufeffspiffe://example.org/a",
        "s\npiffe://example.org/a",
        "spiffe\n://example.org/a",
        "spiffe:\t//example.org/a",
    ],
)
def test_id_02_scheme(text: str) -> None:
    """The scheme is spiffe, in lower case, and nothing stands before or in it."""
    with pytest.raises(SpiffeIdError, match="scheme must be"):
        SpiffeId.parse(text)


@pytest.mark.parametrize("text", ["spiffe://", "spiffe:///a", "spiffe:////a"])
def test_id_03_trust_domain_is_there(text: str) -> None:
    """An ID without a trust domain is refused."""
    with pytest.raises(SpiffeIdError, match="trust domain is missing"):
        SpiffeId.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://example.org/a?x=1",
        "spiffe://example.org/a?",
        "spiffe://example.org?",
        "spiffe://example.org?x=1",
        "spiffe://example.org/?x",
    ],
)
def test_id_04_no_query(text: str) -> None:
    """A query, even an empty one, is refused."""
    with pytest.raises(SpiffeIdError):
        SpiffeId.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://example.org/a#x",
        "spiffe://example.org/a#",
        "spiffe://example.org#",
        "spiffe://example.org/#",
    ],
)
def test_id_05_no_fragment(text: str) -> None:
    """A fragment, even an empty one, is refused."""
    with pytest.raises(SpiffeIdError):
        SpiffeId.parse(text)


@pytest.mark.parametrize("user", ["u@", "u:p@", "@", ":@", "u%40@"])
def test_id_06_no_userinfo(user: str) -> None:
    """Userinfo, even an empty one, is refused."""
    with pytest.raises(SpiffeIdError, match="trust domain must be"):
        SpiffeId.parse(f"spiffe://{user}example.org/a")


@pytest.mark.parametrize("port", [":443", ":", ":0", ":x"])
def test_id_07_no_port(port: str) -> None:
    """A port, even an empty one, is refused."""
    with pytest.raises(SpiffeIdError, match="trust domain must be"):
        SpiffeId.parse(f"spiffe://example.org{port}/a")


@pytest.mark.parametrize("name", ["Example.org", "EXAMPLE.ORG", "example.orG", "eXample.org"])
def test_id_08_lower_case(name: str) -> None:
    """An upper-case trust domain is refused, not folded (C-02)."""
    for text in (name, f"spiffe://{name}"):
        with pytest.raises(SpiffeIdError, match="trust domain must be"):
            TrustDomain.parse(text)


def test_id_09_every_byte_of_a_name() -> None:
    """Of all 256 bytes a trust domain name takes a-z 0-9 . - _ and no other."""
    for byte, character in every_byte():
        for name in (f"a{character}b", character, f"{character}b", f"a{character}"):
            if byte in NAME_BYTES:
                assert TrustDomain(name).name == name
            else:
                with pytest.raises(SpiffeIdError):
                    TrustDomain(name)


@pytest.mark.parametrize(
    "character",
    ["\u212a", "é", "\uff41", "\u0430", "\u0660", "\u200b", "\u3002", "\U0001f600", "\ud800"],
)
def test_id_09_nothing_beyond_ascii(character: str) -> None:
    """Letters that only look like ASCII, or fold to it, are refused in names and paths."""
    for text in (f"spiffe://example.or{character}/a", f"spiffe://example.org/a{character}"):
        with pytest.raises(SpiffeIdError):
            SpiffeId.parse(text)


@pytest.mark.parametrize("name", ["ex%61mple.org", "%2e", "a%2Fb", "example.org%00"])
def test_id_10_no_percent_encoding_in_a_name(name: str) -> None:
    """A percent sign in a name is refused, not decoded."""
    with pytest.raises(SpiffeIdError):
        SpiffeId.parse(f"spiffe://{name}/a")


@pytest.mark.parametrize("name", ["[::1]", "[2001:db8::1]", "::1", "[v1.a]", "[1.2.3.4]"])
def test_id_11_no_ipv6(name: str) -> None:
    """IPv6 literals are refused; a dotted quad is a name like any other."""
    with pytest.raises(SpiffeIdError):
        SpiffeId.parse(f"spiffe://{name}/a")
    assert SpiffeId.parse("spiffe://1.2.3.4/a").trust_domain.name == "1.2.3.4"


@pytest.mark.parametrize(
    "name",
    ["example..org", "-a-", ".a", "a.", "1.2.3.4", "999.1", "xn--", "a" * 64, "-", "_", "."],
)
def test_id_12_names_are_no_dns_names(name: str) -> None:
    """A name that is no DNS name or IP address is a trust domain, equal to itself alone."""
    assert TrustDomain(name).name == name
    for other in (f"{name}.", f".{name}", name.strip(".") or "x", name.replace("..", ".")):
        assert (TrustDomain(name) == TrustDomain(other)) is (name == other)


def test_id_14_a_domain_does_not_federate_with_its_own_name() -> None:
    """An entry that federates with its own trust domain is refused."""
    entry = an_entry(federates_with=frozenset({TD}))
    with pytest.raises(EntryError, match="can't federate with its own"):
        entry.check_names(TD)
    federated = an_entry(federates_with=frozenset({TrustDomain("partner.test")}))
    assert federated.check_names(TD) is federated


@pytest.mark.parametrize("path", ["/%61", "/a%2fb", "/%2e%2e", "/%", "/a%00"])
def test_id_15_no_percent_encoding_in_a_path(path: str) -> None:
    """A percent sign in a path is refused, not decoded."""
    with pytest.raises(SpiffeIdError, match="path segments must be"):
        SpiffeId.parse(f"spiffe://example.org{path}")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("//a", "empty segment"),
        ("/a//b", "empty segment"),
        ("/./a", "dot segment"),
        ("/a/.", "dot segment"),
        ("/..", "dot segment"),
        ("/.", "dot segment"),
        ("/a/../b", "dot segment"),
        ("/a/..", "dot segment"),
    ],
)
def test_id_16_segments(path: str, reason: str) -> None:
    """Empty and dot segments are refused; three dots are a segment like any other."""
    with pytest.raises(SpiffeIdError, match=reason):
        SpiffeId.parse(f"spiffe://example.org{path}")
    assert SpiffeId.parse("spiffe://example.org/.../..a/.a").path == "/.../..a/.a"


@pytest.mark.parametrize("path", ["/", "/a/", "/a/b/", "//", "/a//"])
def test_id_17_no_trailing_slash(path: str) -> None:
    """A slash at the end is refused."""
    with pytest.raises(SpiffeIdError, match="end with a slash"):
        SpiffeId.parse(f"spiffe://example.org{path}")


def test_id_18_every_byte_of_a_path() -> None:
    """Of all 256 bytes a path segment takes a-z A-Z 0-9 . - _ and no other."""
    for byte, character in every_byte():
        if character == "/":
            continue  # it parts segments; ID-16 and ID-17 say where it may stand
        for segment in (f"a{character}b", f"{character}b", f"a{character}"):
            text = f"spiffe://example.org/x/{segment}/y"
            if byte in PATH_BYTES:
                assert str(SpiffeId.parse(text)) == text
            else:
                with pytest.raises(SpiffeIdError, match="path segments must be"):
                    SpiffeId.parse(text)


def test_id_20_2048_bytes() -> None:
    """ID-20, ID-21: an ID of 2047 and of 2048 bytes is taken, one of 2049 refused."""
    for size in (2047, 2048):
        text = "spiffe://example.org/" + "a" * (size - 21)
        assert len(text) == size
        assert an_entry(spiffe_id=SpiffeId.parse(text)).check_names(TD).spiffe_id.uri == text
    too_long = LONGEST_ID + "a"
    assert len(too_long) == 2049
    with pytest.raises(SpiffeIdError, match="longer than 2048"):
        SpiffeId.parse(too_long)


def test_a_long_text_is_refused_for_its_length() -> None:
    """SEC-01: length comes first, so that no rule is tried on a text of any length."""
    for text in ("spiffe://" + "é" * 3000, "spiffe://example.org/" + "/" * 100_000):
        with pytest.raises(SpiffeIdError, match="longer than 2048"):
            SpiffeId.parse(text)


@pytest.mark.parametrize("path", ["a", "a/b", ".", " /a", "\n"])
def test_a_path_begins_with_a_slash(path: str) -> None:
    """ID-01: the parts of an ID are put together as they would be read."""
    with pytest.raises(SpiffeIdError, match="start with a slash"):
        SpiffeId(TD, path)


@pytest.mark.parametrize("name_bytes", [1, 11, 100, 255])
def test_id_22_every_byte_counts(name_bytes: int) -> None:
    """The limit is on the whole ID, scheme and name included, however it is built."""
    name = TrustDomain("a" * name_bytes)
    longest = "/" + "p" * (2048 - len("spiffe://") - name_bytes - 1)
    assert len(SpiffeId(name, longest).uri) == 2048
    with pytest.raises(SpiffeIdError, match="longer than 2048"):
        SpiffeId(name, longest + "p")


@pytest.mark.parametrize(("size", "good"), [(254, True), (255, True), (256, False)])
def test_id_23_255_bytes_of_a_name(size: int, good: bool) -> None:
    """A trust domain name has at most 255 bytes."""
    if good:
        assert TrustDomain("a" * size).name == "a" * size
    else:
        with pytest.raises(SpiffeIdError, match="longer than 255"):
            SpiffeId.parse(f"spiffe://{'a' * size}/x")


def test_id_24_paths_compare_byte_for_byte() -> None:
    """A policy for /Payments does not match /payments, and no prefix of it."""
    policy = exactly(an_id("/Payments"))
    policy(SpiffeId.parse("spiffe://example.org/Payments"))
    for path in ("/payments", "/PAYMENTS", "/Payments/x", "/Payment", "/Payments.", ""):
        with pytest.raises(MismatchError):
            policy(SpiffeId(TD, path))


def test_id_25_signed_by_its_own_domain() -> None:
    """An SVID is valid only if an authority of the trust domain in its ID signed it."""
    ours = a_ca(which="ours")
    theirs = a_ca(which="theirs", uris=("spiffe://partner.test",))
    bundles = BundleSet.of(
        [
            Bundle(TD, (an_x509_authority(which="ours"),)),
            Bundle(
                TrustDomain("partner.test"),
                (an_x509_authority(which="theirs", uris=("spiffe://partner.test",)),),
            ),
        ]
    )
    good = a_leaf(ours, a_key("p256", "ours"))
    assert verify_x509_svid([good], bundles, at=NOW).spiffe_id == an_id("/w")
    bad = a_leaf(theirs, a_key("p256", "theirs"))
    with pytest.raises(MalformedError, match="no valid path"):
        verify_x509_svid([bad], bundles, at=NOW)


@pytest.mark.parametrize(
    "document",
    [
        b'{"sub":"spiffe://example.org/w","aud":["x"],"exp":4102444800}',
        b"ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2gu",
        b"spiffe://example.org/w",
        b"",
    ],
)
def test_id_32_only_svids_are_svids(document: bytes) -> None:
    """A bare JSON text or an SSH certificate is no SVID of either type."""
    bundles = BundleSet.of([Bundle(TD, (an_x509_authority(),), (a_jwt_authority(),))])
    with pytest.raises(MalformedError):
        X509Svid.from_chain([document])
    with pytest.raises(MalformedError):
        verify_jwt_svid(document.decode(), bundles, audience="x", at=NOW)


def test_id_32_a_jwt_svid_is_one() -> None:
    """The same claims, signed as a JWT-SVID, are accepted."""
    bundles = BundleSet.of([Bundle(TD, (), (a_jwt_authority(),))])
    claims = {"sub": "spiffe://example.org/w", "aud": ["x"], "exp": int(NOW.timestamp()) + 60}
    token = jwt.encode(claims, a_key("p256", "jwt"), "ES256", headers={"kid": "k1"})
    assert verify_jwt_svid(token, bundles, audience="x", at=NOW).spiffe_id == an_id("/w")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spiffe_id", "spiffe://partner.test/w"),
        ("spiffe_id", "spiffe://example.org.evil.test/w"),
        ("spiffe_id", "spiffe://example.or/w"),
        ("parent_id", "spiffe://partner.test/spire/agent/join_token/a"),
        ("parent_id", "spiffe://partner.test/spire/server"),
    ],
)
def test_id_34_nothing_outside_the_trust_domain(field: str, value: str) -> None:
    """An entry that names another trust domain is refused."""
    entry = an_entry(**{field: SpiffeId.parse(value)})
    with pytest.raises(
        EntryError, match=r'in trust domain|member of trust domain "example.org"'
    ):
        entry.check_names(TD)


def test_id_35_a_path_says_nothing_without_its_domain() -> None:
    """What is allowed for a path in one trust domain is not in another."""
    foreign = SpiffeId.parse("spiffe://partner.test/web")
    for policy in (exactly(an_id("/web")), one_of([an_id("/web")]), member_of(TD)):
        policy(an_id("/web"))
        with pytest.raises(MismatchError):
            policy(foreign)


# A second parser, written from the grammar: it walks the bytes, and shares nothing with the
# first, which cuts the text and matches expressions.


def by_grammar(text: str) -> tuple[str, str] | None:
    """The trust domain name and the path of *text*; None when it is no SPIFFE ID."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > 2048:
        return None
    at = 0
    for byte in b"spiffe://":
        if at == len(raw) or raw[at] != byte:
            return None
        at += 1
    start = at
    while at < len(raw) and raw[at] in NAME_BYTES:
        at += 1
    if not 1 <= at - start <= 255:
        return None
    name, path_start = raw[start:at], at
    while at < len(raw):
        if raw[at] != ord("/"):
            return None
        at += 1
        segment = at
        while at < len(raw) and raw[at] in PATH_BYTES:
            at += 1
        if raw[segment:at] in (b"", b".", b".."):
            return None
    return name.decode(), raw[path_start:].decode()


PIECES = [
    "spiffe://", "spiffe:/", "spiffe:", "SPIFFE://", "http://", "/", "//", ".", "..", "...",
    "a", "Z", "9", "-", "_", "example.org", "Example", "w", "%", "%2e", "?", "#", "@", ":", "[",
    "]", "*", "+", " ", "\n", "\r", "\t", "\x00", "\x7f", "é", "\u212a", "\uff0e", "\u2215",
    "\ud800", "a" * 254, "a" * 255, "a" * 1000, "a" * 2000,
]  # fmt: skip
NEAR_IDS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=6).map(lambda some: "spiffe://" + "".join(some)),
    st.text(st.characters(codec=None), max_size=40),
    st.text("spife:/.abZ9-_", max_size=30).map(lambda text: "spiffe://td/" + text),
)


@given(NEAR_IDS)
@example("spiffe://example.org\n/foo")
@example("spiffe://example.or\u212a/foo")
@example(LONGEST_ID)
@example(LONGEST_ID + "a")
def test_two_parsers_agree(text: str) -> None:
    """SEC-01: our parser and one written from the grammar accept and read the same."""
    expected = by_grammar(text)
    if expected is None:
        with pytest.raises(SpiffeIdError):
            SpiffeId.parse(text)
    else:
        parsed = SpiffeId.parse(text)
        assert (parsed.trust_domain.name, parsed.path) == expected
        assert str(parsed) == text


SEGMENTS = st.text(
    string.ascii_letters + string.digits + ".-_", min_size=1, max_size=12
).filter(lambda one: one not in (".", ".."))


@given(
    st.text(string.ascii_lowercase + string.digits + ".-_", min_size=1, max_size=255),
    st.lists(SEGMENTS, max_size=8),
)
def test_what_is_legal_round_trips(name: str, segments: list[str]) -> None:
    """SEC-01: every ID the grammar allows is accepted, and str(parse(s)) == s."""
    text = f"spiffe://{name}" + "".join(f"/{one}" for one in segments)
    assert str(SpiffeId.parse(text)) == text
    assert SpiffeId.parse(text) == SpiffeId(TrustDomain(name), text[len(name) + 9 :])


def every_byte() -> Iterator[tuple[int, str]]:
    """Each of the 256 bytes as a character, and how undecodable ones arrive from the system."""
    for byte in range(256):
        yield byte, chr(byte)
        if byte > 0x7F:
            yield byte, bytes([byte]).decode("utf-8", "surrogateescape")
