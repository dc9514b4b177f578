"""``Entry``: create, update and delete, item by item (SPIRE API 3.3, 3.4, 5.1)."""

import asyncio
from typing import Any

import pytest

from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import bundle_pb2 as types_bundle_pb2
from spiffe_wire.pb.spire.api.types import entry_pb2 as types_pb2
from tests.support.callers import (
    Calls,
    Code,
    Running,
    an_id,
    below,
    codes,
    id_message,
    mask,
    refused,
)
from tests.support.stack import a_folder, channel_to, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
PARENT = "/spire/agent/x/n"
Entry, Mask = types_pb2.Entry, types_pb2.EntryMask


def an_entry(path: str, *selectors: str, parent: str = PARENT, **fields: Any) -> Any:
    """A correct entry."""
    return below(an_id(parent), path, *selectors, **fields)


async def create(running: Running, *entries: Any, output: Any = None) -> Any:
    """The results of one BatchCreateEntry."""
    request = entry_pb2.BatchCreateEntryRequest(entries=entries, output_mask=output)
    return (await running.local.entry.BatchCreateEntry(request)).results


async def update(running: Running, *entries: Any, given: Any = None, output: Any = None) -> Any:
    """The results of one BatchUpdateEntry."""
    request = entry_pb2.BatchUpdateEntryRequest(
        entries=entries, input_mask=given, output_mask=output
    )
    return (await running.local.entry.BatchUpdateEntry(request)).results


async def delete(running: Running, *ids: str) -> Any:
    """The results of one BatchDeleteEntry."""
    request = entry_pb2.BatchDeleteEntryRequest(ids=ids)
    return (await running.local.entry.BatchDeleteEntry(request)).results


async def get(running: Running, entry_id: str, output: Any = None) -> Any:
    """One entry."""
    return await running.local.entry.GetEntry(
        entry_pb2.GetEntryRequest(id=entry_id, output_mask=output)
    )


async def federate(running: Running, *names: str) -> None:
    """Hold (empty) bundles of *names*."""
    await running.local.bundle.BatchSetFederatedBundle(
        bundle_pb2.BatchSetFederatedBundleRequest(
            bundle=[types_bundle_pb2.Bundle(trust_domain=name) for name in names]
        )
    )


def everything(path: str) -> Any:
    """An entry that has a value in every field that can be given."""
    return an_entry(
        path,
        "unix:uid:7",
        "k8s:pod-label:a,b:c",
        id=f"id-of{path.replace('/', '.')}",
        x509_svid_ttl=61,
        jwt_svid_ttl=62,
        federates_with=["b.test", "a.test"],
        admin=True,
        downstream=True,
        expires_at=4_102_444_800,
        dns_names=["b.example.org", "a.example.org"],
        hint="hint",
        additional_attributes=Entry.AdditionalAttributes(
            disable_x509_svid_prefetch=True, jwt_svid_include_jti=True
        ),
    )


async def test_every_field_comes_back(running: Running) -> None:
    """What is given is stored and answered; sets are sorted, revision and creation are ours."""
    await federate(running, "a.test", "b.test")
    given = everything("/whole")
    given.revision_number, given.created_at = 9, 2**62  # output only: nobody looks
    (result,) = await create(running, given)
    assert (result.status.code, result.status.message) == (0, "OK")
    wanted = everything("/whole")
    wanted.created_at = result.entry.created_at
    wanted.federates_with[:] = ["a.test", "b.test"]
    wanted.selectors.sort(key=lambda one: (one.type, one.value))
    assert result.entry == wanted
    assert abs(result.entry.created_at - running.server.own.clock.now().timestamp()) < 60
    assert await get(running, wanted.id) == wanted
    (stored,) = await create(running, an_entry("/store", store_svid=True))
    assert stored.entry.store_svid
    assert not stored.entry.HasField("additional_attributes")


async def test_names_may_be_given_in_full(running: Running) -> None:
    """A trust domain may be given as its ID; the answer has the bare name (3.7)."""
    await federate(running, "full.test")
    given = an_entry("/full", federates_with=["spiffe://full.test"])
    given.spiffe_id.trust_domain = given.parent_id.trust_domain = "spiffe://example.org"
    (result,) = await create(running, given)
    assert result.entry.spiffe_id == id_message("/full")
    assert result.entry.parent_id == id_message(PARENT)
    assert list(result.entry.federates_with) == ["full.test"]


async def test_ids_are_made_or_taken(running: Running) -> None:
    """An entry without an ID gets one; a chosen one is kept, once."""
    made, mine = await create(running, an_entry("/i1"), an_entry("/i2", id="Mine-_.1"))
    assert len(made.entry.id) == 36
    assert mine.entry.id == "Mine-_.1"
    (again,) = await create(running, an_entry("/i3", id="Mine-_.1"))
    assert codes([again]) == [6]
    assert not again.HasField("entry")


async def test_a_similar_entry_is_answered_with_status_6(running: Running) -> None:
    """SPIRE API 5.1: same ID, parent and selectors: 6 and the one there, masked."""
    first = (await create(running, an_entry("/same", "a:1", "b:2")))[0].entry
    again = an_entry("/same", "b:2", "a:1", "b:2", hint="other", id="another")
    (result,) = await create(running, again)
    assert (result.status.code, result.entry) == (6, first)
    assert result.status.message == "similar entry already exists"
    (result,) = await create(running, again, output=mask(Mask, "hint"))
    assert (result.status.code, result.entry) == (6, Entry(id=first.id))
    one, two = await create(running, an_entry("/twice"), an_entry("/twice"))
    assert codes([one, two]) == [0, 6]
    assert one.entry == two.entry


async def test_racing_creations_make_one(running: Running) -> None:
    """Sixteen who create the same entry at once get one entry, and all of them its ID."""
    results = await asyncio.gather(*(create(running, an_entry("/race")) for _ in range(16)))
    flat = [one for (one,) in results]
    assert sorted(codes(flat)) == [0] + [6] * 15
    assert len({one.entry.id for one in flat}) == 1


BAD = {
    "no parent": (lambda e: e.ClearField("parent_id"), "parent ID"),
    "foreign parent": (lambda e: setattr(e.parent_id, "trust_domain", "x.org"), "parent ID"),
    "parent without path": (lambda e: setattr(e.parent_id, "path", ""), "parent ID"),
    "parent with a slash": (lambda e: setattr(e.parent_id, "path", "/a/"), "parent ID"),
    "no id": (lambda e: e.ClearField("spiffe_id"), "spiffe ID"),
    "foreign id": (lambda e: setattr(e.spiffe_id, "trust_domain", "x.org"), "spiffe ID"),
    "empty path": (lambda e: setattr(e.spiffe_id, "path", ""), "path is empty"),
    "reserved root": (lambda e: setattr(e.spiffe_id, "path", "/spire"), "reserved"),
    "agent": (lambda e: setattr(e.spiffe_id, "path", "/spire/agent/x"), "reserved"),
    "server": (lambda e: setattr(e.spiffe_id, "path", "/spire/server"), "reserved"),
    "dots": (lambda e: setattr(e.spiffe_id, "path", "/a/../b"), "spiffe ID"),
    "newline": (lambda e: setattr(e.spiffe_id, "path", "/a\n"), "spiffe ID"),
    "upper case": (lambda e: setattr(e.spiffe_id, "trust_domain", "Example.org"), "spiffe ID"),
    "no selector": (lambda e: e.ClearField("selectors"), "selector list is empty"),
    "no type": (lambda e: setattr(e.selectors[0], "type", ""), "missing selector type"),
    "colon": (lambda e: setattr(e.selectors[0], "type", "a:b"), "contains ':'"),
    "no value": (lambda e: setattr(e.selectors[0], "value", ""), "missing selector value"),
    "65 selectors": (
        lambda e: [e.selectors.add(type="k", value=str(n)) for n in range(64)],
        "64",
    ),
    "dns dot": (lambda e: e.dns_names.append("a.example.org."), "invalid DNS name"),
    "dns upper": (lambda e: e.dns_names.append("A.example.org"), "invalid DNS name"),
    "dns star": (lambda e: e.dns_names.append("a.*.org"), "invalid DNS name"),
    "dns empty": (lambda e: e.dns_names.append(""), "invalid DNS name"),
    "65 dns names": (lambda e: e.dns_names.extend(f"n{n}" for n in range(65)), "64"),
    "federated": (lambda e: e.federates_with.append("A b"), "invalid federated trust domain"),
    "own domain": (lambda e: e.federates_with.append("example.org"), "federated trust domain"),
    "hint": (lambda e: setattr(e, "hint", "h" * 1025), "hint is too long"),
    "x509 ttl": (lambda e: setattr(e, "x509_svid_ttl", -1), "TTL"),
    "jwt ttl": (lambda e: setattr(e, "jwt_svid_ttl", -1), "TTL"),
    "long id": (lambda e: setattr(e, "id", "i" * 256), "too long"),
    "odd id": (lambda e: setattr(e, "id", "a b"), "invalid characters"),
    "year 300000": (lambda e: setattr(e, "expires_at", 2**62), "out of range"),
    "too big": (lambda e: setattr(e.selectors[0], "value", "v" * 300_000), "longer than"),
    "stored, two types": (
        lambda e: (setattr(e, "store_svid", True), e.selectors.add(type="k", value="v")),
        "selector types must be the same",
    ),
    "stored, no prefetch": (
        lambda e: (
            setattr(e, "store_svid", True),
            setattr(e.additional_attributes, "disable_x509_svid_prefetch", True),
        ),
        "cache behaviour",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_sec_04_a_bad_item_is_refused_alone(running: Running, case: str) -> None:
    """SEC-04, SEC-80: a bad item gets 3 and a reason; its neighbours are created."""
    spoil, text = BAD[case]
    bad = an_entry("/bad")
    spoil(bad)
    name = case.replace(" ", "").replace(",", "")
    results = await create(running, an_entry(f"/l-{name}"), bad, an_entry(f"/r-{name}"))
    assert codes(results) == [0, 3, 0]
    assert results[1].status.message.startswith("failed to convert entry: ")
    assert text in results[1].status.message
    assert not results[1].HasField("entry")


async def test_limits_are_inclusive(running: Running) -> None:
    """What is just at a limit is stored (table 1)."""
    at_limit = an_entry(
        "/limit",
        *[f"k:{number}" for number in range(64)],
        id="i" * 255,
        hint="h" * 1024,
        dns_names=[f"n{number}.example.org" for number in range(64)],
        x509_svid_ttl=2**31 - 1,
        jwt_svid_ttl=2**31 - 1,
    )
    (result,) = await create(running, at_limit)
    assert result.status.code == 0, result.status.message


async def test_a_bundle_must_be_there(running: Running) -> None:
    """SPIRE API 5.1: to federate with a domain whose bundle is not held is status 13."""
    (result,) = await create(running, an_entry("/fed", federates_with=["nobody.test"]))
    assert codes([result]) == [13]
    assert 'unable to find federated bundle "spiffe://nobody.test"' in result.status.message
    assert not result.HasField("entry")


async def test_batches_hold_a_thousand(running: Running) -> None:
    """SEC-80: 1,001 items are refused before one is looked at; none is no item at all."""
    over = [an_entry(f"/n{number}") for number in range(1001)]
    async with refused(Code.RESOURCE_EXHAUSTED, "1000"):
        await create(running, *over)
    async with refused(Code.RESOURCE_EXHAUSTED, "1000"):
        await update(running, *over)
    async with refused(Code.RESOURCE_EXHAUSTED, "1000"):
        await delete(running, *["x"] * 1001)
    assert list(await create(running)) == []
    assert list(await update(running)) == []
    assert list(await delete(running)) == []
    made = await create(running, *over[:1000])
    assert codes(made) == [0] * 1000
    assert [one.entry.spiffe_id.path for one in made] == [f"/n{n}" for n in range(1000)]
    assert codes(await delete(running, *[one.entry.id for one in made])) == [0] * 1000


async def test_get_says_what_is_wrong(running: Running) -> None:
    """GetEntry: an empty ID is malformed, an unknown one is not found."""
    async with refused(Code.INVALID_ARGUMENT, "missing ID"):
        await get(running, "")
    async with refused(Code.NOT_FOUND, "entry not found"):
        await get(running, "nobody")


FIELDS = [field.name for field in Mask.DESCRIPTOR.fields]


async def test_output_masks(running: Running) -> None:
    """A mask yields its fields and the id; an empty one the id; none yields everything."""
    await federate(running, "a.test", "b.test")
    whole = (await create(running, everything("/masks")))[0].entry
    whole = (await update(running, whole))[0].entry  # so that the revision is not zero
    assert await get(running, whole.id, Mask()) == Entry(id=whole.id)
    for name in FIELDS:
        found = await get(running, whole.id, mask(Mask, name))
        assert {field.name for field, _ in found.ListFields()} <= {"id", name}
        assert getattr(found, name) == getattr(whole, name)
    assert await get(running, whole.id, mask(Mask, *FIELDS)) == whole
    (result,) = await create(running, an_entry("/masked"), output=mask(Mask, "spiffe_id"))
    assert result.entry == Entry(id=result.entry.id, spiffe_id=id_message("/masked"))


async def test_an_update_without_a_mask_clears_what_is_left_out(running: Running) -> None:
    """SPIRE API 3.4: no input mask means every field; the revision grows, changed or not."""
    await federate(running, "a.test", "b.test")
    whole = (await create(running, everything("/clear")))[0].entry
    bare = an_entry("/clear", "unix:uid:7", id=whole.id)
    (result,) = await update(running, bare)
    assert result.status.code == 0, result.status.message
    bare.created_at, bare.revision_number = whole.created_at, 1
    assert result.entry == bare
    (result,) = await update(running, result.entry)
    assert result.entry.revision_number == 2
    (result,) = await update(running, result.entry, output=mask(Mask, "revision_number"))
    assert result.entry == Entry(id=whole.id, revision_number=3)


MASKED = {
    "spiffe_id": id_message("/other-path"),
    "parent_id": id_message("/spire/agent/x/other"),
    "selectors": [types_pb2.Entry().selectors.add(type="new", value="v")],
    "x509_svid_ttl": 1,
    "federates_with": ["c.test"],
    "admin": False,
    "downstream": False,
    "expires_at": 0,
    "dns_names": ["c.example.org"],
    "store_svid": False,
    "jwt_svid_ttl": 2,
    "hint": "other",
    "additional_attributes": Entry.AdditionalAttributes(jwt_svid_include_jti=True),
}


@pytest.mark.parametrize("name", FIELDS)
async def test_an_update_with_a_mask_changes_that_alone(running: Running, name: str) -> None:
    """SPIRE API 3.4, 5.1: masked-out fields keep their values, however they are given."""
    await federate(running, "a.test", "b.test", "c.test")
    before = (await create(running, everything(f"/mask-{name}")))[0].entry
    given = Entry(id=before.id, created_at=1, revision_number=77)
    wanted = Entry()
    wanted.CopyFrom(before)
    wanted.revision_number = 1
    if name in MASKED:
        value = MASKED[name]
        for target in (given, wanted):
            target.ClearField(name)
            if isinstance(value, list):
                getattr(target, name).extend(value)
            elif isinstance(value, (bool, int, str)):
                setattr(target, name, value)
            else:
                getattr(target, name).CopyFrom(value)
    (result,) = await update(running, given, given=mask(Mask, name))
    assert result.status.code == 0, result.status.message
    assert result.entry == wanted
    assert await get(running, before.id) == wanted


async def test_a_masked_field_can_be_cleared(running: Running) -> None:
    """A field that is masked in and left out is cleared, where that is allowed."""
    await federate(running, "a.test", "b.test")
    before = (await create(running, everything("/cleared")))[0].entry
    names = ["federates_with", "dns_names", "hint", "additional_attributes", "expires_at"]
    (result,) = await update(running, Entry(id=before.id), given=mask(Mask, *names))
    for name in names:
        before.ClearField(name)
    before.revision_number = 1
    assert result.entry == before
    for name in ("selectors", "spiffe_id", "parent_id"):
        (result,) = await update(running, Entry(id=before.id), given=mask(Mask, name))
        assert codes([result]) == [3]
        assert not result.HasField("entry")
    assert await get(running, before.id) == before


async def test_an_empty_mask_changes_the_revision_alone(running: Running) -> None:
    """A present but empty input mask changes nothing but the revision."""
    before = (await create(running, an_entry("/none", hint="h")))[0].entry
    given = an_entry("/elsewhere", id=before.id, hint="other")
    (result,) = await update(running, given, given=Mask())
    before.revision_number = 1
    assert result.entry == before


async def test_masked_updates_at_once_all_count(running: Running) -> None:
    """Sixteen who each change one field of one entry at once all get their way."""
    entry = (await create(running, an_entry("/at-once")))[0].entry
    changes = [
        ("hint", {"hint": "new"}),
        ("x509_svid_ttl", {"x509_svid_ttl": 11}),
        ("jwt_svid_ttl", {"jwt_svid_ttl": 12}),
        ("admin", {"admin": True}),
    ] * 4
    await asyncio.gather(
        *(
            update(running, Entry(id=entry.id, **given), given=mask(Mask, name))
            for name, given in changes
        )
    )
    found = await get(running, entry.id)
    assert (found.hint, found.x509_svid_ttl, found.jwt_svid_ttl) == ("new", 11, 12)
    assert found.admin
    assert found.revision_number == 16


async def test_updates_that_fail_say_why(running: Running) -> None:
    """Unknown 5, malformed 3, bundle not held 13, similar to another 6; never an entry."""
    one, two = await create(running, an_entry("/u1"), an_entry("/u2"))
    twin = an_entry("/u1", id=two.entry.id)
    results = await update(
        running,
        an_entry("/u", id="nobody"),
        an_entry("/u"),
        an_entry("/spire/x", id=one.entry.id),
        an_entry("/u1", id=one.entry.id, federates_with=["nobody.test"]),
        twin,
        an_entry("/u1", id=one.entry.id, hint="fine"),
    )
    assert codes(results) == [5, 3, 3, 13, 6, 0]
    assert [one.HasField("entry") for one in results] == [False] * 5 + [True]
    assert results[0].status.message == "entry not found"  # 3.2: nothing behind it
    masked = await update(running, Entry(id="nobody"), Entry(), given=mask(Mask, "hint"))
    assert codes(masked) == [5, 3]
    assert (await get(running, two.entry.id)).spiffe_id.path == "/u2"


async def test_deletions_echo_each_id(running: Running) -> None:
    """Status 0, 5 for one that is gone, 3 for none; each result has the id it is about."""
    (made,) = await create(running, an_entry("/gone"))
    results = await delete(running, made.entry.id, made.entry.id, "", "nobody")
    assert codes(results) == [0, 5, 3, 5]
    assert [one.id for one in results] == [made.entry.id, made.entry.id, "", "nobody"]
    async with refused(Code.NOT_FOUND):
        await get(running, made.entry.id)


async def test_sec_47_an_id_never_comes_back_with_its_revision(running: Running) -> None:
    """SEC-47: deleted and created anew under one id, an entry counts on."""
    await create(running, an_entry("/v1", id="again"))
    await update(running, an_entry("/v2", id="again"))
    await delete(running, "again")
    (result,) = await create(running, an_entry("/v3", id="again"))
    assert result.entry.revision_number == 2


async def test_the_controllers_probe(running: Running) -> None:
    """SPIRE API 11: the probe entry is taken though no agent is its parent, twice 6."""
    probe = an_entry(
        "/spire-controller-manager/unsupported-fields-test",
        "a:1",
        parent="/spire-controller-manager/unsupported-fields-test",
        x509_svid_ttl=60,
        jwt_svid_ttl=60,
        store_svid=True,
        hint="hint",
    )
    first, again = await create(running, probe, probe)
    assert codes([first, again]) == [0, 6]
    for one in (first.entry, again.entry):
        assert (one.hint, one.jwt_svid_ttl, one.store_svid) == ("hint", 60, True)
    assert codes(await delete(running, first.entry.id)) == [0]


async def test_what_is_acknowledged_outlives_the_server() -> None:
    """SEC-101: an entry that was answered is there when another server opens the database."""
    with a_folder() as folder:
        async with serving(folder) as server:
            async with channel_to(server.settings.admin_socket_path) as channel:
                request = entry_pb2.BatchCreateEntryRequest(entries=[an_entry("/kept")])
                answer = await Calls(channel).entry.BatchCreateEntry(request)
        async with serving(folder) as server:
            async with channel_to(server.settings.admin_socket_path) as channel:
                listed = await Calls(channel).entry.ListEntries(entry_pb2.ListEntriesRequest())
    assert list(listed.entries) == [answer.results[0].entry]


async def test_messages_over_4_mib_are_refused(running: Running) -> None:
    """SEC-80: a request over 4 MiB is refused before anything of it is acted upon."""
    heavy = [an_entry(f"/h{n}", *[f"k{m}:{'v' * 3900}" for m in range(60)]) for n in range(19)]
    async with refused(Code.RESOURCE_EXHAUSTED):
        await create(running, *heavy)
    found = await running.local.entry.CountEntries(
        entry_pb2.CountEntriesRequest(
            filter=entry_pb2.CountEntriesRequest.Filter(by_spiffe_id=id_message("/h0"))
        )
    )
    assert found.count == 0
