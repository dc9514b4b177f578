"""
Attested agents, and the names agents and servers have.

Source: SPIRE API 2.3, 3.7, 5.2; SEC-52 (a ban is a fact of its own).
"""

import hashlib
from dataclasses import dataclass, field
from datetime import datetime

from spiffe_core.selector import SelectorSet
from spiffe_core.spiffeid import SpiffeId, SpiffeIdError, TrustDomain, path_of

AGENT_PREFIX = "/spire/agent/"


@dataclass(frozen=True, slots=True)
class AttestedAgent:
    """
    One agent that proved its node.

    Serials are decimal text, as on the wire; *new_serial* is set between a renewal and
    the first use of what it yielded, and both are good meanwhile (SEC-54).
    """

    id: SpiffeId
    attestation_type: str
    serial: str
    expires_at: datetime
    selectors: SelectorSet = frozenset()
    new_serial: str = ""
    new_expires_at: datetime | None = None
    banned: bool = False
    can_reattest: bool = False
    agent_version: str = ""
    key_hash: bytes = field(default=b"", repr=False)
    new_key_hash: bytes = field(default=b"", repr=False)
    """Of the public keys of *serial* and *new_serial*: nobody else gets an SVID on one of
    them (SEC-20)."""

    def is_live(self, at: datetime) -> bool:
        """True while one of its certificates can be good, or a ban keeps it from returning."""
        return self.banned or at <= max(self.expires_at, self.new_expires_at or self.expires_at)


def key_hash_of(public_key: bytes) -> bytes:
    """Return what an agent's SubjectPublicKeyInfo is known by."""
    return hashlib.sha256(public_key).digest()


def agent_id(trust_domain: TrustDomain, attestor: str, *segments: str) -> SpiffeId:
    """
    Return the SPIFFE ID of an agent attested by *attestor* (SEC-02, SEC-04).

    Raises:
        SpiffeIdError: a segment is not one plain path segment.
    """
    return SpiffeId(trust_domain, path_of("spire", "agent", attestor, *segments))


def require_agent_id(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> SpiffeId:
    """
    Return *spiffe_id* if it can be an agent of *trust_domain*.

    Raises:
        SpiffeIdError: it cannot.
    """
    if spiffe_id.trust_domain != trust_domain:
        raise SpiffeIdError(f'"{spiffe_id}" is not an agent in trust domain "{trust_domain}"')
    if not spiffe_id.path.startswith(AGENT_PREFIX):
        raise SpiffeIdError(
            f'"{spiffe_id}" is not an agent in trust domain "{trust_domain}"; '
            "path is not in the agent namespace"
        )
    return spiffe_id
