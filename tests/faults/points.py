"""
The crash points, by the story in which a test passes them (SEC-100, table 2).

``name:2`` is the second time that a process passes it.  A test sees that no point of the
product is missing here.
"""

from typing import Final

FILE: Final = tuple(
    f"key_file.{step}" for step in ("opened", "written", "synced", "renamed", "folder_synced")
)
FIRST_START: Final = (
    "migration.started",
    "migration.before_commit",
    "migration.committed",
    "migration.claimed",
    "key.generated",
    *FILE,
    "authority.key_made",
    "audit.before_append",
    "audit.appended",
    "event.appended",
    "store.before_commit",
    "store.after_commit",
    "authority.published",
    "authority.read_back",
    "store.before_commit:2",
    "authority.activated",
    "key.generated:2",
    "key_file.written:2",
    "authority.key_made:2",
    "authority.published:2",
    "authority.activated:2",
    "svids.signed",
    "svids.recorded",
)
PREPARE: Final = (
    "key.generated",
    *FILE,
    "authority.key_made",
    "store.before_commit",
    "authority.published",
    "key_file.synced:2",
    "authority.key_made:2",
    "authority.published:2",
)
ACTIVATE: Final = (
    "authority.read_back",
    "authority.marked_old",
    "store.before_commit",
    "authority.activated",
    "authority.marked_old:2",
    "authority.activated:2",
)
PRUNE: Final = (
    "authority.before_prune",
    "store.before_commit",
    "authority.pruned",
    "key.deleted",
    "authority.before_prune:2",
    "authority.pruned:2",
)
ATTEST: Final = {
    # To whether the node is there afterwards.  The first commit is the server's own SVID.
    "attest.signed": False,
    "token.before_consume": False,
    "token.consumed": False,
    "node.before_insert": False,
    "node.inserted": False,
    "event.appended": False,
    "audit.before_append": False,
    "audit.appended": False,
    "store.before_commit:2": False,
    "store.after_commit:2": True,
    "attest.stored": True,
    "reply.AttestAgent": True,
}
RENEW: Final = {
    # To whether the renewal is on record afterwards.
    "renewal.signed": False,
    "node.renewed": False,
    "renewal.stored": True,
    "reply.RenewAgent": True,
}
CHANGE: Final = {
    # To whether the change is there afterwards.
    "event.appended": False,
    "audit.before_append": False,
    "audit.appended": False,
    "store.before_commit:2": False,
    "store.after_commit:2": True,
    "reply": True,
}
SIGN: Final = {
    # To whether it is on record afterwards.
    "svids.signed:2": False,
    "store.before_commit:2": False,
    "svids.recorded:2": True,
    "reply": True,
}
OTHERS: Final = ("node.activated", "bundle.stored")

AGENT_FILE: Final = tuple(
    f"agent_file.{step}" for step in ("opened", "written", "synced", "renamed", "folder_synced")
)
AGENT_JOIN: Final = (
    *AGENT_FILE,
    "agent.csr_sent",
    "agent.reply_got",
    "agent_file.written:2",
    "agent_file.renamed:2",
    "agent.identity_saved",
    "agent.applied",
)
AGENT_RENEW: Final = (
    "agent.reply_got",
    *AGENT_FILE,
    "agent.identity_saved",
    "agent.switched_over",
)
AGENT_CHANGE: Final = (
    "agent.applied",
    "agent.svids_got",
    "reply.FetchX509SVID:3",
    *AGENT_FILE,
)
SERVER: Final = {
    point.partition(":")[0]
    for points in (FIRST_START, PREPARE, ACTIVATE, PRUNE, ATTEST, RENEW, CHANGE, SIGN, OTHERS)
    for point in points
}
AGENT: Final = {
    point.partition(":")[0]
    for points in (AGENT_JOIN, AGENT_RENEW, AGENT_CHANGE)
    for point in points
}
SVID_FILES: Final = tuple(
    f"svid_files.{step}"
    for step in (
        "begun", "opened", "written", "filled", "synced", "linked", "swapped", "named",
    )
)  # fmt: skip
"""Of a sidecar; `tests/unit/workload_api/sidecar/test_files.py` is killed at each."""
