"""
The Workload API (WAPI) of a real agent that follows a real server, by raw gRPC; and
ValidateJWTSVID on tokens that no server would sign, at the real servicer.

One file a standard, in the order of its clauses: hence over 500 lines.
"""

import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_der_x509_certificate
from google.protobuf.json_format import MessageToDict

from spiffe_core.authority import X509Authority
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.bundle_document import bundle_from_jwks
from spiffe_core.der import split_certificates
from spiffe_core.jwtsvid import verify_jwt_svid
from spiffe_core.keys import spki_of
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import verify_x509_svid
from spiffe_wire.pb import workloadapi_pb2 as pb
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.security_header import METADATA
from tests.support.authorities import NOW, a_key
from tests.support.ca import FakeCa
from tests.support.endpoint import an_endpoint, ending, fetch, read
from tests.support.stack import Stack, a_stack
from tests.support.store import an_entry
from tests.support.tokens import (
    MISSING,
    SECONDS,
    a_bundle,
    a_token,
    claims_of,
    header_of,
    sealed,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

Code = grpc.StatusCode
ME = f"unix:uid:{os.geteuid()}"
PARTNER = FakeCa("partner.test")
TD = TrustDomain("example.org")
WEB, API = "spiffe://example.org/web", "spiffe://example.org/api"


@dataclass
class World:
    """A stack in which this process has two identities, and a third that its hint costs it."""

    stack: Stack
    web: Any
    api: Any
    clash: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """One for all tests here, which leave it as they found it."""
    async with a_stack(agent_changes={"workloads": {"no_identity_grace": "0s"}}) as stack:
        add, agent = stack.server.add_entry, stack.agent.agent_id
        await stack.server.set_bundle(PARTNER.bundle)
        web = await add("/web", agent, ME, hint="internal", federates_with=["partner.test"])
        api = await add("/api", agent, ME, hint="external", dns_names=["api.example.org"])
        clash = await add("/clash", agent, ME, hint="internal")
        await add("/stranger", agent, "unix:uid:4242", hint="theirs")
        await stack.agent.until_svids(4)
        yield World(stack, web, api, clash)


@pytest_asyncio.fixture(loop_scope="module")
async def stub(world: World) -> AsyncIterator[Any]:
    """A connection of its own for each test."""
    async with world.stack.agent.workload() as channel:
        yield workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)


async def fetch_jwt(stub: Any, *audience: str, spiffe_id: str = "") -> Any:
    """A FetchJWTSVID."""
    request = pb.JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id)
    return await stub.FetchJWTSVID(request, metadata=METADATA, timeout=10)


async def validate(stub: Any, token: str, audience: str = "db") -> Any:
    """A ValidateJWTSVID."""
    request = pb.ValidateJWTSVIDRequest(audience=audience, svid=token)
    return await stub.ValidateJWTSVID(request, metadata=METADATA, timeout=10)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a unary call is refused; it must be."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def bundles(stub: Any) -> BundleSet:
    """The bundles of this process, as a workload puts them together."""
    x509 = (await read(fetch(stub, "FetchX509Bundles"))).bundles
    jwts = (await read(fetch(stub, "FetchJWTBundles"))).bundles
    found = []
    for name in {*x509, *jwts}:
        domain = TrustDomain(name.removeprefix("spiffe://"))
        keys = bundle_from_jwks(domain, jwts[name]).jwt_authorities if name in jwts else ()
        roots = split_certificates(x509[name]) if name in x509 else ()
        found.append(Bundle(domain, tuple(X509Authority.parse(one) for one in roots), keys))
    return BundleSet.of(found)


# X.509


async def test_wapi_23_an_svid_for_each_identity(stub: Any) -> None:
    """WAPI-23, WAPI-25, WAPI-56, IOP-28: both identities, the older first, one a hint."""
    message = await read(fetch(stub), within=1)
    assert [(one.spiffe_id, one.hint) for one in message.svids] == [
        (WEB, "internal"), (API, "external"),
    ]  # fmt: skip


async def test_wapi_56_the_same_order_each_time(world: World, stub: Any) -> None:
    """WAPI-56: the default identity is the same on each connection and in each update."""
    call = fetch(stub)
    orders = [[one.spiffe_id for one in (await read(call)).svids]]
    await world.stack.agent.renew()
    orders.append([one.spiffe_id for one in (await read(call)).svids])
    for _ in range(3):
        orders.append([one.spiffe_id for one in (await read(fetch(stub))).svids])
    assert orders == [[WEB, API]] * 5


async def test_wapi_17_the_encodings(stub: Any) -> None:
    """WAPI-17, WAPI-18, WAPI-19, WAPI-20, WAPI-24: DER and PKCS#8, whole and matching."""
    message = await read(fetch(stub))
    assert not message.crl
    for one in message.svids:
        chain = split_certificates(one.x509_svid)
        leaf = load_der_x509_certificate(chain[0])
        key = serialization.load_der_private_key(one.x509_svid_key, None)
        assert (
            key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            == one.x509_svid_key
        )
        assert spki_of(key.public_key()) == spki_of(leaf.public_key())
        roots = split_certificates(one.bundle)
        assert not set(roots) & set(chain)
        verified = verify_x509_svid(chain, await bundles(stub), at=datetime.now(UTC))
        assert verified.spiffe_id.uri == one.spiffe_id


async def test_wapi_21_foreign_bundles(stub: Any) -> None:
    """WAPI-21, IOP-04: the partner's bundle, by its SPIFFE ID; ours is not among them."""
    message = await read(fetch(stub))
    assert dict(message.federated_bundles) == {"spiffe://partner.test": PARTNER.authority.der}


async def test_wapi_29_x509_bundles(stub: Any) -> None:
    """WAPI-29: both domains' bundles, our own with the bytes that the SVIDs come with."""
    message = await read(fetch(stub, "FetchX509Bundles"), within=1)
    svids = (await read(fetch(stub))).svids
    assert dict(message.bundles) == {
        "spiffe://example.org": svids[0].bundle,
        "spiffe://partner.test": PARTNER.authority.der,
    }
    assert not message.crl


# Updates


async def test_wapi_09_every_kind_of_change(world: World, stub: Any) -> None:
    """WAPI-08, WAPI-09: added, changed, renewed, deleted: each is pushed, and whole."""
    server, call = world.stack.server, fetch(stub)
    first = await read(call)
    entry = await server.add_entry("/new", world.stack.agent.agent_id, ME)
    second = await read(call, within=2)
    assert [one.spiffe_id for one in second.svids] == [WEB, API, "spiffe://example.org/new"]
    assert second.svids[0] == first.svids[0]
    entry.dns_names.append("new.example.org")
    await server.update_entry(entry)
    third = await read(call, within=2)
    while b"new.example.org" not in third.svids[2].x509_svid:
        third = await read(call, within=2)
    assert third.svids[:2] == second.svids[:2]
    await world.stack.agent.renew()
    fourth = await read(call, within=2)
    assert all(
        new.x509_svid != old.x509_svid and new.x509_svid_key != old.x509_svid_key
        for new, old in zip(fourth.svids, third.svids, strict=True)
    )
    await server.delete_entries(entry)
    last = await read(call, within=2)
    assert [one.spiffe_id for one in last.svids] == [WEB, API]


async def test_wapi_09_a_changed_foreign_bundle(world: World, stub: Any) -> None:
    """WAPI-08, WAPI-09: a partner's new root reaches each of the three streams."""
    calls = [
        fetch(stub, name) for name in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles")
    ]
    before = [await read(call) for call in calls]
    second = FakeCa("partner.test", which="second")
    k2 = replace(PARTNER.bundle.jwt_authorities[0], key_id="k2")
    changed = replace(
        PARTNER.bundle,
        x509_authorities=(PARTNER.authority, second.authority),
        jwt_authorities=(*PARTNER.bundle.jwt_authorities, k2),
    )
    await world.stack.server.set_bundle(changed)
    x509, x509_bundles, jwts = [await read(call, within=2) for call in calls]
    both = PARTNER.authority.der + second.authority.der
    assert x509.federated_bundles["spiffe://partner.test"] == both
    assert x509.svids == before[0].svids
    assert x509_bundles.bundles["spiffe://partner.test"] == both
    kids = [one["kid"] for one in json.loads(jwts.bundles["spiffe://partner.test"])["keys"]]
    assert kids == ["k1", "k2"]
    await world.stack.server.set_bundle(PARTNER.bundle)
    for call, old in zip(calls, before, strict=True):
        assert await read(call, within=2) == old


async def test_wapi_25_a_hint_that_is_free_again(world: World, stub: Any) -> None:
    """WAPI-25, IOP-28: when the older entry goes the other one of its hint is served."""
    server, call = world.stack.server, fetch(stub)
    await read(call)
    entry = await server.add_entry("/third", world.stack.agent.agent_id, ME, hint="third")
    await read(call)
    twin = await server.add_entry("/twin", world.stack.agent.agent_id, ME, hint="third")
    await world.stack.agent.until_svids(6)
    await server.delete_entries(entry)
    found = {one.hint: one.spiffe_id for one in (await read(call)).svids}
    if "third" not in found:
        found = {one.hint: one.spiffe_id for one in (await read(call)).svids}
    assert found["third"] == "spiffe://example.org/twin"
    await server.delete_entries(twin)


async def test_wapi_27_losing_every_entry(world: World) -> None:
    """WAPI-27, WAPI-30, WAPI-42, IOP-09, SEC-36: every stream ends, PERMISSION_DENIED."""
    server, agent = world.stack.server, world.stack.agent
    names = ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles")
    async with agent.workload() as channel:
        stub = workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        calls = [fetch(stub, name) for name in names]
        for call in calls:
            await read(call)
        started = time.monotonic()
        await server.delete_entries(world.web, world.api, world.clash)
        for call in calls:
            code, text = await ending(call)
            assert code is Code.PERMISSION_DENIED and "no identity issued" in text
        assert time.monotonic() - started < 5
        for name in names:
            assert (await ending(fetch(stub, name)))[0] is Code.PERMISSION_DENIED
        assert (await refusal(fetch_jwt(stub, "db")))[0] is Code.PERMISSION_DENIED
        assert (await refusal(validate(stub, "a.b.c")))[0] is Code.PERMISSION_DENIED
    for name in ("web", "api", "clash"):
        old = getattr(world, name)
        fields = {
            "hint": old.hint,
            "dns_names": old.dns_names,
            "federates_with": old.federates_with,
        }
        made = await server.add_entry(f"/{name}", agent.agent_id, ME, **fields)
        setattr(world, name, made)
    await agent.until_svids(4)


# JWT


async def test_wapi_33_tokens_for_all_identities(stub: Any) -> None:
    """WAPI-33, WAPI-35, WAPI-36, WAPI-56: one token for each identity, in the same order."""
    answer = await fetch_jwt(stub, "db")
    assert [(one.spiffe_id, one.hint) for one in answer.svids] == [
        (WEB, "internal"), (API, "external"),
    ]  # fmt: skip
    for one in answer.svids:
        assert jwt.decode(one.svid, options={"verify_signature": False})["sub"] == one.spiffe_id


async def test_wapi_34_one_identity(stub: Any) -> None:
    """WAPI-34: asked for one SPIFFE ID the answer is that one alone."""
    answer = await fetch_jwt(stub, "db", spiffe_id=API)
    assert [one.spiffe_id for one in answer.svids] == [API]


AUDIENCES = [
    (["a"], ["a"]),
    (["a", "b"], ["a", "b"]),
    (["b", "a", "b", "a"], ["b", "a"]),
    (["", "a", ""], ["a"]),
    (["https://db.example.org/path?x=1", "spiffe://example.org/db", "ü"], None),
    ([f"audience {n}" for n in range(16)], None),
    (["x" * 255], None),
]


@pytest.mark.parametrize(("asked", "expected"), AUDIENCES)
async def test_wapi_32_the_audience(stub: Any, asked: list[str], expected: Any) -> None:
    """WAPI-32, C-23, IOP-29: each token carries exactly the audiences that were asked for."""
    answer = await fetch_jwt(stub, *asked)
    assert len(answer.svids) == 2
    for one in answer.svids:
        claims = jwt.decode(one.svid, options={"verify_signature": False})
        assert sorted(claims["aud"]) == sorted(expected or asked)


NO_AUDIENCE = [
    [],
    [""],
    ["", ""],
    [f"audience {n}" for n in range(17)],
    ["x" * 256],
    ["é" * 128],
]


@pytest.mark.parametrize("asked", NO_AUDIENCE, ids=[len(one) for one in NO_AUDIENCE])
async def test_wapi_14_no_audience(stub: Any, asked: list[str]) -> None:
    """WAPI-14, C-23, SEC-26: none, only empty ones, too many or too long: INVALID_ARGUMENT."""
    assert (await refusal(fetch_jwt(stub, *asked)))[0] is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("spiffe_id", "code"),
    [
        ("spiffe://example.org/stranger", Code.PERMISSION_DENIED),
        ("spiffe://example.org/nobody", Code.PERMISSION_DENIED),
        ("spiffe://example.org", Code.PERMISSION_DENIED),
        ("spiffe://example.org/Web", Code.PERMISSION_DENIED),
        ("spiffe://other.test/web", Code.PERMISSION_DENIED),
        ("spiffe://example.org/web/", Code.INVALID_ARGUMENT),
        ("spiffe://EXAMPLE.org/web", Code.INVALID_ARGUMENT),
        ("example.org/web", Code.INVALID_ARGUMENT),
        ("x", Code.INVALID_ARGUMENT),
        ("spiffe://example.org/web\n", Code.INVALID_ARGUMENT),
        ("spiffe://example.org/" + "a" * 2048, Code.INVALID_ARGUMENT),
    ],
)
async def test_wapi_37_another_identity(stub: Any, spiffe_id: str, code: Any) -> None:
    """WAPI-37, C-19: not the caller's: PERMISSION_DENIED; not an ID: INVALID_ARGUMENT."""
    assert (await refusal(fetch_jwt(stub, "db", spiffe_id=spiffe_id)))[0] is code


async def test_the_order_of_checks(world: World, stub: Any) -> None:
    """Conformance 3.1: the fields are looked at before the caller is."""
    await world.stack.server.delete_entries(world.web, world.api, world.clash)
    await world.stack.agent.process.until(lambda: _has_entries(world, 1))
    try:
        assert (await refusal(fetch_jwt(stub)))[0] is Code.INVALID_ARGUMENT
        assert (await refusal(fetch_jwt(stub, "a", spiffe_id="x")))[0] is Code.INVALID_ARGUMENT
        assert (await refusal(validate(stub, "")))[0] is Code.INVALID_ARGUMENT
        assert (await refusal(validate(stub, "a.b.c", "")))[0] is Code.INVALID_ARGUMENT
        assert (await refusal(fetch_jwt(stub, "a")))[0] is Code.PERMISSION_DENIED
        assert (await refusal(validate(stub, "a.b.c")))[0] is Code.PERMISSION_DENIED
    finally:
        for name in ("web", "api", "clash"):
            old = getattr(world, name)
            made = await world.stack.server.add_entry(
                f"/{name}", world.stack.agent.agent_id, ME, hint=old.hint,
                dns_names=old.dns_names, federates_with=old.federates_with,
            )  # fmt: skip
            setattr(world, name, made)
        await world.stack.agent.until_svids(4)


async def _has_entries(world: World, count: int) -> bool:
    status = await world.stack.agent.status()
    return status is not None and status.entries == count


async def test_wapi_39_jwt_bundles(stub: Any) -> None:
    """WAPI-39, WAPI-40, WAPI-41, IOP-01, IOP-02: plain JWK Sets of JWT keys, by domain."""
    message = await read(fetch(stub, "FetchJWTBundles"), within=1)
    assert set(message.bundles) == {"spiffe://example.org", "spiffe://partner.test"}
    for data in message.bundles.values():
        document = json.loads(data.decode("utf-8"))
        assert document.keys() == {"keys"} and document["keys"]
        for key in document["keys"]:
            assert key["kid"] and key["kty"] in ("EC", "RSA")
            assert not {"use", "x5c", "d", "p", "q", "k"} & key.keys()
        kids = [key["kid"] for key in document["keys"]]
        assert len(set(kids)) == len(kids)


async def test_a_token_verifies_by_the_bundles_alone(stub: Any) -> None:
    """WAPI-59, WAPI-38: a token verifies with its own domain's keys from FetchJWTBundles."""
    (token,) = (await fetch_jwt(stub, "db", spiffe_id=WEB)).svids
    svid = verify_jwt_svid(token.svid, await bundles(stub), audience="db", at=datetime.now(UTC))
    assert svid.spiffe_id.uri == WEB


async def test_wapi_45_our_own_token_validates(stub: Any) -> None:
    """WAPI-43, WAPI-44, WAPI-45, IOP-23: ID and claims come back; `aud` is a list."""
    for audience in (["db"], ["db", "cache"]):
        (token,) = (await fetch_jwt(stub, *audience, spiffe_id=WEB)).svids
        answer = await validate(stub, token.svid)
        claims = MessageToDict(answer.claims)
        assert answer.spiffe_id == claims["sub"] == WEB
        assert sorted(claims["aud"]) == sorted(audience)
        assert claims["exp"] > time.time()
        assert claims == jwt.decode(token.svid, options={"verify_signature": False})
        assert (await refusal(validate(stub, token.svid, "other")))[0] is Code.INVALID_ARGUMENT


async def test_iop_13_tokens_are_used_again(stub: Any) -> None:
    """IOP-13: the same token is answered again while it is fresh, in whatever order."""
    first = await fetch_jwt(stub, "x", "y", spiffe_id=WEB)
    assert await fetch_jwt(stub, "y", "x", spiffe_id=WEB) == first


@pytest.mark.parametrize("method", ["FetchWITSVID", "FetchWITBundles"])
async def test_wapi_46_no_wit(stub: Any, method: str) -> None:
    """WAPI-02, WAPI-46, WEP-23: the WIT profile is not offered: UNIMPLEMENTED, at once."""
    request = {"FetchWITSVID": pb.WITSVIDRequest, "FetchWITBundles": pb.WITBundlesRequest}[
        method
    ]()
    assert (await ending(getattr(stub, method)(request, metadata=METADATA)))[
        0
    ] is Code.UNIMPLEMENTED


# ValidateJWTSVID on tokens that no server would sign


TENANT = an_entry(
    "/me", id="me", created_at=NOW, federates_with=frozenset({TrustDomain("partner.test")})
)
PARTNERS = a_bundle("partner.test", "partner")


async def judged(token: str, audience: str = "db") -> Any:
    """What the servicer answers to *token* at the instant `NOW`: a message, or an error."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        own = replace(
            endpoint.ca.bundle, jwt_authorities=a_bundle("example.org").jwt_authorities
        )
        stranger = a_bundle("stranger.test", "stranger")
        endpoint.cache.apply(snapshot=False, bundles=[own, PARTNERS, stranger])
        endpoint.put(TENANT)
        try:
            return await validate(stub, token, audience)
        except grpc.aio.AioRpcError as error:
            return error


def _foreign(which: str, domain: str, **claims: Any) -> str:
    key = a_key("p256", which)
    return sealed(
        header_of("ES256"),
        claims_of(sub=f"spiffe://{domain}/w", **claims),
        algorithm="ES256",
        key=key,
    )


RIGHT = {
    "every algorithm": [
        a_token(name) for name in ("RS256", "PS384", "ES256", "ES384", "ES512")
    ],
    "one audience as text": [a_token(aud="db")],
    "among others": [a_token(aud=["a", "db", "b"])],
    "no typ": [a_token(header=header_of("ES256", typ=MISSING))],
    "typ JOSE": [a_token(header=header_of("ES256", typ="JOSE"))],
    "no iat": [a_token(iat=MISSING)],
    "within the leeway": [a_token(exp=SECONDS - 29)],
    "a partner's": [_foreign("partner", "partner.test")],
    "a subject without a path": [a_token(sub="spiffe://example.org")],
}


@pytest.mark.parametrize("right", RIGHT)
async def test_wapi_43_good_tokens(right: str) -> None:
    """WAPI-43, JWT-04, JWT-12, JWT-32: what the standard calls valid is valid."""
    for token in RIGHT[right]:
        answer = await judged(token)
        assert isinstance(answer, pb.ValidateJWTSVIDResponse), answer
        assert answer.spiffe_id == jwt.decode(token, options={"verify_signature": False})["sub"]


WRONG = {
    "empty parts": "..",
    "two parts": "a.b",
    "no JSON": "a.b.c",
    "none": sealed(header_of("none"), claims_of(), algorithm="none", key=b""),
    "HS256": sealed(
        header_of("HS256", kid="ES256"), claims_of(), algorithm="HS256", key=b"x" * 32
    ),
    "another key": a_token(key=a_key("p256", "unknown")),
    "unknown kid": a_token(header=header_of("ES256", kid="x")),
    "no kid": a_token(header=header_of("ES256", kid=MISSING)),
    "typ at+jwt": a_token(header=header_of("ES256", typ="at+jwt")),
    "typ wit+jwt": a_token(header=header_of("ES256", typ="wit+jwt")),
    "crit": a_token(header=header_of("ES256", crit=["exp"])),
    "jwk": a_token(header=header_of("ES256", jwk={"kty": "EC"})),
    "jku": a_token(header=header_of("ES256", jku="https://evil.test")),
    "algorithm of another key": a_token(header=header_of("ES384", kid="ES256")),
    "expired": a_token(exp=SECONDS - 31),
    "no exp": a_token(exp=MISSING),
    "exp as text": a_token(exp=str(SECONDS + 300)),
    "not yet": a_token(nbf=SECONDS + 31),
    "no aud": a_token(aud=MISSING),
    "empty aud": a_token(aud=[]),
    "other aud": a_token(aud=["d", "DB", "db "]),
    "aud of numbers": a_token(aud=[1]),
    "no sub": a_token(sub=MISSING),
    "sub no ID": a_token(sub="w"),
    "sub with a query": a_token(sub="spiffe://example.org/w?x"),
    "sub of nobody's domain": a_token(sub="spiffe://nobody.test/w"),
    "sub of a partner, our key": a_token(sub="spiffe://partner.test/w"),
    "our sub, a partner's key": sealed(
        header_of("ES256"), claims_of(), algorithm="ES256", key=a_key("p256", "partner")
    ),
    "a domain the caller does not federate with": _foreign("stranger", "stranger.test"),
    "two subs": sealed(
        header_of("ES256"),
        b'{"sub":"spiffe://example.org/w","sub":"spiffe://example.org/x","aud":"db","exp":%d}'
        % (SECONDS + 300),
        algorithm="ES256",
    ),
    "padding": a_token() + "=",
    "space": " " + a_token(),
    "a newline": a_token() + "\n",
    "a cut signature": a_token()[:-4],
    "17 KiB": a_token(pad="x" * 17 * 1024),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wapi_43_bad_tokens(wrong: str) -> None:
    """WAPI-43, IOP-23, C-18, JWT-18, JWT-32: every other token: INVALID_ARGUMENT."""
    answer = await judged(WRONG[wrong])
    assert isinstance(answer, grpc.aio.AioRpcError), answer
    assert answer.code() is Code.INVALID_ARGUMENT
    assert WRONG[wrong][:20] not in (answer.details() or "") or len(WRONG[wrong]) < 20


async def test_wapi_44_our_own_claims_come_back() -> None:
    """WAPI-44, WAPI-45: claims of our own trust domain are all passed on, `aud` as a list."""
    answer = await judged(a_token(aud="db", role="x", nested={"a": [1, None, True]}, jti="1"))
    claims = MessageToDict(answer.claims)
    assert claims == {
        "sub": "spiffe://example.org/w", "aud": ["db"], "exp": SECONDS + 300.0,
        "iat": float(SECONDS), "role": "x", "nested": {"a": [1.0, None, True]}, "jti": "1",
    }  # fmt: skip


async def test_id_31_foreign_claims_are_dropped() -> None:
    """ID-31, SEC-42, WAPI-44: of a partner's token only `sub`, `aud`, `exp` are passed on."""
    answer = await judged(_foreign("partner", "partner.test", role="admin", groups=["root"]))
    assert MessageToDict(answer.claims).keys() == {"sub", "aud", "exp"}


async def test_an_audience_that_is_missing() -> None:
    """WAPI-14, JWT-12: with no audience to expect nothing is validated."""
    answer = await judged(a_token(), audience="")
    assert answer.code() is Code.INVALID_ARGUMENT
    assert answer.details() == "audience must be specified"


async def test_the_bundles_are_those_of_the_caller() -> None:
    """WAPI-16, WAPI-43: a partner's token counts for those alone whose entries name it."""
    token = _foreign("partner", "partner.test")
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        endpoint.cache.apply(snapshot=False, bundles=[PARTNERS])
        endpoint.put(replace(TENANT, federates_with=frozenset()))
        assert (await refusal(validate(stub, token)))[0] is Code.INVALID_ARGUMENT
        endpoint.put(replace(TENANT, revision_number=1))
        assert (await validate(stub, token)).spiffe_id == "spiffe://partner.test/w"


async def test_expiry_is_by_the_agents_clock() -> None:
    """SEC-42: a token counts until its end and thirty seconds, and not after."""
    async with an_endpoint() as endpoint, endpoint.stub() as stub:
        own = replace(endpoint.ca.bundle, jwt_authorities=a_bundle().jwt_authorities)
        endpoint.cache.apply(snapshot=False, bundles=[own])
        endpoint.put(replace(TENANT, federates_with=frozenset()), not_after=NOW + timedelta(1))
        endpoint.clock.advance(timedelta(seconds=329))
        assert await validate(stub, a_token())
        endpoint.clock.advance(timedelta(seconds=1))
        assert (await refusal(validate(stub, a_token())))[0] is Code.INVALID_ARGUMENT
