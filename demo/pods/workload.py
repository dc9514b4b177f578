"""
The program in every container of the demo: an ordinary workload, with our own client.

It holds a FetchX509SVID stream, and does what it reads from standard input, one JSON object a
line; what it saw it prints, one JSON object a line, with the instant on the machine's
monotonic clock (seconds).
"""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from spiffe_core.errors import SpiffeError
from spiffe_core.matching import exactly
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import verify_x509_svid
from spiffe_wire.frontdoor.tls import load
from workload_api.client.client import WorkloadClient, X509Context

PORT = 8443
RETRY = 0.05
"""Seconds until a workload that was refused asks again; a real one takes longer turns."""

_out = threading.Lock()


def say(event: str, **facts: object) -> None:
    """Print one line for whoever started us."""
    with _out:
        print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


class Workload:
    """One client of the Workload API, and what it last received."""

    def __init__(self, client: WorkloadClient) -> None:
        self.client = client
        self.context: X509Context | None = None
        self.asked_at = 0.0

    async def watch(self) -> None:
        """Follow our identities; whenever the agent refuses us, say so once and ask again."""
        last = ""
        while True:
            self.asked_at = time.monotonic()
            try:
                async for context in self.client.watch_x509():
                    self.receive(context)
                    last = ""
            except SpiffeError as error:
                self.context = None
                if str(error) != last:
                    last = str(error)
                    say("denied", kind=error.kind.name, text=last, received_at=time.monotonic())
            await asyncio.sleep(RETRY)

    async def fetch(self) -> None:
        """Ask once; it changes nothing that `watch` received."""
        try:
            say("fetched", svids=_svids(await self.client.fetch_x509()))
        except SpiffeError as error:
            say("fetched", svids={}, kind=error.kind.name, text=str(error))

    def receive(self, context: X509Context) -> None:
        """Every message is the full state."""
        self.context = context
        now = time.monotonic()
        say("svids", asked_at=self.asked_at, received_at=now, svids=_svids(context))

    def serve(self, expect: str) -> None:
        """Accept one TLS connection, and answer if the peer is *expect*."""
        with socket.create_server(("", PORT)) as listener:
            say("listening", port=PORT)
            accepted, _ = listener.accept()
            accepted.settimeout(10)
            with self.tls(ssl.PROTOCOL_TLS_SERVER).wrap_socket(
                accepted, server_side=True
            ) as peer:
                spiffe_id = self.peer_of(peer, expect)
                peer.sendall(f"hello {spiffe_id}, I am {self.own_id()}\n".encode())
                peer.recv(1)  # until the other side has read it
                say("mtls", peer=spiffe_id)

    def connect(self, address: str, expect: str) -> None:
        """Connect, and read the answer if the peer is *expect*."""
        began = time.monotonic()
        with socket.create_connection((address, PORT), timeout=10) as plain:
            with self.tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as peer:
                spiffe_id = self.peer_of(peer, expect)
                answer = peer.recv(4096).decode().strip()
                took = time.monotonic() - began
                peer.sendall(b".")
                say("mtls", peer=spiffe_id, answer=answer, seconds=took)

    def own_id(self) -> str:
        """The default identity: the first one (WAPI-56)."""
        return str(self._state().identities[0].svid.spiffe_id)

    def tls(self, protocol: int) -> ssl.SSLContext:
        """A context with our SVID; the roots are those of our own trust domain alone."""
        state = self._state()
        identity = state.identities[0]
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the SPIFFE ID is the name, checked in `peer_of`
        context.verify_mode = ssl.CERT_REQUIRED
        bundle = state.bundles[identity.svid.spiffe_id.trust_domain]
        context.load_verify_locations(cadata=bundle.x509_der())
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        load(context, identity.svid.chain, identity.key)
        return context

    def peer_of(self, connection: ssl.SSLSocket, expect: str) -> str:
        """Verify the peer's SVID against its own trust domain, then compare its ID."""
        der = connection.getpeercert(binary_form=True)
        if der is None:
            raise ssl.SSLError("the peer sent no certificate")
        svid = verify_x509_svid((der,), self._state().bundles, at=datetime.now(UTC))
        exactly(SpiffeId.parse(expect))(svid.spiffe_id)
        return str(svid.spiffe_id)

    def _state(self) -> X509Context:
        if self.context is None:
            raise RuntimeError("no SVID yet")
        return self.context


def _svids(context: X509Context) -> dict[str, str]:
    return {str(one.svid.spiffe_id): one.svid.serial for one in context.identities}


async def obey(workload: Workload) -> None:
    """Do what standard input says, until it ends."""
    blocking: Mapping[str, Callable[..., None]] = {
        "serve": workload.serve,
        "connect": workload.connect,
    }
    watching = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        order: dict[str, Any] = json.loads(line)
        what = order.pop("do")
        try:
            if what == "watch":
                watching = asyncio.create_task(workload.watch())
            elif what == "fetch":
                await workload.fetch()
            else:
                await asyncio.to_thread(blocking[what], **order)
        except Exception as error:  # noqa: BLE001 the demo shows whatever went wrong
            say("failed", error=f"{type(error).__name__}: {error}")
    if watching is not None:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def main() -> None:
    """Say that we run, and obey."""
    async with WorkloadClient() as client:  # finds SPIFFE_ENDPOINT_SOCKET by itself
        say("started", pid=os.getpid(), uid=os.getuid())
        await obey(Workload(client))


if __name__ == "__main__":
    asyncio.run(main())
