"""
The X509-SVID of this workload and the bundles of its peers, as they are now.

Source: WAPI-06 to WAPI-15, WAPI-22, WAPI-28, WAPI-31, WAPI-56, WAPI-58, T-13; conformance 2.7.
It is an `X509Material`: what makes connections takes it as it is.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import NotReadyError
from spiffe_core.spiffeid import SpiffeId
from workload_api.client.client import WorkloadClient, X509Context, X509Identity
from workload_api.client.watching import TIMEOUT, Clock, Follower, Source

Pick: TypeAlias = Callable[[Sequence[X509Identity]], X509Identity | None]
"""Chooses among the identities of a workload; None when the right one is not there."""


def by_hint(hint: str) -> Pick:
    """Choose the identity with this hint."""
    return lambda identities: next((one for one in identities if one.hint == hint), None)


def by_id(spiffe_id: SpiffeId | str) -> Pick:
    """
    Choose the identity with this SPIFFE ID.

    Raises:
        SpiffeIdError: *spiffe_id* is not one.
    """
    wanted = SpiffeId.parse(spiffe_id) if isinstance(spiffe_id, str) else spiffe_id
    return lambda identities: next(
        (one for one in identities if one.svid.spiffe_id == wanted), None
    )


def _first(identities: Sequence[X509Identity]) -> X509Identity | None:
    return identities[0]  # WAPI-56; never without one (WAPI-23)


class X509Source(Source[X509Context]):
    """
    An X509-SVID with its key, and X.509 bundles, which stay fresh by themselves.

    ``async with X509Source() as source`` waits until there is an identity that *pick* chooses,
    by default the agent's first, and follows the agent from then on: through rotations, changes
    of bundles and entries, the agent's restart and its absence.  While the agent is away or
    sends what breaks a rule, the last good state stays, and `problem` says what is wrong; when
    it says that we have no identity any more, there is none.

    Raises:
        PreconditionError: no address given, and none in ``SPIFFE_ENDPOINT_SOCKET``.
        EndpointError: the address is not one.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        pick: Pick | None = None,
        timeout: timedelta = TIMEOUT,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(address, timeout, clock)
        self._pick = pick or _first

    @property
    def identity(self) -> X509Identity:
        """
        Our SVID and key; another object after every rotation.

        Raises:
            NotReadyError: there is none that was to be picked, or it has expired.
        """
        identities = self.context.identities
        picked = self._pick(identities)
        why = self._why_not(picked, identities)
        if picked is None or why:
            raise NotReadyError(f"{why}: {super().problem or 'the agent has sent no other'}")
        return picked

    @property
    def context(self) -> X509Context:
        """
        Everything that the agent said last, expired or not.

        Raises:
            NotReadyError: it said that we have no identity, or the source is not entered.
        """
        if self._state is None:
            raise NotReadyError(
                f"no X509-SVID: {super().problem or 'the source is not entered'}"
            )
        return self._state

    @property
    def bundles(self) -> BundleSet:
        """The X.509 bundles by trust domain; empty when we have no identity any more."""
        return self._state.bundles if self._state is not None else BundleSet()

    @property
    def problem(self) -> str:
        """What is wrong now, in a sentence; empty when nothing is."""
        return super().problem or self._missing()

    def _streams(self, client: WorkloadClient) -> Sequence[Follower[Any]]:
        return [Follower("FetchX509SVID", client.watch_x509, self._take, self._clock)]

    def _take(self, context: X509Context | None) -> None:
        before = self._state
        if context is None or before is None:
            self._set(context)
            return
        # What is the same stays the same object: whoever has prepared it need not do so again.
        known = {one: one for one in before.identities}
        same = before.bundles == context.bundles
        self._set(
            X509Context(
                tuple(known.get(one, one) for one in context.identities),
                before.bundles if same else context.bundles,
            )
        )

    def _is_ready(self) -> bool:
        return self._state is not None and not self._missing()

    def _missing(self) -> str:
        if self._state is None:
            return ""
        identities = self._state.identities
        return self._why_not(self._pick(identities), identities)

    def _why_not(self, picked: X509Identity | None, identities: Sequence[X509Identity]) -> str:
        """Why *picked* of *identities* is none to use; empty when it is one."""
        if picked is None:
            there = ", ".join(map(_described, identities))
            return f"none of our identities is the one to pick ({there})"
        if self._clock.now() > picked.svid.validity.not_after:
            until = picked.svid.validity.not_after
            return f"the X509-SVID of {picked.svid.spiffe_id} expired at {until.isoformat()}"
        return ""


def _described(identity: X509Identity) -> str:
    hint = f' with the hint "{identity.hint}"' if identity.hint else ""
    return f"{identity.svid.spiffe_id}{hint}"
