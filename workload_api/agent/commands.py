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
from spiffe_core.errors import ErrorKind, PreconditionError, SpiffeError
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from spiffe_wire.status import error_of
from workload_api.agent.cli import parser
from workload_api.client.client import WorkloadClient, X509Context

DONE: Final = 0
REFUSED: Final = 1
UNREACHABLE: Final = 3
_T = TypeVar("_T")


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; print what went wrong, and return its exit code."""
    try:
        return command(arguments)
    except SpiffeError as error:
        unreachable = error.kind is ErrorKind.NOT_READY and "failed to connect" in str(error)
        text = str(error)
        if unreachable:
            text = "no agent answers: is it running, and is the address right?"
        if sys.stderr.isatty():
            text = f"\x1b[31m{text}\x1b[0m"
        print(text, file=sys.stderr)
        return UNREACHABLE if unreachable else REFUSED
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Serve workloads until told to stop."""
    import uvloop

    from spiffe_core import crashpoints
    from spiffe_wire import logs
    from workload_api.agent.app import serve

    settings = _settings(arguments.config)
    logs.set_up(settings.log_style.value, settings.log_level)
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""), lambda: os._exit(137))
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
    return {"x509": _fetch_x509, "jwt": _fetch_jwt, "bundles": _fetch_bundles}[arguments.kind](
        arguments
    )


def _fetch_x509(arguments: argparse.Namespace) -> int:
    context = _with_client(arguments, lambda client: client.fetch_x509())
    if arguments.write:
        files: dict[str, tuple[str, int]] = {}
        for number, one in enumerate(context.identities):
            files[f"svid.{number}.pem"] = certificates_to_pem(one.svid.chain), 0o644
            files[f"svid.{number}.key"] = private_key_to_pem(one.key), 0o600
        files |= _bundle_files(context.bundles)
        _write(Path(arguments.write), files)
        print(f"wrote {len(files)} files to {arguments.write}")
        return DONE
    _show(_x509_facts(context), arguments.output, _x509_text(context))
    return DONE


def _fetch_jwt(arguments: argparse.Namespace) -> int:
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
    _show({"svids": facts}, arguments.output, "\n".join(one.token for one in found))
    return DONE


def _fetch_bundles(arguments: argparse.Namespace) -> int:
    bundles = _with_client(arguments, lambda client: client.fetch_bundles())
    if arguments.write:
        _write(Path(arguments.write), _bundle_files(bundles))
        print(f"wrote {len(bundles)} bundles to {arguments.write}")
        return DONE
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
    _show(facts, arguments.output, "\n".join(lines))
    return DONE


def watch(arguments: argparse.Namespace) -> int:
    """Print every update."""

    async def ask(client: WorkloadClient) -> None:
        async for context in client.watch_x509():
            if arguments.output == "text":
                print(_x509_text(context), flush=True)
            else:
                print(json.dumps(_x509_facts(context)), flush=True)

    _with_client(arguments, ask)
    return DONE


def validate(arguments: argparse.Namespace) -> int:
    """Validate a JWT-SVID."""
    token = sys.stdin.read().strip() if arguments.token == "-" else arguments.token  # noqa: S105
    spiffe_id, claims = _with_client(
        arguments, lambda client: client.validate_jwt(token, arguments.audience)
    )
    text = f"valid: {spiffe_id} for {arguments.audience}"
    _show({"spiffe_id": spiffe_id.uri, "claims": dict(claims)}, arguments.output, text)
    return DONE


def whoami(arguments: argparse.Namespace) -> int:
    """Say what the agent learns of this process."""
    answer = _with_client(arguments, lambda client: client.who_am_i())
    selectors = [f"{one.type}:{one.value}" for one in answer.selectors]
    lines = [f"process {answer.pid}, uid {answer.uid}, gid {answer.gid}"]
    lines += [f"  {one}" for one in selectors]
    lines += list(answer.spiffe_ids) or ["no identity: ask the operator for `issuer explain`"]
    facts = {
        "pid": answer.pid, "uid": answer.uid, "gid": answer.gid, "selectors": selectors,
        "spiffe_ids": list(answer.spiffe_ids),
    }  # fmt: skip
    _show(facts, arguments.output, "\n".join(lines))
    return DONE


def healthcheck(arguments: argparse.Namespace) -> int:
    """Ask whether the agent serves."""

    async def ask(channel: Any) -> Any:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    if _with_admin(arguments, ask).status != 1:
        print("Agent is not healthy: `issuer-agent status` says why", file=sys.stderr)
        return REFUSED
    _show({"healthy": True}, arguments.output, "Agent is healthy.")
    return DONE


def renew(arguments: argparse.Namespace) -> int:
    """Sign anew."""
    request = agentadmin_pb2.RenewSvidsRequest()
    if arguments.spiffe_id:
        request.spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))

    async def ask(channel: Any) -> Any:
        return await agentadmin_pb2_grpc.AgentAdminStub(channel).RenewSvids(request)

    renewed = _with_admin(arguments, ask).renewed
    _show({"renewed": renewed}, arguments.output, f"{renewed} renewed")
    return DONE


def status(arguments: argparse.Namespace) -> int:
    """Say how the agent is."""
    from google.protobuf.json_format import MessageToDict

    async def ask(channel: Any) -> Any:
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        return await stub.GetStatus(agentadmin_pb2.GetStatusRequest())

    facts = MessageToDict(
        _with_admin(arguments, ask),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    lines = [f"{name}: {value}" for name, value in facts.items()]
    _show(facts, arguments.output, "\n".join(lines))
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
        if not arguments.config:
            raise PreconditionError("name the file with -c")
        _settings(arguments.config)
        print(f"{arguments.config} is valid")
    return DONE


def completion(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    import shtab

    sys.stdout.write(shtab.complete(parser(), shell=arguments.shell))
    return DONE


def _settings(path: str) -> Any:
    from spiffe_wire.settings import load
    from workload_api.agent.config import ROLE, AgentSettings

    try:
        text = Path(path).read_text()
    except OSError as error:
        raise PreconditionError(
            f"cannot read {path}: {error.strerror}; `issuer-agent config example` prints one "
            "to start from"
        ) from error
    return load(AgentSettings, text, os.environ, ROLE)


def _with_client(
    arguments: argparse.Namespace, ask: Callable[[WorkloadClient], Awaitable[_T]]
) -> _T:
    async def go() -> _T:
        async with WorkloadClient(arguments.endpoint) as client:
            return await ask(client)

    return asyncio.run(go())


def _with_admin(arguments: argparse.Namespace, ask: Callable[[Any], Awaitable[_T]]) -> _T:
    async def go() -> _T:
        async with grpc.aio.insecure_channel(f"unix:{arguments.admin}") as channel:
            try:
                return await ask(channel)
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    return asyncio.run(go())


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
        lines.append(one.svid.spiffe_id.uri)
        lines.append(f"  serial    {one.svid.serial_number:x}")
        lines.append(f"  not after {one.svid.validity.not_after.isoformat()}")
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


def _write(folder: Path, files: dict[str, tuple[str, int]]) -> None:
    """Each file appears whole, with its mode; keys first: no certificate lacks its key."""
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
        raise PreconditionError(f"cannot write to {folder}: {error.strerror}") from error


def _show(value: Any, style: str, text: str) -> None:
    if style == "json":
        print(json.dumps(value, indent=2))
    elif style == "yaml":
        import yaml

        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        print(text)
