"""
A thin client of the Workload API for asyncio (WEP-11, WEP-18, WAPI-06 to WAPI-15).

It asks and parses; sources that stay fresh by themselves will be built on it.
"""

import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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

TIMEOUT = 30.0
"""Seconds for a call that asks once."""


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
        if isinstance(endpoint, UnixEndpoint):
            self._target = f"unix:{endpoint.path}"
        else:
            self._target = str(endpoint).removeprefix("tcp://")

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target)
        self._stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def watch_x509(self) -> AsyncIterator[X509Context]:
        """
        Yield the full state at once, and at every change.

        Raises:
            SpiffeError: how the agent ended the stream; retry all but MalformedError.
        """
        async with contextlib.aclosing(self._x509(None)) as contexts:
            async for context in contexts:
                yield context

    async def fetch_x509(self) -> X509Context:
        """Return the present state; see `watch_x509`."""
        async with contextlib.aclosing(self._x509(TIMEOUT)) as contexts:
            async for context in contexts:
                return context
        raise InternalError("the agent ended the stream without an answer")

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
            svids = tuple(JwtSvid.parse_unverified(one.svid) for one in answer.svids)
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
        x509 = await self._first(
            self._stub.FetchX509Bundles, workloadapi_pb2.X509BundlesRequest()
        )
        jwt = await self._first(self._stub.FetchJWTBundles, workloadapi_pb2.JWTBundlesRequest())
        with _blames_the_agent():
            names = {SpiffeId.parse(key).trust_domain for key in (*x509.bundles, *jwt.bundles)}
            return BundleSet.of(_bundle(name, x509.bundles, jwt.bundles) for name in names)

    async def who_am_i(self) -> Any:
        """Return what the agent learnt of this process; our own agent's service alone."""
        stub = whoami_pb2_grpc.WhoAmIStub(self._channel)
        request = whoami_pb2.WhoAmIRequest()
        return await self._ask(stub.Get(request, timeout=TIMEOUT, metadata=METADATA))

    async def _x509(self, timeout: float | None) -> AsyncGenerator[X509Context, None]:
        request = workloadapi_pb2.X509SVIDRequest()
        call = self._stub.FetchX509SVID(request, timeout=timeout, metadata=METADATA)
        try:
            async for message in call:
                yield _x509_context(message)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def _first(self, method: Any, request: Any) -> Any:
        call = method(request, timeout=TIMEOUT, metadata=METADATA)
        try:
            answer = await self._ask(call.read())
        finally:
            call.cancel()
        if answer is grpc.aio.EOF:
            raise InternalError("the agent ended the stream without an answer")
        return answer

    async def _ask(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error


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


def _x509_bundle(name: TrustDomain, der: bytes) -> Bundle:
    return Bundle(name, tuple(X509Authority.parse(one) for one in split_certificates(der)))


def _bundle(name: TrustDomain, x509: Mapping[str, bytes], jwt: Mapping[str, bytes]) -> Bundle:
    authorities = _x509_bundle(name, x509[name.id.uri]) if name.id.uri in x509 else Bundle(name)
    if name.id.uri not in jwt:
        return authorities
    keys = bundle_from_jwks(name, jwt[name.id.uri])
    return Bundle(name, authorities.x509_authorities, keys.jwt_authorities)
