"""What can go wrong between a client and an API server, switched on and off by a test."""

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tests.support.k8s.calls import Call


@dataclass(eq=False)
class Fault:
    """One fault; as a context manager it ends with its block."""

    plan: "Faults"
    kind: str
    match: dict[str, Any]
    times: int | None = None
    seconds: float = 0
    code: int = 0
    retry_after: int | None = None
    size: int = 0
    body: bytes = b""
    met: int = 0
    """How many requests it has hit."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first request ran into it."""

    def applies_to(self, call: Call) -> bool:
        """Whether this call is meant: each field is equal; *path* is a beginning."""
        for key, value in self.match.items():
            if key == "path":
                if not call.path.startswith(value):
                    return False
            elif getattr(call, key) != value:
                return False
        return True

    def end(self) -> None:
        """No more; who hangs in it goes on."""
        self.ended.set()
        if self in self.plan.active:
            self.plan.active.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class Faults:
    """
    The faults of one server, the first that matches is met.

    Each takes the fields of a `Call` to match by (``verb="watch", plural="pods"``), and
    *times*, after which it ends by itself.
    """

    def __init__(self) -> None:
        self.active: list[Fault] = []

    def _add(self, kind: str, times: int | None, match: dict[str, Any], **more: Any) -> Fault:
        fault = Fault(self, kind, match, times, **more)
        self.active.append(fault)
        return fault

    def delay(self, seconds: float, times: int | None = None, **match: Any) -> Fault:
        """Answer late, and rightly."""
        return self._add("delay", times, match, seconds=seconds)

    def hang(self, times: int | None = None, **match: Any) -> Fault:
        """Do not answer until the fault ends."""
        return self._add("hang", times, match)

    def fail(
        self,
        code: int = 500,
        times: int | None = None,
        retry_after: int | None = None,
        **match: Any,
    ) -> Fault:
        """Answer with an error: 500 and 503 as Status, 429 as priority and fairness says it."""
        return self._add("fail", times, match, code=code, retry_after=retry_after)

    def reset(self, times: int | None = None, **match: Any) -> Fault:
        """Break the connection instead of an answer."""
        return self._add("reset", times, match)

    def garbage(
        self, times: int | None = None, body: bytes = b"\x00\xff{not json\n", **match: Any
    ) -> Fault:
        """Answer 200 with what is not JSON, or with any *body*; a watch gets such a line."""
        return self._add("garbage", times, match, body=body)

    def huge(self, size: int = 64 << 20, times: int | None = None, **match: Any) -> Fault:
        """Answer 200 with one string of *size* bytes; a watch gets such a line."""
        return self._add("huge", times, match, size=size)

    def truncate(self, times: int | None = None, **match: Any) -> Fault:
        """Answer the first half and break; a watch is cut within its first line."""
        return self._add("truncate", times, match)

    def clear(self) -> None:
        """End them all."""
        for fault in list(self.active):
            fault.end()

    def meeting(self, call: Call) -> Fault | None:
        """The fault that this call runs into, if any."""
        for fault in self.active:
            if fault.applies_to(call):
                fault.met += 1
                fault.hit.set()
                if fault.times is not None and fault.met >= fault.times:
                    self.active.remove(fault)
                return fault
        return None
