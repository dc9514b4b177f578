"""Attested agents and join tokens in SQL (SPIRE API 5.2; SEC-50, SEC-52, SEC-54)."""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, and_, delete, func, insert, or_, select, update

from issuer.store.events import EventKind, EventRepository
from issuer.store.rows import PAGE, agent_of, seconds, selectors_text
from issuer.store.tables import agents, tokens
from spiffe_core.agent import AttestedAgent
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import AbortedError, AlreadyExistsError, MalformedError, NotFoundError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.spiffeid import SpiffeId

RETRY_WINDOW: Final = timedelta(seconds=60)  # SEC-50: the reply may have been lost
EXPIRED_KEPT: Final = timedelta(days=1)
"""Who comes late with a token is told that, and not that it never was."""


class AgentRepository:
    """Attested agents, within one transaction."""

    def __init__(self, connection: Connection, events: EventRepository) -> None:
        self._connection = connection
        self._events = events

    def get(self, agent_id: SpiffeId) -> AttestedAgent:
        """
        Return one agent.

        Raises:
            NotFoundError: no such agent.
        """
        found = self.find(agent_id)
        if found is None:
            raise NotFoundError("agent not found")
        return found

    def find(self, agent_id: SpiffeId) -> AttestedAgent | None:
        """Return one agent, or None."""
        rows = self._connection.execute(select(agents).where(agents.c.id == agent_id.uri))
        found = rows.mappings().one_or_none()
        return None if found is None else agent_of(found)

    def attested(self, agent: AttestedAgent) -> None:
        """
        Store what an attestation yielded; a ban wins over it (SEC-52).

        Raises:
            AgentDeniedError: the agent is banned.
        """
        values = {
            "serial": agent.serial,
            "expires_at": seconds(agent.expires_at),
            "new_serial": "",
            "new_expires_at": 0,
            "selectors": selectors_text(agent.selectors),
            "can_reattest": agent.can_reattest,
            "key_hash": agent.key_hash,
            "new_key_hash": b"",
        }
        crash_point("node.before_insert")
        changed = self._connection.execute(
            update(agents)
            .where(agents.c.id == agent.id.uri, agents.c.banned.is_(False))
            .values(values)
        ).rowcount
        if not changed:
            if self.find(agent.id) is not None:
                raise AgentDeniedError(
                    "failed to attest: agent is banned", DenialReason.AGENT_BANNED
                )
            self._connection.execute(
                insert(agents).values(
                    id=agent.id.uri,
                    attestation_type=agent.attestation_type,
                    banned=False,
                    agent_version="",
                    **values,
                )
            )
        crash_point("node.inserted")
        self._events.add(EventKind.AGENT, agent.id.uri)

    def renewed(
        self, agent_id: SpiffeId, serial: str, expires_at: datetime, key_hash: bytes
    ) -> None:
        """
        Store a renewal; the old certificate stays good until the new one is used.

        Raises:
            AgentDeniedError: banned or gone meanwhile.
        """
        self._change_unless_banned(
            agent_id,
            new_serial=serial,
            new_expires_at=seconds(expires_at),
            new_key_hash=key_hash,
        )
        crash_point("node.renewed")

    def activate_new(self, agent_id: SpiffeId, serial: str) -> None:
        """
        The renewed certificate was used: it becomes the current one.

        Two first calls at once both come here; the second finds it done.

        Raises:
            AbortedError: it is neither the renewed nor the current one any more.
        """
        done = self._connection.execute(
            update(agents)
            .where(
                agents.c.id == agent_id.uri,
                agents.c.new_serial == serial,
                agents.c.new_serial != "",
                agents.c.banned.is_(False),
            )
            .values(
                serial=agents.c.new_serial,
                expires_at=agents.c.new_expires_at,
                new_serial="",
                new_expires_at=0,
                key_hash=agents.c.new_key_hash,
                new_key_hash=b"",
            )
        )
        if done.rowcount:
            crash_point("node.activated")
            self._events.add(EventKind.AGENT, agent_id.uri)
            return
        found = self.find(agent_id)
        if found is None or found.serial != serial:
            raise AbortedError("the renewed certificate was superseded")

    def ban(self, agent_id: SpiffeId) -> None:
        """
        Ban an agent: both of its serials go, and nothing brings them back but `delete`.

        Raises:
            NotFoundError: no such agent.
        """
        done = self._connection.execute(
            update(agents)
            .where(agents.c.id == agent_id.uri)
            # The hashes stay: what a banned node held is good for nobody.
            .values(banned=True, serial="", new_serial="", new_expires_at=0)
        )
        if not done.rowcount:
            raise NotFoundError("agent not found")
        self._events.add(EventKind.AGENT, agent_id.uri)

    def delete(self, agent_id: SpiffeId) -> None:
        """
        Evict an agent; lifts a ban.

        Raises:
            NotFoundError: no such agent.
        """
        done = self._connection.execute(delete(agents).where(agents.c.id == agent_id.uri))
        if not done.rowcount:
            raise NotFoundError("agent not found")
        # Or its token's minute of grace would bring it back (SEC-50, SEC-52).
        _, is_joined, public_id = agent_id.path.partition("/spire/agent/join_token/")
        if is_joined:
            self._connection.execute(
                delete(tokens).where(tokens.c.public_id == public_id, tokens.c.used_at > 0)
            )
        self._events.add(EventKind.AGENT, agent_id.uri)

    def set_version(self, agent_id: SpiffeId, version: str) -> None:
        """Note what the agent says it runs."""
        self._connection.execute(
            update(agents).where(agents.c.id == agent_id.uri).values(agent_version=version)
        )
        self._events.add(EventKind.AGENT, agent_id.uri)

    def page(self, after: int, limit: int) -> Sequence[tuple[int, AttestedAgent]]:
        """Return up to *limit* agents behind row *after*, with their rows, oldest first."""
        rows = self._connection.execute(
            select(agents)
            .where(agents.c.row > after)
            .order_by(agents.c.row)
            .limit(min(limit, PAGE))
        ).mappings()
        return [(row["row"], agent_of(row)) for row in rows]

    def all(self) -> Iterator[AttestedAgent]:
        """Yield every agent, oldest first."""
        after = 0
        while found := self.page(after, PAGE):
            after = found[-1][0]
            yield from (agent for _, agent in found)

    def count(self) -> int:
        """Return how many there are."""
        return self._connection.execute(select(func.count()).select_from(agents)).scalar_one()

    def _change_unless_banned(self, agent_id: SpiffeId, **values: object) -> None:
        done = self._connection.execute(
            update(agents)
            .where(agents.c.id == agent_id.uri, agents.c.banned.is_(False))
            .values(**values)
        )
        if not done.rowcount:
            found = self.find(agent_id)
            if found is None:
                raise AgentDeniedError("agent is not attested", DenialReason.AGENT_NOT_ATTESTED)
            raise AgentDeniedError("agent is banned", DenialReason.AGENT_BANNED)
        self._events.add(EventKind.AGENT, agent_id.uri)


class TokenError(MalformedError):
    """A join token cannot be used; says the same for unknown and wrong ones."""


class TokenRepository:
    """Join tokens, by hash alone, within one transaction."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now

    def add(self, public_id: str, secret: str, expires_at: datetime) -> None:
        """
        Keep a new token.

        Raises:
            AlreadyExistsError: its public id is taken.
        """
        taken = self._connection.execute(
            select(tokens.c.public_id).where(tokens.c.public_id == public_id)
        ).scalar()
        if taken is not None:
            raise AlreadyExistsError("failed to create token: its public id is taken")
        self._connection.execute(
            insert(tokens).values(
                public_id=public_id,
                secret_hash=_digest(secret.encode()),
                expires_at=seconds(expires_at),
                used_at=0,
                used_key=b"",
            )
        )

    def check(self, public_id: str, secret: str, public_key: bytes) -> None:
        """
        See whether `consume` would succeed now; changes nothing.

        Raises:
            TokenError: unknown, wrong, used or expired.
        """
        now = int(self._now.timestamp())
        row = self._connection.execute(
            select(tokens).where(tokens.c.public_id == public_id)
        ).one_or_none()
        if row is None or not hmac.compare_digest(row.secret_hash, _digest(secret.encode())):
            raise TokenError(_UNKNOWN)
        if not row.used_at:
            if row.expires_at <= now:
                raise TokenError(_EXPIRED)
            return
        is_retry = timedelta(0) <= timedelta(seconds=now - row.used_at) <= RETRY_WINDOW
        if not is_retry or not hmac.compare_digest(row.used_key, _digest(public_key)):
            raise TokenError(_UNKNOWN)

    def consume(self, public_id: str, secret: str, public_key: bytes) -> None:
        """
        Use a token for the node whose CSR carries *public_key*: once, or again within a
        minute with the same key, because the first reply may have been lost (SEC-50).

        Raises:
            TokenError: unknown, wrong, used or expired.
        """
        now = int(self._now.timestamp())
        crash_point("token.before_consume")
        used = self._connection.execute(
            update(tokens)
            .where(
                tokens.c.public_id == public_id,
                tokens.c.secret_hash == _digest(secret.encode()),
                tokens.c.used_at == 0,
                tokens.c.expires_at > now,
            )
            .values(used_at=now, used_key=_digest(public_key))
        )
        if used.rowcount == 1:
            crash_point("token.consumed")
        else:
            self.check(public_id, secret, public_key)

    def prune(self) -> Sequence[str]:
        """Drop tokens that are long past use; return the public ids of the never used."""
        expired_before = seconds(self._now - EXPIRED_KEPT)
        used_before = seconds(self._now - RETRY_WINDOW)
        gone = self._connection.execute(
            delete(tokens)
            .where(
                or_(
                    and_(tokens.c.used_at == 0, tokens.c.expires_at < expired_before),
                    and_(tokens.c.used_at > 0, tokens.c.used_at < used_before),
                )
            )
            .returning(tokens.c.public_id, tokens.c.used_at)
        )
        return [row.public_id for row in gone if not row.used_at]


_EXPIRED: Final = "join token expired: make a new one with `issuer token generate`"
_UNKNOWN: Final = "failed to attest: join token does not exist or has already been used"


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
