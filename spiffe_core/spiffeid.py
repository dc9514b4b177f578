"""
SPIFFE IDs and trust domain names.

Source: SPIFFE-ID 2.1 to 2.4 (ID-01 to ID-24, SEC-01).  Parsed once, here: past
this module everybody holds a `SpiffeId`, and no one looks at the string again.
No case folding, no percent-decoding, no ``urllib``: it strips newlines and tabs
and lower-cases the scheme, which is how other parsers came to accept hostile IDs.
"""

import re
from dataclasses import dataclass
from typing import Final, Self

from spiffe_core.errors import MalformedError

SCHEME: Final = "spiffe://"
MAX_ID_BYTES: Final = 2048  # SPIFFE-ID 2.3; every byte counts, scheme included (ID-22)
MAX_TRUST_DOMAIN_BYTES: Final = 255  # RFC 3986 3.2.2, through SPIFFE-ID 2.3

# Explicit ASCII classes and fullmatch: `$` matches before a newline, `\w` and
# str.isalnum() take every script there is (T-01).
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")

RESERVED_ROOT: Final = "spire"
"""First path segment of servers and agents; no workload may live below it (SEC-04)."""
SERVER_PATH: Final = f"/{RESERVED_ROOT}/server"


class SpiffeIdError(MalformedError):
    """A string is not a SPIFFE ID.  Never quotes it: the peer chose it."""


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """A trust domain name, such as ``example.org``; compared byte for byte (ID-12)."""

    name: str

    def __post_init__(self) -> None:
        # SPIFFE-ID 2.1 wants lower case, 2.4 calls the name case-insensitive.
        # Folding would let two spellings reach one policy, so we refuse (ADR 4).
        if not self.name:
            raise SpiffeIdError("trust domain is missing")
        if _TRUST_DOMAIN.fullmatch(self.name) is None:
            raise SpiffeIdError("trust domain must be one or more of a-z 0-9 . - _")
        if len(self.name) > MAX_TRUST_DOMAIN_BYTES:
            raise SpiffeIdError("trust domain is longer than 255 bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Parse a bare name or the trust domain's own ID, ``spiffe://name``.

        Raises:
            SpiffeIdError: names the first rule broken.
        """
        return cls(text.removeprefix(SCHEME))

    @property
    def id(self) -> "SpiffeId":
        """The trust domain's own SPIFFE ID: no path, no slash (C-09)."""
        return SpiffeId(self)

    @property
    def server_id(self) -> "SpiffeId":
        """The SPIFFE ID of this trust domain's issuer."""
        return SpiffeId(self, SERVER_PATH)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A SPIFFE ID; *path* is empty for the trust domain's own ID, else starts with ``/``."""

    trust_domain: TrustDomain
    path: str = ""

    def __post_init__(self) -> None:
        if self.path:
            _check_path(self.path)
        if len(SCHEME) + len(self.trust_domain.name) + len(self.path) > MAX_ID_BYTES:
            raise SpiffeIdError("SPIFFE ID is longer than 2048 bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Parse ``spiffe://trust-domain/path``.

        Raises:
            SpiffeIdError: names the first rule broken.
        """
        if not text.startswith(SCHEME):
            raise SpiffeIdError("scheme must be spiffe://")
        if len(text) > MAX_ID_BYTES:
            raise SpiffeIdError("SPIFFE ID is longer than 2048 bytes")
        name, slash, rest = text.removeprefix(SCHEME).partition("/")
        return cls(TrustDomain(name), slash + rest)

    @property
    def uri(self) -> str:
        """The ID as text, ``spiffe://…``."""
        return f"{SCHEME}{self.trust_domain.name}{self.path}"

    @property
    def is_reserved(self) -> bool:
        """True for ``/spire`` and everything below it (SEC-04)."""
        return self.path == f"/{RESERVED_ROOT}" or self.path.startswith(f"/{RESERVED_ROOT}/")

    def require_member(self, trust_domain: TrustDomain) -> Self:
        """
        Return this ID if it is a member of *trust_domain*: in it, with a path.

        Raises:
            SpiffeIdError: it is not.
        """
        if self.trust_domain != trust_domain:
            raise SpiffeIdError(f'"{self}" is not a member of trust domain "{trust_domain}"')
        if not self.path:
            raise SpiffeIdError(
                f'"{self}" is not a member of trust domain "{trust_domain}"; path is empty'
            )
        return self

    def require_workload(self, trust_domain: TrustDomain) -> Self:
        """
        Return this ID if a workload of *trust_domain* may carry it (SEC-04).

        Raises:
            SpiffeIdError: foreign, without a path, or in the reserved namespace.
        """
        if self.trust_domain != trust_domain:
            raise SpiffeIdError(f'"{self}" is not a workload in trust domain "{trust_domain}"')
        if not self.path:
            raise SpiffeIdError(
                f'"{self}" is not a workload in trust domain "{trust_domain}"; path is empty'
            )
        if self.is_reserved:
            raise SpiffeIdError(
                f'"{self}" is not a workload in trust domain "{trust_domain}"; '
                "path is in the reserved namespace"
            )
        return self

    def __str__(self) -> str:
        return self.uri


def path_of(*segments: str) -> str:
    """
    Build a path from *segments*, each of which contributes exactly one (SEC-02).

    Raises:
        SpiffeIdError: a segment is empty, a dot segment, or holds a foreign character.
    """
    if not segments:
        raise SpiffeIdError("a path needs at least one segment")
    for segment in segments:
        _check_segment(segment)
    return "/" + "/".join(segments)


def _check_path(path: str) -> None:
    if not path.startswith("/"):
        raise SpiffeIdError("path must start with a slash")
    if path.endswith("/"):
        raise SpiffeIdError("path must not end with a slash")
    for segment in path[1:].split("/"):
        _check_segment(segment)


def _check_segment(segment: str) -> None:
    if not segment:
        raise SpiffeIdError("path must not contain an empty segment")
    if segment in (".", ".."):
        raise SpiffeIdError("path must not contain a dot segment")
    if _SEGMENT.fullmatch(segment) is None:
        raise SpiffeIdError("path segments must be one or more of a-z A-Z 0-9 . - _")
