"""
A thin client of the Workload API for asyncio (WEP-11, WEP-18, WAPI-06 to WAPI-15).

It asks and parses, and repeats nothing; the sources beside it stay fresh by themselves.
"""

import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias, TypeVar

import grpc

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.bundle_document import bundle_from_jwks
from spiffe_core.der import split_certificates
from spiffe_core.errors import InternalError, MalformedError, PreconditionError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.x509svid import X509Svid
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE, UnixEndpoint, parse_endpoint
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import whoami_pb2, whoami_pb2_grpc
from spiffe_wire.security_header import METADATA
from spiffe_wire.status import error_of
from workload_api.keys import check_key

TIMEOUT = 30.0
"""Seconds for a call that asks once."""

_OPTIONS: Final = (
    # A connection of its own: how another client of this program fares is nothing to it.
    ("grpc.use_local_subchannel_pool", 1),
    # An agent that restarts is back in a second or two; grpcio would look after a minute.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The endpoint is on this host, whatever proxy the environment names for the world.
    ("grpc.enable_http_proxy", 0),
)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class X509Identity:
    """One X509-SVID of this workload, with its key."""

    svid: X509Svid
    key: bytes = field(repr=False)
    """PKCS#8 DER."""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class X509Context:
    """Everything one message of FetchX509SVID says; the first identity is the default."""

    identities: tuple[X509Identity, ...]
    bundles: BundleSet


Broken: TypeAlias = Callable[[InternalError], None]
"""Told of a message that breaks a rule; the stream then goes on with the next (T-13)."""


class WorkloadClient:
    """
    A connection to the Workload API, as an async context manager.

    Raises:
        PreconditionError: no address given, and none in ``SPIFFE_ENDPOINT_SOCKET``.
        EndpointError: the address is not one.
    """

    def __init__(self, address: str | None = None) -> None:
        text = address or os.environ.get(ENVIRONMENT_VARIABLE)
        if not text:
            raise PreconditionError(
                f"no Workload API address: set {ENVIRONMENT_VARIABLE}=unix:///path/to/socket"
            )
        endpoint = parse_endpoint(text)
        self.address = str(endpoint)
        if isinstance(endpoint, UnixEndpoint):
            self._target = f"unix:{endpoint.path}"
        else:
            self._target = self.address.removeprefix("tcp://")

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        self._stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def watch_x509(self, broken: Broken | None = None) -> AsyncGenerator[X509Context, None]:
        """
        Yield the full state at once, and at every change.

        Raises:
            SpiffeError: how the agent ended the stream; retry all but MalformedError and
                UnsupportedError.
            InternalError: a message breaks a rule, and *broken* is not there to be told.
        """
        return self._x509(None, broken)

    def watch_x509_bundles(
        self, broken: Broken | None = None
    ) -> AsyncGenerator[BundleSet, None]:
        """Yield the X.509 bundles of every trust domain at each change; see `watch_x509`."""
        return self._x509_bundles(None, broken)

    def watch_jwt_bundles(
        self, broken: Broken | None = None
    ) -> AsyncGenerator[BundleSet, None]:
        """Yield the JWT bundles of every trust domain at each change; see `watch_x509`."""
        return self._jwt_bundles(None, broken)

    async def fetch_x509(self) -> X509Context:
        """Return the present state; see `watch_x509`."""
        return await _first(self._x509(TIMEOUT))

    async def fetch_jwt(
        self, audience: tuple[str, ...], spiffe_id: SpiffeId | None = None
    ) -> tuple[JwtSvid, ...]:
        """
        Return a JWT-SVID for every identity, or for *spiffe_id* alone.

        Raises:
            SpiffeError: the agent's answer.
        """
        request = workloadapi_pb2.JWTSVIDRequest(
            audience=audience, spiffe_id=spiffe_id.uri if spiffe_id else ""
        )
        answer = await self._ask(
            self._stub.FetchJWTSVID(request, timeout=TIMEOUT, metadata=METADATA)
        )
        with _blames_the_agent():
            svids = tuple(_jwt_svid(one, audience, spiffe_id) for one in answer.svids)
        if not svids:
            raise InternalError("the agent sent an answer without an SVID")
        return svids

    async def validate_jwt(
        self, token: str, audience: str
    ) -> tuple[SpiffeId, Mapping[str, Any]]:
        """
        Have the agent validate *token*; return its subject and claims.

        Raises:
            MalformedError: the token is not good for *audience*.
        """
        request = workloadapi_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
        answer = await self._ask(
            self._stub.ValidateJWTSVID(request, timeout=TIMEOUT, metadata=METADATA)
        )
        from google.protobuf.json_format import MessageToDict

        with _blames_the_agent():
            return SpiffeId.parse(answer.spiffe_id), MessageToDict(answer.claims)

    async def fetch_bundles(self) -> BundleSet:
        """Return the bundles of every trust domain that this workload may talk to."""
        x509 = await _first(self._x509_bundles(TIMEOUT))
        return joined(x509, await _first(self._jwt_bundles(TIMEOUT)))

    async def who_am_i(self) -> Any:
        """Return what the agent learnt of this process; our own agent's service alone."""
        stub = whoami_pb2_grpc.WhoAmIStub(self._channel)
        request = whoami_pb2.WhoAmIRequest()
        return await self._ask(stub.Get(request, timeout=TIMEOUT, metadata=METADATA))

    def _x509(
        self, timeout: float | None, broken: Broken | None = None
    ) -> AsyncGenerator[X509Context, None]:
        call = self._stub.FetchX509SVID(
            workloadapi_pb2.X509SVIDRequest(), timeout=timeout, metadata=METADATA
        )
        return _messages(call, _x509_context, broken)

    def _x509_bundles(
        self, timeout: float | None, broken: Broken | None = None
    ) -> AsyncGenerator[BundleSet, None]:
        call = self._stub.FetchX509Bundles(
            workloadapi_pb2.X509BundlesRequest(), timeout=timeout, metadata=METADATA
        )
        return _messages(call, lambda message: _bundles(message, _x509_bundle), broken)

    def _jwt_bundles(
        self, timeout: float | None, broken: Broken | None = None
    ) -> AsyncGenerator[BundleSet, None]:
        call = self._stub.FetchJWTBundles(
            workloadapi_pb2.JWTBundlesRequest(), timeout=timeout, metadata=METADATA
        )
        return _messages(call, lambda message: _bundles(message, bundle_from_jwks), broken)

    async def _ask(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error


def joined(x509: BundleSet, jwt: BundleSet) -> BundleSet:
    """Return the X.509 authorities of the one and the JWT authorities of the other."""
    return BundleSet.of(
        Bundle(
            name,
            x509[name].x509_authorities if name in x509 else (),
            jwt[name].jwt_authorities if name in jwt else (),
        )
        for name in sorted({*x509, *jwt})
    )


async def _messages(
    call: Any, parse: Callable[[Any], _T], broken: Broken | None
) -> AsyncGenerator[_T, None]:
    try:
        async for message in call:
            try:
                parsed = parse(message)
            except InternalError as error:
                if broken is None:
                    raise
                broken(error)
                continue
            yield parsed
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error
    finally:
        call.cancel()


async def _first(messages: AsyncGenerator[_T, None]) -> _T:
    async with contextlib.aclosing(messages):
        async for message in messages:
            return message
    raise InternalError("the agent ended the stream without an answer")


class _blames_the_agent:  # noqa: N801 read as a statement
    """A parse error of the agent's answer is not the caller's fault (style 4)."""

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, MalformedError):
            raise InternalError(f"the agent's answer breaks a rule: {error}") from error


def _x509_context(message: Any) -> X509Context:
    with _blames_the_agent():
        identities, bundles, hints = [], [], set()
        for one in message.svids:
            svid = X509Svid.from_chain(split_certificates(one.x509_svid))
            if one.spiffe_id != svid.spiffe_id.uri or not one.x509_svid_key:
                raise InternalError("the agent sent an SVID that is not whole")  # WAPI-15
            check_key(one.x509_svid_key, svid.chain)  # WAPI-18
            if one.hint and one.hint in hints:
                continue  # WAPI-26: the first one counts
            hints.add(one.hint)
            identities.append(X509Identity(svid, one.x509_svid_key, one.hint))
            bundles.append(_x509_bundle(svid.spiffe_id.trust_domain, one.bundle))
        for key, der in message.federated_bundles.items():
            bundles.append(_x509_bundle(SpiffeId.parse(key).trust_domain, der))
    if not identities:
        raise InternalError("the agent sent an answer without an SVID")
    return X509Context(tuple(identities), BundleSet.of(bundles))


def _jwt_svid(one: Any, audience: tuple[str, ...], wanted: SpiffeId | None) -> JwtSvid:
    svid = JwtSvid.parse_unverified(one.svid)
    if one.spiffe_id != svid.spiffe_id.uri or wanted not in (None, svid.spiffe_id):
        raise InternalError("the agent sent a JWT-SVID of another identity")  # WAPI-34, -35
    if not set(audience) <= set(svid.audience):
        raise InternalError("the agent sent a JWT-SVID for another audience")  # WAPI-32
    return svid


def _bundles(message: Any, parse: Callable[[TrustDomain, bytes], Bundle]) -> BundleSet:
    with _blames_the_agent():
        names = {key: SpiffeId.parse(key).trust_domain for key in message.bundles}
        found = BundleSet.of(parse(names[key], message.bundles[key]) for key in names)
    if not found:
        raise InternalError("the agent sent an answer without a bundle")
    return found


def _x509_bundle(name: TrustDomain, der: bytes) -> Bundle:
    return Bundle(name, tuple(X509Authority.parse(one) for one in split_certificates(der)))
