"""
The trust bundles of every trust domain that a workload may talk to, as they are now.

Source: WAPI-16, WAPI-22, WAPI-29 to WAPI-31, WAPI-38 to WAPI-42, WEP-23.  For those who verify
and have no SVID of their own; `X509Source` holds X.509 bundles already.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import MalformedError
from workload_api.client.client import WorkloadClient, joined
from workload_api.client.watching import TIMEOUT, Clock, Follower, Source

_X509: Final = "FetchX509Bundles"
_JWT: Final = "FetchJWTBundles"
_NOTHING: Final = BundleSet()


class BundleSource(Source[BundleSet]):
    """
    X.509 and JWT authorities by trust domain, in one set which stays fresh by itself.

    ``async with BundleSource() as source`` waits until the agent has answered for both.  One
    that it denies or does not offer is empty, as long as there is the other.

    Raises:
        PreconditionError: no address given, and none in ``SPIFFE_ENDPOINT_SOCKET``.
        EndpointError: the address is not one.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: timedelta = TIMEOUT,
        clock: Clock | None = None,
    ) -> None:
        self._given: dict[str, BundleSet | None] = {}
        super().__init__(address, timeout, clock)

    @property
    def bundles(self) -> BundleSet:
        """The bundles; another object when changed, empty when we may have none any more."""
        return self._state if self._state is not None else _NOTHING

    def _streams(self, client: WorkloadClient) -> Sequence[Follower[Any]]:
        return [
            Follower(_X509, client.watch_x509_bundles, self._takes(_X509), self._clock),
            Follower(_JWT, client.watch_jwt_bundles, self._takes(_JWT), self._clock),
        ]

    def _takes(self, stream: str) -> Callable[[BundleSet | None], None]:
        def take(bundles: BundleSet | None) -> None:
            self._given[stream] = bundles
            if any(given is not None for given in self._given.values()):
                x509, jwt = (self._given.get(one) or _NOTHING for one in (_X509, _JWT))
                self._set(joined(x509, jwt))
            else:
                self._set(None)

        return take

    def _is_ready(self) -> bool:
        return self._state is not None and len(self._given) == len(self._followers)

    def _raise_if_final(self) -> None:
        finals = [one.final for one in self._followers]
        for final in finals:
            if final is not None and (None not in finals or isinstance(final, MalformedError)):
                raise final
