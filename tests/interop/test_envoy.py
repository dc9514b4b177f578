"""
Two real Envoys in mutual TLS, with certificates and bundles that our agent pushes to them.

The front one takes plain HTTP and speaks TLS to the back one, which hands on plain HTTP.  Each
request goes over a TLS connection of its own.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support.envoy import Envoy, Load, Mesh, a_mesh, get, needs_envoy
from tests.support.envoyconfig import (
    AGENT,
    plain_cluster,
    plain_listener,
    tls_cluster,
    tls_listener,
)
from tests.support.programs import Programs

pytestmark = [needs_envoy, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]
STRANGER = "spiffe://example.org/stranger"
LATE = ["spiffe://example.org/late", "spiffe://example.org/later"]


@dataclass(frozen=True)
class Talking:
    """A front, a back and a stranger that speak, and the ports to speak through."""

    mesh: Mesh
    front: Envoy
    back: Envoy
    stranger: Envoy
    ports: dict[str, int]
    """By who asks and whom: ``front filtered``."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def talking() -> AsyncIterator[Talking]:
    """
    Three Envoys with an identity each.

    The back one listens twice: ``strict`` takes no peer in TLS but the front, ``filtered``
    takes any of the trust domain, and lets through the front and two that are not there yet.
    """
    async with a_mesh() as mesh:
        back, front, stranger = (mesh.envoy(name) for name in ("back", "front", "stranger"))
        for envoy in (back, front, stranger):
            await mesh.entry(envoy)
        log = back.access_log
        await mesh.start(
            back,
            [
                tls_listener("strict", "service", log, peers=[front.id]),
                tls_listener("filtered", "service", log, allowed=[front.id, *LATE]),
            ],
            [plain_cluster("service", mesh.service)],
        )
        await back.ready()
        targets = {name: await back.port(name) for name in ("strict", "filtered")}
        ports = {}
        for envoy in (front, stranger):
            calls = [(name, port, back.id) for name, port in targets.items()]
            # The right place, and another name asked of it.
            calls.append(("wrong", targets["filtered"], STRANGER))
            secrets = {"svid": envoy.id, "bundle": "spiffe://example.org"}
            await mesh.start(
                envoy,
                [plain_listener(name, name, envoy.access_log) for name, _, _ in calls],
                [tls_cluster(name, to, peers=[peer], **secrets) for name, to, peer in calls],
            )
            await envoy.ready()
            for name, _, _ in calls:
                ports[f"{envoy.name} {name}"] = await envoy.port(name)
        yield Talking(mesh, front, back, stranger, ports)


@pytest.mark.parametrize("way", ["strict", "filtered"])
async def test_two_proxies_two_identities(talking: Talking, way: str) -> None:
    """SDS-01, SDS-02: two Envoys of one user get an identity each; each sees the other's."""
    answer = await get(talking.ports[f"front {way}"])
    assert answer.status == 200
    assert answer.headers["x-client"] == talking.front.id
    assert answer.headers["x-server"] == talking.back.id
    # What the service is told; the header is Envoy's, a client cannot bring its own.
    peer = json.loads(answer.text)["peer"]
    assert f"By={talking.back.id};" in peer
    assert peer.endswith(f"URI={talking.front.id}")


async def test_names_of_secrets(talking: Talking) -> None:
    """SDS-04: the back asks by ``default`` and ``ROOTCA``, the front by the IDs in full."""
    for envoy, names in (
        (talking.back, {"sds.default", "sds.ROOTCA"}),
        (talking.front, {stat_of(talking.front.id), stat_of("spiffe://example.org")}),
    ):
        taken = await envoy.stats(".update_success")
        assert {f"{name}.update_success" for name in names} == {
            name for name, count in taken.items() if name.startswith("sds.") and count
        }
        assert len(await envoy.serials()) == 1


async def test_a_peer_that_the_filter_does_not_name(talking: Talking) -> None:
    """Envoy's RBAC filter on the peer's SPIFFE ID answers another one with 403."""
    answer = await get(talking.ports["stranger filtered"])
    assert answer.status == 403
    assert answer.headers["x-client"] == talking.stranger.id


async def test_a_peer_that_the_handshake_does_not_name(talking: Talking) -> None:
    """A listener that names its peer refuses another of the same trust domain in TLS."""
    refused = "listener.strict.ssl.fail_verify_san"
    before = (await talking.back.stats(refused))[refused]
    answer = await get(talking.ports["stranger strict"])
    assert answer.status == 503
    assert await talking.back.until_stat(refused, before + 1)


async def test_a_server_of_another_name(talking: Talking) -> None:
    """A client that names its server sends nothing to another of the same trust domain."""
    refused, asked = "cluster.wrong.ssl.fail_verify_san", "http.filtered.downstream_rq_total"
    before = await talking.back.stats(asked)
    answer = await get(talking.ports["front wrong"])
    assert answer.status == 503
    assert await talking.front.stats(refused) == {refused: 1}
    assert await talking.back.stats(asked) == before


async def test_a_renewal_under_load(talking: Talking) -> None:
    """SDS-09: renewed SVIDs are used by new connections at once; no request fails for it."""
    mesh, envoys = talking.mesh, (talking.front, talking.back)
    connections = f"cluster.{AGENT}.upstream_cx_total"
    pids = [envoy.process.pid for envoy in envoys]
    before = [await envoy.serials() for envoy in envoys]
    opened = [await envoy.stats(connections) for envoy in envoys]
    async with Load(talking.ports["front filtered"]) as load:
        old = (await load.more(100))[-1]
        for _ in range(3):
            renewed = await Programs.of(mesh.stack).agent("renew")
            assert renewed.out.startswith("3 renewed"), renewed
            await load.more(50)
        new = (await load.more(50))[-1]
    assert load.failed == []
    assert len(load.answers) >= 300
    assert old.headers["x-client-serial"] != new.headers["x-client-serial"]
    seen = {one.headers["x-client-serial"] for one in load.answers}
    assert len(seen) == 4, "the first, and each renewal, in use within 50 requests"
    for envoy, held, pid, cx in zip(envoys, before, pids, opened, strict=True):
        assert (await envoy.serials()).isdisjoint(held)
        assert envoy.process.pid == pid and envoy.process.ended() is None
        assert await envoy.stats(connections) == cx, "pushed over the streams that were there"


async def test_an_identity_that_appears_late(talking: Talking) -> None:
    """SDS-10: an Envoy without an entry is held, and serves as soon as it has one."""
    mesh = talking.mesh
    late = mesh.envoy("late")
    await mesh.start(
        late,
        [plain_listener("call", "call", late.access_log)],
        # With the back-off that is Envoy's default: from half a second up to thirty.
        [tls_cluster("call", await talking.back.port("filtered"), peers=[talking.back.id])],
    )
    assert await late.waits()
    await late.until_stat(f"cluster.{AGENT}.upstream_rq_active", 2)  # both streams are open
    before = await late.stats("sds.")
    assert before["sds.default.update_success"] == 0

    await mesh.entry(late)
    await late.ready()
    assert (await get(await late.port("call"))).status == 200
    after = await late.stats("sds.")
    for name in ("default", "ROOTCA"):
        assert after[f"sds.{name}.update_success"] == 1
        failures = f"sds.{name}.update_failure"
        assert after[failures] == before[failures], "no stream was ended, so none had to wait"
    assert await late.stats(f"cluster.{AGENT}.upstream_cx_total") == {
        f"cluster.{AGENT}.upstream_cx_total": 1
    }


async def test_an_envoy_that_does_not_wait(talking: Talking) -> None:
    """SDS-10: an Envoy that went on without a certificate is healed by the push of one."""
    mesh = talking.mesh
    later = mesh.envoy("later")
    cluster = tls_cluster(
        "call", await talking.back.port("filtered"), peers=[talking.back.id], wait="0.2s"
    )
    await mesh.start(later, [plain_listener("call", "call", later.access_log)], [cluster])
    await later.ready()
    port = await later.port("call")
    assert (await get(port)).status == 503
    (logged,) = await later.until(later.accesses)
    assert "Secret_is_not_supplied_by_SDS" in logged["failure"]

    await mesh.entry(later)

    async def healed() -> bool:
        return (await get(port)).status == 200

    await later.until(healed)
    connections = f"cluster.{AGENT}.upstream_cx_total"
    assert await later.stats(connections) == {connections: 1}


async def test_an_identity_that_is_taken_away(talking: Talking) -> None:
    """SDS has no way to take a certificate back: its stream is held, and explain says so."""
    mesh = talking.mesh
    former = mesh.envoy("former")
    entry = await mesh.entry(former)
    listener = tls_listener("call", "service", former.access_log)
    await mesh.start(former, [listener], [plain_cluster("service", mesh.service)])
    await former.ready()
    before = await former.serials(), await former.stats("sds.")

    await mesh.stack.server.delete_entries(entry)
    await former.until(lambda: explained(mesh, former, "sds default: awaited"))
    assert (await former.serials(), await former.stats("sds.")) == before


async def test_sec_85_names_of_others(talking: Talking) -> None:
    """SEC-85, SDS-07: Envoys get their own ID's certificate; others' and no one's are held."""
    mesh = talking.mesh
    pair = mesh.envoy("one"), mesh.envoy("other")
    names = [envoy.id for envoy in pair] + ["spiffe://example.org/nobody"]
    for envoy in pair:
        await mesh.entry(envoy)
        await mesh.start(
            envoy,
            [tls_listener(one[-5:], "service", envoy.access_log, svid=one) for one in names],
            [plain_cluster("service", mesh.service)],
        )
    for envoy in pair:
        await envoy.until_stat(f"{stat_of(envoy.id)}.update_success")
        await envoy.until_stat(f"cluster.{AGENT}.upstream_rq_active", len(names) + 1)
    await mesh.stack.agent.renew()  # a push, which is for the own name alone
    for envoy in pair:
        await envoy.until_stat(f"{stat_of(envoy.id)}.update_success", 2)
        stats = await envoy.stats("sds.")
        got = {one for one in names if stats[f"{stat_of(one)}.update_success"]}
        assert got == {envoy.id}
        others = [
            [stats[f"{stat_of(one)}.{what}"] for what in ("update_attempt", "update_failure")]
            for one in names
            if one != envoy.id
        ]
        assert others[0] == others[1], "the other's name and no one's look alike"


def stat_of(spiffe_id: str) -> str:
    """What Envoy calls the figures of a secret with this name."""
    return f"sds.{spiffe_id.replace('://', '_')}"


async def test_what_an_envoy_refuses(talking: Talking) -> None:
    """SDS-08: a refusal is logged once with Envoy's reason, and explain shows it."""
    mesh = talking.mesh
    wrong = mesh.envoy("mistaken")
    await mesh.entry(wrong)
    # A bundle where a certificate belongs: the kind of mistake people make.
    listener = tls_listener("call", "service", wrong.access_log, svid="ROOTCA")
    await mesh.start(wrong, [listener], [plain_cluster("service", mesh.service)])
    await wrong.until_stat("sds.ROOTCA.update_rejected")
    reason = "Failed to load incomplete private key"
    text = await wrong.until(lambda: explained(mesh, wrong, reason))
    assert "sds ROOTCA: Envoy has refused version" in text
    await mesh.stack.agent.renew()  # something changed: it is told again, or nothing is
    refusals = [one for one in mesh.stack.agent.process.events() if reason in str(one)]
    assert len(refusals) == 1
    assert (refusals[0]["level"], refusals[0]["pid"]) == ("warning", wrong.process.pid)


async def explained(mesh: Mesh, envoy: Envoy, saying: str) -> str:
    """What ``issuer explain`` prints of an Envoy, if that holds the text."""
    ran = await Programs.of(mesh.stack).issuer("explain", "--pid", str(envoy.process.pid))
    return ran.out if saying in ran.out else ""
