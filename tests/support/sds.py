"""
SDS as an Envoy speaks it, over plain grpcio; and an SDS in the test's own loop.

`talking` opens a stream of ``StreamSecrets``; what it says is built from our messages, which a
test of their own compares with Envoy's.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_der_x509_certificate

from spiffe_core.pem import certificates_from_pem
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.interceptors import STALL, ErrorInterceptor
from spiffe_wire.pb.envoy.config.core.v3 import base_pb2
from spiffe_wire.pb.envoy.extensions.transport_sockets.tls.v3 import (
    secret_pb2,
    tls_spiffe_validator_config_pb2,
)
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2
from spiffe_wire.pb.envoy.service.secret.v3 import sds_pb2_grpc
from spiffe_wire.pb.google.rpc import status_pb2
from spiffe_wire.security_header import SecurityHeaderInterceptor
from tests.support.endpoint import Endpoint, an_endpoint
from workload_api.metrics import AgentMetrics
from workload_api.sds.request import TYPE_URL
from workload_api.sds.resources import VALIDATOR
from workload_api.sds.stream import SdsServicer

QUIET = 0.2
"""Seconds in which an answer would have come."""


def a_node(version: tuple[int, int, int] = (1, 40, 0), **metadata: Any) -> Any:
    """An Envoy of *version*, with *metadata*."""
    node = base_pb2.Node(id="node-1", cluster="cluster-1", user_agent_name="envoy")
    stated = node.user_agent_build_version.version
    stated.major_number, stated.minor_number, stated.patch = version
    if metadata:
        node.metadata.update(metadata)
    return node


NODE = a_node()


def a_request(*names: str, node: Any = NODE, refusal: str | None = None, **fields: Any) -> Any:
    """A ``DiscoveryRequest`` for *names*."""
    made = discovery_pb2.DiscoveryRequest(
        **{"type_url": TYPE_URL, "resource_names": names, "node": node, **fields}
    )
    if refusal is not None:
        made.error_detail.CopyFrom(status_pb2.Status(code=13, message=refusal))
    return made


@dataclass
class Secrets:
    """The secrets of one answer, read back as Envoy would."""

    message: Any
    by_name: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        assert self.message.type_url == TYPE_URL
        self.by_name = {}
        for resource in self.message.resources:
            assert resource.type_url == TYPE_URL
            secret = secret_pb2.Secret()
            assert resource.Unpack(secret)
            assert secret.name not in self.by_name
            self.by_name[secret.name] = secret

    @property
    def names(self) -> set[str]:
        """What they are called."""
        return set(self.by_name)

    @property
    def version(self) -> str:
        """Of the answer."""
        return str(self.message.version_info)

    def svid(self, name: str) -> X509Svid:
        """The SVID called *name*, whose key is the certificate's and PKCS#8."""
        secret = self.by_name[name].tls_certificate
        pem = secret.certificate_chain.inline_bytes.decode()
        svid = X509Svid.from_chain(certificates_from_pem(pem))
        key_pem = secret.private_key.inline_bytes
        assert key_pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
        key = serialization.load_pem_private_key(key_pem, None)
        spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        leaf = load_der_x509_certificate(svid.leaf)
        assert key.public_key().public_bytes(*spki) == leaf.public_key().public_bytes(*spki)
        return svid

    def roots(self, name: str) -> dict[str, tuple[bytes, ...]]:
        """The stores of the SPIFFE validator called *name*, by trust domain."""
        context = self.by_name[name].validation_context
        assert not context.HasField("trusted_ca")
        assert context.custom_validator_config.name == VALIDATOR
        config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig()
        assert context.custom_validator_config.typed_config.Unpack(config)
        found = {
            one.name: certificates_from_pem(one.trust_bundle.inline_bytes.decode())
            for one in config.trust_domains
        }
        assert len(found) == len(config.trust_domains)
        return found

    def plain(self, name: str) -> tuple[bytes, ...]:
        """The plain ``trusted_ca`` called *name*."""
        context = self.by_name[name].validation_context
        assert not context.HasField("custom_validator_config")
        return certificates_from_pem(context.trusted_ca.inline_bytes.decode())


@dataclass
class Talk:
    """One stream of ``StreamSecrets``; it remembers what Envoy would."""

    call: Any
    names: tuple[str, ...] = ()
    accepted: str = ""
    last: Any = None
    _reading: Any = None

    async def ask(self, *names: str, **fields: Any) -> None:
        """Ask for *names*, from the last answer on."""
        self.names = names
        nonce = self.last.nonce if self.last is not None else ""
        fields = {"version_info": self.accepted, "response_nonce": nonce, **fields}
        await self.call.write(a_request(*names, **fields))

    async def read(self, within: float = 5) -> Secrets:
        """The next answer; it must come."""
        async with asyncio.timeout(within):
            message = await self._next()
        assert message is not grpc.aio.EOF, f"the stream ended: {await self.call.code()}"
        assert message.nonce
        assert self.last is None or message.nonce != self.last.nonce
        self.last = message
        return Secrets(message)

    async def ack(self, **fields: Any) -> None:
        """Accept the last answer."""
        self.accepted = self.last.version_info
        await self.ask(*self.names, **fields)

    async def nack(self, reason: str, *names: str, **fields: Any) -> None:
        """Refuse the last answer; with *names*, ask for those from now on."""
        await self.ask(*(names or self.names), refusal=reason, **fields)

    async def get(self, *names: str, **fields: Any) -> Secrets:
        """Ask, read and accept."""
        await self.ask(*names, **fields)
        answer = await self.read()
        await self.ack()
        return answer

    async def is_quiet(self, seconds: float = QUIET) -> bool:
        """True when no answer comes for a moment; one that does is read next."""
        done, _ = await asyncio.wait([self._start()], timeout=seconds)
        return not done

    def _start(self) -> Any:
        if self._reading is None:
            # To cancel a read would end the stream: one that is under way is gone on with.
            self._reading = asyncio.ensure_future(self.call.read())
            self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._reading

    async def _next(self) -> Any:
        message = await self._start()
        self._reading = None
        return message

    async def ending(self, within: float = 5) -> tuple[grpc.StatusCode, str]:
        """How it ends, whatever it says before."""
        async with asyncio.timeout(within):
            try:
                while await self._next() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
            return await self.call.code(), str(await self.call.details())


@asynccontextmanager
async def sds_at(socket: Path, *options: tuple[str, int]) -> AsyncIterator[Any]:
    """The stub of an SDS at *socket*, over a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1), *options]
    async with grpc.aio.insecure_channel(f"unix:{socket}", own) as channel:
        yield sds_pb2_grpc.SecretDiscoveryServiceStub(channel)


def talk(stub: Any, metadata: Any = None) -> Talk:
    """An open stream."""
    return Talk(stub.StreamSecrets(metadata=metadata))


@dataclass
class Sds:
    """An SDS whose cache the test fills, and its stub over one connection."""

    endpoint: Endpoint
    servicer: SdsServicer
    socket: Path
    stub: Any

    def talk(self) -> Talk:
        """An open stream."""
        return talk(self.stub)

    def state(self) -> list[Any]:
        """What an operator is told of this process's streams."""
        return [one.message() for one in self.servicer.exchanges._open]


@asynccontextmanager
async def an_sds(*, stall: Any = STALL, **changes: Any) -> AsyncIterator[Sds]:
    """
    An SDS of example.org with no entry yet, behind a front door of its own.

    *changes* are fields of `SdsServicer`; those of *endpoint* go to `an_endpoint`.
    """
    endpoint_changes = changes.pop("endpoint", {})
    async with an_endpoint(**endpoint_changes) as endpoint:
        servicer = replace(SdsServicer(endpoint.callers, AgentMetrics()), **changes)
        async with FrontDoor(
            servicer.register,
            runtime_dir=endpoint.folder / "i",
            interceptors=[
                SecurityHeaderInterceptor(servicer.methods),
                ErrorInterceptor(stall=stall),
            ],
            max_message_bytes=servicer.max_request_bytes,
        ) as door:
            socket = endpoint.folder / "e"
            await door.listen_unix(socket, mode=0o600)
            async with sds_at(socket) as stub:
                yield Sds(endpoint, servicer, socket, stub)
                endpoint.callers.stop()
