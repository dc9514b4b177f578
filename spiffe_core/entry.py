"""
Registration entries: which process, on which node, gets which SPIFFE ID.

Source: SPIRE API 4 and 5.1 (entry rules), SEC-03, SEC-04, SEC-25, WAPI-57.
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Self

from spiffe_core.errors import MalformedError
from spiffe_core.selector import SelectorSet, selector_set
from spiffe_core.spiffeid import SERVER_PATH, SpiffeId, TrustDomain
from spiffe_core.text import utf8_bytes

MAX_ENTRY_ID_BYTES: Final = 255  # SPIRE API 5.1
MAX_HINT_BYTES: Final = 1024  # WAPI-57, UTF-8 bytes
MAX_DNS_NAMES: Final = 64  # security requirements, table 1
MAX_TTL_SECONDS: Final = 2**31 - 1  # the wire's int32

_ENTRY_ID = re.compile(r"[-.0-9A-Z_a-z]+")
_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

ZERO: Final = timedelta(0)


class EntryError(MalformedError):
    """An entry breaks a rule; nothing was stored."""


@dataclass(frozen=True, slots=True)
class RegistrationEntry:
    """
    One registration entry.

    A *ttl* of zero means the server's default.  *id* is empty only on an entry that
    has not been stored yet; *revision_number* and *created_at* are the store's.
    """

    spiffe_id: SpiffeId
    parent_id: SpiffeId
    selectors: SelectorSet
    id: str = ""
    x509_svid_ttl: timedelta = ZERO
    jwt_svid_ttl: timedelta = ZERO
    federates_with: frozenset[TrustDomain] = frozenset()
    admin: bool = False
    downstream: bool = False
    expires_at: datetime | None = None
    dns_names: tuple[str, ...] = ()
    hint: str = ""
    store_svid: bool = False
    disable_x509_svid_prefetch: bool = False
    jwt_svid_include_jti: bool = False
    revision_number: int = 0
    created_at: datetime | None = field(default=None)

    def __post_init__(self) -> None:
        if self.id:
            check_entry_id(self.id)
        selector_set(self.selectors)
        _check_ttl("X.509-SVID", self.x509_svid_ttl)
        _check_ttl("JWT-SVID", self.jwt_svid_ttl)
        hint_bytes = utf8_bytes(self.hint)
        if hint_bytes is None:
            raise EntryError("hint is not UTF-8 text")
        if hint_bytes > MAX_HINT_BYTES:
            raise EntryError("hint is too long, max length is 1024 characters")
        if len(self.dns_names) > MAX_DNS_NAMES:
            raise EntryError(f"more than {MAX_DNS_NAMES} DNS names")
        for name in self.dns_names:
            check_dns_name(name)
        for instant in (self.expires_at, self.created_at):
            if instant is not None and instant.tzinfo is None:
                raise EntryError("an entry's instants need a time zone")
        self._check_store_svid()

    def _check_store_svid(self) -> None:
        if not self.store_svid:
            return
        if len({selector.type for selector in self.selectors}) > 1:
            raise EntryError("selector types must be the same when store SVID is enabled")
        if self.disable_x509_svid_prefetch:
            raise EntryError("specifying cache behaviour is incompatible with storable SVIDs")

    def check_names(self, trust_domain: TrustDomain) -> Self:
        """
        Return this entry if its names belong to *trust_domain* (SEC-04, ID-34, ID-14).

        Raises:
            EntryError: says which name and why.
        """
        try:
            self.parent_id.require_member(trust_domain)
        except MalformedError as error:
            raise EntryError(f"invalid parent ID: {error}") from error
        try:
            self.spiffe_id.require_workload(trust_domain)
        except MalformedError as error:
            raise EntryError(f"invalid spiffe ID: {error}") from error
        if trust_domain in self.federates_with:
            raise EntryError(
                "invalid federated trust domain: an entry can't federate with its own"
            )
        return self

    @property
    def is_node_alias(self) -> bool:
        """True when this entry names a group of nodes by their selectors (SPIRE API 5.1)."""
        return self.parent_id.path == SERVER_PATH

    @property
    def fingerprint(self) -> bytes:
        """16 bytes over (SPIFFE ID, parent, selectors): equal for similar entries."""
        text = json.dumps(
            [
                self.spiffe_id.uri,
                self.parent_id.uri,
                [[one.type, one.value] for one in sorted(self.selectors)],
            ],
            separators=(",", ":"),
        )
        return hashlib.sha256(text.encode()).digest()[:16]

    def is_expired(self, at: datetime) -> bool:
        """True once *expires_at* has come; an expired entry authorizes nobody."""
        return self.expires_at is not None and self.expires_at <= at


def check_entry_id(text: str) -> str:
    """
    Return *text* if it may be an entry's ID.

    Raises:
        EntryError: empty, too long, or with foreign characters.
    """
    if not text:
        raise EntryError("missing entry ID")
    if len(text) > MAX_ENTRY_ID_BYTES:
        raise EntryError("entry ID too long")
    if _ENTRY_ID.fullmatch(text) is None:
        raise EntryError("entry ID contains invalid characters")
    return text


def check_dns_name(name: str) -> str:
    """
    Return *name* if a certificate of ours may carry it (SEC-25).

    Raises:
        EntryError: not lower-case ASCII labels as IDNA has them, or a wildcard that is not
            the whole first label.
    """
    labels = name.split(".")
    if labels[0] == "*" and len(labels) > 1:
        labels = labels[1:]
    if len(name) > 253 or not all(map(_is_dns_label, labels)):
        raise EntryError("invalid DNS name: labels must be 1 to 63 of a-z 0-9 -")
    return name


def _is_dns_label(label: str) -> bool:
    if _DNS_LABEL.fullmatch(label) is None:
        return False
    if label[2:4] != "--":
        return True
    # RFC 5891 4.2.3.1: two hyphens there announce an encoding, and the one known is Punycode.
    if not label.startswith("xn--"):
        return False
    try:
        text = label[4:].encode().decode("punycode")
    except UnicodeError:
        return False
    canonical = text.encode("punycode").decode() == label[4:] and text == text.lower()
    return canonical and all(map(_is_idna, text))


def _is_idna(character: str) -> bool:
    # Letters, marks and numbers, as IDNA 2008 has it, near enough: nothing unseen or spacing.
    return character == "-" or unicodedata.category(character)[0] in "LMN"


def _check_ttl(what: str, ttl: timedelta) -> None:
    if ttl < ZERO:
        raise EntryError(f"{what} TTL is negative")
    if ttl.total_seconds() > MAX_TTL_SECONDS or ttl.microseconds:
        raise EntryError(f"{what} TTL must be whole seconds, at most {MAX_TTL_SECONDS}")
