"""What the commands of ``issuer-agent`` do."""

import argparse
import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import PreconditionError, SpiffeError
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import (
    DONE,
    REFUSED,
    UNREACHABLE,
    USAGE,
    CommandError,
    completion_script,
    explained,
    message,
    relative,
    say,
    show,
)
from spiffe_wire.commandline import spiffe_id as id_text
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.endpoint import ENVIRONMENT_VARIABLE
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from spiffe_wire.status import error_of, never_answered
from workload_api.agent.grammar import parser
from workload_api.client.client import WorkloadClient, X509Context

PATIENCE: Final = 30.0
"""Seconds for one answer; an agent that is well holds a caller back for 5 at most."""

_T = TypeVar("_T")


def run(arguments: argparse.Namespace) -> int:
    """Serve workloads until told to stop."""
    import uvloop

    from spiffe_core import crashpoints
    from spiffe_wire import descriptors, logs
    from workload_api.agent.app import serve
    from workload_api.agent.config import NodeAttestor

    settings = _settings(arguments.config)
    logs.set_up(settings.log_style.value, settings.log_level)
    descriptors.raise_limit()
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""), lambda: os._exit(137))
    if arguments.join_token_file and settings.node_attestor is not NodeAttestor.JOIN_TOKEN:
        raise CommandError(
            f"--join-token-file: node_attestor in {arguments.config} is "
            f"{settings.node_attestor.value}, which needs none",
            USAGE,
        )
    token_file = arguments.join_token_file or settings.join_token_file
    token = ""
    if token_file:
        # A token that was used already may be gone; the identity on disk then serves.
        try:
            token = Path(token_file).read_text().strip()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise PreconditionError(
                    f"cannot read {token_file}: {error.strerror}"
                ) from error

    async def serve_until_told() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop.set)
        async with serve(settings, token) as agent:
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({stopping, agent.ended}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if agent.ended.done():
                agent.ended.result()

    uvloop.run(serve_until_told())
    return DONE


def fetch(arguments: argparse.Namespace) -> int:
    """Fetch SVIDs or bundles."""
    kinds = {"x509": _fetch_x509, "jwt": _fetch_jwt, "bundles": _fetch_bundles}
    return kinds[arguments.kind](arguments)


def _fetch_x509(arguments: argparse.Namespace) -> int:
    context = _with_client(arguments, lambda client: client.fetch_x509())
    if arguments.write:
        files: dict[str, tuple[str, int]] = {}
        for number, one in enumerate(context.identities):
            files[f"svid.{number}.pem"] = certificates_to_pem(one.svid.chain), 0o644
            files[f"svid.{number}.key"] = private_key_to_pem(one.key), 0o600
        return _write(arguments, files | _bundle_files(context.bundles))
    show(_x509_facts(context), arguments.output, _x509_text(context))
    return DONE


def _fetch_jwt(arguments: argparse.Namespace) -> int:
    with explained("--spiffe-id"):
        wanted = SpiffeId.parse(arguments.spiffe_id) if arguments.spiffe_id else None
    found = _with_client(
        arguments, lambda client: client.fetch_jwt(tuple(arguments.audience), wanted)
    )
    facts = [
        {
            "spiffe_id": one.spiffe_id.uri,
            "audience": list(one.audience),
            "expires_at": one.expires_at.isoformat(),
            "token": one.token,
        }
        for one in found
    ]
    show({"svids": facts}, arguments.output, "\n".join(one.token for one in found))
    return DONE


def _fetch_bundles(arguments: argparse.Namespace) -> int:
    bundles = _with_client(arguments, lambda client: client.fetch_bundles())
    if arguments.write:
        return _write(arguments, _bundle_files(bundles))
    facts = {
        name.name: {
            "x509_authorities": [one.authority_id for one in bundle.x509_authorities],
            "jwt_authorities": [one.key_id for one in bundle.jwt_authorities],
        }
        for name, bundle in bundles.items()
    }
    lines = [
        f"{name}: {len(one['x509_authorities'])} X.509 and {len(one['jwt_authorities'])} JWT "
        "authorities"
        for name, one in facts.items()
    ]
    show(facts, arguments.output, "\n".join(lines))
    return DONE


def watch(arguments: argparse.Namespace) -> int:
    """Print every update: JSON as one line each, YAML as one document each."""

    async def ask(client: WorkloadClient) -> None:
        async for context in client.watch_x509():
            facts = _x509_facts(context)
            if arguments.output == "json":
                print(json.dumps(facts))
            else:
                if arguments.output == "yaml":
                    print("---")
                show(facts, arguments.output, _x509_text(context))
            sys.stdout.flush()

    _with_client(arguments, ask, patience=None)
    return DONE


def validate(arguments: argparse.Namespace) -> int:
    """Validate a JWT-SVID."""
    given = arguments.token
    token = sys.stdin.read().strip() if given == "-" else given
    spiffe_id, claims = _with_client(
        arguments, lambda client: client.validate_jwt(token, arguments.audience)
    )
    text = f"valid: {spiffe_id} for {arguments.audience}"
    show({"spiffe_id": spiffe_id.uri, "claims": dict(claims)}, arguments.output, text)
    return DONE


def whoami(arguments: argparse.Namespace) -> int:
    """Say what the agent learns of this process."""
    answer = _with_client(arguments, lambda client: client.who_am_i())
    selectors = [f"{one.type}:{one.value}" for one in answer.selectors]
    partial = {one.attestor: one.reason for one in answer.partial}
    lines = [f"process {answer.pid}, uid {answer.uid}, gid {answer.gid}"]
    lines += [f"  {one}" for one in selectors]
    lines += [f"  {name} could not vouch: {why}" for name, why in partial.items()]
    lines += list(answer.spiffe_ids) or [
        f"no identity: the operator can ask why with `issuer explain --pid {answer.pid}`"
    ]
    facts = {
        "pid": answer.pid, "uid": answer.uid, "gid": answer.gid, "selectors": selectors,
        "partial": partial, "spiffe_ids": list(answer.spiffe_ids),
    }  # fmt: skip
    show(facts, arguments.output, "\n".join(lines))
    return DONE


def healthcheck(arguments: argparse.Namespace) -> int:
    """Ask whether the agent serves."""

    async def ask(channel: Any) -> Any:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    healthy = _with_admin(arguments, ask).status == 1
    show({"healthy": healthy}, arguments.output, "Agent is healthy." if healthy else "")
    if not healthy:
        say("Agent is not healthy: `issuer-agent status` says why")
    return DONE if healthy else REFUSED


def renew(arguments: argparse.Namespace) -> int:
    """Sign anew."""
    request = agentadmin_pb2.RenewSvidsRequest()
    if arguments.spiffe_id:
        with explained("--spiffe-id"):
            request.spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))

    async def ask(channel: Any) -> Any:
        return await agentadmin_pb2_grpc.AgentAdminStub(channel).RenewSvids(request)

    renewed = _with_admin(arguments, ask).renewed
    show({"renewed": renewed}, arguments.output, f"{renewed} renewed")
    return DONE


def status(arguments: argparse.Namespace) -> int:
    """Say how the agent is."""

    async def ask(channel: Any) -> Any:
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        return await stub.GetStatus(agentadmin_pb2.GetStatusRequest())

    answer = _with_admin(arguments, ask)
    facts = message(answer)
    lines = {
        **facts,
        "agent_id": id_text(answer.agent_id) if answer.HasField("agent_id") else "none yet",
        "last_sync_at": relative(answer.last_sync_at),
        "svid_expires_at": relative(answer.svid_expires_at),
        "problem": answer.problem or "none",
    }
    text = "\n".join(f"{name.replace('_', ' '):<16}{one}" for name, one in lines.items())
    show(facts, arguments.output, text)
    return DONE


def config(arguments: argparse.Namespace) -> int:
    """Print or validate settings."""
    from spiffe_wire.settings import example, json_schema
    from workload_api.agent.config import AgentSettings

    if arguments.what == "example":
        print(example(AgentSettings, {"trust_domain": "example.org"}), end="")
    elif arguments.what == "schema":
        print(json.dumps(json_schema(AgentSettings), indent=2))
    else:
        _settings(arguments.config)
        value = {"file": arguments.config, "valid": True}
        show(value, arguments.output, f"{arguments.config} is valid")
    return DONE


def completion(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    sys.stdout.write(completion_script(parser(), arguments.shell))
    return DONE


def _settings(path: str) -> Any:
    from spiffe_wire.settings import load
    from workload_api.agent.config import ROLE, AgentSettings

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CommandError(
            f"cannot read {path}: {why}; `issuer-agent config example` prints one to start from"
        ) from error
    return load(AgentSettings, text, os.environ, ROLE)


def _with_client(
    arguments: argparse.Namespace,
    ask: Callable[[WorkloadClient], Awaitable[_T]],
    *,
    patience: float | None = PATIENCE,
) -> _T:
    """
    Run *ask* on a client of the Workload API.

    Raises:
        CommandError: no address or a bad one, nobody there, or no answer in time.
        SpiffeError: the agent's refusal.
    """
    address = arguments.endpoint or os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not address:
        raise CommandError(
            f"name the Workload API: set {ENVIRONMENT_VARIABLE}=unix:///path/to/socket, or "
            "use --endpoint",
            USAGE,
        )
    if address.startswith("/"):
        address = f"unix://{address}"
    with explained("--endpoint" if arguments.endpoint else ENVIRONMENT_VARIABLE):
        client = WorkloadClient(address)

    async def go() -> _T:
        async with client:
            return await asyncio.wait_for(ask(client), patience)

    return _reached(go, f"no agent answers at {address}: is it running?", address)


def _with_admin(arguments: argparse.Namespace, ask: Callable[[Any], Awaitable[_T]]) -> _T:
    async def go() -> _T:
        target = f"unix:{os.path.abspath(arguments.admin)}"
        async with grpc.aio.insecure_channel(target) as channel:
            try:
                return await asyncio.wait_for(ask(channel), PATIENCE)
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    problem = (
        f"no agent answers at {arguments.admin}: is it running, and may uid {os.geteuid()} ask "
        "it? name its admin socket with --socket"
    )
    return _reached(go, problem, arguments.admin)


def _reached(go: Callable[[], Any], problem: str, where: str) -> Any:
    try:
        return asyncio.run(go())
    except TimeoutError as error:
        text = f"the agent at {where} does not answer within {PATIENCE:g} s: see its log"
        raise CommandError(text, UNREACHABLE) from error
    except SpiffeError as error:
        cause = error.__cause__
        if isinstance(cause, grpc.aio.AioRpcError) and never_answered(cause):
            raise CommandError(problem, UNREACHABLE) from error
        raise


def _x509_facts(context: X509Context) -> dict[str, Any]:
    return {
        "svids": [
            {
                "spiffe_id": one.svid.spiffe_id.uri,
                "serial": one.svid.serial,
                "not_before": one.svid.validity.not_before.isoformat(),
                "not_after": one.svid.validity.not_after.isoformat(),
                "hint": one.hint,
                "x509_svid": [base64.b64encode(der).decode() for der in one.svid.chain],
            }
            for one in context.identities
        ],
        "bundles": {
            name.name: [one.authority_id for one in bundle.x509_authorities]
            for name, bundle in context.bundles.items()
        },
    }


def _x509_text(context: X509Context) -> str:
    lines = []
    for one in context.identities:
        ends = one.svid.validity.not_after
        lines.append(one.svid.spiffe_id.uri)
        lines.append(f"  serial    {one.svid.serial_number:x}")
        lines.append(f"  not after {ends.isoformat()} ({relative(int(ends.timestamp()))})")
        if one.hint:
            lines.append(f"  hint      {one.hint}")
    lines.append("trusts " + ", ".join(sorted(name.name for name in context.bundles)))
    return "\n".join(lines)


def _bundle_files(bundles: BundleSet) -> dict[str, tuple[str, int]]:
    """One file a trust domain: never a merged pool (SEC-11)."""
    return {
        f"bundle.{name}.pem": (
            certificates_to_pem([a.der for a in one.x509_authorities]),
            0o644,
        )
        for name, one in bundles.items()
    }


def _write(arguments: argparse.Namespace, files: dict[str, tuple[str, int]]) -> int:
    """Each file appears whole, with its mode; keys first: no certificate lacks its key."""
    folder = Path(arguments.write)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, (text, mode) in sorted(files.items(), key=lambda item: item[1][1]):
            new = folder / f".{name}.new"
            new.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(new, flags, mode), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, folder / name)
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error
    written = [str(folder / name) for name in files]
    show({"written": written}, arguments.output, f"wrote {len(files)} files to {folder}")
    return DONE
