"""Attested agents: attestation, renewal, listing, bans, join tokens (SPIRE API 5.2)."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from ca.clock import Clock
from ca.x509 import SignedX509
from issuer.attestation.join_token import JoinToken
from issuer.attestation.protocol import AttestedNode, Challenge, NodeAttestor
from issuer.services.hub import Hub
from issuer.services.paging import Page, collect, count
from issuer.services.svids import SvidService, issued_x509
from issuer.store.store import Repositories, Store
from spiffe_core.agent import (
    AGENT_PREFIX,
    AttestedAgent,
    key_hash_of,
    require_agent_id,
)
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import (
    AbortedError,
    AlreadyExistsError,
    ForbiddenError,
    InternalError,
    MalformedError,
    NotReadyError,
    PreconditionError,
)
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
        return await self.store.read(lambda repos: count(repos.agents.page, wanted.keeps))

    async def ban(self, agent_id: SpiffeId, *, actor: str) -> None:
        """
        Ban an agent: it is denied at once, and can't come back until it is evicted.

        Raises:
            NotFoundError: no such agent.
        """
        self._check(agent_id)

        def work(repos: Repositories) -> int:
            repos.agents.ban(agent_id)
            repos.audit.add("agent.ban", agent_id.uri)
            return repos.events.last()

        await self._in_force(await self.store.write(work, actor=actor))

    async def evict(self, agent_id: SpiffeId, *, actor: str) -> None:
        """
        Forget an agent and its join-token alias; lifts a ban.

        Raises:
            NotFoundError: no such agent.
        """
        self._check(agent_id)

        def work(repos: Repositories) -> int:
            repos.agents.delete(agent_id)
            _delete_alias(repos, agent_id)
            repos.audit.add("agent.evict", agent_id.uri)
            return repos.events.last()

        await self._in_force(await self.store.write(work, actor=actor))

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
        parent = self._joined(token.public_id)
        alias = None
        if workload_id is not None:
            try:
                workload_id.require_workload(self.trust_domain)
            except MalformedError as error:
                raise MalformedError(f"invalid agent ID: {error}") from error
            alias = RegistrationEntry(workload_id, parent, _alias_selectors(parent))

        def work(repos: Repositories) -> None:
            self.prune_tokens(repos)
            # A second token for its name would hand the node over to somebody else (SEC-54).
            if repos.agents.find(parent) is not None:
                raise AlreadyExistsError("failed to create token: an agent has its public id")
            repos.tokens.add(token.public_id, token.secret, expires_at)
            if alias is not None:
                made = repos.entries.create(alias)
                repos.audit.add("entry.create", made.id)
            repos.audit.add("token.create", token.public_id)

        await self.store.write(work, actor=actor)
        return token, expires_at

    def prune_tokens(self, repos: Repositories) -> None:
        """Forget tokens that are long past use, and the aliases that nobody came for."""
        for public_id in repos.tokens.prune():
            _delete_alias(repos, self._joined(public_id))

    async def attest(
        self, attestation_type: str, payload: bytes, csr: bytes, challenge: Challenge
    ) -> tuple[SignedX509, AttestedNode]:
        """
        Attest a node and return its SVID; proof used up, node stored, all durable.

        Raises:
            PreconditionError: no such attestor is configured.
            MalformedError: the payload or CSR breaks a rule.
            AgentDeniedError: the agent is banned.
            ForbiddenError: its proof is good for one attestation, until it is evicted.
        """
        attestor = self.attestors.get(attestation_type)
        if attestor is None:
            raise PreconditionError(
                "error getting node attestor: could not find node attestor type; there are "
                + ", ".join(sorted(self.attestors))
            )
        public_key = self.svids.key_of(csr)
        node = await attestor.attest(payload, public_key=public_key, challenge=challenge)
        self._check_attested(node.agent_id, attestation_type)

        def check(repos: Repositories) -> None:
            if node.check is not None:
                node.check(repos)
            _check_open(repos, node)

        await self.store.read(check)  # a stranger's guess costs a look, not a signature
        self.svids.check_unclaimed(public_key, node.agent_id)
        signed = self.svids.sign_reserved(node.agent_id, public_key, self.agent_ttl)
        crash_point("attest.signed")
        agent = AttestedAgent(
            node.agent_id,
            attestation_type,
            signed.svid.serial,
            signed.svid.validity.not_after,
            node.selectors,
            can_reattest=node.can_reattest,
            key_hash=key_hash_of(public_key),
        )

        def work(repos: Repositories) -> int:
            _check_open(repos, node)
            if node.consume is not None:
                node.consume(repos)
            # One that was there before: what it held until now is worth nothing (SEC-54).
            repos.agents.attested(agent)
            repos.issued.record([issued_x509(signed, "", agent.id.uri)])
            repos.audit.add("agent.attest", agent.id.uri)
            return repos.events.last()

        # What was signed is worth nothing until this is stored: serials are compared.
        seq = await self.store.write(work, actor=agent.id.uri)
        crash_point("attest.stored")
        self.svids.on_issued("x509", 1)
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
        self.svids.check_unclaimed(public_key, agent.id)
        signed = self.svids.sign_reserved(agent.id, public_key, self.agent_ttl)
        svid = signed.svid
        crash_point("renewal.signed")

        def work(repos: Repositories) -> int:
            repos.agents.renewed(
                agent.id, svid.serial, svid.validity.not_after, key_hash_of(public_key)
            )
            repos.issued.record([issued_x509(signed, "", agent.id.uri)])
            repos.audit.add("agent.renew", agent.id.uri)
            return repos.events.last()

        seq = await self.store.write(work, actor=agent.id.uri)
        crash_point("renewal.stored")
        self.svids.on_issued("x509", 1)
        await self.hub.caught_up(seq)
        return signed

    async def activate(self, agent_id: SpiffeId, serial: str) -> None:
        """
        The renewed certificate *serial* was used for the first time.

        Does nothing when a ban or another renewal came first: whoever looks once this
        returns sees what is in force.
        """

        def work(repos: Repositories) -> int:
            with contextlib.suppress(AbortedError):
                repos.agents.activate_new(agent_id, serial)
            return repos.events.last()

        await self.hub.caught_up(await self.store.write(work, actor=agent_id.uri))

    async def post_status(self, agent: AttestedAgent, version: str) -> None:
        """
        Note which version an agent runs.

        Raises:
            MalformedError: the version is too long, or not for an operator's terminal.
        """
        if len(version.encode()) > MAX_VERSION_BYTES:
            raise MalformedError("agent version is too long (max 255 characters)")
        if not version.isprintable():
            raise MalformedError("agent version holds control characters")
        if version != agent.agent_version:
            await self.store.write(lambda repos: repos.agents.set_version(agent.id, version))

    async def _in_force(self, seq: int) -> None:
        """Done once stored; waits, if it can, until nobody is served by the old state."""
        with contextlib.suppress(NotReadyError):
            await self.hub.caught_up(seq)

    def _joined(self, public_id: str) -> SpiffeId:
        return SpiffeId(self.trust_domain, f"{AGENT_PREFIX}join_token/{public_id}")

    def _check_attested(self, node_id: SpiffeId, attestation_type: str) -> None:
        """An attestor yields names below its own alone (SEC-04)."""
        require_agent_id(node_id, self.trust_domain)
        if not node_id.path.startswith(f"{AGENT_PREFIX}{attestation_type}/"):
            raise InternalError("an attestor named a node that is not its own to name")

    def _check(self, agent_id: SpiffeId) -> None:
        try:
            require_agent_id(agent_id, self.trust_domain)
        except MalformedError as error:
            raise MalformedError(f"invalid agent ID: {error}") from error


def _check_open(repos: Repositories, node: AttestedNode) -> None:
    """
    See that *node* may attest, by what is stored now.

    Raises:
        AgentDeniedError: it is banned.
        ForbiddenError: it is there, and what proved it can be repeated by others.
    """
    there = repos.agents.find(node.agent_id)
    if there is not None and there.banned:
        raise AgentDeniedError("failed to attest: agent is banned", DenialReason.AGENT_BANNED)
    # Trust on first use (SEC-54); a proof that is used up says by itself whom it lets back.
    if there is not None and not node.can_reattest and node.consume is None:
        raise ForbiddenError("attestation data has already been used to attest an agent")


def _alias_selectors(node_id: SpiffeId) -> SelectorSet:
    return frozenset({Selector("spiffe_id", node_id.uri)})


def _delete_alias(repos: Repositories, node_id: SpiffeId) -> None:
    """Remove the entries that came with a join token, with its node (SPIRE API 5.2)."""
    for entry in repos.entries.below(node_id):
        if entry.selectors == _alias_selectors(node_id):
            repos.entries.delete(entry.id)
            repos.audit.add("entry.delete", entry.id)
