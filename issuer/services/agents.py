"""Attested agents: attestation, renewal, listing, bans, join tokens (SPIRE API 5.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from ca.clock import Clock
from ca.x509 import SignedX509
from issuer.attestation.join_token import JoinToken
from issuer.attestation.protocol import AttestedNode, Challenge, NodeAttestor
from issuer.services.hub import Hub
from issuer.services.paging import Page, collect
from issuer.services.svids import SvidService
from issuer.store.store import Repositories, Store
from spiffe_core.agent import AttestedAgent, require_agent_id
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import MalformedError, PreconditionError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.selector import Selector, SelectorSet, SetMatch
from spiffe_core.spiffeid import SpiffeId, TrustDomain

MAX_VERSION_BYTES = 255  # SPIRE API 5.2


@dataclass(frozen=True, slots=True)
class AgentFilter:
    """Which agents; everything given must hold."""

    attestation_type: str = ""
    selectors: tuple[SelectorSet, SetMatch] | None = None
    banned: bool | None = None
    can_reattest: bool | None = None
    expires_before: datetime | None = None

    def keeps(self, agent: AttestedAgent) -> bool:
        """True when *agent* is wanted."""
        return (
            (not self.attestation_type or agent.attestation_type == self.attestation_type)
            and (
                self.selectors is None
                or self.selectors[1].holds(agent.selectors, self.selectors[0])
            )
            and (self.banned is None or agent.banned == self.banned)
            and (self.can_reattest is None or agent.can_reattest == self.can_reattest)
            and (self.expires_before is None or agent.expires_at < self.expires_before)
        )


@dataclass(frozen=True)
class AgentService:
    """What agents do to join and stay, and what operators do about them."""

    store: Store
    hub: Hub
    svids: SvidService
    clock: Clock
    trust_domain: TrustDomain
    attestors: Mapping[str, NodeAttestor]
    agent_ttl: timedelta

    async def get(self, agent_id: SpiffeId) -> AttestedAgent:
        """
        Return one agent.

        Raises:
            MalformedError: not an agent's ID.
            NotFoundError: no such agent.
        """
        self._check(agent_id)
        return await self.store.read(lambda repos: repos.agents.get(agent_id))

    async def page(
        self, wanted: AgentFilter, page_size: int, token: str
    ) -> Page[AttestedAgent]:
        """
        Return one page of the *wanted* agents.

        Raises:
            MalformedError: the token is not one of ours.
        """
        return await self.store.read(
            lambda repos: collect(repos.agents.page, wanted.keeps, page_size, token)
        )

    async def count(self, wanted: AgentFilter) -> int:
        """Return how many agents are *wanted*."""
        return len((await self.page(wanted, 0, "")).items)

    async def ban(self, agent_id: SpiffeId, *, actor: str) -> None:
        """
        Ban an agent: it is denied at once, and can't come back until it is evicted.

        Raises:
            NotFoundError: no such agent.
        """
        self._check(agent_id)

        def work(repos: Repositories) -> None:
            repos.agents.ban(agent_id)
            repos.audit.add("agent.ban", agent_id.uri)

        await self.store.write(work, actor=actor)

    async def evict(self, agent_id: SpiffeId, *, actor: str) -> None:
        """
        Forget an agent and its join-token alias; lifts a ban.

        Raises:
            NotFoundError: no such agent.
        """
        self._check(agent_id)
        alias = Selector("spiffe_id", agent_id.uri)

        def work(repos: Repositories) -> None:
            repos.agents.delete(agent_id)
            for entry in list(repos.entries.all()):
                if entry.parent_id == agent_id and entry.selectors == {alias}:
                    repos.entries.delete(entry.id)
            repos.audit.add("agent.evict", agent_id.uri)

        await self.store.write(work, actor=actor)

    async def create_join_token(
        self, ttl: timedelta, text: str, workload_id: SpiffeId | None, *, actor: str
    ) -> tuple[JoinToken, datetime]:
        """
        Make a join token; *text* is one that the caller chose, or empty.

        Raises:
            MalformedError: no lifetime, or a token that is not of our form.
            AlreadyExistsError: its public id is taken.
        """
        if ttl < timedelta(seconds=1):
            raise MalformedError("ttl is required, you must provide one")
        token = JoinToken.parse(text) if text else JoinToken.random()
        expires_at = self.clock.now().replace(microsecond=0) + ttl
        parent = SpiffeId(self.trust_domain, f"/spire/agent/join_token/{token.public_id}")
        alias = None
        if workload_id is not None:
            try:
                workload_id.require_workload(self.trust_domain)
            except MalformedError as error:
                raise MalformedError(f"invalid agent ID: {error}") from error
            selectors = frozenset({Selector("spiffe_id", parent.uri)})
            alias = RegistrationEntry(workload_id, parent, selectors)

        def work(repos: Repositories) -> None:
            repos.tokens.prune()
            repos.tokens.add(token.public_id, token.secret, expires_at)
            if alias is not None:
                repos.entries.create(alias)
            repos.audit.add("token.create", token.public_id)

        await self.store.write(work, actor=actor)
        return token, expires_at

    async def attest(
        self, attestation_type: str, payload: bytes, csr: bytes, challenge: Challenge
    ) -> tuple[SignedX509, AttestedNode]:
        """
        Attest a node and return its SVID; proof used up, node stored, all durable.

        Raises:
            PreconditionError: no such attestor is configured.
            MalformedError: the payload or CSR breaks a rule.
            AgentDeniedError: the agent is banned.
        """
        attestor = self.attestors.get(attestation_type)
        if attestor is None:
            raise PreconditionError(
                "error getting node attestor: could not find node attestor type "
                f'"{attestation_type}"'
            )
        public_key = self.svids.key_of(csr)
        node = await attestor.attest(payload, public_key=public_key, challenge=challenge)
        require_agent_id(node.agent_id, self.trust_domain)
        signed = await self.svids.sign_own(node.agent_id, public_key, self.agent_ttl)
        crash_point("attest.signed")
        agent = AttestedAgent(
            node.agent_id,
            attestation_type,
            signed.svid.serial,
            signed.svid.validity.not_after,
            node.selectors,
            can_reattest=node.can_reattest,
        )

        def work(repos: Repositories) -> int:
            if node.consume is not None:
                node.consume(repos)
            repos.agents.attested(agent)
            repos.audit.add("agent.attest", agent.id.uri)
            return repos.events.last()

        # What was signed is worth nothing until this is stored: serials are compared.
        seq = await self.store.write(work, actor=agent.id.uri)
        crash_point("attest.stored")
        await self.hub.caught_up(seq)
        return signed, node

    async def renew(self, agent: AttestedAgent, csr: bytes) -> SignedX509:
        """
        Sign a new SVID for an agent; the old one stays good until the new one is used.

        Raises:
            AgentDeniedError: it has to attest again instead, or is banned.
        """
        if agent.can_reattest:
            raise AgentDeniedError(
                "agent must reattest instead of renew", DenialReason.AGENT_MUST_REATTEST
            )
        public_key = self.svids.key_of(csr)
        signed = await self.svids.sign_own(agent.id, public_key, self.agent_ttl)
        crash_point("renewal.signed")

        def work(repos: Repositories) -> int:
            repos.agents.renewed(agent.id, signed.svid.serial, signed.svid.validity.not_after)
            repos.audit.add("agent.renew", agent.id.uri)
            return repos.events.last()

        seq = await self.store.write(work, actor=agent.id.uri)
        crash_point("renewal.stored")
        await self.hub.caught_up(seq)
        return signed

    async def activate(self, agent: AttestedAgent) -> None:
        """The renewed certificate was used for the first time."""

        def work(repos: Repositories) -> int:
            repos.agents.activate_new(agent.id, agent.new_serial)
            return repos.events.last()

        await self.hub.caught_up(await self.store.write(work, actor=agent.id.uri))

    async def post_status(self, agent: AttestedAgent, version: str) -> None:
        """
        Note which version an agent runs.

        Raises:
            MalformedError: the version is too long.
        """
        if len(version.encode()) > MAX_VERSION_BYTES:
            raise MalformedError("agent version is too long (max 255 characters)")
        if version != agent.agent_version:
            await self.store.write(lambda repos: repos.agents.set_version(agent.id, version))

    def _check(self, agent_id: SpiffeId) -> None:
        try:
            require_agent_id(agent_id, self.trust_domain)
        except MalformedError as error:
            raise MalformedError(f"invalid agent ID: {error}") from error
