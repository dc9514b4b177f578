"""The agent's own identity: what is on disk, who its server is, when it is renewed."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_der_x509_csr

from spiffe_core.bundle import Bundle
from spiffe_core.bundle_document import bundle_to_document
from spiffe_core.errors import ErrorKind, InternalError, PreconditionError, SpiffeError
from spiffe_core.keys import KeyKind
from spiffe_core.matching import MismatchError
from spiffe_core.pem import certificates_to_pem
from spiffe_core.x509svid import X509SvidError
from tests.support.authorities import NOW, a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.clock import DrivenClock
from tests.support.store import TD
from workload_api.cache.cache import WorkloadCache
from workload_api.keys import authority_of, check_key, make_csr, make_key
from workload_api.node.identity import NodeIdentity, read_trust_bundle
from workload_api.node.join_token import JoinTokenProof
from workload_api.node.proof import NoWayToAttestError
from workload_api.storage import AgentStorage, NodeState

CA = FakeCa()
KEY = pkcs8_of(a_key("p256", "workload"))
AGENT, SERVER = "/spire/agent/join_token/1", "/spire/server"


class Place:
    """An agent's identity and everything it stands on."""

    def __init__(self, folder: Path) -> None:
        self.clock = DrivenClock(NOW)
        self.storage = AgentStorage(folder / "data", folder / "run")
        self.cache = WorkloadCache(TD)
        self.cache.apply(snapshot=True, bundles=[CA.bundle])
        self.node = NodeIdentity(TD, self.storage, self.cache, self.clock.now)

    def save(self, chain: tuple[bytes, ...], key: bytes = KEY) -> None:
        """An earlier life left this."""
        self.storage.save_node(NodeState(key, chain))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An agent in an empty folder that knows its trust domain's bundle."""
    return Place(tmp_path)


# What is on disk


async def test_taken_up_again(place: Place) -> None:
    """SEC-50: an identity that is still good is used as it is."""
    place.save(CA.chain(CA.leaf(AGENT)))
    assert await place.node.load()
    assert place.node.svid is not None and place.node.svid.spiffe_id.path == AGENT
    assert place.node.context()


async def test_nothing_or_nothing_good(place: Place) -> None:
    """Nothing, a key that is being attested, or an SVID that has ended: none of it counts."""
    assert not await place.node.load()
    place.save(())
    assert not await place.node.load()
    place.save(CA.chain(CA.leaf(AGENT)))
    place.clock.advance(timedelta(hours=1, seconds=1))
    assert not await place.node.load() and place.node.svid is None


async def test_of_another_trust_domain(place: Place) -> None:
    """SEC-95: an agent of another trust domain does not use what it was in the old one."""
    other = FakeCa("other.test")
    place.save(other.chain(other.leaf(AGENT)))
    with pytest.raises(PreconditionError, match=r"is of other\.test"):
        await place.node.load()


async def test_no_svid_of_a_kind(place: Place) -> None:
    """SEC-103: what is whole on disk and yet no X509-SVID is refused with its reason."""
    place.save((CA.leaf(AGENT, extensions=()).der,))
    with pytest.raises(InternalError, match="no X509-SVID"):
        await place.node.load()


async def test_without_a_token(place: Place) -> None:
    """SEC-50: without a token nothing is sent, and it says how to make one."""
    with pytest.raises(NoWayToAttestError, match="issuer token generate"):
        await place.node.attest(None, JoinTokenProof())


async def test_forgotten(place: Place) -> None:
    """SEC-52: told to forget, it has no identity, in memory or on disk."""
    place.save(CA.chain(CA.leaf(AGENT)))
    await place.node.load()
    await place.node.forget()
    assert place.node.svid is None and place.storage.load_node() is None


# Who the server is


async def test_sec_57_the_server(place: Place) -> None:
    """SEC-57: the server's ID, of our trust domain, by our bundle, is our server's."""
    place.node.check_server(CA.chain(CA.leaf(SERVER)))
    sub = CA.child()
    place.node.check_server(sub.chain(sub.leaf(SERVER)))


def _strangers() -> dict[str, tuple[tuple[bytes, ...], type[SpiffeError]]]:
    other, foreign = FakeCa(which="other"), FakeCa("other.test")
    late = {"not_before": NOW + timedelta(1), "not_after": NOW + timedelta(2)}
    early = {"not_before": NOW - timedelta(2), "not_after": NOW - timedelta(1)}
    return {
        "another CA": (other.chain(other.leaf(SERVER)), X509SvidError),
        "another trust domain": (foreign.chain(foreign.leaf(SERVER)), X509SvidError),
        "another domain's ID from our CA": (
            CA.chain(CA.leaf("spiffe://other.test/spire/server")), X509SvidError,
        ),
        "a workload": (CA.chain(CA.leaf("/web")), MismatchError),
        "an agent": (CA.chain(CA.leaf(AGENT)), MismatchError),
        "a path below the server's": (CA.chain(CA.leaf(SERVER + "/x")), MismatchError),
        "in capitals": (CA.chain(CA.leaf("/spire/Server")), MismatchError),
        "expired": (CA.chain(CA.leaf(SERVER, **early)), X509SvidError),
        "not yet": (CA.chain(CA.leaf(SERVER, **late)), X509SvidError),
        "a CA": ((CA.cert.der,), X509SvidError),
        "nothing": ((), X509SvidError),
    }  # fmt: skip


@pytest.mark.parametrize("stranger", _strangers())
async def test_sec_57_a_stranger(place: Place, stranger: str) -> None:
    """SEC-57, T-10: anybody else is refused, whoever signed for him and whatever his name."""
    chain, error = _strangers()[stranger]
    with pytest.raises(error):
        place.node.check_server(chain)


async def test_without_a_bundle_nobody_is_known(place: Place) -> None:
    """SEC-57: with no authority to know the server by, nothing is dialled."""
    place.cache.bundles.clear()
    with pytest.raises(PreconditionError, match=r"set server\.trust_bundle"):
        place.node.context()


# The bundle of the first start


@pytest.mark.parametrize("form", ["pem", "document"])
def test_a_trust_bundle(tmp_path: Path, form: str) -> None:
    """SEC-57: the bundle of the first start is PEM, or a SPIFFE bundle document."""
    data = {"pem": certificates_to_pem([CA.cert.der]).encode(),
            "document": bundle_to_document(CA.bundle)}[form]  # fmt: skip
    (tmp_path / "bundle").write_bytes(data)
    found = read_trust_bundle(tmp_path / "bundle", TD)
    assert [one.der for one in found.x509_authorities] == [CA.cert.der]


@pytest.mark.parametrize(
    "data", [None, b"", b"x", b"{}", b'{"keys":null}', b"\xff", CA.cert.der,
             certificates_to_pem([CA.leaf().der]).encode()]
)  # fmt: skip
def test_no_trust_bundle(tmp_path: Path, data: bytes | None) -> None:
    """SEC-57: what is no bundle of authorities is refused, by name."""
    path = tmp_path / "bundle"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PreconditionError, match=str(path)):
        read_trust_bundle(path, TD)


# When to renew


async def test_renewed_from_half_life_on(place: Place) -> None:
    """SEC-106: due from half of the life on, and not before; without an identity never."""
    assert not place.node.renew_due()
    place.save(CA.chain(CA.leaf(AGENT)))
    await place.node.load()
    assert place.node.svid is not None
    validity = place.node.svid.validity
    half = validity.not_before + validity.life / 2
    place.clock.advance(half - NOW - timedelta(seconds=1))
    assert not place.node.renew_due()
    place.clock.advance(timedelta(seconds=1))
    assert place.node.renew_due()


async def test_renewed_when_its_authority_is_tainted(place: Place) -> None:
    """SEC-47: an SVID of a tainted authority is renewed at once; of an old one, not."""
    place.save(CA.chain(CA.leaf(AGENT)))
    await place.node.load()
    fresh = FakeCa(which="fresh").authority
    for old, due in ((CA.authority, False), (replace(CA.authority, tainted=True), True)):
        place.cache.apply(snapshot=False, bundles=[Bundle(TD, (old, fresh))])
        assert place.node.renew_due() is due


# Keys


@pytest.mark.parametrize("kind", [KeyKind.EC_P256, KeyKind.EC_P384, KeyKind.RSA_2048])
def test_keys(kind: KeyKind) -> None:
    """WAPI-18, IOP-07: every kind of key is PKCS#8, fresh each time, and signs its request."""
    key = make_key(kind)
    assert key != make_key(kind)
    check_key(key, ())
    assert load_der_x509_csr(make_csr(key)).is_signature_valid


def test_a_key_and_its_certificate() -> None:
    """SEC-103: a key that is none, or another certificate's, is refused."""
    check_key(KEY, CA.chain())
    other = pkcs8_of(a_key("p256", "other"))
    for key, chain in ((b"x", ()), (other, CA.chain()), (KEY, (b"x",))):
        with pytest.raises(SpiffeError) as caught:
            check_key(key, chain)
        assert caught.value.kind is ErrorKind.MALFORMED


def test_whose_certificate_it_is() -> None:
    """SEC-47: the authority of a certificate is what its authority key identifier says."""
    assert authority_of(CA.leaf().der) == CA.authority.authority_id
    assert authority_of(CA.cert.der) == ""
    with pytest.raises(SpiffeError):
        authority_of(b"x")


def test_the_key_is_in_no_repr(place: Any) -> None:
    """SEC-90: the text of an agent's identity holds no key."""
    place.node._key = KEY
    assert repr(KEY)[2:20] not in repr(place.node)
