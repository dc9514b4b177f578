"""What a workload's own commands do: fetch, watch, validate, whoami."""

import argparse
import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import DONE, USAGE, CommandError, explained, relative, show
from workload_api.agent.asking import with_client
from workload_api.client.client import WorkloadClient, X509Context
from workload_api.sidecar import formats
from workload_api.sidecar.files import File, SvidFolder
from workload_api.sidecar.formats import Password


def fetch(arguments: argparse.Namespace) -> int:
    """Fetch SVIDs or bundles."""
    kinds = {"x509": _fetch_x509, "jwt": _fetch_jwt, "bundles": _fetch_bundles}
    return kinds[arguments.kind](arguments)


def _fetch_x509(arguments: argparse.Namespace) -> int:
    password = _password(arguments)
    context = with_client(arguments, lambda client: client.fetch_x509())
    if not arguments.write:
        show(_x509_facts(context), arguments.output, _x509_text(context))
        return DONE
    files: dict[str, File] = {}
    for number, one in enumerate(context.identities):
        if password is None:
            files |= formats.svid_pem(f"svid.{number}", one)
        else:
            files |= formats.svid_pkcs12(f"svid.{number}", one, password)
    if password is None:
        files |= formats.bundles_pem(context.bundles)
    else:
        files |= formats.bundles_pkcs12(context.bundles, password)
    return _write(arguments, files, re.compile(r"svid\..*|bundle\..*\.(pem|p12)"))


def _fetch_jwt(arguments: argparse.Namespace) -> int:
    with explained("--spiffe-id"):
        wanted = SpiffeId.parse(arguments.spiffe_id) if arguments.spiffe_id else None
    found = with_client(
        arguments, lambda client: client.fetch_jwt(tuple(arguments.audience), wanted)
    )
    if arguments.write:
        audience = arguments.audience
        files: dict[str, File] = {}
        for number, one in enumerate(found):
            files |= formats.jwt_file(formats.jwt_name(audience, number), one)
        theirs = re.escape(formats.jwt_name(audience).removeprefix("jwt."))
        return _write(arguments, files, re.compile(rf"jwt\.[0-9]+\.{theirs}"))
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
    password = _password(arguments)
    bundles = with_client(arguments, lambda client: client.fetch_bundles())
    if arguments.write:
        x509 = (
            formats.bundles_pem(bundles)
            if password is None
            else formats.bundles_pkcs12(bundles, password)
        )
        files = x509 | formats.bundles_jwks(bundles)
        return _write(arguments, files, re.compile(r"bundle\..*"))
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
                sys.stdout.write(json.dumps(facts) + "\n")
            else:
                if arguments.output == "yaml":
                    sys.stdout.write("---\n")
                show(facts, arguments.output, _x509_text(context))
            sys.stdout.flush()

    with_client(arguments, ask, patience=None)
    return DONE


def validate(arguments: argparse.Namespace) -> int:
    """Validate a JWT-SVID."""
    given = arguments.token
    token = sys.stdin.read().strip() if given == "-" else given
    spiffe_id, claims = with_client(
        arguments, lambda client: client.validate_jwt(token, arguments.audience)
    )
    text = f"valid: {spiffe_id} for {arguments.audience}"
    show({"spiffe_id": spiffe_id.uri, "claims": dict(claims)}, arguments.output, text)
    return DONE


def whoami(arguments: argparse.Namespace) -> int:
    """Say what the agent learns of this process."""
    answer = with_client(arguments, lambda client: client.who_am_i())
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


def _password(arguments: argparse.Namespace) -> Password | None:
    """The password of ``--format pkcs12``, None for PEM; read before anything is asked."""
    sealed = arguments.format == "pkcs12"
    if sealed != bool(arguments.password_file) or (sealed and not arguments.write):
        raise CommandError(
            "--format pkcs12 goes with --write DIR and --password-file FILE, and neither "
            "--format nor --password-file without the others",
            USAGE,
        )
    return Password.from_file(Path(arguments.password_file)) if sealed else None


def _write(
    arguments: argparse.Namespace, files: dict[str, File], replaced: re.Pattern[str]
) -> int:
    """Write *files* in the place of all that are called like *replaced*; others stay."""
    folder = Path(arguments.write)
    with SvidFolder(folder, "--write") as place:
        place.write(files, keep=lambda name: replaced.fullmatch(name) is None)
    written = [str(folder / name) for name in sorted(files)]
    show({"written": written}, arguments.output, f"wrote {len(files)} files to {folder}")
    return DONE
