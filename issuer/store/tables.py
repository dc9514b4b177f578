"""The schema.  `migrations/` makes it; a test holds the two against each other."""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata: Final = MetaData()

# One row: facts that hold for the whole database.
meta = Table(
    "meta", metadata,
    Column("id", Integer, primary_key=True),
    Column("trust_domain", Text, nullable=False),
    # Never goes back, whatever is added, removed or restored (BUNDLE-08).
    Column("bundle_sequence", BigInteger, nullable=False),
    Column("refresh_hint", Integer, nullable=False),
    # Random; another one after each restore, so that nobody takes the past for the present.
    Column("epoch", Text, nullable=False),
)  # fmt: skip

# `row` is the order of insertion, which pages follow (SPIRE API 3.5).
entries = Table(
    "entries", metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("spiffe_id", Text, nullable=False),
    Column("parent_id", Text, nullable=False),
    Column("selectors", Text, nullable=False),  # canonical JSON: sorted [type, value] pairs
    Column("fingerprint", LargeBinary, nullable=False, unique=True),
    Column("x509_svid_ttl", Integer, nullable=False),
    Column("jwt_svid_ttl", Integer, nullable=False),
    Column("federates_with", Text, nullable=False),  # JSON list of names, sorted
    Column("admin", Boolean, nullable=False),
    Column("downstream", Boolean, nullable=False),
    Column("expires_at", BigInteger, nullable=False),  # Unix seconds, 0 never
    Column("dns_names", Text, nullable=False),  # JSON list, in order
    Column("hint", Text, nullable=False),
    Column("store_svid", Boolean, nullable=False),
    Column("disable_x509_svid_prefetch", Boolean, nullable=False),
    Column("jwt_svid_include_jti", Boolean, nullable=False),
    Column("revision_number", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip
Index("entries_parent", entries.c.parent_id)
Index("entries_spiffe_id", entries.c.spiffe_id)

# Ids of entries that are gone, and how far their revisions had come: an id that comes back
# goes on from there, so that no cache takes the new entry for the old one (SEC-47).
gone_entries = Table(
    "gone_entries", metadata,
    Column("id", Text, primary_key=True),
    Column("revision_number", BigInteger, nullable=False),
    Column("gone_at", BigInteger, nullable=False),
)  # fmt: skip
Index("gone_entries_at", gone_entries.c.gone_at)

agents = Table(
    "agents", metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("attestation_type", Text, nullable=False),
    Column("serial", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("new_serial", Text, nullable=False),
    Column("new_expires_at", BigInteger, nullable=False),
    Column("selectors", Text, nullable=False),
    Column("banned", Boolean, nullable=False),  # a fact of its own (SEC-52)
    Column("can_reattest", Boolean, nullable=False),
    Column("agent_version", Text, nullable=False),
    Column("key_hash", LargeBinary, nullable=False),  # of the current SVID's public key
    Column("new_key_hash", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip

tokens = Table(
    "join_tokens", metadata,
    Column("public_id", Text, primary_key=True),
    Column("secret_hash", LargeBinary, nullable=False),  # never the secret (SEC-50)
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger, nullable=False),  # 0 while unused
    Column("used_key", LargeBinary, nullable=False),  # digest of the key it was used with
)  # fmt: skip

# Foreign bundles; our own is the public halves in `authorities`.
bundles = Table(
    "bundles", metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("trust_domain", Text, nullable=False, unique=True),
    Column("document", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip

authorities = Table(
    "authorities", metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("authority_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("public", LargeBinary, nullable=False),
    Column("not_before", BigInteger, nullable=False),  # microseconds, as all below
    Column("not_after", BigInteger, nullable=False),
    Column("prepared_at", BigInteger, nullable=False),
    Column("activated_at", BigInteger, nullable=False),
    Column("retired_at", BigInteger, nullable=False),
    # Of the columns above: one flipped bit in an instant would be a new authority (SEC-103).
    Column("checksum", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip
# Two that sign at once cannot be stored, whatever the code above does (SEC-66, SEC-68).
_ACTIVE: Final = text("state = 'active'")
Index("authorities_one_active", authorities.c.kind, unique=True,
      sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)  # fmt: skip

# What was signed, on record before anybody holds it (SEC-24).
issued = Table(
    "issued", metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("serial", Text, nullable=False),
    Column("spiffe_id", Text, nullable=False),
    Column("entry_id", Text, nullable=False),
    Column("authority_id", Text, nullable=False),
    Column("caller", Text, nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("pod_uid", Text, nullable=False, server_default=""),
    UniqueConstraint("kind", "serial", name="issued_serial"),
    sqlite_autoincrement=True,
)  # fmt: skip
Index("issued_expires", issued.c.expires_at)

events = Table(
    "events", metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("committed_at", BigInteger, nullable=False),  # microseconds
    sqlite_autoincrement=True,
)  # fmt: skip

audit = Table(
    "audit", metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    # SHA-256 over the previous row's and this row's content: a gap or an edit shows.
    Column("chain", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip
