"""``issuer x509 mint`` and ``issuer jwt mint``."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from issuer.cli.calls import call
from spiffe_core.entry import check_dns_name
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import DONE, CommandError, explained, message, say, show
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2, bundle_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2, svid_pb2_grpc

SLACK_SECONDS = 5
"""The server's clock, and its rounding, may differ by this much from what was asked."""


def x509_svid(arguments: argparse.Namespace) -> int:
    """Mint an X509-SVID; the key is made here, and the server never sees it."""
    with explained("--spiffe-id"):
        spiffe_id = SpiffeId.parse(arguments.spiffe_id)
    with explained("--dns"):
        names = [x509.DNSName(check_dns_name(name)) for name in arguments.dns]
    key = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier(spiffe_id.uri)
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([uri, *names]), critical=True)
        .sign(key, hashes.SHA256())
    )
    request = svid_pb2.MintX509SVIDRequest(
        csr=csr.public_bytes(serialization.Encoding.DER), ttl=arguments.ttl
    )

    async def ask(channel: Any) -> tuple[Any, Any]:
        bundle = await bundle_pb2_grpc.BundleStub(channel).GetBundle(
            bundle_pb2.GetBundleRequest()
        )
        return await svid_pb2_grpc.SVIDStub(channel).MintX509SVID(request), bundle

    answer, bundle = call(arguments.socket, ask)
    pkcs8 = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    texts = {
        "svid.pem": certificates_to_pem(answer.svid.cert_chain),
        "key.pem": private_key_to_pem(pkcs8),
        "bundle.pem": certificates_to_pem([one.asn1 for one in bundle.x509_authorities]),
    }
    _say_if_shorter(answer.svid, arguments.ttl)
    facts = {"spiffe_id": spiffe_id.uri, "expires_at": answer.svid.expires_at}
    if arguments.write:
        folder = Path(arguments.write)
        _write(folder, texts)
        written = [str(folder / name) for name in texts]
        text = f"wrote {', '.join(texts)} to {folder}"
        show({**facts, "written": written}, arguments.output, text)
        return DONE
    # SPIRE's names; on standard output, since the key is nowhere else.
    facts["x509_svid"], facts["private_key"], facts["root_cas"] = texts.values()
    show(facts, arguments.output, "\n".join(texts.values()).rstrip())
    return DONE


def jwt(arguments: argparse.Namespace) -> int:
    """Mint a JWT-SVID."""
    with explained("--spiffe-id"):
        spiffe_id = id_to_wire(SpiffeId.parse(arguments.spiffe_id))
    request = svid_pb2.MintJWTSVIDRequest(
        id=spiffe_id, audience=arguments.audience, ttl=arguments.ttl
    )

    async def ask(channel: Any) -> Any:
        return await svid_pb2_grpc.SVIDStub(channel).MintJWTSVID(request)

    answer = call(arguments.socket, ask)
    _say_if_shorter(answer.svid, arguments.ttl)
    show(message(answer), arguments.output, answer.svid.token)
    return DONE


def _say_if_shorter(svid: Any, ttl: int) -> None:
    if ttl and svid.expires_at < time.time() + ttl - SLACK_SECONDS:
        say("the SVID lives shorter than asked: the server's cap or its authority ends first")


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Each file appears whole, with its mode; a file or link in the way is replaced."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("key.pem", "svid.pem", "bundle.pem"):  # no certificate lacks its key
            new = folder / f".{name}.new"
            new.unlink(missing_ok=True)
            mode = 0o600 if name == "key.pem" else 0o644
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(new, flags, mode), "w") as file:
                file.write(texts[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, folder / name)
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error
