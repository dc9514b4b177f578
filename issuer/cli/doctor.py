"""``issuer doctor``: what is wrong here, and what to do about it."""

import argparse
import asyncio
import os
import platform
import shutil
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from issuer.cli.calls import call
from issuer.cli.database import schema_of
from issuer.cli.health import serving
from issuer.cli.server import settings_of
from issuer.config import Cluster, ServerSettings
from spiffe_core.errors import SpiffeError
from spiffe_wire.commandline import DONE, REFUSED, CommandError, show, table
from spiffe_wire.frontdoor import kernel
from spiffe_wire.k8s.rbac import SERVER_RULES
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc

if TYPE_CHECKING:  # what speaks HTTP is loaded where a cluster is configured
    from spiffe_wire.k8s.credentials import Access

GOOD, WARN, BAD = "good", "warn", "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; *advice* says what to do unless it is good."""

    what: str
    verdict: str
    seen: str
    advice: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Look at everything; exit 1 when something is bad."""
    findings = list(_findings(arguments))
    if arguments.output == "text":
        table(
            ("WHAT", "VERDICT", "SEEN", "WHAT TO DO"),
            [(one.what, one.verdict, one.seen, one.advice) for one in findings],
        )
    else:
        rows = [
            {"what": one.what, "verdict": one.verdict, "seen": one.seen, "advice": one.advice}
            for one in findings
        ]
        show({"findings": rows}, arguments.output)
    return REFUSED if any(one.verdict == BAD for one in findings) else DONE


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield _kernel()
    yield _sqlite()
    yield _clock()
    if arguments.config:
        try:
            settings = settings_of(arguments)
        except (SpiffeError, CommandError) as error:
            yield Finding("settings", BAD, str(error), "correct the file")
        else:
            yield Finding("settings", GOOD, f"trust domain {settings.trust_domain}")
            yield from _places(settings)
            yield from _database(settings)
            yield _port(settings)
            for cluster in settings.clusters:
                yield _cluster(cluster)
    yield _answer("server", arguments.socket, _ask_server)
    yield _answer("agent", arguments.agent_socket, _ask_agent)


def _kernel() -> Finding:
    ours, theirs = socket.socketpair()
    try:
        os.close(ours.getsockopt(socket.SOL_SOCKET, kernel.SO_PEERPIDFD))
    except OSError:
        advice = "use Linux 6.5 or newer, or accept the weaker proof (workloads.peer_proof)"
        return Finding(
            "callers", WARN, f"kernel {platform.release()} hands out no pidfd", advice
        )
    finally:
        ours.close()
        theirs.close()
    return Finding("callers", GOOD, f"kernel {platform.release()} proves them by pidfd")


def _sqlite() -> Finding:
    if sqlite3.sqlite_version_info < (3, 35):
        return Finding("SQLite", BAD, sqlite3.sqlite_version, "use a Python with SQLite 3.35")
    return Finding("SQLite", GOOD, sqlite3.sqlite_version)


def _clock() -> Finding:
    year = time.gmtime().tm_year
    if not 2025 <= year < 2100:
        return Finding(
            "clock", BAD, f"the year is {year}", "set the clock; certificates need it"
        )
    return Finding("clock", GOOD, time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()))


def _places(settings: ServerSettings) -> Iterator[Finding]:
    for name, folder in (
        ("data_dir", settings.data_dir),
        ("runtime_dir", settings.runtime_dir),
    ):
        if not folder.exists():
            yield Finding(name, WARN, f"{folder} is not there yet", "the server makes it")
            continue
        found = folder.stat()
        if name == "data_dir" and found.st_mode & 0o077:
            yield Finding(name, BAD, f"{folder} is open to others", f"chmod 0700 {folder}")
        elif not os.access(folder, os.W_OK):
            yield Finding(name, BAD, f"{folder} cannot be written", "run as its owner")
        else:
            free = shutil.disk_usage(folder).free // 2**20
            verdict = GOOD if free > 200 else WARN
            yield Finding(
                name, verdict, f"{folder}, {free} MiB free", "" if free > 200 else "free some"
            )


def _database(settings: ServerSettings) -> Iterator[Finding]:
    if not settings.database.exists():
        return  # the finding of its folder says enough
    try:
        found = schema_of(settings)
    except CommandError as error:
        yield Finding("database", BAD, str(settings.database), str(error))
        return
    if found.is_current:
        yield Finding("database", GOOD, f"schema {found.current}")
    else:
        seen = f"schema {found.current or 'none'}, this release wants {found.wanted}"
        yield Finding("database", WARN, seen, "the server upgrades it, or `issuer db upgrade`")


def _port(settings: ServerSettings) -> Finding:
    family = socket.AF_INET6 if ":" in settings.bind_address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.bind_address, settings.bind_port))
        except OSError as error:
            seen = f"{settings.bind_address}:{settings.bind_port}: {error.strerror}"
            return Finding("port", WARN, seen, "fine if the server runs; else set bind_port")
    return Finding("port", GOOD, f"{settings.bind_address}:{settings.bind_port} is free")


def _cluster(cluster: Cluster) -> Finding:
    """Is it there, does it know us, and may we do what we do?"""
    from spiffe_wire.k8s.client import ClusterError
    from spiffe_wire.k8s.credentials import CredentialsError, access_of

    name = f"cluster {cluster.name}"
    try:
        access = access_of(cluster.kubeconfig, cluster.context, os.environ)
        lacking = asyncio.run(_lacking(access, verify_pods=cluster.verify_pods))
    except (CredentialsError, ClusterError) as error:
        return Finding(name, BAD, str(error), "mend kubeconfig, or the way to the API server")
    where = f"{access.host}:{access.port}"
    if lacking:
        return Finding(
            name, BAD, f"{where}: we may not {', '.join(lacking)}",
            "grant what deploy/kubernetes/base/server-rbac.yaml grants",
        )  # fmt: skip
    if not cluster.service_account_allow_list:
        return Finding(
            name, WARN, f"{where}: no agent may join",
            "name its account in service_account_allow_list",
        )  # fmt: skip
    return Finding(name, GOOD, f"{where} knows us, and lets us do all we do")


async def _lacking(access: "Access", *, verify_pods: bool) -> list[str]:
    """What of our rights the API server says we lack; anybody may ask that of himself."""
    from spiffe_wire.k8s.client import Client

    client, lacking = Client(access), []
    try:
        for group, resource, verbs in sorted(SERVER_RULES, key=lambda rule: rule[:2]):
            for verb in sorted(verbs):
                if verb in ("list", "watch") and not verify_pods:
                    continue
                wanted = {"group": group, "resource": resource, "verb": verb}
                said = await client.post(
                    "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
                    {
                        "apiVersion": "authorization.k8s.io/v1",
                        "kind": "SelfSubjectAccessReview",
                        "spec": {"resourceAttributes": wanted},
                    },
                )
                if (said.get("status") or {}).get("allowed") is not True:
                    lacking.append(f"{verb} {resource}")
    finally:
        await client.close()
    return lacking


def _answer(what: str, path: str, ask: Callable[[Any], Awaitable[Finding]]) -> Finding:
    try:
        return call(path, ask, what)
    except CommandError as error:
        return Finding(what, WARN, f"{path}: no answer", str(error))


async def _ask_server(channel: Any) -> Finding:
    if await serving(channel):
        return Finding("server", GOOD, "serving")
    return Finding("server", BAD, "not ready", "its /ready page says why")


async def _ask_agent(channel: Any) -> Finding:
    stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
    status = await stub.GetStatus(agentadmin_pb2.GetStatusRequest())
    if not status.ready:
        return Finding("agent", BAD, status.problem or "starting", "see its log")
    if not status.connected:
        seen = f"serves what it has; its server does not answer: {status.problem}"
        return Finding("agent", WARN, seen, "see the server's log, and the way between them")
    return Finding(
        "agent",
        GOOD,
        f"{status.entries} entries, {status.x509_svids} SVIDs, sync {status.sync_mode}, "
        f"callers by {status.peer_proof}",
    )
