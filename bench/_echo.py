"""
The least a gRPC server can do, in a process of its own: it answers what it was sent.

Usage: ``python -m bench._echo unix|tls|door-unix|door-tls FOLDER``.  The first two are
grpcio alone, the others stand behind our front door.  *FOLDER* holds what `write_identities`
puts there; the line ``ready PORT`` on standard output says that it serves.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import uvloop

from bench._crypto import NOW, TD, an_x509_authority
from ca.lint import check_profile
from ca.x509 import X509Profile, prepare_x509, sign_x509
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.keys import spki_of
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_core.x509svid import verify_x509_svid
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.frontdoor.tls import client_context, server_context
from tests.support.stack import ROOT
from workload_api.keys import make_key

METHOD = "/bench.Echo/Echo"
KINDS = ("unix", "door-unix", "tls", "door-tls")


def write_identities(folder: Path) -> None:
    """Make a CA, and an X509-SVID for the server and for the client, with a DNS name."""
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    authority = an_x509_authority()
    checked = check_profile(X509Profile(), NOW)
    (folder / "ca").write_bytes(authority.authority.der)
    for name in ("server", "client"):
        key = make_key()
        prepared = prepare_x509(
            checked,
            authority,
            spiffe_id=SpiffeId(TD, f"/{name}"),
            public_key=spki_of(load_der_private_key(key, None).public_key()),
            now=NOW,
            ttl=timedelta(hours=1),
            dns_names=("localhost",),
        )
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.crt").write_bytes(sign_x509(prepared).svid.leaf)


@dataclass(frozen=True)
class _Identity:
    authority: bytes
    chain: tuple[bytes, ...]
    key: bytes

    @classmethod
    def read(cls, folder: Path, name: str) -> "_Identity":
        read = [(folder / one).read_bytes() for one in ("ca", f"{name}.crt", f"{name}.key")]
        return cls(read[0], (read[1],), read[2])

    def roots(self) -> BundleSet:
        return BundleSet.of([Bundle(TD, (X509Authority.parse(self.authority),))])

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Key, chain and roots as grpcio takes them."""
        return (
            private_key_to_pem(self.key).encode(),
            certificates_to_pem(self.chain).encode(),
            certificates_to_pem([self.authority]).encode(),
        )


class _Pushed:
    """What is sent to every held stream."""

    def __init__(self) -> None:
        self._next: asyncio.Future[bytes] | None = None

    async def next(self) -> bytes:
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._next)

    def push(self, message: bytes) -> None:
        if self._next is not None:
            self._next.set_result(message)
            self._next = None


def _register(server: Any) -> None:
    pushed = _Pushed()

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async def hold(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        while True:
            yield await pushed.next()

    async def push(request: bytes, context: Any) -> bytes:
        pushed.push(request)
        return b""

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Hold": grpc.unary_stream_rpc_method_handler(hold),
        "Push": grpc.unary_unary_rpc_method_handler(push),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Echo", handlers),)
    )


async def _serve(kind: str, folder: Path) -> None:
    own = _Identity.read(folder, "server")
    path = folder / f"{kind}.sock"
    async with contextlib.AsyncExitStack() as stack:
        port = 0
        if kind.startswith("door"):
            door = await stack.enter_async_context(
                FrontDoor(_register, runtime_dir=folder / f"{kind}.run")
            )
            if kind == "door-unix":
                await door.listen_unix(path, mode=0o600)
            else:
                context = server_context(own.chain, own.key, [own.authority])
                port = await door.listen_tls(
                    "127.0.0.1",
                    0,
                    context=lambda: context,
                    identify=lambda chain: verify_x509_svid(
                        chain, own.roots(), at=datetime.now(UTC)
                    ),
                )
        else:
            server = grpc.aio.server()
            _register(server)
            if kind == "unix":
                server.add_insecure_port(f"unix:{path}")
            else:
                key, chain, roots = own.pem()
                port = server.add_secure_port(
                    "127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)], roots, True)
                )
            await server.start()
            stack.push_async_callback(server.stop, 0)
        print("ready", port, flush=True)
        await asyncio.Event().wait()


@dataclass(frozen=True)
class EchoServer:
    """A running one."""

    kind: str
    folder: Path
    port: int
    pid: int

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        """Connect to it in the way that fits: plain, by grpcio's TLS, by our dialer."""
        alone = ("grpc.use_local_subchannel_pool", 1)
        if "unix" in self.kind:
            target = f"unix:{self.folder / self.kind}.sock"
            async with grpc.aio.insecure_channel(target, options=[alone]) as channel:
                yield channel
            return
        own = _Identity.read(self.folder, "client")
        if self.kind == "tls":
            key, chain, roots = own.pem()
            credentials = grpc.ssl_channel_credentials(roots, key, chain)
            options = [alone, ("grpc.ssl_target_name_override", "localhost")]
            target = f"127.0.0.1:{self.port}"
            async with grpc.aio.secure_channel(target, credentials, options) as channel:
                yield channel
            return
        context = client_context([own.authority], own.chain, own.key)

        def check(chain: tuple[bytes, ...]) -> None:
            verify_x509_svid(chain, own.roots(), at=datetime.now(UTC))

        async with Dialer(
            "127.0.0.1",
            self.port,
            context=lambda: context,
            check=check,
            runtime_dir=self.folder / "dialer",
        ) as dialer:
            yield dialer.channel


@contextlib.contextmanager
def echo_server(kind: str, folder: Path) -> Iterator[EchoServer]:
    """Run one of *kind* as a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._echo", kind, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        with process.stdout:
            word, _, port = process.stdout.readline().partition(" ")
            assert word == "ready", f"the echo server {kind} did not start"
            yield EchoServer(kind, folder, int(port), process.pid)
    finally:
        process.kill()
        process.wait(10)


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], Path(sys.argv[2])))
