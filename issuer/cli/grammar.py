"""The grammar of ``issuer``: every command and option, and SPIRE's names for them."""

import argparse
import os
from typing import Final, TypeAlias

from issuer.cli import COMMANDS, EPILOG, TEXT
from spiffe_wire.options import (
    FILE,
    FOLDER,
    Fill,
    completes,
    new_parser,
    output_option,
    seconds,
    top_parser,
)

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEFAULT_SOCKET = "/run/spiffe-issuer/server/admin.sock"
DEFAULT_AGENT_SOCKET = "/run/spiffe-issuer/agent/admin.sock"
SOCKET_VARIABLE = "SPIFFE_ISSUER_SOCKET"
AGENT_SOCKET_VARIABLE = "SPIFFE_ISSUER_AGENT_SOCKET"

FORMATS = ("pem", "spiffe")
MATCHES = ("exact", "subset", "superset", "any")

SPIRE = {
    "attestationType": "type",
    "data": "file",
    "dns": "dns",
    "downstream": "downstream",
    "entryExpiry": "expires-at",
    "entryID": "entry-id",
    "federatesWith": "federates-with",
    "jwtSVIDTTL": "jwt-svid-ttl",
    "matchFederatesWithOn": "match-federates-with-on",
    "matchSelectorsOn": "match-selectors-on",
    "parentID": "parent-id",
    "socketPath": "socket",
    "spiffeID": "spiffe-id",
    "storeSVID": "store-svid",
    "x509SVIDTTL": "x509-svid-ttl",
    **{
        one: one
        for one in (
            "admin", "audience", "banned", "config", "format", "hint", "id", "mode", "node",
            "output", "path", "selector", "ttl", "write",
        )
    },
}  # fmt: skip
"""SPIRE's option, with one hyphen or two, to ours."""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the grammar; of the command *only* alone when one is named."""
    return top_parser("issuer", TEXT, COMMANDS, EPILOG, _FILL, only)


def _add(commands: Commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    made = new_parser(commands, name, text)
    made.set_defaults(run=run)
    return made


def _group(one: argparse.ArgumentParser) -> Commands:
    return one.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _asks(one: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a command that asks the server its socket and its output option."""
    completes(
        one.add_argument(
            "--socket",
            metavar="PATH",
            default=os.environ.get(SOCKET_VARIABLE, DEFAULT_SOCKET),
            help=f"the server's admin socket (or {SOCKET_VARIABLE}; default {DEFAULT_SOCKET})",
        ),
        FILE,
    )
    output_option(one)
    return one


def _agent_socket(one: argparse.ArgumentParser) -> None:
    completes(
        one.add_argument(
            "--agent-socket",
            metavar="PATH",
            default=os.environ.get(AGENT_SOCKET_VARIABLE, DEFAULT_AGENT_SOCKET),
            help=f"the agent's admin socket (or {AGENT_SOCKET_VARIABLE}; "
            f"default {DEFAULT_AGENT_SOCKET})",
        ),
        FILE,
    )


def _config_option(one: argparse.ArgumentParser, *, required: bool = True) -> None:
    completes(
        one.add_argument(
            "-c",
            "--config",
            required=required,
            metavar="FILE",
            help="the server's settings, YAML",
        ),
        FILE,
    )


def _id_option(one: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    one.add_argument("--spiffe-id", required=required, metavar="ID", help=text)


def _ttl(one: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    one.add_argument(name, type=seconds, default=default, metavar="TIME", help=text)


def _many(one: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    one.add_argument(name, action="append", default=[], metavar=metavar, help=text)


def _dev(one: argparse.ArgumentParser) -> None:
    one.set_defaults(run="dev:run")
    one.usage = "issuer dev [options] [-- COMMAND…]"
    one.epilog = (
        "Without a command it prints three lines to paste into another terminal.  With one, "
        "it runs the command with SPIFFE_ENDPOINT_SOCKET set and an identity of its own, "
        "/dev/command, and ends with the command's exit code."
    )
    one.add_argument(
        "--trust-domain", default="example.org", metavar="NAME", help="default example.org"
    )
    completes(
        one.add_argument(
            "--keep", metavar="DIR", help="keep the domain's files in DIR, and go on from them"
        ),
        FOLDER,
    )
    one.add_argument(
        "--any-program", action="store_true",
        help="the identity is every program's of this user, not COMMAND's executable's alone",
    )  # fmt: skip
    one.add_argument("--verbose", action="store_true", help="show the log of server and agent")
    output_option(one)
    # A command without its `--`, to be told so.
    one.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _server(one: argparse.ArgumentParser) -> None:
    _config_option(_add(_group(one), "run", "server:run", "run the server in the foreground"))


def _config(one: argparse.ArgumentParser) -> None:
    commands = _group(one)
    validate = _add(commands, "validate", "server:validate", "check a settings file")
    _config_option(validate)
    output_option(validate)
    _add(commands, "example", "server:example", "print every setting with its default")
    _add(commands, "schema", "server:schema", "print the JSON schema of the settings")


def _db(one: argparse.ArgumentParser) -> None:
    commands = _group(one)
    for name, text in (
        ("status", "say which schema the database has; exit 1 when it is not this release's"),
        ("upgrade", "bring the database to this release's schema"),
        ("backup", "copy the database, which may be in use, to a new file"),
        ("restore", "make the database anew from a copy; the server must be stopped"),
    ):
        command = _add(commands, name, f"database:{name}", text)
        _config_option(command)
        output_option(command)
        if name in ("backup", "restore"):
            completes(command.add_argument("file", metavar="FILE", help="the copy"), FILE)


def _entry_fields(one: argparse.ArgumentParser) -> None:
    _id_option(one, "who it is to be", required=False)
    one.add_argument("--parent-id", metavar="ID", help="the agent (or entry) it lives below")
    one.add_argument(
        "--node", action="store_true", help="the parent is the server: a group of nodes"
    )
    _many(
        one, "--selector", "TYPE:VALUE", "a fact that must be attested; all of them must hold"
    )
    _ttl(one, "--x509-svid-ttl", 0, "life of its X509-SVIDs (default the server's)")
    _ttl(one, "--jwt-svid-ttl", 0, "life of its JWT-SVIDs (default the server's)")
    _many(one, "--dns", "NAME", "a DNS name in its X509-SVIDs; repeatable")
    _many(one, "--federates-with", "DOMAIN", "it also gets this domain's bundle; repeatable")
    one.add_argument(
        "--hint", default="", metavar="TEXT", help="tells several identities apart"
    )
    one.add_argument(
        "--admin", action="store_true", help="its holder may administer the server"
    )
    one.add_argument(
        "--downstream", action="store_true", help="its holder is a server below this one"
    )
    one.add_argument("--store-svid", action="store_true", help="its SVIDs go to a secret store")
    one.add_argument(
        "--expires-at", default="0", metavar="TIME",
        help="when the entry ends: 2030-01-31T12:00:00Z, or Unix seconds (default never)",
    )  # fmt: skip
    completes(
        one.add_argument(
            "-f",
            "--file",
            metavar="FILE",
            help='JSON instead of options: {"entries": […]}, as `entry show -o json` prints; '
            "- reads standard input",
        ),
        FILE,
    )


def _entry_filter(one: argparse.ArgumentParser) -> None:
    _id_option(one, "with this SPIFFE ID", required=False)
    one.add_argument("--parent-id", metavar="ID", help="below this parent")
    _many(one, "--selector", "TYPE:VALUE", "with this selector; repeatable")
    _match(one, "--match-selectors-on")
    _many(one, "--federates-with", "DOMAIN", "that federates with this domain; repeatable")
    _match(one, "--match-federates-with-on")
    one.add_argument("--hint", default="", metavar="TEXT", help="with this hint")
    one.add_argument("--downstream", action="store_true", help="of downstream servers alone")


def _quiet(one: argparse.ArgumentParser, what: str) -> None:
    one.add_argument(
        "-q", "--quiet", action="store_true", help=f"print {what} alone, one a line"
    )


def _match(one: argparse.ArgumentParser, name: str) -> None:
    one.add_argument(
        name, choices=MATCHES, default="superset", metavar="HOW",
        help="how: exact, subset, superset (the default), any",
    )  # fmt: skip


def _entry(one: argparse.ArgumentParser) -> None:
    commands = _group(one)
    create = _asks(_add(commands, "create", "entry:create", "add an entry, or a file of them"))
    create.add_argument("--entry-id", default="", metavar="ID", help="choose the entry's ID")
    _entry_fields(create)
    update = _asks(
        _add(
            commands, "update", "entry:update", "replace an entry; what is left out is cleared"
        )
    )
    update.add_argument("--entry-id", default="", metavar="ID", help="which entry")
    _entry_fields(update)
    for name in ("show", "list"):
        show = _asks(_add(commands, name, "entry:show", "list entries"))
        show.add_argument("--entry-id", metavar="ID", help="this one alone, in full")
        _quiet(show, "entry IDs")
        _entry_filter(show)
    delete = _asks(_add(commands, "delete", "entry:delete", "remove entries"))
    delete.add_argument("entry_ids", nargs="*", metavar="ID", help="which entry")
    delete.add_argument(
        "--entry-id", dest="more_ids", action="append", default=[], metavar="ID",
        help="the same",
    )  # fmt: skip
    _entry_filter(_asks(_add(commands, "count", "entry:count", "count entries")))


def _token(one: argparse.ArgumentParser) -> None:
    generate = _asks(
        _add(_group(one), "generate", "agent:token", "make a token that one agent uses once")
    )
    _ttl(generate, "--ttl", 600, "how long it can be used (default 10m)")
    _id_option(generate, "also give the agent this ID", required=False)


def _agent(one: argparse.ArgumentParser) -> None:
    commands = _group(one)
    for name, run, text in (
        ("list", "agent:show_all", "list agents"),
        ("count", "agent:count", "count agents"),
    ):
        command = _asks(_add(commands, name, run, text))
        command.add_argument("--type", default="", metavar="NAME", help="attested in this way")
        command.add_argument(
            "--banned", nargs="?", const="true", choices=("true", "false"),
            metavar="true|false",
            help="banned ones alone, or those that are not",
        )  # fmt: skip
        _many(command, "--selector", "TYPE:VALUE", "with this selector; repeatable")
        _match(command, "--match-selectors-on")
        if name == "list":
            _quiet(command, "SPIFFE IDs")
    for name, text in (
        ("show", "show one agent"),
        ("ban", "deny an agent at once, until it is evicted"),
        ("evict", "forget an agent; it may attest again"),
    ):
        run = f"agent:{name if name != 'show' else 'show_one'}"
        _id_option(_asks(_add(commands, name, run, text)), "which agent")


def _bundle(one: argparse.ArgumentParser) -> None:
    commands = _group(one)

    def bundle_format(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--format", choices=FORMATS, default="pem", metavar="pem|spiffe",
            help="certificates (the default), or a SPIFFE bundle document with the JWT keys",
        )  # fmt: skip

    bundle_format(_asks(_add(commands, "show", "bundle:show", "print our own bundle")))
    for name in ("list", "get"):
        command = _asks(_add(commands, name, "bundle:list_foreign", "print foreign bundles"))
        command.add_argument("--id", metavar="DOMAIN", help="of this trust domain alone")
        bundle_format(command)
    put = _asks(_add(commands, "set", "bundle:set_foreign", "add or replace a foreign bundle"))
    put.add_argument("--id", required=True, metavar="DOMAIN", help="its trust domain")
    completes(
        put.add_argument(
            "--path",
            default="-",
            metavar="FILE",
            help="the bundle; - (the default) reads stdin",
        ),
        FILE,
    )
    bundle_format(put)
    delete = _asks(_add(commands, "delete", "bundle:delete", "remove a foreign bundle"))
    delete.add_argument("--id", required=True, metavar="DOMAIN", help="its trust domain")
    delete.add_argument(
        "--mode", choices=("restrict", "delete", "dissociate"), default="restrict",
        metavar="MODE",
        help="entries that federate with it: restrict (the default) refuses while there are "
        "any, delete removes them, dissociate removes the domain from them",
    )  # fmt: skip
    _asks(_add(commands, "count", "bundle:count", "count bundles, our own among them"))


def _x509(one: argparse.ArgumentParser) -> None:
    mint = _asks(_add(_group(one), "mint", "mint:x509_svid", "sign an X509-SVID by hand"))
    _id_option(mint, "whose")
    _ttl(mint, "--ttl", 0, "its life (default the server's)")
    _many(mint, "--dns", "NAME", "a DNS name in it; repeatable")
    completes(
        mint.add_argument(
            "--write",
            metavar="DIR",
            help="write svid.pem, key.pem (mode 0600), bundle.pem; else all three are printed",
        ),
        FOLDER,
    )


def _jwt(one: argparse.ArgumentParser) -> None:
    mint = _asks(_add(_group(one), "mint", "mint:jwt", "sign a JWT-SVID by hand"))
    _id_option(mint, "whose")
    _ttl(mint, "--ttl", 0, "its life (default the server's)")
    mint.add_argument(
        "--audience", action="append", required=True, metavar="NAME",
        help="who is to accept it; repeatable",
    )  # fmt: skip


def _explain(one: argparse.ArgumentParser) -> None:
    one.set_defaults(run="explain:run")
    _asks(one)
    one.add_argument(
        "--pid", type=_process_id, metavar="N", help="a process of this machine; asks the agent"
    )
    one.add_argument(
        "--selectors", nargs="+", metavar="TYPE:VALUE", help="what was attested of a process"
    )
    one.add_argument("--agent-id", metavar="ID", help="with --selectors: as this agent decides")
    one.add_argument(
        "--pod",
        metavar="NS/NAME",
        help="a pod, by its name or how that begins; asks the server",
    )
    one.add_argument(
        "--cluster", metavar="NAME", help="with --pod: its cluster, where there are several"
    )
    _agent_socket(one)


def _process_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError("a process ID is a whole number above 0")
    return int(text)


def _doctor(one: argparse.ArgumentParser) -> None:
    one.set_defaults(run="doctor:run")
    _asks(one)
    _config_option(one, required=False)
    _agent_socket(one)


def _healthcheck(one: argparse.ArgumentParser) -> None:
    one.set_defaults(run="health:healthcheck")
    _asks(one)


def _completion(one: argparse.ArgumentParser) -> None:
    one.set_defaults(run="server:completion")
    one.epilog = "For bash: source <(issuer completion bash)"
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


_FILL: Final[dict[str, Fill]] = {
    "dev": _dev,
    "server": _server,
    "config": _config,
    "db": _db,
    "entry": _entry,
    "token": _token,
    "agent": _agent,
    "bundle": _bundle,
    "x509": _x509,
    "jwt": _jwt,
    "explain": _explain,
    "doctor": _doctor,
    "healthcheck": _healthcheck,
    "completion": _completion,
}
