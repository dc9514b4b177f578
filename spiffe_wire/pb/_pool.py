"""
The private descriptor pool that every generated message of ours lives in.

Why: see tools/genproto.py.  Well-known types are copied in from protobuf itself.
"""

from typing import Any

from google.protobuf import any_pb2, empty_pb2, struct_pb2, wrappers_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

POOL = DescriptorPool()
for _known in (any_pb2, empty_pb2, struct_pb2, wrappers_pb2):
    POOL.AddSerializedFile(_known.DESCRIPTOR.serialized_pb)


def load(serialized: bytes) -> Any:
    """Add one serialized file descriptor and return it."""
    return POOL.AddSerializedFile(serialized)


def message(full_name: str) -> Any:
    """Return the class of a message that was loaded."""
    return GetMessageClass(POOL.FindMessageTypeByName(full_name))


def enum(full_name: str) -> Any:
    """Return the wrapper of an enum that was loaded."""
    return EnumTypeWrapper(POOL.FindEnumTypeByName(full_name))
