"""Reading what an Envoy asks for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffe_core.errors import MalformedError
from tests.support.sds import NODE, a_node, a_request
from workload_api.sds.request import (
    MAX_NAME_BYTES,
    MAX_NAMES,
    MAX_NAMES_BYTES,
    MAX_REASON,
    Node,
    SecretsRequest,
    legible,
    read_request,
)


def read(*names: str, **fields: Any) -> SecretsRequest:
    """A request, read."""
    return read_request(a_request(*names, **fields).SerializeToString())


def test_a_first_request() -> None:
    """A first request of Envoy 1.40: one name, no nonce, a present node."""
    assert read("default") == SecretsRequest(("default",), "", None, Node())


def test_names_are_a_set() -> None:
    """Order, repetition and empty names make no difference."""
    assert read("b", "", "a", "b").names == ("a", "b")
    assert read("").names == read().names == ()


def test_a_request_without_a_node() -> None:
    """Envoy may say who it is in the first request alone; then nothing is known anew."""
    assert read("a", node=None).node is None


def test_an_acceptance_and_a_refusal() -> None:
    """SDS-08: a refusal is told from an acceptance by its error_detail, be it empty."""
    assert read("a", response_nonce="n").refusal is None
    assert read("a", response_nonce="n", refusal="bad key").refusal == "bad key"
    assert read("a", response_nonce="n", refusal="").refusal == "no reason given"


@pytest.mark.parametrize("type_url", ["type.googleapis.com/envoy.config.listener.v3.Listener",
                                      "type.googleapis.com/x", "x"])  # fmt: skip
def test_sds_03_other_resources_are_refused(type_url: str) -> None:
    """SDS-03: only secrets are served; leaving the type out means them."""
    with pytest.raises(MalformedError, match="only resources of type"):
        read("a", type_url=type_url)
    assert read("a", type_url="").names == ("a",)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([str(one) for one in range(MAX_NAMES + 1)], id="many"),
        pytest.param(["n" * (MAX_NAME_BYTES + 1)], id="long"),
        pytest.param(["é" * (MAX_NAME_BYTES // 2 + 1)], id="long in bytes"),
        pytest.param(
            [f"{one:04}" * 256 for one in range(MAX_NAMES_BYTES // 1024 + 1)], id="together"
        ),
    ],
)
def test_sec_80_names_have_limits(names: list[str]) -> None:
    """SEC-80: too many names, too long ones, and too much of them are refused."""
    with pytest.raises(MalformedError, match="resource names"):
        read(*names)


def test_names_up_to_the_limits() -> None:
    """What is just within the limits is taken."""
    assert len(read(*map(str, range(MAX_NAMES))).names) == MAX_NAMES
    assert read("n" * MAX_NAME_BYTES).names


def test_a_nonce_has_a_limit() -> None:
    """SEC-80: a nonce is one of ours, which are short."""
    with pytest.raises(MalformedError, match="response_nonce"):
        read("a", response_nonce="n" * (MAX_NAME_BYTES + 1))


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (NODE, Node()),
        (a_node((1, 18, 0)), Node()),
        (a_node((1, 17, 9)), Node(is_old=True)),
        (a_node((0, 9, 0)), Node(is_old=True)),
        (a_node((0, 0, 0)), Node()),
        (a_node((2, 0, 0)), Node()),
        (a_node(disable_spiffe_cert_validation=True), Node(disables_validator=True)),
        (a_node(disable_spiffe_cert_validation=False), Node(disables_validator=False)),
        (a_node(disable_spiffe_cert_validation="true"), Node(disables_validator=True)),
        (a_node(disable_spiffe_cert_validation="False"), Node(disables_validator=False)),
        (a_node(disable_spiffe_cert_validation="1"), Node(disables_validator=True)),
        (a_node(disable_spiffe_cert_validation="maybe"), Node()),
        (a_node(disable_spiffe_cert_validation=1.0), Node()),
        (a_node(disable_spiffe_cert_validation={"a": True}), Node()),
        (a_node(other=True), Node()),
    ],
    ids=["present", "1.18", "1.17", "0.9", "no version", "2.0", "true", "false", "word true",
         "word False", "word 1", "no word", "number", "struct", "other key"],
)  # fmt: skip
def test_sds_06_what_counts_of_a_node(node: Any, expected: Node) -> None:
    """SDS-06: its version, if it is an Envoy, and one key of its metadata; bool or text."""
    assert read("a", node=node).node == expected


def test_another_program_counts_its_versions_otherwise() -> None:
    """SDS-06: version 1.2 of a program that is no Envoy says nothing of Envoy's validator."""
    node = a_node((1, 2, 0))
    node.user_agent_name = "another"
    assert read("a", node=node).node == Node()


def test_a_long_node_is_skipped() -> None:
    """What Envoy 1.40 says of itself, 61 KB in fields we do not name, is no hindrance."""
    data = a_request("a").SerializeToString()
    extension = b"\x52\x80\x08" + b"x" * 1024  # Node.extensions, number 10, of 1 KiB
    node = NODE.SerializeToString() + extension * 61
    size = len(node)
    field = b"\x12" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + node
    assert read_request(data + field) == read("a")


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x02\xff\xfe", b"\x0a\xff"],
                         ids=["tag", "not UTF-8", "cut"])  # fmt: skip
def test_bytes_that_are_no_request(data: bytes) -> None:
    """SEC-80: what cannot be parsed is the caller's mistake, and a typed one."""
    with pytest.raises(MalformedError, match="not a DiscoveryRequest"):
        read_request(data)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """Any bytes are read, or refused as malformed; nothing else comes out."""
    try:
        request = read_request(data)
    except MalformedError:
        return
    assert len(request.names) <= MAX_NAMES


def test_sec_91_a_reason_is_one_short_line() -> None:
    """SEC-91: what Envoy says becomes one line of bounded length, controls escaped."""
    assert legible("  Failed to load\n\x1b[31mkey\u2028 ") == r"Failed to load\n\x1b[31mkey"
    assert legible("a\u2028b") == r"a\u2028b"
    assert len(legible("x" * 10**6)) == MAX_REASON
    assert len(legible("\x1b" * 10**6)) <= 10 * MAX_REASON
