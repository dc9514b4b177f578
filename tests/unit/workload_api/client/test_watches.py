"""What the client watches, and where it connects, on the fake Workload API."""

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import InternalError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.pb import workloadapi_pb2_grpc
from tests.support.callers import eventually
from workload_api.client.client import WorkloadClient
from workload_api.client.testing import FakeWorkloadApi, _Servicer

OWN = TrustDomain("example.org")
WATCHES = ("watch_x509_bundles", "watch_jwt_bundles")


class Empty(FakeWorkloadApi):
    """Has no bundle to give, as no agent may (WAPI-29, WAPI-39)."""

    is_empty = True

    @property
    def bundles(self) -> BundleSet:
        return BundleSet() if self.is_empty else super().bundles


@pytest.fixture
def empty() -> Iterator[Empty]:
    """Such a fake."""
    with Empty() as made:
        yield made


@pytest.mark.parametrize("watch", WATCHES)
async def test_wapi_12_bundles_are_watched(watch: str) -> None:
    """WAPI-06, WAPI-12: at once and at every change, each time all there is, on one stream."""
    with FakeWorkloadApi(federated=["partner.test"]) as fake:
        async with WorkloadClient(fake.address) as client:
            async with contextlib.aclosing(getattr(client, watch)()) as watched:
                assert {name.name for name in await anext(watched)} == {
                    OWN.name,
                    "partner.test",
                }
                fake.unfederate("partner.test")
                (bundle,) = (await anext(watched)).values()
                whole = fake.bundles[OWN]
                assert bundle.x509_authorities in ((), whole.x509_authorities)
                assert bundle.jwt_authorities in ((), whole.jwt_authorities)
                assert bundle.x509_authorities or bundle.jwt_authorities
    assert sum(fake.calls.values()) == 1


@pytest.mark.parametrize("watch", WATCHES)
async def test_wapi_15_an_answer_without_a_bundle(empty: Empty, watch: str) -> None:
    """WAPI-15: it is an error; or, to who wants to hear of it and go on, a report."""
    async with WorkloadClient(empty.address) as client:
        with pytest.raises(InternalError, match="without a bundle"):
            await anext(getattr(client, watch)())
        heard: list[InternalError] = []
        async with contextlib.aclosing(getattr(client, watch)(heard.append)) as watched:
            async with asyncio.TaskGroup() as group:
                coming = group.create_task(anext(watched))
                await eventually(lambda: heard)
                assert not coming.done()
                empty.is_empty = False
                empty.federate("partner.test")
        assert OWN in coming.result() and len(heard) == 1


async def test_wep_14_not_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEP-14: a TCP endpoint is dialled itself, whatever proxy the environment names."""
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeWorkloadApi() as fake, ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        workloadapi_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(_Servicer(fake), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        async with WorkloadClient(f"tcp://127.0.0.1:{port}") as client:
            assert (await client.fetch_x509()).identities == fake.identities
        server.stop(None).wait()
