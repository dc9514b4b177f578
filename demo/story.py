"""
What happens in the demo, step by step, and the facts each step yields.

`tell` drives the processes and fills a `Facts`; how it looks is `demo.screen`'s business.
"""

import asyncio
import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from demo.casting import Cast
from demo.player import Event, Player

AUDIENCE = "spiffe://example.org/payments"
PUSHES = 24


@dataclass(frozen=True, slots=True)
class Added:
    """An entry, and the monotonic instant at which the API acknowledged it."""

    entry_id: str
    acknowledged_at: float


class Domain(Protocol):
    """The trust domain that the story plays in."""

    trust_domain: str
    endpoint: str
    started_at: float

    async def add_entry(self, path: str, selectors: tuple[str, ...]) -> Added:
        """Add an entry."""
        ...

    async def remove_entry(self, entry_id: str) -> None:
        """Remove an entry."""
        ...

    async def explain(self, pid: int) -> tuple[str, str]:
        """Return why a process has the identities it has: the machine word, and the text."""
        ...

    async def renew(self, path: str) -> float:
        """Force a renewal; return the monotonic instant at which it was asked for."""
        ...


class Screen(Protocol):
    """Where the story is told."""

    def step(self, text: str) -> None:
        """A step begins."""
        ...

    def line(self, text: str) -> None:
        """Something happened."""
        ...


@dataclass
class Facts:
    """What ``make demo JSON=1`` prints as its last line."""

    spiffe_ids: list[str] = field(default_factory=list)
    told_apart_by: str = ""
    mtls: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    entry_to_svid_ms: dict[str, float] = field(default_factory=dict)
    denied_then_entry_ms: float = 0.0
    start_to_first_svid_ms: float = 0.0
    rotation: dict[str, Any] = field(default_factory=dict)
    jwt: dict[str, Any] = field(default_factory=dict)


async def tell(domain: Domain, cast: Cast, screen: Screen) -> Facts:
    """Play the whole story; every step that does not come out as promised raises."""
    facts = Facts(told_apart_by=cast.told_apart_by)
    async with AsyncExitStack() as stack:

        async def player(name: str) -> Player:
            return await stack.enter_async_context(Player(cast.roles[name], domain.endpoint))

        shop, payments = await _first_svids(domain, cast, screen, facts, player)
        await _mutual_tls(domain, shop, payments, screen, facts)
        await _refusal(domain, await player("stranger"), screen, facts)
        await _jwt(shop, screen, facts)
        await _pushes(domain, shop, screen, facts)
        await _late_entry(domain, await player("latecomer"), screen, facts)
        await _renewal(domain, payments, screen, facts)
    return facts


async def _first_svids(
    domain: Domain, cast: Cast, screen: Screen, facts: Facts, player: Any
) -> tuple[Player, Player]:
    screen.step(f"Two workloads, told apart by {cast.told_apart_by}")
    screen.line(cast.strength)
    for name in ("shop", "payments"):
        selectors = cast.roles[name].selectors
        await domain.add_entry(f"/{name}", selectors)
        screen.line(
            f"entry  spiffe://{domain.trust_domain}/{name}  for  {'  '.join(selectors)}"
        )
    players = await asyncio.gather(player("shop"), player("payments"))
    for one in players:
        await one.do("watch")
    firsts = [await one.expect("svids") for one in players]
    facts.start_to_first_svid_ms = _ms(
        min(first["received_at"] for first in firsts) - domain.started_at
    )
    for one, first in zip(players, firsts, strict=True):
        (spiffe_id,) = first["svids"]
        facts.spiffe_ids.append(spiffe_id)
        screen.line(f"pid {one.pid}  got  {spiffe_id}  over the Unix socket, with no secret")
    screen.line(
        f"from starting the server to the first SVID: {facts.start_to_first_svid_ms:.0f} ms"
    )
    return players[0], players[1]


async def _mutual_tls(
    domain: Domain, shop: Player, payments: Player, screen: Screen, facts: Facts
) -> None:
    screen.step("Mutual TLS between them; each checks the other's SPIFFE ID")
    shop_id, payments_id = facts.spiffe_ids
    await payments.do("serve", expect=shop_id)
    port = (await payments.expect("listening"))["port"]
    await shop.do("connect", port=port, expect=payments_id)
    server_saw, client_saw = await asyncio.gather(payments.expect("mtls"), shop.expect("mtls"))
    facts.mtls = {"server_saw": server_saw["peer"], "client_saw": client_saw["peer"]}
    screen.line(f"payments saw {server_saw['peer']}")
    screen.line(f"shop saw {client_saw['peer']}, and read: {client_saw['answer']}")


async def _refusal(domain: Domain, stranger: Player, screen: Screen, facts: Facts) -> None:
    screen.step("A third process, with no entry, is refused")
    await stranger.do("fetch")
    answer = await stranger.expect("refused")
    screen.line(f"it is told: {answer['code']}: {answer['text']}")
    reason, text = await domain.explain(stranger.pid)
    facts.refused = {"reason": reason, "text": text}
    screen.line(f"the operator asks `issuer explain --pid {stranger.pid}`:")
    for one in text.splitlines():
        screen.line(f"  {one}")


async def _jwt(shop: Player, screen: Screen, facts: Facts) -> None:
    screen.step("A JWT-SVID, fetched by shop and validated for its audience")
    await shop.do("jwt", audience=AUDIENCE)
    seen = await shop.expect("jwt")
    facts.jwt = {key: seen[key] for key in ("subject", "audience", "validated")}
    screen.line(
        f"subject {seen['subject']}, audience {seen['audience'][0]}, signature and times good"
    )


async def _pushes(domain: Domain, shop: Player, screen: Screen, facts: Facts) -> None:
    screen.step(f"{PUSHES} entries come and go while shop's stream is open: each is pushed")
    taken = []
    for number in range(PUSHES):
        wanted = f"spiffe://{domain.trust_domain}/shop/extra-{number}"
        since = len(shop.seen)
        added = await domain.add_entry(f"/shop/extra-{number}", shop.role.selectors)
        update = await shop.expect("svids", partial(_holds, wanted), since=since)
        taken.append(_ms(update["received_at"] - added.acknowledged_at))
        # Taken away again: a workload with dozens of identities would measure its own parsing.
        since = len(shop.seen)
        await domain.remove_entry(added.entry_id)
        await shop.expect("svids", partial(_lacks, wanted), since=since)
    facts.entry_to_svid_ms = {
        "n": len(taken),
        "median": round(statistics.median(taken), 2),
        "max": round(max(taken), 2),
    }
    screen.line(
        f"API's acknowledgement to SVID in the workload's hands: median "
        f"{statistics.median(taken):.1f} ms, max {max(taken):.1f} ms"
    )


async def _late_entry(domain: Domain, late: Player, screen: Screen, facts: Facts) -> None:
    screen.step(
        "A workload that started before its entry: denied, then picked up by its own retry"
    )
    await late.do("watch")
    await late.do("fetch")
    await late.expect("refused")  # the stream beside it, opened earlier, was refused as well
    await asyncio.sleep(0.5)
    since = len(late.seen)
    added = await domain.add_entry("/latecomer", late.role.selectors)
    update = await late.expect("svids", since=since)
    facts.denied_then_entry_ms = _ms(update["received_at"] - added.acknowledged_at)
    screen.line(f"entry added, SVID received {facts.denied_then_entry_ms:.1f} ms later")


async def _renewal(domain: Domain, payments: Player, screen: Screen, facts: Facts) -> None:
    screen.step("A forced renewal reaches the open stream")
    last = next(one for one in reversed(payments.seen) if one["event"] == "svids")
    ((spiffe_id, before),) = last["svids"].items()
    since = len(payments.seen)
    asked = await domain.renew("/payments")
    update = await payments.expect(
        "svids", lambda one: one["svids"].get(spiffe_id, before) != before, since=since
    )
    after = update["svids"][spiffe_id]
    facts.rotation = {
        "serial_before": before,
        "serial_after": after,
        "ms": _ms(update["received_at"] - asked),
    }
    screen.line(f"serial {before[:12]}… became {after[:12]}… in {facts.rotation['ms']:.1f} ms")


def _holds(spiffe_id: str, event: Event) -> bool:
    return spiffe_id in event["svids"]


def _lacks(spiffe_id: str, event: Event) -> bool:
    return spiffe_id not in event["svids"]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
