"""
Entries in a file, for ``issuer entry create|update --file`` (SPIRE's ``-data``).

Two forms of an ID are read: the text ``spiffe://…``, as SPIRE's files have it, and the two
halves that ``issuer entry show -o json`` prints.  An unknown member is refused (SEC-95).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spiffe_core.errors import MalformedError
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from spiffe_core.strictjson import loads
from spiffe_wire.commandline import CommandError, explained
from spiffe_wire.pb.spire.api.types import entry_pb2

MAX_FILE_BYTES: Final = 64 * 1024 * 1024
_SPIRE: Final = {"entry_id": "id", "entryExpiry": "expires_at", "entry_expiry": "expires_at"}
_STORED: Final = ("revision_number", "created_at")
"""What the server decides; `entry show` prints it, so it may stand there."""


def read_input(path: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """
    Return what the file *path* holds; ``-`` is standard input.

    Raises:
        CommandError: it cannot be read, or is longer than *limit* bytes.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise CommandError(f"{path} is longer than {limit} bytes")
    return data


def entries_of_file(path: str) -> list[Any]:
    """
    Return the entries in the JSON file *path* as messages.

    Raises:
        CommandError: says which entry cannot be read, and why.
    """
    with explained(path, 1):
        tree = loads(read_input(path), max_bytes=MAX_FILE_BYTES)
    if isinstance(tree, dict) and set(tree) == {"entries"}:
        tree = tree["entries"]
    if not isinstance(tree, list):
        raise CommandError(f'{path}: must read {{"entries": [{{…}}, …]}}')
    if not tree:
        raise CommandError(f"{path}: holds no entry")
    made = []
    for number, one in enumerate(tree, 1):
        with explained(f"{path}: entry {number}", 1):
            made.append(_entry(one))
    return made


def _entry(tree: Any) -> Any:
    from google.protobuf.json_format import ParseDict, ParseError

    if not isinstance(tree, dict):
        raise MalformedError("must be an object")
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        ours = _SPIRE[name] if name in _SPIRE else str(name)
        if ours in _STORED:
            continue
        if ours in fields:
            raise MalformedError(f"{name} is there under two names")
        fields[ours] = value
    for name in ("spiffe_id", "parent_id"):
        if isinstance(fields.get(name), str):
            fields[name] = _halves(SpiffeId.parse(fields[name]))
    if "selectors" in fields:
        fields["selectors"] = [_selector(one) for one in _list(fields, "selectors")]
    if "federates_with" in fields:
        fields["federates_with"] = [
            TrustDomain.parse(str(one)).name for one in _list(fields, "federates_with")
        ]
    try:
        return ParseDict(fields, entry_pb2.Entry())
    except (ParseError, TypeError, ValueError) as error:
        raise MalformedError(str(error)) from error


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(fields[name], list):
        raise MalformedError(f"{name} must be a list")
    return list(fields[name])


def _selector(one: Any) -> Any:
    if not isinstance(one, str):
        return one
    parsed = Selector.parse(one)
    return {"type": parsed.type, "value": parsed.value}


def _halves(spiffe_id: SpiffeId) -> dict[str, str]:
    return {"trust_domain": spiffe_id.trust_domain.name, "path": spiffe_id.path}
