"""What an agent keeps on disk: whole, sealed, and never a reason not to start."""

import base64
import hashlib
import json
import os
import random
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_core.spiffeid import TrustDomain
from tests.support.authorities import NOW, a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.endpoint import a_held
from tests.support.store import TD, an_entry
from workload_api.cache.cache import WorkloadCache
from workload_api.storage import AgentStorage, NodeState, Snapshot, StorageError

CA = FakeCa()
ENTRIES = [an_entry(f"/w{n}", id=f"w{n}", created_at=NOW, hint=f"h{n}") for n in range(3)]
KEY = pkcs8_of(a_key("p256", "workload"))
NODE = NodeState(KEY, CA.chain())


def a_cache() -> WorkloadCache:
    """A full cache."""
    cache = WorkloadCache(TD)
    cache.apply(
        snapshot=True, entries=ENTRIES, bundles=[CA.bundle, FakeCa("partner.test").bundle]
    )
    for entry in ENTRIES:
        cache.svids[entry.id] = a_held(CA, entry)
    return cache


@dataclass
class Place:
    """An agent's folders."""

    data: Path
    runtime: Path

    def storage(self) -> AgentStorage:
        """As an agent that starts opens them."""
        return AgentStorage(self.data, self.runtime)

    @property
    def cache(self) -> Path:
        """The file of the cache."""
        return self.data / "cache.json"

    def load(self, at: Any = NOW) -> WorkloadCache | None:
        """What an agent that starts finds, or None."""
        cache = WorkloadCache(TD)
        return cache if self.storage().load_cache(cache, at) else None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Folders of an agent that has run."""
    made = Place(tmp_path / "data", tmp_path / "run")
    storage = made.storage()
    storage.save_node(NODE)
    storage.save_cache(Snapshot.of(a_cache()))
    return made


def summed(tree: Any) -> bytes:
    """A file that was written as it is: its checksum fits."""
    data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def tree_of(path: Path) -> dict[str, Any]:
    """What a file holds."""
    return json.loads(path.read_bytes().partition(b"\n")[2])


# Back and forth


def test_everything_comes_back(place: Place) -> None:
    """SEC-106: entries, bundles and SVIDs with their keys survive a restart."""
    cache = place.load()
    assert cache is not None and cache.ready
    expected = a_cache()
    assert {one.id: one for one in cache.index.all()} == {one.id: one for one in ENTRIES}
    assert cache.bundles.keys() == expected.bundles.keys()
    assert [one.der for one in cache.bundles[TD].x509_authorities] == [CA.cert.der]
    for entry in ENTRIES:
        held = cache.svids[entry.id]
        assert held.key == KEY and held.spiffe_id == entry.spiffe_id
        assert held.authority_id == CA.authority.authority_id
    assert place.storage().load_node() == NODE


def test_a_fresh_folder(tmp_path: Path) -> None:
    """An agent that never ran finds nothing, and no file is made by looking."""
    place = Place(tmp_path / "deep" / "data", tmp_path / "run")
    assert place.storage().load_node() is None and place.load() is None
    assert not list(place.data.iterdir()) and not list(place.runtime.iterdir())


def test_expired_svids_are_left_out(place: Place) -> None:
    """SEC-106: an SVID that has expired while the agent was down is not loaded."""
    cache = place.load(NOW + timedelta(hours=1))
    assert cache is not None and not cache.svids and len(cache.index) == 3


def test_files_are_the_agents_alone(place: Place) -> None:
    """SEC-61: files are 0600 in folders of 0700, whatever the umask, and no other is left."""
    before = os.umask(0)
    try:
        place.storage().save_cache(Snapshot.of(a_cache()))
        place.storage().save_node(NODE)
    finally:
        os.umask(before)
    assert {one.name for one in place.data.iterdir()} == {"node.json", "cache.json"}
    assert {one.name for one in place.runtime.iterdir()} == {"seal.key"}
    for folder in (place.data, place.runtime):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_sealed(place: Place) -> None:
    """SEC-61: no workload key is readable in the cache, in any encoding; nor is the seal."""
    text = place.cache.read_bytes()
    secret = a_key("p256", "workload").private_numbers().private_value.to_bytes(32, "big")
    assert secret in KEY
    for form in (secret, base64.b64encode(KEY), secret.hex().encode()):
        assert form not in text
    assert (place.runtime / "seal.key").read_bytes() not in text


def test_the_same_key_is_sealed_differently_each_time(place: Place) -> None:
    """SEC-61: a nonce is never used twice, though the keys are the same."""
    seen = set()
    for _ in range(5):
        place.storage().save_cache(Snapshot.of(a_cache()))
        seen |= {one["key"][:16] for one in tree_of(place.cache)["svids"].values()}
    assert len(seen) == 15


@pytest.mark.parametrize("reboot", ["removed", "another", "short"])
def test_a_reboot(place: Place, reboot: str) -> None:
    """SEC-61: after a reboot the keys cannot be opened: entries stay, SVIDs are signed anew."""
    seal = place.runtime / "seal.key"
    if reboot == "removed":
        seal.unlink()
    else:
        seal.write_bytes(b"x" * (32 if reboot == "another" else 31))
    cache = place.load()
    assert cache is not None and cache.ready
    assert not cache.svids and len(cache.index) == 3
    place.storage().save_cache(Snapshot.of(a_cache()))
    again = place.load()
    assert again is not None and len(again.svids) == 3


def test_a_key_opens_with_its_own_certificate_alone(place: Place) -> None:
    """SEC-61: a sealed key beside another entry or another certificate is useless."""
    tree = tree_of(place.cache)
    svids = tree["svids"]
    svids["w0"]["key"], svids["w1"]["chain"] = svids["w2"]["key"], svids["w2"]["chain"]
    place.cache.write_bytes(summed(tree))
    cache = place.load()
    assert cache is not None and set(cache.svids) == {"w2"}


# Damage


def variants() -> list[tuple[str, Callable[[bytes], bytes]]]:
    """Ways in which a file may be damaged."""
    rng = random.Random(5)
    made: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("empty", lambda _: b""),
        ("zeros", lambda data: bytes(len(data))),
        ("doubled", lambda data: data * 2),
        ("behind it", lambda data: data + b"\n"),
        ("no newline", lambda data: data.replace(b"\n", b"")),
        ("a PNG", lambda _: b"\x89PNG\r\n\x1a\n"),
    ]
    for _ in range(60):
        share, bit = rng.random(), rng.randrange(8)
        made.append(
            (f"bit {share:.4f}.{bit}", lambda data, s=share, b=bit: _flipped(data, s, b))
        )
    for _ in range(25):
        share = rng.random()
        made.append((f"cut {share:.4f}", lambda data, s=share: data[: int(len(data) * s)]))
        made.append((f"hole {share:.4f}", lambda data, s=share: _holed(data, s)))
    return made


def _flipped(data: bytes, share: float, bit: int) -> bytes:
    changed = bytearray(data)
    changed[int(len(data) * share)] ^= 1 << bit
    return bytes(changed)


def _holed(data: bytes, share: float) -> bytes:
    at = int(len(data) * share)
    return data[:at] + b"\0" * min(512, len(data) - at) + data[at + 512 :]


def shapes() -> list[tuple[str, Any]]:
    """Files that were written whole, and hold what no agent writes."""
    values: list[Any] = [None, True, 0, -1, 10**30, 1e300, "", "x", "%%", "AAAA", [], {}, [[]],
                         ["AAAA"], [None], {"x": 1}, "\ud800", "\0"]  # fmt: skip
    made: list[tuple[str, Any]] = [(f"root {value!r}", value) for value in values]
    for name in ("format", "trust_domain", "entries", "bundles", "svids"):
        made += [(f"{name} {value!r}", {name: value}) for value in values]
        made.append((f"{name} absent", {name: ...}))
    for name in ("revision", "chain", "key", "authority"):
        made += [
            (f"svid {name} {value!r}", {"svids": {"w0": {name: value}}}) for value in values
        ]
        made.append((f"svid {name} absent", {"svids": {"w0": {name: ...}}}))
    return made


def merged(tree: Any, change: Any) -> Any:
    """*tree* with *change* in it."""
    if not isinstance(change, dict) or not isinstance(tree, dict) or not change:
        return change
    made = dict(tree)
    for name, value in change.items():
        made[name] = merged(tree.get(name), value)
        if value is ...:
            del made[name]
    return made


def check_harmless(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """However the file is: the agent starts, serves nothing wrong, and says what was wrong."""
    before = place.cache.read_bytes()
    cache = WorkloadCache(TD)
    caplog.clear()
    found = place.storage().load_cache(cache, NOW)
    if not found:
        assert not len(cache.index) and not cache.svids and not cache.bundles
        assert not cache.ready
        assert place.cache.with_suffix(".damaged").read_bytes() == before
        assert not place.cache.exists()
        (record,) = caplog.records
        assert record.getMessage() == "cache_damaged" and record.exc_info is not None
    else:
        assert {one.id: one for one in cache.index.all()}.items() <= {
            one.id: one for one in ENTRIES
        }.items()
        for entry_id, held in cache.svids.items():
            assert held.spiffe_id.path == f"/{entry_id}" and held.key == KEY
        assert not caplog.records
    place.storage().save_cache(Snapshot.of(a_cache()))
    assert place.load() is not None


@pytest.mark.parametrize("damage", variants(), ids=lambda one: one[0])
def test_sec_103_a_damaged_cache(
    place: Place, caplog: pytest.LogCaptureFixture, damage: tuple[str, Callable[[bytes], bytes]]
) -> None:
    """SEC-103: a damaged cache is never believed in part: set aside, with its reason."""
    place.cache.write_bytes(damage[1](place.cache.read_bytes()))
    check_harmless(place, caplog)
    assert place.cache.with_suffix(".damaged").exists()


@pytest.mark.parametrize("shape", shapes(), ids=lambda one: one[0])
def test_sec_103_a_cache_of_another_shape(
    place: Place, caplog: pytest.LogCaptureFixture, shape: tuple[str, Any]
) -> None:
    """SEC-103: a whole file that holds something else stops no agent, and serves no wrong."""
    place.cache.write_bytes(summed(merged(tree_of(place.cache), shape[1])))
    check_harmless(place, caplog)


def test_sec_103_a_cache_of_another_trust_domain(place: Place) -> None:
    """SEC-103: what was kept for another trust domain is not served in this one."""
    cache = WorkloadCache(TrustDomain("other.test"))
    assert not place.storage().load_cache(cache, NOW)
    assert not cache.svids and not cache.bundles


@pytest.mark.parametrize("name", ["cache.json", "seal.key"])
def test_a_file_that_others_can_read_is_not_used(place: Place, name: str) -> None:
    """SEC-61: a file that others can read or write is not believed."""
    path = (place.data if name == "cache.json" else place.runtime) / name
    path.chmod(0o640)
    assert place.load() is None


def test_a_link_is_not_followed(place: Place, tmp_path: Path) -> None:
    """SEC-61: a link in the place of a file is not followed."""
    place.cache.rename(tmp_path / "elsewhere")
    place.cache.symlink_to(tmp_path / "elsewhere")
    assert place.load() is None


def test_a_folder_that_others_can_enter(tmp_path: Path) -> None:
    """SEC-61: a data folder that is not ours alone is refused, with the command that helps."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)  # whatever the umask is: a server in this process has set it
    with pytest.raises(StorageError, match=f"chmod 0700 {data}"):
        AgentStorage(data, tmp_path / "run")


NODE_DAMAGE = [one for one in variants() if one[0] not in ("empty",)][:60]


@pytest.mark.parametrize("damage", NODE_DAMAGE, ids=lambda one: one[0])
def test_sec_103_a_damaged_identity(
    place: Place, damage: tuple[str, Callable[[bytes], bytes]]
) -> None:
    """SEC-103: an agent's own damaged identity is no silent reset: it says what to do."""
    path = place.data / "node.json"
    path.write_bytes(damage[1](path.read_bytes()))
    with pytest.raises(StorageError, match="restore it, or remove it"):
        place.storage().load_node()
    assert path.exists()


OTHER_KEY = base64.b64encode(pkcs8_of(a_key("p256", "other"))).decode()


@pytest.mark.parametrize(
    "tree",
    [None, [], 3, {}, {"key": "", "chain": []}, {"key": 1, "chain": []}, {"key": "AAAA"},
     {"key": OTHER_KEY, "chain": {}}, {"key": OTHER_KEY, "chain": ["AAAA"]},
     {"key": OTHER_KEY, "chain": [base64.b64encode(CA.leaf().der).decode()]}],
)  # fmt: skip
def test_sec_103_an_identity_of_another_shape(place: Place, tree: Any) -> None:
    """SEC-103: an identity whose key is none, or is not its certificate's, is refused."""
    (place.data / "node.json").write_bytes(summed(tree))
    with pytest.raises(StorageError, match=r"node\.json is damaged"):
        place.storage().load_node()


def test_an_identity_that_is_being_attested(place: Place) -> None:
    """SEC-50: the key is on disk before the token is spent, without a certificate yet."""
    state = NodeState(KEY)
    place.storage().save_node(state)
    assert place.storage().load_node() == state


# Ended for good


def test_wiped(place: Place) -> None:
    """SEC-52: after a ban no key is left on disk, not even in what was set aside."""
    place.cache.write_bytes(b"damaged")
    storage = place.storage()
    storage.load_cache(WorkloadCache(TD), NOW)
    (place.data / ".node.json.new").write_bytes(KEY)
    storage.wipe()
    assert not list(place.data.iterdir()) and not list(place.runtime.iterdir())


def test_wiped_while_something_is_being_written(place: Place) -> None:
    """SEC-52: a save that was under way, or comes late, brings no key back."""
    storage = place.storage()
    snapshot = Snapshot.of(a_cache())
    go = threading.Barrier(5)

    def save() -> None:
        go.wait()
        for _ in range(20):
            storage.save_cache(snapshot)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    storage.wipe()
    for thread in threads:
        thread.join()
    assert not list(place.data.iterdir()) and not list(place.runtime.iterdir())
    with pytest.raises(StorageError):
        storage.save_node(NODE)


def test_a_full_disk_leaves_what_there_was(place: Place) -> None:
    """SEC-102: when a file cannot be written the old one stands, and the refusal names it."""
    before = place.cache.read_bytes()
    blocked = place.data / ".cache.json.new"
    blocked.mkdir()
    (blocked / "in the way").touch()
    with pytest.raises(StorageError, match=r"cannot write .*cache\.json"):
        place.storage().save_cache(Snapshot.of(a_cache()))
    assert place.cache.read_bytes() == before


def test_secrets_are_in_no_repr() -> None:
    """SEC-90: neither the node's key nor a workload's is in the text of what holds it."""
    snapshot = Snapshot.of(a_cache())
    for text in (repr(NODE), repr(snapshot), repr(snapshot.svids["w0"])):
        assert repr(KEY)[2:40] not in text
