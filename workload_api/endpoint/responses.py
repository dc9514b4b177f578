"""
Workload API messages, built once for all streams that get the same (architecture A14).

Source: WAPI-17 to WAPI-41, IOP-04, IOP-08, IOP-09, IOP-25 to IOP-27, T-13.  Every message is
read back before it is sent: a client that cannot parse one drops the whole update, or stops.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from spiffe_core.bundle_document import bundle_from_jwks, jwks_of
from spiffe_core.der import split_certificates
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid
from spiffe_wire.pb import workloadapi_pb2
from workload_api.cache.cache import View

MAX_BYTES: Final = 4 * 1024 * 1024 - 1024  # IOP-25: clients receive at most 4 MiB
KEPT: Final = 1024
_T = TypeVar("_T")


class Made(Generic[_T]):
    """The last messages by what they were made of; those asked for longest ago go first."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[object, ...], tuple[object, _T]] = OrderedDict()

    def once(self, key: tuple[object, ...], of: object, build: Callable[[], _T]) -> _T:
        """
        Return what was made for *key*, or *build* it now.

        *of* is kept beside it: what the ids in *key* are those of, so that they are not
        given to other objects.
        """
        found = self._made.get(key)
        if found is not None:
            self._made.move_to_end(key)
            return found[1]
        made = build()
        self._made[key] = of, made
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._made)


class Responses:
    """Serialised messages by content."""

    def __init__(self, trust_domain: TrustDomain) -> None:
        self._trust_domain = trust_domain
        self._made: Made[bytes] = Made()

    def x509_svids(self, view: View) -> bytes:
        """
        Return an ``X509SVIDResponse``.

        Raises:
            InternalError: it would break a rule; the caller keeps the last good one.
        """
        key = ("x509", view.identity_key, view.bundle_key)
        return self._once(key, view, self._x509_svids)

    def x509_bundles(self, view: View) -> bytes:
        """Return an ``X509BundlesResponse``; see `x509_svids`."""
        return self._once(("x509-bundles", view.bundle_key), view, self._x509_bundles)

    def jwt_bundles(self, view: View) -> bytes:
        """Return a ``JWTBundlesResponse``; see `x509_svids`."""
        return self._once(("jwt-bundles", view.bundle_key), view, self._jwt_bundles)

    def _once(self, key: tuple[object, ...], view: View, build: Callable[[View], Any]) -> bytes:
        return self._made.once(key, view.bundles, lambda: self._serialized(view, build))

    def _serialized(self, view: View, build: Callable[[View], Any]) -> bytes:
        if self._trust_domain not in view.bundles:
            raise InternalError("our own bundle is not known")
        try:
            # Maps in one order, so that equal content is equal bytes and is not sent twice.
            made = bytes(build(view).SerializeToString(deterministic=True))
        except MalformedError as error:
            raise InternalError("a response would break a rule; it was not sent") from error
        return check_size(made)

    def _x509_svids(self, view: View) -> Any:
        own = view.bundles[self._trust_domain].x509_der()
        split_certificates(own)
        response = workloadapi_pb2.X509SVIDResponse()
        hints = set()
        for one in view.identities:
            svid = X509Svid.from_chain(one.svid.chain)
            if svid.spiffe_id != one.entry.spiffe_id:
                raise InternalError("an SVID is not that of its entry")
            if one.entry.hint and one.entry.hint in hints:
                raise InternalError("two SVIDs have one hint")
            hints.add(one.entry.hint)
            response.svids.add(
                spiffe_id=svid.spiffe_id.uri,
                x509_svid=svid.chain_der(),
                x509_svid_key=one.svid.key,
                bundle=own,
                hint=one.entry.hint,
            )
        if not response.svids:
            raise InternalError("an answer without an SVID is never sent")  # IOP-09
        for name, bundle in view.bundles.items():
            if name != self._trust_domain and bundle.x509_authorities:  # IOP-08
                response.federated_bundles[name.id.uri] = bundle.x509_der()
        return response

    def _x509_bundles(self, view: View) -> Any:
        response = workloadapi_pb2.X509BundlesResponse()
        for name, bundle in view.bundles.items():
            if bundle.x509_authorities:
                response.bundles[name.id.uri] = bundle.x509_der()
        if self._trust_domain.id.uri not in response.bundles:  # WAPI-29
            raise InternalError("our own bundle has no X.509 authority")
        return response

    def _jwt_bundles(self, view: View) -> Any:
        response = workloadapi_pb2.JWTBundlesResponse()
        for name, bundle in view.bundles.items():
            if not bundle.jwt_authorities and name != self._trust_domain:
                continue
            keys = jwks_of(bundle)
            if len(bundle_from_jwks(name, keys).jwt_authorities) != len(bundle.jwt_authorities):
                raise InternalError("a JWK Set does not read back")
            response.bundles[name.id.uri] = keys
        return response


def check_size(message: bytes) -> bytes:
    """
    Return *message* if every client can take it.

    Raises:
        InternalError: it is too long.
    """
    if len(message) > MAX_BYTES:
        raise InternalError("a response would be over 4 MiB: federate with fewer domains")
    return message
