"""
``issuer``: the server, and everything an operator asks of it.

Only argparse is imported here; each command imports what it needs when it runs, so that
``--help`` costs little more than Python itself.  Exit codes: 0 done, 1 refused or failed,
2 wrong usage, 3 unreachable.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

DEFAULT_SOCKET = "/run/spiffe-issuer/server/admin.sock"
DEFAULT_AGENT_SOCKET = "/run/spiffe-issuer/agent/admin.sock"
SOCKET_VARIABLE = "SPIFFE_ISSUER_SOCKET"
AGENT_SOCKET_VARIABLE = "SPIFFE_ISSUER_AGENT_SOCKET"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if given[:1] == ["dev"] and "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    parsed = parser().parse_args(given)
    parsed.command_line = command
    if not hasattr(parsed, "run"):
        parser().print_help()
        return 2
    module, _, function = parsed.run.partition(":")
    from issuer.cli.calls import guarded

    return guarded(lambda: getattr(importlib.import_module(module), function)(parsed))


def parser() -> argparse.ArgumentParser:
    """Return the whole grammar."""
    top = argparse.ArgumentParser(
        prog="issuer",
        description="Workload identity: the server of a SPIFFE trust domain.",
        epilog="Start with `issuer dev`: one trust domain on this machine.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    _server(commands)
    _entry(commands)
    _agent(commands)
    _bundle(commands)
    _mint(commands)
    _look(commands)
    return top


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add(commands: _Commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=text)
    made.set_defaults(run=f"issuer.cli.{run}")
    return made


def _group(commands: _Commands, name: str, text: str) -> _Commands:
    made = commands.add_parser(name, help=text, description=text)
    return made.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _output(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "-o", "-output", "--output", choices=("text", "json", "yaml"), default="text",
        help="text for people, json or yaml for programs",
    )  # fmt: skip


def _asks(one: argparse.ArgumentParser) -> argparse.ArgumentParser:
    one.add_argument(
        "--socket", "-socketPath", dest="socket",
        default=os.environ.get(SOCKET_VARIABLE, DEFAULT_SOCKET),
        help=f"the server's admin socket (or {SOCKET_VARIABLE})",
    )  # fmt: skip
    _output(one)
    return one


def _config(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "-c", "-config", "--config", required=True, help="the server's settings, YAML"
    )


def _server(commands: _Commands) -> None:
    dev = _add(
        commands,
        "dev",
        "dev:run",
        "one trust domain on this machine; `-- COMMAND` runs one in it",
    )
    dev.add_argument("--trust-domain", default="example.org")
    dev.add_argument(
        "--keep", metavar="DIR", help="keep the domain's files in DIR, and go on from them"
    )
    dev.add_argument("--verbose", action="store_true", help="show the log of server and agent")
    server = _group(commands, "server", "the server itself")
    run = _add(server, "run", "server:run", "run the server in the foreground")
    _config(run)
    config = _group(commands, "config", "settings of the server")
    _config(_add(config, "validate", "server:validate", "check a settings file"))
    _add(config, "example", "server:example", "print every setting with its default")
    _add(config, "schema", "server:schema", "print the JSON schema of the settings")
    db = _group(commands, "db", "the server's database")
    for name, text in (
        ("status", "say which schema it has"),
        ("upgrade", "bring it to this release's schema"),
    ):
        one = _add(db, name, f"server:db_{name}", text)
        _config(one)
        _output(one)


def _entry_fields(one: argparse.ArgumentParser) -> None:
    one.add_argument("--spiffe-id", "-spiffeID", dest="spiffe_id", help="who it is to be")
    one.add_argument(
        "--parent-id", "-parentID", dest="parent_id", help="the agent (or entry) it lives below"
    )
    one.add_argument(
        "--node",
        "-node",
        action="store_true",
        help="the parent is the server: a group of nodes",
    )
    one.add_argument(
        "--selector", "-selector", action="append", default=[], metavar="TYPE:VALUE",
        help="a fact that must be attested; repeatable, all must hold",
    )  # fmt: skip
    one.add_argument(
        "--x509-svid-ttl",
        "-x509SVIDTTL",
        dest="x509_svid_ttl",
        type=int,
        default=0,
        metavar="SECONDS",
    )
    one.add_argument(
        "--jwt-svid-ttl",
        "-jwtSVIDTTL",
        dest="jwt_svid_ttl",
        type=int,
        default=0,
        metavar="SECONDS",
    )
    one.add_argument("--dns", "-dns", action="append", default=[], metavar="NAME")
    one.add_argument(
        "--federates-with",
        "-federatesWith",
        dest="federates_with",
        action="append",
        default=[],
        metavar="DOMAIN",
    )
    one.add_argument("--hint", "-hint", default="")
    one.add_argument("--admin", "-admin", action="store_true")
    one.add_argument("--downstream", "-downstream", action="store_true")
    one.add_argument("--store-svid", "-storeSVID", dest="store_svid", action="store_true")
    one.add_argument(
        "--expires-at",
        "-entryExpiry",
        dest="expires_at",
        type=int,
        default=0,
        metavar="UNIX_SECONDS",
    )


def _entry(commands: _Commands) -> None:
    entry = _group(commands, "entry", "registration entries: which process gets which identity")
    create = _asks(_add(entry, "create", "entry:create", "add an entry"))
    create.add_argument(
        "--entry-id", "-entryID", dest="entry_id", default="", help="choose its ID"
    )
    _entry_fields(create)
    update = _asks(_add(entry, "update", "entry:update", "replace an entry"))
    update.add_argument("--entry-id", "-entryID", dest="entry_id", required=True)
    _entry_fields(update)
    for name in ("show", "list"):
        show = _asks(_add(entry, name, "entry:show", "list entries"))
        show.add_argument("--entry-id", "-entryID", dest="entry_id")
        show.add_argument("--spiffe-id", "-spiffeID", dest="spiffe_id")
        show.add_argument("--parent-id", "-parentID", dest="parent_id")
        show.add_argument("--selector", "-selector", action="append", default=[])
        show.add_argument("--hint", "-hint", default="")
        show.add_argument("--downstream", "-downstream", action="store_true")
    delete = _asks(_add(entry, "delete", "entry:delete", "remove entries"))
    delete.add_argument("entry_ids", nargs="*", metavar="ID")
    delete.add_argument(
        "--entry-id", "-entryID", dest="entry_ids_flag", action="append", default=[]
    )
    _asks(_add(entry, "count", "entry:count", "count entries"))


def _agent(commands: _Commands) -> None:
    token = _group(commands, "token", "join tokens: how an agent joins")
    generate = _asks(
        _add(token, "generate", "agent:token", "make a token that one agent can use once")
    )
    generate.add_argument("--ttl", "-ttl", type=int, default=600, metavar="SECONDS")
    generate.add_argument(
        "--spiffe-id", "-spiffeID", dest="spiffe_id", help="also give the agent this ID"
    )
    agent = _group(commands, "agent", "attested agents")
    _asks(_add(agent, "list", "agent:show_all", "list agents"))
    _asks(_add(agent, "count", "agent:count", "count agents"))
    for name, text in (
        ("show", "show one agent"),
        ("ban", "deny an agent at once, until it is evicted"),
        ("evict", "forget an agent; it may attest again"),
    ):
        one = _asks(_add(agent, name, f"agent:{name}", text))
        one.add_argument("--spiffe-id", "-spiffeID", dest="spiffe_id", required=True)


def _bundle(commands: _Commands) -> None:
    bundle = _group(
        commands, "bundle", "trust bundles: ours, and foreign ones exchanged by hand"
    )
    formats = ("pem", "spiffe")
    show = _asks(_add(bundle, "show", "bundle:show", "print our own bundle"))
    show.add_argument("--format", "-format", choices=formats, default="pem")
    for name in ("list", "get"):
        one = _asks(_add(bundle, name, "bundle:list_foreign", "print foreign bundles"))
        one.add_argument("--id", "-id", help="of this trust domain alone")
        one.add_argument("--format", "-format", choices=formats, default="pem")
    put = _asks(_add(bundle, "set", "bundle:set_foreign", "add or replace a foreign bundle"))
    put.add_argument("--id", "-id", required=True, help="its trust domain")
    put.add_argument("--path", "-path", default="-", help="a file; - reads standard input")
    put.add_argument("--format", "-format", choices=formats, default="pem")
    delete = _asks(_add(bundle, "delete", "bundle:delete", "remove a foreign bundle"))
    delete.add_argument("--id", "-id", required=True)
    delete.add_argument(
        "--mode", "-mode", choices=("restrict", "delete", "dissociate"), default="restrict"
    )


def _mint(commands: _Commands) -> None:
    for kind, text in (("x509", "X509-SVIDs"), ("jwt", "JWT-SVIDs")):
        group = _group(commands, kind, text)
        one = _asks(
            _add(
                group,
                "mint",
                "mint:x509_svid" if kind == "x509" else "mint:jwt",
                f"sign one of the {text} by hand",
            )
        )
        one.add_argument("--spiffe-id", "-spiffeID", dest="spiffe_id", required=True)
        one.add_argument("--ttl", "-ttl", type=int, default=0, metavar="SECONDS")
        if kind == "x509":
            one.add_argument("--dns", "-dns", action="append", default=[])
            one.add_argument(
                "--write", "-write", metavar="DIR", help="write svid.pem, key.pem, bundle.pem"
            )
        else:
            one.add_argument("--audience", "-audience", action="append", required=True)


def _look(commands: _Commands) -> None:
    explain = _asks(
        _add(commands, "explain", "explain:run", "why a process gets an identity, or does not")
    )
    explain.add_argument("--pid", type=int, help="a process of this machine")
    explain.add_argument(
        "--selectors", nargs="+", metavar="TYPE:VALUE", help="what was attested of it"
    )
    explain.add_argument("--agent-id", help="as this agent would decide")
    explain.add_argument(
        "--agent-socket", default=os.environ.get(AGENT_SOCKET_VARIABLE, DEFAULT_AGENT_SOCKET),
        help=f"the agent's admin socket (or {AGENT_SOCKET_VARIABLE})",
    )  # fmt: skip
    doctor = _asks(
        _add(
            commands, "doctor", "doctor:run", "look for what is wrong here, and say what to do"
        )
    )
    doctor.add_argument("-c", "--config", help="the server's settings, YAML")
    doctor.add_argument(
        "--agent-socket", default=os.environ.get(AGENT_SOCKET_VARIABLE, DEFAULT_AGENT_SOCKET)
    )
    _asks(
        _add(commands, "healthcheck", "doctor:healthcheck", "exit 0 when the server is healthy")
    )
    completion = _add(
        commands, "completion", "server:completion", "print a script that completes commands"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
