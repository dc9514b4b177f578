"""
``SVID``: what is signed, for whom, and what is on record of it (SPIRE API 5.3).

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete, update

from ca.journal import AuthorityKind, AuthorityRecord, AuthorityState
from ca.keys.protocol import KeyPurpose, SigningKey
from ca.x509 import self_signed
from issuer.config import Authority, RateLimits
from issuer.store.authorities import IssuedRow
from issuer.store.store import Repositories
from issuer.store.tables import authorities
from spiffe_core.bundle import BundleSet
from spiffe_core.keys import spki_of
from spiffe_core.lifetime import Validity
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.callers import (
    Code,
    Holder,
    Running,
    a_running_server,
    an_id,
    below,
    codes,
    csr_with,
    id_message,
    refused,
)
from tests.support.clock import DrivenClock
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    """One server for the module, on a clock that stands still."""
    async with a_running_server(DrivenClock()) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(running: Running) -> Holder:
    """An agent."""
    return await running.node()


async def batch(node: Holder, *items: tuple[str, bytes]) -> Sequence[Any]:
    """The results of one BatchNewX509SVID."""
    params = [svid_pb2.NewX509SVIDParams(entry_id=entry, csr=csr) for entry, csr in items]
    request = svid_pb2.BatchNewX509SVIDRequest(params=params)
    return list((await node.calls.svid.BatchNewX509SVID(request)).results)


async def one(node: Holder, entry: Any, csr: bytes = b"") -> X509Svid:
    """An X509-SVID for *entry*."""
    (result,) = await batch(node, (entry.id, csr or make_csr(make_key())))
    assert result.status.code == 0, result.status.message
    return X509Svid.from_chain(tuple(result.svid.cert_chain))


async def new_jwt(node: Holder, entry_id: str, *audience: str) -> Any:
    """The JWT-SVID of one NewJWTSVID."""
    request = svid_pb2.NewJWTSVIDRequest(entry_id=entry_id, audience=audience)
    return (await node.calls.svid.NewJWTSVID(request)).svid


async def mint(running: Running, csr: bytes, ttl: int = 0) -> Any:
    """The X509-SVID of one MintX509SVID."""
    request = svid_pb2.MintX509SVIDRequest(csr=csr, ttl=ttl)
    return (await running.local.svid.MintX509SVID(request)).svid


async def mint_jwt(running: Running, path: str, *audience: str, ttl: int = 0) -> Any:
    """The JWT-SVID of one MintJWTSVID."""
    request = svid_pb2.MintJWTSVIDRequest(id=id_message(path), audience=audience, ttl=ttl)
    return (await running.local.svid.MintJWTSVID(request)).svid


async def record_of(running: Running) -> list[IssuedRow]:
    """Everything on record, oldest first."""

    def read(repos: Repositories) -> list[IssuedRow]:
        found: list[IssuedRow] = []
        after = 0
        while rows := repos.issued.page(after, 1000):
            after = rows[-1][0]
            found += [row for _, row in rows]
        return found

    return await running.server.store.read(read)


def leaf_of(svid: X509Svid) -> x509.Certificate:
    """Its leaf, parsed."""
    return x509.load_der_x509_certificate(svid.leaf)


def dns_of(svid: X509Svid) -> list[str]:
    """The DNS names in it."""
    names = leaf_of(svid).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(names.value.get_values_for_type(x509.DNSName))


# X509-SVIDs for agents


async def test_an_svid_is_what_the_entry_says(running: Running, node: Holder) -> None:
    """ID, lifetime and DNS names come from the entry, the key from the CSR; it verifies."""
    (entry,) = await running.add(
        below(node, "/web", x509_svid_ttl=90, dns_names=["b.example.org", "a.example.org"],
              hint="not in the answer")
    )  # fmt: skip
    key = make_key()
    (result,) = await batch(node, (entry.id, make_csr(key, an_id("/somebody/else"))))
    assert (result.status.code, result.status.message) == (0, "OK")
    now = running.server.own.clock.now().replace(microsecond=0)
    assert result.svid.id == id_message("/web")
    assert result.svid.hint == ""
    assert result.svid.expires_at == int((now + timedelta(seconds=90)).timestamp())
    svid = verify_x509_svid(
        tuple(result.svid.cert_chain), BundleSet.of([running.server.hub.bundle]), at=now
    )
    assert svid.validity.not_after == now + timedelta(seconds=90)
    assert now - timedelta(seconds=60) <= svid.validity.not_before <= now
    assert dns_of(svid) == ["b.example.org", "a.example.org"]
    private = serialization.load_der_private_key(key, password=None)
    assert leaf_of(svid).public_key() == private.public_key()


@pytest.mark.parametrize(
    ("ttl", "lives"),
    [(0, 3600), (1, 1), (86_400, 86_400), (86_401, 86_400), (2**31 - 1, 86_400)],
)
async def test_sec_22_lifetimes_are_clamped(
    running: Running, node: Holder, ttl: int, lives: int
) -> None:
    """SEC-22: zero is the default, over the cap is the cap, in agents' and minted SVIDs."""
    (entry,) = await running.add(below(node, f"/ttl{ttl}", x509_svid_ttl=ttl))
    now = running.server.own.clock.now().replace(microsecond=0)
    minted = await mint(running, make_csr(make_key(), an_id("/minted")), ttl)
    for svid in (await one(node, entry), X509Svid.from_chain(tuple(minted.cert_chain))):
        assert svid.validity.not_after - now == timedelta(seconds=lives)
    assert minted.expires_at == int(now.timestamp()) + lives


async def test_sec_22_nothing_outlives_its_authority() -> None:
    """SEC-22: with an hour left of the authority, an SVID for a day lives that hour."""
    life = Authority(x509_ttl=timedelta(hours=3), jwt_ttl=timedelta(hours=3))
    async with a_running_server(DrivenClock(), authority=life) as running:
        node = await running.node()
        (entry,) = await running.add(below(node, "/w", x509_svid_ttl=86_400))
        ends = running.server.rotator.x509.authority.validity.not_after
        assert (await one(node, entry)).validity.not_after == ends
        token = await mint_jwt(running, "/w", "a", ttl=3600)
        running.server.own.clock.advance(timedelta(hours=2, minutes=1))  # type: ignore
        for made in (token, await mint_jwt(running, "/w", "a", ttl=3600)):
            assert made.expires_at <= ends.timestamp()


async def test_sec_22_serials_are_random_and_their_own(running: Running, node: Holder) -> None:
    """SEC-22: positive, 129 to 159 bits, each used once."""
    (entry,) = await running.add(below(node, "/serials"))
    csr = make_csr(make_key())
    results = await batch(node, *[(entry.id, csr)] * 300)
    serials = {
        X509Svid.from_chain(tuple(result.svid.cert_chain)).serial_number for result in results
    }
    assert len(serials) == 300
    assert all(128 < serial.bit_length() <= 159 for serial in serials)
    on_record = {row.serial for row in await record_of(running)}
    assert {str(serial) for serial in serials} <= on_record


HOSTILE_CSRS = {
    "foreign ID": [x509.UniformResourceIdentifier("spiffe://other.org/admin")],
    "server's ID": [x509.UniformResourceIdentifier("spiffe://example.org/spire/server")],
    "two IDs": [x509.UniformResourceIdentifier(f"spiffe://example.org/{n}") for n in "ab"],
    "DNS": [x509.DNSName("*.example.org"), x509.DNSName("localhost")],
    "mail": [x509.RFC822Name("root@example.org")],
}
HOSTILE_EXTENSIONS: dict[str, list[x509.ExtensionType]] = {
    "CA": [x509.BasicConstraints(ca=True, path_length=None)],
    "usage": [
        x509.KeyUsage(
            digital_signature=False, content_commitment=True, key_encipherment=True,
            data_encipherment=True, key_agreement=True, key_cert_sign=True, crl_sign=True,
            encipher_only=False, decipher_only=False,
        )
    ],
    "purpose": [x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.3.6.1.5.5.7.3.9")])],
    "constraints": [
        x509.NameConstraints([x509.UniformResourceIdentifier("other.org")], None)
    ],
    "unknown": [x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")],
}  # fmt: skip


@pytest.mark.parametrize("case", [*HOSTILE_CSRS, *HOSTILE_EXTENSIONS])
async def test_sec_20_a_csr_yields_its_key_alone(
    running: Running, node: Holder, case: str
) -> None:
    """SEC-20: what a hostile CSR asks for makes no difference but for the key."""
    (entry,) = await running.add(below(node, f"/csr/{case.replace(' ', '-')}".replace("'", "")))
    csr = csr_with(
        make_key(), *HOSTILE_CSRS.get(case, ()), extensions=HOSTILE_EXTENSIONS.get(case, ())
    )
    hostile, clean = leaf_of(await one(node, entry, csr)), leaf_of(await one(node, entry))
    assert hostile.subject == clean.subject
    assert hostile.issuer == clean.issuer
    own = x509.SubjectKeyIdentifier
    assert [one for one in hostile.extensions if not isinstance(one.value, own)] == [
        one for one in clean.extensions if not isinstance(one.value, own)
    ]
    assert hostile.not_valid_after_utc == clean.not_valid_after_utc


async def test_each_item_has_its_own_status(running: Running, node: Holder) -> None:
    """SPIRE API 3.3, 5.3: one result an item, at its place; a failed one carries no SVID."""
    other = await running.node()
    good, foreign = await running.add(below(node, "/good"), below(other, "/foreign"))
    csr = make_csr(make_key())
    forged = bytearray(make_csr(make_key()))
    forged[-1] ^= 1
    weak = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP224R1()), hashes.SHA256())
    )
    results = await batch(
        node,
        (good.id, csr),
        ("", csr),
        (good.id, b""),
        ("unknown", csr),
        (foreign.id, csr),
        (good.id, b"no csr"),
        (good.id, bytes(forged)),
        (good.id, weak.public_bytes(serialization.Encoding.DER)),
        (good.id, csr + b"\0"),
        (good.id, csr * 100),
        ("", b""),
        (foreign.id, b""),
        (good.id, csr),
    )
    assert codes(results) == [0, 3, 3, 5, 5, 3, 3, 3, 3, 3, 3, 3, 0]
    assert [one.HasField("svid") for one in results] == [True, *[False] * 11, True]
    texts = [one.status.message for one in results]
    assert texts[1] == texts[10] == "missing entry ID"
    assert texts[2] == texts[11] == "missing CSR"
    # A stolen node can't tell what runs elsewhere from what does not exist.
    assert texts[3] == texts[4] == "entry not found or not authorized"
    assert texts[5].startswith("malformed CSR")
    assert texts[6].startswith("invalid CSR signature")


async def test_batches_have_a_first_and_a_last(running: Running, node: Holder) -> None:
    """None is INVALID_ARGUMENT, 1,000 are signed, 1,001 refused before one is (SEC-80)."""
    (entry,) = await running.add(below(node, "/many"))
    csr = make_csr(make_key())
    async with refused(Code.INVALID_ARGUMENT, "missing parameters"):
        await batch(node)
    before = len(await record_of(running))
    async with refused(Code.RESOURCE_EXHAUSTED, "1000"):
        await batch(node, *[(entry.id, csr)] * 1001)
    assert len(await record_of(running)) == before
    assert codes(await batch(node, *[(entry.id, csr)] * 1000)) == [0] * 1000
    assert len(await record_of(running)) == before + 1000


async def test_sec_21_agents_get_what_lies_below_them_and_nothing_else() -> None:
    """SEC-21: 8 agents and 40 entries, every pair, listed, as X509-SVID and as JWT-SVID."""
    async with a_running_server() as running:
        nodes = [await running.node() for _ in range(8)]
        entries = await running.add(
            *[below(nodes[n % 8], f"/e{n}") for n in range(32)],
            *[below(an_id(f"/e{n}"), f"/e{n}/under") for n in range(8)],
        )
        csr = make_csr(make_key())
        for number, node in enumerate(nodes):
            own = {f"/e{n}" for n in range(32) if n % 8 == number} | {f"/e{number}/under"}
            results = await batch(node, *[(entry.id, csr) for entry in entries])
            expected = [0 if one.spiffe_id.path in own else 5 for one in entries]
            assert codes(results) == expected
            assert {one.svid.id.path for one in results if one.HasField("svid")} == own
            listed = await node.calls.entry.GetAuthorizedEntries(
                entry_pb2.GetAuthorizedEntriesRequest()
            )
            assert {one.spiffe_id.path for one in listed.entries} == own
            for entry, code in zip(entries[number::5], expected[number::5], strict=True):
                if code == 0:
                    assert (await new_jwt(node, entry.id, "a")).id == entry.spiffe_id
                else:
                    async with refused(Code.NOT_FOUND, "entry not found or not authorized"):
                        await new_jwt(node, entry.id, "a")


async def test_entries_that_changed_are_signed_as_they_are(
    running: Running, node: Holder
) -> None:
    """SEC-21: once folded in, a moved or deleted entry is nobody's, a changed one as it is."""
    (entry,) = await running.add(below(node, "/before"))
    entry.spiffe_id.path = "/after"
    await running.local.entry.BatchUpdateEntry(
        entry_pb2.BatchUpdateEntryRequest(entries=[entry])
    )
    await running.settled()
    assert (await one(node, entry)).spiffe_id == an_id("/after")
    await running.local.entry.BatchDeleteEntry(
        entry_pb2.BatchDeleteEntryRequest(ids=[entry.id])
    )
    await running.settled()
    assert codes(await batch(node, (entry.id, make_csr(make_key())))) == [5]


async def test_an_expired_entry_is_not_signed_for() -> None:
    """SPIRE API 5.1: from the instant it expires an entry authorizes nobody."""
    async with a_running_server(DrivenClock()) as running:
        node = await running.node()
        ends = int(running.server.own.clock.now().timestamp()) + 30
        (entry,) = await running.add(below(node, "/ends", expires_at=ends))
        await one(node, entry)
        running.server.own.clock.advance(timedelta(seconds=31))  # type: ignore
        assert codes(await batch(node, (entry.id, make_csr(make_key())))) == [5]
        async with refused(Code.NOT_FOUND):
            await new_jwt(node, entry.id, "a")


# JWT-SVIDs


def claims_of(running: Running, token: str, audience: str) -> Any:
    """Verify a token with the bundle and PyJWT, and return header and claims."""
    header = jwt.get_unverified_header(token)
    authority = running.server.hub.bundle.jwt_authority(header["kid"])
    assert authority is not None
    key = serialization.load_der_public_key(authority.public_key)
    standing_still = {"verify_exp": False, "verify_iat": False}  # PyJWT looks at its own clock
    claims = jwt.decode(
        token,
        key,  # type: ignore[arg-type]
        algorithms=[header["alg"]],
        audience=audience,
        options=standing_still,
    )
    return header, claims


async def test_a_jwt_svid_is_what_the_entry_says(running: Running, node: Holder) -> None:
    """JWT-10, JWT-11, JWT-15: subject and life of the entry, audience of the call."""
    (entry,) = await running.add(below(node, "/jwt", jwt_svid_ttl=77, hint="unused"))
    svid = await new_jwt(node, entry.id, "one", "two", "one")
    now = int(running.server.own.clock.now().timestamp())
    assert (svid.id, svid.issued_at, svid.expires_at) == (id_message("/jwt"), now, now + 77)
    header, claims = claims_of(running, svid.token, "two")
    assert header["typ"] == "JWT"
    jti = claims.pop("jti")
    assert claims == {
        "sub": "spiffe://example.org/jwt", "aud": ["one", "two"], "iat": now, "exp": now + 77,
    }  # fmt: skip
    (row,) = [row for row in await record_of(running) if row.serial == jti]
    assert (row.kind, row.spiffe_id) == (AuthorityKind.JWT, "spiffe://example.org/jwt")
    assert (row.entry_id, row.caller) == (entry.id, node.id.uri)
    again = await new_jwt(node, entry.id, "one", "two")
    assert again.token != svid.token


@pytest.mark.parametrize(
    ("ttl", "lives"), [(0, 300), (1, 1), (3600, 3600), (3601, 3600), (2**31 - 1, 3600)]
)
async def test_sec_26_token_lifetimes_are_clamped(
    running: Running, node: Holder, ttl: int, lives: int
) -> None:
    """SEC-26: five minutes by default, an hour at most, in agents' and minted tokens."""
    (entry,) = await running.add(below(node, f"/jttl{ttl}", jwt_svid_ttl=ttl))
    for svid in (
        await new_jwt(node, entry.id, "a"),
        await mint_jwt(running, "/m", "a", ttl=ttl),
    ):
        assert svid.expires_at - svid.issued_at == lives


@pytest.mark.parametrize(
    ("audience", "is_good"),
    [
        ([], False), ([""], False), (["", ""], False), (["a"] * 40, True),
        ([f"a{n}" for n in range(16)], True), ([f"a{n}" for n in range(17)], False),
        (["a" * 255], True), (["a" * 256], False), (["é" * 128], False),
        (["a b\n\u202e漢"], True),
    ],
    ids=range(10),
)  # fmt: skip
async def test_sec_26_audiences(
    running: Running, node: Holder, audience: list[str], is_good: bool
) -> None:
    """SEC-26: 1 to 16 values of at most 255 bytes."""
    wanted = below(node, f"/aud{len(audience)}-{sum(map(len, audience))}")
    wanted.selectors.add(type="is-good", value=str(is_good))
    (entry,) = await running.add(wanted)
    calls = (new_jwt(node, entry.id, *audience), mint_jwt(running, "/m", *audience))
    for call in calls:
        if is_good:
            _, claims = claims_of(running, (await call).token, audience[0])
            assert claims["aud"] == list(dict.fromkeys(audience))
        else:
            async with refused(Code.INVALID_ARGUMENT, "audience"):
                await call


async def test_tokens_for_nothing(running: Running, node: Holder) -> None:
    """NewJWTSVID: an empty ID is malformed, an unknown one not found."""
    async with refused(Code.INVALID_ARGUMENT, "missing entry ID"):
        await new_jwt(node, "", "a")
    async with refused(Code.NOT_FOUND, "entry not found or not authorized"):
        await new_jwt(node, "unknown", "a")


# Minting


async def test_a_minted_svid_is_what_the_csr_says(running: Running) -> None:
    """MintX509SVID: ID, key and DNS names of the CSR; it verifies, and is on record."""
    key = make_key()
    csr = csr_with(
        key,
        x509.UniformResourceIdentifier("spiffe://example.org/minted/one"),
        x509.DNSName("svc.ns.svc"),
        x509.DNSName("a.example.org"),
    )
    minted = await mint(running, csr, 120)
    now = running.server.own.clock.now().replace(microsecond=0)
    svid = verify_x509_svid(
        tuple(minted.cert_chain), BundleSet.of([running.server.hub.bundle]), at=now
    )
    assert minted.id == id_message("/minted/one")
    assert dns_of(svid) == ["svc.ns.svc", "a.example.org"]
    assert svid.validity.not_after == now + timedelta(seconds=120)
    (row,) = [row for row in await record_of(running) if row.serial == svid.serial]
    assert row.spiffe_id == "spiffe://example.org/minted/one"
    assert (row.entry_id, row.caller.partition(":")[0]) == ("", "uid")


def _san(*names: x509.GeneralName) -> bytes:
    return csr_with(make_key(), *names)


URI = x509.UniformResourceIdentifier


def ours(path: str) -> x509.UniformResourceIdentifier:
    """A name of ours, right or wrong."""
    return URI(f"spiffe://example.org{path}")


@pytest.mark.parametrize(
    ("csr", "text"),
    [
        (b"", "missing CSR"),
        (b"x", "malformed CSR"),
        (make_csr(make_key()), "CSR URI SAN is required"),
        (_san(x509.DNSName("a.org")), "CSR URI SAN is required"),
        (
            _san(ours("/a"), URI("spiffe://example.org/b")),
            "only one URI SAN",
        ),
        (_san(URI("spiffe://other.org/a")), "CSR URI SAN is invalid"),
        (_san(URI("spiffe://example.org")), "CSR URI SAN is invalid"),
        (_san(ours("/spire/server")), "CSR URI SAN is invalid"),
        (_san(ours("/spire/agent/x")), "CSR URI SAN is invalid"),
        (_san(URI("https://example.org/a")), "CSR URI SAN is invalid"),
        (_san(ours("/a/../b")), "CSR URI SAN is invalid"),
        (_san(ours("/a"), x509.DNSName("A.org")), "DNS name is invalid"),
        (_san(ours("/a"), x509.DNSName("a.*.org")), "DNS name is invalid"),
    ],
    ids=range(13),
)
async def test_sec_04_what_is_not_minted(running: Running, csr: bytes, text: str) -> None:
    """SEC-04, SPIRE API 5.3: a CSR that asks for what is not ours to give is refused."""
    before = len(await record_of(running))
    async with refused(Code.INVALID_ARGUMENT, text):
        await mint(running, csr)
    assert len(await record_of(running)) == before


@pytest.mark.parametrize("ttl", [-1, -(2**31)])
async def test_sec_22_negative_lifetimes(running: Running, ttl: int) -> None:
    """SEC-22: a lifetime below zero is refused, not taken for the default."""
    async with refused(Code.INVALID_ARGUMENT, "negative"):
        await mint(running, make_csr(make_key(), an_id("/m")), ttl)
    async with refused(Code.INVALID_ARGUMENT, "negative"):
        await mint_jwt(running, "/m", "a", ttl=ttl)


async def test_a_minted_token(running: Running) -> None:
    """MintJWTSVID: for a workload's ID only; on record with who asked for it."""
    svid = await mint_jwt(running, "/minted", "a", ttl=5)
    _, claims = claims_of(running, svid.token, "a")
    assert (claims["sub"], svid.id) == ("spiffe://example.org/minted", id_message("/minted"))
    for path in ("", "/spire/server", "/spire/agent/x"):
        async with refused(Code.INVALID_ARGUMENT, "invalid SPIFFE ID"):
            await mint_jwt(running, path, "a")
    request = svid_pb2.MintJWTSVIDRequest(audience=["a"])
    async with refused(Code.INVALID_ARGUMENT, "invalid SPIFFE ID"):
        await running.local.svid.MintJWTSVID(request)
    request.id.CopyFrom(id_message("/a", "other.org"))
    async with refused(Code.INVALID_ARGUMENT, "invalid SPIFFE ID"):
        await running.local.svid.MintJWTSVID(request)


async def test_what_this_release_does_not_sign(running: Running, node: Holder) -> None:
    """WIT-SVIDs and downstream authorities say UNIMPLEMENTED, and why."""
    async with refused(Code.UNIMPLEMENTED, "WIT functionality is disabled"):
        await running.local.svid.MintWITSVID(svid_pb2.MintWITSVIDRequest())
    async with refused(Code.UNIMPLEMENTED, "WIT functionality is disabled"):
        await node.calls.svid.BatchNewWITSVID(svid_pb2.BatchNewWITSVIDRequest())
    await running.add(below(node, "/downstream", downstream=True))
    downstream = await running.holder("/downstream")
    async with refused(Code.UNIMPLEMENTED, "downstream"):
        await downstream.calls.svid.NewDownstreamX509CA(svid_pb2.NewDownstreamX509CARequest())


# On record


async def test_sec_24_everything_is_on_record_before_it_is_handed_out(
    running: Running, node: Holder
) -> None:
    """SEC-24: each SVID of each kind, with its authority, entry, caller and lifetime."""
    (entry,) = await running.add(below(node, "/recorded"))
    before = len(await record_of(running))
    svid = await one(node, entry)
    token = await new_jwt(node, entry.id, "a")
    minted = await mint(running, make_csr(make_key(), an_id("/r")))
    chain, key = await node.renew()
    joined = await running.node()
    rows = (await record_of(running))[before:]
    serials = [
        svid.serial,
        jwt.decode(token.token, options={"verify_signature": False})["jti"],
        X509Svid.from_chain(tuple(minted.cert_chain)).serial,
        X509Svid.from_chain(chain).serial,
        joined.svid.serial,
    ]
    assert [row.serial for row in rows] == serials
    assert key
    rotator = running.server.rotator
    x509_id = rotator.x509.authority.authority_id
    assert [row.authority_id for row in rows] == [
        x509_id, rotator.jwt.key_id, x509_id, x509_id, x509_id,
    ]  # fmt: skip
    assert [row.entry_id for row in rows] == [entry.id, entry.id, "", "", ""]
    assert rows[0].expires_at == svid.validity.not_after
    assert [row.caller for row in rows[:2]] == [node.id.uri] * 2


async def test_sec_24_nothing_is_handed_out_under_a_superseded_authority() -> None:
    """
    SEC-24: an authority that was superseded while a server held its key signs nothing that
    leaves: UNAVAILABLE, nothing on record, no node attested, no token used up.
    """
    async with a_running_server(DrivenClock()) as running:
        token = await running.token()
        node = await running.node()
        (entry,) = await running.add(below(node, "/late"))
        now = running.server.own.clock.now()
        key = SigningKey("new", KeyPurpose.X509_CA, ec.generate_private_key(ec.SECP256R1()))
        trust_domain = running.server.hub.trust_domain
        root = self_signed(key, trust_domain, now=now, ttl=timedelta(days=9))
        records = [
            AuthorityRecord(
                root.authority_id, AuthorityKind.X509, AuthorityState.PREPARED, "new", root.der,
                root.validity, now,
            ),
            AuthorityRecord(
                "newer", AuthorityKind.JWT, AuthorityState.PREPARED, "newer",
                spki_of(ec.generate_private_key(ec.SECP256R1()).public_key()),
                Validity(now, now + timedelta(days=9)), now,
            ),
        ]  # fmt: skip

        def supersede(repos: Repositories) -> None:
            for record in records:
                repos.authorities.add_prepared(record)
                repos.authorities.activate(record.authority_id, now)

        await running.server.store.write(supersede)
        before = await record_of(running)
        for call in (
            lambda: one(node, entry),
            lambda: new_jwt(node, entry.id, "a"),
            lambda: mint(running, make_csr(make_key(), an_id("/m"))),
            lambda: mint_jwt(running, "/m", "a"),
            lambda: node.renew(),
            lambda: running.node(token),
        ):
            async with refused(Code.UNAVAILABLE, "superseded"):
                await call()
        assert await record_of(running) == before
        assert running.server.hub.index.agent_count == 1

        def go_back(repos: Repositories) -> None:
            # As no release does; it only shows that the token is as it was.
            connection = repos.authorities._connection
            for record in records:
                wanted = authorities.c.authority_id == record.authority_id
                connection.execute(delete(authorities).where(wanted))
            connection.execute(update(authorities).values(state="active"))

        await running.server.store.write(go_back)
        await running.node(token)


# Limits


async def test_signing_is_limited_for_each_agent() -> None:
    """SEC-80, SPIRE API 3.6: 500 a second for one agent; another has its own 500."""
    async with a_running_server(rate_limits=RateLimits(attestation=False)) as running:
        node, other = await running.node(), await running.node()
        mine, theirs = await running.add(below(node, "/a"), below(other, "/b"))
        csr = make_csr(make_key())
        async with refused(Code.RESOURCE_EXHAUSTED, r"rate (501) exceeds burst size (500)"):
            await batch(node, *[(mine.id, csr)] * 501)
        loop = asyncio.get_running_loop()
        assert codes(await batch(node, *[(mine.id, csr)] * 500)) == [0] * 500
        started = loop.time()
        assert codes(await batch(node, *[(mine.id, csr)] * 150)) == [0] * 150
        assert loop.time() - started > 0.02
        await batch(other, *[(theirs.id, csr)] * 500)
        # Tokens have a bucket of their own.
        await new_jwt(node, mine.id, "a")
