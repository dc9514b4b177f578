"""
What an Envoy asks for, read from its request and nothing else kept.

Source: SDS-03, SDS-06, SDS-08.  Envoy 1.40 sends 61 KB of itself with every request; of that
two facts count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from spiffe_core.errors import MalformedError
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2

TYPE_URL: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
MAX_REQUEST_BYTES: Final = 1024 * 1024  # seventeen times what Envoy 1.40 sends
MAX_NAMES: Final = 100  # Envoy asks for one on each stream
MAX_NAME_BYTES: Final = 2048  # SPIFFE-ID 2.3
MAX_NAMES_BYTES: Final = 16 * 1024  # of one stream: they are kept while it is open
MAX_REASON: Final = 500
"""Characters of what Envoy says of an answer: enough for OpenSSL's words, not for a page."""
DISABLE_KEY: Final = "disable_spiffe_cert_validation"  # SPIRE's, in a node's metadata
FIRST_WITH_VALIDATOR: Final = (1, 18)  # of Envoy
_WORDS: Final = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclass(frozen=True, slots=True)
class Node:
    """What counts of who asks."""

    is_old: bool = False
    """An Envoy without the SPIFFE validator."""
    disables_validator: bool | None = None
    """What its metadata says, if they say it."""


@dataclass(frozen=True, slots=True)
class SecretsRequest:
    """One ``DiscoveryRequest``."""

    names: tuple[str, ...]
    """Sorted, each once; empty means everything."""
    nonce: str = ""
    """Of the answer that it is about; empty in the first of a stream."""
    refusal: str | None = None
    """Why that answer was not accepted, as legible text."""
    node: Node | None = None
    """None when it says nothing of itself, as Envoy may from the second request on."""


def read_request(data: bytes) -> SecretsRequest:
    """
    Read a serialized ``DiscoveryRequest``.

    Raises:
        MalformedError: it is none, it is for other resources, or it asks for too much.
    """
    try:
        message = discovery_pb2.DiscoveryRequest.FromString(data)
    except DecodeError as error:
        raise MalformedError("the request is not a DiscoveryRequest") from error
    # The service has one type of resource, so that leaving it out says it, too.
    if message.type_url not in ("", TYPE_URL):
        raise MalformedError(f"only resources of type {TYPE_URL} are served")
    if len(message.response_nonce) > MAX_NAME_BYTES:
        raise MalformedError("response_nonce is not one of ours")
    refused = message.HasField("error_detail")
    return SecretsRequest(
        _names_of(message.resource_names),
        message.response_nonce,
        legible(message.error_detail.message) or "no reason given" if refused else None,
        _node_of(message.node) if message.HasField("node") else None,
    )


def legible(text: str) -> str:
    """Return *text* as one line of at most `MAX_REASON` characters: a peer chose it."""
    cut = text.strip()[:MAX_REASON]
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut
    )


def _names_of(given: Sequence[str]) -> tuple[str, ...]:
    if len(given) > MAX_NAMES:
        raise MalformedError(f"more than {MAX_NAMES} resource names in one request")
    sizes = [len(name.encode()) for name in given]
    if any(size > MAX_NAME_BYTES for size in sizes) or sum(sizes) > MAX_NAMES_BYTES:
        raise MalformedError(
            f"resource names are longer than {MAX_NAME_BYTES} bytes, or than "
            f"{MAX_NAMES_BYTES} together"
        )
    return tuple(sorted({name for name in given if name}))


def _node_of(node: Any) -> Node:
    fields, said = node.metadata.fields, None
    if DISABLE_KEY in fields:
        value = fields[DISABLE_KEY]
        kind = value.WhichOneof("kind")
        if kind == "bool_value":
            said = bool(value.bool_value)
        elif kind == "string_value":
            said = _WORDS.get(value.string_value.lower())
    version = node.user_agent_build_version.version
    stated = (version.major_number, version.minor_number)
    # Other programs count differently; who states no version is taken for a present one.
    is_envoy = node.user_agent_name in ("", "envoy")
    is_old = is_envoy and (0, 0) < stated < FIRST_WITH_VALIDATOR
    return Node(is_old, said)
