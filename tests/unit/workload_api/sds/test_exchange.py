"""One stream's state: what a request means after what was said before."""

import contextlib
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from spiffe_core.errors import MalformedError
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2
from tests.support.authorities import NOW
from workload_api.sds.exchange import MAX_TOLD, Exchange, Exchanges, Heard
from workload_api.sds.request import Node, SecretsRequest
from workload_api.sds.resources import Answer, Terms

LATER = NOW + timedelta(seconds=5)
FIRST, SECOND = Answer("v1", b""), Answer("v2", b"")
PLAIN = Node(disables_validator=True)


class APeer:
    """Who has a process ID, and lives."""

    def __init__(self, pid: int = 1, is_alive: bool = True) -> None:
        self.pid, self._is_alive = pid, is_alive

    def alive(self) -> bool:
        """Whether it lives."""
        return self._is_alive


def an_exchange(*names: str, answer: Answer | None = None) -> Exchange:
    """One that *names* were asked of, and to which *answer* was sent."""
    made = Exchange(APeer(), Terms(), NOW)
    if names:
        made.hear(SecretsRequest(names), NOW)
    if answer is not None:
        send(made, answer)
    return made


def send(exchange: Exchange, answer: Answer) -> str:
    """Send *answer* and return its nonce."""
    message = discovery_pb2.DiscoveryResponse.FromString(exchange.send(answer, NOW))
    return str(message.nonce)


def nonce_of(exchange: Exchange) -> str:
    """The nonce of what was sent last."""
    return exchange._nonce


def hear(exchange: Exchange, *names: str, at: Any = LATER, **fields: Any) -> Heard:
    """Say something about the last answer."""
    fields = {"nonce": nonce_of(exchange), **fields}
    return exchange.hear(SecretsRequest(names or exchange.names or (), **fields), at)


def state(exchange: Exchange) -> tuple[str, str]:
    """State and reason as an operator is told."""
    message = exchange.message()
    return message.state, message.reason


def test_a_first_request_is_a_question() -> None:
    """SDS-08: the first request is answered, whatever version it says it has."""
    exchange = an_exchange()
    assert exchange.hear(SecretsRequest(("default",)), NOW) == Heard(is_question=True)
    assert exchange.wants(FIRST)


def test_a_first_request_after_a_reconnect_to_another_agent() -> None:
    """SDS-08: a nonce of an earlier stream does not make a first request stale."""
    exchange = an_exchange()
    assert exchange.hear(SecretsRequest(("default",), "old"), NOW).is_question


def test_before_the_first_answer_names_may_change() -> None:
    """SDS-09: while a stream is held its client may ask for something else."""
    exchange = an_exchange("a")
    assert exchange.hear(SecretsRequest(("b",)), NOW).is_question
    assert not exchange.hear(SecretsRequest(("b",)), NOW).is_question
    assert exchange.names == ("b",)


def test_an_acceptance() -> None:
    """SDS-08: what was accepted is not sent again, and the next version is."""
    exchange = an_exchange("a", answer=FIRST)
    assert state(exchange) == ("sent", "")
    assert hear(exchange) == Heard()
    assert state(exchange) == ("accepted", "")
    assert exchange.accepted_version == "v1"
    assert not exchange.wants(FIRST)
    assert exchange.wants(SECOND)


def test_each_answer_has_its_nonce() -> None:
    """SDS-08: a nonce is fresh for each answer, be it the same answer again."""
    exchange = an_exchange("a")
    assert len({send(exchange, FIRST) for _ in range(20)}) == 20


@pytest.mark.parametrize("nonce", ["", "stale"])
def test_a_stale_nonce_is_ignored(nonce: str) -> None:
    """SDS-08: what is not about the last answer changes nothing, names neither."""
    exchange = an_exchange("a", answer=FIRST)
    assert hear(exchange, "b", nonce=nonce, refusal="no") == Heard()
    assert exchange.names == ("a",)
    assert state(exchange) == ("sent", "")


def test_new_names_are_a_question() -> None:
    """SDS-09: other names, asked for with an acceptance, are answered, be it by the same."""
    exchange = an_exchange("a", answer=FIRST)
    assert hear(exchange, "a", "b") == Heard(is_question=True)
    assert exchange.wants(FIRST)
    assert exchange.accepted_version == "v1"
    send(exchange, FIRST)
    assert not exchange.wants(FIRST)


def test_a_refusal_is_told_once() -> None:
    """SDS-08: a refused answer is told once and not sent again; the next one is."""
    exchange = an_exchange("a", answer=FIRST)
    hear(exchange)
    send(exchange, SECOND)
    assert hear(exchange, refusal="bad key") == Heard(is_refusal=True)
    assert state(exchange) == ("refused", "bad key")
    for number in range(3):
        assert hear(exchange, refusal=f"still {number}") == Heard()
    assert (exchange.version, exchange.accepted_version) == ("v2", "v1")
    assert not exchange.wants(SECOND)
    assert exchange.wants(FIRST)
    send(exchange, FIRST)
    assert hear(exchange, refusal="again").is_refusal


def test_a_refusal_with_other_names() -> None:
    """SDS-08, SDS-09: a refusal may ask for other names, which is a question."""
    exchange = an_exchange("a", answer=FIRST)
    assert hear(exchange, "b", refusal="no") == Heard(is_question=True, is_refusal=True)


def test_a_refusal_of_nothing() -> None:
    """A client that refuses before anything was sent has refused nothing."""
    exchange = an_exchange()
    assert exchange.hear(SecretsRequest(("a",), refusal="no"), NOW) == Heard(is_question=True)
    assert state(exchange)[0] == "awaited"


def test_who_it_is_is_said_once() -> None:
    """SDS-06: Envoy may say who it is in the first request alone; a change is a question."""
    exchange = an_exchange()
    exchange.hear(SecretsRequest(("ROOTCA",), node=PLAIN), NOW)
    send(exchange, FIRST)
    assert hear(exchange) == Heard()
    assert exchange.is_plain
    assert hear(exchange, node=Node()) == Heard(is_question=True)
    assert not exchange.is_plain


def test_all_in_a_plain_store() -> None:
    """SDS-06: every domain's roots are refused to an Envoy without the validator."""
    with pytest.raises(MalformedError, match="FED-43"):
        an_exchange().hear(SecretsRequest(("ALL",), node=PLAIN), NOW)


def test_waiting_is_shown_with_its_reason() -> None:
    """SDS-10: why nothing is sent is shown, since when, and what Envoy goes on with."""
    exchange = an_exchange("a")
    assert exchange.hold("no entry", LATER)
    assert not exchange.hold("no entry", LATER + timedelta(seconds=1))
    message = exchange.message()
    assert (message.state, message.reason) == ("awaited", "no entry")
    assert message.since == int(LATER.timestamp())
    send(exchange, FIRST)
    hear(exchange)
    exchange.hold("gone", LATER)
    assert state(exchange) == ("awaited", "gone")
    assert exchange.message().accepted_version == "v1"
    later = LATER + timedelta(seconds=9)
    exchange.go_on(later)
    assert state(exchange) == ("accepted", "")
    assert exchange.message().since == int(later.timestamp())
    exchange.go_on(later + timedelta(seconds=9))
    assert exchange.message().since == int(later.timestamp())


def test_streams_are_found_by_their_process() -> None:
    """An operator is told of the open streams of a living process, in one order."""
    open_ = Exchanges()
    mine, other, dead = APeer(7), APeer(8), APeer(7, is_alive=False)
    with open_.opened(mine, Terms(), NOW) as b, open_.opened(mine, Terms(), NOW) as a:
        with open_.opened(other, Terms(), NOW), open_.opened(dead, Terms(), NOW):
            b.hear(SecretsRequest(("b",)), NOW)
            a.hear(SecretsRequest(("a",)), NOW)
            assert len(open_) == 4
            assert [list(one.names) for one in open_.of(7)] == [["a"], ["b"]]
    assert len(open_) == 0
    assert open_.of(7) == []


def test_sec_80_only_so_many_are_told_of() -> None:
    """SEC-80: of a process with very many streams those are told of that lack something."""
    open_, peer = Exchanges(), APeer(7)
    with contextlib.ExitStack() as stack:
        for number in range(MAX_TOLD + 20):
            one = stack.enter_context(open_.opened(peer, Terms(), NOW))
            one.hear(SecretsRequest((f"{number:03}",)), NOW)
            send(one, FIRST)
            hear(one, refusal="bad key" if number >= MAX_TOLD + 10 else None)
        told = open_.of(7)
        assert len(told) == MAX_TOLD
        assert [one.state for one in told].count("refused") == 10
        assert [list(one.names) for one in told] == sorted(list(one.names) for one in told)


def test_answers_of_the_same_version_differ_in_their_nonce_alone() -> None:
    """The bytes of an answer are shared: a nonce is put behind them."""
    answer = replace(
        FIRST, body=discovery_pb2.DiscoveryResponse(version_info="v1").SerializeToString()
    )
    message = discovery_pb2.DiscoveryResponse.FromString(an_exchange("a").send(answer, NOW))
    assert (message.version_info, bool(message.nonce)) == ("v1", True)
