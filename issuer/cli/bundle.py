"""``issuer bundle``: ours, and foreign ones that were exchanged by hand."""

import argparse
from typing import Any, Final

from issuer.cli.calls import answered, call
from issuer.cli.entry_file import read_input
from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.bundle_document import bundle_to_document, read_document
from spiffe_core.pem import certificates_from_pem, certificates_to_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.commandline import DONE, REFUSED, explained, message, say
from spiffe_wire.commandline import show as print_value
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc

MAX_BYTES: Final = 4 * 1024 * 1024
_MODES: Final = {"restrict": 0, "delete": 1, "dissociate": 2}


def show(arguments: argparse.Namespace) -> int:
    """Print our own bundle."""

    async def ask(channel: Any) -> Any:
        return await bundle_pb2_grpc.BundleStub(channel).GetBundle(
            bundle_pb2.GetBundleRequest()
        )

    answer = call(arguments.socket, ask)
    print_value(message(answer), arguments.output, _text(answer, arguments.format))
    return DONE


def list_foreign(arguments: argparse.Namespace) -> int:
    """Print foreign bundles."""
    wanted = _domain(arguments).name if arguments.id else ""

    async def ask(channel: Any) -> list[Any]:
        stub = bundle_pb2_grpc.BundleStub(channel)
        if wanted:
            request = bundle_pb2.GetFederatedBundleRequest(trust_domain=wanted)
            return [await stub.GetFederatedBundle(request)]
        answer = await stub.ListFederatedBundles(bundle_pb2.ListFederatedBundlesRequest())
        return list(answer.bundles)

    found = call(
        arguments.socket, ask, if_missing=": `issuer bundle list` shows which are there"
    )
    lines = [f"# {one.trust_domain}\n{_text(one, arguments.format)}" for one in found]
    print_value(
        {"bundles": [message(one) for one in found]}, arguments.output,
        "\n".join(lines) or "no foreign bundle: `issuer bundle set` adds one",
    )  # fmt: skip
    return DONE


def set_foreign(arguments: argparse.Namespace) -> int:
    """Add or replace a foreign bundle."""
    trust_domain = _domain(arguments)
    data = read_input(arguments.path, MAX_BYTES)
    with explained(arguments.path, REFUSED):
        if arguments.format == "pem":
            ders = certificates_from_pem(data.decode("ascii", "replace"))
            bundle = Bundle(trust_domain, tuple(X509Authority.parse(der) for der in ders))
        else:
            reading = read_document(trust_domain, data)
            bundle = reading.bundle
            for one in reading.skipped:
                say(f"key {one.position} of {arguments.path} is left out: {one.reason}")

    async def ask(channel: Any) -> Any:
        request = bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle_to_wire(bundle)])
        return await bundle_pb2_grpc.BundleStub(channel).BatchSetFederatedBundle(request)

    return _report(call(arguments.socket, ask), f"bundle of {trust_domain} set", arguments)


def delete(arguments: argparse.Namespace) -> int:
    """Remove a foreign bundle."""
    trust_domain = _domain(arguments)

    async def ask(channel: Any) -> Any:
        request = bundle_pb2.BatchDeleteFederatedBundleRequest(
            trust_domains=[trust_domain.name], mode=_MODES[arguments.mode]
        )
        return await bundle_pb2_grpc.BundleStub(channel).BatchDeleteFederatedBundle(request)

    return _report(call(arguments.socket, ask), f"bundle of {trust_domain} deleted", arguments)


def count(arguments: argparse.Namespace) -> int:
    """Count bundles."""

    async def ask(channel: Any) -> Any:
        request = bundle_pb2.CountBundlesRequest()
        return await bundle_pb2_grpc.BundleStub(channel).CountBundles(request)

    answer = call(arguments.socket, ask)
    print_value(message(answer), arguments.output, f"{answer.count} bundles")
    return DONE


def _domain(arguments: argparse.Namespace) -> TrustDomain:
    with explained("--id"):
        return TrustDomain.parse(arguments.id)


def _text(one: Any, form: str) -> str:
    bundle = bundle_from_wire(one)
    if form == "pem":
        return certificates_to_pem([each.der for each in bundle.x509_authorities]).rstrip()
    return bundle_to_document(bundle).decode()


def _report(answer: Any, text: str, arguments: argparse.Namespace) -> int:
    return answered(
        answer, arguments.output,
        lambda one: one.status.message if one.status.code else text,
    )  # fmt: skip
