"""A server that runs for years, on a clock that a test drives (SEC-66, SEC-16, BUNDLE-08)."""

import random
import ssl
from datetime import timedelta
from typing import Any

import pytest

from issuer.config import Svids
from spiffe_core.bundle import Bundle, BundleSet
from spiffe_core.jwtsvid import JwtSvid, verify_jwt_svid
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.convert.bundle import bundle_from_wire, bundle_to_wire
from spiffe_wire.frontdoor.tls import client_context
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.bundle.v1 import bundle_pb2
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.callers import (
    NO_CHECK_TIME,
    Holder,
    Running,
    a_running_server,
    below,
    codes,
    csr_params,
)
from tests.support.clock import DrivenClock
from tests.support.stack import a_folder, serving
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")
TD = TrustDomain("example.org")
WEEK = Svids(agent_ttl=timedelta(days=7), x509_max_ttl=timedelta(days=7))


class Agent:
    """An agent that knows only what it was told, when it was told it."""

    def __init__(self, running: Running, node: Holder, bundle: Bundle) -> None:
        self.running = running
        self.node = node
        self.known = bundle
        # It dials by the bundle it knows, not by what the server would tell it now.
        node.dialer._context = self._context
        node.dialer._check = self._check

    def _context(self) -> ssl.SSLContext:
        roots = [one.der for one in self.known.x509_authorities]
        made = client_context(roots, self.node.chain, self.node.key)
        made.verify_flags |= NO_CHECK_TIME
        self.running.server.own.context().verify_flags |= NO_CHECK_TIME
        return made

    def _check(self, chain: tuple[bytes, ...]) -> None:
        at = self.running.server.own.clock.now()
        found = verify_x509_svid(chain, BundleSet.of([self.known]), at=at)
        assert found.spiffe_id == TD.server_id

    async def renew(self) -> None:
        """Renew over a connection of its own, and use what that yields from now on."""
        key = make_key()
        self.node.dialer.cut()
        answer = await self.node.calls.agent.RenewAgent(
            agent_pb2.RenewAgentRequest(params=csr_params(make_csr(key)))
        )
        self.node.use(tuple(answer.svid.cert_chain), key)

    async def sync(self) -> Bundle:
        """Get the bundle, and return the one known until now."""
        before = self.known
        answer = await self.node.calls.bundle.GetBundle(bundle_pb2.GetBundleRequest())
        self.known = bundle_from_wire(answer)
        return before


async def test_sec_66_a_year_and_more_passes() -> None:
    """
    SEC-66, BUNDLE-04, BUNDLE-08, BUNDLE-10: in steps of hours and days, through many
    rotations, the agent renews and is served with the bundle it has; what is signed verifies
    with what was published a step before; what is still valid verifies with what is now; the
    number never goes back.
    """
    clock = DrivenClock()
    chosen = random.Random(11)
    async with a_running_server(clock, svids=WEEK) as running:
        server = running.server
        node = await running.node()
        (entry,) = await running.add(below(node, "/w", x509_svid_ttl=7 * 86_400))
        agent = Agent(running, node, bundle_from_wire(bundle_to_wire(server.hub.bundle)))
        started = clock.now()
        alive: list[X509Svid] = []
        tokens: list[Any] = []
        x509_ids, jwt_ids, own_serials = set(), set(), set()
        while clock.now() < started + timedelta(days=400):
            await clock.run_on(timedelta(hours=chosen.choice([2, 90, 150, 160])))
            await running.settled()
            now = clock.now()
            assert server.problems() == []
            own_serials.add(server.own.svid.serial_number if server.own.svid else 0)

            await agent.renew()
            key = make_key()
            batch = await node.calls.svid.BatchNewX509SVID(
                svid_pb2.BatchNewX509SVIDRequest(
                    params=[svid_pb2.NewX509SVIDParams(entry_id=entry.id, csr=make_csr(key))]
                )
            )
            assert codes(batch.results) == [0]
            token = await node.calls.svid.NewJWTSVID(
                svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=["a"])
            )
            before = await agent.sync()
            after = agent.known

            # Nothing is signed by a key that was not published a step ago.
            fresh = [
                X509Svid.from_chain(tuple(batch.results[0].svid.cert_chain)), node.svid,
            ]  # fmt: skip
            for svid in fresh:
                verify_x509_svid(svid.chain, BundleSet.of([before]), at=now)
            tokens.append(token.svid.token)
            verify_jwt_svid(tokens[-1], BundleSet.of([before]), audience="a", at=now)
            # Whatever was signed before and is still valid verifies with the bundle of now.
            alive = [one for one in [*alive, *fresh] if one.validity.covers(now)]
            for svid in alive:
                verify_x509_svid(svid.chain, BundleSet.of([after]), at=now)
            jwt_ids.add(JwtSvid.parse_unverified(tokens[-1]).key_id)
            x509_ids.add(server.rotator.x509.authority.authority_id)

            # The bundle that agents get is the store's, and its number never goes back.
            stored = await server.store.read(lambda repos: repos.authorities.bundle())
            assert stored == server.hub.bundle
            assert after == bundle_from_wire(bundle_to_wire(stored))
            # Who fetches as often as it says has a key long before that signs.
            assert after.refresh_hint is not None
            assert after.refresh_hint <= server.settings.authority.publish_ahead / 2
            assert after.sequence_number >= before.sequence_number
            same = after.sequence_number == before.sequence_number
            assert same == after.same_content(before)
            assert 1 <= len(after.x509_authorities) <= 3
            assert 1 <= len(after.jwt_authorities) <= 3
            for one in after.x509_authorities:
                assert one.validity.not_after > now - timedelta(days=7)
        assert len(x509_ids) == 2
        assert len(jwt_ids) >= 14
        assert len(own_serials) > 40
        assert len(tokens) > 60
        assert await server.store.read(lambda repos: repos.audit.broken_at()) is None
        # What nobody will ask for is gone: the feed and the record do not grow for ever.
        events = await server.store.read(
            lambda repos: repos.events.last() - repos.events.first()
        )
        assert events < 100
        assert await server.store.read(lambda repos: repos.issued.count()) < 60


async def test_a_server_that_slept_through_its_authority() -> None:
    """
    Down for longer than its own certificate and its authority lived, a server comes
    back with new ones, signs at once, and is ready.
    """
    clock = DrivenClock()
    with a_folder() as folder:
        async with serving(folder, clock) as server:
            old = server.rotator.x509.authority.authority_id
        clock.advance(timedelta(days=800))
        async with serving(folder, clock) as server:
            assert server.is_ready()
            assert server.rotator.x509.authority.authority_id != old
            assert server.own.svid is not None
            verify_x509_svid(server.own.svid.chain, server.hub.own_roots(), at=clock.now())


async def test_the_servers_own_svid_is_renewed_at_half_life() -> None:
    """The server presents a new SVID from half-life on, with a new key and no break."""
    clock = DrivenClock()
    async with a_running_server(clock) as running:
        own = running.server.own
        assert own.svid is not None
        first, context = own.svid, own.context()
        await clock.run_on(first.validity.life / 2 - timedelta(minutes=2))
        assert own.svid is first
        assert own.context() is context
        await clock.run_on(timedelta(minutes=2))
        assert own.svid is not first
        assert own.context() is not context
        assert (await running.dial()).dialer.problem == ""
        rows = await running.server.store.read(lambda repos: repos.issued.page(0, 100))
        assert [row.caller for _, row in rows] == [TD.server_id.uri] * 2
