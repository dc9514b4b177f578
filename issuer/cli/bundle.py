"""``issuer bundle``: ours, and foreign ones that were exchanged by hand."""

import argparse
import sys
from pathlib import Path
from typing import Any

from issuer.cli.calls import DONE, REFUSED, CommandError, call, explained, say
from issuer.cli.output import message
from issuer.cli.output import show as print_value
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.bundle_document import bundle_from_document, bundle_to_document
from spiffe_core.pem import certificates_from_pem, certificates_to_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc

_MODES = {"restrict": 0, "delete": 1, "dissociate": 2}


def show(arguments: argparse.Namespace) -> int:
    """Print our own bundle."""

    async def ask(channel: Any) -> Any:
        return await bundle_pb2_grpc.BundleStub(channel).GetBundle(
            bundle_pb2.GetBundleRequest()
        )

    _print(call(arguments.socket, ask), arguments)
    return DONE


def list_foreign(arguments: argparse.Namespace) -> int:
    """Print foreign bundles."""

    async def ask(channel: Any) -> list[Any]:
        stub = bundle_pb2_grpc.BundleStub(channel)
        if arguments.id:
            request = bundle_pb2.GetFederatedBundleRequest(trust_domain=arguments.id)
            return [await stub.GetFederatedBundle(request)]
        answer = await stub.ListFederatedBundles(bundle_pb2.ListFederatedBundlesRequest())
        return list(answer.bundles)

    found = call(arguments.socket, ask)
    if arguments.output != "text":
        print_value({"bundles": [message(one) for one in found]}, arguments.output)
        return DONE
    if not found:
        print("no foreign bundle: `issuer bundle set` adds one")
    for one in found:
        print(f"# {one.trust_domain}")
        _print(one, arguments)
    return DONE


def set_foreign(arguments: argparse.Namespace) -> int:
    """Add or replace a foreign bundle."""
    data = _read(arguments.path)
    with explained("--id"):
        trust_domain = TrustDomain.parse(arguments.id)
    with explained(arguments.path):
        if arguments.format == "pem":
            ders = certificates_from_pem(data.decode("ascii", "replace"))
            bundle = Bundle(trust_domain, tuple(X509Authority.parse(der) for der in ders))
        else:
            bundle = bundle_from_document(trust_domain, data)

    async def ask(channel: Any) -> Any:
        request = bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle_to_wire(bundle)])
        return await bundle_pb2_grpc.BundleStub(channel).BatchSetFederatedBundle(request)

    return _report(call(arguments.socket, ask), f"bundle of {trust_domain} set", arguments)


def delete(arguments: argparse.Namespace) -> int:
    """Remove a foreign bundle."""

    async def ask(channel: Any) -> Any:
        request = bundle_pb2.BatchDeleteFederatedBundleRequest(
            trust_domains=[arguments.id], mode=_MODES[arguments.mode]
        )
        return await bundle_pb2_grpc.BundleStub(channel).BatchDeleteFederatedBundle(request)

    return _report(call(arguments.socket, ask), f"bundle of {arguments.id} deleted", arguments)


def _print(one: Any, arguments: argparse.Namespace) -> None:
    if arguments.output != "text":
        print_value(message(one), arguments.output)
        return
    bundle = bundle_from_wire(one)
    if arguments.format == "pem":
        print(certificates_to_pem([each.der for each in bundle.x509_authorities]), end="")
    else:
        print(bundle_to_document(bundle).decode())


def _report(answer: Any, text: str, arguments: argparse.Namespace) -> int:
    (result,) = answer.results
    if result.status.code:
        say(result.status.message)
        return REFUSED
    print_value(message(answer), arguments.output, text)
    return DONE


def _read(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
