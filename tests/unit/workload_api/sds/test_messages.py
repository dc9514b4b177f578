"""Our messages of Envoy, beside Envoy's own as xds-protos has them."""

import importlib
from typing import Any

import pytest
from envoy.service.secret.v3 import sds_pb2 as theirs
from google.protobuf import descriptor_pool

from spiffe_wire.pb._pool import POOL
from spiffe_wire.pb.envoy.extensions.transport_sockets.tls.v3 import (
    secret_pb2,
    tls_spiffe_validator_config_pb2,
)
from spiffe_wire.pb.envoy.service.secret.v3 import sds_pb2_grpc

SECRETS = sds_pb2_grpc.SECRETDISCOVERYSERVICE_SERVICE
FILES = [
    "envoy/config/core/v3/base.proto",
    "envoy/config/core/v3/extension.proto",
    "envoy/extensions/transport_sockets/tls/v3/common.proto",
    "envoy/extensions/transport_sockets/tls/v3/secret.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls_spiffe_validator_config.proto",
    "envoy/service/discovery/v3/discovery.proto",
    "envoy/type/v3/semantic_version.proto",
]


def messages(file: str) -> list[str]:
    """The full names of our messages in *file*, nested ones too."""
    found = []
    left = list(POOL.FindFileByName(file).message_types_by_name.values())
    while left:
        one = left.pop()
        found.append(one.full_name)
        left += one.nested_types
    return sorted(found)


def shape(field: Any) -> tuple[Any, ...]:
    """What counts of a field on the wire, and its name."""
    kind = field.message_type.full_name if field.message_type else ""
    return (field.name, field.number, field.type, field.is_repeated, kind)


@pytest.mark.parametrize("name", [name for file in FILES for name in messages(file)])
def test_fields_are_envoys(name: str) -> None:
    """SDS-03: each field of ours has the name, number, type and message that Envoy's has."""
    mine = POOL.FindMessageTypeByName(name)
    importlib.import_module(mine.file.name.replace("/", ".").replace(".proto", "_pb2"))
    known = descriptor_pool.Default().FindMessageTypeByName(name).fields_by_name
    for field in mine.fields:
        assert shape(field) == shape(known[field.name])


def test_methods_are_envoys() -> None:
    """SDS-01: the service has the methods that Envoy calls, of the same messages."""
    ours = POOL.FindServiceByName(SECRETS)

    def methods(service: Any) -> list[tuple[Any, ...]]:
        return [
            (
                one.name,
                one.input_type.full_name,
                one.output_type.full_name,
                one.client_streaming,
                one.server_streaming,
            )
            for one in service.methods
        ]

    assert ours.full_name == "envoy.service.secret.v3.SecretDiscoveryService"
    assert methods(ours) == methods(theirs.DESCRIPTOR.services_by_name[ours.name])


def test_both_live_in_one_process() -> None:
    """A program may use xds-protos beside us: what one writes the other reads."""
    from envoy.extensions.transport_sockets.tls.v3 import secret_pb2 as envoys

    ours = secret_pb2.Secret(name="default")
    ours.tls_certificate.certificate_chain.inline_bytes = b"chain"
    ours.tls_certificate.private_key.inline_bytes = b"key"
    read = envoys.Secret.FromString(ours.SerializeToString())
    assert read.tls_certificate.private_key.inline_bytes == b"key"
    assert secret_pb2.Secret.FromString(read.SerializeToString()) == ours
    assert tls_spiffe_validator_config_pb2.DESCRIPTOR.pool is not descriptor_pool.Default()
