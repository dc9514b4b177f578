"""
What every repository promises, on a database made by the migrations.

Runs on SQLite; another engine joins by one more parameter of `connection`.

Over 500 lines: the tables of one subject stay together.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, update

from ca.journal import AuthorityState
from issuer.store import authorities as authorities_module
from issuer.store import entries as entries_module
from issuer.store import events as events_module
from issuer.store import migrate
from issuer.store.agents import AgentRepository, TokenError, TokenRepository
from issuer.store.authorities import (
    AuthorityRepository,
    BundleRepository,
    IssuedRepository,
)
from issuer.store.engine import make_engine
from issuer.store.entries import EntryRepository, SimilarEntryError, uuid7
from issuer.store.events import AuditRepository, EventKind, EventRepository
from issuer.store.rows import StoredValueError
from issuer.store.store import Repositories
from issuer.store.tables import agents, authorities, bundles, entries, metadata
from spiffe_core.authority import JwtAuthority
from spiffe_core.bundle import Bundle
from spiffe_core.entry import RegistrationEntry
from spiffe_core.errors import (
    AbortedError,
    AlreadyExistsError,
    NotFoundError,
    NotReadyError,
)
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_core.spiffeid import TrustDomain
from tests.support.store import (
    NOW,
    TD,
    an_agent,
    an_authority,
    an_entry,
    an_id,
    an_issued,
    node_id,
    some,
)

OTHER = TrustDomain("other.org")
KEYS = [
    ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for _ in range(3)
]


def repositories(connection: Connection, now: Any = NOW) -> Repositories:
    """All repositories over one transaction, as the store makes them."""
    events = EventRepository(connection, now)
    return Repositories(
        EntryRepository(connection, events, now),
        AgentRepository(connection, events),
        TokenRepository(connection, now),
        AuthorityRepository(connection, events),
        BundleRepository(connection, events),
        IssuedRepository(connection),
        events,
        AuditRepository(connection, now, "tester"),
    )


@pytest.fixture(params=["sqlite"])
def connection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connection]:
    """One transaction on a new database."""
    engine = make_engine(tmp_path / "issuer.db")
    migrate.upgrade(engine)
    migrate.claim(engine, TD, tmp_path)
    with engine.connect() as made:
        yield made
    engine.dispose()


@pytest.fixture
def repos(connection: Connection) -> Repositories:
    """All repositories."""
    return repositories(connection)


def heard(repos: Repositories, during: Callable[[], object]) -> list[tuple[EventKind, str]]:
    """The events that *during* wrote."""
    before = repos.events.last()
    during()
    return [(one.kind, one.key) for one in repos.events.since(before)]


# Entries


def test_an_entry_comes_back_whole(repos: Repositories) -> None:
    """Every field of an entry is stored, exact, whatever its values hold (SEC-03)."""
    repos.bundles.set(Bundle(OTHER))
    entry = an_entry(
        "/db",
        selectors=some('k8s:pod-label:a,b:"c"', "unix:path:/x y\n'; DROP TABLE entries", "u:é"),
        x509_svid_ttl=timedelta(seconds=61),
        jwt_svid_ttl=timedelta(seconds=2**31 - 1),
        federates_with=frozenset({OTHER, TrustDomain("a_b.org")}),
        admin=True,
        downstream=True,
        expires_at=NOW + timedelta(days=400),
        dns_names=("z.example.org", "a.example.org", "*.example.org"),
        hint="hint\x00'\"\\ é",
        disable_x509_svid_prefetch=True,
        jwt_svid_include_jti=True,
    )
    made = repos.entries.create(entry)
    assert made == replace(entry, id=made.id, created_at=NOW)
    assert repos.entries.get(made.id) == made
    stored = repos.entries.create(an_entry("/s", store_svid=True))
    assert repos.entries.get(stored.id).store_svid


def test_entry_changes_are_heard(repos: Repositories) -> None:
    """Create, update and delete each write one event with the entry's id."""
    event = [(EventKind.ENTRY, "e")]
    assert heard(repos, lambda: repos.entries.create(an_entry(id="e"))) == event
    assert heard(repos, lambda: repos.entries.update(an_entry("/new", id="e"))) == event
    assert heard(repos, lambda: repos.entries.delete("e")) == event
    with pytest.raises(NotFoundError):
        repos.entries.delete("e")
    assert repos.events.last() == 3


def test_similar_entries_are_refused_with_the_one_there(repos: Repositories) -> None:
    """SPIRE API 5.1: same ID, parent and selectors is the existing entry, never a double."""
    first = repos.entries.create(an_entry(selectors=some("a:1", "b:2")))
    with pytest.raises(SimilarEntryError) as caught:
        repos.entries.create(an_entry(selectors=some("b:2", "a:1"), hint="other"))
    assert caught.value.existing == first
    for unlike in (some("a:1"), some("a:1,b:2"), some("a:1", "b:2", "c:3")):
        repos.entries.create(an_entry(selectors=unlike))
    assert repos.entries.count() == 4


def test_an_id_is_taken_once(repos: Repositories) -> None:
    """An id that the caller chose must be free."""
    repos.entries.create(an_entry(id="mine"))
    with pytest.raises(AlreadyExistsError, match="mine"):
        repos.entries.create(an_entry("/other", id="mine"))


def test_ids_are_uuid7_in_order() -> None:
    """Ids we choose are UUIDv7 of now, and later ones sort behind (WAPI-56)."""
    before = time.time_ns() // 1_000_000
    made = [uuid7() for _ in range(5000)]
    after = time.time_ns() // 1_000_000
    assert all(one[14] == "7" and one[19] in "89ab" and len(one) == 36 for one in made)
    assert made == sorted(set(made))
    assert before <= int(made[0].replace("-", "")[:12], 16)
    assert int(made[-1].replace("-", "")[:12], 16) <= after + 1


def test_an_update_counts_and_keeps_the_creation(repos: Repositories) -> None:
    """The revision grows with every update, changed or not; creation stays."""
    made = repos.entries.create(an_entry())
    again = repos.entries.update(made)
    assert again == replace(made, revision_number=1)
    later = repos.entries.update(replace(made, hint="x", created_at=None, revision_number=9))
    assert later == replace(made, hint="x", revision_number=2)
    with pytest.raises(NotFoundError):
        repos.entries.update(an_entry(id="none"))


def test_an_update_cannot_make_doubles(repos: Repositories) -> None:
    """An entry can't be changed into one that is there."""
    one = repos.entries.create(an_entry("/one"))
    two = repos.entries.create(an_entry("/two"))
    with pytest.raises(SimilarEntryError) as caught:
        repos.entries.update(replace(two, spiffe_id=one.spiffe_id))
    assert caught.value.existing == one
    assert repos.entries.get(two.id) == two


def test_sec_47_an_id_that_comes_back_goes_on_counting(connection: Connection) -> None:
    """SEC-47: delete and create with one id in one second never gives one revision twice."""
    repos = repositories(connection)
    repos.entries.create(an_entry(id="e"))
    repos.entries.update(an_entry(id="e"))
    repos.entries.delete("e")
    assert repos.entries.create(an_entry("/b", id="e")).revision_number == 2
    repos.entries.delete("e")
    assert repos.entries.create(an_entry("/c", id="e")).revision_number == 3
    repos.entries.delete("e")
    later = NOW + timedelta(days=40)
    assert repositories(connection, later).entries.forget_gone(later - timedelta(days=30)) == 1
    assert repos.entries.create(an_entry("/d", id="e")).revision_number == 0


def test_pages_follow_insertion(repos: Repositories) -> None:
    """Pages go by row, so that what is added meanwhile is neither lost nor shown twice."""
    made = [repos.entries.create(an_entry(f"/{n}", id=f"z{9 - n}")).id for n in range(7)]
    first = repos.entries.page(0, 3)
    repos.entries.delete(first[-1][1].id)
    made.append(repos.entries.create(an_entry("/new", id="a")).id)
    second = repos.entries.page(first[-1][0], 100)
    assert [entry.id for _, entry in [*first, *second]] == made
    assert repos.entries.page(second[-1][0], 3) == []


def test_sec_62_a_page_has_a_thousand_rows_at_most(repos: Repositories) -> None:
    """SEC-62: whatever is asked, a statement yields at most 1,000 rows."""
    for number in range(1001):
        repos.entries.create(an_entry(f"/{number}"))
    assert len(repos.entries.page(0, 2**31)) == 1000
    assert len(list(repos.entries.all())) == repos.entries.count() == 1001
    assert len(repos.entries.below(node_id("a"))) == 1001


def test_pages_by_name(repos: Repositories) -> None:
    """A page can be asked for one SPIFFE ID or parent; names are compared exactly."""
    for path, parent in (("/x", "a"), ("/x", "b"), ("/X", "a"), ("/x/y", "a"), ("/_", "a")):
        repos.entries.create(an_entry(path, parent_id=node_id(parent)))
    found = repos.entries.page(0, 10, spiffe_id=an_id("/x"))
    assert [entry.parent_id for _, entry in found] == [node_id("a"), node_id("b")]
    both = repos.entries.page(0, 10, spiffe_id=an_id("/x"), parent_id=node_id("b"))
    assert len(both) == 1
    assert [one.spiffe_id.path for one in repos.entries.below(node_id("b"))] == ["/x"]


@pytest.mark.parametrize(
    ("asked", "found"), [("a_b.org", ["/1"]), ("axb.org", ["/2"]), ("b.org", []), ("org", [])]
)
def test_sec_03_federation_is_by_exact_name(
    repos: Repositories, asked: str, found: list[str]
) -> None:
    """SEC-03: a trust domain's name is no pattern and no part of another's."""
    for path, name in (("/1", "a_b.org"), ("/2", "axb.org"), ("/3", "c.a_b.org")):
        repos.entries.create(an_entry(path, federates_with=frozenset({TrustDomain(name)})))
    using = repos.entries.federating_with(asked)
    assert [one.spiffe_id.path for one in using] == found


entry_in = st.builds(
    lambda path, parent, selector: an_entry(
        f"/{path}", parent_id=node_id(parent), selectors=some(f"k:{selector}")
    ),
    st.sampled_from("ab"),
    st.sampled_from("ab"),
    st.sampled_from("12"),
)
steps_in = st.lists(
    st.tuples(st.sampled_from(["create", "update", "delete"]), st.integers(0, 5), entry_in),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps_in)
def test_entries_behave_like_a_dictionary(steps: list[Any]) -> None:
    """Any changes leave what a model with one fingerprint rule holds, in order."""
    engine = create_engine("sqlite://")
    metadata.create_all(engine)
    model: dict[str, RegistrationEntry] = {}
    revisions: dict[str, int] = {}
    with engine.connect() as connection:
        repos = repositories(connection)
        for step, number, draft in steps:
            entry = replace(draft, id=f"e{number}")
            similar = [one.id for one in model.values() if one.fingerprint == entry.fingerprint]
            if step == "create":
                if similar or entry.id in model:
                    with pytest.raises(AlreadyExistsError) as caught:
                        repos.entries.create(entry)
                    assert isinstance(caught.value, SimilarEntryError) == bool(similar)
                    continue
                made = repos.entries.create(entry)
                assert made.revision_number == revisions.get(entry.id, -1) + 1
            elif step == "update":
                if entry.id not in model:
                    with pytest.raises(NotFoundError):
                        repos.entries.update(entry)
                    continue
                if similar not in ([], [entry.id]):
                    with pytest.raises(SimilarEntryError):
                        repos.entries.update(entry)
                    continue
                made = repos.entries.update(entry)
                assert made.revision_number == revisions[entry.id] + 1
            else:
                if entry.id not in model:
                    with pytest.raises(NotFoundError):
                        repos.entries.delete(entry.id)
                    continue
                repos.entries.delete(entry.id)
                del model[entry.id]
                continue
            model[entry.id] = made
            revisions[entry.id] = made.revision_number
        assert list(repos.entries.all()) == list(model.values())
        assert repos.entries.count() == len(model)
    engine.dispose()


# Agents


def test_an_agent_comes_back_whole(repos: Repositories) -> None:
    """Every field of an agent is stored."""
    agent = an_agent(selectors=some("a:1", "b:x:y"), can_reattest=True, key_hash=b"k\x00")
    event = [(EventKind.AGENT, agent.id.uri)]
    assert heard(repos, lambda: repos.agents.attested(agent)) == event
    assert repos.agents.get(agent.id) == agent
    assert repos.agents.find(node_id("none")) is None
    assert heard(repos, lambda: repos.agents.set_version(agent.id, "1.2")) == event
    assert list(repos.agents.all()) == [replace(agent, agent_version="1.2")]


def test_attesting_again_replaces_what_was_learnt(repos: Repositories) -> None:
    """A new attestation brings new selectors and ends a pending renewal."""
    repos.agents.attested(an_agent(selectors=some("a:1")))
    repos.agents.renewed(node_id("a"), "1002", NOW + timedelta(hours=2), b"new")
    repos.agents.attested(an_agent(serial="1003", selectors=some("a:2")))
    assert repos.agents.get(node_id("a")) == an_agent(serial="1003", selectors=some("a:2"))
    assert repos.agents.count() == 1


def test_sec_54_a_renewal_counts_when_it_is_used(repos: Repositories) -> None:
    """SEC-54: both serials are kept until the new one is used, then it is the only one."""
    repos.agents.attested(an_agent(key_hash=b"old"))
    ends = NOW + timedelta(hours=2)
    repos.agents.renewed(node_id("a"), "1002", ends, b"new")
    held = repos.agents.get(node_id("a"))
    assert (held.serial, held.new_serial, held.new_expires_at) == ("1001", "1002", ends)
    assert (held.key_hash, held.new_key_hash) == (b"old", b"new")
    with pytest.raises(AbortedError):
        repos.agents.activate_new(node_id("a"), "1009")
    repos.agents.activate_new(node_id("a"), "1002")
    held = repos.agents.get(node_id("a"))
    assert (held.serial, held.expires_at, held.new_serial) == ("1002", ends, "")
    assert (held.new_expires_at, held.key_hash, held.new_key_hash) == (None, b"new", b"")
    # A second first call, a moment later, finds it done; a stranger's serial never is.
    assert heard(repos, lambda: repos.agents.activate_new(node_id("a"), "1002")) == []
    for serial in ("1001", ""):
        with pytest.raises(AbortedError):
            repos.agents.activate_new(node_id("a"), serial)


def test_unknown_agents(repos: Repositories) -> None:
    """What is done to an agent that is not there says so, and writes no event."""
    with pytest.raises(NotFoundError):
        repos.agents.get(node_id("x"))
    with pytest.raises(NotFoundError):
        repos.agents.ban(node_id("x"))
    with pytest.raises(NotFoundError):
        repos.agents.delete(node_id("x"))
    with pytest.raises(AgentDeniedError) as caught:
        repos.agents.renewed(node_id("x"), "1", NOW, b"")
    assert caught.value.reason is DenialReason.AGENT_NOT_ATTESTED
    assert repos.events.last() == 0


# Bundles and authorities


def test_a_foreign_bundle_comes_back_whole(repos: Repositories) -> None:
    """Keys, taints, expiry, sequence number and hint of a foreign bundle are stored."""
    bundle = Bundle(
        OTHER,
        (),
        (
            JwtAuthority("k1", KEYS[0], NOW + timedelta(days=1)),
            JwtAuthority("k2", KEYS[1], None, tainted=True),
        ),
        2**64 - 1,
        timedelta(seconds=77),
    )
    event = [(EventKind.BUNDLE, "other.org")]
    assert heard(repos, lambda: repos.bundles.set(bundle)) == event
    assert repos.bundles.find(OTHER) == bundle
    newer = replace(bundle, jwt_authorities=(), sequence_number=0)
    assert heard(repos, lambda: repos.bundles.set(newer)) == event
    assert list(repos.bundles.all()) == [newer] and repos.bundles.count() == 1
    assert heard(repos, lambda: repos.bundles.delete(OTHER)) == event
    assert repos.bundles.find(OTHER) is None
    with pytest.raises(NotFoundError):
        repos.bundles.delete(OTHER)


def test_an_authority_lives(repos: Repositories) -> None:
    """Prepared is published; activation retires the former; pruning takes it away."""
    event = [(EventKind.BUNDLE, TD.name)]
    first, second = an_authority("first", KEYS[0]), an_authority("second", KEYS[1])
    assert heard(repos, lambda: repos.authorities.add_prepared(first)) == event
    assert repos.authorities.all() == (first,)
    assert heard(repos, lambda: repos.authorities.activate("first", NOW)) == event
    repos.authorities.add_prepared(second)
    with pytest.raises(AbortedError):
        repos.authorities.activate("first", NOW)
    with pytest.raises(AbortedError):
        repos.authorities.activate("none", NOW)
    then = NOW + timedelta(hours=1, microseconds=7)
    repos.authorities.activate("second", then)
    old, active = repos.authorities.all()
    assert old == replace(first, state=AuthorityState.OLD, activated_at=NOW, retired_at=then)
    assert active == replace(second, state=AuthorityState.ACTIVE, activated_at=then)
    assert heard(repos, lambda: repos.authorities.prune("first")) == event
    assert repos.authorities.all() == (active,)


def test_only_the_old_is_pruned(repos: Repositories) -> None:
    """Pruning what is not OLD, or a second time, changes and says nothing."""
    repos.authorities.add_prepared(an_authority("first", KEYS[0]))
    before = repos.authorities.bundle()
    assert heard(repos, lambda: repos.authorities.prune("first")) == []
    assert heard(repos, lambda: repos.authorities.prune("none")) == []
    assert repos.authorities.bundle() == before


def test_bundle_08_the_sequence_grows_with_the_content(repos: Repositories) -> None:
    """BUNDLE-08: every addition and removal has a number of its own, and nothing else."""
    numbers = [repos.authorities.bundle().sequence_number]

    def then(change: Callable[[], object]) -> bool:
        change()
        numbers.append(repos.authorities.bundle().sequence_number)
        return numbers[-1] > numbers[-2]

    assert then(lambda: repos.authorities.add_prepared(an_authority("first", KEYS[0])))
    assert not then(lambda: repos.authorities.activate("first", NOW))
    assert then(lambda: repos.authorities.add_prepared(an_authority("second", KEYS[1])))
    assert not then(lambda: repos.authorities.activate("second", NOW))
    assert then(lambda: repos.authorities.prune("first"))
    assert [one.key_id for one in repos.authorities.bundle().jwt_authorities] == ["second"]


def test_sec_66_two_cannot_sign_at_once(repos: Repositories, connection: Connection) -> None:
    """SEC-66: the database itself refuses a second ACTIVE authority of a kind."""
    repos.authorities.add_prepared(an_authority("first", KEYS[0]))
    repos.authorities.add_prepared(an_authority("second", KEYS[1]))
    with pytest.raises(Exception, match="UNIQUE"):
        connection.execute(update(authorities).values(state="active"))


# What was issued


def test_issuance_is_on_record(repos: Repositories) -> None:
    """What an active authority signed is stored whole."""
    repos.authorities.add_prepared(an_authority("first", KEYS[0]))
    repos.authorities.activate("first", NOW)
    rows = [an_issued("1", pod_uid="u1"), an_issued("2", entry_id="")]
    repos.issued.record(rows)
    assert [row for _, row in repos.issued.page(0, 10)] == rows
    assert repos.issued.count() == 2
    assert repos.issued.prune(NOW + timedelta(hours=1)) == 0
    assert repos.issued.prune(NOW + timedelta(hours=1, seconds=1)) == 2


@pytest.mark.parametrize("state", ["prepared", "old", "none"])
def test_sec_24_nothing_under_an_authority_that_does_not_sign(
    repos: Repositories, state: str
) -> None:
    """SEC-24: a batch with one row under an authority not ACTIVE is refused as a whole."""
    for name, key in zip(("first", "second"), KEYS, strict=False):
        repos.authorities.add_prepared(an_authority(name, key))
        repos.authorities.activate(name, NOW)
    repos.authorities.add_prepared(an_authority("third", KEYS[2]))
    bad = {"prepared": "third", "old": "first", "none": "nobody"}[state]
    with pytest.raises(NotReadyError):
        repos.issued.record([an_issued("1", "second"), an_issued("2", bad)])
    assert repos.issued.count() == 0


def test_a_serial_is_used_once(repos: Repositories) -> None:
    """The database refuses a serial number that is on record."""
    repos.authorities.add_prepared(an_authority("first", KEYS[0]))
    repos.authorities.activate("first", NOW)
    repos.issued.record([an_issued("1")])
    with pytest.raises(Exception, match="UNIQUE"):
        repos.issued.record([an_issued("2"), an_issued("1")])


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        {"spiffe_id": "http://x"},
        {"parent_id": ""},
        {"selectors": "[]"},
        {"selectors": "{"},
        {"selectors": "[[1,2]]"},
        {"selectors": "7"},
        {"federates_with": '["A B"]'},
        {"dns_names": "[1]"},
        {"dns_names": "null"},
        {"expires_at": 10**18},
        {"x509_svid_ttl": -1},
        {"x509_svid_ttl": "soon"},
        {"id": "a b"},
    ],
    ids=str,
)
def test_sec_103_a_damaged_entry_is_named(
    repos: Repositories, connection: Connection, damage: dict[str, object]
) -> None:
    """SEC-103: a row that breaks a rule is our fault, and never an answer."""
    repos.entries.create(an_entry(id="e"))
    connection.execute(update(entries).values(**damage))
    with pytest.raises(StoredValueError, match="restore"):
        list(repos.entries.all())


def test_sec_103_damaged_others_are_named(repos: Repositories, connection: Connection) -> None:
    """SEC-103: so are damaged agents, authorities and bundles."""
    repos.agents.attested(an_agent())
    connection.execute(update(agents).values(selectors="[[null,1]]"))
    with pytest.raises(StoredValueError):
        repos.agents.get(node_id("a"))
    repos.bundles.set(Bundle(OTHER))
    for document in (b"", b"{}", b"[]", b'{"x509":[["!",0]],"jwt":[],"sequence":0,"hint":0}'):
        connection.execute(update(bundles).values(document=document))
        with pytest.raises(StoredValueError):
            repos.bundles.find(OTHER)
    repos.authorities.add_prepared(an_authority("first", b"no key"))
    with pytest.raises(StoredValueError):
        repos.authorities.bundle()
    for change in ({"state": "great"}, {"kind": "pgp"}, {"not_after": 0}):
        connection.execute(update(authorities).values(**change))
        with pytest.raises(StoredValueError):
            repos.authorities.all()


# Tokens, and forgetting


def test_sec_50_looking_at_a_token_uses_nothing_up(connection: Connection) -> None:
    """SEC-50: `check` answers as `consume` would, again and again, and changes nothing."""
    repos = repositories(connection)
    repos.tokens.add("t", "secret", NOW + timedelta(minutes=10))
    for _ in range(3):
        repos.tokens.check("t", "secret", KEYS[0])
    for public_id, secret in (("t", "other"), ("u", "secret"), ("t", "")):
        for use in (repos.tokens.check, repos.tokens.consume):
            with pytest.raises(TokenError, match="does not exist or has already been used"):
                use(public_id, secret, KEYS[0])
    repos.tokens.consume("t", "secret", KEYS[0])
    later = repositories(connection, NOW + timedelta(seconds=60))
    later.tokens.check("t", "secret", KEYS[0])
    for use in (later.tokens.check, later.tokens.consume):
        with pytest.raises(TokenError, match="already been used"):
            use("t", "secret", KEYS[1])
    over = repositories(connection, NOW + timedelta(seconds=61))
    with pytest.raises(TokenError, match="already been used"):
        over.tokens.check("t", "secret", KEYS[0])
    before = repositories(connection, NOW - timedelta(seconds=1))  # a clock that went back
    with pytest.raises(TokenError, match="already been used"):
        before.tokens.check("t", "secret", KEYS[0])


def test_tokens_are_forgotten_when_nobody_asks(connection: Connection) -> None:
    """A used token goes after its minute of grace, an unused one a day after it expired."""
    repos = repositories(connection)
    for name in ("used", "unused"):
        repos.tokens.add(name, "secret", NOW + timedelta(minutes=10))
    repos.tokens.consume("used", "secret", KEYS[0])
    for after, forgotten in (
        (timedelta(seconds=60), []),
        (timedelta(seconds=61), []),  # one that was used leaves no alias to look for
        (timedelta(days=1, minutes=10), []),
        (timedelta(days=1, minutes=10, seconds=1), ["unused"]),
        (timedelta(days=9), []),
    ):
        assert repositories(connection, NOW + after).tokens.prune() == forgotten
    for name in ("used", "unused"):
        repos.tokens.add(name, "secret", NOW)  # neither is there any more


def test_forgetting_goes_in_steps(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is old, one transaction drops no more than a step of it, oldest first."""
    for module in (entries_module, events_module, authorities_module):
        monkeypatch.setattr(module, "PRUNE_ROWS", 3)
    repos = repositories(connection)
    for number in range(8):
        repos.entries.create(an_entry(f"/{number}", id=f"e{number}"))
        repos.entries.delete(f"e{number}")
    later = repositories(connection, NOW + timedelta(days=2))
    before = NOW + timedelta(days=1)
    assert [later.entries.forget_gone(before) for _ in range(4)] == [3, 3, 2, 0]
    # One event an entry: created and deleted in one transaction is one change.
    repos.events.flush()
    assert later.events.last() - later.events.first() == 7
    assert [later.events.prune(before) for _ in range(4)] == [3, 3, 1, 0]
    assert later.events.first() == later.events.last(), "the newest stays"
    public = KEYS[0]
    repos.authorities.add_prepared(an_authority(public=public))
    repos.authorities.activate("first", NOW)
    repos.issued.record([an_issued(str(number)) for number in range(5)])
    assert [later.issued.prune(before) for _ in range(3)] == [3, 2, 0]
