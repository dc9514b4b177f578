"""
Ours, py-spiffe and xds-protos in one process, imported in the order of the arguments, and used.

Run as a program, with SPIFFE_ENDPOINT_SOCKET and SDS_SOCKET; prints what each of them saw.
"""

import asyncio
import importlib
import json
import os
import sys

ROOTS = {
    "ours": (
        "workload_api.client.x509source",
        "spiffe_wire.pb.envoy.service.secret.v3.sds_pb2",
    ),
    "py-spiffe": ("spiffe",),
    "xds-protos": ("envoy.service.secret.v3.sds_pb2_grpc",),
}
SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def by_py_spiffe():
    """What py-spiffe says of us, by a source of its own and a token."""
    from spiffe import JwtSource, X509Source

    with X509Source() as x509, JwtSource() as jwt:
        context, svid = x509.get_x509_context(), jwt.fetch_svid(audience={"db"})
        return {
            "serial": str(context.default_svid.leaf.serial_number),
            "bundles": sorted(str(one.trust_domain) for one in context.x509_bundle_set.bundles),
            "jwt": str(svid.spiffe_id),
        }


def by_xds_protos():
    """The certificate that Envoy would be given, through Envoy's own messages and stub."""
    import grpc
    from cryptography import x509
    from envoy.config.core.v3.base_pb2 import Node
    from envoy.extensions.transport_sockets.tls.v3 import secret_pb2 as theirs
    from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest
    from envoy.service.secret.v3 import sds_pb2_grpc

    request = DiscoveryRequest(node=Node(id="n"), type_url=SECRET, resource_names=["default"])
    with grpc.insecure_channel(f"unix:{os.environ['SDS_SOCKET']}") as channel:
        stub = sds_pb2_grpc.SecretDiscoveryServiceStub(channel)
        (resource,) = stub.FetchSecrets(request, timeout=10).resources
    secret = theirs.Secret()
    assert resource.Unpack(secret)

    from spiffe_wire.pb.envoy.extensions.transport_sockets.tls.v3 import secret_pb2 as ours

    chain = secret.tls_certificate.certificate_chain.inline_bytes
    again = ours.Secret.FromString(secret.SerializeToString())
    assert again.tls_certificate.certificate_chain.inline_bytes == chain
    return {"serial": str(x509.load_pem_x509_certificates(chain)[0].serial_number)}


async def main():
    """All of them at once, while a source of ours is open."""
    from workload_api.client.jwtsource import JwtSource
    from workload_api.client.x509source import X509Source

    async with X509Source() as source, JwtSource() as tokens:
        theirs = await asyncio.gather(
            asyncio.to_thread(by_py_spiffe), asyncio.to_thread(by_xds_protos)
        )
        ours = {
            "serial": source.identity.svid.serial,
            "bundles": sorted(name.name for name in source.bundles),
            "jwt": str((await tokens.fetch("db")).spiffe_id),
        }
    print(json.dumps({"ours": ours, "py-spiffe": theirs[0], "xds-protos": theirs[1]}))


if __name__ == "__main__":
    for root in sys.argv[1:]:
        for module in ROOTS[root]:
            importlib.import_module(module)
    asyncio.run(main())
