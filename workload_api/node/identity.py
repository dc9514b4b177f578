"""
The agent's own identity: attest, renew at half-life, keep it through restarts.

Source: SPIRE API 8 and 9, SEC-50 (a lost reply), SEC-54, SEC-57 (the server is known
before the first byte).
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from spiffe_core.agent import AGENT_PREFIX
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.bundle_document import bundle_from_document
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import InternalError, MalformedError, PreconditionError
from spiffe_core.lifetime import renew_at
from spiffe_core.matching import exactly
from spiffe_core.pem import certificates_from_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.frontdoor.tls import client_context
from spiffe_wire.logs import event
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc
from spiffe_wire.pb.spire.api.types import attestation_pb2
from spiffe_wire.status import error_of
from workload_api.cache.cache import WorkloadCache
from workload_api.keys import authority_of, check_key, make_csr, make_key
from workload_api.node.proof import NodeProof, NoWayToAttestError
from workload_api.storage import AgentStorage, NodeState

_log = logging.getLogger(__name__)
ATTEST_TIMEOUT = 30.0
"""Seconds for one attestation."""


def read_trust_bundle(path: Path, trust_domain: TrustDomain) -> Bundle:
    """
    Read the bundle that the server is known by at the first start.

    Raises:
        PreconditionError: not there, or neither PEM nor a bundle document.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PreconditionError(
            f"cannot read the trust bundle {path}: {error.strerror}; make it with "
            "`issuer bundle show > FILE` on the server"
        ) from error
    try:
        if data.lstrip().startswith(b"{"):
            return bundle_from_document(trust_domain, data)
        ders = certificates_from_pem(data.decode("ascii"))
        return Bundle(trust_domain, tuple(X509Authority.parse(der) for der in ders))
    except (MalformedError, UnicodeDecodeError) as error:
        raise PreconditionError(f"the trust bundle {path} cannot be used: {error}") from error


@dataclass
class NodeIdentity:
    """Who this agent is, and how it knows its server."""

    trust_domain: TrustDomain
    storage: AgentStorage
    cache: WorkloadCache
    now: Callable[[], datetime]
    svid: X509Svid | None = None
    expired_at: datetime | None = None
    """When the identity on disk ended, if it has."""
    reattestable: bool = False
    """Whether the server wants this node to attest again where others renew."""
    _key: bytes = field(default=b"", repr=False)

    async def load(self) -> bool:
        """Take up the identity on disk; return whether it is still good."""
        state = await asyncio.to_thread(self.storage.load_node)
        if state is None or not state.chain:
            return False
        try:
            svid = X509Svid.from_chain(state.chain)
        except MalformedError as error:
            raise InternalError(f"the identity on disk is no X509-SVID: {error}") from error
        if svid.spiffe_id.trust_domain != self.trust_domain:
            raise PreconditionError(
                f"the identity on disk is of {svid.spiffe_id.trust_domain}: use another "
                f"data_dir for {self.trust_domain}"
            )
        # One that has not begun yet is for the server to judge: our clock may be behind.
        if self.now() > svid.validity.not_after:
            self.expired_at = svid.validity.not_after
            event(_log, logging.WARNING, "own_svid_expired", at=self.expired_at)
            return False
        self.svid, self._key, self.reattestable = svid, state.key, state.reattestable
        return True

    def context(self) -> ssl.SSLContext:
        """TLS towards the server; with our SVID when we have one."""
        if self.svid is None:
            return self.anonymous_context()
        return client_context(self._roots(), self.svid.chain, self._key)

    def anonymous_context(self) -> ssl.SSLContext:
        """TLS towards the server to attest over: without our SVID even when we have one."""
        return client_context(self._roots())

    def _roots(self) -> list[bytes]:
        own = self.cache.bundles.get(self.trust_domain)
        if own is None or not own.x509_authorities:
            raise PreconditionError(
                "no trust bundle to know the server by: set server.trust_bundle"
            )
        return [one.der for one in own.x509_authorities]

    def check_server(self, chain: tuple[bytes, ...]) -> None:
        """
        See that the server is ours, before a byte is sent to it.

        Raises:
            X509SvidError: its chain does not lead to our bundle.
            MismatchError: it is somebody else of our trust domain.
        """
        bundles = BundleSet({self.trust_domain: self.cache.bundles[self.trust_domain]})
        server = verify_x509_svid(chain, bundles, at=self.now())
        exactly(self.trust_domain.server_id)(server.spiffe_id)

    async def attest(self, channel: Any, proof: NodeProof) -> None:
        """
        Attest with *proof* over *channel*; the identity is on disk when this returns.

        What we had is kept until then, and is worth nothing from then on: a server forgets
        the serial of a node that attests again (SEC-54).

        Raises:
            NoWayToAttestError: there is nothing to prove this node with.
            SpiffeError: what the server said; AgentDeniedError when we are banned.
        """
        if not proof.is_given:
            raise NoWayToAttestError(proof.what_to_do(self.expired_at))
        payload = await proof.payload()
        key = make_key() if proof.can_repeat else await self._key_for_once()
        request = agent_pb2.AttestAgentRequest(
            params=agent_pb2.AttestAgentRequest.Params(
                data=attestation_pb2.AttestationData(type=proof.type, payload=payload),
                params=agent_pb2.AgentX509SVIDParams(csr=make_csr(key)),
            )
        )
        try:
            call = agent_pb2_grpc.AgentStub(channel).AttestAgent(timeout=ATTEST_TIMEOUT)
            await call.write(request)
            crash_point("agent.csr_sent")
            answer = await call.read()
            await call.done_writing()
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        if answer is grpc.aio.EOF or not answer.HasField("result"):
            raise InternalError("the server ended the attestation without an answer")
        chain = tuple(answer.result.svid.cert_chain)
        await self._take(chain, key, reattestable=answer.result.reattestable)
        event(_log, logging.INFO, "node_attested", agent=self._own().spiffe_id)

    async def renew(self, channel: Any) -> None:
        """
        Get a new SVID with a new key; on disk before it is used.

        Raises:
            SpiffeError: what the server said; AgentDeniedError when it no longer wants us.
        """
        key = make_key()
        request = agent_pb2.RenewAgentRequest(
            params=agent_pb2.AgentX509SVIDParams(csr=make_csr(key))
        )
        try:
            answer = await agent_pb2_grpc.AgentStub(channel).RenewAgent(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        await self._take(tuple(answer.svid.cert_chain), key, reattestable=False)
        event(_log, logging.INFO, "own_svid_renewed", until=self._own().validity.not_after)

    def is_proved_by(self, attestation_type: str) -> bool:
        """True when our name is one that attestors of that type give."""
        prefix = f"{AGENT_PREFIX}{attestation_type}/"
        return self.svid is not None and self.svid.spiffe_id.path.startswith(prefix)

    def is_good(self) -> bool:
        """True while our own SVID has not ended, by our own clock."""
        return self.svid is not None and self.now() <= self.svid.validity.not_after

    def renew_due(self) -> bool:
        """True from half-life on, and once the authority that signed us is tainted."""
        if self.svid is None:
            return False
        return self.now() >= renew_at(self.svid.validity) or self._is_tainted(self.svid)

    def _is_tainted(self, svid: X509Svid) -> bool:
        own = self.cache.bundles.get(self.trust_domain)
        tainted = (
            {one.authority_id for one in own.x509_authorities if one.tainted} if own else {}
        )
        return bool(tainted) and authority_of(svid.chain[-1]) in tainted

    async def forget(self) -> None:
        """The server does not know us any more: remove every key."""
        self.svid, self._key = None, b""
        await asyncio.to_thread(self.storage.wipe)

    async def _key_for_once(self) -> bytes:
        """
        A key that is on disk before a proof is spent on it.

        If the reply is lost, the same key and join token are answered again for a minute.
        """
        state = await asyncio.to_thread(self.storage.load_node)
        key = state.key if state is not None and not state.chain else make_key()
        await asyncio.to_thread(self.storage.save_node, NodeState(key))
        return key

    async def _take(self, chain: tuple[bytes, ...], key: bytes, *, reattestable: bool) -> None:
        crash_point("agent.reply_got")
        try:
            svid = X509Svid.from_chain(chain)
            check_key(key, chain)
        except MalformedError as error:
            raise InternalError(
                "the server answered something that is no SVID of ours"
            ) from error
        if svid.spiffe_id.trust_domain != self.trust_domain:
            raise InternalError("the server answered an SVID of another trust domain")
        state = NodeState(key, chain, reattestable)
        await asyncio.to_thread(self.storage.save_node, state)
        crash_point("agent.identity_saved")
        self.svid, self._key, self.reattestable = svid, key, reattestable

    def _own(self) -> X509Svid:
        if self.svid is None:
            raise InternalError("this agent has no identity yet")
        return self.svid
