"""
How SVIDs are asked for: with the pod behind each by our own service, or as SPIRE's agents do.

Source: architecture A5; SPIRE API 5.3.  A server that knows pods signs for those of this node
alone, so it is told for which one; one that has no such service is asked as ever.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc

from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import InternalError, NotReadyError, UnsupportedError
from spiffe_core.selector import SelectorSet
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2, podsvid_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc
from spiffe_wire.status import error_of

CALL_TIMEOUT: Final = 30.0
POD_TYPE: Final = "k8s"


class Pods(Protocol):
    """The pods of this node, as whoever signs ahead needs them."""

    def pod_for(self, entry_selectors: SelectorSet) -> str:
        """Return the UID of a pod here that an entry is for, or nothing."""
        ...

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have *listener* called after every change."""
        ...


@dataclass(frozen=True, slots=True)
class WantedX509:
    """One SVID to ask for."""

    entry_id: str
    csr: bytes
    pod_uid: str = ""


@dataclass
class SvidCalls:
    """Asks the server for SVIDs; for one event loop."""

    channel: Callable[[], Any]
    pods: Pods | None = None
    is_offered: bool = True
    """Whether the server has our service, as far as we know; asked anew at each connection."""

    @property
    def names_pods(self) -> bool:
        """True while the server is told of pods."""
        return self.pods is not None and self.is_offered

    def pod_of(self, entry: RegistrationEntry) -> str | None:
        """
        Return the pod to name for *entry*: nothing when it is not about pods, or the server
        need not know; None when no pod here is what it is for.
        """
        if self.pods is None or not self.is_offered or not is_of_pods(entry):
            return ""
        return self.pods.pod_for(entry.selectors) or None

    async def x509(
        self, wanted: Sequence[WantedX509]
    ) -> AsyncGenerator[list[tuple[int, Any]], None]:
        """
        Ask for X509-SVIDs; yield results as they are decided, each with its number.

        The first part comes at once, and is empty when all waits for something.

        Raises:
            SpiffeError: what the server said to the call as a whole.
        """
        if self.names_pods:
            try:
                async for part in self._x509_of_pods(wanted):
                    yield part
                return
            except UnsupportedError:
                self.is_offered = False
        request = svid_pb2.BatchNewX509SVIDRequest(
            params=[
                svid_pb2.NewX509SVIDParams(entry_id=one.entry_id, csr=one.csr) for one in wanted
            ]
        )
        try:
            answer = await svid_pb2_grpc.SVIDStub(self.channel()).BatchNewX509SVID(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        yield list(enumerate(answer.results))

    async def _x509_of_pods(
        self, wanted: Sequence[WantedX509]
    ) -> AsyncGenerator[list[tuple[int, Any]], None]:
        request = podsvid_pb2.BatchNewX509SVIDRequest()
        for one in wanted:
            request.params.add(entry_id=one.entry_id, csr=one.csr, pod_uid=one.pod_uid)
        call = podsvid_pb2_grpc.PodSvidStub(self.channel()).BatchNewX509SVID(
            request, timeout=CALL_TIMEOUT
        )
        try:
            async for answer in call:
                yield [(one.number, one) for one in answer.results]
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def jwt(self, entry: RegistrationEntry, audience: tuple[str, ...]) -> Any:
        """
        Ask for a JWT-SVID, and return it as it came.

        Raises:
            NotReadyError: no pod here is what *entry* is for.
            SpiffeError: what the server said.
        """
        pod_uid = self.pod_of(entry)
        if pod_uid is None:
            raise NotReadyError("no pod of this node is known to be what the entry is for")
        try:
            if pod_uid:
                return await self._jwt_of_pod(entry, audience, pod_uid)
            request = svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=audience)
            answer = await svid_pb2_grpc.SVIDStub(self.channel()).NewJWTSVID(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return answer.svid

    async def _jwt_of_pod(
        self, entry: RegistrationEntry, audience: tuple[str, ...], pod_uid: str
    ) -> Any:
        request = podsvid_pb2.NewJWTSVIDRequest(
            entry_id=entry.id, audience=audience, pod_uid=pod_uid
        )
        try:
            answer = await podsvid_pb2_grpc.PodSvidStub(self.channel()).NewJWTSVID(
                request, timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            self.is_offered = False
            return await self.jwt(entry, audience)
        return answer.svid


def is_of_pods(entry: RegistrationEntry) -> bool:
    """True when *entry* has selectors of pods."""
    return any(one.type == POD_TYPE for one in entry.selectors)


class Collected:
    """Which of the numbers that were asked for have been answered."""

    def __init__(self, count: int) -> None:
        self.missing = set(range(count))

    def take(self, part: Sequence[tuple[int, Any]]) -> None:
        """
        Note the numbers of *part*.

        Raises:
            InternalError: one that was not asked for, or was answered before.
        """
        for number, _ in part:
            if number not in self.missing:
                raise InternalError("the server answered what it was not asked")
            self.missing.discard(number)

    def end(self) -> None:
        """
        See that all is there.

        Raises:
            InternalError: not all.
        """
        if self.missing:
            raise InternalError("the server answered another number of SVIDs than was asked")
