"""Signing for agents and operators (SPIRE API 5.3; architecture A6)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from ca.clock import Clock
from ca.csr import CsrError, mint_request_of, public_key_of
from ca.journal import AuthorityKind
from ca.jwt import JwtProfile, SignedJwt, sign_jwt
from ca.rotator import Rotator
from ca.x509 import CheckedProfile, SignedX509, prepare_x509, sign_x509
from issuer.k8s.verify import PodError, PodVerifier
from issuer.services.hub import Hub
from issuer.services.refusals import RefusalLog
from issuer.store.authorities import IssuedRow
from issuer.store.store import Repositories, Store
from spiffe_core.agent import AttestedAgent, key_hash_of
from spiffe_core.crashpoints import crash_point
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import ForbiddenError, MalformedError, NotFoundError, SpiffeError
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
YIELD_EVERY = 4
"""
Signatures between two turns of the event loop: about 1.5 ms, so that one who waits for a
timer and then for a future, three turns in all, waits less than 5 ms (performance target 6).
"""


@dataclass(frozen=True, slots=True)
class WantedX509:
    """One item of a batch: for which entry and pod, and the CSR that carries the key."""

    entry_id: str
    csr: bytes
    pod_uid: str = ""
    """Empty: the agent does not say."""


@dataclass(frozen=True)
class SvidService:
    """Signs SVIDs.  One per process, safe to share."""

    store: Store
    hub: Hub
    rotator: Rotator
    clock: Clock
    x509_profile: CheckedProfile
    jwt_profile: JwtProfile
    trust_domain: TrustDomain
    refusals: RefusalLog
    on_issued: Callable[[str, int], None] = lambda *_: None
    pods: PodVerifier = field(default_factory=PodVerifier)

    async def issue_x509(
        self, wanted: Sequence[WantedX509], *, agent: SpiffeId
    ) -> list[SignedX509 | SpiffeError]:
        """
        Sign X509-SVIDs for entries of the attested *agent*, one answer for each wanted.

        An item fails with NotFoundError for "no such entry" and for "not below this agent"
        alike, so that a stolen node can't probe for what runs elsewhere, and with a PodError
        when none of the node's pods is what the entry is for (architecture A5).

        Raises:
            NotReadyError: no X.509 authority is active.
        """
        answers: dict[int, SignedX509 | SpiffeError] = {}
        async for some in self.issue_x509_in_turn(wanted, agent=agent):
            answers.update(some)
        return [answers[number] for number in range(len(wanted))]

    async def issue_x509_in_turn(
        self, wanted: Sequence[WantedX509], *, agent: SpiffeId
    ) -> AsyncGenerator[Mapping[int, SignedX509 | SpiffeError], None]:
        """
        The same as it is decided, by number in *wanted*; each part is on record.

        What needs no waiting comes first, at once, and is empty when all has to wait.  That
        waits together, for as long as our watch may be behind the agent's.
        """
        open_ = dict(enumerate(wanted))
        ends = asyncio.get_running_loop().time() + self.pods.patience
        with self.pods.arrivals.listening() as listener:
            due: Iterable[int] = list(open_)
            is_first, is_last = True, False
            while open_:
                answers: dict[int, SignedX509 | SpiffeError] = {}
                rows = []
                refused = self._authority_keys()
                for turn, number in enumerate(due, 1):
                    item = open_[number]
                    try:
                        signed, row = self._sign_for(agent, item, refused)
                    except PodError as error:
                        if error.topic is not None and not is_last:
                            listener.add(error.topic, number)
                        else:
                            answers[number] = error
                    except SpiffeError as error:
                        answers[number] = error
                    else:
                        answers[number] = signed
                        rows.append(row)
                    if turn % YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                for number in answers:
                    del open_[number]
                await self._record(rows)
                await self._note_refused(agent, wanted, answers)
                if answers or is_first:
                    yield answers
                is_first = False
                if open_:
                    left = ends - asyncio.get_running_loop().time()
                    due = await listener.fired(left)
                    if not due:
                        due, is_last = list(open_), True

    async def issue_jwt(
        self,
        entry_id: str,
        audience: tuple[str, ...],
        *,
        agent: SpiffeId,
        pod_uid: str = "",
    ) -> SignedJwt:
        """
        Sign a JWT-SVID for an entry of the attested *agent*.

        Raises:
            NotFoundError: no such entry, or not below this agent.
            PodError: none of the node's pods is what the entry is for.
            MalformedError: the audience breaks a rule.
            NotReadyError: no JWT authority is active.
        """
        ends = asyncio.get_running_loop().time() + self.pods.patience
        with self.pods.arrivals.listening() as listener:
            is_last = False
            while True:
                try:
                    signed, row = self._sign_jwt_for(agent, entry_id, audience, pod_uid)
                    break
                except PodError as error:
                    if error.topic is None or is_last:
                        await self._note_refusal(agent, entry_id, pod_uid, error)
                        raise
                    listener.add(error.topic, 0)
                left = ends - asyncio.get_running_loop().time()
                is_last = not await listener.fired(left)
        await self._record([row])
        return signed

    async def mint_x509(self, csr: bytes, ttl: timedelta, *, actor: str) -> SignedX509:
        """
        Sign what an operator asks for in *csr*.

        Raises:
            CsrError: the request breaks a rule.
        """
        request = mint_request_of(csr, self.trust_domain, refused=self._authority_keys())
        self.check_unclaimed(request.public_key, None)
        signed = sign_x509(
            prepare_x509(
                self.x509_profile,
                self.rotator.x509,
                spiffe_id=request.spiffe_id,
                public_key=request.public_key,
                now=self.clock.now(),
                ttl=ttl,
                dns_names=request.dns_names,
            )
        )
        self._note_clamped(signed.clamped, signed.svid.validity.not_after)
        await self._record([issued_x509(signed, "", actor)], audited="x509.mint", actor=actor)
        return signed

    async def mint_jwt(
        self, spiffe_id: SpiffeId, audience: tuple[str, ...], ttl: timedelta, *, actor: str
    ) -> SignedJwt:
        """
        Sign a JWT-SVID for an operator.

        Raises:
            MalformedError: the ID is not a workload's, or the audience breaks a rule.
        """
        try:
            spiffe_id.require_workload(self.trust_domain)
        except MalformedError as error:
            raise MalformedError(f"invalid SPIFFE ID: {error}") from error
        signed = sign_jwt(
            self.jwt_profile,
            self.rotator.jwt,
            spiffe_id=spiffe_id,
            audience=audience,
            now=self.clock.now(),
            ttl=ttl,
        )
        await self._record([_jwt_row(signed, "", actor)], audited="jwt.mint", actor=actor)
        return signed

    def key_of(self, csr: bytes) -> bytes:
        """
        Return the public key of a CSR.

        Raises:
            CsrError: the CSR is missing, breaks a rule, or its key is an authority's.
        """
        return public_key_of(csr, refused=self._authority_keys())

    def check_unclaimed(self, public_key: bytes, holder: SpiffeId | None) -> None:
        """
        See that no live node but *holder* has *public_key* for its own (SEC-20).

        Raises:
            CsrError: another has.
        """
        found = self.hub.index.holder_of(key_hash_of(public_key), self.clock.now())
        if found not in (None, holder):
            raise CsrError("malformed CSR: its key is another node's")

    def sign_reserved(
        self, spiffe_id: SpiffeId, public_key: bytes, ttl: timedelta
    ) -> SignedX509:
        """
        Sign an SVID of a server or an agent; the caller puts it on record.

        Raises:
            NotReadyError: no X.509 authority is active.
        """
        return sign_x509(
            prepare_x509(
                self.x509_profile,
                self.rotator.x509,
                spiffe_id=spiffe_id,
                public_key=public_key,
                now=self.clock.now(),
                ttl=ttl,
            )
        )

    async def sign_own(
        self, spiffe_id: SpiffeId, public_key: bytes, ttl: timedelta
    ) -> SignedX509:
        """Sign the server's own SVID, and put it on record."""
        signed = self.sign_reserved(spiffe_id, public_key, ttl)
        await self._record([issued_x509(signed, "", spiffe_id.uri)])
        return signed

    def _sign_for(
        self, agent: SpiffeId, item: WantedX509, refused: frozenset[bytes]
    ) -> tuple[SignedX509, IssuedRow]:
        """Decide and sign in one go: what was decided upon cannot change between (SEC-21)."""
        if item.entry_id and not item.csr:
            raise CsrError("missing CSR")
        entry = self._entry_for(agent, item.entry_id)
        # Before the CSR's signature, which costs ten times as much: SPIRE's agents ask twice a
        # second for what they were refused.
        pod_uid = self.pods.check(self._attested(agent), entry, item.pod_uid)
        public_key = public_key_of(item.csr, refused=refused)
        self.check_unclaimed(public_key, agent)
        signed = self._sign(entry, public_key)
        return signed, issued_x509(signed, entry.id, agent.uri, pod_uid)

    def _sign_jwt_for(
        self, agent: SpiffeId, entry_id: str, audience: tuple[str, ...], pod_uid: str
    ) -> tuple[SignedJwt, IssuedRow]:
        entry = self._entry_for(agent, entry_id)
        pod_uid = self.pods.check(self._attested(agent), entry, pod_uid, is_on_demand=True)
        signed = sign_jwt(
            self.jwt_profile,
            self.rotator.jwt,
            spiffe_id=entry.spiffe_id,
            audience=audience,
            now=self.clock.now(),
            ttl=entry.jwt_svid_ttl,
        )
        return signed, _jwt_row(signed, entry.id, agent.uri, pod_uid)

    def _attested(self, agent: SpiffeId) -> AttestedAgent:
        """The agent as it is now: it may have been banned while we waited for a pod."""
        found = self.hub.index.agent(agent)
        if found is None or found.banned:
            raise ForbiddenError("this agent is not attested any more")
        return found

    def _entry_for(self, agent: SpiffeId, entry_id: str) -> RegistrationEntry:
        if not entry_id:
            raise MalformedError("missing entry ID")
        entry = self.hub.index.entry_for(agent, entry_id, self.clock.now())
        if entry is None:
            raise NotFoundError("entry not found or not authorized")
        return entry

    def _sign(self, entry: RegistrationEntry, public_key: bytes) -> SignedX509:
        return sign_x509(
            prepare_x509(
                self.x509_profile,
                self.rotator.x509,
                spiffe_id=entry.spiffe_id,
                public_key=public_key,
                now=self.clock.now(),
                ttl=entry.x509_svid_ttl,
                dns_names=entry.dns_names,
            )
        )

    async def _note_refused(
        self,
        agent: SpiffeId,
        wanted: Sequence[WantedX509],
        answers: Mapping[int, SignedX509 | SpiffeError],
    ) -> None:
        await asyncio.gather(
            *(
                self._note_refusal(agent, wanted[number].entry_id, wanted[number].pod_uid, one)
                for number, one in answers.items()
                if isinstance(one, PodError)
            )
        )

    async def _note_refusal(
        self, agent: SpiffeId, entry_id: str, pod_uid: str, error: PodError
    ) -> None:
        self.pods.on_refused(error.cluster, error.why)
        if error.is_violation:  # a security event (SEC-91)
            why = f"{error}: {error.detail}" if error.detail else str(error)
            target = f"entry {entry_id} pod {pod_uid}"
            await self.refusals.note(agent.uri, target, why, action="svid.pod_refused")

    def _authority_keys(self) -> frozenset[bytes]:
        """Of every authority that is trusted: to come, signing, or retired."""
        signing = {self.rotator.x509.key.public_key, self.rotator.jwt.key.public_key}
        return self.hub.authority_keys | signing

    def _note_clamped(self, clamped: bool, until: datetime) -> None:
        if clamped:
            event(_log, logging.WARNING, "svid_lives_shorter_than_asked", until=until)

    async def _record(
        self, rows: Sequence[IssuedRow], *, audited: str = "", actor: str = "issuer"
    ) -> None:
        # On record before anyone holds it: an SVID that nobody can account for must not
        # exist.  One transaction for the batch; it fails if the authority was superseded.
        if not rows:
            return

        def work(repos: Repositories) -> None:
            repos.issued.record(rows)
            if audited:
                for row in rows:
                    repos.audit.add(audited, row.spiffe_id)

        crash_point("svids.signed")
        await self.store.write(work, actor=actor)
        crash_point("svids.recorded")
        self.on_issued(rows[0].kind.value, len(rows))


def issued_x509(signed: SignedX509, entry_id: str, caller: str, pod_uid: str = "") -> IssuedRow:
    """What goes on record of an X509-SVID."""
    svid = signed.svid
    return IssuedRow(
        AuthorityKind.X509, svid.serial, svid.spiffe_id.uri, entry_id, signed.authority_id,
        caller, svid.validity.not_before, svid.validity.not_after, pod_uid,
    )  # fmt: skip


def _jwt_row(signed: SignedJwt, entry_id: str, caller: str, pod_uid: str = "") -> IssuedRow:
    svid = signed.svid
    return IssuedRow(
        AuthorityKind.JWT, str(svid.claims["jti"]), svid.spiffe_id.uri, entry_id,
        signed.authority_id, caller, svid.issued_at or svid.expires_at, svid.expires_at,
        pod_uid,
    )  # fmt: skip
