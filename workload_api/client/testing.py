"""
A fake Workload API for tests: a real gRPC server on a real Unix socket, with a CA of its own.

    with FakeWorkloadApi("/web", federated=["partner.test"]) as fake:
        async with X509Source(fake.address) as source:
            fake.rotate()

It speaks to any client, of this process or another: `FakeWorkloadApi.environment` is what the
other needs.  Its threads are its own, so that it serves a test which blocks and one which
awaits.  Its keys protect nothing: whoever may open the socket is given them.
"""

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import grpc

from spiffe_core.bundle import BundleSet
from spiffe_core.bundle_document import jwks_of
from spiffe_core.errors import (
    ForbiddenError,
    MalformedError,
    PreconditionError,
    SpiffeError,
    UnsupportedError,
)
from spiffe_core.jwtsvid import JwtSvid, verify_jwt_svid
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE, parse_endpoint
from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.security_header import KEY, VALUE, has_header
from spiffe_wire.status import status_of
from workload_api.client.client import X509Identity
from workload_api.client.fake_authority import JWT_TTL, X509_TTL, utc_now
from workload_api.client.fake_authority import FakeAuthority as FakeAuthority
from workload_api.client.material import X509Material

MAX_STREAMS: Final = 512
"""Each open stream and each call under way holds a thread."""
METHODS: Final = (
    "FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID",
)  # fmt: skip
_NOBODY: Final = "no identity issued"
_NO_WIT: Final = "WIT-SVIDs are not supported"
_MAX_PATH_BYTES: Final = 107  # IOP-24


@dataclass(frozen=True, slots=True)
class FakeIdentity:
    """An identity that the fake gives to whoever asks; its SVIDs live for *ttl*."""

    path: str
    hint: str = ""
    ttl: timedelta = X509_TTL


@dataclass(frozen=True, slots=True)
class FixedMaterial:
    """An `X509Material` that never changes: a peer, good or bad."""

    identity: X509Identity
    bundles: BundleSet

    def on_change(self, _: Callable[[], None]) -> Callable[[], None]:
        """See `X509Material`; nothing ever changes."""
        return lambda: None


class FakeWorkloadApi:
    """
    Serves *identities* of *trust_domain* to every caller, as a context manager.

    Identities are paths, or `FakeIdentity` where a hint or a lifetime matters; JWT-SVIDs that
    are asked for live for *jwt_ttl*.  Every method may be called from any thread, and open
    streams hear of each change at once.

    Raises:
        PreconditionError: the path of *socket* is too long for a socket.
        SpiffeError: a name or path is not one.
    """

    def __init__(
        self,
        *identities: str | FakeIdentity,
        trust_domain: str = "example.org",
        federated: Iterable[str] = (),
        intermediate: bool = False,
        jwt_ttl: timedelta = JWT_TTL,
        socket: str | os.PathLike[str] | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._now = now
        self._jwt_ttl = jwt_ttl
        self.authority = FakeAuthority(trust_domain, intermediate=intermediate, now=now)
        """Signs what is served; use it to sign for peers."""
        self.calls: Counter[str] = Counter()
        """How often each method was called, by name; refused calls too."""
        self._federated = {one: FakeAuthority(one, now=now) for one in federated}
        self._refusals: dict[str, SpiffeError] = {}
        self._changed = threading.Condition()
        self._version = 0
        self._server: grpc.Server | None = None
        self._serve(identities or ("/workload",))
        self._folder = "" if socket is not None else tempfile.mkdtemp(prefix="spiffe-")
        path = os.fspath(socket) if socket is not None else f"{self._folder}/api.sock"
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            self._remove()
            raise PreconditionError(f"a socket's path has at most {_MAX_PATH_BYTES} bytes")
        self.address = str(parse_endpoint(f"unix://{path}"))
        """The endpoint, such as ``unix:///tmp/spiffe-x/api.sock``."""

    @property
    def environment(self) -> dict[str, str]:
        """What to add to the environment of a process that is to find this."""
        return {ENVIRONMENT_VARIABLE: self.address}

    @property
    def socket(self) -> Path:
        """Where the socket is."""
        return Path(self.address.removeprefix("unix://"))

    @property
    def identities(self) -> tuple[X509Identity, ...]:
        """What is served now, the default first."""
        return self._identities

    @property
    def bundles(self) -> BundleSet:
        """The bundles that are served now: our own, and those we are federated with."""
        with self._changed:
            authorities = (self.authority, *self._federated.values())
            return BundleSet.of(one.bundle for one in authorities)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._remove()

    def start(self) -> None:
        """Listen, as an agent that was started again."""
        if self._server is not None:
            return
        self._pool = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="fake-workload-api")
        server = grpc.server(self._pool, interceptors=[_SecurityHeader()])
        workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(_Servicer(self), server)
        server.add_insecure_port(f"unix:{self.socket}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """End every stream and go away, as an agent that was stopped; `start` comes back."""
        if self._server is None:
            return
        self._server.stop(None).wait()
        self._server = None
        self._pool.shutdown()

    def set_identities(self, *identities: str | FakeIdentity) -> None:
        """Serve these instead, with new keys."""
        self._serve(identities)

    def rotate(self) -> None:
        """Renew every X509-SVID: new keys, new serial numbers."""
        self._serve(self._wanted)

    def rotate_authorities(self, *, keep_old: bool = True) -> None:
        """Have a new CA and a new JWT key; those of before stay in the bundle, or go."""
        with self._changed:
            self.authority.rotate(keep_old=keep_old)
            self._serve(self._wanted)

    def federate(self, trust_domain: str) -> FakeAuthority:
        """Give out the bundle of another trust domain too; return its authority."""
        with self._changed:
            made = self._federated.get(trust_domain) or FakeAuthority(
                trust_domain, now=self._now
            )
            self._federated[trust_domain] = made
            self._tell()
            return made

    def unfederate(self, trust_domain: str) -> None:
        """Give out that bundle no longer."""
        with self._changed:
            del self._federated[trust_domain]
            self._tell()

    def deny(self) -> None:
        """Know no identity for anybody: PermissionDenied, also on the streams that are open."""
        self.refuse(ForbiddenError(_NOBODY))

    def refuse(self, error: SpiffeError, *methods: str) -> None:
        """End streams and answer calls with *error*: those of *methods*, or of every method."""
        with self._changed:
            self._refusals.update(dict.fromkeys(methods or METHODS, error))
            self._tell()

    def allow(self) -> None:
        """Answer again after `deny` or `refuse`."""
        with self._changed:
            self._refusals.clear()
            self._tell()

    def mint_x509(self, path: str, **options: Any) -> X509Identity:
        """Return an X509-SVID of ours that is not served; see `FakeAuthority.mint_x509`."""
        return self.authority.mint_x509(path, **options)

    def mint_jwt(self, path: str, *audience: str, **options: Any) -> JwtSvid:
        """Return a JWT-SVID of ours; see `FakeAuthority.mint_jwt`."""
        return self.authority.mint_jwt(path, *audience, **options)

    def material(self, path: str, **options: Any) -> X509Material:
        """Return what a peer with such an X509-SVID and our bundles has; see `mint_x509`."""
        return FixedMaterial(self.mint_x509(path, **options), self.bundles)

    def _serve(self, identities: Sequence[str | FakeIdentity]) -> None:
        with self._changed:
            self._wanted = tuple(
                FakeIdentity(one) if isinstance(one, str) else one for one in identities
            )
            self._identities = tuple(
                self.authority.mint_x509(one.path, hint=one.hint, ttl=one.ttl)
                for one in self._wanted
            )
            self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _remove(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    # What the servicer asks, in its threads

    def _call(self, method: str, context: Any) -> None:
        """Count a call, and end it if it is to be refused."""
        with self._changed:
            self.calls[method] += 1
        self._refuse(method, context)

    def _refuse(self, method: str, context: Any) -> None:
        error = self._refusals.get(method)
        if not self._identities and method != "ValidateJWTSVID":
            error = error or ForbiddenError(_NOBODY)  # IOP-09: never an empty answer
        if error is not None:
            outcome = status_of(error)
            context.abort(outcome.code, outcome.text)

    def _states(self, method: str, context: Any) -> Iterator[None]:
        """Yield at once and after every change, until the stream ends."""

        def ended() -> None:
            with self._changed:
                self._changed.notify_all()

        self._call(method, context)
        seen = -1
        if not context.add_callback(ended):
            return
        while True:
            with self._changed:
                while self._version == seen and context.is_active():
                    self._changed.wait()
                seen = self._version
            if not context.is_active():
                return
            self._refuse(method, context)
            yield


class _Servicer(workloadapi_pb2_grpc.SpiffeWorkloadAPIServicer):
    """The five methods; those of WIT-SVIDs answer Unimplemented (WAPI-46)."""

    def __init__(self, fake: FakeWorkloadApi) -> None:
        self._fake = fake

    def FetchX509SVID(self, _: Any, context: Any) -> Iterator[Any]:  # noqa: N802 its name
        before = None
        for _ in self._fake._states("FetchX509SVID", context):
            message = self._x509()
            if message != before:  # WAPI-09: no identical repeats
                yield message
            before = message

    def FetchX509Bundles(self, _: Any, context: Any) -> Iterator[Any]:  # noqa: N802 its name
        before = None
        for _ in self._fake._states("FetchX509Bundles", context):
            bundles = {name.id.uri: one.x509_der() for name, one in self._fake.bundles.items()}
            if bundles != before:
                yield workloadapi_pb2.X509BundlesResponse(bundles=bundles)
            before = bundles

    def FetchJWTBundles(self, _: Any, context: Any) -> Iterator[Any]:  # noqa: N802 its name
        before = None
        for _ in self._fake._states("FetchJWTBundles", context):
            bundles = {name.id.uri: jwks_of(one) for name, one in self._fake.bundles.items()}
            if bundles != before:
                yield workloadapi_pb2.JWTBundlesResponse(bundles=bundles)
            before = bundles

    def FetchJWTSVID(self, request: Any, context: Any) -> Any:  # noqa: N802 its name
        self._fake._call("FetchJWTSVID", context)
        try:
            return self._jwt(request)
        except SpiffeError as error:
            return _abort(context, error)

    def ValidateJWTSVID(self, request: Any, context: Any) -> Any:  # noqa: N802 its name
        self._fake._call("ValidateJWTSVID", context)
        try:
            if not request.audience or not request.svid:
                raise MalformedError("audience and svid must be given")  # WAPI-45
            svid = verify_jwt_svid(
                request.svid,
                self._fake.bundles,
                audience=request.audience,
                at=self._fake._now(),
            )
        except SpiffeError as error:
            return _abort(context, error)
        response = workloadapi_pb2.ValidateJWTSVIDResponse(spiffe_id=svid.spiffe_id.uri)
        response.claims.update({**svid.claims, "aud": list(svid.audience)})
        return response

    def FetchWITSVID(self, _: Any, context: Any) -> Any:  # noqa: N802 its name
        _abort(context, UnsupportedError(_NO_WIT))

    def FetchWITBundles(self, _: Any, context: Any) -> Any:  # noqa: N802 its name
        _abort(context, UnsupportedError(_NO_WIT))

    def _x509(self) -> Any:
        with self._fake._changed:
            identities, bundles = self._fake.identities, self._fake.bundles
        own = self._fake.authority.trust_domain
        return workloadapi_pb2.X509SVIDResponse(
            svids=[
                workloadapi_pb2.X509SVID(
                    spiffe_id=one.svid.spiffe_id.uri,
                    x509_svid=one.svid.chain_der(),
                    x509_svid_key=one.key,
                    bundle=bundles[own].x509_der(),
                    hint=one.hint,
                )
                for one in identities
            ],
            federated_bundles={
                name.id.uri: one.x509_der() for name, one in bundles.items() if name != own
            },
        )

    def _jwt(self, request: Any) -> Any:
        if not request.audience or not all(request.audience):
            raise MalformedError("an audience must be given")  # WAPI-14
        identities = self._fake._wanted
        if request.spiffe_id:
            wanted = SpiffeId.parse(request.spiffe_id)
            own = self._fake.authority.trust_domain
            identities = tuple(one for one in identities if SpiffeId(own, one.path) == wanted)
        if not identities:
            raise ForbiddenError(_NOBODY)  # WAPI-37
        response = workloadapi_pb2.JWTSVIDResponse()
        for one in identities:
            svid = self._fake.mint_jwt(one.path, *request.audience, ttl=self._fake._jwt_ttl)
            response.svids.add(spiffe_id=svid.spiffe_id.uri, svid=svid.token, hint=one.hint)
        return response


class _SecurityHeader(grpc.ServerInterceptor):
    """WEP-07, WEP-08, WEP-09: every call without the header is refused, known or not."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Let the call through, or refuse it."""
        if has_header(details.invocation_metadata):
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(
            lambda _, context: context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"security header missing: send metadata {KEY}: {VALUE}",
            )
        )


def _abort(context: Any, error: SpiffeError) -> None:
    outcome = status_of(error)
    context.abort(outcome.code, outcome.text)
