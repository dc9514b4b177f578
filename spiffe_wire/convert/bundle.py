"""Bundles <-> ``spire.api.types.Bundle`` (SPIRE API 4, 5.4)."""

from datetime import UTC, datetime, timedelta
from typing import Any

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.bundle import Bundle
from spiffe_core.bundle_document import MAX_HINT_SECONDS
from spiffe_core.der import split_certificates
from spiffe_core.errors import MalformedError
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.pb.spire.api.types import bundle_pb2


def bundle_to_wire(bundle: Bundle) -> Any:
    """Return the bundle as a message: one DER certificate an authority."""
    return bundle_pb2.Bundle(
        trust_domain=bundle.trust_domain.name,
        x509_authorities=[
            bundle_pb2.X509Certificate(asn1=one.der, tainted=one.tainted)
            for one in bundle.x509_authorities
        ],
        jwt_authorities=[
            bundle_pb2.JWTKey(
                public_key=one.public_key,
                key_id=one.key_id,
                expires_at=0 if one.expires_at is None else int(one.expires_at.timestamp()),
                tainted=one.tainted,
            )
            for one in bundle.jwt_authorities
        ],
        refresh_hint=0
        if bundle.refresh_hint is None
        else int(bundle.refresh_hint.total_seconds()),
        sequence_number=bundle.sequence_number,
    )


def bundle_from_wire(message: Any) -> Bundle:
    """
    Parse a bundle and everything in it; one bad authority refuses the whole (SPIRE API 5.4).

    Raises:
        MalformedError: names the first rule broken.
    """
    if not 0 <= message.refresh_hint <= MAX_HINT_SECONDS:
        raise MalformedError("refresh hint must be 0 to 30 days")
    authorities: dict[bytes, X509Authority] = {}
    for one in message.x509_authorities:
        for der in split_certificates(one.asn1):
            authorities[der] = X509Authority.parse(der, tainted=one.tainted)
    return Bundle(
        TrustDomain.parse(message.trust_domain),
        tuple(authorities.values()),
        tuple(
            JwtAuthority(
                one.key_id,
                one.public_key,
                _instant(one.expires_at),
                one.tainted,
            )
            for one in message.jwt_authorities
        ),
        message.sequence_number,
        timedelta(seconds=message.refresh_hint) if message.refresh_hint else None,
    )


def _instant(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC) if seconds else None
    except (OverflowError, ValueError, OSError) as error:
        raise MalformedError("an instant is out of range") from error
