"""``Bundle``: our own, and foreign ones that operators exchange (SPIRE API 5.4)."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ca.keys.protocol import KeyPurpose, SigningKey
from ca.x509 import self_signed
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import bundle_pb2 as types_pb2
from tests.support.callers import (
    Code,
    Running,
    a_running_server,
    below,
    codes,
    mask,
    refused,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
Bundle, Mask = types_pb2.Bundle, types_pb2.BundleMask
RESTRICT, DELETE, DISSOCIATE = 0, 1, 2
NOW = datetime.now(UTC)


def a_root(name: str = "other.test") -> bytes:
    """A CA certificate of a trust domain."""
    key = SigningKey("k", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP256R1()))
    return self_signed(key, TrustDomain(name), now=NOW, ttl=timedelta(days=30)).der


def a_jwt_key(key_id: str = "k1", **fields: Any) -> Any:
    """A JWT key."""
    public = spki_of(ec.generate_private_key(ec.SECP256R1()).public_key())
    return types_pb2.JWTKey(public_key=public, key_id=key_id, **fields)


def a_bundle(name: str, **changes: Any) -> Any:
    """A bundle with something of everything."""
    made = {
        "trust_domain": name,
        "x509_authorities": [types_pb2.X509Certificate(asn1=a_root(name))],
        "jwt_authorities": [a_jwt_key(expires_at=4_000_000_000)],
        "refresh_hint": 60,
        "sequence_number": 2**63 + 5,
        **changes,
    }
    return Bundle(**made)


async def put(running: Running, verb: str, *bundles: Any, **fields: Any) -> Any:
    """The results of Batch{verb}FederatedBundle."""
    request = getattr(bundle_pb2, f"Batch{verb}FederatedBundleRequest")
    call = getattr(running.local.bundle, f"Batch{verb}FederatedBundle")
    return (await call(request(bundle=bundles, **fields))).results


async def delete(running: Running, *names: str, mode: int = RESTRICT) -> Any:
    """The results of BatchDeleteFederatedBundle."""
    request = bundle_pb2.BatchDeleteFederatedBundleRequest(trust_domains=names, mode=mode)
    return (await running.local.bundle.BatchDeleteFederatedBundle(request)).results


async def get(running: Running, name: str, output: Any = None) -> Any:
    """One foreign bundle."""
    return await running.local.bundle.GetFederatedBundle(
        bundle_pb2.GetFederatedBundleRequest(trust_domain=name, output_mask=output)
    )


# Our own


async def test_anybody_may_have_our_bundle(running: Running) -> None:
    """GetBundle: one certificate and one JWT key each, to strangers too; it verifies."""
    for calls in (running.local, running.anonymous.calls):
        bundle = await calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())
        assert bundle.trust_domain == "example.org"
        (authority,) = bundle.x509_authorities
        assert authority.asn1 == running.server.rotator.x509.authority.der
        assert not authority.tainted
        (key,) = bundle.jwt_authorities
        assert key.key_id == running.server.rotator.jwt.key_id
        assert key.expires_at == int(running.server.rotator.jwt.validity.not_after.timestamp())
        assert (bundle.refresh_hint, bundle.sequence_number) == (300, 2)


FIELDS = [field.name for field in Mask.DESCRIPTOR.fields]


@pytest.mark.parametrize("name", FIELDS)
async def test_masks(running: Running, name: str) -> None:
    """A mask yields its field and the name, of our own bundle and of foreign ones."""
    await put(running, "Set", a_bundle("masked.test"))
    whole = {
        "own": await running.local.bundle.GetBundle(bundle_pb2.GetBundleRequest()),
        "foreign": await get(running, "masked.test"),
    }
    some = mask(Mask, name)
    own = await running.local.bundle.GetBundle(bundle_pb2.GetBundleRequest(output_mask=some))
    for kind, found in (("own", own), ("foreign", await get(running, "masked.test", some))):
        assert {one.name for one, _ in found.ListFields()} <= {"trust_domain", name}
        assert getattr(found, name) == getattr(whole[kind], name)
    found = await get(running, "masked.test", Mask())
    assert found == Bundle(trust_domain="masked.test")


# Foreign ones


@pytest.mark.parametrize("verb", ["Create", "Set"])
async def test_a_bundle_comes_back(running: Running, verb: str) -> None:
    """What is given is stored and answered, 64-bit sequence number and expiry included."""
    given = a_bundle(f"whole-{verb.lower()}.test")
    (result,) = await put(running, verb, given)
    assert (result.status.code, result.status.message) == (0, "OK")
    assert result.bundle == given
    assert await get(running, given.trust_domain) == given
    assert await get(running, f"spiffe://{given.trust_domain}") == given
    (result,) = await put(running, verb, given, output_mask=mask(Mask, "refresh_hint"))
    if verb == "Set":
        assert result.bundle == Bundle(trust_domain=given.trust_domain, refresh_hint=60)
    else:
        assert codes([result]) == [6]
        assert (result.status.message, result.HasField("bundle")) == (
            "bundle already exists",
            False,
        )


async def test_input_is_put_in_order(running: Running) -> None:
    """Certificates back to back come out one each, doubles once; `tainted` is output only."""
    one, two = a_root("order.test"), a_root("order.test")
    given = a_bundle(
        "order.test",
        x509_authorities=[
            types_pb2.X509Certificate(asn1=one + two, tainted=True),
            types_pb2.X509Certificate(asn1=one),
        ],
        jwt_authorities=[a_jwt_key(tainted=True)],
    )
    given.trust_domain = "spiffe://order.test"
    (result,) = await put(running, "Set", given)
    assert result.bundle.trust_domain == "order.test"
    assert [each.asn1 for each in result.bundle.x509_authorities] == [one, two]
    assert not any(each.tainted for each in result.bundle.x509_authorities)
    assert not any(each.tainted for each in result.bundle.jwt_authorities)


def _leaf() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def _certificates(*ders: bytes) -> Any:
    return {"x509_authorities": [types_pb2.X509Certificate(asn1=der) for der in ders]}


BAD: dict[str, dict[str, Any]] = {
    "upper case": {"trust_domain": "Bad.test"},
    "a path": {"trust_domain": "spiffe://bad.test/a"},
    "no name": {"trust_domain": ""},
    "garbage": _certificates(b"garbage"),
    "trailing garbage": _certificates(a_root() + b"x"),
    "nothing": _certificates(b""),
    "leaf": _certificates(_leaf()),
    "no key ID": {"jwt_authorities": [a_jwt_key("")]},
    "long key ID": {"jwt_authorities": [a_jwt_key("k" * 256)]},
    "key ID twice": {"jwt_authorities": [a_jwt_key("k"), a_jwt_key("k")]},
    "no key": {"jwt_authorities": [types_pb2.JWTKey(key_id="k")]},
    "no SPKI": {"jwt_authorities": [types_pb2.JWTKey(key_id="k", public_key=b"x")]},
    "year 300000": {"jwt_authorities": [a_jwt_key(expires_at=2**62)]},
    "hint below 0": {"refresh_hint": -1},
    "hint of years": {"refresh_hint": 2**40},
    "101 authorities": {"jwt_authorities": [a_jwt_key(f"k{n}") for n in range(101)]},
    "over 1 MiB": _certificates(*[b"x" * 300_000] * 4),
}


@pytest.mark.parametrize("verb", ["Create", "Set", "Update"])
@pytest.mark.parametrize("case", BAD)
async def test_sec_12_a_bad_bundle_is_refused_alone(
    running: Running, case: str, verb: str
) -> None:
    """SEC-12: everything in a bundle is checked on the way in; its neighbours are stored."""
    name = f"good-{verb.lower()}-{len(case)}{case[0]}.test"
    neighbours = [a_bundle(f"l-{name}"), a_bundle(f"r-{name}")]
    if verb == "Update":
        await put(running, "Set", *neighbours)
    else:
        await delete(running, *[one.trust_domain for one in neighbours])
    bad = a_bundle("bad.test", **BAD[case])
    results = await put(running, verb, neighbours[0], bad, neighbours[1])
    assert codes(results) == [0, 3, 0]
    assert results[1].status.message.startswith("failed to convert bundle: ")
    assert not results[1].HasField("bundle")
    async with refused(Code.NOT_FOUND):
        await get(running, "bad.test")


async def test_our_own_domain_is_no_foreign_one(running: Running) -> None:
    """SPIRE API 5.4: getting, creating, setting, updating, removing it are refused."""
    ours = a_bundle("example.org")
    for verb in ("Create", "Set", "Update"):
        (result,) = await put(running, verb, ours)
        assert codes([result]) == [3]
        assert "own trust domain is not allowed" in result.status.message
    for mode in (RESTRICT, DELETE, DISSOCIATE):
        (result,) = await delete(running, "example.org", mode=mode)
        assert codes([result]) == [3]
    async with refused(Code.INVALID_ARGUMENT, "getting a federated bundle"):
        await get(running, "example.org")
    own = await running.local.bundle.GetBundle(bundle_pb2.GetBundleRequest())
    assert own.x509_authorities[0].asn1 != ours.x509_authorities[0].asn1


async def test_unknown_and_malformed_names(running: Running) -> None:
    """Unknown is 5, malformed 3, in every call."""
    async with refused(Code.NOT_FOUND, "bundle not found"):
        await get(running, "nobody.test")
    async with refused(Code.INVALID_ARGUMENT, "trust domain argument is not valid"):
        await get(running, "No Body")
    (result,) = await put(running, "Update", a_bundle("nobody.test"))
    assert (result.status.code, result.status.message) == (5, "bundle not found")
    results = await delete(running, "nobody.test", "No Body", "")
    assert codes(results) == [5, 3, 3]
    assert [one.trust_domain for one in results] == ["nobody.test", "No Body", ""]


@pytest.mark.parametrize("name", FIELDS)
async def test_updates_with_a_mask(running: Running, name: str) -> None:
    """SPIRE API 3.4: masked-in fields are replaced, the others stay; no mask replaces all."""
    before, given = a_bundle("update.test"), a_bundle("update.test", refresh_hint=7)
    given.sequence_number = 8
    await put(running, "Set", before)
    wanted = Bundle()
    wanted.CopyFrom(before)
    wanted.ClearField(name)
    wanted.MergeFrom(Bundle.FromString(_only(given, name).SerializeToString()))
    (result,) = await put(running, "Update", given, input_mask=mask(Mask, name))
    assert result.bundle == wanted
    (result,) = await put(running, "Update", given, input_mask=Mask())
    assert result.bundle == wanted
    bare = Bundle(trust_domain="update.test", refresh_hint=9)
    (result,) = await put(running, "Update", bare)
    assert result.bundle == bare == await get(running, "update.test")


def _only(bundle: Any, name: str) -> Any:
    made = Bundle()
    made.CopyFrom(bundle)
    for field, _ in bundle.ListFields():
        if field.name != name:
            made.ClearField(field.name)
    return made


async def test_masked_updates_at_once_all_count(running: Running) -> None:
    """Two who change different fields of one bundle at once both get their way."""
    await put(running, "Set", a_bundle("at-once.test"))
    hint = Bundle(trust_domain="at-once.test", refresh_hint=11)
    number = Bundle(trust_domain="at-once.test", sequence_number=12)
    await asyncio.gather(
        *(
            put(running, "Update", hint, input_mask=mask(Mask, "refresh_hint"))
            for _ in range(8)
        ),
        *(
            put(running, "Update", number, input_mask=mask(Mask, "sequence_number"))
            for _ in range(8)
        ),
    )
    found = await get(running, "at-once.test")
    assert (found.refresh_hint, found.sequence_number) == (11, 12)
    assert len(found.x509_authorities) == 1


async def count(running: Running) -> int:
    """What CountBundles says."""
    request = bundle_pb2.CountBundlesRequest()
    return int((await running.local.bundle.CountBundles(request)).count)


async def test_lists_and_counts() -> None:
    """Pages follow the order of insertion, without our own bundle; the count includes it."""
    async with a_running_server() as running:
        names = [f"d{number}.test" for number in (3, 1, 4, 0, 5)]
        assert (
            await running.local.bundle.CountBundles(bundle_pb2.CountBundlesRequest())
        ).count == 1
        stored = [a_bundle(name) for name in names]
        assert codes(await put(running, "Create", *stored)) == [0] * 5
        assert (
            await running.local.bundle.CountBundles(bundle_pb2.CountBundlesRequest())
        ).count == 6
        call = running.local.bundle.ListFederatedBundles
        whole = await call(bundle_pb2.ListFederatedBundlesRequest())
        assert (list(whole.bundles), whole.next_page_token) == (stored, "")
        found, token = [], ""
        while True:
            page = await call(
                bundle_pb2.ListFederatedBundlesRequest(
                    page_size=2, page_token=token, output_mask=Mask()
                )
            )
            token = page.next_page_token
            if not token:
                break
            found.append([one.trust_domain for one in page.bundles])
        assert found == [names[:2], names[2:4], names[4:]]
        async with refused(Code.INVALID_ARGUMENT, "page token"):
            await call(bundle_pb2.ListFederatedBundlesRequest(page_size=2, page_token="x"))


async def test_batches_hold_a_thousand(running: Running) -> None:
    """SEC-80: 1,001 items are refused whole; none is no item."""
    for verb in ("Create", "Set", "Update"):
        async with refused(Code.RESOURCE_EXHAUSTED):
            await put(running, verb, *[Bundle(trust_domain="x.test")] * 1001)
        assert list(await put(running, verb)) == []
    async with refused(Code.RESOURCE_EXHAUSTED):
        await delete(running, *["x.test"] * 1001)


# Deleting, and the entries that federate


async def federated(running: Running, *entries: tuple[str, list[str]]) -> list[Any]:
    """Entries that federate with these domains, whose bundles are held."""
    names = sorted({name for _, domains in entries for name in domains})
    await put(running, "Set", *[Bundle(trust_domain=name) for name in names])
    node = await running.node()
    return await running.add(
        *[below(node, path, federates_with=domains) for path, domains in entries]
    )


async def entry(running: Running, entry_id: str) -> Any:
    """One entry."""
    return await running.local.entry.GetEntry(entry_pb2.GetEntryRequest(id=entry_id))


async def test_restrict_refuses_while_entries_federate(running: Running) -> None:
    """RESTRICT: 9 with how many; once they are gone the bundle can go."""
    one, two = await federated(running, ("/r1", ["r.test"]), ("/r2", ["r.test", "s.test"]))
    (result,) = await delete(running, "r.test")
    assert codes([result]) == [9]
    assert "federated with 2 registration entries" in result.status.message
    assert await entry(running, one.id) == one
    await running.local.entry.BatchDeleteEntry(
        entry_pb2.BatchDeleteEntryRequest(ids=[one.id, two.id])
    )
    assert codes(await delete(running, "r.test", "s.test")) == [0, 0]


async def test_delete_takes_the_entries_along(running: Running) -> None:
    """DELETE: the entries that federate go, others stay; each is on record (SEC-91)."""
    one, two, other = await federated(
        running, ("/d1", ["d.test"]), ("/d2", ["d.test", "e.test"]), ("/d3", ["e.test"])
    )
    rows = await running.audited(lambda: delete(running, "d.test", mode=DELETE))
    assert rows == [
        ("entry.delete", one.id, "done"),
        ("entry.delete", two.id, "done"),
        ("bundle.delete", "d.test", "delete"),
    ]
    for gone in (one, two):
        async with refused(Code.NOT_FOUND):
            await entry(running, gone.id)
    assert await entry(running, other.id) == other


async def test_dissociate_takes_the_domain_off(running: Running) -> None:
    """DISSOCIATE: the entries stay, without the domain, with a new revision."""
    one, two = await federated(running, ("/x1", ["x.test"]), ("/x2", ["x.test", "y.test"]))
    assert codes(await delete(running, "x.test", mode=DISSOCIATE)) == [0]
    for before, left in ((one, []), (two, ["y.test"])):
        found = await entry(running, before.id)
        assert (list(found.federates_with), found.revision_number) == (left, 1)


async def test_sec_95_an_unknown_mode_is_refused(running: Running) -> None:
    """SEC-95: a mode that this release does not know deletes nothing."""
    await federated(running, ("/m1", ["m.test"]))
    async with refused(Code.INVALID_ARGUMENT, "deletion mode"):
        await delete(running, "m.test", mode=3)
    await get(running, "m.test")


async def test_changes_reach_the_agents_that_federate(running: Running) -> None:
    """A foreign bundle is told to agents whose entries federate with it, and to no other."""
    node, other = await running.node(), await running.node()
    given = a_bundle("told.test")
    await put(running, "Set", given)
    (own,) = await running.add(below(node, "/told", federates_with=["told.test"]))
    (found,) = (
        await node.calls.entry.GetAuthorizedEntries(entry_pb2.GetAuthorizedEntriesRequest())
    ).entries
    assert list(found.federates_with) == ["told.test"]
    request = bundle_pb2.GetFederatedBundleRequest(trust_domain="told.test")
    assert await node.calls.bundle.GetFederatedBundle(request) == given

    stream, idle = (one.calls.watch.Watch(watch_pb2.WatchRequest()) for one in (node, other))
    first = await stream.read()
    assert {one.trust_domain for one in first.bundles} == {"example.org", "told.test"}
    assert [one.trust_domain for one in (await idle.read()).bundles] == ["example.org"]
    # Same key ID, another key: told, although nothing else differs.
    swapped = Bundle()
    swapped.CopyFrom(given)
    swapped.jwt_authorities[0].public_key = a_jwt_key().public_key
    await put(running, "Set", swapped)
    change = await stream.read()
    assert (list(change.bundles), list(change.entries)) == ([swapped], [])
    assert change.cursor != first.cursor
    await delete(running, "told.test", mode=DISSOCIATE)
    seen: list[Any] = []
    while not any(one.removed_trust_domains for one in seen):
        seen.append(await stream.read())
    assert list(seen[-1].removed_trust_domains) == ["told.test"]
    assert [one.id for message in seen for one in message.entries] == [own.id]
    stream.cancel()
    await running.add(below(other, "/idle"))
    change = await idle.read()
    assert not change.bundles and not change.removed_trust_domains
    idle.cancel()


async def test_what_is_not_offered_says_why(running: Running) -> None:
    """Appending and publishing authorities are UNIMPLEMENTED, with a reason."""
    async with refused(Code.UNIMPLEMENTED, "one authority"):
        await running.local.bundle.AppendBundle(bundle_pb2.AppendBundleRequest())
    node = await running.node()
    await running.add(below(node, "/down", downstream=True))
    downstream = await running.holder("/down")
    for call, request in (
        ("PublishJWTAuthority", bundle_pb2.PublishJWTAuthorityRequest()),
        ("PublishWITAuthority", bundle_pb2.PublishWITAuthorityRequest()),
    ):
        async with refused(Code.UNIMPLEMENTED, "downstream"):
            await getattr(downstream.calls.bundle, call)(request)
