"""
From a proven peer to a caller: its kinds, its name, and whether it may call (SPIRE API 2).

Everything is checked again on every call (SEC-17): expiry, the bundle, the ban, the serial.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import grpc

from ca.clock import Clock
from issuer.api.access import ACCESS
from issuer.services.agents import AgentService
from issuer.services.hub import Hub
from issuer.services.refusals import RefusalLog
from spiffe_core.agent import AttestedAgent
from spiffe_core.errors import ForbiddenError, MalformedError, UnauthenticatedError
from spiffe_core.permission import (
    AgentCheck,
    AgentDeniedError,
    CallerKind,
    DenialReason,
    check_agent,
)
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.frontdoor.peer import TlsPeer, UnixPeer, peer_of
from spiffe_wire.interceptors import wrap_handler

VERIFIED_KEPT: Final = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: *name* is what the audit trail says."""

    kind: CallerKind
    name: str
    address: str
    agent: AttestedAgent | None = None
    svid: X509Svid | None = None

    def require_agent(self) -> AttestedAgent:
        """
        Return the calling agent.

        Raises:
            UnauthenticatedError: it is none.
        """
        if self.agent is None:
            raise UnauthenticatedError("this is for attested agents")
        return self.agent


_CALLER: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Return the caller of the RPC being served, which may call it."""
    return _CALLER.get()


@dataclass
class Callers:
    """Decides who a peer is and whether it may call a method."""

    hub: Hub
    agents: AgentService
    refusals: RefusalLog
    clock: Clock
    admin_ids: frozenset[SpiffeId]

    def __post_init__(self) -> None:
        self._verified: OrderedDict[tuple[bytes, int], None] = OrderedDict()

    async def identify(self, context: Any, method: str) -> Caller:
        """
        Return the caller of *method*, if it may call it.

        Raises:
            ForbiddenError: it may not; AgentDeniedError when an agent acts upon the reason.
            UnauthenticatedError: its certificate is no longer good.
        """
        peer = peer_of(context)
        try:
            return await self._admit(peer, ACCESS.get(method, frozenset()))
        except UnauthenticatedError as error:
            await self._refused(peer, method, error)
            raise
        except ForbiddenError as error:
            await self._refused(peer, method, error)
            denied = f"authorization denied for method {method}"
            if isinstance(error, AgentDeniedError):
                raise AgentDeniedError(denied, error.reason) from error
            raise ForbiddenError(denied) from error

    def check_still(self, one: Caller) -> None:
        """
        Check a held stream's caller again.

        Raises:
            AgentDeniedError: it was banned, evicted or superseded, or has expired.
            UnauthenticatedError: its authority is no longer trusted.
        """
        if one.svid is not None:
            self._verify(one.svid)
            self._check_agent(one.svid)

    async def _admit(self, peer: TlsPeer | UnixPeer, allowed: frozenset[CallerKind]) -> Caller:
        if isinstance(peer, UnixPeer):
            peer.check_alive()
            if {CallerKind.LOCAL, CallerKind.ANY} & allowed:
                return Caller(CallerKind.LOCAL, _name_of(peer), "local")
            raise ForbiddenError("not for the admin socket")
        svid, name = peer.svid, _name_of(peer)
        if CallerKind.ANY in allowed:
            return Caller(CallerKind.ANY, name, peer.address, svid=svid)
        if svid is None:
            raise ForbiddenError("no client certificate")
        self._verify(svid)
        now = self.clock.now()
        if CallerKind.ADMIN in allowed and (
            svid.spiffe_id in self.admin_ids or self.hub.index.is_admin(svid.spiffe_id, now)
        ):
            return Caller(CallerKind.ADMIN, name, peer.address, svid=svid)
        if CallerKind.DOWNSTREAM in allowed and self.hub.index.is_downstream(
            svid.spiffe_id, now
        ):
            return Caller(CallerKind.DOWNSTREAM, name, peer.address, svid=svid)
        if CallerKind.AGENT in allowed:
            agent = await self._active_agent(svid)
            return Caller(CallerKind.AGENT, name, peer.address, agent, svid)
        raise ForbiddenError("not one of those who may call it")

    async def _active_agent(self, svid: X509Svid) -> AttestedAgent:
        """The agent whose current certificate *svid* is; a renewed one becomes that now."""
        if self._check_agent(svid) is AgentCheck.ACTIVATES_NEW:
            await self.agents.activate(svid.spiffe_id, svid.serial)
            # What is in force now decides: a ban or another renewal may have come first.
            self._check_agent(svid)
        agent = self.hub.index.agent(svid.spiffe_id)
        assert agent is not None  # noqa: S101 checked, and nothing was awaited since
        return agent

    def _check_agent(self, svid: X509Svid) -> AgentCheck:
        return check_agent(
            self.hub.index.agent(svid.spiffe_id),
            serial=svid.serial,
            not_after=svid.validity.not_after,
            at=self.clock.now(),
        )

    def _verify(self, svid: X509Svid) -> None:
        """The chain against the bundle of now; remembered until the bundle changes."""
        now = self.clock.now()
        key = (svid.leaf, self.hub.bundle.sequence_number)
        if key in self._verified and svid.validity.covers(now):
            return
        if now > svid.validity.not_after:
            raise AgentDeniedError("the certificate has expired", DenialReason.AGENT_EXPIRED)
        try:
            verify_x509_svid(svid.chain, self.hub.own_roots(), at=now)
        except MalformedError as error:
            raise UnauthenticatedError("the certificate is no longer trusted") from error
        self._verified[key] = None
        while len(self._verified) > VERIFIED_KEPT:
            self._verified.popitem(last=False)

    async def _refused(self, peer: TlsPeer | UnixPeer, method: str, error: Exception) -> None:
        if isinstance(peer, TlsPeer) and peer.svid is None:
            return  # anybody can knock; only a proven caller's refusal is worth a row
        action = "call.refuse"
        if isinstance(error, AgentDeniedError) and error.reason is _SUPERSEDED:
            # Two hold one node's identity, or one lives in the past (SEC-54).
            action = "agent.superseded"
        await self.refusals.note(_name_of(peer), method, str(error), action=action)


_SUPERSEDED: Final = DenialReason.AGENT_NOT_ACTIVE


def _name_of(peer: TlsPeer | UnixPeer) -> str:
    if isinstance(peer, UnixPeer):
        return f"uid:{peer.uid} pid:{peer.pid}"
    return "anonymous" if peer.svid is None else peer.svid.spiffe_id.uri


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Identifies the caller of every call, and lets through who is in the table."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the handler; a method that is not served stays UNIMPLEMENTED."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None

        def unary(inner: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> Any:
                _CALLER.set(await self._callers.identify(context, method))
                return await inner(request, context)

            return call

        def stream(inner: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                _CALLER.set(await self._callers.identify(context, method))
                async for answer in inner(request, context):
                    yield answer

            return call

        return wrap_handler(handler, unary, stream)
