"""
The program that every workload of the demo runs: an ordinary one, with py-spiffe.

It knows nothing of the demo.  It holds a FetchX509SVID stream, and does what it reads from
standard input, one JSON object a line; what it saw it prints, one JSON object a line, with
the instant on the machine's monotonic clock (seconds).
"""

import json
import logging
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from spiffe import WorkloadApiClient
from spiffe.workloadapi.x509_context import X509Context

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.matching import exactly
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import verify_x509_svid

_PEM = Encoding.PEM
_DER = Encoding.DER
_PEM_KEY = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

_out = threading.Lock()


def say(event: str, **facts: object) -> None:
    """Print one line for whoever started us."""
    with _out:
        print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


class Workload:
    """One client of the Workload API, and what it last received."""

    def __init__(self) -> None:
        self.client = WorkloadApiClient()  # finds SPIFFE_ENDPOINT_SOCKET by itself
        self.context: X509Context | None = None

    def watch(self) -> None:
        """Open the stream; py-spiffe retries by itself when it is refused."""
        self.client.stream_x509_contexts(
            self.on_update, lambda error: say("watch_failed", error=str(error))
        )

    def on_update(self, context: X509Context) -> None:
        """Every message is the full state."""
        now = time.monotonic()
        self.context = context
        say(
            "svids",
            received_at=now,
            svids={
                str(svid.spiffe_id): f"{svid.leaf.serial_number:x}"
                for svid in context.x509_svids
            },
        )

    def fetch(self) -> None:
        """Ask once."""
        try:
            context = self.client.fetch_x509_context()
        except Exception as error:  # noqa: BLE001 whatever py-spiffe raises is the answer
            cause = error.__cause__ or error
            details = cause.details() if hasattr(cause, "details") else str(error)
            code = cause.code() if hasattr(cause, "code") else None
            say("refused", code=getattr(code, "name", None), text=details)
            return
        self.on_update(context)

    def jwt(self, audience: str) -> None:
        """Fetch a JWT-SVID and have the Workload API validate it, as its receiver would."""
        svid = self.client.fetch_jwt_svid(audience={audience})
        seen = self.client.validate_jwt_svid(svid.token, audience)
        say("jwt", subject=str(seen.spiffe_id), audience=sorted(seen.audience), validated=True)

    def serve(self, expect: str) -> None:
        """Accept one TLS connection, and answer if the peer is *expect*."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            say("listening", port=listener.getsockname()[1])
            accepted, _ = listener.accept()
            accepted.settimeout(10)
            with self.tls(ssl.PROTOCOL_TLS_SERVER).wrap_socket(
                accepted, server_side=True
            ) as peer:
                spiffe_id = self.peer_of(peer, expect)
                peer.sendall(f"hello {spiffe_id}, I am {self.own_id()}\n".encode())
                peer.recv(1)  # until the other side has read it
                say("mtls", peer=spiffe_id)

    def connect(self, port: int, expect: str) -> None:
        """Connect, and read the answer if the peer is *expect*."""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            with self.tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as peer:
                spiffe_id = self.peer_of(peer, expect)
                answer = peer.recv(4096).decode().strip()
                peer.sendall(b".")
                say("mtls", peer=spiffe_id, answer=answer)

    def own_id(self) -> str:
        """The default identity: the first one (WAPI-56)."""
        return str(self._state().default_svid.spiffe_id)

    def tls(self, protocol: int) -> ssl.SSLContext:
        """A context with our SVID; the roots are those of our own trust domain alone."""
        svid = self._state().default_svid
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the SPIFFE ID is the name, checked in `peer_of`
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=b"".join(self._roots()))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # load_cert_chain() wants a path; a memory file keeps the key off the disk.
        memory = os.memfd_create("svid")
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(svid.private_key.private_bytes(*_PEM_KEY))
                for certificate in svid.cert_chain:
                    file.write(certificate.public_bytes(_PEM))
            context.load_cert_chain(f"/proc/self/fd/{memory}")
        finally:
            os.close(memory)
        return context

    def peer_of(self, connection: ssl.SSLSocket, expect: str) -> str:
        """Verify the peer's SVID against its own trust domain, then compare its ID."""
        der = connection.getpeercert(binary_form=True)
        if der is None:
            raise ssl.SSLError("the peer sent no certificate")
        trust_domain = SpiffeId.parse(expect).trust_domain
        authorities = tuple(X509Authority.parse(root) for root in self._roots())
        bundles = BundleSet.of([Bundle(trust_domain, authorities)])
        svid = verify_x509_svid((der,), bundles, at=datetime.now(UTC))
        exactly(SpiffeId.parse(expect))(svid.spiffe_id)
        return str(svid.spiffe_id)

    def _state(self) -> X509Context:
        if self.context is None:
            raise RuntimeError("no SVID yet")
        return self.context

    def _roots(self) -> list[bytes]:
        state = self._state()
        bundle = state.x509_bundle_set.get_bundle_for_trust_domain(
            state.default_svid.spiffe_id.trust_domain
        )
        return [root.public_bytes(_DER) for root in bundle.x509_authorities] if bundle else []


def main() -> int:
    """Obey standard input until it ends."""
    logging.disable(logging.CRITICAL)  # py-spiffe reports its retries; our lines are JSON
    workload = Workload()
    orders: Mapping[str, Callable[..., None]] = {
        "watch": workload.watch,
        "fetch": workload.fetch,
        "jwt": workload.jwt,
        "serve": workload.serve,
        "connect": workload.connect,
    }
    say("started", pid=os.getpid(), uid=os.getuid())
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        try:
            orders[order.pop("do")](**order)
        except Exception as error:  # noqa: BLE001 the demo shows whatever went wrong
            say("failed", error=f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
