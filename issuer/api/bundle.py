"""``spire.api.server.bundle.v1.Bundle`` (SPIRE API 5.4)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from issuer.api.answers import OK, check_batch, failure, mask_of, to_wire
from issuer.api.callers import caller
from issuer.services.bundles import BundleService, DeleteMode
from spiffe_core.bundle import Bundle
from spiffe_core.errors import MalformedError, SpiffeError, UnsupportedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.convert.entry import masked
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc

MAX_BUNDLE_BYTES: Final = 1024 * 1024  # security requirements, table 1
_MASKED: Final = ("x509_authorities", "jwt_authorities", "refresh_hint", "sequence_number")
_NO_DOWNSTREAM: Final = "keys of downstream servers are not published by this release"


@dataclass
class BundleServicer(bundle_pb2_grpc.BundleServicer):
    """Thin: parse, ask the service, answer."""

    service: BundleService

    async def CountBundles(self, request: Any, context: Any) -> Any:
        return bundle_pb2.CountBundlesResponse(count=await self.service.count())

    async def GetBundle(self, request: Any, context: Any) -> Any:
        return _answer(self.service.own(), request)

    async def GetFederatedBundle(self, request: Any, context: Any) -> Any:
        return _answer(await self.service.foreign(_domain(request.trust_domain)), request)

    async def ListFederatedBundles(self, request: Any, context: Any) -> Any:
        page = await self.service.page(request.page_size, request.page_token)
        mask = mask_of(request)
        return bundle_pb2.ListFederatedBundlesResponse(
            bundles=await to_wire(page.items, bundle_to_wire, mask, "trust_domain"),
            next_page_token=page.next_token,
        )

    async def AppendBundle(self, request: Any, context: Any) -> Any:
        raise UnsupportedError(
            "authorities of other servers are not appended: the trust domain has one authority"
        )

    async def PublishJWTAuthority(self, request: Any, context: Any) -> Any:
        raise UnsupportedError(_NO_DOWNSTREAM)

    async def PublishWITAuthority(self, request: Any, context: Any) -> Any:
        raise UnsupportedError(_NO_DOWNSTREAM)

    async def BatchCreateFederatedBundle(self, request: Any, context: Any) -> Any:
        actor = caller().name
        response = bundle_pb2.BatchCreateFederatedBundleResponse
        return response(
            results=await _batch(
                request, lambda one: self.service.create(one, actor=actor), response.Result
            )
        )

    async def BatchUpdateFederatedBundle(self, request: Any, context: Any) -> Any:
        actor = caller().name
        response = bundle_pb2.BatchUpdateFederatedBundleResponse
        mask = mask_of(request, "input_mask")
        masked_in = [name for name in _MASKED if mask is None or getattr(mask, name)]

        async def update(given: Bundle) -> Bundle:
            def change(before: Bundle) -> Bundle:
                return replace(before, **{name: getattr(given, name) for name in masked_in})

            return await self.service.update(given.trust_domain, change, actor=actor)

        return response(results=await _batch(request, update, response.Result))

    async def BatchSetFederatedBundle(self, request: Any, context: Any) -> Any:
        actor = caller().name
        response = bundle_pb2.BatchSetFederatedBundleResponse
        return response(
            results=await _batch(
                request, lambda one: self.service.set(one, actor=actor), response.Result
            )
        )

    async def BatchDeleteFederatedBundle(self, request: Any, context: Any) -> Any:
        check_batch(len(request.trust_domains))
        try:
            mode = DeleteMode(request.mode)
        except ValueError:
            raise MalformedError("failed to parse deletion mode: no such mode") from None
        actor = caller().name
        results = []
        for name in request.trust_domains:
            status = OK
            try:
                await self.service.delete(_domain(name), mode, actor=actor)
            except SpiffeError as error:
                status = failure(error)
            results.append(
                bundle_pb2.BatchDeleteFederatedBundleResponse.Result(
                    status=status, trust_domain=name
                )
            )
        return bundle_pb2.BatchDeleteFederatedBundleResponse(results=results)


def _answer(bundle: Bundle, request: Any) -> Any:
    return masked(bundle_to_wire(bundle), mask_of(request), "trust_domain")


def _domain(name: str) -> TrustDomain:
    try:
        return TrustDomain.parse(name)
    except MalformedError as error:
        raise MalformedError(f"trust domain argument is not valid: {error}") from error


async def _batch(
    request: Any, change: Callable[[Bundle], Awaitable[Bundle]], result: Callable[..., Any]
) -> list[Any]:
    check_batch(len(request.bundle))
    results = []
    for message in request.bundle:
        try:
            parsed = _parsed(message)
        except MalformedError as error:
            results.append(result(status=failure(error, "failed to convert bundle")))
            continue
        try:
            made = await change(parsed)
            results.append(result(status=OK, bundle=_answer(made, request)))
        except SpiffeError as error:
            results.append(result(status=failure(error)))
    return results


def _parsed(message: Any) -> Bundle:
    if message.ByteSize() > MAX_BUNDLE_BYTES:
        raise MalformedError(f"a bundle is longer than {MAX_BUNDLE_BYTES} bytes")
    for one in (*message.x509_authorities, *message.jwt_authorities):
        one.ClearField("tainted")  # output only: nobody taints another domain's keys here
    return bundle_from_wire(message)
