"""
Trust bundles: the authorities of one trust domain, never apart from its name.

Source: BUNDLE-01 to BUNDLE-04, SEC-11 (never a merged pool), SPIRE API 5.4.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Final, Self

from spiffe_core.authority import JwtAuthority, X509Authority
from spiffe_core.errors import MalformedError
from spiffe_core.spiffeid import TrustDomain

MAX_AUTHORITIES: Final = 100  # security requirements, table 1
DEFAULT_REFRESH_HINT: Final = timedelta(seconds=300)  # BUNDLE-28


class BundleError(MalformedError):
    """A bundle or bundle document breaks a rule; nothing was replaced."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The authorities of *trust_domain*.  Empty means: trust nothing of it (BUNDLE-16)."""

    trust_domain: TrustDomain
    x509_authorities: tuple[X509Authority, ...] = ()
    jwt_authorities: tuple[JwtAuthority, ...] = ()
    sequence_number: int = 0
    refresh_hint: timedelta | None = None

    def __post_init__(self) -> None:
        if len(self.x509_authorities) + len(self.jwt_authorities) > MAX_AUTHORITIES:
            raise BundleError(f"more than {MAX_AUTHORITIES} authorities")
        kids = [authority.key_id for authority in self.jwt_authorities]
        if len(set(kids)) != len(kids):
            raise BundleError("two JWT authorities share a key ID")
        if not 0 <= self.sequence_number < 2**64:
            raise BundleError("sequence number does not fit 64 bits")

    def jwt_authority(self, key_id: str) -> JwtAuthority | None:
        """Return the JWT authority with exactly this ``kid``, or None."""
        for authority in self.jwt_authorities:
            if authority.key_id == key_id:
                return authority
        return None

    def x509_der(self) -> bytes:
        """All CA certificates back to back, as the Workload API carries them (WAPI-19)."""
        return b"".join(authority.der for authority in self.x509_authorities)

    def same_content(self, other: Self) -> bool:
        """True when only the sequence number differs (BUNDLE-08)."""
        return replace(other, sequence_number=self.sequence_number) == self


@dataclass(frozen=True, slots=True)
class BundleSet(Mapping[TrustDomain, Bundle]):
    """Bundles by trust domain; what every verification takes (JWT-32, T-08)."""

    _by_domain: Mapping[TrustDomain, Bundle] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bundle in self._by_domain.items():
            if bundle.trust_domain != name:
                raise BundleError("a bundle stands under another trust domain's name")

    @classmethod
    def of(cls, bundles: Iterable[Bundle]) -> Self:
        """Build a set from *bundles*; the last one of a trust domain wins."""
        return cls({bundle.trust_domain: bundle for bundle in bundles})

    def __getitem__(self, trust_domain: TrustDomain) -> Bundle:
        return self._by_domain[trust_domain]

    def __iter__(self) -> Iterator[TrustDomain]:
        return iter(self._by_domain)

    def __len__(self) -> int:
        return len(self._by_domain)
