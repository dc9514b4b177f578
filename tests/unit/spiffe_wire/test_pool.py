"""Our messages live in a pool of their own, beside anybody else's copy (T-29, WAPI-04)."""

import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool

from spiffe_wire.pb import workloadapi_pb2, workloadapi_pb2_grpc
from spiffe_wire.pb._pool import POOL
from spiffe_wire.pb.grpc.health.v1 import health_pb2
from spiffe_wire.pb.spire.api.types import entry_pb2
from tests.support.stack import ROOT

OURS = "from spiffe_wire.pb import workloadapi_pb2 as ours, workloadapi_pb2_grpc"
THEIRS = "import spiffe; from spiffe.workloadapi import workload_api_client"
USE = """
request = ours.JWTSVIDRequest(audience=["a"])
assert ours.JWTSVIDRequest.FromString(request.SerializeToString()) == request
from spiffe._proto import workload_pb2 as theirs
their_request = theirs.JWTSVIDRequest.FromString(request.SerializeToString())
assert list(their_request.audience) == ["a"]
assert type(their_request) is not type(request)
assert theirs.DESCRIPTOR.pool is not ours.DESCRIPTOR.pool
print("both")
"""


@pytest.mark.parametrize(
    "order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours first", "theirs"]
)
def test_t_29_beside_another_copy(order: tuple[str, str]) -> None:
    """WAPI-04, T-29: our stubs and py-spiffe's share a process, whichever is imported first."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join((*order, USE))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=50,
    )
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


@pytest.mark.parametrize(
    "name",
    ["X509SVIDRequest", "SpiffeWorkloadAPI", "spire.api.types.Entry", "grpc.health.v1.Health"],
)
def test_t_29_nothing_of_ours_is_global(name: str) -> None:
    """T-29: the names are in our pool, and in protobuf's own only if somebody else put them."""
    assert POOL is not descriptor_pool.Default()
    symbol = POOL.FindFileContainingSymbol(name)
    assert symbol.pool is POOL


def test_wapi_04_names_are_the_standards() -> None:
    """WAPI-04: no package before the service, and the methods and fields that clients know."""
    service = workloadapi_pb2.DESCRIPTOR.services_by_name["SpiffeWorkloadAPI"]
    assert service.full_name == "SpiffeWorkloadAPI"
    assert workloadapi_pb2_grpc.SPIFFEWORKLOADAPI_SERVICE == "SpiffeWorkloadAPI"
    assert {one.name for one in service.methods} >= {
        "FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles",
        "ValidateJWTSVID",
    }  # fmt: skip
    fields = workloadapi_pb2.X509SVID.DESCRIPTOR.fields_by_name
    assert {name: fields[name].number for name in fields} == {
        "spiffe_id": 1, "x509_svid": 2, "x509_svid_key": 3, "bundle": 4, "hint": 5,
    }  # fmt: skip
    assert health_pb2.DESCRIPTOR.package == "grpc.health.v1"
    assert entry_pb2.DESCRIPTOR.package == "spire.api.types"
