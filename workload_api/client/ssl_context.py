"""
`ssl` contexts whose peers are SPIFFE IDs, for anything in Python that takes an `SSLContext`.

Source: SEC-10, SEC-11, SEC-16 to SEC-18, X509-31, FED-43, T-09.

``ssl`` can neither compare a SPIFFE ID nor keep one store of roots for each trust domain, and a
context keeps the certificate that it was given once.  So `SpiffeContext` holds none: for each
connection it hands over to a context made of what its material holds now.  OpenSSL sifts with
all authorities at once; the handshake then ends with our own verification, by the peer's own
trust domain alone, before a byte can be read or written.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self, cast

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import ErrorKind, PreconditionError, SpiffeError, UnauthenticatedError
from spiffe_core.matching import Matcher
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor.tls import harden, load, peer_chain
from workload_api.client.client import X509Identity
from workload_api.client.material import X509Material
from workload_api.client.peer_check import Now, PeerVerifier

_APPLICATION_VERIFICATION: Final = 50  # X509_V_ERR_APPLICATION_VERIFICATION


class PeerRefusedError(ssl.SSLCertVerificationError, SpiffeError):
    """
    The handshake was done, and then the peer's X509-SVID was not good enough, or not welcome.

    An `SSLCertVerificationError`, as those who catch TLS errors know no other.
    """

    kind = ErrorKind.UNAUTHENTICATED

    def __init__(self, text: str) -> None:
        super().__init__(ssl.SSL_ERROR_SSL, text)
        self.verify_code = _APPLICATION_VERIFICATION
        self.verify_message = text


class NotNowError(ssl.SSLError, SpiffeError):
    """There is no SVID of ours, or no authority to verify a peer with, at this moment."""

    kind = ErrorKind.NOT_READY

    def __init__(self, text: str) -> None:
        super().__init__(ssl.SSL_ERROR_SSL, text)


class ContextError(PreconditionError):
    """Something was asked of a context that would undo what it is for; says what to do."""


def server_context(
    material: X509Material, *, authorize: Matcher, now: Now | None = None
) -> "SpiffeContext":
    """
    Return a context for a server whose clients must prove an ID that *authorize* accepts.

    It stays good for ever: each connection gets the SVID and the bundles of its moment.
    """
    return SpiffeContext(material, server_side=True, authorize=authorize, now=now)


def client_context(
    material: X509Material, *, authorize: Matcher, now: Now | None = None
) -> "SpiffeContext":
    """
    Return a context for a client whose servers must prove an ID that *authorize* accepts.

    Host names are not compared: an SVID names a workload, not where it runs.
    """
    return SpiffeContext(material, server_side=False, authorize=authorize, now=now)


def peer_of(connection: Any) -> X509Svid:
    """
    Return whom *connection* was proved to lead to, at its handshake.

    It may be a transport, a `StreamWriter`, an `SSLObject` or an `SSLSocket`.

    Raises:
        UnauthenticatedError: it was not made by a context of ours.
    """
    return proof_of(connection).peer


def recheck(connection: Any) -> X509Svid:
    """
    Verify both ends of an open *connection* again, now (SEC-17), and return the peer.

    For protocols that keep connections: before each request is a good moment.

    Raises:
        UnauthenticatedError: it was not made by a context of ours, or either SVID has expired.
        SpiffeError: the peer is no longer vouched for, or no longer wanted.
    """
    proof = proof_of(connection)
    if proof.verifier.has_expired(proof.own):
        raise UnauthenticatedError("our own SVID of this connection has expired: open another")
    return proof.verifier.verify(proof.peer.chain)


@dataclass(frozen=True, slots=True)
class Proof:
    """What a handshake proved to both ends."""

    peer: X509Svid
    own: X509Svid
    """What we presented."""
    verifier: PeerVerifier
    since: float
    """Seconds, by the monotonic clock."""


def proof_of(connection: Any) -> Proof:
    """
    Return what the handshake of *connection* proved; see `peer_of`.

    Raises:
        UnauthenticatedError: it was not made by a context of ours.
    """
    if hasattr(connection, "get_extra_info"):
        connection = connection.get_extra_info("ssl_object")
    if isinstance(connection, _SpiffeObject | _SpiffeSocket) and connection.proof is not None:
        return connection.proof
    raise UnauthenticatedError("the connection is not one of a SPIFFE TLS context")


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise ContextError(
            f"{name}() is not for a SPIFFE context: certificate, key and roots come from the "
            "Workload API, and the peer is chosen by authorize="
        )

    return refuse


class SpiffeContext(ssl.SSLContext):
    """
    Made by `server_context` and `client_context`; may be used from any thread.

    Versions (from TLS 1.2), ciphers, curves and ALPN can be set.  What decides who the peer is
    cannot: such settings raise `ContextError`.
    """

    def __new__(cls, *_: object, server_side: bool, **__: object) -> Self:
        return super().__new__(
            cls, ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        )

    def __init__(
        self,
        material: X509Material,
        *,
        server_side: bool,
        authorize: Matcher,
        now: Now | None = None,
    ) -> None:
        self._hardened = False
        self._replay: dict[str, Any] = {}
        self._current: tuple[X509Identity, BundleSet, _Inner] | None = None
        self._material = material
        self._verifier = PeerVerifier(material, authorize, now)
        harden(self)
        self._floor = int(self.options), int(self.verify_flags)
        self._hardened = True

    def require_ready(self) -> None:
        """
        Do nothing if a connection can be begun now.

        Raises:
            NotNowError: there is no SVID, or no authority.
        """
        self._inner()

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """
        Return a connection with the SVID of now; see `ssl.SSLContext.wrap_bio`.

        Without an SVID or an authority its handshake raises `NotNowError`: asyncio loses the
        socket when this method does.
        """
        _no_session(session)
        try:
            inner = self._inner()
        except NotNowError as error:
            never = super().wrap_bio(incoming, outgoing, server_side, server_hostname)
            cast(_NeverObject, never).problem = error
            return never
        return inner.wrap_bio(incoming, outgoing, server_side, server_hostname)

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        """
        Return *sock* with the SVID of now; see `ssl.SSLContext.wrap_socket`.

        A listening socket asks for the SVID anew at each `accept`.

        Raises:
            NotNowError: there is no SVID, or no authority.
        """
        _no_session(session)
        return self._inner().wrap_socket(
            sock, server_side, do_handshake_on_connect, suppress_ragged_eofs, server_hostname
        )

    def set_alpn_protocols(self, alpn_protocols: Any) -> None:
        """As in `ssl.SSLContext`; for new connections."""
        super().set_alpn_protocols(alpn_protocols)
        self._remember("set_alpn_protocols", list(alpn_protocols))

    def set_ciphers(self, cipherlist: str, /) -> None:
        """As in `ssl.SSLContext`; for new connections."""
        super().set_ciphers(cipherlist)
        self._remember("set_ciphers", cipherlist)

    def set_ecdh_curve(self, name: str, /) -> None:
        """As in `ssl.SSLContext`; for new connections."""
        super().set_ecdh_curve(name)
        self._remember("set_ecdh_curve", name)

    load_cert_chain = _refused("load_cert_chain")
    load_verify_locations = _refused("load_verify_locations")
    load_default_certs = _refused("load_default_certs")
    set_default_verify_paths = _refused("set_default_verify_paths")
    set_servername_callback = _refused("set_servername_callback")
    set_npn_protocols = _refused("set_npn_protocols")
    set_psk_client_callback = _refused("set_psk_client_callback")
    set_psk_server_callback = _refused("set_psk_server_callback")
    load_dh_params = _refused("load_dh_params")

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_hardened"):
            self._check_setting(name, value)
        super().__setattr__(name, value)
        if name in _COPIED:
            super().__setattr__("_current", None)

    def _check_setting(self, name: str, value: Any) -> None:
        allowed = True
        if name in _FIXED:
            allowed = value == _FIXED[name]
        elif name in ("minimum_version", "maximum_version"):
            newest = ssl.TLSVersion.MAXIMUM_SUPPORTED
            allowed = value >= ssl.TLSVersion.TLSv1_2 or (
                value == newest and name == "maximum_version"
            )
        elif name in ("options", "verify_flags"):
            floor = self._floor[name == "verify_flags"]
            allowed = int(value) & floor == floor
        if not allowed:
            raise ContextError(f"{name}={value!r} would weaken a SPIFFE context: leave it")

    def _remember(self, method: str, value: Any) -> None:
        self._replay[method] = value
        self._current = None

    def _inner(self) -> "_Inner":
        """Return a context of what the material holds now, made once for each state of it."""
        try:
            identity = self._material.identity
        except SpiffeError as error:
            raise NotNowError(f"no SVID to present: {error}") from error
        bundles = self._material.bundles
        current = self._current
        if current is None or current[0] is not identity or current[1] is not bundles:
            made = self._make(identity, bundles)
            # One assignment: another thread sees the old one or the new one, whole.
            self._current = current = (identity, bundles, made)
        return current[2]

    def _make(self, identity: X509Identity, bundles: BundleSet) -> "_Inner":
        authorities = {
            one.der for bundle in bundles.values() for one in bundle.x509_authorities
        }
        if not authorities:
            raise NotNowError("no authority to verify a peer with")
        inner = _Inner(self.protocol)
        inner.outer, inner.own, inner.verifier = self, identity.svid, self._verifier
        harden(inner, sorted(authorities))
        for name in _COPIED:
            setattr(inner, name, getattr(self, name))
        for method, value in self._replay.items():
            getattr(inner, method)(value)
        load(inner, identity.svid.chain, identity.key)
        return inner


_FIXED: Final[dict[str, Any]] = {
    "verify_mode": ssl.CERT_REQUIRED,
    "check_hostname": False,
    "num_tickets": 0,
    "post_handshake_auth": False,
    "sni_callback": None,
    "keylog_filename": None,
}
_COPIED: Final = ("minimum_version", "maximum_version", "options", "verify_flags")


def _no_session(session: ssl.SSLSession | None) -> None:
    if session is not None:
        raise ContextError("a resumed session proves nobody (SEC-17): leave session= out")


class _Inner(ssl.SSLContext):
    """The context of the connections made while the material does not change."""

    outer: SpiffeContext
    own: X509Svid
    verifier: PeerVerifier

    def prove(self, connection: ssl.SSLObject | ssl.SSLSocket) -> Proof:
        """Say who the peer of a finished handshake is, or refuse it."""
        if connection.session_reused:
            raise PeerRefusedError("a resumed session proves nobody (SEC-17)")
        try:
            peer = self.verifier.verify(peer_chain(connection))
        except SpiffeError as error:
            raise PeerRefusedError(f"the peer's X509-SVID is refused: {error}") from error
        except Exception as error:
            # A check that breaks is a refusal; whoever handles TLS catches TLS errors alone.
            raise PeerRefusedError("the peer's X509-SVID could not be checked") from error
        return Proof(peer, self.own, self.verifier, time.monotonic())


class _SpiffeObject(ssl.SSLObject):
    """For asyncio and uvloop."""

    context: Any
    proof: Proof | None = None

    def do_handshake(self) -> None:
        """Shake hands, and prove the peer."""
        super().do_handshake()
        if self.proof is None:
            self.proof = self.context.prove(self)

    # OpenSSL shakes hands by itself when somebody reads or writes first.

    def read(self, *arguments: Any, **options: Any) -> Any:
        """Read, from a peer that is proved."""
        if self.proof is None:
            self.do_handshake()
        return super().read(*arguments, **options)

    def write(self, data: Any) -> int:
        """Write, to a peer that is proved."""
        if self.proof is None:
            self.do_handshake()
        return super().write(data)


class _SpiffeSocket(ssl.SSLSocket):
    """For threads."""

    context: Any
    proof: Proof | None = None
    do_handshake_on_connect: bool
    suppress_ragged_eofs: bool

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, and prove the peer."""
        super().do_handshake(block)
        if self.proof is None:
            self.proof = self.context.prove(self)

    def accept(self) -> tuple[ssl.SSLSocket, Any]:
        """Accept with the SVID of now, not of when the listening socket was wrapped."""
        plain, address = socket.socket.accept(self)
        try:
            accepted = self.context.outer.wrap_socket(
                plain,
                server_side=True,
                do_handshake_on_connect=self.do_handshake_on_connect,
                suppress_ragged_eofs=self.suppress_ragged_eofs,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                plain.close()
            raise
        return accepted, address

    # OpenSSL shakes hands by itself when somebody reads or writes first.

    def read(self, *arguments: Any, **options: Any) -> Any:
        """Read, from a peer that is proved."""
        if self.proof is None:
            self.do_handshake()
        return super().read(*arguments, **options)

    def write(self, data: Any) -> int:
        """Write, to a peer that is proved."""
        if self.proof is None:
            self.do_handshake()
        return super().write(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send, to a peer that is proved; plain bytes never leave."""
        if self.proof is None:
            self.do_handshake()
        return super().send(data, flags)

    def sendfile(self, *arguments: Any, **options: Any) -> int:
        """Send, to a peer that is proved."""
        if self.proof is None:
            self.do_handshake()
        return super().sendfile(*arguments, **options)


class _NeverObject(ssl.SSLObject):
    """A connection that never comes about."""

    problem: NotNowError

    def do_handshake(self) -> None:
        """Say why not."""
        raise self.problem

    def read(self, *_: Any, **__: Any) -> Any:
        """Say why not."""
        raise self.problem

    def write(self, _: Any) -> int:
        """Say why not."""
        raise self.problem


SpiffeContext.sslobject_class = _NeverObject
_Inner.sslobject_class = _SpiffeObject
_Inner.sslsocket_class = _SpiffeSocket
