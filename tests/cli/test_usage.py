"""
Exit codes, over every command of both grammars: what is wrong usage, and what unreachable.

These run `main` in this process, with no server anywhere: whatever is sent ends with code 3,
so any other code proves that nothing was.
"""

import argparse
import asyncio
import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from issuer.cli import main as issuer
from issuer.cli.grammar import SPIRE
from issuer.cli.grammar import parser as issuer_parser
from spiffe_wire.commandline import given_arguments
from tests.support.programs import DONE, OURS, REFUSED, UNREACHABLE, USAGE, Ran, called
from tests.support.stack import a_folder
from workload_api.agent.cli import main as agent
from workload_api.agent.grammar import parser as agent_parser

PARENT = "spiffe://example.org/spire/agent/join_token/nobody"
ENTRY = (
    "entry", "create", "--spiffe-id", "spiffe://example.org/a", "--parent-id", PARENT,
    "--selector", "unix:uid:1",
)  # fmt: skip

Main = Callable[[list[str]], int]
Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one of the two programs in this process."""
    return lambda main, *arguments: called(main, capsys, *arguments)


@pytest.fixture(autouse=True)
def _no_sockets_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///nonexistent/w.sock")


def leaves(one: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[
    tuple[tuple[str, ...], argparse.ArgumentParser]
]:  # fmt: skip
    """Every command that can be run, with its words."""
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from leaves(below, (*words, name))
            return
    yield words, one


COMMANDS = [
    *((issuer, words, one) for words, one in leaves(issuer_parser())),
    *((agent, words, one) for words, one in leaves(agent_parser())),
]
# What a command needs to get as far as asking, by its words; {} for nothing.
NEEDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("entry", "create"): ENTRY[2:],
    ("entry", "update"): (*ENTRY[2:], "--entry-id", "x"),
    ("entry", "delete"): ("x",),
    ("bundle", "set"): ("--id", "other.org", "--path", "{bundle}"),
    ("bundle", "delete"): ("--id", "other.org"),
    ("explain",): ("--pid", "1"),
    ("fetch", "jwt"): ("--audience", "a"),
    ("jwt", "mint"): ("--spiffe-id", "spiffe://example.org/a", "--audience", "a"),
    ("validate",): ("--audience", "a", "t"),
    ("x509", "mint"): ("--spiffe-id", "spiffe://example.org/a"),
    **{("agent", one): ("--spiffe-id", PARENT) for one in ("show", "ban", "evict")},
}
ASKING = [
    pytest.param(main, words, id=" ".join(words))
    for main, words, one in COMMANDS
    if any(action.dest in ("socket", "admin", "endpoint") for action in one._actions)
    and words != ("doctor",)  # looks whether anybody answers, and goes on
]


@pytest.mark.parametrize("style", ["text", "json", "yaml"])
@pytest.mark.parametrize(("main", "words"), ASKING)
def test_unreachable(
    main: Main, words: tuple[str, ...], style: str, run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A command that finds nobody ends with 3 in every style, and asks whether it runs."""
    bundle = tmp_path / "bundle.json"
    bundle.write_text(json.dumps({"keys": []}))
    needs = [one.format(bundle=bundle) for one in NEEDS.get(words, ())]
    if words == ("bundle", "set"):
        needs += ["--format", "spiffe"]
    answer = run(main, *words, *needs, "-o", style)
    assert answer.code == UNREACHABLE, answer.err
    assert answer.out == ""
    assert "is it running" in answer.err


@pytest.mark.parametrize(
    ("main", "words"), [pytest.param(m, w, id=" ".join(w)) for m, w, _ in COMMANDS]
)
def test_an_unknown_option_is_wrong_usage(main: Main, words: tuple[str, ...], run: Run) -> None:
    """Every command refuses an option that it does not know, with code 2."""
    needs = [one for one in NEEDS.get(words, ()) if "{" not in one]
    answer = run(main, *words, *needs, "--no-such-option")
    assert answer.code == USAGE


@pytest.mark.parametrize(("main", "program"), [(issuer, "issuer"), (agent, "issuer-agent")])
def test_no_command(main: Main, program: str, run: Run) -> None:
    """A program without a command explains itself on standard error, and ends with 2."""
    answer = run(main)
    assert answer.code == USAGE
    assert f"usage: {program}" in answer.err
    for arguments in (["--help"], ["-h"], ["--version"]):
        answer = run(main, *arguments)
        assert answer.code == DONE
        assert program in answer.out
    answer = run(main, "no-such-command")
    assert answer.code == USAGE
    answer = run(main, "-x")
    assert answer.code == USAGE


def test_every_command_explains_itself(run: Run) -> None:
    """``--help`` of every command prints its usage, and what each option is for."""
    for main, words, one in COMMANDS:
        answer = run(main, *words, "--help")
        assert answer.code == DONE
        assert " ".join(words) in answer.out
        assert all(action.help for action in one._actions), words


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("--spiffe-id", "https://x"), "--spiffe-id: scheme must be spiffe://"),
        (("--parent-id", "spiffe://X/a"), "--parent-id: "),
        (("--selector", "unix"), "--selector: a selector reads type:value"),
        (("--dns", "UPPER"), "--dns: "),
        (("--federates-with", "a b"), "--federates-with: "),
        (("--x509-svid-ttl", "-5"), "a time reads 600, 10m or 1h30m"),
        (("--x509-svid-ttl", "99999999999"), "a time reads 600, 10m or 1h30m"),
        (("--x509-svid-ttl", "9" * 5000), "a time reads 600, 10m or 1h30m"),
        (("--jwt-svid-ttl", "soon"), "a time reads 600, 10m or 1h30m"),
        (("--expires-at", "tomorrow"), "--expires-at reads 2030-01-31T12:00:00Z"),
        (("--expires-at", "2030-01-31T12:00:00"), "with its offset"),
        (("--expires-at", "9" * 30), "--expires-at reads"),
        (("-o", "xml"), "invalid choice"),
        (("--hin", "x"), "unrecognized arguments"),
        (("--file", "x"), "not both"),
        (("--hint", "\udcff"), "arguments must be UTF-8 text"),
    ],
)
def test_a_value_that_cannot_be(change: tuple[str, str], why: str, run: Run) -> None:
    """It is code 2, and the message names the option and what it reads like."""
    answer = run(issuer, *ENTRY, *change)
    assert answer.code == USAGE
    assert why in answer.err
    assert answer.out == ""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (ENTRY[:2], "--spiffe-id says who"),
        (ENTRY[:4], "`issuer agent list`"),
        (ENTRY[:6], "unix:uid:1000"),
        (("entry", "update", *ENTRY[2:]), "--entry-id says which"),
        (("entry", "delete"), "`issuer entry show`"),
        (("explain",), "give one of --pid N"),
        (("explain", "--pid", "1", "--selectors", "unix:uid:1"), "give one of --pid N"),
        (("explain", "--pid", "1", "--agent-id", PARENT), "--agent-id goes with"),
        (("explain", "--pod", "web"), "--pod takes NAMESPACE/NAME"),
        (("explain", "--pid", "1", "--cluster", "c"), "--cluster goes with --pod"),
        (("explain", "--pid", "0"), "above 0"),
        (("explain", "--selectors", "uid"), "--selectors: a selector reads"),
        (("agent", "ban", "--spiffe-id", "x"), "--spiffe-id: scheme"),
        (("agent", "list", "--banned", "maybe"), "invalid choice"),
        (("bundle", "delete", "--id", "A"), "--id: trust domain"),
        (("bundle", "delete", "--id", "a", "--mode", "burn"), "invalid choice"),
        (("token", "generate", "--spiffe-id", "x"), "--spiffe-id: scheme"),
        (("x509", "mint", "--spiffe-id", "x"), "--spiffe-id: scheme"),
        (("x509", "mint", "--spiffe-id", "spiffe://a/b", "--dns", "*"), "--dns: "),
        (("jwt", "mint", "--spiffe-id", "spiffe://a/b"), "--audience"),
        (("db", "backup", "-c", "x"), "FILE"),
        (("config",), "COMMAND"),
        (("dev", "--trust-domain", "UPPER"), "--trust-domain: "),
        (("dev", "python", "-c", "a b"), "issuer dev -- python -c 'a b'"),
        (("completion", "fish"), "invalid choice"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_is_needed_is_said(arguments: tuple[str, ...], why: str, run: Run) -> None:
    """Each thing that is missing or wrong is named, with an example or where to find it."""
    answer = run(issuer, *arguments)
    assert answer.code == USAGE
    assert why in answer.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("fetch",), "KIND"),
        (("fetch", "jwt"), "--audience"),
        (("fetch", "jwt", "--audience", "a", "--spiffe-id", "x"), "--spiffe-id: scheme"),
        (("fetch", "x509", "--endpoint", "http://x"), "--endpoint: an endpoint reads"),
        (("renew", "--spiffe-id", "x"), "--spiffe-id: scheme"),
        (("run",), "--config"),
        (("config", "validate"), "--config"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_the_agent_needs_is_said(arguments: tuple[str, ...], why: str, run: Run) -> None:
    """The same holds for the agent's commands."""
    answer = run(agent, *arguments)
    assert answer.code == USAGE
    assert why in answer.err


def test_wep_11_no_address_of_the_workload_api(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """WEP-11: with no address given, and none in the variable, the message names it."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET")
    answer = run(agent, "fetch", "x509")
    assert answer.code == USAGE
    assert "SPIFFE_ENDPOINT_SOCKET=unix:///path" in answer.err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("{}", 'must read {"entries"'),
        ('{"entries": []}', "holds no entry"),
        ('{"entries": [7]}', "entry 1: must be an object"),
        ('{"entries": [{"spiffe": "x"}]}', "entry 1: "),
        ('{"entries": [{"spiffe_id": "x"}]}', "entry 1: scheme must be spiffe://"),
        ('{"entries": [{"selectors": ["unix"]}]}', "entry 1: a selector reads"),
        ('{"entries": [{"selectors": "unix:uid:1"}]}', "selectors must be a list"),
        ('{"entries": [{"federates_with": ["A"]}]}', "entry 1: trust domain"),
        ('{"entries": [{"id": "a", "id": "b"}]}', "two members of one name"),
        ('{"entries": [{"id": "a", "entry_id": "b"}]}', "under two names"),
        ('{"entries": [{}, {"x509_svid_ttl": 99999999999}]}', "entry 2: "),
    ],
)
def test_sec_05_a_file_of_entries_that_cannot_be_read(
    text: str, why: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-05, SEC-95: it is refused whole, with the entry and the reason; nothing is sent."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    answer = run(issuer, "entry", "create", "-f", "-")
    assert answer.code == REFUSED
    assert why in answer.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ("entry", "create", "-f", "/nonexistent/f"),
            "cannot read /nonexistent/f: No such file",
        ),
        (("bundle", "set", "--id", "a", "--path", "/nonexistent/f"), "cannot read"),
        (("bundle", "set", "--id", "a", "--path", __file__), "test_usage.py: "),
        (("bundle", "set", "--id", "a", "--path", __file__, "--format", "spiffe"), "not JSON"),
    ],
)
def test_files_that_cannot_be_used(arguments: tuple[str, ...], why: str, run: Run) -> None:
    """What is wrong with a file is code 1 (the usage was right), and the file is named."""
    answer = run(issuer, *arguments)
    assert answer.code == REFUSED
    assert why in answer.err


def test_spire_names() -> None:
    """SPIRE's spelling is ours after translation; what follows ``--`` is left alone."""
    assert given_arguments(["-spiffeID", "x", "--ttl=5", "-dns=a", "-o", "json"], SPIRE) == [
        "--spiffe-id", "x", "--ttl=5", "--dns=a", "-o", "json",
    ]  # fmt: skip
    assert given_arguments(["dev", "--", "p", "-spiffeID"], SPIRE) == [
        "dev", "--", "p", "-spiffeID",
    ]  # fmt: skip
    assert given_arguments(["-spiffe", "spiffeID"], SPIRE) == ["-spiffe", "spiffeID"]


def test_a_server_that_hangs_up(run: Run) -> None:
    """Who accepts and closes is unreachable, and the message has two likely reasons."""
    with a_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()

        async def ask() -> Ran:
            loop = asyncio.get_running_loop()
            asking = asyncio.create_task(
                asyncio.to_thread(run, issuer, "entry", "count", "--socket", folder / "s")
            )
            listener.setblocking(False)
            while not asking.done():
                accepting = asyncio.create_task(loop.sock_accept(listener))
                await asyncio.wait({accepting, asking}, return_when=asyncio.FIRST_COMPLETED)
                if accepting.done():
                    accepting.result()[0].close()
                else:
                    accepting.cancel()
            return await asking

        answer = asyncio.run(ask())
    assert answer.code == UNREACHABLE
    assert "closed the connection: it is stopping, or uid" in answer.err


def test_a_socket_that_nobody_serves(run: Run) -> None:
    """What a killed server leaves behind is unreachable too; so is a path that is too long."""
    with a_folder() as folder:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "s"))
        places = (str(folder / "s"), "/" + "x" * 200)
        for place in places:
            answer = run(issuer, "entry", "count", "--socket", place)
            assert answer.code == UNREACHABLE
            assert answer.err.startswith(f"no server answers at {place}: is it running?")
