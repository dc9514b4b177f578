"""
Who may call what on the server, and what is kept of it.

SEC-30 (default deny by exact method), SEC-90 (no secret in any output), SEC-91 (audit),
SEC-92 (no reflection), SEC-95 (unknown means no).

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.api import access
from issuer.api.access import ACCESS
from issuer.config import ServerSettings
from issuer.services.refusals import MAX_ROWS
from spiffe_core.errors import InternalError, PreconditionError
from spiffe_wire.logs import JsonFormatter, TextFormatter
from spiffe_wire.pb.grpc.health.v1 import health_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from spiffe_wire.pb.spire.api.types import bundle_pb2 as types_bundle_pb2
from spiffe_wire.settings import SettingsError
from tests.support import http2
from tests.support.callers import (
    Calls,
    Code,
    Running,
    a_running_server,
    an_id,
    attest,
    below,
    codes,
    id_message,
    refused,
)
from tests.support.http2 import DATA, HEADERS, OPENING, raw_unix
from tests.support.stack import a_folder, serving
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

# SPIRE API 2.2, and ours: L local, A admin, G agent, D downstream, * anybody.
TABLE = {
    "spire.api.server.entry.v1.Entry": {
        "CountEntries ListEntries GetEntry BatchCreateEntry BatchUpdateEntry "
        "BatchDeleteEntry": "LA",
        "GetAuthorizedEntries SyncAuthorizedEntries": "G",
    },
    "spire.api.server.agent.v1.Agent": {
        "CountAgents ListAgents GetAgent DeleteAgent BanAgent CreateJoinToken": "LA",
        "AttestAgent": "*",
        "RenewAgent PostStatus": "G",
    },
    "spire.api.server.svid.v1.SVID": {
        "MintX509SVID MintJWTSVID MintWITSVID": "LA",
        "BatchNewX509SVID NewJWTSVID BatchNewWITSVID": "G",
        "NewDownstreamX509CA": "D",
    },
    "spire.api.server.bundle.v1.Bundle": {
        "GetBundle": "*",
        "GetFederatedBundle": "LAG",
        "CountBundles AppendBundle ListFederatedBundles BatchCreateFederatedBundle "
        "BatchUpdateFederatedBundle BatchSetFederatedBundle BatchDeleteFederatedBundle": "LA",
        "PublishJWTAuthority PublishWITAuthority": "D",
    },
    "spire.api.server.trustdomain.v1.TrustDomain": {
        "ListFederationRelationships GetFederationRelationship "
        "BatchCreateFederationRelationship BatchUpdateFederationRelationship "
        "BatchDeleteFederationRelationship RefreshBundle": "LA",
    },
    "spire.api.server.localauthority.v1.LocalAuthority": {
        "GetJWTAuthorityState PrepareJWTAuthority ActivateJWTAuthority TaintJWTAuthority "
        "RevokeJWTAuthority GetX509AuthorityState PrepareX509Authority ActivateX509Authority "
        "TaintX509Authority TaintX509UpstreamAuthority RevokeX509Authority "
        "RevokeX509UpstreamAuthority GetWITAuthorityState PrepareWITAuthority "
        "ActivateWITAuthority TaintWITAuthority RevokeWITAuthority": "LA",
    },
    "grpc.health.v1.Health": {"Check Watch": "L"},
    "spiffe_issuer.v1.AgentWatch": {"Watch": "G"},
    "spiffe_issuer.v1.PodSvid": {"BatchNewX509SVID NewJWTSVID": "G"},
    "spiffe_issuer.v1.Explain": {"ExplainSelectors": "LA"},
    "spiffe_issuer.v1.PodExplain": {"ExplainPod": "LA"},
}
ALLOWED = {
    f"/{service}/{name}": kinds
    for service, methods in TABLE.items()
    for names, kinds in methods.items()
    for name in names.split()
}
KINDS = {"none": "", "local": "L", "agent": "G", "admin": "A", "admin by settings": "A",
         "workload": "", "downstream": "D"}  # fmt: skip
ADMIN = "spiffe://example.org/operators/by-settings"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    """One server for the module, with an admin named in its settings."""
    async with a_running_server(admin_ids=(ADMIN,)) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def callers(running: Running) -> dict[str, Calls]:
    """One caller of each kind."""
    await running.add(
        below(an_id("/nowhere"), "/admin", admin=True),
        below(an_id("/nowhere"), "/down", downstream=True),
        below(an_id("/nowhere"), "/both-flags-off"),
    )
    return {
        "none": running.anonymous.calls,
        "local": running.local,
        "agent": (await running.node()).calls,
        "admin": (await running.holder("/admin")).calls,
        "admin by settings": (await running.holder("/operators/by-settings")).calls,
        "workload": (await running.holder("/both-flags-off")).calls,
        "downstream": (await running.holder("/down")).calls,
    }


async def outcome(calls: Calls, method: str, message: bytes = b"") -> tuple[Any, str]:
    """How a call ends that sends one message; the first answer counts as OK."""
    call = calls.channel.stream_stream(method)(timeout=10)
    try:
        await call.write(message)
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF:
            call.cancel()
            return Code.OK, ""
        return await call.code(), await call.details()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""


# The table


async def test_sec_30_the_table_is_the_contract() -> None:
    """SEC-30: the product's table names exactly the methods and callers of SPIRE API 2.2."""
    names = {"local": "L", "admin": "A", "agent": "G", "downstream": "D", "any": "*"}
    assert {
        method: "".join(sorted(names[kind.value] for kind in kinds))
        for method, kinds in ACCESS.items()
    } == {method: "".join(sorted(kinds)) for method, kinds in ALLOWED.items()}


@pytest.mark.parametrize("kind", KINDS)
async def test_sec_30_default_deny(running: Running, callers: Any, kind: str) -> None:
    """SEC-30: of all methods, each kind of caller may call those of the table, and no other."""
    served_locally = {"grpc.health.v1.Health"}
    for method, allowed in ALLOWED.items():
        code, details = await outcome(callers[kind], method)
        if method.split("/")[1] in served_locally and kind != "local":
            assert code is Code.UNIMPLEMENTED, method
        elif allowed == "*" or (KINDS[kind] and KINDS[kind] in allowed):
            assert code not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED), method
            assert details != "Method not found!", method
        else:
            assert (code, details) == (
                Code.PERMISSION_DENIED,
                f"authorization denied for method {method}",
            ), method


async def test_sec_30_privileges_follow_the_entry(running: Running) -> None:
    """SEC-30, SPIRE API 2.1: admin and downstream go with their entry, on open connections."""
    count = entry_pb2.CountEntriesRequest()
    (entry,) = await running.add(below(an_id("/nowhere"), "/for-a-while", admin=True))
    admin = await running.holder("/for-a-while")
    await admin.calls.entry.CountEntries(count)
    entry.admin, entry.downstream = False, True
    await running.local.entry.BatchUpdateEntry(
        entry_pb2.BatchUpdateEntryRequest(entries=[entry])
    )
    await running.settled()
    async with refused(Code.PERMISSION_DENIED):
        await admin.calls.entry.CountEntries(count)
    async with refused(Code.UNIMPLEMENTED):
        await admin.calls.svid.NewDownstreamX509CA(svid_pb2.NewDownstreamX509CARequest())
    await running.local.entry.BatchDeleteEntry(
        entry_pb2.BatchDeleteEntryRequest(ids=[entry.id])
    )
    await running.settled()
    async with refused(Code.PERMISSION_DENIED):
        await admin.calls.svid.NewDownstreamX509CA(svid_pb2.NewDownstreamX509CARequest())


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", next(iter(ALLOWED))])
async def test_sec_30_a_method_that_is_not_in_the_table_stops_the_server(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-30: a server that serves a method nobody was allowed to call does not start."""
    monkeypatch.delitem(access.ACCESS, method)
    with a_folder() as folder:
        with pytest.raises(InternalError, match=method.rpartition("/")[2]):
            async with serving(folder):
                pass


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/spire.api.server.debug.v1.Debug/GetInfo",
        "/spire.api.server.logger.v1.Logger/SetLogLevel",
        "/selfcheck./Check",
        "/spire.api.server.entry.v1.Entry/",
        "/",
    ],
)
async def test_sec_92_what_is_not_served(running: Running, callers: Any, method: str) -> None:
    """SEC-92: no reflection, no debugging: not found, for everybody and at no cost."""
    rows = await running.audited(lambda: _ask_all(callers, method))
    assert rows == []


async def _ask_all(callers: dict[str, Calls], method: str) -> None:
    for calls in callers.values():
        assert (await outcome(calls, method))[0] is Code.UNIMPLEMENTED


# Paths

SERVICE, NAME = "spire.api.server.agent.v1.Agent", "CreateJoinToken"
EXACT = f"/{SERVICE}/{NAME}"
SHAPES = [
    f"{SERVICE}/{NAME}", f"/{EXACT}", f"//{SERVICE}//{NAME}", f"{EXACT}/", f"{EXACT}//",
    f"{EXACT}?", f"{EXACT}?a=b", f"{EXACT}#", f"{EXACT}#a", f"{EXACT};a=b", f"{EXACT} ",
    f" {EXACT}", f"{EXACT}%20", f"{EXACT}%00", f"{EXACT}\t", f"{EXACT}%2F", f"{EXACT}.",
    EXACT.lower(), EXACT.upper(), EXACT.swapcase(), f"/{SERVICE}%2F{NAME}",
    f"%2F{SERVICE}/{NAME}", f"/{SERVICE}/%43reateJoinToken", f"/{SERVICE}/./{NAME}",
    f"/{SERVICE}/x/../{NAME}", f"/./{SERVICE}/{NAME}", f"/../{SERVICE}/{NAME}",
    f"http://localhost{EXACT}", f"https://localhost{EXACT}", f"//localhost{EXACT}",
    f"/{SERVICE}\\{NAME}", f"\\{SERVICE}\\{NAME}", f"/{SERVICE}", f"/{NAME}", "*", "/*", "",
    f"/{SERVICE}/*", f"/{SERVICE}.{NAME}", f"/{SERVICE}/{NAME}/{NAME}", f"/x{EXACT}",
    f"/{SERVICE}/{NAME[:-1]}", f"/{SERVICE}x/{NAME}",
]  # fmt: skip


async def knock(running: Running, path: str) -> tuple[int | None, bool]:
    """The grpc-status that a raw request for *path* gets, and whether it had an answer."""
    message = agent_pb2.CreateJoinTokenRequest(ttl=60).SerializeToString()
    async with raw_unix(running.server.settings.admin_socket_path) as raw:
        await raw.send(OPENING, http2.request(1, path, message))
        answered = False
        async with asyncio.timeout(http2.PATIENCE):
            while (found := await raw.next()) is not None:
                if found.kind == DATA and found.payload:
                    answered = True
                if found.stream == 1 and found.flags & http2.END_STREAM:
                    status = found.grpc_status if found.kind == HEADERS else None
                    return status, answered
                if found.kind in (http2.RST_STREAM, http2.GOAWAY):
                    return None, answered
    return None, answered


async def test_sec_30_the_exact_path_is_served(running: Running) -> None:
    """The control: what `knock` sends is served under its exact name, and on record."""
    rows = await running.audited(lambda: _served(running))
    assert [action for action, _, _ in rows] == ["token.create"]


async def _served(running: Running) -> None:
    assert await knock(running, EXACT) == (0, True)


@pytest.mark.parametrize("path", SHAPES, ids=range(len(SHAPES)))
async def test_sec_30_no_other_shape_of_a_path_is(running: Running, path: str) -> None:
    """SEC-30: 43 shapes of a path that others fold into it: none is served, none is heard."""
    rows = await running.audited(lambda: _not_served(running, path))
    assert rows == []


async def _not_served(running: Running, path: str) -> None:
    status, answered = await knock(running, path)
    assert status in (None, 12), status
    assert not answered


# On record


async def test_sec_91_every_change_is_on_record(running: Running) -> None:
    """SEC-91: who did what to what, for each admin change, attestation, renewal and ban."""
    node: Any = None
    entry: Any = None

    async def everything() -> None:
        nonlocal node, entry
        token = await running.token(token=f"audited.{'s' * 43}")
        node = await running.node(token)
        await node.renew()
        (entry,) = await running.add(below(node, "/audited"))
        entry.hint = "h"
        await running.local.entry.BatchUpdateEntry(
            entry_pb2.BatchUpdateEntryRequest(entries=[entry])
        )
        await running.local.entry.BatchDeleteEntry(
            entry_pb2.BatchDeleteEntryRequest(ids=[entry.id])
        )
        await running.local.bundle.BatchSetFederatedBundle(
            bundle_pb2.BatchSetFederatedBundleRequest(
                bundle=[types_bundle_pb2.Bundle(trust_domain="audited.test")]
            )
        )
        await running.local.bundle.BatchDeleteFederatedBundle(
            bundle_pb2.BatchDeleteFederatedBundleRequest(trust_domains=["audited.test"])
        )
        await running.holder("/minted")
        await running.local.svid.MintJWTSVID(
            svid_pb2.MintJWTSVIDRequest(id=id_message("/minted"), audience=["a"])
        )
        target = id_message(node.id.path)
        await running.local.agent.BanAgent(agent_pb2.BanAgentRequest(id=target))
        await running.local.agent.DeleteAgent(agent_pb2.DeleteAgentRequest(id=target))

    before = (await running.audit())[-1].seq
    rows = await running.audited(everything)
    assert rows == [
        ("token.create", "audited", "done"),
        ("agent.attest", node.id.uri, "done"),
        ("agent.renew", node.id.uri, "done"),
        ("entry.create", entry.id, "done"),
        ("entry.update", entry.id, "done"),
        ("entry.delete", entry.id, "done"),
        ("bundle.set", "audited.test", "done"),
        ("bundle.delete", "audited.test", "restrict"),
        ("x509.mint", "spiffe://example.org/minted", "done"),
        ("jwt.mint", "spiffe://example.org/minted", "done"),
        ("agent.ban", node.id.uri, "done"),
        ("agent.evict", node.id.uri, "done"),
    ]
    actors = {row.action: row.actor for row in await running.audit(before)}
    local = f"uid:{os.getuid()} pid:{os.getpid()}"
    assert actors.pop("agent.attest") == actors.pop("agent.renew") == node.id.uri
    assert set(actors.values()) == {local}
    first = [row.action for row in (await running.audit())[:4]]
    assert first == ["authority.prepare", "authority.activate"] * 2
    assert await running.server.store.read(lambda repos: repos.audit.broken_at()) is None


async def test_sec_91_actors_are_not_mixed_up(running: Running, callers: Any) -> None:
    """SEC-91: of a hundred calls at once by three callers, each is on record as its own."""
    by = {
        f"/by-{number}-{kind.split()[-1]}": callers[kind]
        for number in range(34)
        for kind in ("local", "admin", "admin by settings")
    }
    before = (await running.audit())[-1].seq

    async def create(path: str, calls: Calls) -> tuple[str, str]:
        answer = await calls.entry.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=[below(an_id("/p"), path)])
        )
        return answer.results[0].entry.id, path.rpartition("-")[2]

    made = dict(await asyncio.gather(*(create(*one) for one in by.items())))
    actors = {"admin": "spiffe://example.org/admin", "settings": ADMIN}
    actors["local"] = f"uid:{os.getuid()} pid:{os.getpid()}"
    rows = await running.audit(before)
    assert {row.target: row.actor for row in rows} == {
        entry_id: actors[kind] for entry_id, kind in made.items()
    }
    assert len(rows) == 102


async def test_sec_91_what_failed_is_not_on_record_as_done(running: Running) -> None:
    """SEC-91: a change and its row are kept or lost together."""

    async def failures() -> None:
        answer = await running.local.entry.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=[below(an_id("/p"), "/spire/x")])
        )
        assert codes(answer.results) == [3]
        async with refused(Code.NOT_FOUND):
            await running.local.agent.BanAgent(
                agent_pb2.BanAgentRequest(id=id_message("/spire/agent/x/nobody"))
            )

    assert await running.audited(failures) == []


async def test_sec_91_refused_calls_are_on_record_and_cannot_fill_it(
    running: Running, callers: Any
) -> None:
    """
    SEC-91: a refused call of a proven caller is on record, with who it was; the next ones
    within the minute are counted; strangers without a certificate are not worth a row.
    """
    refusals = running.server.refusals
    await refusals.end_window()
    method = "/spire.api.server.entry.v1.Entry/ListEntries"
    before = (await running.audit())[-1].seq

    async def knock_again() -> None:
        for kind, count in (("workload", 40), ("agent", 1), ("none", 10)):
            for _ in range(count):
                assert (await outcome(callers[kind], method))[0] is Code.PERMISSION_DENIED

    rows = await running.audited(knock_again)
    assert rows == [("call.refuse", method, "refused")] * 2
    actors = [row.actor for row in await running.audit(before)]
    assert actors[0] == "spiffe://example.org/both-flags-off"
    assert actors[1].startswith("spiffe://example.org/spire/agent/join_token/")
    rows = await running.audited(refusals.end_window)
    assert rows == [("call.refuse", method, "refused 39 times more")]
    assert await running.audited(refusals.end_window) == []
    # An admin socket's caller has a name as well.
    rows = await running.audited(
        lambda: outcome(running.local, "/spiffe_issuer.v1.AgentWatch/Watch")
    )
    assert [row[:2] for row in rows] == [("call.refuse", "/spiffe_issuer.v1.AgentWatch/Watch")]


async def test_sec_91_a_minute_has_a_bounded_number_of_rows(running: Running) -> None:
    """SEC-91, SEC-80: a thousand callers who are refused get 256 rows, and one for the rest."""
    refusals = running.server.refusals
    await refusals.end_window()

    async def many() -> None:
        await asyncio.gather(
            *(refusals.note(f"c{n}", "/m", "why", action="call.refuse") for n in range(1000))
        )

    assert len(await running.audited(many)) == MAX_ROWS
    rows = await running.audited(refusals.end_window)
    assert rows == [("call.refuse", "", f"refused {1000 - MAX_ROWS} times more")]


EVIL = "evil\n2026-01-01 INFO forged\r\x00\x1b[2J"


async def test_sec_91_no_text_forges_a_line(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """SEC-91: a newline in any field of any request never reaches a log line or the record."""
    caplog.set_level(logging.DEBUG)
    local = running.local
    entry = below(an_id("/p"), "/evil", hint=EVIL)
    entry.selectors.add(type=EVIL, value=EVIL)
    bad = below(an_id("/p"), f"/{EVIL}", id=EVIL, dns_names=[EVIL], federates_with=[EVIL])
    node = await running.node()
    before = (await running.audit())[-1].seq
    tries = [
        local.entry.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=[entry, bad])),
        local.entry.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[EVIL])),
        local.entry.GetEntry(entry_pb2.GetEntryRequest(id=EVIL)),
        local.entry.ListEntries(entry_pb2.ListEntriesRequest(page_size=1, page_token=EVIL)),
        local.agent.CreateJoinToken(agent_pb2.CreateJoinTokenRequest(ttl=60, token=EVIL)),
        local.agent.BanAgent(
            agent_pb2.BanAgentRequest(id=id_message(f"/spire/agent/x/{EVIL}"))
        ),
        local.bundle.BatchSetFederatedBundle(
            bundle_pb2.BatchSetFederatedBundleRequest(
                bundle=[types_bundle_pb2.Bundle(trust_domain=EVIL)]
            )
        ),
        local.bundle.BatchDeleteFederatedBundle(
            bundle_pb2.BatchDeleteFederatedBundleRequest(trust_domains=[EVIL])
        ),
        local.svid.MintJWTSVID(
            svid_pb2.MintJWTSVIDRequest(id=id_message("/a"), audience=[EVIL])
        ),
        node.calls.agent.PostStatus(agent_pb2.PostStatusRequest(agent_version=EVIL)),
        node.calls.svid.NewJWTSVID(svid_pb2.NewJWTSVIDRequest(entry_id=EVIL, audience=["a"])),
        attest(running.anonymous.calls, EVIL, make_csr(make_key())),
        attest(running.anonymous.calls, "a.b", make_csr(make_key()), EVIL),
    ]
    await asyncio.gather(*tries, return_exceptions=True)
    rows = await running.audit(before)
    assert rows
    assert all(text.isprintable() for row in rows for text in
               (row.actor, row.action, row.target, row.outcome))  # fmt: skip
    for record in caplog.records:
        if record.name.startswith(("issuer", "spiffe_wire", "ca")):
            assert "\n" not in JsonFormatter().format(record)
            assert json.loads(JsonFormatter().format(record))
            assert TextFormatter().format(record).isprintable()


async def test_sec_90_no_secret_in_any_output(caplog: pytest.LogCaptureFixture) -> None:
    """
    SEC-90: tokens, JWT-SVIDs and private keys are in no log line, metric, error text or
    file of the database; selector values in none but the database.
    """
    caplog.set_level(logging.DEBUG)
    selector = "canary-4d1f9c-selector"
    told: list[str] = []

    async def ask(call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            told.append(f"{error.details()} {error.trailing_metadata()}")
            return None

    async with a_running_server() as running:
        token = await running.token()
        key = make_key()
        node = await running.node(token, key)
        for bad in (token, token + "x", token[:-1], token.replace(".", "")):
            await ask(attest(running.anonymous.calls, bad, make_csr(make_key())))
        await ask(running.token(token=token))
        (entry,) = await running.add(below(node, "/canary", f"k:{selector}"))
        doubled = below(node, "/canary", f"k:{selector}", f"k{EVIL}:{selector}")
        doubled.selectors[1].type = f"bad:{selector}"
        await ask(
            running.local.entry.BatchCreateEntry(
                entry_pb2.BatchCreateEntryRequest(entries=[doubled])
            )
        )
        wanted = entry_pb2.ListEntriesRequest.Filter()
        wanted.by_selectors.selectors.add(type=f"bad:{selector}", value=selector)
        await ask(running.local.entry.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted)))
        jwt_svids = [
            (
                await node.calls.svid.NewJWTSVID(
                    svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=["a"])
                )
            ).svid.token,
            (
                await running.local.svid.MintJWTSVID(
                    svid_pb2.MintJWTSVIDRequest(id=id_message("/a"), audience=["a"])
                )
            ).svid.token,
        ]
        chain, renewed = await node.renew()
        metrics = running.server.metrics.registry.text().decode()
        metrics += repr(running.server) + repr(node)
        data = running.server.settings.data_dir
        stored = b"".join(path.read_bytes() for path in data.glob("issuer.db*"))
    lines = [JsonFormatter().format(one) for one in caplog.records]
    lines += [TextFormatter().format(one) for one in caplog.records]
    output = "\n".join([*lines, *told, metrics])
    assert len(lines) > 10
    assert selector not in output
    assert selector.encode() in stored
    secrets = [token.partition(".")[2], *[one.rpartition(".")[2] for one in jwt_svids]]
    secrets += [one.hex() for one in (key[-32:], renewed[-32:])]
    for secret in secrets:
        assert secret not in output
        assert secret.encode() not in stored
    assert token.partition(".")[0].encode() in stored  # the public half is no secret
    assert chain


# Unknown means no


async def test_sec_95_a_database_of_another_trust_domain_is_refused() -> None:
    """SEC-95: a changed trust domain on an existing database: refused, with a way out."""
    with a_folder() as folder:
        async with serving(folder):
            pass
        with pytest.raises(PreconditionError, match=r"example\.org.*data_dir"):
            async with serving(folder, trust_domain="other.org"):
                pass
        async with serving(folder) as server:
            assert server.is_ready()


@pytest.mark.parametrize(
    "admin_id", ["spiffe://other.org/a", "spiffe://example.org", "example.org/a", "", "/a"]
)
async def test_sec_95_an_admin_that_can_never_be_one(admin_id: str) -> None:
    """SEC-95: an admin ID of another trust domain, or none at all, stops the server."""
    with pytest.raises(SettingsError, match="admin_ids"):
        ServerSettings(trust_domain="example.org", admin_ids=(admin_id,))


async def test_health_is_for_the_sockets_own(running: Running) -> None:
    """SPIRE API 5.9: Check without a name says SERVING; with one it is malformed."""
    answer = await running.local.health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING")
    async with refused(Code.INVALID_ARGUMENT, "per-service health is not supported"):
        await running.local.health.Check(health_pb2.HealthCheckRequest(service="x"))
    watch = running.local.health.Watch(health_pb2.HealthCheckRequest())
    async with refused(Code.UNIMPLEMENTED, "Check"):
        await watch.read()
    running.server.hub.problem = "changes are not heard"
    try:
        answer = await running.local.health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.ServingStatus.Value(
            "NOT_SERVING"
        )
    finally:
        running.server.hub.problem = ""
