"""
One open stream of SDS: what is asked for, what was sent, and what Envoy made of it.

Source: SDS-08, SDS-09.  No clock and no socket: `stream` has those.  A request is about the
answer that bears its nonce; about any other it is too late, and is left alone.
"""

import contextlib
import enum
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from spiffe_core.errors import SpiffeError
from spiffe_wire.frontdoor.peer import UnixPeer
from spiffe_wire.pb.spiffe_issuer.v1 import explain_pb2
from workload_api.sds.request import Node, SecretsRequest
from workload_api.sds.resources import Answer, Terms

MAX_TOLD: Final = 50
"""Streams of one process: an Envoy has a few, and the answer fits 4 MiB whatever they say."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What there is to do about a request; nothing about one that accepts an answer."""

    is_question: bool = False
    """It asks for something, or for something else than before."""
    is_refusal: bool = False
    """Envoy does not take the last answer: to be told to people, and not to be answered."""


class Outcome(enum.Enum):
    """What became of the last answer."""

    NONE = "awaited"
    SENT = "sent"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(eq=False, slots=True)
class Exchange:
    """One stream, from its opening to its end."""

    peer: UnixPeer
    terms: Terms
    since: datetime
    """When its state became what it is."""
    names: tuple[str, ...] | None = None
    """None before the first request."""
    is_plain: bool = False
    is_due: bool = False
    """To be answered, be the answer the last one again."""
    version: str = ""
    accepted_version: str = ""
    outcome: Outcome = Outcome.NONE
    refusal: str = ""
    awaited: str = "it has not asked for anything yet"
    """Why nothing can be sent; empty when something was."""
    failure: SpiffeError | None = None
    """What ends it."""
    is_over: bool = False
    """The client has said all."""
    _node: Node = field(default_factory=Node)
    _nonce: str = ""

    def hear(self, request: SecretsRequest, at: datetime) -> Heard:
        """
        Take a request over, and return what is to be done.

        Raises:
            MalformedError: it asks for what can never be given.
        """
        if self._nonce and request.nonce != self._nonce:
            return Heard()
        self._node = request.node or self._node
        is_plain = self.terms.plain_for(self._node)
        self.terms.check(request.names, is_plain=is_plain)
        changed = (request.names, is_plain) != (self.names, self.is_plain)
        self.names, self.is_plain = request.names, is_plain
        self.is_due = self.is_due or changed
        is_refusal = False
        if self._nonce and request.refusal is not None:
            # Told once, however often an answer is refused.
            is_refusal = self.outcome is not Outcome.REFUSED
            self._become(Outcome.REFUSED, request.refusal, at)
        elif self._nonce:
            self.accepted_version = self.version
            self._become(Outcome.ACCEPTED, "", at)
        return Heard(changed, is_refusal)

    def wants(self, answer: Answer) -> bool:
        """True when *answer* is news, or was asked for."""
        return self.is_due or answer.version != self.version

    def send(self, answer: Answer, at: datetime) -> bytes:
        """Return the message for *answer*, under a nonce of its own."""
        self._nonce, self.version, self.is_due = secrets.token_hex(8), answer.version, False
        self.awaited = ""
        self._become(Outcome.SENT, "", at)
        return answer.with_nonce(self._nonce)

    def hold(self, why: str, at: datetime) -> bool:
        """Nothing can be sent now; return whether that is news."""
        if self.awaited == why:
            return False
        self.awaited, self.since = why, at
        return True

    def go_on(self, at: datetime) -> None:
        """What is asked for is there."""
        if self.awaited:
            self.awaited, self.since = "", at

    @property
    def is_content(self) -> bool:
        """True when the client has what it asks for."""
        return self.outcome is Outcome.ACCEPTED and not self.awaited

    def message(self) -> Any:
        """Return what an operator is told of it."""
        is_awaited = bool(self.awaited) or self.outcome is Outcome.NONE
        return explain_pb2.SdsStream(
            names=self.names,
            state=Outcome.NONE.value if is_awaited else self.outcome.value,
            reason=self.awaited if is_awaited else self.refusal,
            version=self.version,
            accepted_version=self.accepted_version,
            since=int(self.since.timestamp()),
        )

    def _become(self, outcome: Outcome, refusal: str, at: datetime) -> None:
        if self.outcome is not outcome:
            self.since = at
        self.outcome, self.refusal = outcome, refusal


class Exchanges:
    """The open streams of this agent."""

    def __init__(self) -> None:
        self._open: set[Exchange] = set()

    @contextlib.contextmanager
    def opened(self, peer: UnixPeer, terms: Terms, at: datetime) -> Iterator[Exchange]:
        """Keep one for a stream of *peer* while entered."""
        exchange = Exchange(peer, terms, at)
        self._open.add(exchange)
        try:
            yield exchange
        finally:
            self._open.discard(exchange)

    def of(self, pid: int) -> list[Any]:
        """
        Return what an operator is told of a process's streams, by what they ask for.

        `MAX_TOLD` at most, and of those that get what they ask for the fewest.
        """
        found = [one for one in self._open if one.peer.pid == pid and one.peer.alive()]
        found.sort(key=lambda one: (one.is_content, one.names or ()))
        found = sorted(found[:MAX_TOLD], key=lambda one: one.names or ())
        return [one.message() for one in found]

    def __len__(self) -> int:
        return len(self._open)
